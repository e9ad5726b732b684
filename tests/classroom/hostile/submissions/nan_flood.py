"""Answer with nothing but NaN."""

import torch


def perturb(x, y, query):
    print("tried")
    return torch.full_like(x, float("nan"))
