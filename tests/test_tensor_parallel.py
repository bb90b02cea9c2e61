"""Two processes on the CPU against one: the same numbers, half the memory."""

import socket

import pytest
import torch
import torch.multiprocessing as processes
from torch import nn
from transformers import AutoModelForCausalLM

import gptq_triton.integrations.transformers  # noqa: F401
from gptq_triton import QuantizeConfig, QuantLinear, quantize_model, save_quantized
from gptq_triton.integrations.tensor_parallel import ColwiseQuantLinear, is_shard, shard
from gptq_triton.integrations.transformers_parallel import read_shard
from tests import parallel
from tests import test_experts as moe
from tests.strategies import random_weight
from tests.test_transformers import change_config
from tests.tiny import batches, tiny

FORMS = {
    "llama": QuantizeConfig(4, 32),
    "qwen3": QuantizeConfig(3, -1, sym=False, lm_head=True),
    "gemma3": QuantizeConfig(2, 16, sym=False, desc_act=True),
    "mistral": QuantizeConfig(4, 48, sym=False),
}
WIDE = {"hidden_size": 256, "intermediate_size": 2048, "head_dim": 64}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    parent = tmp_path_factory.mktemp("parallel") / "models"
    for name, config in FORMS.items():
        model = tiny(name)
        quantize_model(model, batches(2), config, method="gptq" if config.desc_act else "rtn", progress=False)
        save_quantized(model, parent / name)
    change_config(parent / "llama", checkpoint_format="gptq_v2")  # a wrong label
    for name, config in {"wide": QuantizeConfig(4, 128), "act_order": QuantizeConfig(4, 128, desc_act=True)}.items():
        model = tiny("llama", **WIDE)
        quantize_model(model, batches(2), config, method="gptq" if config.desc_act else "rtn", progress=False)
        save_quantized(model, parent / name)
    model = moe.tiny(moe.FAMILIES["qwen3_moe"])
    quantize_model(model, moe.batches(), QuantizeConfig(4, 32), method="rtn", progress=False)
    save_quantized(model, parent / "qwen3_moe")
    return parent


@pytest.fixture(scope="module")
def found(folders, tmp_path_factory):
    """What each rank found."""
    out = tmp_path_factory.mktemp("ranks")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    processes.start_processes(parallel.run, (folders, out, port), nprocs=2, start_method="spawn")
    return [torch.load(out / f"{rank}.pt", weights_only=False) for rank in range(2)]


@pytest.fixture(scope="module")
def alone(folders):
    return {folder.name: AutoModelForCausalLM.from_pretrained(folder) for folder in folders.iterdir()}


def test_parallel_styles(found):
    for (sizes, form), (y, dx) in found[0]["styles"].items():
        expected, dx_expected = parallel.forward_and_gradient(parallel.mlp(sizes, form), parallel.rows(sizes[0]))
        assert (y - expected).norm() <= 1e-6 * expected.norm(), (sizes, form)
        assert (dx - dx_expected).norm() <= 1e-6 * dx_expected.norm(), (sizes, form)
        assert torch.equal(found[1]["styles"][sizes, form][0], y)


def test_siblings_are_merged_after_they_are_split(found):
    assert found[0]["merged"].keys() == set(parallel.FORMS)
    for form, (y, dx, both, refusal) in found[0]["merged"].items():
        expected, dx_expected = parallel.forward_and_gradient(parallel.Gated(form), parallel.rows(96))
        assert both, form
        assert (y - expected).norm() <= 1e-6 * expected.norm(), form
        assert (dx - dx_expected).norm() <= 1e-6 * dx_expected.norm(), form
        assert torch.equal(found[1]["merged"][form][0], y)
        assert "layers that several ranks share stay merged: gate_proj, up_proj" in refusal


def test_layouts(found):
    sizes = parallel.SIZES[1]
    expected, dx_expected = parallel.forward_and_gradient(
        parallel.mlp(sizes, parallel.FORMS[0]), parallel.rows(sizes[0])
    )
    for rank in found:
        y, dx = rank["gathered"]
        assert (y - expected).norm() <= 1e-6 * expected.norm()
        assert (dx - dx_expected).norm() <= 1e-6 * dx_expected.norm()


@pytest.mark.parametrize("name", [*FORMS, "wide", "act_order", "qwen3_moe"])
def test_transformers(name, found, alone):
    model = alone[name]
    with torch.no_grad():
        expected = model(parallel.prompt(model)).logits
    tokens = model.generate(parallel.prompt(model), **parallel.GREEDY)
    for rank in found:
        own = rank["models"][name]
        assert (own["logits"] - expected).norm() <= 1e-5 * expected.norm()
        assert torch.equal(own["tokens"], tokens)
        assert torch.equal(own.get("graphed", tokens), tokens)
        assert own["format"] == model.config.quantization_config.checkpoint_format
        assert "one rank's part of a layer" in own["save"]
        assert "one rank's part of a layer" in own["floats"]


@pytest.mark.parametrize("name", ["wide", "act_order"])
def test_memory_per_rank(name, found, alone):
    for rank in found:
        assert rank["models"][name]["held"] <= 0.55 * parallel.held(alone[name])


def test_adapters_under_fsdp2(found, alone):
    """Steps on the mean gradient of both ranks' samples."""
    model = parallel.adapted(alone["llama"])
    samples = [torch.cat(batches()[2 * step : 2 * step + 2]) for step in range(parallel.STEPS)]
    expected = parallel.train(model, samples)
    assert expected[-1] != expected[0]
    means = torch.tensor([rank["fsdp"] for rank in found]).mean(0)
    assert (means - torch.tensor(expected)).abs().max() <= 1e-5 * expected[0]


# without a second process


def test_shards_keep_the_sizes_of_the_whole():
    layer = QuantLinear.from_packed(random_weight(64, 96, 4, 32), torch.ones(96))
    layer.register_forward_hook(lambda module, args, y: y + 1)
    shard(layer, "packed_colwise", 1, 2)
    assert (layer.infeatures, layer.outfeatures, layer.in_features, layer.out_features) == (64, 48, 64, 96)
    assert is_shard(layer)
    whole = QuantLinear.from_packed(random_weight(64, 96, 4, 32), torch.ones(96))
    x = torch.randn(3, 64)
    columns = [*range(24, 48), *range(72, 96)]
    assert (layer(x) - 1 - whole(x)[:, columns]).norm() <= 1e-6 * whole(x).norm()
    shard(whole, "replicate", 1, 2)
    assert not is_shard(whole)


def test_what_cannot_be_cut_is_refused():
    with pytest.raises(ValueError, match="kind must be"):
        shard(QuantLinear(4, 32, 64, 64), "diagonal", 0, 2)
    with pytest.raises(ValueError, match="infeatures is 3"):
        shard(QuantLinear(4, 32, 3, 64), "rowwise", 0, 4)
    with pytest.raises(TypeError, match="ColwiseQuantLinear is for QuantLinear, got Linear"):
        ColwiseQuantLinear()._apply(nn.Linear(4, 4), None)


def test_a_style_that_cannot_be_cut_is_refused(folders):
    model = AutoModelForCausalLM.from_pretrained(folders / "llama")
    model.tp_plan["model.layers.*.mlp.up_proj"] = "packed_rowwise"
    name = "model.layers.1.mlp.up_proj"
    with pytest.raises(ValueError, match=rf"{name}: parallel style 'packed_rowwise' is not for quantized layers"):
        read_shard(model, None, name, model.get_submodule(name), None, None)
