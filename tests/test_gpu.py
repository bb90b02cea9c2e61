"""The kernels on a GPU: `pytest -m gpu`."""

from __future__ import annotations

import copy
import pickle
import threading
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gptq_triton import bounds, dispatch, launches, layout, ops, plans, product, recording, reference, tables
from gptq_triton import hessian as hessian_module
from gptq_triton.hessian import Hessian
from gptq_triton.layout import tile_weight
from gptq_triton.linear import QuantLinear
from gptq_triton.packing import PackedWeight
from gptq_triton.plans import Shares
from gptq_triton.scratch import scratch_of
from gptq_triton.solver import SolverOptions, solve
from gptq_triton.spec import BITS, QuantSpec
from tests.strategies import (
    assert_close,
    exact_rows,
    oracle,
    poisoned,
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
HALVES = (torch.float16, torch.bfloat16)
DTYPES = (*HALVES, torch.float32)
ROWS = (1, 4, 5, 8, 9, 16, 17, 33, 64, 65, 200, 300)  # both sides of every step of dispatch


@pytest.fixture(autouse=True, scope="module")
def kernels_for_gradients():
    """Of small layers too, where W as floats is faster."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dispatch, "transposed_microseconds", lambda _, plan: isinstance(plan, plans.DequantizePlan))
        yield


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
        (torch.float16, 64, False),
        (torch.float16, 256, False),
        (torch.float16, -1, False),
        (torch.float16, 64, True),
        (torch.bfloat16, 128, True),
    ],
)
@pytest.mark.parametrize("bits", BITS)
def test_every_width_dtype_and_grouping(bits, dtype, group_size, act_order):
    weight = random_weight(1088, 336, bits, group_size, act_order=act_order, device=DEVICE)
    tiled = tile_weight(weight)
    bias = random_rows(1, 336, dtype, seed=1, device=DEVICE)[0]
    for M in ROWS:
        x = random_rows(M, 1088, dtype, device=DEVICE)
        dy = random_rows(M, 336, dtype, device=DEVICE)
        assert_close(ops.matmul(x, tiled, bias), x, weight, bias)
        assert_close(ops.matmul_transposed(dy, tiled), dy, weight, transposed=True)


RAGGED = settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
SCALES = (torch.float16, torch.bfloat16, torch.float32)


@RAGGED
@given(
    weights(300, 300, scale_dtypes=SCALES, device=DEVICE),
    st.sampled_from((0, 1, 3, 8, 11, 16, 20, 64, 70, 250)),
    st.sampled_from(DTYPES),
    st.booleans(),
)
def test_ragged_shapes(weight, M, dtype, with_bias):
    x = random_rows(M, weight.K, dtype, device=DEVICE)
    bias = random_rows(1, weight.N, dtype, seed=1, device=DEVICE)[0] if with_bias else None
    assert_close(ops.matmul(poisoned(x), tile_weight(weight), bias), x, weight, bias)


def test_what_the_vendor_multiplies_is_summed_in_float32():
    # columns in many groups of their own are far apart, so the vendor cuts their sum, and may add parts as halves
    weight = random_weight(13, 41, 2, 1, device=DEVICE)
    x, dy = random_rows(250, 13, torch.float16, device=DEVICE), random_rows(60, 41, torch.float16, device=DEVICE)
    bias = random_rows(1, 41, torch.float16, seed=1, device=DEVICE)[0]
    assert torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction
    assert_close(ops.matmul(poisoned(x), tile_weight(weight), bias), x, weight, bias)
    assert_close(ops.matmul_transposed(dy, tile_weight(weight)), dy, weight, transposed=True)
    assert torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction


@pytest.mark.parametrize("dtype", DTYPES)
def test_slabs_are_added_in_float32(monkeypatch, dtype):
    monkeypatch.setattr(dispatch, "SLAB_BYTES", 1 << 16)  # 16 rows or more at a time
    weight = random_weight(1001, 530, 4, 128, device=DEVICE)
    tiled = tile_weight(weight)
    x, dy = random_rows(300, 1001, dtype, device=DEVICE), random_rows(300, 530, dtype, device=DEVICE)
    assert_close(ops.matmul(x, tiled), x, weight)
    assert_close(ops.matmul_transposed(dy, tiled), dy, weight, transposed=True)


@RAGGED
@given(
    weights(300, 300, scale_dtypes=SCALES, device=DEVICE),
    st.sampled_from((0, 1, 3, 16, 140)),
    st.sampled_from(DTYPES),
)
def test_ragged_shapes_transposed(weight, M, dtype):
    dy = random_rows(M, weight.N, dtype, device=DEVICE)
    assert_close(ops.matmul_transposed(poisoned(dy), tile_weight(weight)), dy, weight, transposed=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", BITS)
def test_exact_data_gives_the_exact_answer(bits, dtype):
    weight = random_weight(200, 104, bits, 32, exact=True, device=DEVICE)
    tiled = tile_weight(weight)
    for M in (2, 8, 16, 40, 70, 200, 600):
        x, dy = (exact_rows(M, width, dtype, device=DEVICE) for width in (200, 104))
        assert torch.equal(ops.matmul(x, tiled), oracle(x, weight).to(dtype))
        assert torch.equal(ops.matmul_transposed(dy, tiled), oracle(dy, weight, transposed=True).to(dtype))


@pytest.mark.parametrize("act_order", [False, True])
def test_rows_that_do_not_fill_tiles_are_multiplied_by_launches_of_their_own(monkeypatch, act_order):
    for name in ("rows_at_once", "rows_at_once_transposed"):
        monkeypatch.setattr(dispatch, name, lambda problem, **_: min(problem.M, 128))
    weight = random_weight(520, 264, 4, 128, exact=True, act_order=act_order, device=DEVICE)
    tiled = tile_weight(weight)
    for M in (129, 300):
        problem = product.problem_of(M, torch.float16, 0, tiled)
        assert len(product.plans_of(problem, 0)) == len(product.plans_transposed(problem)) == -(-M // 128)
        x, dy = (exact_rows(M, width, torch.float16, device=DEVICE) for width in (520, 264))
        for _ in range(2):
            assert torch.equal(ops.matmul(x, tiled), oracle(x, weight).half())
            assert torch.equal(ops.matmul_transposed(dy, tiled), oracle(dy, weight, transposed=True).half())


@pytest.mark.parametrize(
    ("bits", "group_size", "M"),
    [
        *((4, size, M) for size in (128, 32) for M in (3, 8, 16, 50, 100, 300)),
        *((4, 64, M) for M in (3, 8)),
        *((bits, 128, 100) for bits in (2, 3, 8)),
    ],
)
def test_every_plan_gives_the_same_answer(bits, group_size, M):
    weight = random_weight(1536, 528, bits, group_size, exact=True, device=DEVICE)
    tiled = tile_weight(weight)
    x = exact_rows(M, 1536, torch.float16, device=DEVICE)
    expected = oracle(x, weight).half()
    problem = product.problem_of(M, torch.float16, 0, tiled)
    operands = launches.Operands.of(tiled, None, True)
    for plan in dispatch.candidates(problem):
        y = torch.full_like(expected, float("nan"))
        launches.prepare_launch(problem, plan, operands, 0)(x, 1536, None, tiled, y)
        assert torch.equal(y, expected), plan
        if isinstance(plan, (plans.DecodePlan, plans.LargePlan)):  # few programs take one tile, or part, after another
            few = replace(problem, multiprocessors=4)
            if isinstance(plan, plans.DecodePlan):
                plan = replace(plan, persistent=True)
                if plan.own_digits and (plan := dispatch.with_own_digits(few, plan)) is None:
                    continue  # more rounds of digits than fit
            y = torch.full_like(expected, float("nan"))
            launches.prepare_launch(few, plan, operands, 0)(x, 1536, None, tiled, y)
            assert torch.equal(y, expected), plan


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(
    ("group_size", "M", "act_order"),
    [
        *((g, M, order) for g, M in ((128, 1), (128, 2), (64, 1), (64, 2), (32, 1)) for order in (False, True)),
        *((128, M, False) for M in (3, 4)),
    ],
)
def test_digits_are_the_same_wherever_they_are_found(group_size, M, act_order, dtype):
    weight = random_weight(1500, 200, 4, group_size, act_order=act_order, device=DEVICE)
    tiled = tile_weight(weight)
    for rows in (random_rows(M, 1500, dtype, device=DEVICE), random_rows(M, 1501, dtype, device=DEVICE)[:, 1:]):
        problem = product.problem_of(M, dtype, 0, tiled)
        operands = launches.Operands.of(tiled, None, False)
        candidates = [dispatch.with_own_digits(problem, plan) for plan in dispatch.candidates(problem)]
        assert any(candidates) if act_order else all(candidates)  # few warps lack registers
        for own in dict.fromkeys(filter(None, candidates)):
            found = []
            by_launch = replace(own, own_digits=False, chunk=own.depth)
            for each, aligned in ((by_launch, False), (own, False), (own, rows.stride(0) % 2 == 0)):
                y = rows.new_full((M, 200), float("nan"))
                launch = launches.prepare_launch(problem, each, replace(operands, aligned=aligned), 0)
                launch(rows, rows.stride(0), None, tiled, y)
                found.append(y)
            assert torch.equal(found[0], found[1]), own
            assert torch.equal(found[0], found[2]), own


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("bits", BITS)
def test_no_worse_than_the_vendor_on_dequantized_weights(bits, dtype):
    weight = random_weight(4096, 1024, bits, 128, device=DEVICE)
    tiled, floats = tile_weight(weight), reference.dequantize(weight, dtype)
    for M in (1, 8, 16, 33, 64, 500):
        x, dy = (random_rows(M, width, dtype, device=DEVICE) for width in (4096, 1024))
        exact = oracle(x, weight)
        assert relative_error(ops.matmul(x, tiled), exact) <= 1.2 * relative_error(x @ floats, exact)
        error = relative_error(ops.matmul_transposed(dy, tiled), oracle(dy, weight, transposed=True))
        assert error < typical_error(1024, dtype)


@pytest.mark.parametrize("group_size", [128, 64, 32])
@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("dtype", HALVES)
def test_batch_invariance(dtype, act_order, group_size):
    weight = random_weight(640, 256, 4, group_size, act_order=act_order, device=DEVICE)
    tiled = tile_weight(weight)
    x = random_rows(100, 640, dtype, device=DEVICE)
    together = ops.matmul(x, tiled, batch_invariant=True)
    for M in (1, 2, 7, 8, 9, 33, 64):
        assert torch.equal(ops.matmul(x[:M], tiled, batch_invariant=True), together[:M])
    assert torch.equal(ops.matmul(x[41:42], tiled, batch_invariant=True), together[41:42])
    assert bool(((together - oracle(x, weight)).abs() <= bounds.error_bound(x, weight, digits=True)).all())


@pytest.mark.parametrize("M", [1, 8, 16, 64, 300])
def test_launches_are_deterministic(M):
    tiled = tile_weight(random_weight(4096, 512, 4, 128, device=DEVICE))
    x = random_rows(M, 4096, torch.float16, device=DEVICE)
    y = ops.matmul(x, tiled)
    dx = ops.matmul_transposed(y, tiled)
    for _ in range(20):
        assert torch.equal(ops.matmul(x, tiled), y)
        assert torch.equal(ops.matmul_transposed(y, tiled), dx)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("scale", [2.0**-20, 1.0, 100.0])
def test_numbers_of_every_size(dtype, scale):
    weight = random_weight(512, 64, 4, 128, device=DEVICE)
    x = random_rows(4, 512, dtype, device=DEVICE) * scale
    x[:, ::97] *= 60  # outliers
    x[1] = 0
    assert_close(ops.matmul(x, tile_weight(weight)), x, weight)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_in_its_row(bad):
    weight = random_weight(512, 64, 4, 128, device=DEVICE)
    x = random_rows(4, 512, torch.float16, device=DEVICE)
    clean = ops.matmul(x, tile_weight(weight))
    x[2, 200] = bad
    y = ops.matmul(x, tile_weight(weight))
    assert bool(y[2].isnan().all())
    assert torch.equal(y[[0, 1, 3]], clean[[0, 1, 3]])


@pytest.mark.parametrize("M", [4, 16, 40, 200])
def test_strides_of_x(M):
    weight = random_weight(96, 80, 4, 32, device=DEVICE)
    tiled = tile_weight(weight)
    x = random_rows(2 * M, 96, torch.float16, device=DEVICE)
    for view in (
        x.t().contiguous().t()[:M],
        x[::2],
        x[:1].expand(M, 96),
        torch.stack([x, x], dim=2)[:M, :, 1],
        torch.cat([x, x[:, :1]], 1)[:M, 1:],  # rows that do not start at multiples of 16 bytes
    ):
        assert_close(ops.matmul(view, tiled), view, weight)


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients(dtype, act_order):
    weight = random_weight(192, 160, 4, 64, act_order=act_order, device=DEVICE)
    tiled = tile_weight(weight)
    x = random_rows(33, 192, dtype, device=DEVICE).requires_grad_()
    bias = random_rows(1, 160, dtype, device=DEVICE)[0].requires_grad_()
    dy = random_rows(33, 160, dtype, seed=1, device=DEVICE).requires_grad_()
    dx, dbias = torch.autograd.grad(ops.matmul(x, tiled, bias), (x, bias), dy, create_graph=True)
    assert_close(dx, dy, weight, transposed=True)
    assert torch.equal(dbias, dy.sum(0))
    ddx = random_rows(33, 192, dtype, seed=2, device=DEVICE)
    (ddy,) = torch.autograd.grad(dx, dy, ddx)
    assert_close(ddy, ddx, weight)


@pytest.mark.skipif(
    "torch.cuda.is_available() and torch.cuda.get_device_capability() != (9, 0)",
    reason="the gradient's kernel is Hopper's",
)
@pytest.mark.parametrize(
    ("dtype", "scales", "group_size", "act_order"),
    [
        (torch.float16, torch.float16, 128, False),
        (torch.bfloat16, torch.bfloat16, 64, True),
        (torch.bfloat16, torch.float16, 32, False),
        (torch.float16, torch.bfloat16, -1, False),
    ],
)
@pytest.mark.parametrize("bits", BITS)
def test_programs_share_the_tiles_of_gradients(bits, dtype, scales, group_size, act_order, monkeypatch):
    weight = random_weight(1032, 1104, bits, group_size, act_order=act_order, scale_dtype=scales, device=DEVICE)
    tiled = tile_weight(weight)
    for M in (64, 300, 1000):
        dy = random_rows(M, 1104, dtype, device=DEVICE)
        problem = product.problem_of(M, dtype, 0, tiled)
        kinds = {(plan.block_m, plan.resident, plan.unit): plan for plan in dispatch.transposed_plans(problem)}
        for plan in kinds.values():
            tiles, units = -(-M // plan.block_m) * tiled.steps, -(-tiled.strips // (4 * plan.unit))
            # as dispatch has it; nothing shared; everything shared, by few and by as many as can be; by some
            everything, some = min(132, tiles * units), min(tiles, 3)
            cuts = [(7, 7, 0), (7, 7, tiles), (everything, everything, tiles), (8, 2 * some, some)]
            for shares in [plan.shares, *(Shares(*cut) for cut in cuts)]:
                chosen = replace(plan, shares=shares)
                monkeypatch.setattr(dispatch, "choose_transposed", lambda *_, chosen=chosen, **__: chosen)
                dx = ops.matmul_transposed(dy, tiled)
                assert_close(dx, dy, weight, transposed=True)
                assert torch.equal(ops.matmul_transposed(dy, tiled), dx)


def test_slabs(monkeypatch):
    monkeypatch.setattr(dispatch, "SLAB_BYTES", 16 * 256 * 2 * 3)  # three strips at a time
    product.forget()
    weight = random_weight(256, 204, 4, 64, act_order=True, device=DEVICE)  # 204: rows of dy start anywhere
    tiled = tile_weight(weight)
    x, dy = (random_rows(300, width, torch.float16, device=DEVICE) for width in (256, 204))
    bias = random_rows(1, 204, torch.float16, seed=1, device=DEVICE)[0]
    assert_close(ops.matmul(x, tiled, bias), x, weight, bias)
    error = relative_error(ops.matmul_transposed(dy, tiled), oracle(dy, weight, transposed=True))
    assert error < 1.2 * typical_error(204, torch.float16)  # slabs are halves before they are added
    product.forget()


def test_adapters_train_through_frozen_layers():
    first = random_weight(128, 96, 4, 32, device=DEVICE)
    second = random_weight(96, 64, 3, 32, act_order=True, device=DEVICE)

    def step(multiply, dtype, first, second):
        x = random_rows(50, 128, dtype, device=DEVICE)
        A = (random_rows(128, 8, dtype, seed=1, device=DEVICE) / 11).requires_grad_()
        B = random_rows(8, 96, dtype, seed=2, device=DEVICE).requires_grad_()
        y = multiply(multiply(x, first) + x @ A @ B, second)
        return torch.autograd.grad((y**2).sum(), (A, B))

    ours = step(ops.matmul, torch.float32, tile_weight(first), tile_weight(second))
    expected = step(reference.matmul, torch.float64, first, second)
    for grad, exact in zip(ours, expected, strict=True):
        # five products one after another, none deeper than 128
        assert relative_error(grad, exact) < 5 * typical_error(128, torch.float32)


@pytest.mark.parametrize("act_order", [False, True])
def test_compiled_forward_and_backward_for_every_m(act_order):
    weight = random_weight(256, 128, 4, 64, act_order=act_order, device=DEVICE)
    layer = QuantLinear.from_packed(weight)
    compiled = torch.compile(lambda x: layer(x).relu(), fullgraph=True, dynamic=True)
    for M in (2, 16, 33, 130, 300):
        x = random_rows(M, 256, torch.float16, device=DEVICE).requires_grad_()
        y = compiled(x)
        assert torch.equal(y, layer(x).relu())
        dy = random_rows(M, 128, torch.float16, device=DEVICE)
        (dx,) = torch.autograd.grad(y, x, dy)
        assert torch.equal(dx, ops.matmul_transposed(dy * (y > 0), tile_weight(weight)))


def test_opcheck():
    tiled = tile_weight(random_weight(40, 24, 3, 16, act_order=True, device=DEVICE))
    parts = (*ops._tiled_parts(tiled), False)
    x = random_rows(3, 40, torch.float32, device=DEVICE).requires_grad_()
    bias = torch.randn(24, device=DEVICE, requires_grad=True)
    torch.library.opcheck(torch.ops.gptq_triton.tiled_matmul.default, (x, bias, *parts))
    dy = random_rows(3, 24, torch.float32, device=DEVICE).requires_grad_()
    torch.library.opcheck(torch.ops.gptq_triton.tiled_matmul_transposed.default, (dy, *parts))


@pytest.mark.parametrize("M", [1, 8, 16, 64, 100, 300])
def test_cuda_graph_replays_with_new_inputs(M):
    tiled = tile_weight(random_weight(2048, 128, 4, 64, device=DEVICE))
    x = random_rows(M, 2048, torch.float16, device=DEVICE)
    ops.matmul_transposed(ops.matmul(x, tiled), tiled)  # compiles before the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = ops.matmul(x, tiled)
        dx = ops.matmul_transposed(y, tiled)
    for seed in (1, 2):
        x.copy_(random_rows(M, 2048, torch.float16, seed=seed, device=DEVICE))
        graph.replay()
        assert torch.equal(y, ops.matmul(x, tiled))
        assert torch.equal(dx, ops.matmul_transposed(y, tiled))


@pytest.mark.parametrize("left", [0, 1 << 10])
def test_graphs_have_counters_however_many_there_are(left):
    """Without any left every replay zeroes them; a launch that is not captured has more set aside."""
    scratch = scratch_of(0)
    tiled = tile_weight(random_weight(8192, 128, 4, 128, device=DEVICE))
    x = random_rows(16, 8192, torch.float16, device=DEVICE)
    expected = ops.matmul(x, tiled)
    scratch.used = scratch.CAPTURED - left
    graphs, results = [], []
    for _ in range(3):
        graphs.append(torch.cuda.CUDAGraph())
        with torch.cuda.graph(graphs[-1]):
            results.append(ops.matmul(x, tiled))
        assert scratch.used <= scratch.CAPTURED
        ops.matmul(x, tiled)
        assert 0 <= 2 * scratch.used <= scratch.CAPTURED
    for _ in range(2):
        for graph, y in zip(graphs, results, strict=True):
            y.zero_()
            graph.replay()
            assert torch.equal(y, expected)


@pytest.mark.parametrize("M", [1, 8, 16, 64, 300])
def test_graphs_that_torch_compile_makes(M):
    """Nothing may outlive their warm-up in their pool; shapes that no other test has, so that memory has to grow."""
    torch._dynamo.reset()
    layer = QuantLinear.from_packed(random_weight(9216 + 128 * M, 320, 4, 128, act_order=M == 8, device=DEVICE))
    compiled = torch.compile(lambda x: layer(x).relu(), mode="reduce-overhead", fullgraph=True)
    with torch.no_grad():
        for seed in range(4):
            x = random_rows(M, layer.in_features, torch.float16, seed=seed, device=DEVICE)
            assert torch.equal(compiled(x), layer(x).relu())


@pytest.mark.parametrize("M", [1, 8, 16, 64])
def test_streams_threads_and_graphs_at_once(M):
    tiled = tile_weight(random_weight(8192, 256, 4, 128, device=DEVICE))
    x = random_rows(M, 8192, torch.float16, device=DEVICE)
    expected = ops.matmul(x, tiled)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = [ops.matmul(x, tiled) for _ in range(3)]
    wrong = []

    def work(stream):
        with torch.cuda.stream(stream):
            for i in range(60):
                if not torch.equal(ops.matmul(x, tiled), expected):
                    wrong.append(i)

    torch.cuda.synchronize()
    shared = torch.cuda.Stream()
    threads = [threading.Thread(target=work, args=(s,)) for s in (torch.cuda.Stream(), shared, shared)]
    for thread in threads:
        thread.start()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(50):
            graph.replay()
    for thread in threads:
        thread.join()
    torch.cuda.synchronize()
    assert not wrong
    assert all(torch.equal(y, expected) for y in captured)


def test_launches_follow_the_current_stream():
    tiled = tile_weight(random_weight(256, 128, 4, 64, device=DEVICE))
    for M in (1, 16, 32, 300):
        final = random_rows(M, 256, torch.float16, device=DEVICE)
        expected = ops.matmul(final, tiled)
        x = torch.full_like(final, float("nan"))
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            torch.cuda._sleep(50_000_000)  # a launch on any other stream would see NaN
            x.copy_(final)
            y = ops.matmul(x, tiled)
        stream.synchronize()
        assert torch.equal(y, expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_launches_follow_the_device_of_x():
    weight = random_weight(64, 32, 4, 32, device="cuda:1")
    for M in (3, 16, 40, 300):
        x = random_rows(M, 64, torch.float16, device="cuda:1")
        with torch.cuda.device(0):
            assert_close(ops.matmul(x, tile_weight(weight)), x, weight)
    with pytest.raises(ValueError, match="words must be on the device of x, cuda:0, got cuda:1"):
        ops.matmul(x.to("cuda:0"), tile_weight(weight))


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("bits", BITS)
def test_a_layer_on_a_gpu_holds_tiles_and_saves_the_checkpoint(bits, act_order):
    weight = random_weight(192, 80, bits, 64, act_order=act_order)
    layer = QuantLinear.from_packed(weight, torch.randn(80))
    expected = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    layer.to(DEVICE)
    assert layer.qweight.numel() == 0
    assert layer.scales is None
    packed = sum(t.numel() * t.element_size() for t in (weight.qweight, weight.qzeros, weight.scales))
    held = sum(t.numel() * t.element_size() for name, t in layer.named_buffers() if name.startswith("tile_"))
    assert held < 2.1 * packed  # N of 80 and groups of 64 are all there is to round up
    found = layer.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name].cpu(), expected[name]) for name in expected)
    fresh = QuantLinear(bits, 64, 192, 80, bias=True, device=DEVICE)
    fresh.load_state_dict(found)
    x = random_rows(5, 192, torch.float16, device=DEVICE)
    assert torch.equal(fresh(x), layer(x))
    layer.to("cpu")
    assert all(torch.equal(layer.state_dict()[name], expected[name]) for name in expected)


def test_copies_and_dtypes_of_a_layer_on_a_gpu():
    layer = QuantLinear.from_packed(random_weight(128, 64, 4, 32), torch.randn(64)).to(DEVICE)
    x = random_rows(3, 128, torch.float16, device=DEVICE)
    y = layer(x)
    twin = copy.deepcopy(layer)
    del layer
    assert torch.equal(twin(x), y)
    assert pickle.loads(pickle.dumps(twin)).state_dict().keys() == twin.state_dict().keys()
    wide = QuantLinear.from_packed(random_weight(128, 64, 4, 32, scale_dtype=torch.float32)).to(DEVICE)
    assert wide.half().scale_dtype == torch.float16
    assert relative_error(wide(x), oracle(x, wide.weight_packed)) < typical_error(128, torch.float16)


def test_tiling_takes_milliseconds():
    weight = random_weight(4096, 4096, 4, 128, device=DEVICE)
    tile_weight(weight)
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(3):
        tile_weight(weight)
    end.record()
    torch.cuda.synchronize()
    assert start.elapsed_time(end) / 3 < 20


def enough_memory(gigabytes: int) -> bool:
    return torch.cuda.is_available() and torch.cuda.mem_get_info()[0] > gigabytes * 2**30


@pytest.mark.skipif("not enough_memory(20)", reason="needs 20 GB of free GPU memory")
def test_more_than_two_to_the_31_elements_of_x():
    tiled = tile_weight(random_weight(4096, 16, 4, 128, device=DEVICE))
    x = torch.empty(2**19 + 1000, 4096, dtype=torch.float16, device=DEVICE).normal_()
    expected = ops.matmul(x[-1000:].clone(), tiled)
    assert relative_error(ops.matmul(x, tiled)[-1000:], expected.double()) < typical_error(4096, torch.float16)


@pytest.mark.skipif("not enough_memory(60)", reason="needs 60 GB of free GPU memory")
def test_more_than_two_to_the_31_words_of_weight():
    K, N = 16384, 2**19 + 2**14
    narrow = tile_weight(random_weight(K, 64, 8, device=DEVICE))
    repeat = N // 64
    wide = replace(narrow, words=narrow.words.repeat(repeat, 1, 1), meta=narrow.meta.repeat(1, repeat), N=N)
    assert wide.words.numel() > 2**31
    for M in (2, 16, 40):
        x = random_rows(M, K, torch.float16, device=DEVICE)
        y = ops.matmul(x, wide)
        assert torch.equal(y[:, -64:], y[:, :64])
        assert relative_error(y[:, -64:], oracle(x, _packed(narrow))) < typical_error(K, torch.float16)


def _packed(tiled: layout.TiledWeight) -> PackedWeight:
    return layout.untile_weight(tiled, None)


def test_tuned_plans_are_kept_and_used(tmp_path, monkeypatch):
    from gptq_triton.tuning import tune

    monkeypatch.setenv("GPTQ_TRITON_CACHE", str(tmp_path))
    tables._table.cache_clear()
    layer = QuantLinear.from_packed(random_weight(512, 256, 4, 128, device=DEVICE))
    plans = tune(layer, rows=(1, 16))
    assert list(plans) == ["256x512 w4 m1", "256x512 w4 m16"]
    (file,) = tmp_path.iterdir()
    assert file == tables.user_file(product.gpu_name(0))
    problem = product.problem_of(1, torch.float16, 0, tile_weight(layer.weight_packed))
    assert tables.lookup(product.gpu_name(0), problem) == plans["256x512 w4 m1"]
    tables._table.cache_clear()


def test_what_only_the_cpu_can_do_is_refused():
    tiled = tile_weight(random_weight(32, 16, 4, device=DEVICE))
    with pytest.raises(TypeError, match="x may be float64 on the CPU only"):
        ops.matmul(torch.zeros(2, 32, dtype=torch.float64, device=DEVICE), tiled)
    with pytest.raises(ValueError, match="words must be on the device of x, cpu, got cuda"):
        ops.matmul(torch.zeros(2, 32), tiled)


@pytest.mark.parametrize("scale_dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("group_size", "changes"),
    [
        (128, {}),
        (32, {"group_aware": False}),
        (100, {}),
        (-1, {}),
        (64, {"static_groups": True}),
        (64, {"mse": True}),
        (128, {"clip": True, "refine": 1}),
    ],
)
@pytest.mark.parametrize("desc_act", [False, True])
@pytest.mark.parametrize("bits", BITS)
def test_the_fused_solver_is_the_eager_solver(bits, desc_act, group_size, changes, scale_dtype, monkeypatch):
    from gptq_triton.kernels import solve as kernel

    launched, launch = [], kernel.solve
    monkeypatch.setattr(kernel, "solve", lambda *args, **options: launched.append(options) or launch(*args, **options))
    K, N = 520, 384
    mix = random_rows(K, K, torch.float32, device=DEVICE) * random_rows(1, K, torch.float32, seed=1, device=DEVICE)
    hessian = Hessian(K, DEVICE)
    hessian.add(random_rows(4 * K, K, torch.float32, seed=2, device=DEVICE) @ mix)
    weight, spec = (
        random_rows(N, K, torch.float32, seed=3, device=DEVICE),
        QuantSpec(bits, group_size, bits == 4, desc_act),
    )
    eager, fused = (
        solve({"layer": weight}, hessian, spec, SolverOptions(scale_dtype=scale_dtype, fused=fused, **changes))["layer"]
        for fused in (False, True)
    )
    assert len(launched) >= K / 128  # by the fused solve alone
    if "mse" in changes or "clip" in changes:  # candidates that are as good as each other: sums have another order
        assert (eager.dequantized == fused.dequantized).all(1).float().mean() >= 0.97
        assert fused.error == pytest.approx(eager.error, rel=1e-3)
        return
    assert torch.equal(eager.dequantized, fused.dequantized)
    assert fused.error == pytest.approx(eager.error, rel=1e-5)
    wrong, H = (weight - fused.dequantized).double(), hessian.sum.double()
    size = float(((weight.double() @ H) * weight).sum())
    assert fused.error == pytest.approx(float(((wrong @ H) * wrong).sum()) / size, rel=1e-4)


@pytest.mark.parametrize(
    ("spec", "options"),
    [
        (QuantSpec(4, 128, False), SolverOptions(clip=True, refine=1)),
        (QuantSpec(3, 64, True, desc_act=True), SolverOptions(refine=2)),
        (QuantSpec(2, -1, False), SolverOptions(clip=True, block=64)),
        (QuantSpec(8, 32, True, desc_act=True), SolverOptions(static_groups=True, mse=True)),
    ],
)
def test_recorded_solves_are_those_of_solve(spec, options):
    """Several under way at once; of one the Hessian cannot be factored, another is not finite."""
    K, N, recorder, problems = 384, 160, recording.Recorder(), []
    for seed in range(4 * recording.LANES):
        hessian = Hessian(K, DEVICE)
        uneven = random_rows(K, K, torch.float32, seed=seed) * random_rows(1, K, torch.float32, seed=1)
        hessian.add((random_rows(2 * K, K, torch.float32, seed=seed + 1) @ uneven).to(DEVICE))
        weights = {name: random_rows(N, K, torch.float16, seed=seed + place) for place, name in enumerate("ab")}
        problems.append(({name: weight.to(DEVICE) for name, weight in weights.items()}, hessian))
    unfactored, infinite = 5, 9
    problems[unfactored][1].sum.diagonal()[:4] = -1e9
    problems[infinite][0]["b"][3, 3] = torch.nan
    for first in range(0, len(problems), recording.LANES):
        here = range(first, first + recording.LANES)
        begun = [recorder.start(*problems[index], spec, options, "gptq", often=True) for index in here]
        for index, end in zip(here, begun, strict=True):
            if index == infinite:
                with pytest.raises(ValueError, match="b: the weight must be finite"):
                    end()
                continue
            found, expected = end(), solve(*problems[index], spec, options)
            for name, one in expected.items():
                assert one.method == ("rtn" if index == unfactored else "gptq")
                other = found[name]
                assert torch.equal(one.dequantized, other.dequantized)
                for part in ("qweight", "scales", "qzeros"):
                    assert torch.equal(getattr(one.weight, part), getattr(other.weight, part))
                assert replace(one, weight=other.weight, dequantized=other.dequantized).__dict__ == other.__dict__
    assert [len(lanes) for lanes in recorder._lanes.values()] == [recording.LANES]


@pytest.mark.parametrize("K", [520, 1000])
def test_a_factor_found_by_panels(K, monkeypatch):
    """Corners are factored on a stream of their own: many, so that a race would show."""
    mix = random_rows(K, K, torch.float32, device=DEVICE) * random_rows(1, K, torch.float32, seed=1, device=DEVICE)
    hessian = Hessian(K, DEVICE)
    hessian.add(random_rows(4 * K, K, torch.float32, seed=2, device=DEVICE) @ mix)
    order = torch.randperm(K, device=DEVICE)
    exact, _ = hessian_module.attempt(hessian.sum, order, 0.01)
    monkeypatch.setattr(hessian_module, "PANEL", 64)
    factors = [hessian_module.attempt(hessian.sum, order, 0.01) for _ in range(20)]
    for factor, failed in factors:
        assert not bool(failed)
        assert torch.equal(factor.unit, factors[0][0].unit)
        assert torch.equal(factor.unit, factor.unit.triu())
    unit, cost = factors[0][0].unit, factors[0][0].cost
    assert (unit - exact.unit).norm() <= 1e-4 * exact.unit.norm()
    torch.testing.assert_close(cost, exact.cost, rtol=1e-4, atol=0)
