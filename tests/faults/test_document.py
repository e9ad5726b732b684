"""docs/faults.md names the faults of the table, no others, and says of each what happened."""

from __future__ import annotations

from .conftest import WRITING
from .table import FAULTS, NOT_RUN, documented, text


def test_the_document_is_the_tables() -> None:
    assert len({row.fault for row in FAULTS}) == len(FAULTS)
    if WRITING:
        return  # it is about to be written
    found = documented()
    assert [(fault, row.how, row.must) for fault, row in found.items()] == [(r.fault, r.how, r.must) for r in FAULTS]
    assert [fault for fault, row in found.items() if row.happened == NOT_RUN] == []


def test_what_is_written_can_be_read_back(tmp_path: object) -> None:
    happened = {row.fault: f"what | happened to {row.fault}" for row in FAULTS}
    assert {fault: row.happened for fault, row in documented(text(happened)).items()} == happened
