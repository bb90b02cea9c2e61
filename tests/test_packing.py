"""int32 words: exact, clamped, any length."""

import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gptq_triton.packing import (
    PackedWeight,
    check_g_idx,
    pack,
    pack_weight,
    pack_zeros,
    storable,
    symmetric_format,
    trivial_g_idx,
    unpack,
    unpack_zeros,
    words,
    zero_offset,
)
from gptq_triton.reference import dequantize
from gptq_triton.spec import QuantSpec
from tests.vectors import CASES, load

widths = st.sampled_from([2, 3, 4, 8])


def codes_of(bits, length, columns, seed=0):
    return torch.randint(0, 2**bits, (length, columns), generator=torch.Generator().manual_seed(seed))


@given(bits=widths, length=st.integers(0, 100), columns=st.integers(0, 40), seed=st.integers(0, 9))
def test_unpack_inverts_pack(bits, length, columns, seed):
    codes = codes_of(bits, length, columns, seed)
    packed = pack(codes, bits)
    assert packed.dtype == torch.int32
    assert packed.shape == (words(length, bits), columns)
    assert torch.equal(unpack(packed, bits, length).long(), codes)


@given(bits=widths, length=st.integers(1, 100), seed=st.integers(0, 9))
def test_words_are_one_bit_stream(bits, length, seed):
    codes = codes_of(bits, length, 3, seed)
    for column in range(3):
        stream = sum(int(code) << (bits * j) for j, code in enumerate(codes[:, column]))
        got = sum((int(word) & 0xFFFFFFFF) << (32 * i) for i, word in enumerate(pack(codes, bits)[:, column]))
        assert got == stream


@given(bits=widths, wild=st.integers(-300, 600))
def test_a_wild_code_never_reaches_its_neighbours(bits, wild):  # trap 4
    codes = codes_of(bits, 64, 2)
    expected = codes.clone()
    codes[17, 0] = wild
    expected[17, 0] = min(max(wild, 0), 2**bits - 1)
    assert torch.equal(unpack(pack(codes, bits), bits, 64).long(), expected)


@given(bits=widths, N=st.integers(1, 70), G=st.integers(1, 5), label=st.sampled_from(["gptq", "gptq_v2"]))
def test_zero_points_survive_both_formats(bits, N, G, label):  # traps 1, 3, 13: zero included, never 2**bits
    zeros = codes_of(bits, G, N)
    zeros[0, 0] = 0
    before = zeros.clone()
    stored = pack_zeros(zeros, bits, label)
    assert stored.shape == (G, words(N, bits))
    assert torch.equal(unpack_zeros(stored, bits, N, label).long(), before)
    assert torch.equal(zeros, before)  # trap 7


def test_top_bit_does_not_smear():  # trap 3
    codes = torch.full((32, 1), 255)
    assert torch.equal(unpack(pack(codes, 8), 8, 32).long(), codes)


@pytest.mark.parametrize("case", CASES)
def test_vectors_unpack_and_pack_to_the_same_words(case):
    data = load(case)
    bits, (K, N) = data["bits"], data["weight"].t().shape
    codes = unpack(data["qweight"], bits, K)
    assert torch.equal(pack(codes, bits), data["qweight"])
    zeros = unpack_zeros(data["qzeros"], bits, N, "gptq")
    assert torch.equal(zeros.float(), data["zeros_nk"].t())
    assert torch.equal(pack_zeros(zeros, bits, "gptq"), data["qzeros"])


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_a_large_layer_packs_in_under_a_second(bits):
    codes = codes_of(bits, 14336, 4096).to(torch.uint8)

    def seconds():
        started = time.perf_counter()
        pack(codes, bits)
        return time.perf_counter() - started

    assert min(seconds() for _ in range(3)) < 1


@given(
    bits=widths,
    K=st.integers(1, 70),
    N=st.integers(1, 20),
    group=st.one_of(st.just(-1), st.integers(1, 80)),
    act_order=st.booleans(),
)
def test_dequantize_is_the_formula(bits, K, N, group, act_order):
    spec = QuantSpec(bits, group)
    G = spec.groups(K)
    generator = torch.Generator().manual_seed(K)
    codes, zeros = codes_of(bits, K, N), codes_of(bits, G, N, 1)
    scales = torch.rand(G, N, generator=generator) + 0.01
    g_idx = trivial_g_idx(K, group)
    if act_order:
        g_idx = g_idx[torch.randperm(K, generator=generator)]
    weight = pack_weight(codes, scales, zeros, g_idx if act_order else None, spec)
    rows = g_idx.long()
    expected = scales.double()[rows] * (codes - zeros[rows])
    assert torch.equal(dequantize(weight, torch.float64), expected)
    assert torch.equal(dequantize(weight), (scales[rows] * (codes - zeros[rows])))


def test_symmetric_zero_points_tell_their_format():  # trap 2
    spec = QuantSpec(4, 32)
    codes, scales = codes_of(4, 64, 16), torch.ones(2, 16)
    for label in ("gptq", "gptq_v2"):
        assert symmetric_format(pack_weight(codes, scales, torch.full((2, 16), 8), None, spec, label)) == label
    mixed = torch.full((2, 16), 8)
    mixed[1, 3] = 7
    assert symmetric_format(pack_weight(codes, scales, mixed, None, spec)) is None


def test_scales_are_stored_as_normal_numbers():  # trap 6
    stored = storable(torch.tensor([1e-9, 1.0]), torch.float16)
    assert stored.tolist() == [torch.finfo(torch.float16).tiny, 1.0]
    with pytest.raises(ValueError, match="finite"):
        storable(torch.tensor([1e9]), torch.float16)


def valid(**changes):
    spec = QuantSpec(4, 32)
    weight = pack_weight(codes_of(4, 64, 16), torch.ones(2, 16), torch.full((2, 16), 3), None, spec)
    fields = {name: getattr(weight, name) for name in ("qweight", "scales", "qzeros", "g_idx", "spec", "K")}
    return PackedWeight(**(fields | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"qweight": torch.zeros(8, 16)}, "qweight must be torch.int32"),
        ({"qweight": torch.zeros(7, 16, dtype=torch.int32)}, "qweight must have shape"),
        ({"scales": torch.ones(2, 15)}, "scales must have shape"),
        ({"scales": torch.ones(2, 16, dtype=torch.int32)}, "scales must be"),
        ({"qzeros": torch.zeros(2, 3, dtype=torch.int32)}, "qzeros must have shape"),
        ({"g_idx": torch.zeros(63, dtype=torch.int32)}, "g_idx must have shape"),
        ({"g_idx": torch.full((64,), 2, dtype=torch.int32)}, r"g_idx must lie in \[0, 1\]"),
        ({"g_idx": torch.full((64,), -1, dtype=torch.int32)}, r"g_idx must lie in \[0, 1\]"),
    ],
)
def test_validate_names_the_field_and_the_rule(changes, message):  # trap 8
    valid().validate()
    with pytest.raises(ValueError, match=message):
        valid(**changes).validate()


def test_refusals():
    with pytest.raises(ValueError, match="bits must be one of"):
        pack(torch.zeros(2, 2), 5)
    with pytest.raises(ValueError, match="matrix"):
        pack(torch.zeros(2), 4)
    with pytest.raises(ValueError, match="int32"):
        unpack(torch.zeros(2, 2), 4, 16)
    with pytest.raises(ValueError, match="words"):
        unpack(torch.zeros(2, 2, dtype=torch.int32), 4, 17)
    with pytest.raises(ValueError, match="checkpoint_format"):
        zero_offset("gptq_v3")
    with pytest.raises(ValueError, match="zeros must be integers"):
        pack_weight(codes_of(4, 8, 8), torch.ones(1, 8), torch.full((1, 8), 16), None, QuantSpec(4, -1))
    check_g_idx(torch.zeros(0, dtype=torch.int32), 0, 0)


@pytest.mark.parametrize(
    ("fields", "error"),
    [
        ({"bits": 5}, ValueError),
        ({"bits": 4.0}, TypeError),
        ({"bits": True}, TypeError),
        ({"bits": 4, "group_size": 0}, ValueError),
        ({"bits": 4, "group_size": -2}, ValueError),
        ({"bits": 4, "group_size": "128"}, TypeError),
    ],
)
def test_spec_refuses(fields, error):
    with pytest.raises(error):
        QuantSpec(**fields)


@given(K=st.integers(1, 500), group=st.one_of(st.just(-1), st.integers(1, 600)))
def test_groups_cover_every_row_once(K, group):  # trap 9
    spec = QuantSpec(4, group)
    g_idx = trivial_g_idx(K, group)
    assert int(g_idx[-1]) == spec.groups(K) - 1
    assert g_idx.unique().numel() == spec.groups(K)
