"""What the tensors of one layer show, whatever is claimed about them."""

import dataclasses
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gptq_triton import QuantizeConfig
from gptq_triton.dialects import detect, load_packed
from gptq_triton.findings import Claim
from gptq_triton.packing import pack_zeros, trivial_g_idx, unpack_zeros
from gptq_triton.parts import LayerParts, layer_parts
from gptq_triton.reference import dequantize
from gptq_triton.samples import random_weight
from gptq_triton.spec import BITS, QuantSpec
from gptq_triton.tensorfile import Entry
from gptq_triton.zeros import (
    FORMS,
    WORD_OFFSETS,
    convert_zeros,
    decode_zeros,
    overwritten_fields,
    recover_words,
    symmetric_form,
    wrapped_fields,
)


class Memory:
    """Tensors as an open file."""

    def __init__(self, tensors):
        self.tensors, self.path, self.metadata = tensors, Path("memory"), {}
        self.entries = {key: Entry(tensor.dtype, tuple(tensor.shape)) for key, tensor in tensors.items()}

    def read(self, name):
        return self.tensors[name]

    def rows(self, name, start, stop):
        return self.tensors[name][start:stop]


def parts(weight, g_idx="own", **others):
    tensors = {name: getattr(weight, name) for name in ("qweight", "qzeros", "scales")} | others
    rows = weight.g_idx if weight.g_idx is not None else trivial_g_idx(weight.K, weight.spec.group_size)
    if g_idx is not None:
        tensors["g_idx"] = rows if isinstance(g_idx, str) else g_idx
    file = Memory({f"x.{name}": tensor for name, tensor in tensors.items()})
    return LayerParts(dict.fromkeys(file.entries, file), "x")


def as_words(qzeros, bits):
    """v2 zero points as GPTQModel's v1 stores them."""
    constants = torch.tensor(WORD_OFFSETS[bits]).repeat(qzeros.shape[1])[: qzeros.shape[1]]
    return (qzeros.long() - constants).to(torch.int32)


# zero points


@given(
    bits=st.sampled_from(BITS), seed=st.integers(0, 99), old=st.sampled_from(FORMS), new=st.sampled_from(["v1", "v2"])
)
def test_every_form_holds_every_zero_point(bits, seed, old, new):
    zeros = torch.randint(0, 2**bits, (3, 64), generator=torch.Generator().manual_seed(seed))
    v2 = pack_zeros(zeros, bits, "gptq_v2")
    stored = {"v1": pack_zeros(zeros, bits, "gptq"), "v2": v2, "v1-words": as_words(v2, bits)}
    before = stored[old].clone()
    assert torch.equal(decode_zeros(stored[old], bits, 64, old).long(), zeros)
    assert torch.equal(convert_zeros(stored[old], bits, 64, old, new), stored[new])
    assert torch.equal(stored[old], before)
    assert torch.equal(recover_words(stored["v1-words"], bits), v2)
    assert wrapped_fields(stored["v1"], bits, 64) == int((zeros == 0).sum())
    with pytest.raises(ValueError, match="zero points are written as one of"):
        convert_zeros(v2, bits, 64, "v2", "v1-words")


@pytest.mark.parametrize("bits", BITS)
def test_only_middle_zero_points_prove_a_form(bits):
    middle = torch.full((2, 64), 2 ** (bits - 1))
    v2 = pack_zeros(middle, bits, "gptq_v2")
    assert symmetric_form(v2, bits, 64) == "v2"
    assert symmetric_form(pack_zeros(middle, bits, "gptq"), bits, 64) == "v1"
    assert symmetric_form(as_words(v2, bits), bits, 64) == ("v1-words" if bits == 3 else "v1")
    middle[1, 7] += 1
    assert symmetric_form(pack_zeros(middle, bits, "gptq_v2"), bits, 64) is None
    assert symmetric_form(torch.zeros(0, 64, dtype=torch.int32), bits, 64) is None


@pytest.mark.parametrize("bits", BITS)
def test_overwritten_words(bits):
    """All ones from a zero point of 0 to the top of its word; one that is not shows a sound writer."""
    zeros = torch.full((1, 64), 2)
    zeros[0, 1] = 0
    sound = pack_zeros(zeros, bits, "gptq")
    assert overwritten_fields(sound, bits, 64) == 0
    fields = unpack_zeros(sound, bits, 64, "gptq_v2").long()
    top = {2: 16, 3: 10, 4: 8, 8: 4}[bits]  # whole fields of the first word
    fields[0, 1:top] = 2**bits - 1
    assert overwritten_fields(pack_zeros(fields, bits, "gptq_v2"), bits, 64) == top - 2
    fields[0, 33] = 2**bits - 1
    assert overwritten_fields(pack_zeros(fields, bits, "gptq_v2"), bits, 64) == 0


# layouts


@given(
    bits=st.sampled_from(BITS),
    size=st.sampled_from([(64, 32), (192, 64), (96, 96)]),
    group=st.sampled_from([-1, 16, 32, 64, 128]),
    act_order=st.booleans(),
    claimed=st.sampled_from(BITS),
    claimed_group=st.sampled_from([-1, 16, 32, 64, 128]),
    with_g_idx=st.booleans(),
    known=st.booleans(),
)
def test_the_tensors_outweigh_the_claim(bits, size, group, act_order, claimed, claimed_group, with_g_idx, known):
    (K, N), with_g_idx = size, with_g_idx or act_order
    weight = random_weight(K, N, bits, group, act_order=act_order, checkpoint_format="gptq_v2")
    part = parts(weight, "own" if with_g_idx else None)
    claim = Claim(claimed, claimed_group, False, "gptq_v2")
    shape = (N, K) if known else None
    G = weight.spec.groups(K)
    doubtful = (K, group) in ((192, 128), (96, 64))  # two groups: 96 + 96 or 128 + 64, 48 + 48 or 64 + 32
    if not with_g_idx and doubtful and QuantSpec(8, claimed_group).groups(K) != G:
        with pytest.raises(ValueError, match="2 groups for"):
            detect(part, claim, shape=shape)
        return
    layout = detect(part, claim, shape=shape)
    assert (layout.bits, layout.K, layout.N) == (bits, K, N)
    found, bias = load_packed(layout, part)
    assert bias is None
    assert torch.equal(dequantize(found, torch.float64), dequantize(weight, torch.float64))
    assert any("bits" in f.text for f in layout.findings) == (bits != claimed)
    assert all(f.repair == "lossless" for f in layout.findings if f.kind == "config")


def test_an_unset_g_idx_means_groups_in_order():
    weight = random_weight(128, 32, 4, 32, checkpoint_format="gptq_v2")
    part = parts(weight, torch.zeros(128, dtype=torch.int64))
    layout = detect(part, Claim(4, 32, False, "gptq_v2"))
    assert [(f.kind, f.repair) for f in layout.findings] == [("g_idx", "lossless")]
    assert torch.equal(dequantize(load_packed(layout, part)[0]), dequantize(weight))
    one = random_weight(128, 32, 4, -1, sym=True)  # where 0 is the only group, nothing is odd
    assert not detect(parts(one), Claim(4, -1, False)).findings


@pytest.mark.parametrize("quantizer", [["gptqmodel:5.4.0"], "GPTQModel:1.0", ["other", "gptqmodel"]])
def test_the_writer_decides_how_v1_is_read(quantizer):
    config = QuantizeConfig(4, 32, sym=False, checkpoint_format="gptq", extra={"meta": {"quantizer": quantizer}})
    weight = random_weight(64, 32, 4, 32, checkpoint_format="gptq_v2", seed=3)
    part = parts(dataclasses.replace(weight, qzeros=as_words(weight.qzeros, 4)))
    layout = detect(part, Claim.of(config, "x"))
    found, _ = load_packed(layout, part)
    assert torch.equal(dequantize(found), dequantize(weight))
    assert (layout.zeros, layout.evidence, layout.findings) == ("v1-words", "writer", ())
    for other in (None, 5, [5], "auto_gptq:0.7"):
        config = dataclasses.replace(config, extra={"meta": {"quantizer": other}})
        assert detect(part, Claim.of(config, "x")).zeros == "v1"


def test_what_the_user_says_wins():
    weight = random_weight(64, 32, 4, 32, sym=True, checkpoint_format="gptq")
    layout = detect(parts(weight), Claim(4, 32, True, "gptq"), zero_points="v2")
    assert (layout.zeros, layout.evidence) == ("v2", "user")
    with pytest.raises(ValueError, match=r"zero_points must be one of .*, got 'v3'"):
        detect(parts(weight), Claim(), zero_points="v3")


def test_a_symmetric_claim_that_is_not_true():
    weight = random_weight(64, 32, 4, 32, checkpoint_format="gptq_v2")
    layout = detect(parts(weight), Claim(4, 32, True, "gptq_v2"))
    assert ["not all in the middle" in f.text for f in layout.findings] == [True]
    assert not detect(parts(weight), Claim(4, 32, None, "gptq_v2")).findings


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"qweight": torch.zeros(8, 0, dtype=torch.int32)}, r"qweight must not be empty, got shape \(8, 0\)"),
        ({"qweight": torch.zeros(5, 32, dtype=torch.int32)}, "5 rows of qweight and 4 columns of qzeros fit no width"),
        ({"qweight": torch.zeros(8, 32)}, "qweight must be torch.int32, got torch.float32"),
        ({"g_idx": torch.zeros(8, 8, dtype=torch.int32)}, r"g_idx must be a vector, got shape \(8, 8\)"),
        ({"g_idx": torch.zeros(64)}, "g_idx must be torch.int32 or torch.int64, got torch.float32"),
        ({"bias": torch.zeros(5)}, r"bias must have shape \(32,\), got \(5,\)"),
        ({"scales": torch.full((2, 32), float("inf"))}, "scales must be finite, got NaN or infinity"),
        ({"bias": torch.full((32,), float("nan"))}, "bias must be finite, got NaN or infinity"),
        ({"scales": torch.ones(3, 32)}, r"scales must have shape \(2, 32\), got \(3, 32\)"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    weight = random_weight(64, 32, 4, 32)
    part = parts(weight, **change)
    with pytest.raises(ValueError, match=message):
        load_packed(detect(part, Claim(4, 32, False)), part)


def test_group_sizes_that_cannot_be_told():
    weight = random_weight(192, 32, 4, 128)  # 2 groups: 128 + 64, or 96 + 96
    assert detect(parts(weight), Claim(4, 32, False)).group_size == 128  # g_idx says
    assert detect(parts(weight, None), Claim(4, 128, False)).group_size == 128  # the config says
    with pytest.raises(ValueError, match=r"2 groups for 192 inputs, which the sizes \[96, 128\] would"):
        detect(parts(weight, None), Claim(4, 32, False))
    weight = random_weight(67, 32, 8, 10)  # 7 groups
    with pytest.raises(ValueError, match=r"7 groups for .* inputs, which no size would give$"):
        detect(parts(weight, None), Claim())


def test_no_layers():
    with pytest.raises(ValueError, match="the checkpoint holds no quantized layers"):
        layer_parts({})
