"""The operators on the CPU: values, gradients, fakes, torch.compile, refusals."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounterWithBackend

from gptq_triton import ops
from gptq_triton.layout import tile_weight
from gptq_triton.linear import QuantLinear
from gptq_triton.spec import BITS
from tests.strategies import FORMATS, assert_close, random_rows, random_weight, weights

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@settings(deadline=None)
@given(weights(), st.integers(0, 5), st.sampled_from(DTYPES), st.booleans())
def test_matmul(weight, M, dtype, with_bias):
    x = random_rows(M, weight.K, dtype)
    bias = random_rows(1, weight.N, dtype, seed=1)[0] if with_bias else None
    assert_close(ops.matmul(x, weight, bias), x, weight, bias)


@settings(deadline=None)
@given(weights(), st.integers(0, 5), st.sampled_from(DTYPES))
def test_matmul_transposed(weight, M, dtype):
    dy = random_rows(M, weight.N, dtype)
    assert_close(ops.matmul_transposed(dy, weight), dy, weight, transposed=True)


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("bits", BITS)
def test_gradients_of_first_and_second_order(bits, act_order):
    weight = random_weight(11, 5, bits, 4, act_order=act_order, scale_dtype=torch.float32)
    x = random_rows(2, 11, torch.float64).requires_grad_()
    dy = random_rows(2, 5, torch.float64).requires_grad_()
    bias = random_rows(1, 5, torch.float64)[0].requires_grad_()
    for check in (torch.autograd.gradcheck, torch.autograd.gradgradcheck):
        assert check(lambda x, bias: ops.matmul(x, weight, bias), (x, bias))
        assert check(lambda dy: ops.matmul_transposed(dy, weight), (dy,))


def test_the_bias_keeps_its_dtype_in_its_gradient():
    weight = random_weight(32, 16, 4)
    bias = torch.zeros(16, requires_grad=True)
    ops.matmul(torch.ones(5, 32, dtype=torch.float16), weight, bias).sum().backward()
    assert bias.grad is not None
    assert torch.equal(bias.grad, torch.full((16,), 5.0))


@settings(deadline=None)
@given(weights(), st.integers(0, 5), st.sampled_from(DTYPES), st.booleans())
def test_tiles_give_the_same_as_words(weight, M, dtype, with_bias):
    tiled = tile_weight(weight)
    x, dy = random_rows(M, weight.K, dtype), random_rows(M, weight.N, dtype)
    bias = random_rows(1, weight.N, dtype, seed=1)[0] if with_bias else None
    assert_close(ops.matmul(x, tiled, bias), x, weight, bias)
    assert_close(ops.matmul_transposed(dy, tiled), dy, weight, transposed=True)


def test_gradients_through_tiles():
    tiled = tile_weight(random_weight(11, 5, 3, 4, act_order=True, scale_dtype=torch.float32))
    x = random_rows(2, 11, torch.float64).requires_grad_()
    dy = random_rows(2, 5, torch.float64).requires_grad_()
    bias = random_rows(1, 5, torch.float64)[0].requires_grad_()
    for check in (torch.autograd.gradcheck, torch.autograd.gradgradcheck):
        assert check(lambda x, bias: ops.matmul(x, tiled, bias), (x, bias))
        assert check(lambda dy: ops.matmul_transposed(dy, tiled), (dy,))


def test_scales_cannot_be_trained():
    weight = random_weight(32, 16, 4)
    weight = replace(weight, scales=weight.scales.clone().requires_grad_())
    with pytest.raises(RuntimeError, match="scales must not require grad"):
        ops.matmul(torch.ones(1, 32), weight)


@pytest.mark.parametrize("checkpoint_format", FORMATS)
@pytest.mark.parametrize("act_order", [False, True])
def test_opcheck(act_order, checkpoint_format):
    weight = random_weight(40, 24, 3, 16, act_order=act_order, checkpoint_format=checkpoint_format)
    parts = ops._parts(weight)
    x = random_rows(3, 40, torch.float32).requires_grad_()
    dy = random_rows(3, 24, torch.float32).requires_grad_()
    bias = torch.randn(24, requires_grad=True)
    torch.library.opcheck(torch.ops.gptq_triton.matmul.default, (x, bias, *parts))
    torch.library.opcheck(torch.ops.gptq_triton.matmul.default, (x.detach(), None, *parts))
    torch.library.opcheck(torch.ops.gptq_triton.matmul_transposed.default, (dy, *parts))


@pytest.mark.parametrize("act_order", [False, True])
def test_compile_is_one_graph_for_every_m(act_order):
    weight = random_weight(64, 32, 4, 32, act_order=act_order)
    layer = QuantLinear.from_packed(weight, torch.randn(32))
    graphs = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=graphs)
    for M in (2, 3, 17, 64, 100):
        x = random_rows(M, 64, torch.float32).requires_grad_()
        y = compiled(x)
        assert torch.equal(y, layer(x))
        y.sum().backward()
        assert x.grad is not None
        assert torch.equal(x.grad, ops.matmul_transposed(torch.ones(M, 32), weight))
    assert graphs.frame_count == 1


def test_meta_tensors_give_shapes():
    weight = random_weight(40, 24, 4, 16, device="meta")
    assert ops.matmul(torch.empty(3, 40, device="meta"), weight).shape == (3, 24)
    assert ops.matmul_transposed(torch.empty(3, 24, device="meta"), weight).shape == (3, 40)


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (torch.zeros(2, 31), ValueError, r"x must have shape \(M, 32\), got \(2, 31\)"),
        (torch.zeros(32), ValueError, r"x must have shape \(M, 32\), got \(32,\)"),
        (torch.zeros(2, 32, dtype=torch.int32), TypeError, "x must be float16.*got torch.int32"),
        (torch.zeros(2, 32, device="meta"), ValueError, "qweight must be on the device of x, meta, got cpu"),
        (torch.zeros(2, 32, device="meta", dtype=torch.float64), TypeError, "x may be float64 on the CPU only"),
    ],
)
def test_a_bad_x_is_refused(x, error, message):
    with pytest.raises(error, match=message):
        ops.matmul(x, random_weight(32, 16, 4))


@pytest.mark.parametrize(
    ("bias", "error", "message"),
    [
        (torch.zeros(15), ValueError, r"bias must have shape \(16,\), got \(15,\)"),
        (torch.zeros(16, dtype=torch.int32), TypeError, "bias must be floating, got torch.int32"),
        (torch.zeros(16, device="meta"), ValueError, "bias must be on the device of x, cpu, got meta"),
    ],
)
def test_a_bad_bias_is_refused(bias, error, message):
    with pytest.raises(error, match=message):
        ops.matmul(torch.zeros(2, 32), random_weight(32, 16, 4), bias)


def test_a_bad_dy_is_refused():
    with pytest.raises(ValueError, match=r"dy must have shape \(M, 16\), got \(2, 32\)"):
        ops.matmul_transposed(torch.zeros(2, 32), random_weight(32, 16, 4))


def test_the_cpu_needs_neither_triton_nor_a_gpu():
    script = """
import sys
sys.modules["triton"] = None  # as if it were not installed
import torch
from gptq_triton import launches, ops
from gptq_triton.packing import pack_weight
from gptq_triton.spec import QuantSpec
weight = pack_weight(torch.ones(32, 32), torch.ones(1, 32), torch.zeros(1, 32), None, QuantSpec(4, -1))
assert bool((ops.matmul(torch.ones(2, 32), weight) == 32).all())
assert not [name for name in sys.modules if name.startswith("gptq_triton.kernels")]
assert not torch.cuda.is_initialized()
try:
    launches.kernels("matmul")
except RuntimeError as error:
    assert "triton" in str(error)
else:
    raise SystemExit("a launch without triton must say what is missing")
"""
    subprocess.run([sys.executable, "-c", script], check=True)
