"""LoRA adapters folded into codes: against PEFT's own merge, with and without the solver, and what is refused."""

import copy
import json
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

from gptq_triton import QuantizeConfig, QuantLinear, load_quantized, merge_lora, quantize_model, save_quantized
from gptq_triton.adapter import read_adapter
from gptq_triton.linear import make_quant
from gptq_triton.packing import unpack_zeros
from tests.tiny import batches, tiny

TARGETS = ["q_proj", "down_proj", "lm_head"]


def quantized(bits=4, **options):
    model = tiny("llama")
    quantize_model(model, batches(2), QuantizeConfig(bits, 32, sym=False, **options), method="rtn", progress=False)
    return model


def floating(model):
    """The same model with nn.Linear layers that hold the dequantized weights."""
    plain = tiny("llama")
    for name, layer in model.named_modules():
        if isinstance(layer, QuantLinear):
            plain.get_submodule(name).weight.data = layer.dequantize(torch.float32)
    return plain


def adapt(model, folder, size=0.3, **options):
    """Save an adapter of random factors; returns the model as PEFT merges it."""
    options = {"r": 4, "lora_alpha": 8, "target_modules": TARGETS, **options}
    adapted: Any = get_peft_model(floating(model), LoraConfig(**options))
    torch.manual_seed(0)
    for name, factor in adapted.named_parameters():
        if "lora_" in name:
            nn.init.normal_(factor.data, std=size)
    adapted.save_pretrained(folder)
    return adapted.merge_and_unload()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_rslora": True},
        {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {r"layers\.0\.self_attn\.q_proj": 3}},
    ],
    ids=["plain", "rslora", "patterns"],
)
def test_the_change_is_the_one_that_peft_merges(tmp_path, options):
    model = quantized()
    merged = adapt(model, tmp_path, **options)
    before = floating(model)
    found, _ = read_adapter(tmp_path)
    assert len(found) == 5
    for name, low_rank in found.items():
        expected = merged.get_submodule(name).weight - before.get_submodule(name).weight
        assert torch.allclose(low_rank.delta(torch.device("cpu")), expected, atol=1e-5)


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_codes_are_the_nearest_on_the_layers_own_grid(tmp_path, bits, act_order):
    model = tiny("llama")
    config = QuantizeConfig(bits, 32, sym=False, desc_act=act_order)
    quantize_model(model, batches(2), config, method="gptq" if act_order else "rtn", progress=False)
    merged = adapt(model, tmp_path, 0.05)
    before = {name: copy.deepcopy(model.get_submodule(name)) for name in read_adapter(tmp_path)[0]}
    reports = {report.name: report for report in merge_lora(model, tmp_path)}
    for name, old in before.items():
        layer, wanted = model.get_submodule(name), merged.get_submodule(name).weight
        if name == "lm_head":
            assert torch.allclose(layer.weight, wanted, atol=1e-6)
            assert reports[name].method == "exact"
            continue
        assert layer.act_order == act_order
        for part in ("scales", "qzeros", "g_idx"):
            assert torch.equal(getattr(layer, part), getattr(old, part))
        rows = layer.g_idx.long()
        scales = layer.scales.float()[rows].t()[..., None]  # (N, K, 1)
        zeros = (
            unpack_zeros(layer.qzeros, bits, layer.outfeatures, layer.checkpoint_format).float()[rows].t()[..., None]
        )
        best = (scales * (torch.arange(2.0**bits) - zeros) - wanted[..., None]).abs().amin(-1)
        off = (layer.dequantize(torch.float32) - wanted).abs()
        assert (off <= best + 1e-6).all()
        error = float((layer.dequantize(torch.float32) - wanted).norm() / wanted.norm())
        assert reports[name].error == pytest.approx(error, rel=1e-3)


def test_a_merged_model_is_saved_and_loaded(tmp_path):
    model = quantized()
    adapt(model, tmp_path / "adapter", 0.05)
    merge_lora(model, tmp_path / "adapter")
    save_quantized(model, tmp_path / "m")
    loaded: Any = load_quantized(tmp_path / "m")
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)


def test_the_solver_loses_less_than_rounding(tmp_path):
    plain, solved = quantized(3), quantized(3)
    merged = adapt(plain, tmp_path, 0.1)
    data = batches(12)
    rounded = {report.name: report for report in merge_lora(plain, tmp_path)}
    reports = {report.name: report for report in merge_lora(solved, tmp_path, data)}
    assert {r.method for n, r in reports.items() if n != "lm_head"} == {"gptq"}
    assert all(report.output_error is not None for name, report in reports.items() if name != "lm_head")
    assert all(report.output_error is None for report in rounded.values())
    with torch.no_grad():
        wanted = torch.cat([merged(batch).logits for batch in data])
        errors = [float((torch.cat([m(b).logits for b in data]) - wanted).norm()) for m in (plain, solved)]
    assert errors[1] < errors[0]


def test_a_change_below_half_a_step_is_reported_as_lost(tmp_path):
    model = quantized(2)
    adapt(model, tmp_path, 1e-4, target_modules=["q_proj"])
    for report in merge_lora(model, tmp_path):
        assert report.kept < 0.5
        assert report.changed < 0.01
    model = quantized(8)
    adapt(model, tmp_path, 0.05, target_modules=["q_proj"])
    for report in merge_lora(model, tmp_path):
        assert report.kept == pytest.approx(1, abs=0.05)
        assert report.delta_error < 0.5


def test_weights_beyond_their_range_are_counted(tmp_path):
    model = quantized(8)
    merged = adapt(model, tmp_path, 2.0, target_modules=["q_proj"])
    limits = {
        n: m.dequantize(torch.float32).abs().amax() for n, m in model.named_modules() if isinstance(m, QuantLinear)
    }
    for report in merge_lora(model, tmp_path):
        wanted = merged.get_submodule(report.name).weight
        least = float((wanted.abs() > 1.1 * limits[report.name]).float().mean())
        assert 0 < least <= report.clipped < 1


def test_a_layer_with_several_names_is_merged_under_all(tmp_path):
    model = quantized()
    attention = model.model.layers[0].self_attn
    adapt(model, tmp_path, 0.05, target_modules=["q_proj"])
    model.model.layers[0].twin = attention.q_proj
    merge_lora(model, tmp_path)
    assert model.model.layers[0].twin is attention.q_proj


def change(folder, **fields):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_what_cannot_be_merged_is_refused_and_changes_nothing(tmp_path):
    model = quantized()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    adapt(model, tmp_path)
    whole = load_file(tmp_path / "adapter_model.safetensors")
    fields = json.loads((tmp_path / "adapter_config.json").read_text())

    def refused(message, **changed):
        change(tmp_path, **changed)
        with pytest.raises(ValueError, match=message):
            merge_lora(model, tmp_path)
        change(tmp_path, **fields)

    refused("peft_type must be 'LORA', got 'IA3'", peft_type="IA3")
    refused("use_dora must be False for a merge, got True", use_dora=True)
    refused("bias must be 'none'", bias="all")
    refused("modules_to_save must be None", modules_to_save=["lm_head"])
    refused(
        "init_lora_weights is 'pissa_niter_16', which changed the base weights too", init_lora_weights="pissa_niter_16"
    )
    refused("lora_alpha must be a number, got 'x'", lora_alpha="x")
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    for tensors, message in (
        ({k: v for k, v in whole.items() if k != name}, "q_proj has only lora_B"),
        (whole | {name: whole[name][:2].clone()}, r"lora_A of shape \(2, 64\) and lora_B of shape \(64, 4\)"),
        (whole | {name: whole[name][:, :8].clone()}, "q_proj has 8 inputs and 64 outputs, the model's 64 and 64"),
        (whole | {name: whole[name] * float("nan")}, "must be finite"),
        (whole | {name.replace("lora_A", "lora_magnitude"): torch.ones(4)}, "is no factor of a linear layer's LoRA"),
        ({k.replace("q_proj", "z_proj"): v for k, v in whole.items()}, "z_proj, which the model does not have"),
        (whole | {"base_model.model.model.norm.weight": torch.zeros(64)}, r"brings its own model\.norm\.weight, which"),
        ({}, "holds no LoRA factors"),
    ):
        save_file(tensors, tmp_path / "adapter_model.safetensors")
        with pytest.raises(ValueError, match=message):
            merge_lora(model, tmp_path, batches(1))
    (tmp_path / "adapter_model.safetensors").unlink()
    refused("has no adapter_model.safetensors and no adapter_model.bin")
    (tmp_path / "adapter_config.json").write_text("{")
    with pytest.raises(ValueError, match="is not an adapter's config"):
        merge_lora(model, tmp_path)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def test_a_bin_file_is_read_too(tmp_path):
    model, twin = quantized(), quantized()
    adapt(model, tmp_path, 0.05)
    merge_lora(twin, tmp_path)
    torch.save(load_file(tmp_path / "adapter_model.safetensors"), tmp_path / "adapter_model.bin")
    (tmp_path / "adapter_model.safetensors").unlink()
    merge_lora(model, tmp_path)
    assert all(torch.equal(tensor, twin.state_dict()[name]) for name, tensor in model.state_dict().items())


def test_a_quantized_head_is_merged_outside_the_blocks(tmp_path):
    model = quantized()
    head = model.lm_head
    make_quant(model, ["lm_head"], 8, 32, dtype=torch.float16)
    model.lm_head.pack(head, torch.full((128, 2), 0.01), torch.full((128, 2), 128))
    adapt(model, tmp_path, 0.05)
    reports = {report.name: report for report in merge_lora(model, tmp_path, batches(4))}
    assert reports["lm_head"].method == "rtn"
    assert reports["model.layers.1.mlp.down_proj"].method == "gptq"
