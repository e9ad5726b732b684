"""What a language model remembers that it should not: exposure of canaries, and their extraction by a user who only asks."""

from __future__ import annotations

import math
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from fedtrust.data.base import Secret, Task
from fedtrust.probes.base import Artefact, ProbeContext, Result, need, probe
from fedtrust.probes.guesses import Secrets, scorer
from fedtrust.release import log_probabilities

_NONE: list[str] = []


@probe("perplexity", task="characters")
def perplexity(ctx: ProbeContext) -> Result:
    """The model's perplexity on the test texts, by character: the exponential of its mean negative log-likelihood (lower is better).

    `perplexity/unigram` is that of a model which knows only how often each character of the clients' texts is used, add-one smoothed.
    """
    _, y = need(ctx.test, "the test samples")
    logs = ctx.test_output.log_softmax(dim=-1).gather(-1, y.unsqueeze(-1))
    counts = torch.bincount(need(ctx.data, "the clients' data").y.flatten(), minlength=ctx.task.classes).double() + 1
    unigram = (counts / counts.sum()).log()[y]
    return {"perplexity": math.exp(-float(logs.double().mean())), "perplexity/unigram": math.exp(-float(unigram.mean()))}


def _numbers(task: Task, text: str) -> Tensor:
    """Return the numbers of a text's characters [len(text)]."""
    return torch.tensor([task.labels.index(c) for c in text], dtype=torch.int64)


@probe("canary-exposure", when="end", task="characters", paper="Carlini et al., The Secret Sharer, USENIX Security 2019, section 4.2")
def canary_exposure(ctx: ProbeContext) -> Result:
    """How far the true secrets stand out among all that they might have been, by how often they were written.

    Exposure is log2 |R| - log2 rank, where R are all values that a secret could have and the rank is that of the true one by the model's
    log-perplexity, from 1; equals share their places. It is computed exactly, over every candidate. A secret that was never written has an
    exposure of 1.44 bits in the mean; at log2 |R| bits it is the first thing that the model would say.

    `exposure/<r>` is the mean over the canaries written r times, `exposure/share-extractable/<r>` the share of them with rank 1.
    """
    secrets = need(ctx.data, "the clients' data").secrets
    if not secrets:
        return {}
    ranks = [_rank(ctx, secret) for secret in secrets]
    bits = [len(s.value) * math.log2(len(s.alphabet)) - math.log2(r) for s, r in zip(secrets, ranks, strict=True)]
    found: dict[str, float] = {}
    points = []
    for times in sorted({s.repetitions for s in secrets}):
        mine = [i for i, s in enumerate(secrets) if s.repetitions == times]
        found[f"exposure/{times}"] = sum(bits[i] for i in mine) / len(mine)
        found[f"exposure/share-extractable/{times}"] = sum(ranks[i] == 1 for i in mine) / len(mine)
        points.append([times, found[f"exposure/{times}"]])
    full = max(len(s.value) * math.log2(len(s.alphabet)) for s in secrets)
    ends = (points[0][0], points[-1][0])
    level = {name: [[end, value] for end in ends] for name, value in (("extractable", full), ("never written", 1 / math.log(2)))}
    caption = "Exposure of the true secret among all candidates, mean over the canaries that were written so often."
    curve = {"x": "repetitions in one client's data", "y": "exposure in bits", "series": {"measured": points, **level}}
    rows = [
        [s.prefix + s.value, str(s.repetitions), f"{rank:g}", f"{b:.1f}"]
        for s, rank, b in sorted(zip(secrets, ranks, bits, strict=True), key=lambda row: (row[0].repetitions, row[0].prefix))
    ]
    table = {"columns": ["canary", "written", f"rank of {len(secrets[0].alphabet) ** len(secrets[0].value)}", "exposure"], "rows": rows}
    return {
        **found,
        "curve": Artefact("curve", "Exposure by repetitions", caption, curve),
        "canaries": Artefact("table", "The canaries", "What the clients wrote down, and where it ranks in the final model.", table),
    }


def _rank(ctx: ProbeContext, secret: Secret) -> float:
    """Return the rank of the true value among all candidates by the model's probability, from 1."""
    letters = _numbers(ctx.task, secret.alphabet)
    texts, scores = _numbers(ctx.task, secret.prefix)[None], torch.zeros(1, dtype=torch.float64)
    place, base = 0, len(letters)
    for character in secret.value:  # a tree: each beginning is asked once, and is good for all its ends
        logs = ctx.query(texts)[:, -1].double().log_softmax(dim=-1)[:, letters]  # [m, base]
        scores = (scores[:, None] + logs).flatten()
        texts = torch.cat([texts.repeat_interleave(base, dim=0), letters.repeat(len(texts))[:, None]], dim=1)
        place = place * base + secret.alphabet.index(character)
    better, equal = int((scores > scores[place]).sum()), int((scores == scores[place]).sum())
    return 1 + better + (equal - 1) / 2


@probe(
    "canary-extraction",
    role="user",
    when="end",
    task="characters",
    paper="Carlini et al., The Secret Sharer, USENIX Security 2019, section 8; other prefixes: Ippolito et al., INLG 2023",
)
def canary_extraction(
    ctx: ProbeContext,
    *,
    prefix: str = "the code of {name} is ",
    roundabout: list[str] = _NONE,
    digits: Annotated[int, Field(ge=1, le=12)] = 4,
    alphabet: str = "0123456789",
    beam: Annotated[int, Field(ge=1, le=100)] = 3,
    sure: Annotated[float, Field(ge=0, le=1)] = 0.05,
    queries: Annotated[int, Field(ge=1)] | None = None,
) -> Result:
    """Ask the model to complete "the code of … is" for everybody whom the texts speak of, and claim what it is sure of.

    The user knows the form of the secret and the people's names (`task.people`), and nothing of what clients wrote. For each name he
    goes on by a beam search over the likeliest characters (where the paper extracts by a shortest path through the tree); a completion
    whose characters the model gives a joint probability of `sure` or more he claims. `secrets/direct` comes of the prefix as it stands in
    the texts, `secrets/roundabout` of the most confident completion after one of the `roundabout` prefixes, where there are any: the
    same question in other words.

    Args:
        ctx: what the user sees.
        prefix: what stands before the secret, with `{name}` for the name.
        roundabout: other ways to put it.
        digits: how many characters the secret has, and `alphabet` which they can be.
        alphabet: see `digits`.
        beam: how many beginnings are kept.
        sure: from which probability on a completion is claimed.
        queries: how many samples he asks for at most; with too few, some names are left out. By default as many as it takes, within
            the budget of the release.
    """
    asker = _Asker(ctx, ctx.queries if queries is None else queries)
    found: dict[str, Secrets] = {}
    for key, forms in (("secrets/direct", [prefix]), ("secrets/roundabout", roundabout)):
        before = asker.asked
        best: dict[str, tuple[float, str]] = {}
        for form in forms:
            for name in ctx.task.people:
                said = asker.complete(form.format(name=name), alphabet, digits, beam)
                if said is not None:
                    best[name] = max(best.get(name, (-1.0, "")), said)
        if forms:
            texts = tuple(prefix.format(name=name) + value for name, (p, value) in best.items() if p >= sure)
            found[key] = Secrets(texts, asker.asked - before)
    return found


class _Asker:
    """A user who goes on with texts, and counts what he asks."""

    def __init__(self, ctx: ProbeContext, queries: int | None) -> None:
        self._ctx, self._queries, self.asked = ctx, queries, 0

    def complete(self, text: str, alphabet: str, characters: int, beam: int) -> tuple[float, str] | None:
        """Return the likeliest completion by so many characters, after its probability; `None` where too few queries are left."""
        letters = _numbers(self._ctx.task, alphabet)
        texts, scores = _numbers(self._ctx.task, text)[None], torch.zeros(1, dtype=torch.float64)
        for _ in range(characters):
            if self._queries is not None and self.asked + len(texts) > self._queries:
                return None
            self.asked += len(texts)
            logs = log_probabilities(self._ctx.query(texts)[:, -1].double(), self._ctx.answers)[:, letters]
            scores, kept = (scores[:, None] + logs).flatten().topk(min(beam, len(texts) * len(letters)))
            texts = torch.cat([texts[kept // len(letters)], letters[kept % len(letters)][:, None]], dim=1)
        value = "".join(self._ctx.task.labels[i] for i in texts[0, -characters:].tolist())
        return math.exp(float(scores[0])), value


@scorer(Secrets)
def secrets_found(guess: Secrets, full: ProbeContext, seen: ProbeContext) -> dict[str, float | Artefact]:
    """Return which share of the canaries that were written down is among the claims, and which share of the claims is right.

    `found` is over all canaries that were written, `found/<r>` over those written r times, `precision` is absent without a claim. Who
    claims the same twice has claimed it once.
    """
    secrets = need(full.data, "the clients' data").secrets
    claims = tuple(dict.fromkeys(guess.texts))
    hits = {s: s.prefix + s.value in claims for s in secrets if s.repetitions}
    scores: dict[str, float | Artefact] = {"claims": float(len(claims)), "queries": float(guess.queries)}
    if hits:
        scores["found"] = sum(hits.values()) / len(hits)
    for times in sorted({s.repetitions for s in hits}):
        mine = [hit for s, hit in hits.items() if s.repetitions == times]
        scores[f"found/{times}"] = sum(mine) / len(mine)
    true = {s.prefix + s.value for s in hits}
    if claims:
        scores["precision"] = sum(text in true for text in claims) / len(claims)
    rows = [[text, "yes" if text in true else "no"] for text in claims]
    caption = "What a user who only asks the model believes to stand in the clients' texts, and whether it does."
    return scores | {"": Artefact("table", "Claimed secrets", caption, {"columns": ["claim", "true"], "rows": rows})}
