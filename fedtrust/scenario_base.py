"""What every part of a scenario is made of: a frozen, strict table without unknown keys, and a component by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pydantic
from pydantic import ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from fedtrust.errors import allowed_list, nearest

#: The largest seed.
BIG = 2**63 - 1


class Spec(pydantic.BaseModel):
    """Base of every part of a scenario: frozen, strict, no unknown key."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _shape(cls, given: Any) -> Any:
        """Bring the short forms of the file into the full form, and refuse unknown keys with the nearest match."""
        if isinstance(given, cls):
            return given
        given = cls.expand(given)
        if not isinstance(given, Mapping):
            raise PydanticCustomError("table", "should be a table, not {got}", {"got": repr(given)})
        for key in given:
            if key not in cls.model_fields:
                raise PydanticCustomError(
                    "unknown_key",
                    "unknown key '{key}'{hint} (keys: {keys}){near}",
                    {
                        "key": str(key),
                        "hint": cls.hint(str(key)),
                        "keys": allowed_list(cls.keys(), 20),
                        "near": nearest(str(key), cls.keys()),
                    },
                )
        return given

    @classmethod
    def expand(cls, given: Any) -> Any:
        """Return the full form of what the file says; the identity where there is no short form."""
        return given

    @classmethod
    def keys(cls) -> list[str]:
        """Return the keys that a file may use here."""
        return list(cls.model_fields)

    @classmethod
    def hint(cls, key: str) -> str:
        """Return a remark on an unknown key, put right after the words 'unknown key'."""
        return ""


class Ref(Spec):
    """A component by name, with its parameters; in the file `"median"` or `{ name = "krum", m = 5 }`."""

    name: str = Field(min_length=1)
    params: dict[str, Any] = {}

    @classmethod
    def expand(cls, given: Any) -> Any:
        """Split a flat table into the name and the parameters."""
        if isinstance(given, str):
            return {"name": given}
        if not isinstance(given, Mapping):
            raise PydanticCustomError("ref", "should be a name or a table with a name, not {got}", {"got": repr(given)})
        rest = dict(given)
        key = "name" if "name" in rest else "kind"
        if key not in rest:
            raise PydanticCustomError("ref", "should have a `name`", {})
        name = rest.pop(key)
        nested = rest.pop("params", {})
        if not isinstance(nested, Mapping):
            raise PydanticCustomError("ref", "`params` should be a table", {})
        twice = sorted(set(rest) & set(nested))
        if twice:
            raise PydanticCustomError("ref", "parameter '{key}' is set twice", {"key": twice[0]})
        return {"name": name, "params": {**nested, **rest}}
