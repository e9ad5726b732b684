"""One library's server rules, in a process of its own: reads a matrix, then answers each line `RULE` with seconds and peak memory.

    PYTHON -m bench.rules_app LIBRARY MATRIX.npy --f F --threads T --iterations K

Imports only what its library needs, so that ByzFL runs under the interpreter of another virtualenv.
"""

from __future__ import annotations

import argparse
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bench.contender import channel, say

Call = Callable[[], object]


def fedtrust(rule: str, rows: Tensor, f: int, iterations: int) -> Call:
    """Return a call of fedtrust's rule."""
    from fedtrust.data.base import Task
    from fedtrust.layout import Layout
    from fedtrust.registry import REGISTRY
    from fedtrust.server import AggContext

    n, d = rows.shape
    ctx = AggContext(
        params=torch.zeros(d),
        weights=torch.ones(n),
        clients=tuple(range(n)),
        round=1,
        assumed_malicious=f,
        layout=Layout(("w",), ((d,),)),
        task=Task("classification", (2,), 2),
        model=lambda params, x: x,
        criterion=torch.nn.functional.cross_entropy,
        root=None,
        rng=torch.Generator().manual_seed(0),
    )
    # The geometric median goes on to the end, whatever the others' number of iterations.
    options = {"centered-clipping": {"tau": 100.0}}
    make = REGISTRY.make("filter" if rule == "nnm" else "aggregator", rule, options.get(rule, {}))
    return lambda: make(rows, ctx)


def plain(rule: str, rows: Tensor, f: int, iterations: int) -> Call:
    """Return a call of the rule as one writes it with torch: a sort along the first axis, Weiszfeld in the space of the updates."""
    n = len(rows)

    def median() -> Tensor:
        values = torch.sort(rows, dim=0).values
        return 0.5 * values[(n - 1) // 2] + 0.5 * values[n // 2]

    def weiszfeld() -> Tensor:
        point = rows.mean(0)
        for _ in range(iterations):
            pull = 1 / torch.linalg.vector_norm(rows - point, dim=1).clamp(min=1e-6)
            point = (pull / pull.sum()) @ rows
        return point

    calls: dict[str, Call] = {
        "median": median,
        "trimmed-mean": lambda: torch.sort(rows, dim=0).values[f : n - f].mean(0),
        "geometric-median": weiszfeld,
    }
    return calls[rule]


def flower(rule: str, rows: Tensor, f: int, iterations: int) -> Call:
    """Return a call of Flower's strategy; the replies, whose arrays are lazy and cost nothing to read, are made beforehand."""
    from flwr.app import ConfigRecord, RecordDict

    from fedtrust.engine import flower as ours
    from fedtrust.layout import Layout

    n, d = rows.shape
    names: dict[str, tuple[str, dict[str, Any]]] = {
        "median": ("FedMedian", {}),
        "trimmed-mean": ("FedTrimmedAvg", {"beta": f / n}),
        "krum": ("Krum", {}),
        "multi-krum": ("MultiKrum", {"num_nodes_to_select": n - f}),
        "bulyan": ("Bulyan", {}),
    }
    name, params = names[rule]
    strategy, layout, base = ours.stock_strategy(name, params, f), Layout(("w",), ((d,),)), torch.zeros(d)
    replies = []
    for client, row in enumerate(rows):
        order = ours.instruction(RecordDict({ours.CONFIG: ConfigRecord()}), client, client + 1)
        replies.append(ours.answer(order, ours.FlatRecord(base, layout, row).fill(), 10, 0.5))
    return lambda: strategy.aggregate_train(1, replies)


def byzfl(rule: str, rows: Tensor, f: int, iterations: int) -> Call:
    """Return a call of ByzFL's rule."""
    import byzfl as library  # type: ignore[import-not-found, unused-ignore]

    rules: dict[str, Callable[[], Any]] = {
        "median": library.Median,
        "trimmed-mean": lambda: library.TrMean(f),
        "krum": lambda: library.Krum(f),
        "multi-krum": lambda: library.MultiKrum(f),
        "geometric-median": lambda: library.GeometricMedian(nu=1e-6, T=iterations),
        "centered-clipping": lambda: library.CenteredClipping(L=1, tau=100.0),
        "nnm": lambda: library.NNM(f),
    }
    rule_of = rules[rule]()
    return lambda: rule_of(rows)


LIBRARIES = {"fedtrust": fedtrust, "plain": plain, "flower": flower, "byzfl": byzfl}


def _memory(key: str) -> int:
    """Return a figure of /proc/self/status in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key + ":"))


def measured(call: Call) -> dict[str, float]:
    """Return how long a call takes, and how many bytes more than before it the process held at its peak."""
    before, forget = _memory("VmRSS"), Path("/proc/self/clear_refs")
    forget.write_text("5")  # the kernel forgets the peak so far
    began, processor = time.perf_counter(), time.process_time()
    call()
    ended = time.perf_counter()
    return {"seconds": ended - began, "processor": time.process_time() - processor, "extra": max(0, _memory("VmHWM") - before)}


def main() -> None:
    """Read the matrix, then do what the lines on standard input say."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("library", choices=list(LIBRARIES))
    parser.add_argument("matrix", type=Path)
    parser.add_argument("--columns", type=int, required=True)
    parser.add_argument("--f", type=int, required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--iterations", type=int, required=True)
    asked = parser.parse_args()
    answers = channel()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    torch.set_num_threads(asked.threads)
    try:
        stored = np.load(asked.matrix, mmap_mode="r")
        rows = torch.from_numpy(np.array(stored[:, : asked.columns]))
        library = LIBRARIES[asked.library]
        say(answers, bytes=rows.numel() * 4)
        for line in sys.stdin:
            rule = line.strip()
            # Once on little, so that what a library loads and starts at its first call is not counted.
            library(rule, rows[:, :64].clone(), asked.f, asked.iterations)()
            say(answers, **measured(library(rule, rows, asked.f, asked.iterations)))
    except Exception as error:
        say(answers, error=f"{type(error).__name__}: {' '.join(str(error).split())}")


if __name__ == "__main__":
    main()
