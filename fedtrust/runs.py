"""The run directory: append-only records, an atomic checkpoint, resume. See docs/run-directory.md."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import save
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
        RunError: the disk is full or cannot be written; what was written of the new content is taken away again, it takes up space.
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
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
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


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON file of a run directory; all of them hold an object.

    Raises:
        InputError: it is missing or damaged.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(value, dict):
            raise ValueError("should be an object")
    except FileNotFoundError:
        raise InputError(f"not a run directory: {path.name} is missing", str(path.parent)) from None
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path.name} is damaged: {error}", str(path.parent)) from None
    return value


def read_status(folder: Path) -> str:
    """Return how a run stands; `running` if it never said so: killed in its first moments it starts from the beginning.

    Raises:
        InputError: the status file is damaged.
    """
    path = folder / "status.json"
    if not path.exists():
        return "running"
    status = read_json(path).get("status")
    if not isinstance(status, str):
        raise InputError(f"{path.name} is damaged: it has no status", str(folder))
    return status


class RunDirectory:
    """One run's folder, open for writing."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._read: dict[str, tuple[int, int]] = {}  # record → how many bytes of it have been read back, and their CRC-32

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
        path = self.path / name
        size = _size(path)
        try:
            with path.open("ab") as file:
                file.write(lines.encode())
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            with contextlib.suppress(OSError):
                os.truncate(path, size)  # half a line would be in the way of every reader
            raise RunError(f"cannot write {name}: {error.strerror or error}") from error

    def records(self, name: str) -> list[dict[str, Any]]:
        """Return one of the two records as a list."""
        path = self.path / name
        return [json.loads(line) for line in path.read_bytes().splitlines()] if path.exists() else []

    def save(self, checkpoint: Checkpoint) -> None:
        """Replace the checkpoint.

        It says how long the records were, so that a resume cuts off what came later, and the checksums of records and tensors.
        """
        tensors = {_key("params"): checkpoint.params.contiguous()}
        for place, state in checkpoint.states.items():
            tensors |= {_key("state", place, name): value.contiguous() for name, value in state.items()}
        for owner, memory in checkpoint.memories.items():
            tensors |= {_key("memory", owner, name): value.contiguous() for name, value in memory.items()}
        head = {"round": checkpoint.round, "records": {name: self._stand(name) for name in (ROUNDS, CLIENTS)}}
        head["checksum"] = _checksum(tensors, head)
        write_atomic(self.path / CHECKPOINT, save(tensors, metadata={"fedtrust": json.dumps(head, allow_nan=False)}))

    def restore(self) -> Checkpoint | None:
        """Return the last checkpoint, with the records cut back to it; `None` if the run never wrote one.

        Raises:
            InputError: it or a record is damaged, or it is not there although rounds were recorded.
        """
        path = self.path / CHECKPOINT
        if not path.exists():
            rounds = self.path / ROUNDS
            begun = rounds.exists() and rounds.read_bytes().count(b"\n") > 1  # the first checkpoint comes before the first round
            if begun or _size(self.path / CLIENTS):
                raise InputError(f"{CHECKPOINT} is missing, though rounds were recorded; play the scenario anew", str(self.path))
            for name in (ROUNDS, CLIENTS):
                (self.path / name).unlink(missing_ok=True)
            return None
        try:
            with safetensors.safe_open(str(path), framework="pt") as file:
                head = json.loads((file.metadata() or {})["fedtrust"])
                found = {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118 -- not a dict
            if _checksum(found, head) != head.pop("checksum"):
                raise ValueError("it is not what was written")
            checkpoint = Checkpoint(int(head["round"]), found.pop("params"))
            for key, value in found.items():
                kind, owner, name = key.split(_SEPARATOR)
                if kind == "state":
                    checkpoint.states.setdefault(owner, {})[name] = value
                else:
                    checkpoint.memories.setdefault(owner, {})[name] = value
        except (KeyError, TypeError, ValueError, AttributeError, OSError, safetensors.SafetensorError) as error:
            raise InputError(f"the checkpoint is damaged: {' '.join(str(error).split())[:200]}", str(path)) from None
        for name, (size, checksum) in head["records"].items():
            self._cut(name, size, checksum)
        return checkpoint

    def _stand(self, name: str) -> tuple[int, int]:
        """Return a record's length in bytes and its CRC-32; reads only what was appended since the last call.

        Raises:
            RunError: it cannot be read.
        """
        size, checksum = self._read.get(name, (0, 0))
        path = self.path / name
        try:
            if path.exists():
                size, checksum = _read_on(path, size, checksum)
        except OSError as error:
            raise RunError(f"cannot read {name} back: {error.strerror or error}") from error
        self._read[name] = size, checksum
        return size, checksum

    def _cut(self, name: str, size: int, checksum: int) -> None:
        """Cut a record back to what it was when the checkpoint was written.

        Raises:
            InputError: that much of it is not there, or is not what was written.
        """
        path = self.path / name
        try:
            found = _read_on(path, 0, 0, size) if path.exists() else (0, 0)
            if found != (size, checksum):
                why = "it is shorter than the checkpoint says" if found[0] < size else "it is not what was written"
                raise InputError(f"{name} is damaged: {why}", str(self.path))
            if path.exists():
                with contextlib.closing(path.open("r+b")) as file:
                    file.truncate(size)
        except OSError as error:
            raise InputError(f"{name} cannot be used: {error.strerror or error}", str(self.path)) from None
        self._read[name] = found

    def save_model(self, params: Tensor, layout: Layout) -> str:
        """Write the final model, one tensor a parameter; return its SHA-256."""
        content = save({name: value.contiguous().clone() for name, value in layout.unflatten(params).items()})
        write_atomic(self.path / MODEL, content)
        return hashlib.sha256(content).hexdigest()

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
        try:
            file = (self.path / ".lock").open("w")
        except OSError as error:
            raise InputError(f"cannot be written: {error.strerror or error}", str(self.path)) from None
        with file:
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


def _read_on(path: Path, start: int, checksum: int, end: int | None = None) -> tuple[int, int]:
    """Return a file's length, at most `end`, and its CRC-32, of which the first `start` bytes are in `checksum` already."""
    place = start
    with path.open("rb") as file:
        file.seek(start)
        while part := file.read(1 << 20 if end is None else min(1 << 20, end - place)):
            place, checksum = place + len(part), zlib.crc32(part, checksum)
    return place, checksum


def _checksum(tensors: Mapping[str, Tensor], head: Mapping[str, Any]) -> int:
    """Return the CRC-32 of a checkpoint's content: tensors by name, type and shape, and what its head says beside the checksum."""
    about = {key: head[key] for key in ("round", "records")}
    checksum = zlib.crc32(json.dumps(about, sort_keys=True).encode())
    for name in sorted(tensors):
        value = tensors[name].contiguous()
        checksum = zlib.crc32(f"{name} {value.dtype} {tuple(value.shape)}".encode(), checksum)
        checksum = zlib.crc32(value.reshape(-1).view(torch.uint8).numpy().data, checksum)
    return checksum
