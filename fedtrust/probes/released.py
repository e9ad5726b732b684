"""What the terms of the release cost those who use the model as they should."""

from __future__ import annotations

from fedtrust.probes.base import ProbeContext, Result, need, probe, share


@probe("released-accuracy", task=("classification", "characters"))
def released_accuracy(ctx: ProbeContext) -> Result:
    """Accuracy of what users are told on the test samples, through the output defences.

    `released-accuracy/distortion` is how far the answers lie from the model's probabilities in the L1 norm, on average (0 to 2); 0 where
    users are told the logits.
    """
    x, y = need(ctx.test, "the test samples")
    told = need(ctx.released, "the released answers")(x)
    found = {"released-accuracy": share(told.argmax(dim=-1) == y), "released-accuracy/distortion": 0.0}
    if ctx.answers != "logits":
        away = (told - ctx.test_output.softmax(dim=-1)).abs().sum(dim=-1)
        found["released-accuracy/distortion"] = float(away.double().mean())
    return found
