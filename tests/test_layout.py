"""Kernel tiles hold exactly what the checkpoint holds, where the kernels look for it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings

from gptq_triton import reference
from gptq_triton.layout import ONE_GROUP, STEP, tile, tile_weight, unpack_meta, untile, untile_weight
from gptq_triton.packing import PackedWeight, pack_weight, unpack, unpack_zeros
from gptq_triton.spec import BITS, QuantSpec
from tests.strategies import generator, random_weight, weights

SCALES = (torch.float16, torch.bfloat16, torch.float32)


@pytest.mark.parametrize("bits", BITS)
def test_tiles_are_a_bijection(bits):
    codes = torch.randint(0, 2**bits, (384, 80), generator=generator(bits), dtype=torch.uint8)
    words = tile(codes, bits)
    assert words.shape == (5, 3, 64 * bits)
    assert words.dtype == torch.int32
    assert torch.equal(untile(words, bits), codes)
    other = torch.randint(-(2**31), 2**31, words.shape, generator=generator(bits), dtype=torch.int64).to(torch.int32)
    assert torch.equal(tile(untile(other, bits), bits), other)


@pytest.mark.parametrize("bits", BITS)
def test_a_code_sits_where_the_drawing_says(bits):
    rng = generator(7)
    codes = torch.zeros(256, 32, dtype=torch.uint8)
    for _ in range(50):
        strip, step, s, hb, r8, g, t, i = (
            int(torch.randint(0, n, (), generator=rng)) for n in (2, 2, 4, 2, 2, 8, 4, 4)
        )  # fmt: skip
        codes.zero_()
        codes[128 * step + 32 * s + 16 * hb + 2 * t + (0, 8, 1, 9)[i], 16 * strip + 8 * r8 + g] = 2**bits - 1
        found = tile(codes, bits)[strip, step].view(torch.uint8)
        lane, register = 4 * g + t, 2 * hb + r8
        if bits == 8:
            place = {((s * 32 + lane) * 4 + register) * 4 + i: 255}
        elif bits == 4:
            place = {((s // 2 * 32 + lane) * 4 + 2 * (s % 2) + hb) * 4 + i: 15 << 4 * r8}
        elif bits == 2:
            place = {(lane * 4 + 2 * (s % 2) + hb) * 4 + i: 3 << 4 * (s // 2) + 2 * r8}
        else:
            r = 4 * (s % 2) + register
            first = (lane * 4 + 2 * (s // 2)) * 4 + i  # A, then B four bytes on
            last = 512 + (lane * 2 + s // 2) * 4 + i  # C
            place = {
                0: {first: 7}, 1: {first: 56}, 2: {first + 4: 7}, 3: {first + 4: 56}, 4: {last: 7}, 5: {last: 56},
                6: {first: 192, last: 64}, 7: {first + 4: 192, last: 128},
            }[r]  # fmt: skip
        assert {int(j): int(found[j]) for j in found.nonzero().flatten()} == place


@settings(deadline=None, max_examples=150)
@given(weights(300, 70, scale_dtypes=SCALES))
def test_a_weight_comes_back_bit_for_bit(weight):
    back = untile_weight(tile_weight(weight), weight.g_idx)
    for name in ("qweight", "scales", "qzeros"):
        assert torch.equal(getattr(back, name), getattr(weight, name)), name
    assert back.g_idx is weight.g_idx
    assert (back.K, back.spec, back.checkpoint_format) == (weight.K, weight.spec, weight.checkpoint_format)


def dequantized(weight: PackedWeight) -> torch.Tensor:
    """The weight (K, N) in float64, read from its tiles."""
    tiles = tile_weight(weight)
    codes = untile(tiles.words, weight.spec.bits).double()
    scales, zeros = unpack_meta(tiles.meta, tiles.scales, tiles.dtype)
    group = (torch.arange(len(codes)) // tiles.group_columns).clamp(max=len(scales) - 1)
    w = scales.double()[group] * (codes - zeros[group])
    if tiles.order is None:
        return w[: weight.K, : weight.N]
    assert len(tiles.order) == len(codes)
    real = tiles.order >= 0
    out = torch.full((weight.K, len(w[0])), float("nan"), dtype=torch.float64)
    out[tiles.order[real].long()] = w[real]
    return out[:, : weight.N]


@settings(deadline=None, max_examples=100)
@given(weights(300, 40, scale_dtypes=SCALES))
def test_tiles_mean_the_same_weight(weight):
    assert torch.equal(dequantized(weight), reference.dequantize(weight, torch.float64))


def test_groups_of_unequal_size_and_empty_groups():
    spec = QuantSpec(4, 32, desc_act=True)
    rng = generator(0)
    g_idx = torch.tensor([0] * 70 + [3] * 50 + [2] * 8, dtype=torch.int32)[torch.randperm(128, generator=rng)]
    weight = pack_weight(
        torch.randint(0, 16, (128, 20), generator=rng),
        torch.rand(4, 20, generator=rng).half() + 0.5,
        torch.randint(0, 16, (4, 20), generator=rng),
        g_idx,
        spec,
    )
    assert torch.equal(dequantized(weight), reference.dequantize(weight, torch.float64))
    back = untile_weight(tile_weight(weight), g_idx)
    assert torch.equal(back.scales, weight.scales)
    assert torch.equal(back.qzeros, weight.qzeros)


@pytest.mark.parametrize(
    ("K", "group_size", "act_order", "columns", "padded"),
    [
        (512, 128, False, 128, 512),
        (512, -1, False, ONE_GROUP, 512),
        (500, 128, False, 128, 512),
        (512, 32, False, 32, 512),
        (512, 128, True, 128, 512),
        (512, 32, True, 32, 512),
        (500, 100, False, 128, 640),
        (512, 512, True, 512, 512),
    ],
)
def test_padding_only_where_it_must_be(K, group_size, act_order, columns, padded):
    tiles = tile_weight(random_weight(K, 16, 4, group_size, act_order=act_order))
    assert (tiles.group_columns, tiles.steps * STEP) == (columns, padded)


@pytest.mark.parametrize("group_size", [32, 64, 100, 128, -1])
def test_every_step_has_all_its_rows_of_meta(group_size):
    tiles = tile_weight(random_weight(200, 16, 4, group_size))
    per_step = max(1, 128 // tiles.group_columns)
    assert len(tiles.meta) >= (1 if group_size == -1 else tiles.steps * per_step)


def test_scales_in_double_precision_are_refused():
    with pytest.raises(TypeError, match=r"scales must be float16, bfloat16 or float32 to be tiled, got torch\.float64"):
        tile_weight(random_weight(32, 16, 4, scale_dtype=torch.float64))


def test_codes_must_fill_whole_tiles():
    with pytest.raises(ValueError, match=r"codes must have a multiple of 128 rows and of 16 columns, got \(64, 16\)"):
        tile(torch.zeros(64, 16, dtype=torch.uint8), 4)


def test_zero_points_survive_every_format():
    for checkpoint_format in ("gptq", "gptq_v2"):
        weight = random_weight(64, 32, 3, 32, checkpoint_format=checkpoint_format)
        back = untile_weight(tile_weight(weight), None)
        for w in (weight, back):
            assert torch.equal(
                unpack_zeros(w.qzeros, 3, 32, checkpoint_format),
                unpack_zeros(weight.qzeros, 3, 32, checkpoint_format),
            )
        assert torch.equal(unpack(back.qweight, 3, 64), unpack(weight.qweight, 3, 64))
