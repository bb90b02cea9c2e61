"""x as two digits, in Triton's interpreter: `TRITON_INTERPRET=1 pytest -m interpreter`."""

from __future__ import annotations

import os
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.strategies import generator

pytestmark = [
    pytest.mark.interpreter,
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1 from the start"),
    pytest.mark.skipif(sys.platform != "linux", reason="triton is on Linux only"),
]


def run(
    x: Tensor, order: Tensor | None, steps: int, subgroups: int = 1, turns: int = 1, wide: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """The kernel's integers (M, steps * 128), units (M, steps) and sums (M, steps, subgroups * turns)."""
    from gptq_triton.kernels.digits import constants, digits_kernel

    M, K = x.shape
    rows, row_columns = 8 * -(-M // 8) if wide else 0, 2 * subgroups
    tiles = 0 if wide else -(-M * subgroups // 4)
    digits = torch.full((steps, rows, 64) if wide else (steps, tiles, 256), -1, dtype=torch.int32)
    sums = torch.full((steps, 2 * turns, rows) if wide else (steps, tiles, 4, 2 * turns), -1, dtype=torch.int32)
    names = constants(False, order is not None, tiles, rows, subgroups, turns, pairs=False, pdl=False, ptx=False)
    digits_kernel[(-(-steps // names["STEPS"]), M)](x, order, digits, sums, K, steps, x.stride(0), **names)
    integers = torch.empty(M, steps, 128, dtype=torch.int64)
    units, totals = torch.empty(M, steps), torch.empty(M, steps, subgroups * turns, dtype=torch.int64)
    stored = digits.view(torch.int8).long()
    for m in range(M):
        for s in range(4):
            for hb in range(2):
                for t in range(4):
                    columns = []
                    for n in range(row_columns * m, row_columns * (m + 1)):
                        if wide:
                            four = stored.view(steps, 2 * rows, 8, 4, 4)[:, n, 2 * s + hb, t]
                        else:
                            lane = 4 * (n % 8) + t
                            four = stored.view(steps, tiles, 2, 32, 2, 2, 4)[:, n // 8, s // 2, lane, s % 2, hb]
                        columns.append(four)
                    own = s * subgroups // 4  # this column's subgroup
                    pair = columns[2 * own : 2 * own + 2]
                    assert not any(other.any() for other in columns[: 2 * own] + columns[2 * own + 2 :])
                    for i, column in enumerate((0, 8, 1, 9)):
                        integers[m, :, 32 * s + 16 * hb + 2 * t + column] = 256 * pair[0][:, i] + pair[1][:, i]
        if wide:
            place = m % 4 * (rows // 4) + m // 4
            row = sums[:, None, :, place]
        else:
            place = subgroups * m % 4
            row = sums[:, subgroups * m // 4, place : place + subgroups]
        assert torch.equal(row[:, :, 0], row[:, :1, 0].expand(-1, subgroups))
        units[m] = row[:, 0, 0].contiguous().view(torch.float32)
        totals[m] = -row[:, :, 1 : 1 + turns].flatten(1).long()
    return integers.view(M, -1), units, totals


@settings(deadline=None, max_examples=25)
@given(
    M=st.integers(1, 9),
    K=st.integers(1, 300),
    form=st.sampled_from(
        ((1, 1, True), (1, 2, True), (1, 1, False), (2, 1, False), (4, 1, False), (1, 2, False), (1, 4, False))
    ),
    ordered=st.booleans(),
    exponent=st.integers(-12, 12),
    seed=st.integers(0, 99),
)
def test_digits_are_x(M, K, form, ordered, exponent, seed):
    rng, groups = generator(seed), form[0] * form[1]
    x = (torch.randn(M, K, generator=rng) * 2.0**exponent).half()
    steps = -(-K // 128)
    order, expected = None, torch.nn.functional.pad(x, (0, 128 * steps - K))
    if ordered:
        order = torch.full((128 * steps,), -1, dtype=torch.int32)
        order[torch.randperm(128 * steps, generator=rng)[:K]] = torch.arange(K, dtype=torch.int32)
        expected = torch.where(order >= 0, x[:, order.clamp(min=0).long()], 0)
    integers, units, totals = run(x, order, steps, *form)
    expected = expected.double().view(M, steps, 128)
    found = integers.double().view(M, steps, 128) * units.double()[:, :, None]
    error, largest = (found - expected).abs(), expected.abs().amax(2)
    assert bool((error <= units.double()[:, :, None] / 2).all())
    assert bool((units.double() <= largest * 2.0**-14 * 32768 / 32639).all() or (largest == 0).any())
    # within a factor of 16 of the largest nothing is lost
    near = expected.abs() >= largest[:, :, None] / 16
    assert bool((error[near] == 0).all())
    assert torch.equal(totals, integers.view(M, steps, groups, 128 // groups).sum(3))
    assert int(integers.abs().max()) <= 32639


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_seen(bad):
    x = torch.randn(3, 256, generator=generator(0)).half()
    x[1, 200] = bad
    _, units, _ = run(x, None, 2)
    assert units.isnan().tolist() == [[False, False], [False, True], [False, False]]
