"""Every hostile submission is kept in, and what it did is known by kind: in bubblewrap with the system-call filter and without it, and in
Landlock. Played by `inside`, in the private place that `outer` makes; here only what was observed is looked at."""

from __future__ import annotations

import os
import re
from typing import Any, NamedTuple

import pytest

from fedtrust.classroom.sandbox.backends_bubblewrap import program
from tests.classroom.hostile import outer

pytestmark = pytest.mark.timeout(600)  # all cases of a sandbox are played when the first is looked at


class Case(NamedTuple):
    """What must be observed.

    Attributes:
        faults: kinds of fault, one of which the call must end with; empty: the call ends well, and nothing was won.
        refused: system calls of which the filter must have refused at least one.
        tried: what the submission must have printed: it really went as far as that.
        alone: the kinds of fault where namespaces alone keep it in (no filter); `None`: not played without the filter.
        alone_tried: what it must have printed there.
        landlock_tried: what it must have printed in Landlock, if something else.
    """

    faults: tuple[str, ...] = ()
    refused: tuple[str, ...] = ()
    tried: str = r"tried"
    alone: tuple[str, ...] | None = None
    alone_tried: str = r"tried"
    landlock_tried: str = ""


NOT_ROOT = r"(tried \w+Error\n){4}uid (?!0 )(\d+) \2 \(\2, \2, \2\)"
CASES: dict[str, Case] = {
    # what is to be seen
    "read_labels": Case(
        tried=r"tried /tmp/canary/labels.txt FileNotFoundError(.|\n)*tried sklearn|data sets \[\]",
        landlock_tried=r"tried /tmp/canary/labels.txt PermissionError",
    ),
    "other_submissions": Case(
        ("crash",),
        tried=r"tried /tmp/canary/submissions FileNotFoundError",
        landlock_tried=r"tried /tmp/canary/submissions PermissionError",
    ),
    "read_home": Case(
        ("crash",),
        tried=r"tried \S+/secret.txt FileNotFoundError(.|\n)*tried /etc/shadow FileNotFoundError",
        landlock_tried=r"tried \S+/secret.txt PermissionError(.|\n)*tried /etc/shadow PermissionError",
    ),
    "read_environment": Case(tried=r"own \[\('HOME', '/tmp'\)(.|\n)*tried /proc/\S+/environ PermissionError"),
    "frame_walk": Case(tried=r"modules \[\]\ntried"),
    "trace_minder": Case((), ("ptrace",), r"(tried PermissionError\n){4}ptrace -1 1", (), r"(tried PermissionError\n){4}ptrace -1 1"),
    # what is to be changed
    "patch_torch": Case(("not-finite",)),
    "write_outside": Case(
        tried=r"tried /tmp/canary/planted.txt FileNotFoundError(.|\n)*tried /etc/planted OSError(.|\n)*tried /planted OSError",
        landlock_tried=r"tried /tmp/canary/planted.txt PermissionError(.|\n)*tried /etc/planted (OS|Permission)Error",
    ),
    "change_modes": Case((), ("chmod",), r"(tried PermissionError\n){4}", (), r"(tried FileNotFoundError\n){4}"),
    "fill_scratch": Case(
        ("crash",), tried=r"tried \d+ OSError No space left on device\ntook 16777216\n", landlock_tried=r"tried 0 PermissionError"
    ),
    "remember_games": Case(tried=r"found False False"),
    "forged_event": Case(
        tried=r"(tried \d+ (PermissionError|FileNotFoundError)\n){3}",
        alone=(),
        alone_tried=r"(tried \d+ (PermissionError|FileNotFoundError)\n){3}",
    ),
    # who is to be reached
    "signal_parent": Case((), ("kill",), r"(tried PermissionError\n){12}", ("killed",), r"sent 1\n(.|\n)*tried ProcessLookupError"),
    "connect_tcp": Case((), ("socket",), r"(tried PermissionError\n){3}", (), r"(tried ConnectionRefusedError\n){3}"),
    "send_udp": Case((), ("socket",), r"(tried PermissionError\n){2}", (), r"sent"),
    "abstract_socket": Case((), ("socket",), r"tried PermissionError", (), r"tried ConnectionRefusedError"),
    # what is to be become
    "mount_something": Case((), ("mount",), r"mount -1 1\numount -1 1\nchroot -1 1", (), r"mount -1 1\numount -1 1\nchroot -1 1"),
    "nested_userns": Case((), ("unshare",), r"(unshare -1 1\n){4}", (), r"(unshare -1 \d+\n){4}"),
    "become_root": Case(tried=NOT_ROOT, alone=(), alone_tried=NOT_ROOT),
    "start_program": Case((), ("execve",), r"tried PermissionError\nsystem 32512", ("killed",), r"uid=65534(.|\n)*cannot touch"),
    "kernel_doors": Case((), ("io_uring_setup", "bpf", "keyctl", "shmget"), r"(\w+ -1 1\n){7}", (), r"(\w+ -1 \d+\n){7}"),
    "ask_for_ever": Case(("forbidden",), ("kill",)),
    # what is to be used up
    "fork_bomb": Case((), ("clone", "fork"), r"tried PermissionError after 0", (), r"tried BlockingIOError after \d\d?\n"),
    "thread_bomb": Case(
        (), ("clone", "clone3"), r"tried can't start new thread after 0", (), r"tried can't start new thread after \d\d?\n"
    ),
    "memory_one": Case(("memory",)),
    "memory_eight": Case(("crash",), ("clone", "fork"), tried=""),
    "raise_limits": Case(("memory",), tried=r"(tried ValueError\n){4}"),
    "memory_files": Case((), ("memfd_create",), r"(tried \w+\n){64}took 0"),
    "huge_tensor": Case(("memory",)),
    "endless_loop": Case(("cpu", "timeout")),  # on a machine that is busy, the clock on the wall is first
    "endless_import": Case(("cpu", "timeout")),
    "sleep": Case(("timeout",)),
    "left_behind": Case(("crash",), ("clone", "fork"), "", (), r"left one behind"),
    "output_flood": Case(("flood",)),
    # what is to be believed
    "huge_reply": Case(("flood",)),
    "pickle_reply": Case(("reply",)),
    "lying_header": Case(("reply",)),
    "lying_offsets": Case(("reply",)),
    "lying_length": Case(("flood",)),
    "nested_json": Case(("reply",)),
    "nan_flood": Case(("not-finite",)),
    "wrong_shape": Case(("reply",)),
    "ask_too_often": Case(("budget",), tried=r"tried 10 44 samples"),
    "crash_hard": Case(("killed",)),
    "leave_early": Case(("killed",)),
}
#: What no submission may print.
WON = re.compile(r"^(got|connected|became|changed|opened|forged|lifted|wrote /(?!tmp/planted)|.* 'digits)", re.MULTILINE)
ALONE = tuple(name for name, case in CASES.items() if case.alone is not None)
#: The three sandboxes: backend, whether the filter holds, whom root becomes first, and what is played.
SETS: dict[str, tuple[str, bool, int | None, tuple[str, ...]]] = {
    "bubblewrap": ("bubblewrap", True, None, tuple(CASES)),
    "bubblewrap-namespaces-alone": ("bubblewrap", False, 1000, ALONE),
    "landlock": ("landlock", True, None, tuple(CASES)),
}
#: With its filter, bubblewrap is tried by every `make test`; without, and Landlock, by `make test-all`: each set takes minutes.
SLOW = {name: () if name == "bubblewrap" else (pytest.mark.slow,) for name in SETS}
ROWS = [pytest.param(name, case, marks=SLOW[name], id=f"{name}-{case}") for name, (_, _, _, cases) in SETS.items() for case in cases]


def observed(name: str) -> dict[str, dict[str, Any]]:
    if program() is None:
        pytest.skip("bubblewrap is not installed: no hostile submission is played without a namespace around it")
    found = outer.played(*SETS[name])
    assert "failed" not in found[""], found[""]
    if "skipped" in found[""]:
        pytest.skip(f"{name}: {found['']['skipped']}")
    return found


@pytest.mark.parametrize(("name", "case"), ROWS)
def test_hostile_submission_is_kept_in_and_reported(name: str, case: str) -> None:
    found, row = observed(name)[case], CASES[case]
    faults, refused, tried = row.faults, row.refused, row.tried
    if name == "bubblewrap-namespaces-alone":
        faults, refused, tried = row.alone or (), (), row.alone_tried
    elif name == "landlock":
        tried = row.landlock_tried or tried
    assert found["fault"] in (faults or (None,)), found["sentence"]
    assert bool(found["sentence"]) == bool(faults)
    assert not refused or set(refused) & set(found["refused"]), found
    assert re.search(tried, found["output"]), found["output"]
    shown = (
        found["output"] if name != "landlock" or case != "read_labels" else found["output"].split("data sets")[0]
    )  # the packages' own data
    assert not WON.search(shown), found["output"]
    assert found["leaked"] == []
    assert found["touched"] == []
    assert found["left"] == {}


@pytest.mark.parametrize(("name", "case"), ROWS)
def test_the_next_game_finds_nothing_of_it(name: str, case: str) -> None:
    after = observed(name)[case]["next"]
    assert after["fault"] is None, after["sentence"]
    assert after["refused"] == {}
    if case == "remember_games":
        assert "found False False" in after["output"]
    else:
        assert after["returned"] == pytest.approx([1 + i / 31 for i in range(32)], abs=1e-6)


@pytest.mark.parametrize("name", [pytest.param(name, marks=SLOW[name]) for name in SETS])
def test_every_canary_could_be_touched_and_the_sandbox_is_nobody(name: str) -> None:
    found = observed(name)
    start = found[""]
    for what in ("tcp", "unix", "datagram", "signals", "planted"):
        assert any(what in touched for touched in start["reachable"]), what
    inside = start["facts"]
    assert inside["uid"] == (65534 if name != "landlock" or start["uid"] == 0 else start["uid"])
    if name != "landlock":  # there /proc, which would say so, is closed
        assert {inside["capabilities"], inside["effective"]} == {"0" * 16}
        assert inside["no_new"] == "1"
    assert found["closed"]["still"] == {}


def test_there_are_enough_hostile_submissions_and_none_is_forgotten() -> None:
    files = {entry.removesuffix(".py") for entry in os.listdir(outer.INSIDE.with_name("submissions")) if entry.endswith(".py")}
    assert files == set(CASES)
    assert len(CASES) >= 22
