"""quantize_model: every architecture, rules, sharing, resume, determinism."""

import copy
import dataclasses
import gc
import logging
import weakref
from typing import Any

import pytest
import torch
from torch import nn

from gptq_triton import QuantizeConfig, QuantLinear, estimate, load_quantized, quantize_model, save_quantized
from gptq_triton import model as model_module
from gptq_triton import streaming as streaming_module
from gptq_triton.hessian import Hessian
from gptq_triton.layers import find_layers
from gptq_triton.packing import unpack
from gptq_triton.reference import dequantize
from gptq_triton.solver import solve
from gptq_triton.streaming import as_batches, decoder_blocks
from tests.tiny import ARCHITECTURES, batches, dies_in_the_second_block, tiny

CONFIG = QuantizeConfig(bits=4, group_size=32, sym=False)


def logits(model, data):
    with torch.no_grad():
        return torch.cat([model(batch).logits.flatten(0, 1) for batch in data])


def divergence(model, reference, data):
    """Relative distance of the logits."""
    a, b = logits(model, data), logits(reference, data)
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_is_quantized_whole_and_well(name):
    model = tiny(name)
    full, data = copy.deepcopy(model), batches()
    expected = [path for block in decoder_blocks(model) for path in find_layers(model.get_submodule(block), name=block)]
    reports = quantize_model(model, data, QuantizeConfig(bits=8, group_size=32, sym=False), progress=False)
    assert sorted(report.name for report in reports) == sorted(expected)
    assert all(isinstance(model.get_submodule(path), QuantLinear) for path in expected)
    assert all(report.method == "gptq" and 0 < report.error < report.error_rtn * 1.05 for report in reports)
    assert divergence(model, full, data) < 0.02
    assert model.config.quantization_config["bits"] == 8


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_gptq_beats_rounding(name):
    full, data = tiny(name), batches()
    quantized, rounded = copy.deepcopy(full), copy.deepcopy(full)
    config = QuantizeConfig(bits=3, group_size=32, sym=False)
    quantize_model(quantized, data, config, progress=False)
    reports = quantize_model(rounded, data, config, method="rtn", progress=False)
    assert {report.method for report in reports} == {"rtn"}
    assert divergence(quantized, full, data) < divergence(rounded, full, data)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_output_head_on_request(name, tmp_path):
    full, data = tiny(name), batches()
    model, body = copy.deepcopy(full), copy.deepcopy(full)
    config = QuantizeConfig(bits=4, group_size=32, sym=False, lm_head=True)
    reports = quantize_model(model, data, config, progress=False)
    quantize_model(body, data, dataclasses.replace(config, lm_head=False), progress=False)
    assert [report.name for report in reports][-1] == "lm_head"
    head: Any = model.lm_head
    assert 0 < reports[-1].error < reports[-1].error_rtn
    assert torch.equal(model.get_input_embeddings().weight, full.get_input_embeddings().weight)
    body.set_output_embeddings(head)  # all else is as without it
    assert torch.equal(logits(model, data), logits(body, data))
    hessian = Hessian(head.infeatures)
    head.register_forward_pre_hook(lambda _, args: hessian.add(args[0]))
    logits(model, data)
    own = solve({"x": full.lm_head.weight.detach().clone()}, hessian, config.spec(), config.solver_options())["x"]
    same = unpack(own.weight.qweight, 4, 64) == unpack(head.qweight, 4, 64)
    assert same.float().mean() > 0.99
    save_quantized(model, tmp_path / "model")
    assert torch.equal(logits(load_quantized(tmp_path / "model"), data), logits(model, data))


def test_a_head_of_its_own_kind_and_a_resumed_run(tmp_path):
    data = batches()
    config = QuantizeConfig(4, 32, lm_head=True, dynamic={r"lm_head$": {"bits": 8}})
    models = [tiny("qwen3") for _ in range(2)]
    first, second = (quantize_model(m, data, config, workdir=tmp_path, progress=False) for m in models)
    assert first == second
    assert models[0].lm_head.bits == 8
    assert torch.equal(logits(models[0], data), logits(models[1], data))
    left = tiny("qwen3")
    quantize_model(left, data, QuantizeConfig(4, 32, lm_head=True, dynamic={"-:lm_head": {}}), progress=False)
    assert left.lm_head.weight is left.model.embed_tokens.weight
    ahead = [estimate(tiny("qwen3"), data, dataclasses.replace(config, lm_head=head)) for head in (False, True)]
    assert ahead[1].layers == ahead[0].layers + 1
    assert ahead[1].packed_bytes - ahead[0].packed_bytes >= 128 * 64


def test_blocks_see_the_error_of_the_blocks_before_them():
    """The second block, solved by hand on what the quantized first block gives it."""
    full, data = tiny("llama"), batches()
    model = copy.deepcopy(full)
    quantize_model(model, data, CONFIG, progress=False)
    name = "model.layers.1.self_attn.o_proj"
    original, got = full.get_submodule(name), model.get_submodule(name)
    partly = copy.deepcopy(full)
    partly.model.layers[0] = copy.deepcopy(model.model.layers[0])
    hessian = Hessian(original.weight.shape[1])
    partly.get_submodule(name).register_forward_pre_hook(lambda _, args: hessian.add(args[0]))
    logits(partly, data)
    solution = solve({"x": original.weight.detach()}, hessian, CONFIG.spec(), CONFIG.solver_options())["x"]
    same = unpack(solution.weight.qweight, 4, got.infeatures) == unpack(got.qweight, 4, got.infeatures)
    assert same.float().mean() > 0.99  # QuantLinear and the dequantized layer round differently in float32


@pytest.mark.parametrize("sequential", [False, True])
def test_feedback_wants_sequence(sequential, caplog):
    config = dataclasses.replace(CONFIG, feedback=1.0, true_sequential=sequential)
    with caplog.at_level(logging.WARNING):
        quantize_model(tiny("llama"), batches(), config, progress=False)
    assert ("feedback without true_sequential" in caplog.text) != sequential


def test_feedback_fits_blocks_to_what_full_precision_gives_them():
    """The second block, solved by hand on the inputs of both models."""
    full, data = tiny("llama"), batches()
    config = dataclasses.replace(CONFIG, feedback=1.0)
    plain, model = copy.deepcopy(full), copy.deepcopy(full)
    quantize_model(plain, data, CONFIG, progress=False)
    quantize_model(model, data, config, progress=False)
    first, state = plain.model.layers[0].state_dict(), model.model.layers[0].state_dict()
    assert all(torch.equal(tensor, state[key]) for key, tensor in first.items())  # nothing went wrong before it
    name = "model.layers.1.self_attn.o_proj"
    original, got = full.get_submodule(name), model.get_submodule(name)
    partly = copy.deepcopy(full)
    partly.model.layers[0] = copy.deepcopy(model.model.layers[0])
    seen = []
    for each in (full, partly):
        inputs = []
        with each.get_submodule(name).register_forward_pre_hook(lambda _, args, to=inputs: to.append(args[0])):
            logits(each, data)
        seen.append(torch.cat([x.flatten(0, 1) for x in inputs]))
    hessian = Hessian(original.weight.shape[1])
    hessian.add(seen[1], seen[0])
    solution = solve({"x": original.weight.detach()}, hessian, config.spec(), config.solver_options())["x"]
    same = unpack(solution.weight.qweight, 4, got.infeatures) == unpack(got.qweight, 4, got.infeatures)
    assert same.float().mean() > 0.99  # QuantLinear and the dequantized layer round differently in float32
    different = unpack(plain.get_submodule(name).qweight, 4, got.infeatures) != unpack(got.qweight, 4, got.infeatures)
    assert different.float().mean() > 0.05


def test_siblings_share_one_hessian(monkeypatch):
    made = []

    class Counted(Hessian):
        def __init__(self, *args):
            super().__init__(*args)
            made.append(self)

    monkeypatch.setattr(streaming_module, "Hessian", Counted)
    quantize_model(tiny("llama"), batches(), CONFIG, progress=False)
    assert len(made) == 2 * 4  # per block: q/k/v, o, gate/up, down


def test_true_sequential_solves_stage_by_stage():
    data = batches()
    reports = quantize_model(
        tiny("llama"), data, QuantizeConfig(4, 32, sym=False, true_sequential=True), progress=False
    )
    order = [report.name.rpartition(".")[2] for report in reports if ".0." in report.name]
    assert order == ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    plain = quantize_model(tiny("llama"), data, CONFIG, progress=False)
    by_name = {report.name: report.error for report in plain}
    assert {report.name: report.error for report in reports} != by_name


def test_rules_exclude_and_override():
    model = tiny("llama")
    rules = {
        r"-:.*layers\.0\..*": {},
        r".*down_proj": {"bits": 8, "group_size": 64, "sym": True},
        r"+:.*o_proj": {"desc_act": True, "group_size": 16},
    }
    reports = quantize_model(model, batches(), QuantizeConfig(4, 32, sym=False, dynamic=rules), progress=False)
    assert all(report.name.startswith("model.layers.1.") for report in reports)
    assert type(model.model.layers[0].mlp.down_proj) is nn.Linear
    block = model.model.layers[1]
    assert (block.mlp.down_proj.bits, block.mlp.down_proj.groupsize) == (8, 64)
    assert (block.self_attn.o_proj.act_order, block.self_attn.o_proj.groupsize) == (True, 16)
    assert (block.self_attn.q_proj.bits, block.self_attn.q_proj.act_order) == (4, False)
    assert {layer.checkpoint_format for layer in block.modules() if isinstance(layer, QuantLinear)} == {"gptq_v2"}
    with pytest.raises(ValueError, match="no layer"):
        quantize_model(tiny("llama"), batches(), QuantizeConfig(dynamic={"-:.*": {}}), progress=False)


@pytest.mark.parametrize("feedback", [0.0, 1.0])
def test_padded_tokens_do_not_count(feedback):
    config = dataclasses.replace(CONFIG, feedback=feedback)
    short = batches(count=8, length=24)
    padded = [
        {
            "input_ids": torch.cat([batch, torch.full((1, 8), 5)], 1),
            "attention_mask": torch.cat([torch.ones(1, 24), torch.zeros(1, 8)], 1).long(),
        }
        for batch in short
    ]
    one, two = tiny("llama"), tiny("llama")
    plain = quantize_model(one, short, config, progress=False)
    masked = quantize_model(two, padded, config, progress=False)
    assert [report.tokens for report in masked] == [report.tokens for report in plain]
    assert [report.error for report in masked] == pytest.approx([report.error for report in plain], rel=0.05)


def test_same_arguments_same_codes_and_no_global_random_numbers():
    data = batches()
    first, second = tiny("llama"), tiny("llama")
    before = torch.get_rng_state()
    first.train()
    quantize_model(first, data, CONFIG, progress=False)
    assert first.training
    second.eval()
    quantize_model(second, data, CONFIG, progress=False)
    assert not second.training
    assert torch.equal(torch.get_rng_state(), before)
    state = second.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in first.state_dict().items())


def test_a_killed_run_resumes_with_identical_codes(tmp_path, monkeypatch):
    data, whole, killed = batches(), tiny("llama"), tiny("llama")
    expected = quantize_model(whole, data, CONFIG, progress=False)

    calls = dies_in_the_second_block(monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        quantize_model(killed, data, CONFIG, workdir=tmp_path / "work", progress=False)
    resumed = tiny("llama")
    reports = quantize_model(resumed, data, CONFIG, workdir=tmp_path / "work", progress=False)
    assert len(calls) == 3  # block 0 was read, not solved again
    assert [report.name for report in reports] == [report.name for report in expected]
    assert [report.error for report in reports] == [report.error for report in expected]
    state = resumed.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in whole.state_dict().items())
    assert not [path for path in (tmp_path / "work").iterdir() if path.name.startswith(".")]

    with pytest.raises(ValueError, match="another run"):
        quantize_model(tiny("llama"), data[:-1], CONFIG, workdir=tmp_path / "work", progress=False)
    with pytest.raises(ValueError, match="another run"):
        quantize_model(tiny("llama"), data, QuantizeConfig(3, 32), workdir=tmp_path / "work", progress=False)
    with pytest.raises(ValueError, match="another run"):
        quantize_model(tiny("llama", seed=1), data, CONFIG, workdir=tmp_path / "work", progress=False)


@pytest.mark.parametrize("sequential", [False, True])
def test_feedback_survives_resume(tmp_path, monkeypatch, sequential):
    config = QuantizeConfig(3, 32, sym=False, feedback=1.0, true_sequential=sequential, lm_head=True)
    data, whole, resumed = batches(), tiny("llama"), tiny("llama")
    quantize_model(whole, data, config, progress=False)
    calls = dies_in_the_second_block(monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        quantize_model(tiny("llama"), data, config, workdir=tmp_path, progress=False)
    quantize_model(resumed, data, config, workdir=tmp_path, progress=False)
    assert len(calls) == 2 + 2  # block 0 was read; block 1 and the head were solved
    state = resumed.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in whole.state_dict().items())


def test_act_order_survives_resume(tmp_path):
    config = QuantizeConfig(4, 32, sym=True, desc_act=True)
    first, second = tiny("gpt2"), tiny("gpt2")
    quantize_model(first, batches(), config, workdir=tmp_path, progress=False)
    quantize_model(second, batches(), config, workdir=tmp_path, progress=False)
    layer = second.transformer.h[1].mlp.c_fc
    assert layer.act_order
    assert torch.equal(dequantize(layer.weight_packed), dequantize(first.transformer.h[1].mlp.c_fc.weight_packed))


def test_a_layer_with_too_few_tokens_is_named(caplog):
    with caplog.at_level(logging.WARNING):
        reports = quantize_model(tiny("llama"), [torch.arange(6)], CONFIG, progress=False)
    assert "model.layers.0.self_attn.q_proj" in caplog.text
    assert {report.method for report in reports} == {"rtn"}


def test_estimate_counts_what_is_made():
    model = tiny("llama")
    ahead = estimate(model, batches(), CONFIG)
    reports = quantize_model(model, batches(), CONFIG, progress=False)
    layers = [layer for layer in model.modules() if isinstance(layer, QuantLinear)]
    packed = sum(t.nbytes for layer in layers for name, t in layer.state_dict().items() if name != "bias")
    assert ahead.layers == len(reports) == len(layers)
    assert ahead.tokens == sum(batch.numel() for batch in batches())
    assert ahead.packed_bytes == packed
    assert ahead.peak_bytes > 0
    assert ahead.seconds > 0


def test_calibration_takes_many_shapes():
    ids = [1, 2, 3]
    for item in (ids, torch.tensor(ids), torch.tensor([ids]), {"input_ids": ids}, {"input_ids": [ids]}):
        assert torch.equal(as_batches([item])[0]["input_ids"], torch.tensor([ids]))
    for bad in ([], [[]], [{"text": 3}], [torch.zeros(1, 2, 3)]):
        with pytest.raises(ValueError, match="calibration"):
            as_batches(bad)


def test_refusals():
    with pytest.raises(ValueError, match="ModuleList"):
        quantize_model(nn.Sequential(nn.Linear(2, 2)), batches(), CONFIG)
    with pytest.raises(ValueError, match="method"):
        quantize_model(tiny("llama"), batches(), CONFIG, method="awq")
    with pytest.raises(ValueError, match="lm_head=True, but LlamaModel has no output head"):
        quantize_model(tiny("llama").model, batches(), QuantizeConfig(lm_head=True))
    model = tiny("llama")
    model.model.layers[1].mlp.up_proj = nn.Linear(64, 101, bias=False)
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.up_proj has 64 inputs and 101 outputs"):
        quantize_model(model, batches(), CONFIG)
    model = tiny("llama")
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"layers\.0\.mlp\.up_proj: the weight must be finite"):
        quantize_model(model, batches(), CONFIG, progress=False)


def test_no_layer_outlives_its_block(monkeypatch):
    """Blocks are solved on a GPU: what has been replaced would stay there."""
    model = tiny("llama")
    blocks = decoder_blocks(model)
    layers = [[weakref.ref(layer) for layer in find_layers(block).values()] for block in blocks.values()]
    del blocks
    alive, solve_block = [], model_module._solve_block

    def counted(*arguments: Any) -> Any:
        gc.collect()
        alive.append([sum(layer() is not None for layer in block) for block in layers])
        return solve_block(*arguments)

    monkeypatch.setattr(model_module, "_solve_block", counted)
    quantize_model(model, batches(), CONFIG, progress=False)
    whole = [len(block) for block in layers]
    assert alive == [[0] * index + whole[index:] for index in range(len(layers))]
