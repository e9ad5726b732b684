"""Whom the strategy distrusts, against the truth. Told apart from the rule: a rule can find every attacker and still be beaten."""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from fedtrust.probes.base import ProbeContext, Result, need, probe, share

#: Trust at or below this is none: the update was left out.
NONE = 1e-6


@probe("detection")
def detection(ctx: ProbeContext, *, threshold: Annotated[float, Field(gt=0, le=1)] = 0.5) -> Result:
    """Precision, recall and false positive rate of "trust below `threshold`" as a detector of attackers, and its AUC over all thresholds.

    Absent where the strategy has no notion of trust. Precision is left out when nobody is distrusted; recall, precision and AUC when nobody
    attacks: then only false alarms can be counted. The AUC is that of Mann and Whitney, ties counting half.

    Where trust is a clipping factor, an update that is clipped to less than `threshold` of its length counts as distrusted although it is
    used: a boosted backdoor that passes FLAME or DeepSight is then "found". So `excluded` is the share of the attackers whose updates were
    left out altogether (trust 0), and `excluded-honest` that of the honest clients.
    """
    truth = need(ctx.truth, "the ground truth")
    if ctx.trust is None or not ctx.clients:
        return {}
    bad = torch.tensor([c in truth.malicious for c in ctx.clients])
    flagged = ctx.trust < threshold
    result: dict[str, float] = {}
    if bool((~bad).any()):
        result["detection/fpr"] = share(flagged[~bad])
        result["detection/excluded-honest"] = share(ctx.trust[~bad] <= NONE)
    if bool(bad.any()):
        result["detection/recall"] = share(flagged[bad])
        result["detection/excluded"] = share(ctx.trust[bad] <= NONE)
        if bool(flagged.any()):
            result["detection/precision"] = share(bad[flagged])
        if bool((~bad).any()):
            result["detection/auc"] = auc(-ctx.trust[bad], -ctx.trust[~bad])
    return result


@probe("reward-share")
def reward_share(ctx: ProbeContext) -> Result:
    """What attackers and free riders get of a reward that is paid in proportion to trust: their share of it, and how often their fair one.

    Fair is a share as large as theirs of the clients that were used; `reward-share/relative` is 1 there, 0 where they get nothing. A rule
    without trust pays by the registered number of samples, as federated averaging weighs; there fair is 1 on the average only. Absent where
    nobody attacks or nobody is paid.
    """
    truth = need(ctx.truth, "the ground truth")
    bad = torch.tensor([c in truth.malicious for c in ctx.clients], dtype=torch.bool)
    if not bool(bad.any()):
        return {}
    if ctx.trust is None:
        parts = need(ctx.data, "the clients' data").parts
        paid = torch.tensor([float(len(parts[c])) for c in ctx.clients], dtype=torch.float64)
    else:
        paid = ctx.trust.double()
    if not float(paid.sum()) > 0:
        return {}
    got = float(paid[bad].sum() / paid.sum())
    return {"reward-share/malicious": got, "reward-share/relative": got / share(bad)}


def auc(positives: Tensor, negatives: Tensor) -> float:
    """Return the probability that a positive scores above a negative, ties counting half."""
    difference = positives[:, None] - negatives[None, :]
    return float(((difference > 0).double() + 0.5 * (difference == 0).double()).mean())
