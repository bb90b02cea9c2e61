"""Many small layers of one shape, such as experts, solved by work that was recorded once (a CUDA graph).

A solve is about a thousand launches; where a layer is small, to launch them takes the process longer than to run them
takes the GPU. A recording is launched as one, and several at once share the GPU. Its kernels are those of `solve`, and
so are its results, bit for bit.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from .hessian import Hessian
from .options import SolverOptions
from .solver import Solution, Trial, needed_tokens, solutions, solve, try_to_solve
from .spec import QuantSpec

LANES = 3  # recordings of one shape, which the GPU may run at once
OFTEN = 8  # solves of one shape that are worth a recording
MOST = 1 << 24  # weights, or elements of a Hessian, beyond which launches are not what a solve waits for

Solve = Callable[[], dict[str, Solution]]


class _Lane:
    """A recording, with memory of its own.

    Args:
        weights, hessian, spec, options: As `solve` takes them, of which only the shapes matter. Such were solved
            before, so that nothing is left to compile.
    """

    def __init__(self, weights: dict[str, Tensor], hessian: Hessian, spec: QuantSpec, options: SolverOptions):
        self._device = hessian.sum.device
        self._stream, self._graph = torch.cuda.Stream(self._device), torch.cuda.CUDAGraph()
        self._weights = {str(place): torch.empty_like(weight) for place, weight in enumerate(weights.values())}
        self._hessian = Hessian(len(hessian.sum), self._device)
        torch.cuda.synchronize(self._device)
        with torch.cuda.stream(self._stream):
            self._graph.capture_begin(capture_error_mode="thread_local")
            self._trial = try_to_solve(self._weights, self._hessian, spec, options, "gptq")
            self._graph.capture_end()

    def start(self, weights: dict[str, Tensor], hessian: Hessian) -> None:
        """Begin, once the current stream has come this far."""
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            for kept, weight in zip(self._weights.values(), weights.values(), strict=True):
                kept.copy_(weight)
            self._hessian.sum.copy_(hessian.sum)
            self._graph.replay()

    def trial(self) -> Trial:
        """What came of it; the current stream waits."""
        torch.cuda.current_stream(self._device).wait_stream(self._stream)
        now = self._trial
        chosen = replace(now.chosen, scales=now.chosen.scales.clone())
        return replace(now, chosen=chosen, words=now.words.clone(), dequantized=now.dequantized.clone())


def _recordable(weights: dict[str, Tensor], hessian: Hessian, options: SolverOptions) -> bool:
    """Whether a solve is small, and a series of launches that is always the same."""
    enough = hessian.tokens >= needed_tokens(len(hessian.sum), options)
    small = max(hessian.sum.numel(), sum(weight.numel() for weight in weights.values())) <= MOST
    return hessian.sum.is_cuda and options.fused and hessian.drift is None and enough and small


class Recorder:
    """Solves layers, and records how where many have one shape."""

    def __init__(self):
        self._lanes: dict[Hashable, list[_Lane]] = {}  # of a shape that was solved before

    def start(
        self,
        weights: dict[str, Tensor],
        hessian: Hessian,
        spec: QuantSpec,
        options: SolverOptions,
        method: Literal["gptq", "rtn"],
        often: bool,
    ) -> Solve:
        """`solve`, but a GPU may not be done, or have begun, before the returned function is called.

        Args:
            weights, hessian, spec, options, method: As `solve` takes them.
            often: Whether many of this shape come.

        Returns:
            What ends it. At most LANES may be open.
        """
        if not often or method == "rtn" or not _recordable(weights, hessian, options):
            return functools.partial(solve, weights, hessian, spec, options, method)
        shapes = tuple((weight.shape, weight.dtype) for weight in weights.values())
        shape = hessian.sum.device, len(hessian.sum), shapes, spec, options
        lanes = self._lanes.get(shape)
        if lanes is None:
            self._lanes[shape], first = [], solve(weights, hessian, spec, options)
            return lambda: first
        lane = _Lane(weights, hessian, spec, options) if len(lanes) < LANES else lanes.pop(0)
        lanes.append(lane)
        lane.start(weights, hessian)

        def ended() -> dict[str, Solution]:
            found = solutions(list(weights), lane.trial(), hessian.tokens, spec, options)
            return solve(weights, hessian, spec, options) if found is None else found

        return ended
