"""The selftest passes on sound kernels and notices broken ones; the bound is neither loose nor tight."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gptq_triton import ops, reference
from gptq_triton import selftest as selftest_module
from gptq_triton.bounds import error_bound, oracle, unit_roundoff
from gptq_triton.cli import main
from gptq_triton.linear import QuantLinear
from gptq_triton.samples import random_rows, random_weight
from gptq_triton.selftest import DTYPES, REGIMES, selftest
from gptq_triton.spec import BITS


@pytest.fixture
def few(monkeypatch):
    """Two regimes, so that a broken kernel is found in no time."""
    monkeypatch.setattr(selftest_module, "REGIMES", (REGIMES[0], REGIMES[-1]))


def test_the_cpu_path_keeps_the_contract():
    seen = []
    found = selftest("cpu", seen.append)
    assert found == seen
    assert all(check.ok and 0 < check.share <= 1 and check.error <= check.bound for check in found)
    assert {(check.bits, check.dtype, check.regime) for check in found} == {
        (bits, str(dtype)[6:], regime.name) for bits in BITS for dtype in DTYPES for regime in REGIMES
    }


def off_by_one_zero(x, weight, bias=None):
    from dataclasses import replace

    other = {"gptq": "gptq_v2", "gptq_v2": "gptq"}[weight.checkpoint_format]
    return reference.matmul(x, replace(weight, checkpoint_format=other), bias)


BROKEN = {
    "a NaN": lambda x, weight, bias=None: reference.matmul(x, weight, bias).index_fill(1, torch.tensor([3]), torch.nan),
    "zero points off by one": off_by_one_zero,
    "no bias": lambda x, weight, bias=None: reference.matmul(x, weight),
    "half too large": lambda x, weight, bias=None: reference.matmul(x, weight, bias) * 1.5,
    "another dtype": lambda x, weight, bias=None: reference.matmul(x, weight, bias).double(),
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_kernel_is_found(monkeypatch, few, capsys, what):
    monkeypatch.setattr(QuantLinear, "forward", lambda self, x: BROKEN[what](x, self.weight_packed, self.bias))
    found = [check for check in selftest("cpu") if check.regime == REGIMES[0].name]
    assert not any(check.ok for check in found)
    assert main(["selftest", "--device", "cpu", "--quiet"]) == 1
    assert "BROKEN" in capsys.readouterr().out


def test_the_command(few, capsys):
    assert main(["selftest", "--device", "cpu"]) == 0
    shown = capsys.readouterr()
    assert "the CPU path: 24 of 24 checks keep the bound" in shown.out
    assert shown.err.count(" ok\n") == 24
    assert main(["selftest", "--device", "cpu", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["failed"], len(result["checks"])) == (0, 24)


@given(bits=st.sampled_from(BITS), dtype=st.sampled_from(DTYPES), M=st.integers(1, 4), seed=st.integers(0, 50))
def test_the_bound_holds_and_is_not_generous(bits, dtype, M, seed):
    """It stays under a handful of roundings of the sum of absolute products."""
    weight = random_weight(128, 32, bits, 32, seed=seed)
    x = random_rows(M, 128, dtype, seed=seed)
    exact, bound = oracle(x, weight), error_bound(x, weight, digits=False)
    assert ((ops.matmul(x, weight).double() - exact).abs() <= bound).all()
    size = x.double().abs() @ reference.dequantize(weight, torch.float64).abs()
    roundings = {torch.float16: 3, torch.bfloat16: 3, torch.float32: 200}[dtype]
    assert (bound <= roundings * unit_roundoff(dtype) * size + 1e-6).all()
