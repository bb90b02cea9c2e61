"""Products of halves: as exact as float32's, whatever the sizes of columns."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gptq_triton import halves, solver
from gptq_triton import hessian as hessian_module
from gptq_triton.halves import Halves, inner, splittable
from gptq_triton.hessian import Hessian
from gptq_triton.packing import unpack
from gptq_triton.solver import SolverOptions, solve
from gptq_triton.spec import QuantSpec


def matrix(rows, columns, spread, seed):
    """Columns of sizes that differ by powers of ten, one of zeros."""
    random = torch.Generator().manual_seed(seed)
    found = torch.randn(rows, columns, generator=random)
    found *= 10 ** (spread * torch.randn(columns, generator=random).clamp(-3, 3))
    found[:, 0] = 0
    return found


@given(st.integers(0, 60), st.integers(1, 20), st.integers(1, 20), st.sampled_from([0, 1, 4]), st.integers(0, 99))
def test_products_are_as_exact_as_those_of_floats(rows, M, N, spread, seed):
    left, right = matrix(rows, M, spread, seed), matrix(rows, N, spread, seed + 1)
    found = inner(Halves.of(left), Halves.of(right))
    exact = left.double().t() @ right.double()
    size = left.double().norm(dim=0)[:, None] * right.double().norm(dim=0)
    assert bool(((found - exact).abs() <= 2e-6 * size).all())


@given(st.integers(1, 40), st.integers(1, 9), st.integers(0, 99))
def test_halves_hold_22_bits(rows, columns, seed):
    whole = matrix(rows, columns, 2, seed)
    split = Halves.of(whole)
    error = (split.high.double() + split.low.double() / halves.LOW) * split.scale - whole
    assert bool((error.abs() <= 2.0**-23 * split.scale).all())  # the scale is above every number of a column
    assert torch.equal(split[2:5].high, split.high[2:5])
    part = split[1:, 1:3]
    assert torch.equal(part.scale, split.scale[1:3])
    split[:1] = 5 * whole[:1]  # within what the scale allows
    assert torch.equal(split[:1].high, (5 * whole[:1] / split.scale).half())


@pytest.mark.parametrize("size", [3e38, 1e-37])
def test_columns_of_any_size_have_a_scale(size):
    split = Halves.of(torch.tensor([[size], [-size / 2]]))
    assert bool(split.scale.isfinite().all())
    assert split.high[0] == -2 * split.high[1]


def test_kinds_do_not_mix():
    with pytest.raises(TypeError, match="both matrices must be halves, or neither"):
        inner(Halves.of(torch.ones(2, 2)), torch.ones(2, 2))


@pytest.mark.parametrize("K", [65, 96, 200])
def test_a_factor_found_by_panels_is_as_exact_as_float32s(K, monkeypatch):
    random = torch.Generator().manual_seed(K)
    x = torch.randn(2 * K, K, generator=random) @ torch.randn(K, K, generator=random) * torch.logspace(1, -2, K)
    H, order = x.t() @ x, torch.randperm(K, generator=random)
    exact, _ = hessian_module.attempt(H, order, 0.01)
    single, _ = hessian_module.attempt(H, order, 0.01, torch.float32)
    monkeypatch.setattr(hessian_module, "PANEL", 32)
    for module in (halves, hessian_module):
        monkeypatch.setattr(module, "has_tensor_cores", lambda tensor: True)
    factor, failed = hessian_module.attempt(H, order, 0.01)
    assert not bool(failed)
    assert torch.equal(factor.unit, factor.unit.triu())

    def off(factor):
        """Of the matrix that was factored, each element against the sizes of its row and column."""
        root = factor.unit.double() * factor.cost.double().sqrt()
        goal = exact.unit.double() * exact.cost.double().sqrt()
        scale = goal.norm(dim=1)
        return ((root @ root.t() - goal @ goal.t()) / scale[:, None] / scale).norm()

    assert off(factor) <= 4 * off(single) + 1e-7
    assert bool(hessian_module.attempt(-H, order, 0.01)[1])


@pytest.mark.parametrize("desc_act", [False, True])
def test_the_solver_finds_the_same_with_halves(desc_act, monkeypatch):
    random = torch.Generator().manual_seed(0)
    mix = torch.randn(300, 300, generator=random) * torch.logspace(0, -2, 300)
    hessian = Hessian(300)
    hessian.add(torch.randn(900, 300, generator=random) @ mix)
    weights = {"layer": torch.randn(64, 300, generator=random)}
    spec, options = QuantSpec(3, 64, False, desc_act), SolverOptions(clip=True, refine=1, fused=False)
    expected = solve(weights, hessian, spec, options)["layer"]
    split = []
    for module in (halves, solver):
        monkeypatch.setattr(module, "has_tensor_cores", lambda tensor: split.append(0) or True)
    assert isinstance(splittable(torch.ones(2, 2)), Halves)
    found = solve(weights, hessian, spec, options)["layer"]
    assert len(split) > 5
    assert found.error == pytest.approx(expected.error, rel=1e-2)
    equal = unpack(found.weight.qweight, 3, 300) == unpack(expected.weight.qweight, 3, 300)
    assert equal.float().mean() > 0.99
