"""Quantized embeddings: lookup, quantizing, folders."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers import AutoModelForCausalLM

import gptq_triton.integrations.transformers  # noqa: F401
from gptq_triton import QuantizeConfig, QuantLinear, inspect_checkpoint, load_quantized, quantize_model, save_quantized
from gptq_triton.embedding import QuantEmbedding, empty_embedding, make_layers
from tests.strategies import FORMATS, random_weight
from tests.tiny import ARCHITECTURES, batches, tiny


@torch.no_grad()
def logits(model):
    return model(batches(1)[0]).logits


@given(
    bits=st.sampled_from((2, 3, 4, 8)),
    width=st.integers(1, 100),
    vocabulary=st.integers(1, 70),
    group_size=st.sampled_from((-1, 7, 32)),
    act_order=st.booleans(),
    form=st.sampled_from(FORMATS),
    data=st.data(),
)
def test_lookup(bits, width, vocabulary, group_size, act_order, form, data):
    weight = random_weight(width, vocabulary, bits, group_size, act_order=act_order, checkpoint_format=form)
    layer = QuantEmbedding.from_packed(weight)
    ids = torch.tensor(data.draw(st.lists(st.integers(0, vocabulary - 1), max_size=6)), dtype=torch.long)
    assert torch.equal(layer(ids), layer.dequantize()[ids])
    assert layer(ids[None]).shape == (1, len(ids), width)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_quantize_save_load(name, tmp_path):
    full = tiny(name)
    spare = {r"-:(?!.*(down_proj|fc2|mlp.c_proj|embed_tokens|wte))": {}}  # it is the embedding that is tested
    config = QuantizeConfig(8, 32, sym=False, embeddings=True, dynamic=spare)
    model = copy.deepcopy(full)
    reports = quantize_model(model, batches(2), config, progress=False)
    table, before = model.get_input_embeddings(), full.get_input_embeddings()
    assert isinstance(table, QuantEmbedding)
    assert reports[0].method == "rtn"
    ids = batches(1)[0]
    assert table(ids).dtype == torch.float32
    assert 0 < (table(ids) - before(ids)).norm() < 0.01 * before(ids).norm()
    assert (table(ids) - before(ids)).norm() < 2 * reports[0].error ** 0.5 * before(ids).norm()
    assert torch.equal(model.get_output_embeddings().weight, full.get_output_embeddings().weight)
    save_quantized(model, tmp_path / "model")
    assert reports[0].name in [layer.name for layer in inspect_checkpoint(tmp_path / "model").layers]
    for loaded in (load_quantized(tmp_path / "model"), AutoModelForCausalLM.from_pretrained(tmp_path / "model")):
        assert isinstance(loaded.get_input_embeddings(), QuantEmbedding)
        assert torch.equal(logits(loaded), logits(model))
    floats = loaded.dequantize()
    assert type(floats.get_input_embeddings()) is type(before)
    assert (logits(floats) - logits(model)).norm() <= 1e-6 * logits(model).norm()
    floats.save_pretrained(tmp_path / "floats")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "floats")), logits(floats))


def test_embedding_and_head(tmp_path):
    config = QuantizeConfig(4, 32, sym=False, lm_head=True, embeddings=True)
    model = tiny("qwen3")
    reports = quantize_model(model, batches(2), config, progress=False)
    assert (reports[0].name, reports[-1].name) == ("model.embed_tokens", "lm_head")
    save_quantized(model, tmp_path / "model")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "model")), logits(model))


def test_a_rule_spares_it():
    model = tiny("llama")
    config = QuantizeConfig(4, 32, embeddings=True, dynamic={"-:.*embed": {}})
    quantize_model(model, batches(1), config, method="rtn", progress=False)
    assert type(model.get_input_embeddings()) is nn.Embedding


def test_other_tables_are_refused():
    class Positions(nn.Embedding):
        pass

    for table in (Positions(32, 32), nn.Linear(32, 32)):
        with pytest.raises(TypeError, match=f"expected nn.Embedding, got {type(table).__name__}"):
            empty_embedding(table, 4, 32)
    with pytest.raises(TypeError, match="max_norm"):
        empty_embedding(nn.Embedding(32, 32, max_norm=1.0), 4, 32)
    with pytest.raises(ValueError, match=r"embed_tokens has 64 inputs and 127 outputs"):
        quantize_model(tiny("llama", vocab_size=127), batches(1), QuantizeConfig(4, 32, embeddings=True))


def test_make_layers():
    model = nn.ModuleDict({"a": nn.Embedding(32, 64), "b": nn.Linear(64, 32)})
    make_layers(model, ["a", "b"], 4, 32)
    assert (type(model["a"]), type(model["b"])) == (QuantEmbedding, QuantLinear)
    assert (model["a"].infeatures, model["a"].outfeatures, model["b"].infeatures) == (64, 32, 64)
