"""Make a tensor of a petabyte."""

import torch


def perturb(x, y, query):
    print("tried")
    return torch.empty(2**48, dtype=torch.float32)
