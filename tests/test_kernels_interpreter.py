"""Kernels in Triton's interpreter, on CPU tensors: `TRITON_INTERPRET=1 pytest -m interpreter`."""

from __future__ import annotations

import itertools
import os
import sys
from dataclasses import replace
from unittest import mock

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from gptq_triton import halves, reference
from gptq_triton import walk as walking
from gptq_triton.halves import LOW, Halves, column_scales
from gptq_triton.hessian import Hessian, factorize
from gptq_triton.layout import TiledWeight, tile_weight
from gptq_triton.quantizer import encode, mse_shares
from gptq_triton.refinement import Members, Metric, Rounded, kept_shares, losses, refit_scales
from gptq_triton.solver import SolverOptions, _order, round_to_nearest
from gptq_triton.spec import BITS, QuantSpec
from gptq_triton.walk import find_groups, stored, walk
from tests.strategies import (
    assert_close,
    exact_rows,
    generator,
    oracle,
    poisoned,
    random_rows,
    random_weight,
    weights,
)

pytestmark = [
    pytest.mark.interpreter,
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1 from the start"),
    pytest.mark.skipif(sys.platform != "linux", reason="triton is on Linux only"),
]

DTYPES = (torch.float16, torch.float32)  # the interpreter multiplies bfloat16 wrongly
SCALES = (torch.float16, torch.bfloat16, torch.float32)
BLOCKS = st.fixed_dictionaries(
    {
        "block_m": st.sampled_from((16, 32)),
        "block_n": st.sampled_from((32, 64)),
        "split": st.integers(1, 4),
    }
)
QUICK = settings(deadline=None, max_examples=40)


def guarded(tensor: torch.Tensor) -> torch.Tensor:
    """The same, contiguous, with garbage before and after: NaN, also as the scales that meta holds."""
    fill = float("nan") if tensor.is_floating_point() else -1
    flat = torch.full((tensor.numel() + 64,), fill, dtype=tensor.dtype)
    return flat[32:-32].view(tensor.shape).copy_(tensor)


def weight_arguments(tiles: TiledWeight) -> tuple[tuple[torch.Tensor | None, ...], dict]:
    """What every kernel takes of a weight."""
    tensors = tuple(None if t is None else guarded(t) for t in (tiles.words, tiles.meta, tiles.scales))
    return tensors, {
        "bits": tiles.spec.bits,
        "group_columns": tiles.group_columns,
        "scales_bf16": tiles.dtype == torch.bfloat16,
        "ptx": False,
    }


def launch(x, weight, bias=None, *, block_m=16, block_n=32, split=1):
    """The product's answer, written over NaN, with garbage around every input."""
    from gptq_triton.kernels.gather import gather
    from gptq_triton.kernels.matmul import matmul

    tiles, M = tile_weight(weight), x.shape[0]
    x = poisoned(x)
    if tiles.order is not None:
        ordered = poisoned(torch.full((M, len(tiles.order)), float("nan"), dtype=x.dtype))
        gather(x, guarded(tiles.order), ordered)
        x = ordered
    y = poisoned(torch.full((M, weight.N), float("nan"), dtype=x.dtype))
    workspace = torch.full((split * M * tiles.strips * 16,), float("nan")) if split > 1 else None
    counters = torch.zeros(-(-M // block_m) * -(-tiles.strips * 16 // block_n), dtype=torch.int32)
    tensors, options = weight_arguments(tiles)
    matmul(
        x, *tensors, bias, y, workspace, counters if split > 1 else None,
        block_m=block_m, block_n=block_n, split=split, num_warps=4, num_stages=2, **options,
    )  # fmt: skip
    assert not counters.any()
    return y


@QUICK
@given(weights(270, 70, scale_dtypes=SCALES), st.integers(1, 35), st.sampled_from(DTYPES), st.booleans(), BLOCKS)
def test_matmul_is_within_the_bound(weight, M, dtype, with_bias, blocks):
    x = random_rows(M, weight.K, dtype)
    bias = random_rows(1, weight.N, dtype, seed=1)[0] if with_bias else None
    assert_close(launch(x, weight, bias, **blocks), x, weight, bias)


@QUICK
@given(weights(exact=True), st.integers(1, 20), st.sampled_from(DTYPES), BLOCKS)
def test_exact_data_gives_the_exact_answer(weight, M, dtype, blocks):
    x = exact_rows(M, weight.K, dtype)
    assert torch.equal(launch(x, weight, **blocks), oracle(x, weight).to(dtype))


@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("bits", BITS)
def test_every_code_and_zero_point_is_decoded(bits, group_size):
    # x = I: y is the weight itself, a whole step and a part of the next
    weight = random_weight(161, 65, bits, group_size, exact=True)
    eye = torch.eye(161)
    assert torch.equal(launch(eye, weight, block_m=32, block_n=64), oracle(eye, weight).float())


@pytest.mark.parametrize("group_size", [-1, 256])
@pytest.mark.parametrize("split", [1, 2, 5])
def test_groups_of_several_steps(group_size, split):
    weight = random_weight(650, 40, 3, group_size, exact=True)
    x = exact_rows(3, 650, torch.float32)
    assert torch.equal(launch(x, weight, split=split), oracle(x, weight).float())


def test_rows_do_not_depend_on_their_neighbours():
    weight = random_weight(96, 40, 4, 32)
    x = random_rows(20, 96, torch.float16)
    assert torch.equal(launch(x, weight)[:3], launch(x[:3], weight))


@QUICK
@given(weights(270, 100, scale_dtypes=SCALES), st.sampled_from(DTYPES), st.integers(0, 3), st.integers(0, 2))
def test_dequantize_is_the_reference_to_the_bit(weight, dtype, first_strip, log_warps):
    from gptq_triton.kernels.dequantize import dequantize

    tiles = tile_weight(weight)
    first_strip = min(first_strip, tiles.strips - 1)
    order = torch.arange(weight.K) if tiles.order is None else tiles.order.long()
    out = poisoned(torch.full((weight.N - 16 * first_strip, len(order)), float("nan"), dtype=dtype))
    tensors, options = weight_arguments(tiles)
    dequantize(*tensors, out, first_strip=first_strip, num_warps=2**log_warps, **options)
    expected = reference.dequantize(weight, dtype).t()[16 * first_strip :, order]
    assert torch.equal(out[:, order >= 0], expected[:, order >= 0])
    assert out.isfinite().all()  # padding is multiplied by 0


@QUICK
@given(
    st.integers(1, 20), st.integers(1, 70), st.integers(1, 1100), st.sampled_from((*DTYPES, torch.bfloat16)),
    st.sampled_from((1 << 16, 100)),
)  # fmt: skip
def test_gather(M, K, C, dtype, whole_row):
    from gptq_triton.kernels.gather import gather

    x = random_rows(M, K, dtype)
    order = torch.randint(-1, K, (C,), generator=generator(C), dtype=torch.int32)
    out = poisoned(torch.full((M, C), float("nan"), dtype=dtype))
    gather(poisoned(x), guarded(order), out, whole_row=whole_row)
    assert torch.equal(out, torch.where(order >= 0, x[:, order.long()], 0))
    rows = torch.randint(0, M, (M,), generator=generator(K))
    gather(poisoned(x), guarded(order), out, guarded(rows), whole_row=whole_row)
    assert torch.equal(out, torch.where(order >= 0, x[rows][:, order.long()], 0))
    wider = torch.full((M, C), float("nan"), dtype=torch.float64)
    gather(x, order, wider, rows, whole_row=whole_row)
    assert torch.equal(wider, out.double())


SLOW = settings(deadline=None, max_examples=20)  # a column takes milliseconds
SOLVE_TILES = st.sampled_from(({"block_n": 8}, {"block_n": 16}, {"block_n": 64, "num_warps": 4}))


def inner_loop(columns, spread, groups, runs, cost, scales, zeros, spec, options):
    """What one block must give: codes, values and what errors cost; scales and zeros in place."""
    left, codes, values, loss = columns.clone(), [], [], torch.zeros(columns.shape[1])
    for j, (group, run) in enumerate(zip(groups, runs, strict=True)):
        if run:
            here = slice(group, group + 1)
            find_groups(left[j : j + run], torch.ones(run), run, spec, options, scales[here], zeros[here])
        code = encode(left[j], scales[group].float(), zeros[group], spec.maxq)
        value = (code - zeros[group]) * scales[group].float()
        left[j + 1 :] -= spread[j, j + 1 :, None] * (left[j] - value)
        loss += cost[j] * (left[j] - value) ** 2
        codes.append(code.to(torch.uint8))
        values.append(value)
    return torch.stack(codes), torch.stack(values), loss


@SLOW
@given(
    bits=st.sampled_from(BITS),
    sym=st.booleans(),
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=6),
    block=st.tuples(st.integers(0, 40), st.integers(1, 128)),
    given_groups=st.booleans(),
    N=st.integers(1, 20),
    scale_dtype=st.sampled_from(DTYPES),  # the interpreter truncates to bfloat16 where a GPU rounds
    size=st.sampled_from((1, 1e-5)),  # scales below float16's normal numbers
    tile=SOLVE_TILES,
    seed=st.integers(0, 99),
)
@example(4, False, [10, 20, 5], (4, 28), False, 9, torch.float16, 1e-5, {"block_n": 8}, 1)
@example(3, True, [10, 20, 5], (10, 20), False, 9, torch.float16, 1, {"block_n": 16}, 0)
@example(8, False, [10, 20, 5], (0, 35), True, 9, torch.float32, 1, {"block_n": 8}, 1)
def test_solve_is_the_inner_loop_to_the_bit(bits, sym, lengths, block, given_groups, N, scale_dtype, size, tile, seed):
    from gptq_triton.kernels.solve import BLOCK_K, solve

    spec, options = QuantSpec(bits, -1, sym), SolverOptions(scale_dtype=scale_dtype)
    K, G = sum(lengths), len(lengths)
    first = min(block[0], K - 1)
    count = min(block[1], K - first)
    groups = [g for g, length in enumerate(lengths) for _ in range(length)]
    runs = [groups.count(g) if k == 0 or groups[k - 1] != g else 0 for k, g in enumerate(groups)]
    runs = [min(run, first + count - k) for k, run in enumerate(runs)]  # none leaves the block
    if given_groups:
        runs, groups = [0] * K, torch.randint(0, G, (K,), generator=generator(seed)).tolist()
    columns = random_rows(count, N, torch.float32, seed=seed)
    spread = torch.full((BLOCK_K, BLOCK_K), torch.nan)  # what does not matter
    spread[:count, :count] = torch.randn(count, count, generator=generator(seed)).mul_(0.3)
    spread += torch.full_like(spread, torch.nan).tril()
    columns *= size * torch.rand(1, N, generator=generator(seed))
    columns[:, 0] = -columns[:, 0].abs() if seed % 2 else 0  # ranges that end at 0, or hold nothing else
    scales = (torch.rand(G, N, generator=generator(seed)) + 0.01).to(scale_dtype)
    zeros = torch.randint(0, spec.maxq + 1, (G, N), generator=generator(seed)).float()
    positions = torch.randperm(K, generator=generator(seed)).int()
    codes = torch.full((K, N), 77, dtype=torch.uint8)
    got_scales, got_zeros, here = guarded(scales), guarded(zeros), slice(first, first + count)
    cost, before = torch.rand(K, generator=generator(seed)), torch.rand(N, generator=generator(seed))
    of_block = columns, spread[:count, :count], groups[here], runs[here], cost[here]
    expected, loss = inner_loop(*of_block, scales, zeros, spec, options), guarded(before)
    tensors = torch.tensor(groups).int(), None if given_groups else torch.tensor(runs).int(), positions
    original = random_rows(count, N, torch.float32, seed=seed + 1)
    change = guarded(torch.full_like(columns, torch.nan))
    solve(
        guarded(columns), guarded(original), change, guarded(spread), *tensors, guarded(cost),
        got_scales, got_zeros, codes, loss,
        first=first, maxq=spec.maxq, sym=sym, **tile,
    )  # fmt: skip
    written = positions[here].long()
    assert torch.equal(codes[written], expected[0])
    assert torch.equal(change, original - expected[1])
    assert torch.allclose(loss, before + expected[2], rtol=1e-5, atol=0)
    assert torch.equal(got_scales, scales)
    assert torch.equal(got_zeros, zeros)
    codes[written] = 77
    assert (codes == 77).all()


@settings(deadline=None, max_examples=15)
@given(
    bits=st.sampled_from(BITS),
    sym=st.booleans(),
    K=st.integers(1, 300),
    length=st.sampled_from((1, 7, 32, 128, 200, 300)),
    N=st.integers(1, 20),
    scale_dtype=st.sampled_from((torch.float16, torch.float32)),
    mse=st.booleans(),
    seed=st.integers(0, 99),
)
@example(bits=3, sym=True, K=1, length=1, N=3, scale_dtype=torch.float16, mse=True, seed=0)  # many are exact
def test_clip_finds_the_best_candidate(bits, sym, K, length, N, scale_dtype, mse, seed):
    from gptq_triton.kernels.clip import clip

    K = min(K, 4 * length)  # every group takes its time here
    spec, options = QuantSpec(bits, -1, sym), SolverOptions(clip=not mse, mse=mse, scale_dtype=scale_dtype)
    columns = random_rows(K, N, torch.float32, seed=seed)
    columns[:, 0] = 0
    cost = torch.ones(K) if mse else torch.rand(K, generator=generator(seed + 1)) + 1e-3
    keep = (mse_shares if mse else kept_shares)(torch.device("cpu"))
    how = {"power": 2.4, "stored": False} if mse else {}
    groups = -(-K // length)

    def clipped(dtype):
        scales, zeros = torch.empty(groups, N, dtype=dtype), torch.empty(groups, N)
        clip(guarded(columns), guarded(cost), keep, scales, zeros, length=length, maxq=spec.maxq, sym=sym, **how)
        return scales, zeros

    if mse and scale_dtype != torch.float32:  # chosen as if they were not rounded, and rounded then
        narrow, (wide, same_zeros) = clipped(scale_dtype), clipped(torch.float32)
        assert torch.equal(narrow[0], stored(wide, scale_dtype))
        assert torch.equal(narrow[1], same_zeros)
        scale_dtype, options = torch.float32, replace(options, scale_dtype=torch.float32)
    scales, zeros = clipped(scale_dtype)
    expected = torch.empty_like(scales), torch.empty_like(zeros)
    find_groups(columns, cost, length, spec, options, *expected)
    same = (scales == expected[0]) & (zeros == expected[1])
    if min(K, length) >= 32 and same.numel() >= 20:  # of few columns candidates are often equally good
        assert same.float().mean() > 0.9  # the others are nearly as good

    def loss(scales, zeros):
        s, z = (t.double().repeat_interleave(length, 0)[:K] for t in (scales, zeros))
        q = (encode(columns, s.float(), z.float(), spec.maxq) - z) * s
        miss = cost[:, None].double() * (columns.double() - q).abs().pow(2.4 if mse else 2)
        return torch.stack([part.sum(0) for part in miss.split(length)])

    assert bool((loss(scales, zeros) <= loss(*expected) * (1 + 1e-4) + 1e-12).all())


@settings(deadline=None, max_examples=12)
@given(
    bits=st.sampled_from(BITS),
    sym=st.booleans(),
    K=st.integers(2, 200),
    length=st.sampled_from((16, 50, 128)),
    N=st.integers(1, 9),
    scattered=st.booleans(),
    seed=st.integers(0, 99),
)
def test_refit_is_the_step_of_refit_scales(bits, sym, K, length, N, scattered, seed):
    spec, options = QuantSpec(bits, length, sym), SolverOptions()
    with mock.patch.object(halves, "has_tensor_cores", return_value=True):
        columns, _, order, grid, *_ = layer_problem(K, N, spec, options, seed)
        mix = torch.randn(2 * K, K, generator=generator(seed))
        metric = Metric(mix.t() @ mix + torch.eye(K))
        if scattered:
            grid = replace(grid, g_idx=grid.g_idx[order])
        codes = encode(columns, grid.scales.float()[grid.g_idx], grid.zeros[grid.g_idx], spec.maxq)
        grid = replace(grid, codes=codes.to(torch.uint8))
        members = Members.of(grid.g_idx)
        eager, eager_loss = refit_scales(columns, metric, grid, spec, members)
        fused, fused_loss = refit_scales(columns, metric, grid, spec, members, fused=True)
        lost = losses(columns, metric, fused)
    assert torch.equal(fused.codes, eager.codes)
    same = (fused.scales == eager.scales) & (fused.zeros == eager.zeros)
    assert same.all(0).float().mean() >= 1 - 1 / N  # ties, and what rounds near one
    torch.testing.assert_close(fused_loss, eager_loss, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(fused_loss, lost, rtol=1e-3, atol=1e-5 * float(metric.H.diagonal().sum()))


def layer_problem(K, N, spec, options, seed):
    """What both walks take."""
    mix = torch.randn(K, K, generator=generator(seed)) * torch.rand(K, generator=generator(seed + 1))
    hessian = Hessian(K)
    hessian.add(torch.randn(3 * K, K, generator=generator(seed + 2)) @ mix)
    original = torch.randn(K, N, generator=generator(seed + 3))
    order, g_idx = _order(hessian.sum.diagonal(), spec, options)
    factor, _ = factorize(hessian.sum, order, options.damp)
    nearest = round_to_nearest(original, torch.ones(len(original)), spec, options)
    return original[order], factor, order, replace(nearest, g_idx=g_idx), spec, options


def by_kernel(columns, factor, order, grid, spec, options):
    """The walk as on a GPU, whatever the device."""
    from gptq_triton.kernels.solve import BLOCK_K

    with mock.patch.multiple(walking, _loop=walking._kernel, _longest=lambda *_: BLOCK_K):
        return walk(columns, factor, order, grid, spec, options)


@SLOW
@given(
    bits=st.sampled_from(BITS),
    group=st.sampled_from([1, 7, 32, 40, 64, 100, 128, 150, -1]),
    sym=st.booleans(),
    desc_act=st.booleans(),
    static=st.booleans(),
    aware=st.booleans(),
    mse=st.booleans(),
    block=st.sampled_from([13, 32, 128, 200]),
    K=st.integers(1, 170),
    N=st.integers(1, 16),
    seed=st.integers(0, 99),
)
def test_the_fused_walk_is_the_eager_walk(bits, group, sym, desc_act, static, aware, mse, block, K, N, seed):
    spec = QuantSpec(bits, group, sym, desc_act)
    options = SolverOptions(block=block, static_groups=static, group_aware=aware, mse=mse and K < 80)
    arguments = layer_problem(K, N, spec, options, seed)
    (eager, loss), (fused, fused_loss) = walk(*arguments), by_kernel(*arguments)
    if block > 128:  # cut otherwise: sums in another order may turn a code at a tie, and its row with it
        assert (fused.codes == eager.codes).all(0).sum() >= 0.9 * N - 1
        return
    assert torch.equal(fused.g_idx, eager.g_idx)
    assert torch.equal(fused.codes, eager.codes)
    assert torch.equal(fused.scales, eager.scales)
    assert torch.equal(fused.zeros, eager.zeros)
    assert torch.allclose(fused_loss, loss, rtol=1e-5, atol=0)


@pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")
def test_a_scale_beyond_its_dtype_is_left_infinite_by_the_fused_walk():
    spec, options = QuantSpec(2, 8, False), SolverOptions()
    columns, *others = layer_problem(16, 4, spec, options, 0)
    assert by_kernel(columns, *others)[0].scales.isfinite().all()
    assert by_kernel(1e6 * columns, *others)[0].scales.isinf().any()  # the solver refuses it


@settings(deadline=None, max_examples=15)
@given(
    R=st.integers(0, 40),
    C=st.integers(1, 200),
    across=st.booleans(),
    spread=st.sampled_from((0, 4)),
    seed=st.integers(0, 99),
)
def test_split_makes_halves_to_the_bit(R, C, across, spread, seed):
    from gptq_triton.kernels.passes import split

    matrix = torch.randn(R, C, generator=generator(seed))
    matrix *= 10 ** (spread * torch.randn(C, generator=generator(seed + 1)).clamp(-3, 3))
    scale = column_scales(matrix)
    expected = Halves.empty(matrix, scale)
    expected[:] = matrix
    given = matrix.t().contiguous().t() if across else matrix
    high, low = (torch.full((R + 1, C), 7, dtype=torch.float16) for _ in range(2))
    split(given, scale, high[:R], low[:R], LOW)
    assert torch.equal(high[:R], expected.high)
    assert torch.equal(low[:R], expected.low)
    assert (high[R] == 7).all()
    assert (low[R] == 7).all()


@settings(deadline=None, max_examples=15)
@given(
    n=st.integers(1, 100),
    dtypes=st.sampled_from(tuple(itertools.product((torch.float32, torch.float64), repeat=2))),
    across=st.booleans(),
    seed=st.integers(0, 99),
)
def test_reorder_is_two_selections(n, dtypes, across, seed):
    from gptq_triton.kernels.passes import reorder

    matrix = torch.randn(n, n, generator=generator(seed), dtype=dtypes[0])
    index = torch.randperm(n, generator=generator(seed))
    divisor = 1 + torch.rand(n, generator=generator(seed), dtype=dtypes[0])
    expected = (matrix / divisor)[index][:, index].to(dtypes[1])
    out = torch.full((n + 1, n), 7, dtype=dtypes[1])
    given = matrix.t().contiguous().t() if across else matrix
    reorder(given, index, divisor, out[:n])
    assert torch.equal(out[:n], expected.triu())
    assert (out[n] == 7).all()


@settings(deadline=None, max_examples=15)
@given(R=st.integers(1, 40), C=st.integers(1, 200), less=st.booleans(), seed=st.integers(0, 99))
def test_scale_is_two_products_to_the_bit(R, C, less, seed):
    from gptq_triton.kernels.passes import scale

    matrix, there = (torch.randn(R, C, generator=generator(seed + i)) for i in range(2))
    rows, columns = (torch.ldexp(torch.ones(n), torch.arange(n) % 9 - 4) for n in (R, C))
    expected = matrix * rows[:, None] * columns
    around = torch.full((R + 1, C + 3), 7.0)
    out = around[:R, :C].copy_(there)
    scale(matrix, rows, columns, out, less=less)
    assert torch.equal(out, there - expected if less else expected)
    assert (around[R] == 7).all()
    assert (around[:, C:] == 7).all()
    scale(matrix, rows, columns, matrix, less=False)
    assert torch.equal(matrix, expected)


@settings(deadline=None, max_examples=15)
@given(
    K=st.integers(1, 40),
    N=st.integers(1, 200),
    bits=st.sampled_from(BITS),
    scale_dtype=st.sampled_from(SCALES),
    seed=st.integers(0, 99),
)
def test_values_are_those_of_dequantize_to_the_bit(K, N, bits, scale_dtype, seed):
    from gptq_triton.kernels.passes import values

    rng, G = generator(seed), 3
    codes = torch.randint(0, 2**bits, (K, N), generator=rng, dtype=torch.uint8)
    scales = (torch.rand(G, N, generator=rng) + 0.01).to(scale_dtype)
    zeros = torch.randint(0, 2**bits, (G, N), generator=rng).float()
    groups = torch.randint(0, G, (K,), generator=rng)
    out = torch.full((K + 1, N), 7.0)
    values(codes, groups, guarded(scales), guarded(zeros), out[:K])
    assert torch.equal(out[:K], Rounded(codes, scales, zeros, groups).dequantize())
    assert (out[K] == 7).all()


def test_passes_need_a_unit_stride():
    from gptq_triton.kernels.passes import reorder

    with pytest.raises(ValueError, match=r"matrix must have a unit stride, got \(8, 2\)"):
        reorder(torch.ones(4, 8)[:, ::2], torch.arange(4), torch.ones(4), torch.ones(4, 4))
