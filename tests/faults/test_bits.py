"""Two threads begin the first chunks of a process at the same time; what a library sets up then must be the same for both."""

from __future__ import annotations

from collections import Counter

import pytest

from .kit import SHORT, Bits, Starter


@pytest.mark.slow
def test_two_hundred_processes_with_two_threads_have_one_result(starter: Starter) -> None:
    """Without `threads._set_up_vector_maths` 24 of 200 had other bits on an Intel processor with AMX (on others none was seen)."""
    scenario = starter.scenario(SHORT)
    results: Counter[str] = Counter()
    for i in range(200):
        out = starter.folder / f"run-{i}"
        assert starter.play("run", scenario, "--engine", "local", "--workers", "2", "--out", out, "--quiet").code == 0
        results[Bits.of(out).model] += 1
    assert len(results) == 1, results
