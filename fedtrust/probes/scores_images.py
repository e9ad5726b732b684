"""How close guesses come to what clients trained on: PSNR, SSIM, squared error, best match; and label counts and class prototypes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fedtrust.data.base import FederatedData
from fedtrust.probes.base import Artefact, ProbeContext, need, share
from fedtrust.probes.guesses import LabelCounts, Prototype, Reconstruction, Reconstructions, scorer
from fedtrust.probes.quality import png

#: A sample counts as recovered exactly from this PSNR on, in dB: an error of a hundredth of the range.
EXACT = 40.0
#: What an error of zero is reported as, in dB: float32 updates carry no more.
MOST = 120.0
#: Side of the SSIM window in pixels, of smaller images their own side made odd.
WINDOW = 7
_SHOWN = 12


def mse(guesses: Tensor, truth: Tensor) -> Tensor:
    """Return the mean squared error between each of a guesses [a, *shape] and each of b samples [b, *shape], [a, b]."""
    flat = [part.flatten(1).double() for part in (guesses, truth)]
    return torch.stack([(flat[1] - row).square().mean(1) for row in flat[0]]) if len(guesses) else torch.zeros(0, len(truth))


def psnr(error: Tensor, span: float) -> Tensor:
    """Return the peak signal-to-noise ratio in dB for mean squared errors, 10 log₁₀(span² ÷ error), at most `MOST`."""
    return (10 * torch.log10(span**2 / error.clamp(min=1e-300))).clamp(max=MOST)


def ssim(a: Tensor, b: Tensor, span: float) -> float:
    """Return the structural similarity of two images [c, h, w]: Wang et al., IEEE TIP 2004, section III.

    A uniform window of 7 x 7 pixels (of smaller images the largest odd side that fits) in place of the paper's Gaussian one of 11 x 11,
    which an 8 x 8 digit has no room for; sample covariances, K₁ = 0.01, K₂ = 0.03, the mean over all windows inside the image and all
    channels: what scikit-image does by default.
    """
    side = min(WINDOW, *a.shape[-2:])
    side -= 1 - side % 2
    first, second = (image.double().unfold(1, side, 1).unfold(2, side, 1).flatten(3) for image in (a, b))  # [c, h', w', side²]
    mean_a, mean_b = first.mean(3), second.mean(3)
    n = side * side
    rest_a, rest_b = first - mean_a[..., None], second - mean_b[..., None]
    var_a, var_b, both = (part.sum(3) / max(1, n - 1) for part in (rest_a.square(), rest_b.square(), rest_a * rest_b))
    c1, c2 = (0.01 * span) ** 2, (0.03 * span) ** 2
    top = (2 * mean_a * mean_b + c1) * (2 * both + c2)
    return float((top / ((mean_a.square() + mean_b.square() + c1) * (var_a + var_b + c2))).mean())


class Matched(NamedTuple):
    """Guesses beside the samples that they come closest to, each sample used once.

    Attributes:
        guess, truth: the pairs [m, *shape].
        psnr: of each pair, dB [m].
        y: the samples' labels [m]; said: the labels that were guessed [m], `None` if none were.
        label: whose sample it is, in words.
        samples: how many samples there were to be found.
    """

    guess: Tensor
    truth: Tensor
    psnr: Tensor
    y: Tensor
    said: Tensor | None
    label: str
    samples: int


def assigned(guess: Tensor, truth: Tensor, span: float) -> tuple[Tensor, Tensor, Tensor]:
    """Pair a guesses with b samples so that the sum of their PSNR is as large as can be (Kuhn's assignment).

    Returns:
        Rows of the guesses, rows of the samples, and the PSNR of the pairs in dB, [min(a, b)] each.
    """
    from scipy.optimize import linear_sum_assignment  # type: ignore[import-untyped, unused-ignore]

    each = psnr(mse(guess, truth), span)  # [a, b]
    rows, columns = (torch.from_numpy(np.asarray(part)) for part in linear_sum_assignment(each.numpy(), maximize=True))
    return rows, columns, each[rows, columns]


def replied(full: ProbeContext) -> list[int]:
    """Return the clients whose samples a guess of nobody in particular may be: those whose updates came in."""
    return sorted(full.clients or full.sent or range(len(need(full.data, "the clients' data").parts)))


def match(item: Reconstruction, full: ProbeContext, span: float) -> Matched:
    """Pair guesses with the client's samples.

    A client's samples are those that it was dealt; a guess of nobody in particular is compared with those of every client that replied.
    Values outside the range of the task are cut off first, as in any picture.
    """
    data = need(full.data, "the clients' data")
    clients = [item.client] if item.client is not None else replied(full)
    pairs = [data.client(c) for c in clients]
    x, y = torch.cat([p[0] for p in pairs]), torch.cat([p[1] for p in pairs])
    guess = item.x if full.task.low is None else item.x.clamp(full.task.low, full.task.high)
    rows, columns, each = assigned(guess, x, span)
    said = None if item.y is None else item.y[rows]
    who = "somebody" if item.client is None else f"client {item.client}"
    return Matched(guess[rows], x[columns], each, y[columns], said, who, len(x))


def span_of(full: ProbeContext) -> float:
    """Return the range that PSNR refers to: the task's, or for a table from the smallest to the largest number in the data."""
    return _span(need(full.data, "the clients' data"))


def _span(data: FederatedData) -> float:
    if data.task.low is not None and data.task.high is not None:
        return data.task.high - data.task.low
    return max(float(data.x.max() - data.x.min()), 1e-12)


def recovered(each: Tensor, samples: int) -> float:
    """Return how much of `samples` samples was recovered, from 0 to 1: the mean of their PSNR over `EXACT`, 1 at the most.

    Args:
        each: PSNR of the samples that were guessed, dB; the others count nothing.
        samples: how many there were to be found.
    """
    return float((each.clamp(0, EXACT) / EXACT).sum()) / max(1, samples)


def blind(full: ProbeContext) -> float:
    """Return what is `recovered` of a round's samples by somebody who knows other samples of the kind, and saw no update.

    The better of two guesses: the mean of the test samples for each; and as many centres of the test samples (k-means) as there are samples
    to be found.
    """
    from sklearn.cluster import KMeans  # type: ignore[import-untyped, unused-ignore]
    from threadpoolctl import threadpool_limits  # type: ignore[import-untyped, unused-ignore]

    data, known = need(full.data, "the clients' data"), need(full.test, "the test samples")[0]
    x, span = torch.cat([data.client(client)[0] for client in replied(full)]), span_of(full)
    mean = recovered(psnr(mse(known.mean(0, keepdim=True), x)[0], span), len(x))
    seed = int(torch.randint(2**31, (1,), generator=full.rng))
    with threadpool_limits(1):  # the same sum, and so the same bits, on any number of cores
        found = KMeans(min(len(x), len(known)), n_init=1, random_state=seed).fit(known.flatten(1).double().numpy())
    centres = torch.from_numpy(found.cluster_centers_).float().reshape(-1, *x.shape[1:])
    return max(mean, recovered(assigned(centres, x, span)[2], len(x)))


@scorer(Reconstructions)
def reconstructions(guess: Reconstructions, full: ProbeContext, seen: ProbeContext) -> Mapping[str, float | Artefact]:
    """Score reconstructed samples against those that the clients were dealt.

    Returns:
        `psnr` (dB), `ssim` and `mse`, medians over the pairs of guess and sample; `psnr-best`; `exact`, the share of all samples of these
        clients that some guess meets with more than 40 dB; `recovered`, see there; `labels`, the share of pairs whose label is right,
        where labels were guessed; and the pictures. Nothing where nothing was reconstructed but `exact` and `recovered` = 0.
    """
    span = span_of(full)
    items = _by_client(guess.items, len(need(full.data, "the clients' data").parts))
    matched = [match(item, full, span) for item in items if len(item.x)]
    if not matched:
        return {"exact": 0.0, "recovered": 0.0}
    each = torch.cat([m.psnr for m in matched])
    total = sum(m.samples for m in matched) + sum(_owned(full, item) for item in items if not len(item.x))
    errors = torch.cat([(m.guess - m.truth).double().square().flatten(1).mean(1) for m in matched])
    found: dict[str, float | Artefact] = {
        "psnr": _median(each),
        "psnr-best": float(each.max()),
        "mse": _median(errors),
        "exact": float((each > EXACT).sum()) / total,
        "recovered": recovered(each, total),
    }
    labelled = [m.said == m.y for m in matched if m.said is not None]
    if labelled:
        found["labels"] = share(torch.cat(labelled))
    if full.task.image:
        similar = [ssim(a, b, span) for m in matched for a, b in zip(m.guess, m.truth, strict=True)]
        found["ssim"] = _median(torch.tensor(similar, dtype=torch.float64))
        found[""] = _pictures(matched, full)
    return found


def _by_client(items: Sequence[Reconstruction], clients: int) -> list[Reconstruction]:
    """Return one item a client, of the guesses that are finite: guessed twice, a sample is found once.

    Raises:
        ValueError: there is no such client.
    """
    found: dict[int | None, list[Reconstruction]] = {}
    for item in items:
        if item.client is not None and not 0 <= item.client < clients:
            raise ValueError(f"samples of client {item.client} were guessed, but the clients are 0 to {clients - 1}")
        sound = item.x.flatten(1).isfinite().all(1) if len(item.x) else torch.zeros(0, dtype=torch.bool)
        found.setdefault(item.client, []).append(Reconstruction(item.client, item.x[sound], None if item.y is None else item.y[sound]))
    return [_together(client, parts) for client, parts in found.items()]


def _together(client: int | None, parts: Sequence[Reconstruction]) -> Reconstruction:
    parts = [part for part in parts if len(part.x)] or parts[:1]
    labels = [part.y for part in parts if part.y is not None]
    return Reconstruction(client, torch.cat([part.x for part in parts]), torch.cat(labels) if len(labels) == len(parts) else None)


def _owned(full: ProbeContext, item: Reconstruction) -> int:
    return 0 if item.client is None else len(need(full.data, "the clients' data").parts[item.client])


def _median(values: Tensor) -> float:
    return float(values.double().quantile(0.5))


def _pictures(matched: list[Matched], full: ProbeContext) -> Artefact:
    """Return originals beside reconstructions: of every client its best, then its second best, and so on."""
    ranked = []
    for place, m in enumerate(matched):
        for rank, row in enumerate(m.psnr.argsort(descending=True, stable=True).tolist()):
            ranked.append((rank, place, row))
    images = []
    for _, place, row in sorted(ranked)[:_SHOWN]:
        m = matched[place]
        said = "" if m.said is None else f", said to be {_name(full, int(m.said[row]))}"
        images.append({"png": png(_grey(m.truth[row], full)), "label": f"{m.label}: {_name(full, int(m.y[row]))}"})
        images.append({"png": png(_grey(m.guess[row], full)), "label": f"{float(m.psnr[row]):.1f} dB{said}"})
    pairs = sum(len(m.psnr) for m in matched)
    caption = (
        f"Each original beside what was made of the update, with its PSNR; {len(images) // 2} of {pairs} pairs, of every client its best "
        "first. Above 40 dB no eye tells them apart, below 15 dB little is left."
    )
    return Artefact("images", "What the updates gave away", caption, {"images": images})


def _grey(image: Tensor, full: ProbeContext) -> Tensor:
    low, high = full.task.low or 0.0, 1.0 if full.task.high is None else full.task.high
    return (image - low) / (high - low)


def _name(full: ProbeContext, label: int) -> str:
    return full.task.labels[label] if full.task.labels else str(label)


@scorer(LabelCounts)
def label_counts(guess: LabelCounts, full: ProbeContext, seen: ProbeContext) -> Mapping[str, float | Artefact]:
    """Score guessed label counts.

    Returns:
        `samples`, the share of samples whose label was found (for each class the smaller of guess and truth; of the guesses, where they
        are more than the samples); `classes`, the share of the
        classes that a client has that were found, over all clients; `error`, the mean absolute error of a count; and a table.
    """
    data = need(full.data, "the clients' data")
    truth = torch.from_numpy(data.label_counts())
    names = [_name(full, c) for c in range(full.task.classes)]
    rows, hits, classes, errors, total = [], 0.0, [], [], 0.0
    for client, counts in sorted(guess.counts.items()):
        own, said = truth[client].double(), counts.double()
        hits += float(torch.minimum(own, said).sum())
        total += max(float(own.sum()), float(said.sum()))
        classes.append(said[own > 0] > 0)
        errors.append((own - said).abs())
        rows.append([f"client {client}", "has", *(f"{v:g}" for v in own.tolist())])
        rows.append(["", "guessed", *(f"{v:g}" for v in said.tolist())])
    if not rows:
        return {}
    table = Artefact(
        "table",
        "Labels read off the updates",
        "Samples of each class: the truth, and what the server read off.",
        {"columns": ["", "", *names], "rows": rows},
    )
    return {"samples": hits / max(1.0, total), "classes": share(torch.cat(classes)), "error": float(torch.cat(errors).mean()), "": table}


def _likeness(made: Tensor, label: int, data: FederatedData, classes: int) -> dict[str, float]:
    """Return how much the mean picture is like the mean of its class, `likeness`, and like that of the nearest other one, `likeness-other`.

    Both are cosines after the mean of all training samples was taken off: what all classes share is no likeness. A picture that fools the
    model and looks like nothing has about 0, one that looks like another class more with the other.
    """
    middle = data.x.double().mean(0).flatten()
    drawn = made.double().mean(0).flatten() - middle
    means = {c: data.x[data.y == c].double().mean(0).flatten() - middle for c in range(classes) if bool((data.y == c).any())}
    cosines = {c: float(torch.nn.functional.cosine_similarity(drawn, mean, dim=0)) for c, mean in means.items()}
    others = [cosine for c, cosine in cosines.items() if c != label]
    return {"likeness": cosines[label]} | ({"likeness-other": max(others)} if others else {})


@scorer(Prototype)
def prototype(guess: Prototype, full: ProbeContext, seen: ProbeContext) -> Mapping[str, float | Artefact]:
    """Score pictures of what a class looks like.

    Returns:
        `psnr-mean` and `ssim-mean`, of the best picture against the mean of the class' training samples; `psnr-nearest` and
        `ssim-nearest`, of the best pair of a picture and a training sample of the class; `taken-for-it`, the share of the pictures that
        the global model takes for the class; `likeness` and `likeness-other`; and the pictures, beside the class mean. SSIM for images
        only.
    """
    data, span = need(full.data, "the clients' data"), span_of(full)
    own = data.x[data.y == guess.label]
    made = guess.x if full.task.low is None else guess.x.clamp(full.task.low, full.task.high)
    if not len(own) or not len(made):
        return {}
    mean = own.mean(0, keepdim=True)
    to_mean, to_each = mse(made, mean)[:, 0], mse(made, own)
    at = int(to_each.argmin())
    nearest, row = at // len(own), at % len(own)
    best = int(to_mean.argmin())
    found: dict[str, float | Artefact] = {
        "psnr-mean": float(psnr(to_mean.min(), span)),
        "psnr-nearest": float(psnr(to_each.min(), span)),
        "taken-for-it": share(full.query(made).argmax(1) == guess.label),
        **_likeness(made, guess.label, data, full.task.classes),
    }
    if full.task.image:
        found["ssim-mean"] = ssim(made[best], mean[0], span)
        found["ssim-nearest"] = ssim(made[nearest], own[row], span)
        name = _name(full, guess.label)
        images = [{"png": png(_grey(mean[0], full)), "label": f"mean of class {name}"}]
        images += [{"png": png(_grey(own[row], full)), "label": f"a training sample of {name}"}]
        images += [
            {"png": png(_grey(one, full)), "label": f"made: {float(p):.1f} dB"}
            for one, p in zip(made[:10], psnr(to_mean, span), strict=False)
        ]
        caption = "The class as clients have it, the training sample that comes closest, and what was made; PSNR against the mean."
        found[""] = Artefact("images", f"What class {name} looks like", caption, {"images": images})
    return found
