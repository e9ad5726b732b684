"""fedtrust: an attack and defence simulator for federated learning.

What an attack, a defence or a probe needs can be imported from here; it is loaded when it is asked for, so that the command line starts
at once.
"""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedtrust.client import Behaviour, Predict, Reply, View, behaviour
    from fedtrust.data.base import Task
    from fedtrust.probes.base import Artefact, ProbeContext, probe
    from fedtrust.registry import model
    from fedtrust.release import AnswerContext, answer
    from fedtrust.repairs import RepairContext, Repaired, RepairFacts, repair
    from fedtrust.scenario import Scenario, load, parse
    from fedtrust.sending import Recipe, SendContext, sender
    from fedtrust.server import AggContext, PipelineFacts, Verdict, aggregator, server_filter, step

# OpenMP's threads wait for more work by spinning, on cores that train clients: on two cores that made rounds up to 1.7 times as long. It
# is read when torch is loaded; whoever loads torch first, or sets it, decides.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

__version__ = "0.1.0"

_HOMES = {
    "fedtrust.client": ("Behaviour", "Predict", "Reply", "View", "behaviour"),
    "fedtrust.data.base": ("Task",),
    "fedtrust.probes.base": ("Artefact", "ProbeContext", "probe"),
    "fedtrust.registry": ("model",),
    "fedtrust.release": ("AnswerContext", "answer"),
    "fedtrust.repairs": ("RepairContext", "RepairFacts", "Repaired", "repair"),
    "fedtrust.scenario": ("Scenario", "load", "parse"),
    "fedtrust.sending": ("Recipe", "SendContext", "sender"),
    "fedtrust.server": ("AggContext", "PipelineFacts", "Verdict", "aggregator", "server_filter", "step"),
}
_HOME = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "AggContext",
    "AnswerContext",
    "Artefact",
    "Behaviour",
    "PipelineFacts",
    "Predict",
    "ProbeContext",
    "Recipe",
    "RepairContext",
    "RepairFacts",
    "Repaired",
    "Reply",
    "Scenario",
    "SendContext",
    "Task",
    "Verdict",
    "View",
    "__version__",
    "aggregator",
    "answer",
    "behaviour",
    "load",
    "model",
    "parse",
    "probe",
    "repair",
    "sender",
    "server_filter",
    "step",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'fedtrust' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)
