"""Solves of many layers of one shape: who is recorded, and that all come out as by `solve`. On a GPU: test_gpu.py."""

from __future__ import annotations

import pytest
import torch

from gptq_triton import recording
from gptq_triton.hessian import Hessian
from gptq_triton.recording import LANES, Recorder
from gptq_triton.solver import SolverOptions, solve, try_to_solve
from gptq_triton.spec import QuantSpec

SPEC, OPTIONS = QuantSpec(3, 16, False), SolverOptions(refine=1)


class Lane:
    """What a recording does, when its result is asked for."""

    made: list[Lane]

    def __init__(self, weights, hessian, spec, options):
        self.how, self.open = (spec, options, "gptq"), False
        Lane.made.append(self)

    def start(self, weights, hessian):
        assert not self.open
        self.open, self.given = True, ({name: weight.clone() for name, weight in weights.items()}, hessian)

    def trial(self):
        assert self.open
        self.open = False
        return try_to_solve(*self.given, *self.how)


@pytest.fixture
def lanes(monkeypatch):
    Lane.made = []
    monkeypatch.setattr(recording, "_Lane", Lane)
    monkeypatch.setattr(recording, "_recordable", lambda weights, hessian, options: True)
    return Lane.made


def problem(seed, K=48, N=8):
    random = torch.Generator().manual_seed(seed)
    hessian = Hessian(K)
    hessian.add(torch.randn(200, K, generator=random) @ torch.randn(K, K, generator=random))
    return {"a": torch.randn(N, K, generator=random), "b": torch.randn(N, K, generator=random)}, hessian


def same(found, expected):
    for name, one in expected.items():
        assert torch.equal(found[name].weight.qweight, one.weight.qweight)
        assert torch.equal(found[name].dequantized, one.dequantized)
        assert (found[name].method, found[name].error, found[name].damp) == (one.method, one.error, one.damp)


def test_every_solve_is_that_of_solve_and_lanes_take_turns(lanes):
    recorder, problems = Recorder(), [problem(seed) for seed in range(3 * LANES)]
    problems[4][1].sum.diagonal()[:4] = -1e9  # cannot be factored
    problems.append(problem(0, N=16))  # of another shape
    for first in range(0, len(problems), LANES):
        here = problems[first : first + LANES]
        begun = [recorder.start(*each, SPEC, OPTIONS, "gptq", often=True) for each in here]
        for each, end in zip(here, begun, strict=True):
            same(end(), solve(*each, SPEC, OPTIONS))
    assert len(lanes) == LANES, "the first of each shape is solved as it is"


def test_who_is_not_recorded(lanes, monkeypatch):
    weights, hessian = problem(0)
    recorder = Recorder()
    for often, method in ((False, "gptq"), (True, "rtn")):
        for _ in range(3):
            same(
                recorder.start(weights, hessian, SPEC, OPTIONS, method, often)(),
                solve(weights, hessian, SPEC, OPTIONS, method),
            )
    monkeypatch.undo()
    for _ in range(3):  # on a CPU
        same(
            recorder.start(weights, hessian, SPEC, OPTIONS, "gptq", often=True)(),
            solve(weights, hessian, SPEC, OPTIONS),
        )
    assert not lanes
