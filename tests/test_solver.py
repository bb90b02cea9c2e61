"""The eager solver: the paper's algorithm, and what surrounds it."""

import logging

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn

from gptq_triton.hessian import Hessian, factorize
from gptq_triton.packing import trivial_g_idx, unpack, unpack_zeros
from gptq_triton.reference import dequantize
from gptq_triton.solver import GPTQ, SolverOptions, _order, round_to_nearest, solve
from gptq_triton.spec import QuantSpec
from gptq_triton.walk import Cuts, _blocks, _inverses, cut, find_groups


def problem(K=96, N=24, tokens=600, seed=0):
    """Correlated inputs of uneven energy, and a weight."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(K, K, generator=generator) * torch.rand(K, generator=generator)
    x = torch.randn(tokens, K, generator=generator) @ mix
    hessian = Hessian(K)
    hessian.add(x)
    return torch.randn(N, K, generator=generator), hessian, x


def one(weight, hessian, spec, options=None, method="gptq"):
    return solve({"layer": weight}, hessian, spec, options or SolverOptions(scale_dtype=torch.float32), method)["layer"]


def by_the_paper(weight, H, spec, damp=0.01):
    """Columns one by one, each error moved with the inverse of what is left of H: no factor, no blocks."""
    W, K = weight.double().clone(), len(H)
    H = H.double() + damp * H.diagonal().double().mean() * torch.eye(K, dtype=torch.float64)
    out = torch.empty_like(W)
    rows = spec.rows_per_group(K)
    for k in range(K):
        if k % rows == 0:
            group = W[:, k : k + rows].float()
            low, high = group.amin(1).clamp(max=0), group.amax(1).clamp(min=0)
            scale = (high - low) / spec.maxq
            zero = torch.round(-low / scale)
        code = (torch.round(W[:, k].float() / scale) + zero).clamp(0, spec.maxq)
        out[:, k] = (scale * (code - zero)).double()
        inverse = torch.linalg.inv(H[k:, k:])
        W[:, k:] -= ((W[:, k] - out[:, k]) / inverse[0, 0])[:, None] * inverse[0]
    return out


@pytest.mark.parametrize("group", [16, 32, 48, -1])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_matches_the_paper_column_by_column(bits, group):
    weight, hessian, _ = problem(K=96, N=8)
    spec = QuantSpec(bits, group, sym=False)
    options = SolverOptions(group_aware=False, block=32, scale_dtype=torch.float32)
    expected = by_the_paper(weight, hessian.sum, spec)
    got = one(weight, hessian, spec, options).dequantized
    step = (weight.amax() - weight.amin()) / spec.maxq
    # float32 against float64: a column may round the other way at a tie, and then its successors differ
    assert ((got - expected).abs() < 1e-3 * step).float().mean() > 0.98


@settings(max_examples=25, deadline=None)
@given(
    bits=st.sampled_from([2, 3, 4, 8]),
    group=st.sampled_from([1, 7, 32, 40, 96, 100, 200, -1]),
    sym=st.booleans(),
    desc_act=st.booleans(),
    static=st.booleans(),
    aware=st.booleans(),
    mse=st.booleans(),
    block=st.sampled_from([1, 13, 32, 128]),
)
def test_every_option_gives_a_valid_weight_no_worse_than_rounding(
    bits, group, sym, desc_act, static, aware, mse, block
):
    weight, hessian, _ = problem()
    spec = QuantSpec(bits, group, sym, desc_act)
    options = SolverOptions(block=block, static_groups=static, group_aware=aware, mse=mse)
    solution = one(weight, hessian, spec, options)
    packed = solution.weight.validate()
    assert torch.allclose(dequantize(packed, torch.float32).t(), solution.dequantized, rtol=1e-6, atol=0)
    assert packed.checkpoint_format == ("gptq" if sym else "gptq_v2")
    if sym:
        assert (unpack_zeros(packed.qzeros, bits, 24, packed.checkpoint_format) == 2 ** (bits - 1)).all()
    if not desc_act or static:
        assert packed.g_idx is None  # trap 10
    assert solution.method == "gptq"
    assert solution.error <= solution.error_rtn * 1.02


@given(K=st.integers(1, 70), group=st.sampled_from([1, 7, 16, 64, 100, -1]), sym=st.booleans(), mse=st.booleans())
def test_rounding_to_nearest_finds_each_group_by_itself(K, group, sym, mse):
    spec, options = QuantSpec(3, group, sym), SolverOptions(mse=mse)
    columns = torch.randn(K, 5, generator=torch.Generator().manual_seed(K))
    cost = torch.ones(K)
    nearest = round_to_nearest(columns, cost, spec, options)
    size = spec.rows_per_group(K)
    scales, zeros = torch.empty_like(nearest.scales), torch.empty_like(nearest.zeros)
    for group, rows in enumerate(columns.split(size)):
        here = slice(group, group + 1)
        find_groups(rows, cost[: len(rows)], len(rows), spec, options, scales[here], zeros[here])
    assert torch.equal(nearest.scales, scales)
    assert torch.equal(nearest.zeros, zeros)


def test_errors_are_those_of_the_outputs():
    weight, hessian, x = problem()
    solution = one(weight, hessian, QuantSpec(3, 32, False))
    y = x.double() @ weight.double().t()
    wrong = x.double() @ (solution.dequantized.double() - weight.double()).t()
    assert solution.error == pytest.approx(float((wrong**2).sum() / (y**2).sum()), rel=1e-3)


def test_better_orders_are_better():
    weight, hessian, _ = problem(K=256, N=64)
    plain, aware, act = (
        one(weight, hessian, QuantSpec(3, 32, False, desc_act), SolverOptions(group_aware=group_aware)).error
        for desc_act, group_aware in ((False, False), (False, True), (True, True))
    )
    assert act < aware < plain


@given(K=st.integers(1, 60), group=st.sampled_from([1, 5, 16, 64, -1]), desc=st.booleans(), seed=st.integers(0, 9))
def test_order_is_a_permutation_and_keeps_groups_together(K, group, desc, seed):
    importance = torch.rand(K, generator=torch.Generator().manual_seed(seed))
    spec = QuantSpec(4, group, desc_act=desc)
    order, g_idx = _order(importance, spec, SolverOptions())
    assert torch.equal(order.sort().values, torch.arange(K))
    visited = g_idx[order].tolist()
    assert len({*visited}) == sum(1 for i, g in enumerate(visited) if i == 0 or g != visited[i - 1])  # one run each
    if desc:
        assert (importance[order].diff() <= 0).all()
    else:
        assert torch.equal(g_idx, trivial_g_idx(K, group).long())


@given(runs=st.lists(st.integers(1, 50), max_size=12), block=st.integers(1, 40))
def test_blocks_tile_the_columns_and_no_group_starts_inside_and_leaves(runs, block):
    blocks = list(_blocks(runs, block))
    assert [i for start, stop in blocks for i in range(start, stop)] == list(range(sum(runs)))
    assert all(stop - start <= block for start, stop in blocks)
    first = 0
    for run in runs:
        start, stop = next(b for b in blocks if b[0] <= first < b[1])
        assert first == start or first + run <= stop
        first += run


@example(K=9, decades=0, rank=1.0, dtype=torch.float64, seed=0)
@settings(max_examples=30, deadline=None)
@given(
    K=st.integers(1, 90),
    decades=st.integers(0, 4),
    rank=st.floats(0.2, 4),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    seed=st.integers(0, 99),
)
def test_factor_is_that_of_the_damped_hessian_and_of_the_paper(K, decades, rank, dtype, seed):
    # inputs whose energies lie up to 2 * decades apart, fewer of them than columns where rank < 1
    generator = torch.Generator().manual_seed(seed)
    spread = 10 ** (-decades * torch.rand(K, generator=generator))
    hessian = Hessian(K)
    hessian.add(torch.randn(max(1, int(rank * K)), K, generator=generator) * spread)
    # float32 may round the two triangles of a product apart (K = 9 does); the factor reads one, an inverse both
    symmetric = hessian.sum.triu() + hessian.sum.triu(1).T
    order = torch.randperm(K, generator=generator)
    factor, damp = factorize(symmetric, order, 0.01, dtype)
    assert factor is not None
    assert damp == 0.01
    assert torch.equal(factor.unit, factor.unit.triu())
    assert (factor.unit.diagonal() == 1).all()
    H = symmetric.double()
    H.diagonal().add_(damp * H.diagonal().mean())
    H = H[order][:, order]
    root = factor.unit.double() * factor.cost.double().sqrt()
    # three roundings to float32 of what is stored, and those of a Cholesky in float32 (Higham, theorem 10.3)
    units = 3 + (0 if dtype == torch.float64 else K + 1)
    assert (root @ root.t() - H).norm() <= 2**-24 * units * (root.abs() @ root.abs().t()).norm()
    # the paper's U, by way of the inverse: as far off as the condition of H, at most 1 + K / damp, makes it
    paper = torch.linalg.cholesky(torch.linalg.inv(H), upper=True)
    expected = torch.linalg.inv(paper) * paper.diagonal()
    assert (factor.unit - expected).norm() <= 2**-24 * units * (1 + K / damp) * expected.norm()
    x = torch.randn(K, 3, generator=generator)
    assert (H @ factor.divide(x).double() - x).norm() <= 2**-24 * (units + 4 * K) * (1 + K / damp) * x.norm()


@given(
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=6),
    size=st.sampled_from((None, 32)),
    seed=st.integers(0, 99),
)
def test_diagonal_blocks_are_inverted(lengths, size, seed):
    K = sum(lengths)
    unit = torch.randn(K, K, generator=torch.Generator().manual_seed(seed)).mul_(0.2).triu_(1) + torch.eye(K)
    blocks = list(_blocks(lengths, 30))
    cuts = Cuts([blocks[:2], blocks[2:]], {}, {}, torch.tensor(blocks), torch.zeros(K, dtype=torch.int32))
    for (start, stop), inverse in zip(blocks, _inverses(unit, cuts, size), strict=True):
        here = unit[start:stop, start:stop].double()
        assert torch.equal(inverse, inverse.triu())
        assert len(inverse) == (size or max(b - a for a, b in blocks))
        rest = inverse[stop - start :]
        assert torch.equal(rest, torch.eye(len(inverse))[stop - start :])
        inverse = inverse[: stop - start, : stop - start]
        # float64 leaves the rounding of the result
        residue = here @ inverse.double() - torch.eye(stop - start, dtype=torch.float64)
        assert (residue.abs() <= 1.01 * 2**-24 * (here.abs() @ inverse.abs().double())).all()


@given(
    runs=st.lists(st.integers(1, 300), min_size=1, max_size=12),
    block=st.integers(1, 128),
    clip=st.booleans(),
    static=st.booleans(),
)
def test_every_group_is_found_once_on_columns_that_are_up_to_date(runs, block, clip, static):
    groups = [g for g, run in enumerate(runs) for _ in range(run)]
    options = SolverOptions(clip=clip, static_groups=static, block=block)
    cuts = cut((len(groups),) if static else tuple(runs), options, None, torch.device("cpu"))
    blocks = [each for strip in cuts.strips for each in strip]
    assert [i for start, stop in blocks for i in range(start, stop)] == list(range(len(groups)))
    assert all(stop - start <= block for start, stop in blocks)
    starts = [i for i, g in enumerate(groups) if i == 0 or groups[i - 1] != g]
    assert sorted((*cuts.inside, *cuts.ahead)) == ([] if static else starts)
    stops = dict(blocks)
    assert cuts.blocks.tolist() == [list(block) for block in blocks]
    for start, end in cuts.inside.items():
        assert any(a <= start < end <= b for a, b in blocks)
        assert int(cuts.runs[start]) == end - start
    assert int(cuts.runs.count_nonzero()) == len(cuts.inside)
    for start, (end, group) in cuts.ahead.items():
        assert groups[start:end] == [group] * (end - start)
        if end > stops[start]:  # it reaches beyond its block: all before it must have been moved onto it
            assert start in {strip[0][0] for strip in cuts.strips}


def test_damping_rises_until_the_factorisation_succeeds():
    H = torch.diag(torch.tensor([1.0, 1.0, 1.0, -0.05]))  # needs more than 0.05 / mean
    order = torch.arange(4)
    factor, damp = factorize(H, order, 0.01)
    assert factor is not None
    assert damp == pytest.approx(0.1)
    assert factorize(H, order, 0.01, torch.float32)[1] == pytest.approx(0.1)
    assert factorize(-torch.eye(3), order[:3], 0.01) == (None, 1.0)


def test_a_hessian_that_cannot_be_factored_rounds_to_nearest(caplog):
    weight, hessian, _ = problem()
    hessian.sum.neg_()
    with caplog.at_level(logging.WARNING):
        solution = one(weight, hessian, QuantSpec(4, 32))
    assert solution.method == "rtn"
    assert "layer" in caplog.text


def test_dead_inputs_are_rounded_and_disturb_nothing():
    weight, hessian, x = problem()
    alive = one(weight, hessian, QuantSpec(4, 96, False), SolverOptions(group_aware=False, min_tokens=0))
    x[:, 10] = 0
    dead = Hessian(96)
    dead.add(x)
    got = one(weight, dead, QuantSpec(4, 96, False), SolverOptions(group_aware=False, min_tokens=0))
    nearest = one(weight, dead, QuantSpec(4, 96, False), method="rtn")
    assert torch.allclose(got.dequantized[:, 10], nearest.dequantized[:, 10], rtol=1e-3)
    assert got.error < nearest.error
    assert alive.error < nearest.error


def test_too_few_tokens_round_to_nearest_and_say_so(caplog):
    weight, _, x = problem()
    few = Hessian(96)
    few.add(x[:11])
    with caplog.at_level(logging.WARNING):
        solution = one(weight, few, QuantSpec(4, 32))
    assert solution.method == "rtn"
    assert "layer: saw 11 tokens, needs 12" in caplog.text
    assert one(weight, few, QuantSpec(4, 32), SolverOptions(min_tokens=11)).method == "gptq"
    empty = one(weight, Hessian(96), QuantSpec(4, 32), SolverOptions(min_tokens=0))
    assert (empty.method, empty.error) == ("rtn", 0.0)


def test_layers_that_share_an_input_may_be_solved_together():
    weight, hessian, _ = problem()
    spec, options = QuantSpec(4, 32, False), SolverOptions()
    together = solve({"a": weight[:10], "b": weight[10:]}, hessian, spec, options)
    for name, part in (("a", weight[:10]), ("b", weight[10:])):
        alone = one(part, hessian, spec, options)
        same = unpack(together[name].weight.qweight, 4, 96) == unpack(alone.weight.qweight, 4, 96)
        assert same.float().mean() > 0.999  # matrix products of another width may round otherwise
        assert together[name].error == pytest.approx(alone.error, rel=1e-3)


def test_without_a_gpu_fused_is_eager():
    weight, hessian, _ = problem()
    eager, fused = (one(weight, hessian, QuantSpec(4, 32), SolverOptions(fused=fused)) for fused in (False, True))
    assert fused.method == "gptq"
    assert torch.equal(eager.dequantized, fused.dequantized)


def test_codes_are_chosen_for_the_scales_that_are_stored():
    weight, hessian, _ = problem()
    solution = one(weight * 1e-6, hessian, QuantSpec(8, 32, False), SolverOptions())  # scales underflow float16
    assert solution.weight.scales.dtype == torch.float16
    assert float(solution.weight.scales.min()) >= torch.finfo(torch.float16).tiny  # trap 6
    assert torch.isfinite(solution.dequantized).all()


def test_convolutions_and_transposed_layers_are_matrices():
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(0)
    conv = nn.Conv2d(4, 6, 3, padding=1, stride=2)
    x = torch.randn(5, 4, 9, 9)
    solver = GPTQ(conv, QuantSpec(8, -1, False), SolverOptions(scale_dtype=torch.float32))
    solver.add_batch(x)
    W = solver.solve().dequantized.view_as(conv.weight)
    expected = conv(x)
    conv.weight.data = W
    assert (conv(x) - expected).norm() < 0.02 * expected.norm()

    linear, conv1d = nn.Linear(32, 8), Conv1D(8, 32)
    conv1d.weight.data = linear.weight.data.t().contiguous()
    inputs = torch.randn(40, 32)
    solutions = []
    for layer in (linear, conv1d):
        solver = GPTQ(layer, QuantSpec(4, 16))
        solver.add_batch(inputs)
        solutions.append(solver.solve().dequantized)
    assert torch.equal(*solutions)


def test_half_precision_inputs_are_counted_exactly():
    x = torch.randn(300, 16).half()
    hessian = Hessian(16)
    hessian.add(x.view(3, 100, 16))
    exact = x.double().t() @ x.double()
    assert hessian.tokens == 300
    # float32 sums of 300 exact products
    assert (hessian.sum - exact).abs().max() <= 300 * 2**-24 * (x.double().abs().t() @ x.double().abs()).max()


def test_refusals():
    weight, hessian, _ = problem()
    with pytest.raises(ValueError, match="the Hessian has 96 inputs, the weight 95"):
        one(weight[:, 1:], hessian, QuantSpec(4, 32))
    with pytest.raises(ValueError, match="weight must be finite"):
        one(weight * float("nan"), hessian, QuantSpec(4, 32))
    hessian.sum[0, 0] = float("inf")
    with pytest.raises(ValueError, match="inputs seen must be finite"):
        one(weight, hessian, QuantSpec(4, 32))
    with pytest.raises(TypeError, match="ReLU"):
        GPTQ(nn.ReLU(), QuantSpec(4, 32))
    with pytest.raises(ValueError, match="groups=1"):
        GPTQ(nn.Conv2d(4, 4, 1, groups=2), QuantSpec(4, 32))
    same = GPTQ(nn.Conv2d(4, 4, 3, padding="same"), QuantSpec(4, 32))
    with pytest.raises(ValueError, match="padding"):
        same.add_batch(torch.randn(1, 4, 8, 8))
    with pytest.raises(ValueError, match="damp"):
        SolverOptions(damp=0)
    with pytest.raises(ValueError, match="block"):
        SolverOptions(block=0)
