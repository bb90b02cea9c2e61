"""Kernels in Triton's interpreter, on CPU tensors: `TRITON_INTERPRET=1 pytest -m interpreter`."""

from __future__ import annotations

import os
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gptq_triton import reference
from gptq_triton.layout import TiledWeight, tile_weight
from gptq_triton.spec import BITS
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
@given(st.integers(1, 20), st.integers(1, 70), st.integers(1, 1100), st.sampled_from((*DTYPES, torch.bfloat16)))
def test_gather(M, K, C, dtype):
    from gptq_triton.kernels.gather import gather

    x = random_rows(M, K, dtype)
    order = torch.randint(-1, K, (C,), generator=generator(C), dtype=torch.int32)
    out = poisoned(torch.full((M, C), float("nan"), dtype=dtype))
    gather(poisoned(x), guarded(order), out)
    assert torch.equal(out, torch.where(order >= 0, x[:, order.long()], 0))
