"""What inspect finds, counts, compares and draws."""

import dataclasses
import json
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from gptq_triton import QuantizeConfig, QuantLinear, inspect_checkpoint, quantize_model, save_quantized
from gptq_triton.cli import main
from gptq_triton.health import count_codes, sample_centre
from gptq_triton.packing import pack, unpack
from gptq_triton.reference import dequantize
from gptq_triton.report import as_text
from gptq_triton.samples import random_weight
from gptq_triton.spec import BITS
from tests.test_dialects import parts
from tests.tiny import batches, tiny

WEIGHTS = "model.safetensors"
Q_PROJ = "model.layers.0.self_attn.q_proj"
UP_PROJ = "model.layers.1.mlp.up_proj"


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """``full`` and ``small``, the same model with and without quantization, and ``model``."""
    home = tmp_path_factory.mktemp("inspection")
    model = tiny("llama")
    model.save_pretrained(home / "full")
    quantize_model(model, batches(2), QuantizeConfig(4, 32, sym=False), method="rtn", progress=False)
    save_quantized(model, home / "small")
    return home


@pytest.fixture
def change(home, tmp_path):
    """Write a copy of ``small`` with one tensor changed; returns what is found."""

    def change(key, edit):
        tensors = load_file(home / "small" / WEIGHTS)
        tensors[key] = edit(tensors[key])
        folder = tmp_path / "changed"
        folder.mkdir(exist_ok=True)
        for name in ("config.json", "quantize_config.json"):
            (folder / name).write_text((home / "small" / name).read_text())
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
        return inspect_checkpoint(folder).findings

    return change


@given(bits=st.sampled_from(BITS), runs=st.integers(1, 4), columns=st.integers(1, 9), seed=st.integers(0, 99))
def test_codes_are_counted_as_they_are(bits, runs, columns, seed):
    codes = torch.randint(0, 2**bits, (32 * runs, columns), generator=torch.Generator().manual_seed(seed))
    expected = np.bincount(codes.flatten().numpy(), minlength=2**bits)
    assert np.array_equal(count_codes(pack(codes, bits), bits), expected)


@pytest.mark.parametrize("K", [40, 64, 100])
@pytest.mark.parametrize("bits", BITS)
def test_the_centre_of_ragged_layers(bits, K):
    from gptq_triton.dialects import detect
    from gptq_triton.findings import Claim
    from gptq_triton.health import examine

    weight = random_weight(K, 32, bits, 16, checkpoint_format="gptq_v2")
    part = parts(weight)
    layout = detect(part, Claim(bits, 16, False, "gptq_v2"))
    codes = unpack(weight.qweight, bits, K).double()
    ones = dataclasses.replace(weight, scales=torch.ones_like(weight.scales))
    expected = float(dequantize(ones, torch.float64).mean())
    health = examine(part, layout)
    assert health.centre == pytest.approx(expected, abs=1e-9)
    assert sample_centre(part, layout) == pytest.approx(expected, abs=1e-9)
    ends = max((codes == 0).double().mean(), (codes == 2**bits - 1).double().mean())
    assert health.saturated == pytest.approx(float(ends))
    assert health.counts.sum() == K * 32


def test_a_sound_checkpoint_has_no_findings(home):
    found = inspect_checkpoint(home / "small")
    assert found.findings == []
    assert sum(found.scale_histogram) == sum(layer.in_features // 32 * layer.out_features for layer in found.layers)
    scales = load_file(home / "small" / WEIGHTS)[f"{Q_PROJ}.scales"]
    layer = next(layer for layer in found.layers if layer.name == Q_PROJ)
    assert (layer.scale_min, layer.scale_max) == (float(scales.min()), float(scales.max()))
    assert abs(layer.centre) < 0.25
    assert layer.error is None
    assert "nothing suspicious was found" in as_text(found)


def set_first(value, count=3):
    def edit(tensor):
        tensor = tensor.clone()
        tensor.flatten()[:count] = value
        return tensor

    return edit


@pytest.mark.parametrize(
    ("key", "edit", "text", "repair"),
    [
        ("scales", set_first(0.0), "3 of 128 scales are 0: their weights are all 0", ""),
        ("scales", set_first(float("nan")), "3 of 128 scales are NaN or infinite: the layer cannot be loaded", "lost"),
        ("scales", set_first(-0.5), "3 of 128 scales are negative, which no quantizer makes", ""),
        ("scales", set_first(1e-6), "3 of 128 scales are below the smallest normal number of torch.float16", ""),
        ("qweight", lambda t: t * 0, "100% of the codes are 0, the end of their range (at most 46% is usual)", ""),
        ("qweight", lambda t: t * 0 - 1, "100% of the codes are 15, the end of their range", ""),
        ("g_idx", set_first(1, 10), "g_idx gives groups of 22 to 42 inputs, not of 32", ""),
    ],
)
def test_suspicious_numbers(change, key, edit, text, repair):
    found = [f for f in change(f"{Q_PROJ}.{key}", edit) if f.layer]
    assert [(f.layer, f.kind, f.repair) for f in found] == [(Q_PROJ, {"qweight": "codes"}.get(key, key), repair)]
    assert text in found[0].text


def test_act_order_that_the_config_denies(change):
    found = change(f"{Q_PROJ}.g_idx", lambda rows: rows.flip(0))
    assert [(f.layer, f.kind, f.repair) for f in found] == [("", "g_idx", "lossless")]
    assert "desc_act is false, but g_idx of 1 layers is not in order" in found[0].text


def test_config_files_that_disagree(home, tmp_path):
    folder = tmp_path / "m"
    folder.mkdir()
    for path in (home / "small").iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    content = json.loads((folder / "quantize_config.json").read_text())
    (folder / "quantize_config.json").write_text(json.dumps(content | {"bits": 3, "sym": True}))
    assert [f.text for f in inspect_checkpoint(folder).findings] == [
        "quantize_config.json and config.json disagree about bits, sym; the latter counts"
    ]


# beside a full-precision model


def test_errors_against_the_full_model(home):
    found = inspect_checkpoint(home / "small", against=home / "full")
    full, tensors = load_file(home / "full" / WEIGHTS), load_file(home / "small" / WEIGHTS)
    assert found.findings == []
    for layer in found.layers:
        own = QuantLinear(4, 32, layer.in_features, layer.out_features, checkpoint_format="gptq_v2")
        own.load_state_dict({k.rpartition(".")[2]: t for k, t in tensors.items() if k.startswith(layer.name + ".")})
        weight = full[f"{layer.name}.weight"]
        expected = float((own.dequantize(torch.float32) - weight).norm() / weight.norm())
        assert layer.error == pytest.approx(expected, rel=1e-5)
    lines = as_text(found).splitlines()
    rows = [line for line in lines if line.startswith("model.layers.")]
    errors = [float(line.split()[-1]) for line in rows]
    assert errors == sorted(errors, reverse=True)


@pytest.mark.parametrize(("name", "act_order"), [("gpt2", False), ("llama", True)])
def test_errors_of_other_layers(tmp_path, name, act_order):
    """Conv1D weights are transposed; act-order shuffles groups; 3-bit words hang together."""
    model = tiny(name)
    model.save_pretrained(tmp_path / "full")
    config = QuantizeConfig(3, 32, sym=False, desc_act=act_order)
    quantize_model(model, batches(4), config, method="gptq" if act_order else "rtn", progress=False)
    save_quantized(model, tmp_path / "small")
    found = inspect_checkpoint(tmp_path / "small", against=tmp_path / "full")
    assert all(layer.error is not None and 0 < layer.error < 0.4 for layer in found.layers)
    assert any(layer.act_order for layer in found.layers) == act_order
    original = dict(tiny(name).named_modules())
    for layer in found.layers:
        weight = original[layer.name].weight.detach()
        weight = weight.t() if name == "gpt2" else weight
        own: Any = model.get_submodule(layer.name)
        expected = float((own.dequantize(torch.float32) - weight).norm() / weight.norm())
        assert layer.error == pytest.approx(expected, rel=1e-5)


def test_a_wrong_reading_is_told_by_the_full_model(change, home, tmp_path):
    change(f"{UP_PROJ}.qzeros", lambda words: words - 0x11111111)  # one layer is stored as v1, the label says v2
    found = inspect_checkpoint(tmp_path / "changed", against=home / "full")
    assert [(f.layer, f.kind) for f in found.findings] == [(UP_PROJ, "label")]
    assert "read as v1" in found.findings[0].text
    assert found.layers[[layer.name for layer in found.layers].index(UP_PROJ)].error > 0.15


def test_a_reference_of_another_shape_or_without_the_layer(home, tmp_path):
    save_file({f"{Q_PROJ}.weight": torch.ones(3, 3)}, tmp_path / "odd.safetensors")
    found = inspect_checkpoint(home / "small", against=tmp_path / "odd.safetensors")
    assert [str(f) for f in found.findings] == [f"{Q_PROJ}: the full-precision weight has shape (3, 3), needs (64, 64)"]
    assert all(layer.error is None for layer in found.layers)
    with pytest.raises(ValueError, match="nowhere is not a readable"):
        inspect_checkpoint(home / "small", against=tmp_path / "nowhere")


# the command


def test_the_command_draws_and_reports(home, tmp_path, capsys):
    picture = tmp_path / "x.png"
    command = ["inspect", str(home / "small"), "--against", str(home / "full"), "--picture", str(picture)]
    assert main(command) == 0
    assert picture.read_bytes().startswith(b"\x89PNG\r\n")
    shown = capsys.readouterr().out
    assert "14 layers: 4 bits, groups of 32, groups in order, zero points v2 (as labelled)" in shown
    assert main([*command[:2], "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["findings"] == []
    assert found["layers"][0].keys() >= {"name", "dialect", "evidence", "saturated", "centre", "error"}
    assert main([*command[:2], "--picture", str(picture)]) == 0  # of saturated codes


def test_the_report_says_what_can_be_mended_and_what_is_lost(home, change, tmp_path, capsys):
    change(f"{Q_PROJ}.scales", set_first(float("inf")))
    for name in ("config.json", "quantize_config.json"):
        path = tmp_path / "changed" / name
        content = json.loads(path.read_text())
        content.get("quantization_config", content)["group_size"] = 64
        path.write_text(json.dumps(content))
    assert main(["inspect", str(tmp_path / "changed")]) == 0
    shown = capsys.readouterr().out
    lost, mended = shown.index("damaged, information lost:"), shown.index("mended without loss by")
    assert lost < shown.index("NaN or infinite") < mended < shown.index("and 11 more: the config says groups of 64")


def test_a_picture_without_matplotlib(home, tmp_path, monkeypatch, capsys):
    import sys

    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["inspect", str(home / "small"), "--picture", str(tmp_path / "x.png")]) == 2
    assert "matplotlib" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
