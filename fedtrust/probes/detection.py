"""Whom the strategy distrusts, against the truth. Told apart from the rule: a rule can find every attacker and still be beaten."""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from fedtrust.probes.base import ProbeContext, Result, need, probe, share


@probe("detection")
def detection(ctx: ProbeContext, *, threshold: Annotated[float, Field(gt=0, le=1)] = 0.5) -> Result:
    """Precision, recall and false positive rate of "trust below `threshold`" as a detector of attackers, and its AUC over all thresholds.

    Absent where the strategy has no notion of trust. Precision is left out when nobody is distrusted; recall, precision and AUC when nobody
    attacks: then only false alarms can be counted. The AUC is that of Mann and Whitney, ties counting half.
    """
    truth = need(ctx.truth, "the ground truth")
    if ctx.trust is None or not ctx.clients:
        return {}
    bad = torch.tensor([c in truth.malicious for c in ctx.clients])
    flagged = ctx.trust < threshold
    result: dict[str, float] = {}
    if bool((~bad).any()):
        result["detection/fpr"] = share(flagged[~bad])
    if bool(bad.any()):
        result["detection/recall"] = share(flagged[bad])
        if bool(flagged.any()):
            result["detection/precision"] = share(bad[flagged])
        if bool((~bad).any()):
            result["detection/auc"] = auc(-ctx.trust[bad], -ctx.trust[~bad])
    return result


def auc(positives: Tensor, negatives: Tensor) -> float:
    """Return the probability that a positive scores above a negative, ties counting half."""
    difference = positives[:, None] - negatives[None, :]
    return float(((difference > 0).double() + 0.5 * (difference == 0).double()).mean())
