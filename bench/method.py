"""How a product is timed: CUDA graphs over rotating cold copies, providers taking turns, medians.

A graph holds at least 8 calls, each on the next copy of the weight; the copies are over 200 MB in all, so
the L2 cache never holds the one that comes next. The GPU works for a while before anything is timed, and
providers of one case take turns, so that clocks are the same for all.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

COLD_BYTES = 208e6
CALLS = 8
GRAPH_US = 400  # a graph shorter than this would measure its own launch
CALL_US = 2  # no call is shorter
ROUNDS = (9, 41)
SECONDS = 0.15  # of rounds, if the bounds allow
METHOD = (
    "CUDA-graph replay of at least 8 calls over rotating weight copies of more than 200 MB in all; preheated, "
    "providers interleaved, medians; correctness against float64; ceilings measured in the same process; weights are "
    "normal numbers rounded to nearest, the same for all"
)


@dataclass(frozen=True)
class Captured:
    """A graph, or whatever else has ``replay``; how many calls it holds; what to do, untimed, before each replay.

    ``holds`` is what owns the memory that the graph reads and writes: a graph alone does not keep it.
    """

    graph: Any
    calls: int
    reset: Callable[[], Any] = lambda: None
    holds: Any = None


def copies_of(nbytes: int) -> int:
    """How many copies of a weight are cold together; at least two."""
    return max(2, math.ceil(COLD_BYTES / nbytes))


def calls_of(copies: int, floor_us: float) -> int:
    """How many calls a graph holds: every copy as often as the others."""
    least = max(CALLS, math.ceil(GRAPH_US / max(floor_us, CALL_US)))
    return copies * math.ceil(least / copies)


def capture(calls: Sequence[Callable[[], Any]], times: int) -> Captured:
    """A graph of ``times`` calls that go around ``calls``, each of which has run once before."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for i in range(times):
            calls[i % len(calls)]()
    return Captured(graph, times, holds=calls)


def interleaved(captured: Mapping[str, Captured], preheat: float) -> dict[str, float]:
    """Median microseconds per call of each graph.

    Args:
        captured: Name to graph.
        preheat: Seconds to work before timing.
    """
    began = time.perf_counter()
    turns = 0
    while turns < 2 or time.perf_counter() - began < preheat:
        for item in captured.values():
            item.reset()
            item.graph.replay()
        torch.cuda.synchronize()
        turns += 1
    each = (time.perf_counter() - began) / turns
    rounds = min(max(math.ceil(SECONDS / each), ROUNDS[0]), ROUNDS[1])
    times: dict[str, list[float]] = {name: [] for name in captured}
    names = list(captured)
    for turn in range(rounds):
        events = {}
        # another one begins each round, so that none always follows the same
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            captured[name].reset()
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            captured[name].graph.replay()
            end.record()
            events[name] = begin, end
        torch.cuda.synchronize()
        for name, (begin, end) in events.items():
            times[name].append(begin.elapsed_time(end) * 1e3 / captured[name].calls)
    return {name: statistics.median(values) for name, values in times.items()}
