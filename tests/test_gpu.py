"""The kernels on a GPU: `pytest -m gpu`."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gptq_triton import ops, reference
from gptq_triton.linear import QuantLinear
from gptq_triton.spec import BITS
from tests.strategies import (
    FORMATS,
    assert_close,
    exact_rows,
    oracle,
    poisoned,
    poisoned_weight,
    random_rows,
    random_weight,
    relative_error,
    typical_error,
    weights,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA or ROCm device"),
]

DEVICE = "cuda"
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
ROWS = (1, 2, 7, 16, 17, 64, 65, 200)  # both sides of every step in dispatch's tables


@pytest.fixture(autouse=True)
def nan_in_fresh_memory():
    """torch.empty yields NaN, so an element that no kernel writes cannot pass."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])


@pytest.mark.parametrize(
    ("dtype", "group_size", "act_order"),
    [
        (torch.float16, 128, False),
        (torch.bfloat16, 128, False),
        (torch.float32, 128, False),
        (torch.float16, 32, False),
        (torch.float16, -1, False),
        (torch.float16, 64, True),
    ],
)
@pytest.mark.parametrize("bits", BITS)
def test_every_width_dtype_and_grouping(bits, dtype, group_size, act_order):
    weight = random_weight(576, 320, bits, group_size, act_order=act_order, device=DEVICE)
    bias = random_rows(1, 320, dtype, seed=1, device=DEVICE)[0]
    for M in ROWS:
        x = random_rows(M, 576, dtype, device=DEVICE)
        dy = random_rows(M, 320, dtype, device=DEVICE)
        assert_close(ops.matmul(x, weight, bias), x, weight, bias)
        assert_close(ops.matmul_transposed(dy, weight), dy, weight, transposed=True)


RAGGED = settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
SCALES = (torch.float16, torch.bfloat16, torch.float32)


@RAGGED
@given(
    weights(300, 300, scale_dtypes=SCALES, device=DEVICE),
    st.integers(0, 140),
    st.sampled_from(DTYPES),
    st.booleans(),
)
def test_ragged_shapes(weight, M, dtype, with_bias):
    weight = poisoned_weight(weight)
    x = random_rows(M, weight.K, dtype, device=DEVICE)
    bias = random_rows(1, weight.N, dtype, seed=1, device=DEVICE)[0] if with_bias else None
    assert_close(ops.matmul(poisoned(x), weight, bias), x, weight, bias)


@RAGGED
@given(weights(300, 300, scale_dtypes=SCALES, device=DEVICE), st.integers(0, 140), st.sampled_from(DTYPES))
def test_ragged_shapes_transposed(weight, M, dtype):
    weight = poisoned_weight(weight)
    dy = random_rows(M, weight.N, dtype, device=DEVICE)
    assert_close(ops.matmul_transposed(poisoned(dy), weight), dy, weight, transposed=True)


@pytest.mark.parametrize("checkpoint_format", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", BITS)
def test_exact_data_gives_the_exact_answer(bits, dtype, checkpoint_format):
    weight = random_weight(
        200, 104, bits, 32, exact=True, checkpoint_format=checkpoint_format, device=DEVICE
    )  # fmt: skip
    x, dy = (exact_rows(70, width, dtype, device=DEVICE) for width in (200, 104))
    assert torch.equal(ops.matmul(x, weight), oracle(x, weight).to(dtype))
    assert torch.equal(ops.matmul_transposed(dy, weight), oracle(dy, weight, transposed=True).to(dtype))


CONFIGURATIONS = [(*blocks, 4, 3) for blocks in itertools.product((16, 64), repeat=3)]
CONFIGURATIONS += [(64, 64, 64, 4, 1), (32, 32, 32, 2, 2), (64, 64, 32, 8, 4)]


@pytest.mark.parametrize("transposed", [False, True])
def test_every_configuration_gives_the_same_answer(transposed):
    from gptq_triton.kernels.matmul import matmul
    from gptq_triton.kernels.matmul_transposed import matmul_transposed

    M, K, N = 45, 448, 176
    for group_size, act_order in ((64, False), (48, False), (64, True)):
        weight = random_weight(K, N, 4, group_size, act_order=act_order, exact=True, device=DEVICE)
        x = exact_rows(M, N if transposed else K, torch.float16, device=DEVICE)
        expected = oracle(x, weight, transposed=transposed).half()
        for block_m, block_n, block_k, warps, stages in CONFIGURATIONS:
            y = torch.full_like(expected, float("nan"))
            head = (x, weight.qweight, weight.scales, weight.qzeros, weight.g_idx)
            options = {
                "bits": 4,
                "zero_offset": weight.zero_offset,
                "rows_per_group": group_size,
                "block_m": block_m,
                "block_n": block_n,
                "block_k": block_k,
                "num_warps": warps,
                "num_stages": stages,
            }
            if transposed:
                matmul_transposed(*head, y, **options)
            else:
                matmul(*head, None, y, **options)
            assert torch.equal(y, expected), (group_size, act_order, block_m, block_n, block_k, warps, stages)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", BITS)
def test_large_layers_err_like_random_rounding(bits, dtype):
    weight = random_weight(4096, 1024, bits, 128, device=DEVICE)
    bias = torch.zeros(1024, dtype=dtype, device=DEVICE)
    for M in (1, 33, 500):
        x, dy = (random_rows(M, width, dtype, device=DEVICE) for width in (4096, 1024))
        error = relative_error(ops.matmul(x, weight, bias), oracle(x, weight))
        assert error < typical_error(4096, dtype)
        error = relative_error(ops.matmul_transposed(dy, weight), oracle(dy, weight, transposed=True))
        assert error < typical_error(1024, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_do_not_depend_on_m(dtype):
    weight = random_weight(512, 256, 4, 128, device=DEVICE)
    x = random_rows(300, 512, dtype, device=DEVICE)
    for few, many in ((1, 16), (17, 64), (65, 300)):  # the same plan: the same bits
        assert torch.equal(ops.matmul(x[:few], weight), ops.matmul(x[:many], weight)[:few])


def test_launches_are_deterministic():
    weight = random_weight(1024, 512, 4, 128, device=DEVICE)
    x = random_rows(100, 1024, torch.float16, device=DEVICE)
    y = ops.matmul(x, weight)
    dx = ops.matmul_transposed(y, weight)
    for _ in range(20):
        assert torch.equal(ops.matmul(x, weight), y)
        assert torch.equal(ops.matmul_transposed(y, weight), dx)


def test_strides_of_x():
    weight = random_weight(96, 80, 4, 32, device=DEVICE)
    x = random_rows(40, 96, torch.float16, device=DEVICE)
    for view in (
        x.t().contiguous().t(),
        x[::2],
        x[:1].expand(20, 96),
        torch.stack([x, x], dim=2)[:, :, 1],
        x.flip(0)[5:],
    ):
        assert_close(ops.matmul(view, weight), view, weight)


def test_strides_of_the_weight():
    weight = random_weight(96, 80, 3, 32, act_order=True, device=DEVICE)
    x = random_rows(5, 96, torch.float16, device=DEVICE)
    names = ("qweight", "scales", "qzeros")
    turned = replace(weight, **{name: getattr(weight, name).t().contiguous().t() for name in names})
    assert torch.equal(ops.matmul(x, turned), ops.matmul(x, weight))


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients(dtype, act_order):
    weight = random_weight(192, 160, 4, 64, act_order=act_order, device=DEVICE)
    x = random_rows(33, 192, dtype, device=DEVICE).requires_grad_()
    bias = random_rows(1, 160, dtype, device=DEVICE)[0].requires_grad_()
    dy = random_rows(33, 160, dtype, seed=1, device=DEVICE).requires_grad_()
    dx, dbias = torch.autograd.grad(ops.matmul(x, weight, bias), (x, bias), dy, create_graph=True)
    assert_close(dx, dy, weight, transposed=True)
    assert torch.equal(dbias, dy.sum(0))
    ddx = random_rows(33, 192, dtype, seed=2, device=DEVICE)
    (ddy,) = torch.autograd.grad(dx, dy, ddx)
    assert_close(ddy, ddx, weight)


def test_adapters_train_through_frozen_layers():
    first = random_weight(128, 96, 4, 32, device=DEVICE)
    second = random_weight(96, 64, 3, 32, act_order=True, device=DEVICE)

    def step(multiply, dtype):
        x = random_rows(50, 128, dtype, device=DEVICE)
        A = (random_rows(128, 8, dtype, seed=1, device=DEVICE) / 11).requires_grad_()
        B = random_rows(8, 96, dtype, seed=2, device=DEVICE).requires_grad_()
        y = multiply(multiply(x, first) + x @ A @ B, second)
        return torch.autograd.grad((y**2).sum(), (A, B))

    ours = step(ops.matmul, torch.float32)
    expected = step(reference.matmul, torch.float64)
    for grad, exact in zip(ours, expected, strict=True):
        # five products one after another, none deeper than 128
        assert relative_error(grad, exact) < 5 * typical_error(128, torch.float32)


@pytest.mark.parametrize("act_order", [False, True])
def test_compiled_forward_and_backward_for_every_m(act_order):
    weight = random_weight(256, 128, 4, 64, act_order=act_order, device=DEVICE)
    layer = QuantLinear.from_packed(weight)
    compiled = torch.compile(lambda x: layer(x).relu(), fullgraph=True, dynamic=True)
    for M in (2, 16, 33, 130):
        x = random_rows(M, 256, torch.float16, device=DEVICE).requires_grad_()
        y = compiled(x)
        assert torch.equal(y, layer(x).relu())
        dy = random_rows(M, 128, torch.float16, device=DEVICE)
        (dx,) = torch.autograd.grad(y, x, dy)
        assert torch.equal(dx, ops.matmul_transposed(dy * (y > 0), weight))


def test_opcheck():
    weight = random_weight(40, 24, 3, 16, act_order=True, device=DEVICE)
    parts = ops._parts(weight)
    x = random_rows(3, 40, torch.float32, device=DEVICE).requires_grad_()
    bias = torch.randn(24, device=DEVICE, requires_grad=True)
    torch.library.opcheck(torch.ops.gptq_triton.matmul.default, (x, bias, *parts))
    dy = random_rows(3, 24, torch.float32, device=DEVICE).requires_grad_()
    torch.library.opcheck(torch.ops.gptq_triton.matmul_transposed.default, (dy, *parts))


@pytest.mark.parametrize("M", [1, 20, 100])
def test_cuda_graph_replays_with_new_inputs(M):
    weight = random_weight(256, 128, 4, 64, device=DEVICE)
    x = random_rows(M, 256, torch.float16, device=DEVICE)
    ops.matmul_transposed(ops.matmul(x, weight), weight)  # compiles before the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = ops.matmul(x, weight)
        dx = ops.matmul_transposed(y, weight)
    for seed in (1, 2):
        x.copy_(random_rows(M, 256, torch.float16, seed=seed, device=DEVICE))
        graph.replay()
        assert torch.equal(y, ops.matmul(x, weight))
        assert torch.equal(dx, ops.matmul_transposed(y, weight))


def test_launches_follow_the_current_stream():
    weight = random_weight(256, 128, 4, 64, device=DEVICE)
    final = random_rows(32, 256, torch.float16, device=DEVICE)
    expected = ops.matmul(final, weight)
    x = torch.full_like(final, float("nan"))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)  # a launch on any other stream would see NaN
        x.copy_(final)
        y = ops.matmul(x, weight)
    stream.synchronize()
    assert torch.equal(y, expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_launches_follow_the_device_of_x():
    weight = random_weight(64, 32, 4, 32, device="cuda:1")
    x = random_rows(3, 64, torch.float16, device="cuda:1")
    with torch.cuda.device(0):
        assert_close(ops.matmul(x, weight), x, weight)
        with pytest.raises(ValueError, match="qweight must be on the device of x, cuda:0, got cuda:1"):
            ops.matmul(x.to("cuda:0"), weight)


def enough_memory(gigabytes: int) -> bool:
    return torch.cuda.is_available() and torch.cuda.mem_get_info()[0] > gigabytes * 2**30


@pytest.mark.skipif("not enough_memory(20)", reason="needs 20 GB of free GPU memory")
def test_more_than_two_to_the_31_elements_of_x():
    weight = random_weight(4096, 16, 4, 128, device=DEVICE)
    x = torch.empty(2**19 + 100, 4096, dtype=torch.float16, device=DEVICE).normal_()
    assert torch.equal(ops.matmul(x, weight)[-100:], ops.matmul(x[-100:].clone(), weight))


@pytest.mark.skipif("not enough_memory(40)", reason="needs 40 GB of free GPU memory")
def test_more_than_two_to_the_31_words_of_weight():
    K, N = 16384, 2**19 + 2**14
    narrow = random_weight(K, 64, 8, device=DEVICE)
    assert narrow.qweight.shape[0] * N > 2**31
    wide = replace(
        narrow,
        **{name: getattr(narrow, name).repeat(1, N // 64) for name in ("qweight", "scales", "qzeros")},
    )
    x = random_rows(2, K, torch.float16, device=DEVICE)
    assert torch.equal(ops.matmul(x, wide)[:, -64:], ops.matmul(x, narrow))


def test_what_only_the_cpu_can_do_is_refused():
    weight = random_weight(32, 16, 4, device=DEVICE)
    with pytest.raises(TypeError, match="x may be float64 on the CPU only"):
        ops.matmul(torch.zeros(2, 32, dtype=torch.float64, device=DEVICE), weight)
    with pytest.raises(ValueError, match="qweight must be on the device of x, cpu, got cuda"):
        ops.matmul(torch.zeros(2, 32), weight)
