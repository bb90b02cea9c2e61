"""Every row of the migration tables runs, and does what the row is about."""

import copy
import re
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from torch import nn
from transformers import AutoModelForCausalLM

import gptq_triton
from gptq_triton import QuantizeConfig, QuantLinear, load_quantized, quantize_model, save_quantized
from gptq_triton.integrations.peft import LoraQuantLinear, register
from gptq_triton.integrations.transformers import GptqTritonConfig
from tests.tiny import batches, save_tiny, text, tiny, tokenizer

PAGE = (Path(__file__).parent.parent / "docs" / "migrating.md").read_text()
ROWS = re.findall(r"^\| `(.+)` \| `(.+)` \|$", PAGE, flags=re.MULTILINE)


@torch.no_grad()
def logits(model):
    return model(batches(1)[0]).logits


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """What the rows take for granted."""
    home = tmp_path_factory.mktemp("migration")
    name, folder, config = save_tiny(home / "floating"), home / "quantized", QuantizeConfig(4, 32)
    quantized = tiny("llama")
    quantize_model(quantized, batches(2), config, method="rtn", progress=False)
    save_quantized(quantized, folder, tokenizer())
    linear = nn.Linear(64, 32)
    zeros, scales = torch.full((32, 2), 8), linear.weight.detach().view(32, 2, 32).abs().amax(2) / 7
    checkpoint = home / "llama.safetensors"
    save_file(quantized.state_dict(), checkpoint)
    return {name: getattr(gptq_triton, name) for name in gptq_triton.__all__} | {
        "AutoModelForCausalLM": AutoModelForCausalLM,
        "GptqTritonConfig": GptqTritonConfig,
        "get_peft_model": get_peft_model,
        "register": register,
        "name": name,
        "folder": folder,
        "out": home / "out",
        "config": config,
        "rules": {r".*mlp": {"bits": 8}},
        "examples": batches(2),
        "texts": [text(40, seed) for seed in range(2)],
        "tokenizer": tokenizer(),
        "lora": LoraConfig(target_modules=["q_proj"]),
        "gptq": GptqTritonConfig(bits=4, group_size=32, dataset=batches(2)),
        "checkpoint": checkpoint,
        "quantized": quantized,
        "layer": linear,
        "linear": linear,
        "W": linear.weight.detach(),
        "inp": torch.randn(40, 64),
        "scales": scales,
        "zeros": zeros,
        "K": 64,
        "N": 32,
    }


def same_model(got, world):
    assert torch.equal(logits(got), logits(world["quantized"]))


def fused_model(got, world):
    close(logits(got), world)
    assert sum(isinstance(layer, QuantLinear) for layer in got.modules()) == 8  # of 14


def solved(got, world):
    assert {report.bits for report in got} == {4}
    assert sum(isinstance(layer, QuantLinear) for layer in world["model"].modules()) == 14


def saved(got, world):
    assert torch.equal(logits(load_quantized(world["out"])), logits(world["quantized"]))


def packed(got, world):
    layer, linear = world["layer"], world["linear"]
    step = world["scales"].max()
    assert isinstance(layer, QuantLinear)
    assert (layer.dequantize() - linear.weight).abs().max() <= step


# what must hold after a row, by what its left side begins with; `got` is the value of the last expression
CHECKS = {
    "AutoGPTQForCausalLM.from_quantized(folder, device": same_model,
    "AutoGPTQForCausalLM.from_quantized(folder, inject": fused_model,
    "AutoGPTQForCausalLM.from_pretrained(": lambda got, w: exact(logits(got).equal(logits(tiny("llama"))), True),
    "BaseQuantizeConfig(": lambda got, w: exact(got, QuantizeConfig(4, 32, desc_act=True)),
    "model.quantize(examples)": solved,
    "model.save_quantized(": saved,
    "get_gptq_peft_model(": lambda got, w: exact(sum(isinstance(m, LoraQuantLinear) for m in got.modules()), 2),
    "GPTQModel.load(": same_model,
    "QuantizeConfig(": lambda got, w: exact((got.bits, got.for_module("x.mlp").bits), (4, 8)),
    "model.quantize(examples, batch_size=1)": solved,
    "model.save(": saved,
    "model.generate(": lambda got, w: exact(len(w["tokenizer"].decode(got).split()), 6),
    "dequantize_model(": lambda got, w: close(logits(AutoModelForCausalLM.from_pretrained(w["out"])), w),
    "GPTQConfig(": lambda got, w: exact((got.bits, got.group_size, got.dataset), (4, 32, w["texts"])),
    "AutoModelForCausalLM.from_pretrained(name": lambda got, w: exact(got.config.quantization_config.bits, 4),
    "AutoModelForCausalLM.from_pretrained(folder": same_model,
    "layers = find_layers(": lambda got, w: exact(len(w["layers"]), 14),
    "quantizer = Quantizer(": lambda got, w: exact(int(w["quantizer"].maxq), 15),
    "quantizer.find_params(": lambda got, w: exact(tuple(w["quantizer"].scale.shape), (32, 1)),
    "gptq = GPTQ(": lambda got, w: exact(w["gptq"].hessian.tokens, 40),
    "gptq.fasterquant(": lambda got, w: exact(tuple(w["solution"].dequantized.shape), (32, 64)),
    "make_quant(": lambda got, w: exact(sum(isinstance(m, QuantLinear) for m in w["model"].modules()), 14),
    "layer = QuantLinear(": packed,
    "load_quant(": same_model,
}


def exact(found, expected):
    assert found == expected


def close(found, world):
    expected = logits(world["quantized"])
    assert (found - expected).norm() <= 1e-5 * expected.norm()


def run(code, world):
    """Run statements; returns the value of the last if it is an expression."""
    *before, last = [part.strip() for part in code.split(";")]
    for part in before:
        exec(part, world)
    if re.match(r"\w+ = ", last):
        return exec(last, world)
    return eval(last, world)


def key_of(theirs):
    """The check of a row: by its whole left side, or by how it begins."""
    return theirs if theirs in CHECKS else next(start for start in CHECKS if theirs.startswith(start))


def test_every_row_has_a_check_of_its_own():
    assert sorted(key_of(theirs) for theirs, _ in ROWS) == sorted(CHECKS)


# rows that go on from the row before
FOLLOWS = {
    "quantizer.find_params(": ["quantizer = Quantizer("],
    "gptq.fasterquant(": ["gptq = GPTQ("],
    "make_quant(": ["layers = find_layers("],
}


@pytest.mark.parametrize(("theirs", "ours"), ROWS, ids=[theirs.split("(")[0] for theirs, _ in ROWS])
def test_row(theirs, ours, world):
    world = dict(world)
    started = key_of(theirs)
    floating = started.startswith(("model.quantize", "layers", "make_quant", "load_quant("))
    world["model"] = tiny("llama") if floating else copy.deepcopy(world["quantized"])
    for before in FOLLOWS.get(started, []):
        run(next(code for left, code in ROWS if left.startswith(before)), world)
    CHECKS[started](run(ours, world), world)
