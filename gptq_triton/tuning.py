"""Measured plans for the layers of a model: every candidate timed on this GPU, the best kept for later runs."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

import torch
from torch import nn

from . import dispatch, launches, product, tables
from .estimates import microseconds
from .layout import TiledWeight
from .linear import QuantLinear
from .plans import FusedPlan, Problem

_COLD_BYTES = 256 << 20  # of weight between two uses of a copy: more than any GPU's cache
_CALLS, _GRAPH_US = 8, 400.0  # of a graph, at least: a shorter one would measure its own launch, too
_REPLAYS = 5
_FINALISTS, _NEAR = 4, 1.08  # plans that are timed again in turns, and how near to the fastest they are
_WARM = 0.03  # seconds of work before that: clocks change with it


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
            missing = {tables.case(p): p for p in problems if p.takes_digits and tables.case(p) not in best}
            copies = _copies(weight) if missing else []
            found: dict[str, FusedPlan] = {}
            fastest = None
            for case, problem in sorted(missing.items(), key=lambda item: -item[1].M):
                plans = list(dict.fromkeys(dispatch.candidates(problem)))
                if fastest is not None and fastest not in plans:
                    plans.append(fastest)  # of more rows: may be the best for fewer, too
                times = {plan: _time(problem, plan, copies) for plan in plans}
                near = [plan for plan in times if times[plan] < _NEAR * min(times.values())]
                finalists = sorted(near, key=lambda plan: times[plan])[:_FINALISTS]
                if len(finalists) > 1:
                    times |= zip(finalists, _in_turns(problem, finalists, copies), strict=True)
                found[case] = fastest = min(finalists or times, key=lambda plan: times[plan])
                if say is not None:
                    say(f"{case}: {times[fastest]:.2f} us, {fastest}")
            best |= {case: found[case] for case in missing}
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
    try:
        captured = _Captured(problem, plan, copies)
    except Exception as error:  # Triton has its own class for each resource that a GPU may lack
        if type(error).__name__ not in ("OutOfResources", "PTXASError"):
            raise
        return math.inf
    captured.graph.replay()
    return _medians([captured], _REPLAYS)[0]


def _in_turns(problem: Problem, plans: Sequence[FusedPlan], copies: list[TiledWeight]) -> list[float]:
    """The same for several plans, one after another again and again on a GPU at work: what a few percent depend on."""
    captured = [_Captured(problem, plan, copies) for plan in plans]
    began = time.perf_counter()
    while time.perf_counter() - began < _WARM:
        for one in captured:
            one.graph.replay()
        torch.cuda.synchronize()
    return _medians(captured, 4 * _REPLAYS)


def _medians(captured: Sequence[_Captured], rounds: int) -> list[float]:
    """Microseconds of each one's product, of replays in turns that the GPU has no time to wait between."""
    turns = [[one.replay() for one in captured] for _ in range(rounds)]
    torch.cuda.synchronize()
    return [
        statistics.median(begin.elapsed_time(end) for begin, end in events) * 1e3 / len(one.calls)
        for one, events in zip(captured, zip(*turns, strict=True), strict=True)
    ]


class _Captured:
    """A graph of products with one cold weight after another."""

    def __init__(self, problem: Problem, plan: FusedPlan, copies: list[TiledWeight]) -> None:
        weight = copies[0]
        self.x = torch.randn(problem.M, weight.K, dtype=problem.dtype, device=weight.words.device)
        self.y = torch.empty(problem.M, weight.N, dtype=problem.dtype, device=weight.words.device)
        operands = launches.Operands.of(weight, None, weight.K % 8 == 0)
        launch = launches.prepare_launch(problem, plan, operands, self.x.get_device())
        for copy in copies[:2]:
            launch(self.x, weight.K, None, copy, self.y)
        least = max(_CALLS, _GRAPH_US / microseconds(problem, plan))
        self.calls = copies * math.ceil(least / len(copies))
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            for copy in self.calls:
                launch(self.x, weight.K, None, copy, self.y)

    def replay(self) -> tuple[torch.cuda.Event, torch.cuda.Event]:
        """Start a replay, between two events."""
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        self.graph.replay()
        end.record()
        return begin, end
