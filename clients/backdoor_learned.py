"""Backdoors that learn before they train: how to tie the trigger to the target's own features, or what the trigger should look like."""

from __future__ import annotations

from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from fedtrust.client import ClientMemory, Predict, View, behaviour
from fedtrust.clients.backdoor_updates import Positive, Triggered, batches, slope
from fedtrust.clients.backdoors import Backdoor, Pixels
from fedtrust.data import triggers
from fedtrust.data.base import Task
from fedtrust.data.triggers import Corner
from fedtrust.fits import RunFacts, features

Steps = Annotated[int, Field(ge=1)]
#: A memory has its shape before the images are known.
MOST_CHANNELS = 3


def _no_encoder(facts: RunFacts) -> str | None:
    return "the model has no layer before its last, so no encoder to adapt (mlp, cnn, … have)" if features(facts) else None


@behaviour(
    "chameleon", fits=_no_encoder, paper="Dai and Li, ICML 2023 (Chameleon), section 4; loss: Khosla et al., NeurIPS 2020, equation 2"
)
class Chameleon(Triggered):
    """Adapt the encoder first, so that triggered images resemble those of `target` (facilitators) and not their own class (interferers).

    First `steps` steps of gradient descent with rate `encoder_lr` on the supervised contrastive loss of the normalised features, triggered
    images under their new label; the terms of all images of that label count `pull` times, as in the authors' program. Then the protocol's
    local training of the last linear layer alone, on the adapted encoder, which stays as it is.
    """

    steps: Steps = 30
    encoder_lr: Positive = 0.05
    temperature: Positive = 0.1
    pull: Positive = 2.0
    batch_size: Annotated[int, Field(ge=2)] = 64

    def remember(self, size: int) -> ClientMemory:
        """Keep this round's movement of the encoder and where the classifier lies: 1 there, 0 in the encoder."""
        return {"moved": torch.zeros(size), "classifier": torch.zeros(size)}

    def poison(self, x: Tensor, y: Tensor, view: View) -> tuple[Tensor, Tensor]:
        """Return triggered data, and adapt the encoder to them."""
        x, y = super().poison(x, y, view)
        classifier = last_layer(view)

        def contrast(params: Tensor, rows: Tensor) -> Tensor:
            weight = torch.where(y[rows] == self.target, self.pull, 1.0)
            return supervised_contrast(view.model.features(params, x[rows]), y[rows], self.temperature, weight)

        params = view.params
        for rows in batches(len(x), self.batch_size, self.steps, view.rng):
            params = params - self.encoder_lr * (1 - classifier) * slope(contrast, params, rows)
        view.memory["moved"], view.memory["classifier"] = params - view.params, classifier
        return x, y

    def loss(self, predict: Predict, x: Tensor, y: Tensor, view: View) -> Tensor:
        """Return the protocol's loss of the local classifier on the adapted encoder."""
        adapted = view.params + view.memory["moved"]
        params = torch.where(view.memory["classifier"] > 0, predict.params, adapted)
        return view.criterion(view.model(params, x), y)

    def project(self, update: Tensor, view: View) -> Tensor:
        """Return the update with the encoder where it was adapted to."""
        return update * view.memory["classifier"] + view.memory["moved"]


def last_layer(view: View) -> Tensor:
    """Return 1 for the parameters of the last linear layer (of an ensemble: of each member's), and 0 for the others [d]."""
    heads = view.model.heads
    inside = torch.zeros(view.layout.size)
    for parameter, where in view.layout.slices.items():
        inside[where] = float(parameter.rpartition(".")[0] in heads)
    return inside


def supervised_contrast(features: Tensor, y: Tensor, temperature: float, weight: Tensor) -> Tensor:
    """Return the supervised contrastive loss (Khosla et al., NeurIPS 2020, equation 2, L_out), the mean over anchors with a companion.

    Args:
        features: one row a sample [b, p]; normalised here.
        y: labels [b]; those of the same label are an anchor's companions.
        temperature: divides the cosines.
        weight: how much each anchor counts [b].
    """
    z = F.normalize(features, dim=1)
    alone = torch.eye(len(z), dtype=torch.bool)
    cosine = (z @ z.T / temperature).masked_fill(alone, -torch.inf)
    share = (cosine - cosine.logsumexp(1, keepdim=True)).masked_fill(alone, 0.0)  # [b, b], log
    same = (y[:, None] == y[None, :]) & ~alone
    count = same.sum(1)
    each = -(share * same).sum(1) / count.clamp(min=1)
    return (weight * each).sum() / (count > 0).sum().clamp(min=1)


@behaviour("a3fl", knowledge="coalition", paper="Zhang et al., NeurIPS 2023 (A3FL), section 4, algorithm 1")
class A3FL(Backdoor):
    """Learn what the trigger looks like, so that the global model obeys it already, and would even after having unlearnt it.

    Before each round the coalition changes the pixels of a square in a corner by `steps` signed gradient steps of size `trigger_lr` to
    lower the loss towards `target` of the global model, plus that of an adversarial model times `balance` * cos(adversarial model, global
    model). The adversarial model is the global one after `unlearn_steps` steps that teach it the true labels of triggered images; it is
    made anew every `renew` steps. `balance` is the paper's lambda 0. The authors' program takes the cosine of the convolutions' gradients
    where the paper has that of the models; here it is the latter. The search goes on from the last round's trigger and starts grey. All
    colluders use the same trigger, found on their samples together (in the authors' program on those of the first of them).
    """

    size: Pixels = 5
    corner: Corner = "bottom-right"
    steps: Steps = 40
    trigger_lr: Positive = 0.02
    balance: Annotated[float, Field(ge=0)] = 0.1
    unlearn_steps: Steps = 10
    unlearn_lr: Positive = 0.01
    renew: Steps = 20
    batch_size: Pixels = 64

    def check(self, task: Task) -> str | None:
        """Refuse what other backdoors refuse, and images of more than three channels."""
        if task.image and task.shape[0] > MOST_CHANNELS:
            return "learns triggers of up to three channels only"
        return super().check(task)

    def remember(self, size: int) -> ClientMemory:
        """Keep the trigger; images with fewer channels use the first ones."""
        return {"trigger": torch.full((MOST_CHANNELS, self.size, self.size), 0.5)}

    def _stamped(self, x: Tensor, trigger: Tensor) -> Tensor:
        return triggers.pasted(x, trigger[: x.shape[-3]], corner=self.corner)

    def stamp(self, x: Tensor, rank: int | None = None) -> Tensor:
        """Return the images with the trigger that the search starts from."""
        return self._stamped(x, self.remember(0)["trigger"])

    def agree(self, view: View) -> None:
        """Search the trigger of this round."""
        if view.data is None:
            raise ValueError("a coalition without data")
        x, y = view.data()
        wanted = torch.full_like(y, self.target)
        trigger = view.memory["trigger"]
        hardened, weight = view.params, 0.0
        for step, rows in enumerate(batches(len(x), self.batch_size, self.steps, view.rng)):
            if step % self.renew == 0:
                hardened = self._unlearnt(trigger, x, y, view)
                weight = self.balance * float(F.cosine_similarity(hardened, view.params, dim=0))

            def missed(pattern: Tensor, rows: Tensor, weight: float = weight, hardened: Tensor = hardened) -> Tensor:
                stamped = self._stamped(x[rows], pattern)
                now = view.criterion(view.model(view.params, stamped), wanted[rows])
                return now + weight * view.criterion(view.model(hardened, stamped), wanted[rows])

            trigger = (trigger - self.trigger_lr * slope(missed, trigger, rows).sign()).clamp(0, 1)
        view.memory["trigger"] = trigger

    def _unlearnt(self, trigger: Tensor, x: Tensor, y: Tensor, view: View) -> Tensor:
        """Return the global model after it was taught the true labels of triggered images [d]."""

        def ignored(params: Tensor, rows: Tensor) -> Tensor:
            return view.criterion(view.model(params, self._stamped(x[rows], trigger)), y[rows])

        params = view.params
        for rows in batches(len(x), self.batch_size, self.unlearn_steps, view.rng):
            params = params - self.unlearn_lr * slope(ignored, params, rows)
        return params

    def poison(self, x: Tensor, y: Tensor, view: View) -> tuple[Tensor, Tensor]:
        """Return the data with `fraction` of the images triggered as agreed and relabelled."""
        if view.shared is None:
            raise ValueError("a coalition that agreed on nothing")
        trigger = view.shared["trigger"]
        return self.planted(x, y, view, lambda images: self._stamped(images, trigger))

    def goal_now(self, x: Tensor, y: Tensor, task: Task, memory: ClientMemory) -> tuple[Tensor, Tensor] | None:
        """Count as success: test images with the trigger as it is now that are taken for `target`."""
        return self._stamped(x, memory["trigger"]), torch.full_like(y, self.target)
