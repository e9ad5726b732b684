"""`[privacy]` of a scenario: what central differential privacy the server gives its clients."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from fedtrust.scenario_base import Spec


class ClipSpec(Spec):
    """What bounds a client's update. In the file also a bare number: that L2 norm, always.

    Attributes:
        kind: `fixed`, or `adaptive` after a noised quantile of the clients' norms (Andrew et al., NeurIPS 2021).
        norm: fixed: the bound C.
        quantile: adaptive: which share of the clients should lie within the bound (γ).
        initial: adaptive: the first bound.
        lr: adaptive: how fast it follows (η_C).
        noise: adaptive: standard deviation of the noise on the count of clients within the bound (σ_b); `None`: a twentieth of the cohort,
            as in the paper, but at least the noise multiplier.
    """

    kind: Literal["fixed", "adaptive"] = "fixed"
    norm: float | None = Field(default=None, gt=0, le=1e9)
    quantile: float = Field(default=0.5, gt=0, lt=1)
    initial: float = Field(default=0.1, gt=0, le=1e9)
    lr: float = Field(default=0.2, gt=0, le=10)
    noise: float | None = Field(default=None, gt=0, le=1e9)

    @classmethod
    def expand(cls, given: Any) -> Any:
        """Understand a bare number."""
        return {"norm": given} if isinstance(given, int | float | str) else given

    @model_validator(mode="after")
    def _one_kind(self) -> ClipSpec:
        if self.kind == "fixed" and self.norm is None:
            raise PydanticCustomError("clip", "a fixed clip needs its `norm`", {})
        own = {"norm"} if self.kind == "fixed" else {"quantile", "initial", "lr", "noise"}
        # A default that is written out, as in a resolved scenario, says nothing.
        fields = type(self).model_fields
        stray = sorted(k for k in self.model_fields_set - own - {"kind"} if getattr(self, k) != fields[k].default)
        if stray:
            raise PydanticCustomError("clip", "a clip of kind '{kind}' has no '{key}'", {"key": stray[0], "kind": self.kind})
        return self


class PrivacySpec(Spec):
    """Central differential privacy: the server is trusted with the updates, and whoever sees the models learns little about a client.

    Attributes:
        unit: whose presence is hidden: a `client` with all its data. (One record: that is the clients' own affair, see `dp-sgd`.)
        mechanism: `dp-fedavg` (McMahan et al., ICLR 2018) or `dp-ftrl` (Kairouz et al., ICML 2021).
        sampling: dp-fedavg: `poisson`, everybody with probability per_round / count, or `fixed`, exactly per_round clients; dp-ftrl:
            `round-robin`. `None`: the mechanism's first.
        clip: what bounds an update.
        noise_multiplier: standard deviation of the noise ÷ sensitivity (σ); the sensitivity is the clip, or with `fixed` sampling twice
            the clip, since there a client is replaced and not removed.
        epsilon: the target in place of `noise_multiplier`: the least σ that keeps ε at `delta` over all rounds.
        delta: δ.
        bands: dp-ftrl: over how many rounds the noise is correlated; `None`: as many as lie between two parts of a client.
    """

    unit: Literal["client"] = "client"
    mechanism: Literal["dp-fedavg", "dp-ftrl"] = "dp-fedavg"
    sampling: Literal["poisson", "fixed", "round-robin"] | None = None
    clip: ClipSpec
    noise_multiplier: float | None = Field(default=None, gt=0, le=1e6)
    epsilon: float | None = Field(default=None, gt=0, le=1e6)
    delta: float = Field(default=1e-5, gt=0, lt=1)
    bands: int | None = Field(default=None, ge=1)

    @model_validator(mode="before")
    @classmethod
    def _records(cls, given: Any) -> Any:
        if isinstance(given, dict) and given.get("unit") == "record":
            raise PydanticCustomError("unit", "the record's privacy is its client's affair: set clients.behaviour = 'dp-sgd'", {})
        return given

    @model_validator(mode="after")
    def _together(self) -> PrivacySpec:
        if (self.noise_multiplier is None) == (self.epsilon is None):
            got = "neither" if self.epsilon is None else "both"
            raise PydanticCustomError("noise", "needs exactly one of noise_multiplier and epsilon (got {got})", {"got": got})
        ordered = self.mechanism == "dp-ftrl"
        if self.sampling is not None and ordered != (self.sampling == "round-robin"):
            fits = "'round-robin'" if ordered else "'poisson' or 'fixed'"
            raise PydanticCustomError("sampling", "{mechanism} draws its cohorts {fits}", {"mechanism": self.mechanism, "fits": fits})
        if ordered and self.clip.kind == "adaptive":
            raise PydanticCustomError("clip", "dp-ftrl's noise is correlated over the rounds, so the clip must be fixed", {})
        if not ordered and self.bands is not None:
            raise PydanticCustomError("bands", "`bands` is a parameter of dp-ftrl", {})
        return self

    @property
    def label(self) -> str:
        """A short name: the mechanism with its ε or σ."""
        return f"{self.mechanism} ε={self.epsilon:g}" if self.epsilon is not None else f"{self.mechanism} σ={self.noise_multiplier:g}"
