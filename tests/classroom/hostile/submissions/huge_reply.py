"""Answer with a tensor that is far larger than asked for, but holds little memory."""

import torch


def perturb(x, y, query):
    print("tried")
    return torch.zeros(1 << 24).contiguous()
