"""Refinement: no step raises a loss, each step is the best of its kind, and what is stored is what was judged."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gptq_triton import solver
from gptq_triton import walk as walking
from gptq_triton.config import QuantizeConfig, read_config
from gptq_triton.hessian import Factor, Hessian
from gptq_triton.packing import storable, trivial_g_idx, unpack, unpack_zeros
from gptq_triton.quantizer import encode, group_params, quantize
from gptq_triton.reference import dequantize
from gptq_triton.refinement import Descent, Members, Metric, Rounded, clipped_params, losses, refine, refit_scales
from gptq_triton.solver import SolverOptions, solve
from gptq_triton.spec import QuantSpec
from gptq_triton.walk import walk

problems = st.fixed_dictionaries(
    {
        "K": st.integers(1, 150),  # more than one block of columns
        "bits": st.sampled_from([2, 3, 4, 8]),
        "group": st.sampled_from([1, 7, 16, 64, -1]),
        "sym": st.booleans(),
        "scattered": st.booleans(),
        "dtype": st.sampled_from([torch.float16, torch.bfloat16, torch.float32]),
        "seed": st.integers(0, 2**16),
    }
)


def given_grid(K=40, bits=3, group=16, sym=False, scattered=False, dtype=torch.float16, seed=0, N=6):
    """A weight (K, N), a Hessian of correlated inputs, a rough grid with nearest codes, the format, an order."""
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(2 * K + 3, K, generator=random, dtype=torch.float64) @ torch.randn(
        K, K, generator=random, dtype=torch.float64
    )
    H = x.t() @ x + 0.01 * torch.eye(K, dtype=torch.float64)
    columns = torch.randn(K, N, generator=random)
    spec = QuantSpec(bits, group, sym)
    order = torch.randperm(K, generator=random)
    g_idx = trivial_g_idx(K, group).long()
    if scattered:
        g_idx = g_idx[order]
    G = spec.groups(K)
    scales = (torch.rand(G, N, generator=random) + 0.5).mul_(3 / spec.maxq).to(dtype)
    zeros = torch.full((G, N), (spec.maxq + 1) / 2)
    if not sym:
        zeros = torch.randint(0, spec.maxq + 1, (G, N), generator=random).float()
    codes = encode(columns, scales.float()[g_idx], zeros[g_idx], spec.maxq).to(torch.uint8)
    return columns, H, Rounded(codes, scales, zeros, g_idx), spec, order


def walks(columns, spec, order, block=128):
    """The solver's walk in an order, on a given grid."""
    options = SolverOptions(static_groups=True, block=block)
    return lambda factor, grid, moved: walk(columns[order], factor, order, grid, spec, options, moved)[0]


def descend(columns, H, rounded, spec, order, block=128):
    descent = Descent(H, order)
    return walks(columns, spec, order, block)(descent.factor, rounded, descent.moved(columns, rounded))


def rounding_of_descent(columns, H, before, after, order, block):
    """What float32 may cost each output (N,).

    A code is the best one unless its column's value is off: by at most ``unit roundoffs * reach / H_jj``, where reach
    sums the sizes of all that is added, times what the inverse of a block and the block itself do to it. Next to a tie
    of two codes, a step apart, the wrong one costs ``2 H_jj step`` times as much as the value is off.
    """
    K = len(columns)
    misses = [(columns.double() - each.dequantize(torch.float64)).abs() for each in (before, after)]
    reach = H.abs() @ torch.maximum(*misses) + H.diagonal()[:, None] * columns.abs()
    unit = Descent(H, order).factor.unit.double()
    spread = 1.0
    for start in range(0, K, block):
        here = unit[start : start + block, start : start + block]
        spread = max(spread, float((torch.linalg.inv(here).abs() @ here.abs()).sum(0).max()))
    return 2 * 2**-24 * (K + 8) * spread * (before.scales.double()[before.g_idx] * reach).sum(0)


def assert_no_worse(columns, H, after, before):
    size = ((H @ columns.double()) * columns).sum(0)  # roundings are relative to this
    assert (losses(columns, Metric(H), after) <= losses(columns, Metric(H), before) + 1e-11 * size).all()


@settings(max_examples=60, deadline=None)
@given(problem=problems)
def test_refit_raises_no_loss_and_gives_what_can_be_stored(problem):
    columns, H, rounded, spec, _ = given_grid(**problem)
    fitted = refit_scales(columns, Metric(H), rounded, spec, Members.of(rounded.g_idx))[0]
    assert_no_worse(columns, H, fitted, rounded)
    assert torch.equal(fitted.codes, rounded.codes)
    assert fitted.scales.dtype == problem["dtype"]
    assert (fitted.scales.float() >= torch.finfo(problem["dtype"]).tiny).all()
    if spec.sym:
        assert torch.equal(fitted.zeros, rounded.zeros)
    assert torch.equal(fitted.zeros, fitted.zeros.round().clamp(0, spec.maxq))


@settings(max_examples=30, deadline=None)
@given(bits=st.sampled_from([2, 3, 4]), sym=st.booleans(), seed=st.integers(0, 999))
def test_refit_of_one_group_is_the_best_of_all_that_can_be_stored_nearby(bits, sym, seed):
    columns, H, rounded, spec, _ = given_grid(24, bits, -1, sym, seed=seed, dtype=torch.bfloat16)
    fitted = refit_scales(columns, Metric(H), rounded, spec, Members.of(rounded.g_idx))[0]
    best = losses(columns, Metric(H), fitted)
    infinity = torch.full_like(fitted.scales, torch.inf)
    for scales in (torch.nextafter(fitted.scales, infinity), torch.nextafter(fitted.scales, -infinity)):
        other = losses(columns, Metric(H), Rounded(fitted.codes, scales, fitted.zeros, fitted.g_idx))
        assert (other >= best * (1 - 1e-9)).all()
    for zero in range(spec.maxq + 1) if not sym else ():
        for factor in torch.linspace(0.25, 4, 40):  # a coarse search of all grids finds nothing better
            scales = (fitted.scales * factor).to(torch.bfloat16)
            other = losses(
                columns, Metric(H), Rounded(fitted.codes, scales, torch.full_like(fitted.zeros, zero), fitted.g_idx)
            )
            assert (other >= best * (1 - 1e-9)).all()


def test_refit_finds_the_grid_that_a_weight_lies_on():
    _, H, rounded, spec, _ = given_grid(N=8, bits=4)
    columns = rounded.dequantize()
    shifted = Rounded(rounded.codes, (rounded.scales * 1.3).half(), (rounded.zeros + 1).clamp(max=15), rounded.g_idx)
    assert (losses(columns, Metric(H), shifted) > 0.1).all()
    for _ in range(200):  # groups disturb each other; one after another they converge
        shifted = refit_scales(columns, Metric(H), shifted, spec, Members.of(shifted.g_idx))[0]
    reached = losses(columns, Metric(H), shifted)
    assert (reached < 1e-3 * ((H @ columns.double()) * columns).sum(0)).all()


@settings(max_examples=60, deadline=None)
@given(problem=problems, block=st.sampled_from([1, 16]))
def test_descent_raises_no_loss_and_changes_codes_alone(problem, block):
    columns, H, rounded, spec, order = given_grid(**problem)
    lower = descend(columns, H, rounded, spec, order, block)
    slack = rounding_of_descent(columns, H, rounded, lower, order, block)
    assert (losses(columns, Metric(H), lower) <= losses(columns, Metric(H), rounded) + slack).all()
    assert lower.codes.dtype == torch.uint8
    assert int(lower.codes.max()) <= spec.maxq
    assert torch.equal(lower.scales, rounded.scales)
    assert torch.equal(lower.zeros, rounded.zeros)


def test_descent_is_what_trying_every_code_of_every_column_gives():
    columns, H, rounded, spec, order = given_grid(150, 2, 32, N=5)
    codes = rounded.codes.clone()
    for k in order.tolist():
        tried = []
        for code in range(spec.maxq + 1):
            codes[k] = code
            tried.append(losses(columns, Metric(H), Rounded(codes, rounded.scales, rounded.zeros, rounded.g_idx)))
        codes[k] = torch.stack(tried).argmin(0)
    got = descend(columns, H, rounded, spec, order).codes
    assert torch.equal(got, codes)
    assert not torch.equal(got, rounded.codes)


@settings(max_examples=25, deadline=None)
@given(problem=problems, rounds=st.integers(1, 3))
def test_rounds_raise_no_output_s_loss_whatever_the_walk_gives(problem, rounds):
    columns, H, rounded, spec, order = given_grid(**problem)
    worst, real = torch.zeros_like(rounded.codes), walks(columns, spec, order)
    factor = Factor(torch.eye(len(columns)), torch.ones(len(columns)))

    def walk(how, grid, moved):
        return Rounded(worst, grid.scales, grid.zeros, grid.g_idx) if how is factor else real(how, grid, moved)

    refined, loss = refine(columns, H, rounded, spec, order, factor, walk, rounds)
    # gains are differences of what is as large as the loss of the furthest values on a grid
    size = (
        torch.maximum(rounded.scales.amax(0), refined.scales.amax(0)).double().mul(spec.maxq).square() * H.abs().sum()
    )
    assert ((losses(columns, Metric(H), refined) - loss).abs() <= 1e-14 * rounds * size).all()
    assert_no_worse(columns, H, refined, rounded)
    fitted = refit_scales(columns, Metric(H), rounded, spec, Members.of(rounded.g_idx))[0]
    tried = (fitted, *(descend(columns, H, r, spec, order) for r in (fitted, walk(factor, fitted, None))))
    least = torch.stack([losses(columns, Metric(H), r) for r in tried]).amin(0)
    once, _ = refine(columns, H, rounded, spec, order, factor, walk, 1)
    assert torch.equal(losses(columns, Metric(H), once), least)  # each output has the best one


def problem(K=96, N=24, seed=0):
    random = torch.Generator().manual_seed(seed)
    mix = torch.randn(K, K, generator=random) * torch.rand(K, generator=random)
    hessian = Hessian(K)
    hessian.add(torch.randn(600, K, generator=random) @ mix)
    return torch.randn(N, K, generator=random), hessian


def damped_losses(weight, hessian, solution):
    H = hessian.sum.double()
    H = H + solution.damp * H.diagonal().mean() * torch.eye(len(H), dtype=torch.float64)
    error = (weight - solution.dequantized).double()
    return ((error @ H) * error).sum(1)


@settings(max_examples=20, deadline=None)
@given(
    bits=st.sampled_from([2, 3, 4, 8]),
    group=st.sampled_from([1, 7, 40, 96, -1]),
    sym=st.booleans(),
    desc_act=st.booleans(),
    static=st.booleans(),
    aware=st.booleans(),
    clip=st.booleans(),
)
def test_solving_with_refinement_is_no_worse_for_any_output_and_repeats_itself(
    bits, group, sym, desc_act, static, aware, clip
):
    weight, hessian = problem()
    spec = QuantSpec(bits, group, sym, desc_act)
    found = []
    for rounds in (0, 1, 2, 2):
        options = SolverOptions(static_groups=static, group_aware=aware, clip=clip, refine=rounds)
        found.append(solve({"layer": weight}, hessian, spec, options)["layer"])
    losses_of = [damped_losses(weight, hessian, solution) for solution in found]
    assert (losses_of[1] <= losses_of[0] * (1 + 1e-5)).all()  # what is dequantized is rounded to float32
    assert (losses_of[2] <= losses_of[1] * (1 + 1e-5)).all()
    if bits < 8:
        assert losses_of[1].sum() < 0.99 * losses_of[0].sum()
    assert torch.equal(found[2].weight.qweight, found[3].weight.qweight)
    assert torch.equal(found[2].weight.scales, found[3].weight.scales)
    packed = found[2].weight.validate()
    assert torch.allclose(dequantize(packed, torch.float32).t(), found[2].dequantized, rtol=1e-6, atol=0)
    if found[0].weight.g_idx is None:
        assert packed.g_idx is None
    else:
        assert torch.equal(packed.g_idx, found[0].weight.g_idx)
    if sym:
        assert (unpack_zeros(packed.qzeros, bits, 24, packed.checkpoint_format) == 2 ** (bits - 1)).all()


def test_without_switches_nothing_changes(monkeypatch):
    weight, hessian = problem()
    monkeypatch.setattr(solver, "refine", None)
    monkeypatch.setattr(walking, "clipped_params", None)
    solution = solve({"layer": weight}, hessian, QuantSpec(3, 32, False), SolverOptions())["layer"]
    assert solution.method == "gptq"


def test_a_second_factorisation_that_fails_costs_nothing(monkeypatch):
    weight, hessian = problem()
    plain = solve({"layer": weight}, hessian, QuantSpec(3, 32, False), SolverOptions())["layer"]
    real, calls = solver.attempt, []

    def attempt(H, order, damp):
        factor, failed = real(H, order, damp)
        calls.append(damp)
        if len(calls) > 1:
            factor.unit.fill_(torch.nan)
        return factor, failed

    monkeypatch.setattr(solver, "attempt", attempt)
    refined = solve({"layer": weight}, hessian, QuantSpec(3, 32, False), SolverOptions(refine=1))["layer"]
    assert len(calls) == 2
    assert damped_losses(weight, hessian, refined).isfinite().all()
    assert (damped_losses(weight, hessian, refined) <= damped_losses(weight, hessian, plain) * (1 + 1e-9)).all()


@settings(max_examples=40, deadline=None)
@given(
    bits=st.sampled_from([2, 3, 4, 8]),
    sym=st.booleans(),
    rows=st.integers(1, 40),
    dtype=st.sampled_from([torch.float16, torch.float32]),
    seed=st.integers(0, 999),
)
def test_clipping_never_costs_more_than_the_whole_range(bits, sym, rows, dtype, seed):
    random = torch.Generator().manual_seed(seed)
    group, cost = torch.randn(rows, 9, generator=random), torch.rand(rows, generator=random) ** 4
    maxq = 2**bits - 1
    scale, zero = clipped_params(group, cost, maxq, sym, dtype)
    whole, middle = group_params(group.t(), maxq, sym)
    whole = storable(whole, dtype)  # a tiny range has the smallest scale that can be stored
    assert scale.dtype == dtype
    assert (scale.float() <= whole.float()).all()
    spent, before = (
        ((quantize(group, s.float(), z, maxq) - group) ** 2 * cost[:, None]).sum(0)
        for s, z in ((scale, zero), (whole, middle))
    )
    assert (spent <= before * (1 + rows * 2**-22)).all()  # roundings of two ways to sum
    free, _ = clipped_params(group, torch.zeros(rows), maxq, sym, dtype)
    assert torch.equal(free, whole)  # nothing to gain: the range stays


def test_clipping_spares_the_inputs_that_matter():
    group = torch.cat([torch.tensor([4.0]), torch.linspace(-1, 1, 16)])[:, None]
    outlier, rest = torch.zeros(17), torch.ones(17)
    outlier[0], rest[0] = 1, 0
    kept, _ = clipped_params(group, outlier, 15, True, torch.float32)
    clipped, _ = clipped_params(group, rest, 15, True, torch.float32)
    assert kept > 0.9 * 8 / 15
    assert clipped < 0.6 * kept


def test_the_walk_weighs_errors_by_its_own_factor(monkeypatch):
    weight, hessian = problem()
    costs, original = [], walking.clipped_params
    spy = lambda rows, cost, *rest: (costs.append(cost), original(rows, cost, *rest))[1]  # noqa: E731
    monkeypatch.setattr(walking, "clipped_params", spy)
    spec = QuantSpec(3, 40, False)
    solve({"layer": weight}, hessian, spec, SolverOptions(clip=True))
    order, _ = solver._order(hessian.sum.diagonal(), spec, SolverOptions())
    factor, _ = solver.factorize(hessian.sum, order, 0.01)
    assert torch.equal(torch.cat(costs[:3]), hessian.sum.diagonal())  # round-to-nearest, for comparison
    assert torch.equal(torch.cat(costs[3:]), factor.cost)


@pytest.mark.parametrize("bits", [2, 3])
def test_each_switch_lowers_the_error(bits):
    weight, hessian = problem(K=256, N=64)
    off, clip, refined, both = (
        solve({"layer": weight}, hessian, QuantSpec(bits, 64, False), SolverOptions(clip=clip, refine=rounds))[
            "layer"
        ].error
        for clip, rounds in ((False, 0), (True, 0), (False, 2), (True, 2))
    )
    assert both < min(clip, refined)
    assert max(clip, refined) < 0.95 * off


def test_layers_solved_together_are_refined_as_alone():
    weight, hessian = problem()
    spec, options = QuantSpec(4, 32, False), SolverOptions(clip=True, refine=1)
    together = solve({"a": weight[:10], "b": weight[10:]}, hessian, spec, options)
    for name, part in (("a", weight[:10]), ("b", weight[10:])):
        alone = solve({"layer": part}, hessian, spec, options)["layer"]
        same = unpack(together[name].weight.qweight, 4, 96) == unpack(alone.weight.qweight, 4, 96)
        assert same.float().mean() > 0.98  # matrix products of another width may round otherwise
        assert together[name].error == pytest.approx(alone.error, rel=1e-2)


@pytest.mark.parametrize("make", [SolverOptions, QuantizeConfig])
def test_refusals(make):
    with pytest.raises(ValueError, match="mse and clip"):
        make(mse=True, clip=True)
    with pytest.raises(ValueError, match="refine must be at least 0, got -1"):
        make(refine=-1)
    for wrong in (-0.1, 1.5, float("nan")):
        with pytest.raises(ValueError, match="feedback must lie in"):
            make(feedback=wrong)
    for wrong in (True, "1"):
        with pytest.raises(TypeError, match="feedback must be a number"):
            make(feedback=wrong)
    for wrong in (1.5, True, "1"):
        with pytest.raises(TypeError, match="refine must be a number of rounds"):
            make(refine=wrong)


def drifting(K=64, N=16, tokens=2000):
    """A weight (N, K), inputs of the quantized and of the full-precision model (tokens, K)."""
    random = torch.Generator().manual_seed(3)
    full = torch.randn(tokens, K, generator=random) @ torch.randn(K, K, generator=random)
    noise = torch.randn(K, K, generator=random)
    x = full + 0.1 * full @ noise / K**0.5 + 0.2 * torch.randn(tokens, K, generator=random)
    return torch.randn(N, K, generator=random), x, full


@pytest.mark.parametrize("share", [0.5, 1.0])
def test_feedback_fits_the_weight_to_what_full_precision_computes(share):
    weight, x, full = drifting()
    hessian = Hessian(64)
    for rows, wanted in zip(x.split(700), full.split(700), strict=True):
        hessian.add(rows, wanted)
    H, drift = hessian.sum.double(), (x.double().t() @ (full.double() - x.double()))
    damped = H + 0.01 * H.diagonal().mean() * torch.eye(64)
    target = weight.double() + share * torch.linalg.solve(damped, drift @ weight.double().t()).t()
    spec, options = QuantSpec(8, 16, False), SolverOptions(feedback=share)
    fitted = solve({"layer": weight}, hessian, spec, options)["layer"]
    at_target = solve({"layer": target.float()}, hessian, spec, SolverOptions())["layer"]
    assert (fitted.dequantized != at_target.dequantized).float().mean() < 0.02  # ties turn either way
    assert fitted.error < 1e-4

    def loss(solution):
        return float((x @ solution.dequantized.t() - full @ weight.t()).square().sum())

    assert loss(fitted) < 0.9 * loss(solve({"layer": weight}, hessian, spec, SolverOptions())["layer"])


def test_without_drift_feedback_changes_nothing():
    weight, x, _ = drifting()
    spec, options = QuantSpec(3, 16, False), SolverOptions(feedback=1.0)
    plain, same = Hessian(64), Hessian(64)
    plain.add(x)
    same.add(x, x)
    codes = [solve({"layer": weight}, hessian, spec, options)["layer"].weight.qweight for hessian in (plain, same)]
    assert torch.equal(*codes)


def test_config_carries_the_switches_through_its_file_and_rules(tmp_path):
    config = QuantizeConfig(3, clip=True, refine=2, feedback=0.5, dynamic={".*down_proj": {"refine": 0}})
    read = QuantizeConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert (read.clip, read.refine, read.feedback) == (True, 2, 0.5)
    assert read.solver_options().feedback == 0.5
    assert (read.solver_options().clip, read.solver_options().refine) == (True, 2)
    own = read.for_module("model.layers.0.mlp.down_proj")
    assert own is not None
    assert (own.clip, own.refine) == (True, 0)
    plain = QuantizeConfig(clip=False, refine=0).to_dict()
    assert not {"clip", "refine", "feedback"} & plain["meta"].keys()  # files without them stay as they were
    (tmp_path / "quantize_config.json").write_text(json.dumps(plain))
    assert (read_config(tmp_path).clip, read_config(tmp_path).refine) == (False, 0)


def test_ranges_are_clipped_by_the_output_s_error_unless_by_the_weight_s():
    assert QuantizeConfig().clip
    assert not QuantizeConfig(mse=True).clip
    own = QuantizeConfig(dynamic={"a": {"mse": True}}).for_module("a")
    assert own is not None
    assert (own.mse, own.clip) == (True, False)
