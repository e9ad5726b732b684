"""How good the global model is, for whom, and how often an attacker gets his way."""

from __future__ import annotations

import base64
import io
from collections import Counter
from collections.abc import Iterator
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from fedtrust.data.base import FederatedData
from fedtrust.probes.base import Artefact, Goal, ProbeContext, Result, need, probe, share


@probe("accuracy", task=("classification", "characters"))
def accuracy(ctx: ProbeContext) -> Result:
    """Share of the test samples that the global model gets right; of a text, of its characters."""
    _, y = need(ctx.test, "the test samples")
    return {"accuracy": share(ctx.test_output.argmax(-1) == y)}


@probe("loss")
def loss(ctx: ProbeContext) -> Result:
    """The protocol's loss of the global model on the test samples."""
    _, y = need(ctx.test, "the test samples")
    return {"loss": float(ctx.criterion(ctx.test_output, y))}


@probe("recall", task="classification")
def recall(ctx: ProbeContext) -> Result:
    """For each class the share of its test samples that the model gets right."""
    _, y = need(ctx.test, "the test samples")
    right = ctx.test_output.argmax(1) == y
    names = ctx.task.labels or tuple(str(c) for c in range(ctx.task.classes))
    return {f"recall/{name}": share(right[y == c]) for c, name in enumerate(names) if bool((y == c).any())}


@probe("client-accuracy", task="classification")
def client_accuracy(ctx: ProbeContext, *, share_worst: Annotated[float, Field(gt=0, le=1)] = 0.1) -> Result:
    """Accuracy as the clients would feel it: mean, worst, and the mean of the worst `share_worst`.

    A client's accuracy is that on the test samples weighted by its own label distribution (and seen through its own feature skew, where
    there is one): local hold-out sets of a few dozen samples would mostly measure noise. Classes without test samples are left out, and
    so are clients that have no other.
    """
    data = need(ctx.data, "the clients' data")
    each = _by_client(ctx, data).sort().values
    if not len(each):
        return {}
    worst = each[: max(1, round(share_worst * len(each)))]
    return {
        "client-accuracy/mean": float(each.mean()),
        "client-accuracy/worst": float(each[0]),
        "client-accuracy/worst-share": float(worst.mean()),
    }


def _by_client(ctx: ProbeContext, data: FederatedData) -> Tensor:
    """Return the accuracy of each client that can be judged [clients]."""
    x, y = need(ctx.test, "the test samples")
    tested = torch.bincount(y, minlength=ctx.task.classes) > 0  # [classes]
    counts = torch.from_numpy(data.label_counts()).double() * tested  # [clients, classes]
    some = counts.sum(1) > 0
    mix = counts[some] / counts[some].sum(1, keepdim=True)
    if not data.skews:
        return mix @ _recalls(ctx.test_output, y, ctx.task.classes)
    skews = [skew for skew, judged in zip(data.skews, some.tolist(), strict=True) if judged]
    rows = [mix[i] @ _recalls(ctx.query(skew(x)), y, ctx.task.classes) for i, skew in enumerate(skews)]
    return torch.stack(rows) if rows else torch.zeros(0)


def _recalls(output: Tensor, y: Tensor, classes: int) -> Tensor:
    right = (output.argmax(1) == y).double()
    hits = torch.zeros(classes, dtype=torch.float64).index_add_(0, y, right)
    return hits / torch.bincount(y, minlength=classes).clamp(min=1)


def named_goals(ctx: ProbeContext) -> Iterator[tuple[str, Goal]]:
    """Yield the adversaries' goals, each under a name of its own: two groups may share a behaviour."""
    seen: Counter[str] = Counter()
    for goal in need(ctx.truth, "the ground truth").goals:
        seen[goal.name] += 1
        yield (goal.name if seen[goal.name] == 1 else f"{goal.name}-{seen[goal.name]}"), goal


@probe("attack-success", task="classification")
def attack_success(ctx: ProbeContext) -> Result:
    """Attack success rate: the share of the attacker's inputs that the model labels as he wants.

    For a backdoor these are triggered test images of other classes; for label flipping clean test samples and their flipped labels. With
    several adversaries `attack-success` is the largest and each has its own entry, a second one of the same name with a number. Absent
    when nobody has a goal.
    """
    rates = {name: share(ctx.query(goal.x).argmax(1) == goal.y) for name, goal in named_goals(ctx)}
    if not rates:
        return {}
    return {"attack-success": max(rates.values())} | ({f"attack-success/{n}": r for n, r in rates.items()} if len(rates) > 1 else {})


@probe("trigger-examples", when="end", task="classification")
def trigger_examples(ctx: ProbeContext, *, count: Annotated[int, Field(ge=1, le=24)] = 8) -> Result:
    """Pictures of clean test samples beside what the attacker makes of them, and what the global model says to both."""
    if not ctx.task.image:
        return {}
    found: dict[str, float | Artefact] = {}
    for name, goal in named_goals(ctx):
        pick = torch.linspace(0, max(0, len(goal.x) - 1), min(count, len(goal.x))).long()
        if not len(pick) or torch.equal(goal.x[pick], goal.clean[pick]):
            continue  # nothing to see: the attack leaves the pictures alone
        said = [ctx.query(part[pick]).argmax(1).tolist() for part in (goal.clean, goal.x)]
        images = []
        for i, row in enumerate(pick.tolist()):
            images.append({"png": png(goal.clean[row]), "label": f"clean → {_name(ctx, said[0][i])}"})
            images.append({"png": png(goal.x[row]), "label": f"{name} → {_name(ctx, said[1][i])}"})
        caption = "Test images, each beside the same image with the trigger; the arrow says what the final global model takes it for."
        found[name] = Artefact("images", f"The trigger of {name}", caption, {"images": images})
    return found


def _name(ctx: ProbeContext, label: int) -> str:
    return ctx.task.labels[label] if ctx.task.labels else str(label)


def png(image: Tensor) -> str:
    """Return an image [c, h, w] in [0, 1] as a base64 PNG."""
    from PIL import Image

    pixels = (image.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    buffer = io.BytesIO()
    Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels).save(buffer, "PNG", optimize=True)
    return base64.b64encode(buffer.getvalue()).decode()
