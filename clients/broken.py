"""Clients whose messages are wrong: what a server must survive before any question of defence."""

from __future__ import annotations

import math
from typing import Literal

import torch

from fedtrust.client import Behaviour, Reply, View, behaviour

Fault = Literal[
    "nan", "inf", "wrong-shape", "scalar", "missing-key", "extra-key", "permuted-keys", "float64", "huge-weight", "negative-weight",
    "no-reply", "error",
]  # fmt: skip


@behaviour(
    "malformed", paper="the replies that stock FedAvg accepts or dies of; they are what fedtrust.engine.validate is for", broken=True
)
class Malformed(Behaviour):
    """Train honestly and then send a broken reply: values, shapes, names, types or sample counts that must not get past the server."""

    fault: Fault = "nan"

    def reply(self, reply: Reply, view: View) -> Reply | None:
        """Return the reply with one thing wrong."""
        arrays, name = dict(reply.arrays), next(iter(reply.arrays))
        first = arrays[name].clone()
        match self.fault:
            case "nan" | "inf":
                first.view(-1)[0] = math.nan if self.fault == "nan" else math.inf
                arrays[name] = first
            case "wrong-shape":
                arrays[name] = torch.cat([first, first])
            case "scalar":
                arrays[name] = torch.zeros(1)  # broadcasts against anything
            case "missing-key":
                del arrays[name]
            case "extra-key":
                arrays["backdoor"] = first
            case "permuted-keys":
                arrays = dict(reversed(arrays.items()))
            case "float64":
                arrays[name] = first.double()
            case "huge-weight":
                return reply._replace(examples=1e12)
            case "negative-weight":
                return reply._replace(examples=-1.0)
            case "no-reply":
                return None
            case "error":
                raise RuntimeError("the client fell over")
        return reply._replace(arrays=arrays)
