"""The fourteen traps of the GPTQ formats. Each test holds the naive implementation that falls into its trap, shows
that it does, and that this package does not; docs/traps.md is the table."""

import json
import logging
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from gptq_triton import (
    QuantizeConfig,
    Quantizer,
    QuantLinear,
    convert_checkpoint,
    inspect_checkpoint,
    load_quantized,
    quantize_model,
    save_quantized,
)
from gptq_triton.packing import check_g_idx, pack, pack_zeros, trivial_g_idx, unpack, unpack_zeros
from gptq_triton.reference import dequantize
from gptq_triton.samples import random_weight
from gptq_triton.zeros import WORD_OFFSETS, decode_zeros
from tests.tiny import batches, tiny

Q_PROJ = "model.layers.0.self_attn.q_proj"
WEIGHTS = "model.safetensors"


@pytest.fixture
def folder(tmp_path):
    """An asymmetric 4-bit Llama, v2, every group with some zero points of 0, and the weights it stands for."""
    model = tiny("llama")
    quantize_model(model, batches(1), QuantizeConfig(4, 32, sym=False), method="rtn", progress=False)
    for layer in layers(model).values():
        zeros = unpack_zeros(layer.qzeros, 4, layer.outfeatures, "gptq_v2")
        zeros[:, ::5] = 0
        layer.qzeros = pack_zeros(zeros, 4, "gptq_v2")
    save_quantized(model, tmp_path / "m")
    return tmp_path / "m"


def layers(model) -> dict[str, Any]:
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantLinear)}


def weights(model):
    return {name: layer.dequantize(torch.float64) for name, layer in layers(model).items()}


def same(found, expected):
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)


def rewrite(folder, change, **fields):
    """Change every qzeros of a folder, and the config beside it."""
    tensors = load_file(folder / WEIGHTS)
    for key in [key for key in tensors if key.endswith("qzeros")]:
        tensors[key] = change(tensors[key])
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    for name in ("config.json", "quantize_config.json"):
        content = json.loads((folder / name).read_text())
        content.get("quantization_config", content).update(fields)
        (folder / name).write_text(json.dumps(content))


def by_field(words):
    """v2 to v1 as this package and some others write it: each field wraps inside itself."""
    return pack_zeros(unpack_zeros(words, 4, words.shape[1] * 8, "gptq_v2"), 4, "gptq")


def by_word(words):
    """v2 to v1 as GPTQModel writes it."""
    return words - 0x11111111


def as_autogptq(words):
    """v2 to v1 as AutoGPTQ writes it: unsigned, so that 0 - 1 is all ones, shifted and ORed over what is above."""
    zeros = unpack_zeros(words, 4, words.shape[1] * 8, "gptq_v2").numpy().astype(np.uint32) - np.uint32(1)
    out = np.zeros(words.shape, dtype=np.uint32)
    for j in range(8):
        out |= zeros[:, j::8] << np.uint32(4 * j)
    return torch.from_numpy(out.view(np.int32).copy())


# 1: v1 has several ways to store a zero point of 0


def test_trap_01_each_writers_zero_points_of_0(folder, caplog):
    expected = weights(load_quantized(folder))
    v2 = load_file(folder / WEIGHTS)[f"{Q_PROJ}.qzeros"]
    naive = unpack_zeros(by_word(v2), 4, 64, "gptq")  # reads every v1 field by itself
    assert not torch.equal(naive, unpack_zeros(v2, 4, 64, "gptq_v2"))

    rewrite(folder, by_word, checkpoint_format="gptq", meta={"quantizer": ["gptqmodel:5.4.0"]})
    assert {(layer.dialect, layer.evidence) for layer in inspect_checkpoint(folder).layers} == {("v1-words", "writer")}
    assert same(weights(load_quantized(folder)), expected)
    rewrite(folder, lambda words: by_field(words + 0x11111111), meta={"quantizer": ["somebody:1"]})
    with caplog.at_level(logging.WARNING):
        assert same(weights(load_quantized(folder)), expected)
    assert "13 more: " in caplog.text
    assert "zero points of 0, which v1 writers store in different ways" in caplog.text


def test_trap_01_what_autogptq_overwrote_is_called_lost(folder, tmp_path):
    expected = weights(load_quantized(folder))
    rewrite(folder, as_autogptq, checkpoint_format="gptq")
    assert not same(weights(load_quantized(folder)), expected)  # nothing recovers it
    findings = inspect_checkpoint(folder).findings
    assert {(f.kind, f.repair) for f in findings} == {("zeros", "lost")}
    assert len(findings) == 14
    with pytest.raises(ValueError, match=r"information is lost already: 14 layers \(model\.layers\.0\.mlp\.down_proj"):
        convert_checkpoint(folder, tmp_path / "out", "v2", repair=True)
    assert not (tmp_path / "out").exists()


def test_trap_01_a_zero_point_of_0_is_never_written_as_v1(folder, tmp_path, caplog):
    model = load_quantized(folder)
    expected = weights(model)
    for name, layer in layers(model).items():
        weight = layer.weight_packed
        v1 = QuantLinear.from_packed(
            type(weight)(weight.qweight, weight.scales, by_field(weight.qzeros), None, weight.spec, weight.K, "gptq")
        )
        model.set_submodule(name, v1)
    model.config.quantization_config["checkpoint_format"] = "gptq"
    with caplog.at_level(logging.WARNING):
        save_quantized(model, tmp_path / "out")
    assert "zero points of 0, for which v1 has no agreed form; all are written as v2" in caplog.text
    assert inspect_checkpoint(tmp_path / "out").checkpoint_format == "gptq_v2"
    assert same(weights(load_quantized(tmp_path / "out")), expected)


# 2: a wrong label


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(("stored", "label"), [("gptq_v2", "gptq"), ("gptq", "gptq_v2")])
def test_trap_02_symmetric_tensors_outweigh_the_label(tmp_path, bits, stored, label, caplog):
    model = tiny("llama")
    config = QuantizeConfig(bits, 32, checkpoint_format=stored)
    quantize_model(model, batches(1), config, method="rtn", progress=False)
    save_quantized(model, tmp_path / "m")
    rewrite(tmp_path / "m", lambda words: words, checkpoint_format=label)
    words = load_file(tmp_path / "m" / WEIGHTS)[f"{Q_PROJ}.qzeros"]
    naive = unpack_zeros(words, bits, 64, label)  # believes the label
    assert (naive != 2 ** (bits - 1)).all()
    with caplog.at_level(logging.WARNING):
        loaded = load_quantized(tmp_path / "m")
    assert f"labelled {label!r}, but its zero points are stored as" in caplog.text
    assert same(weights(loaded), weights(model))


def test_trap_02_three_bit_words_of_old_gptqmodel(tmp_path):
    """Its constants for 3 bits are not a row of ones; for symmetric layers the words prove it."""
    model = tiny("llama")
    quantize_model(model, batches(1), QuantizeConfig(3, 32, checkpoint_format="gptq_v2"), method="rtn", progress=False)
    save_quantized(model, tmp_path / "m")
    constants = torch.tensor(WORD_OFFSETS[3])
    rewrite(
        tmp_path / "m",
        lambda words: (words.long() - constants.repeat(words.shape[1] // 3)).to(torch.int32),
        checkpoint_format="gptq",
    )
    words = load_file(tmp_path / "m" / WEIGHTS)[f"{Q_PROJ}.qzeros"]
    assert (unpack_zeros(words, 3, 64, "gptq") != 4).any()  # the naive reading
    assert {layer.dialect for layer in inspect_checkpoint(tmp_path / "m").layers} == {"v1-words"}
    assert same(weights(load_quantized(tmp_path / "m")), weights(model))


# 3: the sign of a word


def test_trap_03_shifts_do_not_copy_the_sign():
    zeros = torch.tensor([[0, 127, 128, 255, 200, 1, 129, 64]])
    words = pack_zeros(zeros, 8, "gptq_v2")
    fields = torch.stack([words >> (8 * j) for j in range(4)], -1).flatten(1)
    assert (fields != zeros).any()  # int32 >> copies the sign into the bits above
    assert ((fields.to(torch.int8) + 1) & 0x0F)[0, 1] == 0  # 127 + 1 in the 4-bit formula of an 8-bit reader
    assert torch.equal(unpack_zeros(words, 8, 8, "gptq_v2").long(), zeros)
    assert torch.equal(unpack_zeros(pack_zeros(zeros, 8, "gptq"), 8, 8, "gptq").long(), zeros)


# 4: packing without a clamp


@pytest.mark.parametrize("wild", [16, -1])
def test_trap_04_a_wild_code_stays_in_its_field(wild):
    codes = torch.full((8, 1), 4)
    codes[3] = wild
    naive = torch.zeros(1, 1, dtype=torch.int32)
    for j in range(8):
        naive |= (codes[j] << (4 * j)).to(torch.int32)
    others = [j for j in range(8) if j != 3]
    assert (unpack(naive, 4, 8)[others] != 4).any()
    assert (unpack(pack(codes, 4), 4, 8)[others] == 4).all()


# 5: symmetric rows without negative values


def test_trap_05_positive_rows_are_not_clipped():
    row = torch.linspace(0.1, 1, 16)[None]
    scale, zero = row.max() / 15, 8  # the original: the scale spans [0, max], the zero point stays in the middle
    naive = scale * ((torch.round(row / scale) + zero).clamp(0, 15) - zero)
    assert (naive - row).abs().max() > 0.4
    quantizer = Quantizer()
    quantizer.configure(4, perchannel=True, sym=True)
    quantizer.find_params(row, weight=True)
    assert (quantizer.quantize(row) - row).abs().max() <= quantizer.scale.max()


# 6: scales that underflow


def test_trap_06_scales_never_become_0():
    weight = torch.full((1, 32), 1e-7)
    naive = (weight.abs().amax() * 2 / 15).half()
    assert naive == 0  # and weight / 0 is an infinite code
    model = tiny("llama")
    with torch.no_grad():
        model.get_submodule(Q_PROJ).weight.copy_(weight.repeat(64, 2))
    quantize_model(model, batches(1), QuantizeConfig(4, 32), method="rtn", progress=False)
    layer: Any = model.get_submodule(Q_PROJ)
    assert layer.scales.dtype == torch.float16
    assert (layer.scales >= torch.finfo(torch.float16).tiny).all()
    assert torch.isfinite(layer.dequantize()).all()


# 7: arguments changed in place


def test_trap_07_zeros_of_one_group_are_not_changed():
    zeros = torch.full((16, 1), 3)
    naive = zeros.clone()
    view = naive.t().contiguous()  # of one group: the same memory
    view -= 1
    assert (naive == 2).all()
    pack_zeros(zeros.t(), 4, "gptq")
    linear, layer = nn.Linear(32, 16), QuantLinear(4, -1, 32, 16)
    layer.pack(linear, torch.ones(16, 1), zeros)
    assert (zeros == 3).all()


# 8: g_idx out of range


@pytest.mark.parametrize("wrong", [2, -1, 2**31 - 1, -(2**31)])
def test_trap_08_g_idx_is_checked_before_anything_reads_by_it(folder, wrong):
    scales = torch.ones(2, 64)
    if wrong == -1:
        assert torch.equal(scales[torch.tensor([wrong])], scales[1:])  # a naive reader takes the last group
    tensors = load_file(folder / WEIGHTS)
    tensors[f"{Q_PROJ}.g_idx"][7] = wrong
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=rf"model\.safetensors: {Q_PROJ}: g_idx must lie in \[0, 1\] for 2 groups"):
        load_quantized(folder)
    with pytest.raises(ValueError, match="g_idx must lie in"):
        check_g_idx(torch.tensor([0, wrong], dtype=torch.int32), 2, 2)


# 9: shapes that do not divide


def test_trap_09_a_last_short_group():
    weight = random_weight(192, 32, 4, 128)
    naive_groups = 192 // 128
    assert weight.scales.shape[0] == 2 != naive_groups
    codes, zeros = unpack(weight.qweight, 4, 192).long(), unpack_zeros(weight.qzeros, 4, 32, "gptq").long()
    rows = trivial_g_idx(192, 128).long()
    assert rows[-1] == 1
    expected = weight.scales.double()[rows] * (codes - zeros[rows])
    assert torch.equal(dequantize(weight, torch.float64), expected)


@pytest.mark.parametrize(("bits", "K", "N"), [(4, 64, 100), (3, 64, 40), (3, 40, 64)])
def test_trap_09_what_no_file_can_hold_is_refused(tmp_path, bits, K, N):
    model = tiny("llama")
    quantize_model(model, batches(1), QuantizeConfig(4, 32), method="rtn", progress=False)
    layer = QuantLinear(bits, 32, K, N)
    assert N * bits // 32 * 32 // bits < N or K * bits // 32 * 32 // bits < K  # the naive word count loses some
    model.model.layers[0].mlp.up_proj = layer
    with pytest.raises(ValueError, match="which do not fill whole words"):
        save_quantized(model, tmp_path / "m")
    assert not list(tmp_path.iterdir())
    assert layer(torch.ones(1, K)).shape == (1, N)  # in memory it works


# 10: desc_act where groups are in order


def test_trap_10_desc_act_is_false_where_groups_are_in_order(tmp_path):
    model = tiny("llama")
    config = QuantizeConfig(4, 32, desc_act=True, static_groups=True)
    quantize_model(model, batches(4), config, progress=False)
    save_quantized(model, tmp_path / "m")
    written = json.loads((tmp_path / "m" / "config.json").read_text())["quantization_config"]
    naive = config.desc_act
    assert naive is True
    assert written["desc_act"] is False
    rewrite(tmp_path / "m", lambda words: words, desc_act=True)  # as others write it
    found = inspect_checkpoint(tmp_path / "m").findings
    assert [(f.kind, f.repair) for f in found] == [("g_idx", "lossless")]
    convert_checkpoint(tmp_path / "m", tmp_path / "mended", "v1", repair=True)
    assert not inspect_checkpoint(tmp_path / "mended").findings


# 11: a config without checkpoint_format


def test_trap_11_the_models_own_save_says_its_format(tmp_path, caplog):
    model = tiny("llama")
    quantize_model(model, batches(1), QuantizeConfig(4, 32, sym=False), method="rtn", progress=False)
    model.save_pretrained(tmp_path / "m")
    fields = json.loads((tmp_path / "m" / "config.json").read_text())["quantization_config"]
    assert fields["checkpoint_format"] == "gptq_v2"
    assert same(weights(load_quantized(tmp_path / "m")), weights(model))
    del fields["checkpoint_format"]  # the naive writer
    assert QuantizeConfig.from_dict(fields).checkpoint_format == "gptq"  # the naive reading of it, off by one
    content = json.loads((tmp_path / "m" / "config.json").read_text()) | {"quantization_config": fields}
    (tmp_path / "m" / "config.json").write_text(json.dumps(content))
    texts = [f.text for f in inspect_checkpoint(tmp_path / "m").findings]
    assert any("no checkpoint_format is given" in text for text in texts)
    assert any("they are probably stored as v2, whatever the label says" in text for text in texts)
    with caplog.at_level(logging.WARNING):
        assert not same(weights(load_quantized(tmp_path / "m")), weights(model))
    assert "asymmetric layers lie -1.0" in caplog.text
    assert same(weights(load_quantized(tmp_path / "m", zero_points="v2")), weights(model))


# 12: a bias of zeros


def test_trap_12_a_bias_of_zeros_is_kept():
    layer = QuantLinear(4, 32, 64, 32, bias=True)
    naive = {name: tensor for name, tensor in layer.state_dict().items() if tensor.any()}
    assert "bias" not in naive
    assert torch.equal(layer.state_dict()["bias"], torch.zeros(32))
    twin = QuantLinear(4, 32, 64, 32)
    twin.load_state_dict(layer.state_dict())
    assert torch.equal(twin.state_dict()["bias"], torch.zeros(32))


# 13: a zero point beyond its range


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_trap_13_a_wrapped_field_is_0_and_never_2_to_the_bits(bits):
    zeros = torch.randint(1, 2**bits, (2, 64), generator=torch.Generator().manual_seed(0))
    zeros[:, 1::9] = 0
    words = pack_zeros(zeros, bits, "gptq")
    naive = unpack_zeros(words, bits, 64, "gptq_v2").int() + 1  # without the mask
    assert (naive == 2**bits).sum() == (zeros == 0).sum()
    assert torch.equal(decode_zeros(words, bits, 64, "v1").long(), zeros)


def test_trap_13_it_is_a_finding(folder):
    rewrite(folder, by_field, checkpoint_format="gptq")
    findings = [f for f in inspect_checkpoint(folder).findings if f.layer]
    assert len(findings) == 14
    assert all("naive readers take for 16" in f.text for f in findings)


# 14: fields that a load and a save lose


def test_trap_14_every_field_survives_and_the_tensors_outlive_the_rules(tmp_path):
    from transformers import GPTQConfig

    rules = {r"-:.*\.o_proj": {}, r"+:.*down_proj": {"bits": 8, "group_size": 64}}
    model = tiny("llama")
    config = QuantizeConfig(4, 32, dynamic=rules, extra={"mine": {"a": [None, 1]}})
    quantize_model(model, batches(1), config, method="rtn", progress=False)
    save_quantized(model, tmp_path / "m")
    fields = json.loads((tmp_path / "m" / "quantize_config.json").read_text())
    naive = GPTQConfig.from_dict(dict(fields)).to_dict()
    assert naive.get("dynamic") != fields["dynamic"]
    save_quantized(load_quantized(tmp_path / "m"), tmp_path / "again")
    assert json.loads((tmp_path / "again" / "quantize_config.json").read_text()) == fields

    rewrite(tmp_path / "m", lambda words: words, dynamic={})  # what a load and a save elsewhere leave
    loaded = load_quantized(tmp_path / "m")
    assert same(weights(loaded), weights(model))
    assert loaded.config.quantization_config["dynamic"]
    save_quantized(loaded, tmp_path / "mended")
    assert not inspect_checkpoint(tmp_path / "mended").findings
    convert_checkpoint(tmp_path / "m", tmp_path / "converted", "v2", repair=True)
    assert not inspect_checkpoint(tmp_path / "converted").findings
    assert same(weights(load_quantized(tmp_path / "converted")), weights(model))
