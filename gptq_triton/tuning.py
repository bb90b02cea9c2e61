"""Measured plans for the layers of a model: every candidate timed on this GPU, the best kept for later runs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

import torch
from torch import nn

from . import dispatch, product, tables
from .layout import TiledWeight
from .linear import QuantLinear
from .plans import FusedPlan, Problem

_COLD_BYTES = 256 << 20  # of weight between two uses of a copy: more than any GPU's cache
_REPLAYS = 9


def tune(
    layers: nn.Module | Iterable[TiledWeight],
    rows: Sequence[int] = tables.BUCKETS,
    *,
    dtype: torch.dtype = torch.float16,
    save: bool = True,
    say: Callable[[str], None] | None = None,
) -> dict[str, FusedPlan]:
    """Time every candidate plan for every shape, and use the best from now on.

    Compiling takes a few seconds a candidate the first time, measuring some milliseconds. Nothing tunes unless asked.

    Args:
        layers: A module whose `QuantLinear` layers are on a GPU, or tiled weights.
        rows: Of x: plans are kept for 1, 2, 3-4, 5-8, 9-16, 17-32 rows and so on.
        dtype: Of x: float16 or bfloat16.
        save: Keep the plans in the user's table (`tables.user_file`), which later runs read; else only return them.
        say: Called with a line for each case.

    Returns:
        The best plan of each case, by the case's name.

    Raises:
        ValueError: No layer is held as tiles, so there is nothing to tune; or rows are out of range.
    """
    if isinstance(layers, nn.Module):
        layers = [m.tiles for m in layers.modules() if isinstance(m, QuantLinear) and m.tiles is not None]
    weights = list(layers)
    if not weights:
        raise ValueError("layers must hold at least one QuantLinear on a GPU: nothing to tune")
    if not all(1 <= M <= tables.BUCKETS[-1] for M in rows):
        raise ValueError(f"rows must lie in [1, {tables.BUCKETS[-1]}], got {list(rows)}")
    best: dict[str, FusedPlan] = {}
    device = weights[0].words.get_device()
    with torch.cuda.device(device):
        for weight in weights:
            problems = [product.problem_of(M, dtype, device, weight) for M in rows]
            missing = [p for p in problems if p.takes_digits and tables.case(p) not in best]
            copies = _copies(weight) if missing else []
            fastest = None
            for problem in sorted(missing, key=lambda problem: -problem.M):
                # what is best for more rows may be best for fewer, although it is not a candidate there
                plans = [*dispatch.candidates(problem), *([] if fastest is None else [fastest])]
                times = {plan: _time(problem, plan, copies) for plan in plans}
                best[tables.case(problem)] = fastest = min(times, key=lambda plan: times[plan])
                if say is not None:
                    say(f"{tables.case(problem)}: {times[fastest]:.2f} us, {fastest}")
    if save:
        tables.save(product.gpu_name(device), best)
        product.forget()
        for weight in weights:
            weight.launches.clear()
    return best


def _copies(weight: TiledWeight) -> list[TiledWeight]:
    held = weight.words.numel() * 4
    count = min(64, max(2, math.ceil(_COLD_BYTES / held)))
    return [weight] + [replace(weight, words=weight.words.clone(), meta=weight.meta.clone()) for _ in range(count - 1)]


def _time(problem: Problem, plan: FusedPlan, copies: list[TiledWeight]) -> float:
    """Median microseconds of a product with a cold weight; infinite where the plan does not fit this GPU."""
    weight = copies[0]
    x = torch.randn(problem.M, weight.K, dtype=problem.dtype, device=weight.words.device)
    y = torch.empty(problem.M, weight.N, dtype=problem.dtype, device=weight.words.device)
    try:
        operands = product.Operands.of(weight, None, weight.K % 8 == 0)
        launch = product.prepare_launch(problem, plan, operands, x.get_device())
        for copy in copies[:2]:
            launch(x, weight.K, None, copy, y)
    except Exception as error:  # Triton has its own class for each resource that a GPU may lack
        if type(error).__name__ not in ("OutOfResources", "PTXASError"):
            raise
        return math.inf
    calls = copies * math.ceil(8 / len(copies))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for copy in calls:
            launch(x, weight.K, None, copy, y)
    graph.replay()
    times = []
    for _ in range(_REPLAYS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / len(calls))
    return sorted(times)[len(times) // 2]
