"""The run directory: append-only records, an atomic checkpoint, resume. See docs/run-directory.md."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors
from safetensors.torch import save, save_file
from torch import Tensor

from fedtrust.errors import InputError, RunError
from fedtrust.layout import Layout
from fedtrust.probes.base import Artefact

ROUNDS, CLIENTS = "rounds.jsonl", "clients.jsonl"
CHECKPOINT, MODEL = "checkpoint.safetensors", "model.safetensors"
_SEPARATOR = "\x1f"  # joins the parts of a tensor's name in the checkpoint


@dataclass
class Checkpoint:
    """Everything a resume needs.

    Attributes:
        round: the last round that is done; 0 before the first.
        params: the global model [d].
        states: the strategy's components' states by place.
        memories: the clients' memories, by whose they are.
    """

    round: int
    params: Tensor
    states: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    memories: dict[str, dict[str, Tensor]] = field(default_factory=dict)


def write_atomic(path: Path, content: bytes) -> None:
    """Replace a file so that a reader, or a crash at any moment, finds the old content or the new, never half of it.

    Raises:
        RunError: the disk is full or cannot be written.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        _sync(path.parent)
    except OSError as error:
        raise RunError(f"cannot write {path.name}: {error.strerror or error}") from error


def _sync(path: Path) -> None:
    """Push a file's content, or a folder's list of files, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file atomically; a number that is not finite is an error, not a file nobody can read."""
    write_atomic(path, (json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode())


def read_json(path: Path) -> Any:
    """Read a JSON file of a run directory.

    Raises:
        InputError: it is missing or damaged.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"not a run directory: {path.name} is missing", str(path.parent)) from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path.name} is damaged: {error}", str(path.parent)) from None


class RunDirectory:
    """One run's folder, open for writing."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def create(cls, path: Path) -> RunDirectory:
        """Make a new folder.

        Raises:
            InputError: there is one already, and it is not empty: a finished run is never overwritten.
        """
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise InputError("exists already and is not empty; name another folder, or go on with --resume", str(path))
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"cannot be made: {error.strerror}", str(path)) from None
        return cls(path)

    def append(self, name: str, records: Iterable[Mapping[str, Any]]) -> None:
        """Append JSON lines to one of the two records and push them to the disk."""
        lines = "".join(json.dumps(r, ensure_ascii=False, allow_nan=False) + "\n" for r in records)
        try:
            with (self.path / name).open("ab") as file:
                file.write(lines.encode())
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise RunError(f"cannot write {name}: {error.strerror or error}") from error

    def records(self, name: str) -> list[dict[str, Any]]:
        """Return one of the two records as a list."""
        path = self.path / name
        return [json.loads(line) for line in path.read_bytes().splitlines()] if path.exists() else []

    def save(self, checkpoint: Checkpoint) -> None:
        """Replace the checkpoint; it says how long the records were, so that a resume cuts off what came later."""
        tensors = {_key("params"): checkpoint.params.contiguous()}
        for place, state in checkpoint.states.items():
            tensors |= {_key("state", place, name): value.contiguous() for name, value in state.items()}
        for owner, memory in checkpoint.memories.items():
            tensors |= {_key("memory", owner, name): value.contiguous() for name, value in memory.items()}
        sizes = {name: _size(self.path / name) for name in (ROUNDS, CLIENTS)}
        head = {"round": checkpoint.round, "sizes": sizes}
        write_atomic(self.path / CHECKPOINT, save(tensors, metadata={"fedtrust": json.dumps(head, allow_nan=False)}))

    def restore(self) -> Checkpoint | None:
        """Return the last checkpoint, with the records cut back to it; `None` if the run never wrote one.

        Raises:
            InputError: it is damaged.
        """
        path = self.path / CHECKPOINT
        if not path.exists():
            for name in (ROUNDS, CLIENTS):
                (self.path / name).unlink(missing_ok=True)
            return None
        try:
            with safetensors.safe_open(str(path), framework="pt") as file:
                head = json.loads((file.metadata() or {})["fedtrust"])
                found = {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118 -- not a dict
            checkpoint = Checkpoint(int(head["round"]), found.pop("params"))
            for key, value in found.items():
                kind, owner, name = key.split(_SEPARATOR)
                if kind == "state":
                    checkpoint.states.setdefault(owner, {})[name] = value
                else:
                    checkpoint.memories.setdefault(owner, {})[name] = value
            for name, size in head["sizes"].items():
                _cut(self.path / name, size)
        except (KeyError, ValueError, OSError, safetensors.SafetensorError) as error:
            raise InputError(f"the checkpoint is damaged: {' '.join(str(error).split())[:200]}", str(path)) from None
        return checkpoint

    def save_model(self, params: Tensor, layout: Layout) -> str:
        """Write the final model, one tensor a parameter; return its SHA-256."""
        temporary = self.path / (MODEL + ".tmp")
        try:
            save_file({name: value.contiguous().clone() for name, value in layout.unflatten(params).items()}, str(temporary))
            digest = hashlib.sha256(temporary.read_bytes()).hexdigest()
            _sync(temporary)
            temporary.replace(self.path / MODEL)
            _sync(self.path)
        except OSError as error:
            raise RunError(f"cannot write {MODEL}: {error.strerror or error}") from error
        return digest

    def save_artefact(self, name: str, artefact: Artefact) -> None:
        """Write what a probe left to look at."""
        folder = self.path / "artefacts"
        try:
            folder.mkdir(exist_ok=True)
        except OSError as error:
            raise RunError(f"cannot write artefacts: {error.strerror or error}") from error
        safe = "".join(c if c.isalnum() or c in ".-_" else "-" for c in name)
        body = {"kind": artefact.kind, "title": artefact.title, "caption": artefact.caption, **artefact.data}
        write_json(folder / f"{safe}.json", body)

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Keep other processes from playing into this folder; the kernel lets go when this one ends, however it does.

        Raises:
            InputError: another process is playing it.
        """
        with (self.path / ".lock").open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise InputError("is being played by another process", str(self.path)) from None
            yield

    def status(self, status: str, why: str = "") -> None:
        """Say how the run stands."""
        write_json(self.path / "status.json", {"status": status, "why": why})


def _key(*parts: str) -> str:
    return _SEPARATOR.join(parts)


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _cut(path: Path, size: int) -> None:
    """Cut a record back to what it was when the checkpoint was written.

    Raises:
        ValueError: it is shorter than that: lines are lost, and a resumed run would look complete without them.
    """
    if _size(path) < size:
        raise ValueError(f"{path.name} is shorter than the checkpoint says")
    if path.exists():
        with contextlib.closing(path.open("r+b")) as file:
            file.truncate(size)
