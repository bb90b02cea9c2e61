"""Folders and files: what is saved is loaded, what is broken is refused by name, nothing is half-written."""

import copy
import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from gptq_triton import (
    QuantizeConfig,
    QuantLinear,
    inspect_checkpoint,
    load_quant,
    load_quantized,
    make_quant,
    quantize_model,
    save_quantized,
)
from gptq_triton import atomic as atomic_module
from gptq_triton import checkpoint as checkpoint_module
from gptq_triton.atomic import atomic_write
from gptq_triton.config import REFUSED_FORMATS
from gptq_triton.files import save_tensors
from gptq_triton.packing import pack_zeros, unpack_zeros
from tests.tiny import ARCHITECTURES, batches, tiny, tokenizer
from tests.vectors import CASES, load

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
PARTS = ("qweight", "qzeros", "scales", "bias")
Q_PROJ = "model.layers.0.self_attn.q_proj"


def quantized(name="llama", config=None):
    model, config = tiny(name), config or QuantizeConfig(4, 32)
    quantize_model(model, batches(2), config, method="gptq" if config.desc_act else "rtn", progress=False)
    return model


@pytest.fixture(scope="module")
def sym(tmp_path_factory):
    """A symmetric 4-bit Llama as a folder; copied by tests that change it."""
    folder = tmp_path_factory.mktemp("checkpoints") / "sym"
    save_quantized(quantized(), folder)
    return folder


@pytest.fixture(scope="module")
def asym(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints") / "asym"
    save_quantized(quantized(config=QuantizeConfig(4, 32, sym=False)), folder)
    return folder


@pytest.fixture
def broken(sym, tmp_path):
    """A copy of ``sym`` to break."""
    return shutil.copytree(sym, tmp_path / "broken")


def change_json(path, **fields):
    """Set fields of a JSON file; None removes one."""
    content = json.loads(path.read_text()) | fields
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def relabel(folder, **fields):
    """Set fields of the quantization config, in both files."""
    change_json(folder / "quantize_config.json", **fields)
    content = json.loads((folder / "config.json").read_text())
    content["quantization_config"] |= fields
    (folder / "config.json").write_text(json.dumps(content))


def change_tensors(folder, change, file=WEIGHTS):
    tensors = load_file(folder / file)
    change(tensors)
    save_file(tensors, folder / file, metadata={"format": "pt"})


@torch.no_grad()
def logits(model):
    return model(batches(1)[0]).logits


def assert_same(model, expected):
    state = model.state_dict()
    assert state.keys() == expected.state_dict().keys()
    for name, tensor in expected.state_dict().items():
        assert state[name].dtype == tensor.dtype, name
        assert torch.equal(state[name], tensor), name
    assert torch.equal(logits(model), logits(expected))


# what is saved is loaded


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("llama", QuantizeConfig(4, 32, desc_act=True)),
        ("qwen3", QuantizeConfig(3, -1, sym=False)),
        ("gemma3", QuantizeConfig(2, 16, sym=False, desc_act=True)),
        ("opt", QuantizeConfig(8, 128, sym=False, checkpoint_format="gptq")),
        ("gpt2", QuantizeConfig(4, 48, checkpoint_format="gptq_v2", extra={"mine": [1, {"a": None}]})),
    ],
)
def test_round_trip(name, config, tmp_path):
    assert name in ARCHITECTURES
    model = quantized(name, config)
    model.generation_config.max_new_tokens = 7
    save_quantized(model, tmp_path / "new" / "model", tokenizer())
    folder = tmp_path / "new" / "model"
    written = json.loads((folder / "quantize_config.json").read_text())
    assert written == json.loads((folder / "config.json").read_text())["quantization_config"] == config.to_dict()
    assert (folder / "tokenizer.json").exists()
    assert folder.stat().st_mode & 0o777 == 0o777 & ~_umask()
    assert [path.name for path in folder.parent.iterdir()] == ["model"]

    loaded = load_quantized(folder, device="cpu")
    assert_same(loaded, model)
    assert not loaded.training
    assert loaded.generation_config.max_new_tokens == 7
    assert loaded.config.quantization_config == config.to_dict()
    save_quantized(loaded, tmp_path / "again")
    first, second = load_file(folder / WEIGHTS), load_file(tmp_path / "again" / WEIGHTS)
    assert first.keys() == second.keys()
    assert all(torch.equal(tensor, second[key]) for key, tensor in first.items())


def _umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_rules_per_module_survive(tmp_path):
    rules = {r"-:.*\.o_proj": {}, r".*layers\.1\..*down_proj": {"bits": 8, "group_size": 64, "sym": False}}
    model = quantized(config=QuantizeConfig(4, 32, dynamic=rules))
    save_quantized(model, tmp_path / "m")
    loaded = load_quantized(tmp_path / "m")
    assert_same(loaded, model)
    block = loaded.model.layers[1]
    assert type(block.self_attn.o_proj) is nn.Linear
    assert (block.mlp.down_proj.bits, block.mlp.down_proj.groupsize) == (8, 64)
    kinds = {(layer.bits, layer.group_size) for layer in inspect_checkpoint(tmp_path / "m").layers}
    assert kinds == {(4, 32), (8, 64)}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_dtype_is_of_what_is_not_quantized(sym, dtype):
    plain, loaded = load_quantized(sym), load_quantized(sym, dtype=dtype)
    assert {p.dtype for p in plain.parameters()} == {torch.float32}
    assert {p.dtype for p in loaded.parameters()} == {dtype}
    assert logits(loaded).dtype == dtype
    for name, layer in plain.named_modules():
        if isinstance(layer, QuantLinear):
            state = loaded.get_submodule(name).state_dict()
            assert all(torch.equal(state[key], tensor) for key, tensor in layer.state_dict().items())
            assert state["scales"].dtype == torch.float16
    assert torch.equal(loaded.model.embed_tokens.weight, plain.model.embed_tokens.weight.to(dtype))


def test_half_precision_is_saved_as_such(tmp_path):
    save_quantized(quantized().half(), tmp_path / "m")
    assert load_quantized(tmp_path / "m").lm_head.weight.dtype == torch.float16


def test_tied_embeddings(tmp_path):
    save_quantized(quantized("qwen3"), tmp_path / "m")
    assert "lm_head.weight" not in load_file(tmp_path / "m" / WEIGHTS)
    loaded = load_quantized(tmp_path / "m")
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


@pytest.mark.parametrize("name", ["llama", "qwen3"], ids=["untied", "tied"])
def test_quantized_head(name, tmp_path):
    model = quantized(name)
    head = model.lm_head
    make_quant(model, ["lm_head"], 4, 32, dtype=torch.float16)
    model.lm_head.pack(head, torch.full((128, 2), 0.05), torch.full((128, 2), 8))
    save_quantized(model, tmp_path / "m")
    loaded = load_quantized(tmp_path / "m")
    assert_same(loaded, model)
    assert isinstance(loaded.lm_head, QuantLinear)


def test_shards(tmp_path, sym):
    save_quantized(load_quantized(sym), tmp_path / "m", max_shard_size="32KB")
    files = sorted(path.name for path in (tmp_path / "m").glob("*.safetensors"))
    assert len(files) > 2
    assert (tmp_path / "m" / INDEX).exists()
    assert_same(load_quantized(tmp_path / "m"), load_quantized(sym))
    whole, parts = inspect_checkpoint(sym), inspect_checkpoint(tmp_path / "m")
    assert parts.layers == whole.layers
    (tmp_path / "m" / files[1]).unlink()
    with pytest.raises(ValueError, match=f"{files[1]} is not a readable safetensors file"):
        load_quantized(tmp_path / "m")


def test_nothing_is_allocated_before_its_tensors_are_read(sym, monkeypatch):
    real = checkpoint_module.fill

    def fill(model, *rest):
        assert all(p.is_meta for p in model.parameters())
        return real(model, *rest)

    monkeypatch.setattr(checkpoint_module, "fill", fill)
    state = torch.get_rng_state()
    load_quantized(sym)
    assert torch.equal(torch.get_rng_state(), state)


# other writers


def test_single_file_of_autogptq(sym, broken):
    """Its own file name, its own config file, no g_idx, buffers that older transformers kept."""
    (broken / WEIGHTS).rename(broken / "gptq_model-4bit-32g.safetensors")
    change_json(broken / "config.json", quantization_config=None)
    config = {"bits": 4, "group_size": 32, "damp_percent": 0.01, "desc_act": False, "sym": True}
    (broken / "quantize_config.json").write_text(json.dumps(config | {"model_file_base_name": "gptq_model-4bit-32g"}))

    def change(tensors):
        for key in [key for key in tensors if key.endswith("g_idx")]:
            del tensors[key]
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)

    change_tensors(broken, change, "gptq_model-4bit-32g.safetensors")
    loaded = load_quantized(broken)
    assert_same(loaded, load_quantized(sym))
    assert loaded.config.quantization_config["model_file_base_name"] == "gptq_model-4bit-32g"
    assert not any(layer.act_order for layer in inspect_checkpoint(broken).layers)


def test_an_adapter_beside_the_model_is_not_read(sym, broken):
    save_file({"lora_A.weight": torch.ones(2)}, broken / "adapter_model.safetensors")
    assert_same(load_quantized(broken), load_quantized(sym))


def test_unknown_fields_survive_a_load_and_resave(broken, tmp_path):
    meta = {"quantizer": ["gptqmodel:5.4.0"], "mse": 0.0, "v2_alpha": 0.25, "deep": {"a": [None]}}
    relabel(broken, meta=meta, lm_head=False, inner={"x": 1}, format="gptq")
    save_quantized(load_quantized(broken), tmp_path / "m")
    written = json.loads((tmp_path / "m" / "config.json").read_text())["quantization_config"]
    assert written["inner"] == {"x": 1}
    assert written["format"] == "gptq"
    assert written["meta"] == meta | {"group_aware": True}


def test_config_json_wins_and_each_may_be_missing(broken, sym):
    change_json(broken / "quantize_config.json", bits=8)
    assert_same(load_quantized(broken), load_quantized(sym))
    (broken / "quantize_config.json").unlink()
    assert_same(load_quantized(broken), load_quantized(sym))


def restore_zeros(tensors, old, new):
    """Rewrite every qzeros of a 4-bit checkpoint from one format to another."""
    for key in [key for key in tensors if key.endswith("qzeros")]:
        zeros = unpack_zeros(tensors[key], 4, tensors[key].shape[1] * 8, old)
        tensors[key] = pack_zeros(zeros, 4, new)


@pytest.mark.parametrize("label", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("stored", ["gptq", "gptq_v2"])
def test_symmetric_zero_points_tell_their_format_whatever_the_label(sym, broken, tmp_path, caplog, stored, label):
    expected = load_quantized(sym)
    change_tensors(broken, lambda tensors: restore_zeros(tensors, "gptq", stored))
    relabel(broken, checkpoint_format=label)
    with caplog.at_level(logging.WARNING):
        loaded = load_quantized(broken)
    assert torch.equal(logits(loaded), logits(expected))
    found = inspect_checkpoint(broken)
    dialect = {"gptq": "v1", "gptq_v2": "v2"}[stored]
    assert {(layer.dialect, layer.evidence) for layer in found.layers} == {(dialect, "tensors")}
    if stored == label:
        assert not caplog.records
        assert not found.findings
    else:
        assert f"and 13 more: labelled {label!r}, but its zero points are stored as {dialect}" in caplog.text
        assert [(f.kind, f.repair) for f in found.findings] == 14 * [("label", "lossless")]
    save_quantized(loaded, tmp_path / "m")  # with the right label
    assert inspect_checkpoint(tmp_path / "m").checkpoint_format == stored
    assert not inspect_checkpoint(tmp_path / "m").findings
    assert torch.equal(logits(load_quantized(tmp_path / "m")), logits(expected))


@pytest.mark.parametrize("stored", ["gptq", "gptq_v2"])
def test_asymmetric_zero_points_are_read_as_labelled(asym, tmp_path, stored):
    folder = shutil.copytree(asym, tmp_path / "m")
    change_tensors(folder, lambda tensors: restore_zeros(tensors, "gptq_v2", stored))
    relabel(folder, checkpoint_format=stored)
    loaded = load_quantized(folder)
    assert torch.equal(logits(loaded), logits(load_quantized(asym)))
    assert {layer.evidence for layer in inspect_checkpoint(folder).layers} == {"label"}


def test_asymmetric_zero_points_that_look_symmetric(tmp_path):
    """Every group spans [-7, 8] steps: its zero point is 7, which a symmetric v1 layer stores for 8."""
    model = tiny("llama")
    with torch.no_grad():
        values = torch.arange(-7, 9) / 64
        model.get_submodule(Q_PROJ).weight.copy_(values.repeat(4).expand(64, 64))
    config, work = QuantizeConfig(4, 32, sym=False), tmp_path / "work"
    resumed = copy.deepcopy(model)
    expected = model.get_submodule(Q_PROJ).weight.clone()
    for each in (model, resumed):
        quantize_model(each, batches(2), config, method="rtn", workdir=work, progress=False)
        assert torch.equal(each.get_submodule(Q_PROJ).dequantize(torch.float32), expected)
    save_quantized(model, tmp_path / "m")
    loaded: Any = load_quantized(tmp_path / "m")
    assert torch.equal(loaded.get_submodule(Q_PROJ).dequantize(torch.float32), expected)
    assert not inspect_checkpoint(tmp_path / "m").findings


def test_scales_of_any_dtype(sym, broken):
    def change(tensors):
        for key in [key for key in tensors if key.endswith("scales")]:
            tensors[key] = tensors[key].float()

    change_tensors(broken, change)
    loaded = load_quantized(broken)
    assert loaded.get_submodule(Q_PROJ).scales.dtype == torch.float32
    assert torch.equal(logits(loaded), logits(load_quantized(sym)))


def test_64_bit_g_idx(sym, broken):
    change_tensors(broken, lambda tensors: tensors.update({f"{Q_PROJ}.g_idx": tensors[f"{Q_PROJ}.g_idx"].long()}))
    assert_same(load_quantized(broken), load_quantized(sym))


# what is broken is refused


def put(key, value):
    return lambda tensors: tensors.update({key: value(tensors) if callable(value) else value})


BROKEN = {
    "g_idx too large": (
        put(f"{Q_PROJ}.g_idx", lambda t: t[f"{Q_PROJ}.g_idx"] + 1),
        rf"{Q_PROJ}.*g_idx must lie in \[0, 1\] for 2 groups, got values in \[1, 2\]",
    ),
    "g_idx negative": (put(f"{Q_PROJ}.g_idx", lambda t: -t[f"{Q_PROJ}.g_idx"]), rf"{Q_PROJ}.*got values in \[-1, 0\]"),
    "g_idx past 32 bits": (
        put(f"{Q_PROJ}.g_idx", torch.full((64,), 2**32)),
        rf"{Q_PROJ}.*got values in \[2147483647, 2147483647\]",
    ),
    "g_idx too short": (
        put(f"{Q_PROJ}.g_idx", torch.zeros(63, dtype=torch.int32)),
        rf"{Q_PROJ}.*g_idx must have shape",
    ),
    "g_idx of floats": (put(f"{Q_PROJ}.g_idx", torch.zeros(64)), rf"{Q_PROJ}.*g_idx must be torch.int32"),
    "no scales": (lambda t: t.pop(f"{Q_PROJ}.scales"), rf"{Q_PROJ}.*scales"),
    "no qzeros": (lambda t: t.pop(f"{Q_PROJ}.qzeros"), rf"{Q_PROJ}.*qzeros"),
    "no qweight": (lambda t: t.pop(f"{Q_PROJ}.qweight"), rf"holds {Q_PROJ}.*which the model has no place for"),
    "no norm": (lambda t: t.pop("model.norm.weight"), r"lacks 1 tensors the model needs: model\.norm\.weight"),
    "no layer": (
        lambda t: [t.pop(key) for key in list(t) if key.startswith(Q_PROJ)],
        rf"lacks 1 tensors the model needs: {Q_PROJ}\.weight",
    ),
    "surplus tensor": (put("model.extra.weight", torch.ones(1)), r"holds model\.extra\.weight, which the model has no"),
    "surplus part": (put(f"{Q_PROJ}.perm", torch.ones(1)), rf"holds {Q_PROJ}\.perm, which the model has no place for"),
    "surplus layer": (
        put("model.layers.9.mlp.up_proj.qweight", torch.zeros(8, 128, dtype=torch.int32)),
        r"model\.layers\.9\.mlp\.up_proj",
    ),
    "norm misshapen": (put("model.norm.weight", torch.ones(65)), r"model\.norm\.weight has shape \(65,\).*\(64,\)"),
    "qweight misshapen": (
        put(f"{Q_PROJ}.qweight", torch.zeros(9, 64, dtype=torch.int32)),
        rf"{Q_PROJ}: 9 rows of qweight .* fit no width for 64 inputs.*; 4 bits need qweight of shape \(8, 64\)",
    ),
    "too few columns": (
        put(f"{Q_PROJ}.qweight", torch.zeros(8, 32, dtype=torch.int32)),
        rf"{Q_PROJ}.*qweight must have 64 columns, got 32",
    ),
    "qweight of floats": (put(f"{Q_PROJ}.qweight", torch.zeros(8, 64)), rf"{Q_PROJ}.*qweight must be torch.int32"),
    "qweight a vector": (
        put(f"{Q_PROJ}.qweight", torch.zeros(8, dtype=torch.int32)),
        rf"{Q_PROJ}.*qweight must be a matrix, got shape \(8,\)",
    ),
    "scales misshapen": (put(f"{Q_PROJ}.scales", torch.ones(3, 64).half()), rf"{Q_PROJ}.*scales must have shape"),
    "scales of ints": (put(f"{Q_PROJ}.scales", torch.ones(2, 64).int()), rf"{Q_PROJ}.*scales must be"),
    "bias misshapen": (put(f"{Q_PROJ}.bias", torch.ones(63)), rf"{Q_PROJ}.*bias must have shape \(64,\), got \(63,\)"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_broken_tensors_are_refused_by_name(broken, what):
    change, message = BROKEN[what]
    change_tensors(broken, change)
    with pytest.raises(ValueError, match=f"(?s){message}"):
        load_quantized(broken)


def test_missing_bias(tmp_path):
    save_quantized(quantized("opt"), tmp_path / "m")
    name = "model.decoder.layers.1.fc1"
    change_tensors(tmp_path / "m", lambda tensors: tensors.pop(f"{name}.bias"))
    with pytest.raises(ValueError, match=f"{name}: bias is missing"):
        load_quantized(tmp_path / "m")


def test_a_bias_of_zeros_is_kept(broken):
    change_tensors(broken, put(f"{Q_PROJ}.bias", torch.zeros(64)))
    layer: Any = load_quantized(broken).get_submodule(Q_PROJ)
    assert torch.equal(layer.bias, torch.zeros(64))


@pytest.mark.parametrize("fields", [{"bits": 8}, {"group_size": 64}, {"bits": 2, "group_size": -1}])
def test_wrong_bits_or_groups_are_read_right(sym, broken, tmp_path, caplog, fields):
    """The shapes allow one width and one group size."""
    relabel(broken, **fields)
    with caplog.at_level(logging.WARNING):
        loaded = load_quantized(broken)
    assert "13 more: the config says" in caplog.text
    assert_same(loaded, load_quantized(sym))
    findings = inspect_checkpoint(broken).findings
    assert {(f.kind, f.repair) for f in findings} == {("config", "lossless")}
    assert len({f.layer for f in findings}) == 14
    save_quantized(loaded, tmp_path / "m")
    assert not inspect_checkpoint(tmp_path / "m").findings
    assert_same(load_quantized(tmp_path / "m"), loaded)


@pytest.mark.parametrize("label", [*REFUSED_FORMATS, "gptq_v3"])
@pytest.mark.parametrize("read", [load_quantized, inspect_checkpoint])
def test_other_formats_are_refused_by_name(broken, read, label):
    relabel(broken, checkpoint_format=label)
    with pytest.raises(ValueError, match=f"checkpoint_format .*'{label}'"):
        read(broken)
    relabel(broken, checkpoint_format="gptq", quant_method="awq")
    with pytest.raises(ValueError, match="quant_method is 'awq'"):
        read(broken)
    relabel(broken, quant_method="gptq", is_marlin_format=True)
    with pytest.raises(ValueError, match="Marlin"):
        read(broken)


@pytest.mark.parametrize("read", [load_quantized, inspect_checkpoint])
class TestFilesThatAreNotWhatTheyShouldBe:
    def test_no_folder(self, read, tmp_path):
        with pytest.raises(ValueError, match="nowhere is not a folder"):
            read(tmp_path / "nowhere")

    def test_no_config(self, read, broken):
        change_json(broken / "config.json", quantization_config=None)
        (broken / "quantize_config.json").unlink()
        with pytest.raises(
            ValueError, match=r"has no quantization_config in config\.json and no quantize_config\.json"
        ):
            read(broken)

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ("{", "is not valid JSON"),
            ("[1]", "must hold a JSON object"),
            ('{"quantization_config": 5}', "must be a JSON object"),
        ],
    )
    def test_config_that_is_none(self, read, broken, content, message):
        (broken / "config.json").write_text(content)
        with pytest.raises(ValueError, match=rf"config\.json {message}"):
            read(broken)

    def test_no_weights(self, read, broken):
        (broken / WEIGHTS).unlink()
        with pytest.raises(ValueError, match=r"has no \.safetensors file"):
            read(broken)

    @pytest.mark.parametrize("size", [0, 7, 1000])
    def test_truncated_weights(self, read, broken, size):
        (broken / WEIGHTS).write_bytes((broken / WEIGHTS).read_bytes()[:size])
        with pytest.raises(ValueError, match=f"{WEIGHTS} is not a readable safetensors file"):
            read(broken)

    def test_a_model_that_is_not_quantized(self, read, broken):
        tiny("llama").save_pretrained(broken / "full")
        shutil.copy(broken / "full" / WEIGHTS, broken / WEIGHTS)
        with pytest.raises(ValueError, match="holds no quantized layers"):
            read(broken)

    def test_one_tensor_in_two_files(self, read, broken):
        (broken / WEIGHTS).rename(broken / "b.safetensors")
        save_file({"model.norm.weight": torch.ones(64)}, broken / "a.safetensors")
        with pytest.raises(ValueError, match=r"model\.norm\.weight is in both a\.safetensors and b\.safetensors"):
            read(broken)

    @pytest.mark.parametrize(
        "name", ["../secret.safetensors", "/etc/passwd", "..", ".", "", "a/b.safetensors", 5, None]
    )
    def test_an_index_that_leads_out_of_the_folder(self, read, broken, tmp_path, name):
        shutil.copy(broken / WEIGHTS, tmp_path / "secret.safetensors")
        (broken / INDEX).write_text(json.dumps({"weight_map": {"x": name}}))
        with pytest.raises(ValueError, match=r"names .*, which is not a .* file of this folder"):
            read(broken)

    @pytest.mark.parametrize("content", ["{", "[]", '{"weight_map": [1]}', "{}", '{"weight_map": {"a": {}}}'])
    def test_an_index_that_is_none(self, read, broken, content):
        (broken / INDEX).write_text(content)
        with pytest.raises(ValueError, match="is not a shard index"):
            read(broken)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_hidden_layers": 10**9}, r"num_hidden_layers is 1000000000, more than the checkpoint has tensors \(63\)"),
        ({"hidden_size": 2**40}, f"hidden_size is {2**40}, more than {2**24}"),
        ({"text_config": {"head_dim": 2**30}}, "head_dim is"),
        ({"hidden_size": "many"}, "hidden_size"),
        ({"model_type": "none such"}, "none such"),
        ({"auto_map": {"AutoConfig": "evil.Config"}, "model_type": "evil"}, "trust_remote_code"),
    ],
)
def test_configs_that_build_no_model(broken, fields, message):
    """Absurd sizes are refused before anything is built, and no code of the folder is run."""
    (broken / "evil.py").write_text("raise SystemExit('ran')")
    change_json(broken / "config.json", **fields)
    with pytest.raises(ValueError, match=rf"(?s)config\.json describes no model that can be built: .*{message}"):
        load_quantized(broken)


def test_a_folder_without_the_models_config(broken):
    (broken / "config.json").unlink()
    assert len(inspect_checkpoint(broken).layers) == 14
    with pytest.raises(ValueError, match=r"broken is not a model folder: there is no .*config\.json"):
        load_quantized(broken)


def test_a_generation_config_that_is_none(broken):
    (broken / "generation_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"generation_config\.json is not a generation config"):
        load_quantized(broken)


def test_what_was_decided_is_told(sym, broken, caplog):
    with caplog.at_level(logging.INFO):
        load_quantized(sym)
    assert f"{sym}: 14 layers of 4 bits, groups of 32, zero points v1 by tensors" in caplog.text


# inspect


def test_inspect_says_what_is_there(asym, tmp_path):
    found = inspect_checkpoint(asym)
    tensors = load_file(asym / WEIGHTS)
    names = sorted(key.removesuffix(".qweight") for key in tensors if key.endswith(".qweight"))
    assert [layer.name for layer in found.layers] == names
    assert found.bytes == (asym / WEIGHTS).stat().st_size
    assert (found.path, found.checkpoint_format, found.findings) == (str(asym), "gptq_v2", [])
    assert found.config == json.loads((asym / "quantize_config.json").read_text())
    for layer in found.layers:
        own = load_quantized(asym).get_submodule(layer.name)
        assert (layer.bits, layer.group_size) == (4, 32)
        assert (layer.in_features, layer.out_features) == (own.infeatures, own.outfeatures)
        assert (layer.act_order, layer.dialect, layer.evidence) == (False, "v2", "label")
        assert layer.bytes == sum(t.nbytes for key, t in tensors.items() if key.startswith(layer.name + "."))
    save_quantized(quantized(config=QuantizeConfig(4, 32, desc_act=True)), tmp_path / "m")
    assert any(layer.act_order for layer in inspect_checkpoint(tmp_path / "m").layers)


@pytest.mark.parametrize(
    ("what", "finding"),
    [
        ("g_idx negative", "g_idx must lie in [0, 1] for 2 groups, got values in [-1, 0]"),
        (
            "g_idx past 32 bits",
            "g_idx must lie in [0, 1] for 2 groups, got values in [2147483647, 2147483647]",
        ),
        ("no scales", "scales is missing"),
        ("no qzeros", "qzeros is missing"),
        ("scales misshapen", "scales must have shape (2, 64), got (3, 64)"),
        ("qweight a vector", "qweight must be a matrix, got shape (8,)"),
        (
            "qweight misshapen",
            "9 rows of qweight and 8 columns of qzeros fit no width for 64 inputs and 64 outputs; "
            "4 bits need qweight of shape (8, 64) and 8 columns of qzeros",
        ),
    ],
)
def test_inspect_finds_what_is_broken_and_goes_on(broken, what, finding):
    change_tensors(broken, BROKEN[what][0])
    found = inspect_checkpoint(broken)
    assert [str(each) for each in found.findings] == [f"{Q_PROJ}: {finding}"]
    assert len(found.layers) == 13


@pytest.mark.parametrize(
    ("part", "tensor", "finding"),
    [
        ("qzeros", torch.zeros(1, 8, dtype=torch.int32), "qzeros must have shape (2, 8), got (1, 8)"),
        ("qzeros", torch.zeros(2, 8), "qzeros must be torch.int32, got torch.float32"),
        (
            "scales",
            torch.ones(2, 64, dtype=torch.uint8),
            "scales must be torch.float16 or torch.bfloat16 or torch.float32 or torch.float64, got torch.uint8",
        ),
    ],
)
def test_inspect_finds_odd_parts(broken, part, tensor, finding):
    change_tensors(broken, put(f"{Q_PROJ}.{part}", tensor))
    assert [str(each) for each in inspect_checkpoint(broken).findings] == [f"{Q_PROJ}: {finding}"]


# nothing is half-written


def die(*args, **kwargs):
    raise KeyboardInterrupt


def dies_at(call):
    """os.rename that dies at its nth call."""
    real, calls = os.rename, []

    def rename(old, new):
        calls.append(old)
        if len(calls) == call:
            raise KeyboardInterrupt
        real(old, new)

    return rename


def without_exchange(patch, call):
    """A system that cannot exchange two names: the first rename finds a folder, the others make room and fill it."""
    patch.setattr(atomic_module, "_exchange", lambda one, other: False)
    patch.setattr(atomic_module.os, "rename", dies_at(call))


KILLS = {
    "model": lambda patch, model, words: patch.setattr(model, "save_pretrained", die, raising=False),
    "config": lambda patch, model, words: patch.setattr(Path, "write_text", die),
    "tokenizer": lambda patch, model, words: patch.setattr(words, "save_pretrained", die, raising=False),
    "first rename": lambda patch, model, words: patch.setattr(atomic_module.os, "rename", dies_at(1)),
    "exchange": lambda patch, model, words: patch.setattr(atomic_module, "_exchange", die),
    "making room": lambda patch, model, words: without_exchange(patch, 2),
    "filling it": lambda patch, model, words: without_exchange(patch, 3),
}
ONLY_OVER_AN_OLD_FOLDER = ("exchange", "making room", "filling it")


@pytest.mark.parametrize(
    ("when", "old"),
    [(when, old) for when in KILLS for old in (True, False) if old or when not in ONLY_OVER_AN_OLD_FOLDER],
)
def test_a_killed_save_leaves_the_old_folder_and_nothing_else(asym, sym, tmp_path, monkeypatch, when, old):
    model, words, target = load_quantized(sym), tokenizer(), tmp_path / "m"
    if old:
        shutil.copytree(asym, target)
    with monkeypatch.context() as patch:
        KILLS[when](patch, model, words)
        with pytest.raises(KeyboardInterrupt):
            save_quantized(model, target, words)
    assert [path.name for path in tmp_path.iterdir()] == (["m"] if old else [])
    if old:
        contents = {path.name: path.read_bytes() for path in target.iterdir()}
        assert contents == {path.name: path.read_bytes() for path in asym.iterdir()}


def test_an_old_folder_is_replaced_whole(asym, sym, tmp_path):
    target = shutil.copytree(asym, tmp_path / "m")
    (target / "stale.json").write_text("{}")
    save_quantized(load_quantized(sym), target)
    assert sorted(path.name for path in target.iterdir()) == sorted(path.name for path in sym.iterdir())
    assert load_file(target / WEIGHTS).keys() == load_file(sym / WEIGHTS).keys()
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_empty_linked_and_relative_folders(sym, tmp_path, monkeypatch):
    model = load_quantized(sym)
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    save_quantized(model, tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real" / "config.json").exists()
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    save_quantized(model, "sub/../../there")
    assert (tmp_path / "there" / "config.json").exists()
    for target in (".", ".."):
        with pytest.raises(ValueError, match="is the working directory, which cannot be replaced"):
            save_quantized(model, target)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["here", "link", "real", "there"]
    assert not list((tmp_path / "here").iterdir())


def test_act_order_is_claimed_where_it_is(sym, tmp_path):
    """Whatever the config asked for: round-to-nearest ignores act-order, and a rule may ask for it."""
    model = tiny("llama")
    quantize_model(model, batches(2), QuantizeConfig(4, 32, desc_act=True), method="rtn", progress=False)
    save_quantized(model, tmp_path / "m")
    assert inspect_checkpoint(tmp_path / "m").config["desc_act"] is False
    model = tiny("llama")
    config = QuantizeConfig(4, 32, dynamic={".*up_proj": {"desc_act": True}})
    quantize_model(model, batches(2), config, progress=False)
    save_quantized(model, tmp_path / "m")
    assert inspect_checkpoint(tmp_path / "m").config["desc_act"] is True
    assert_same(load_quantized(tmp_path / "m"), model)


def test_what_is_not_a_model_is_never_replaced(sym, tmp_path):
    model = load_quantized(sym)
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.tex").write_text("x")
    (tmp_path / "file").write_text("x")
    for target in ("thesis", "file"):
        with pytest.raises(ValueError, match=f"{target} exists and is not a model folder; it is left alone"):
            save_quantized(model, tmp_path / target)
    assert (tmp_path / "thesis" / "thesis.tex").read_text() == "x"
    assert (tmp_path / "file").read_text() == "x"


def test_models_that_cannot_be_saved(tmp_path, sym):
    with pytest.raises(ValueError, match="no quantized layers; run quantize_model first"):
        save_quantized(tiny("llama"), tmp_path / "m")
    model: Any = load_quantized(sym)
    model.get_submodule("model.layers.1.mlp").up_proj = QuantLinear(4, 32, 64, 100)
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.up_proj has 64 inputs and 100 outputs.*no checkpoint"):
        save_quantized(model, tmp_path / "m")
    del model.config.quantization_config
    with pytest.raises(ValueError, match="no quantized layers"):
        save_quantized(model, tmp_path / "m")
    assert not list(tmp_path.iterdir())


def test_single_files_are_whole_or_absent(tmp_path, monkeypatch):
    path = tmp_path / "x"
    for write in (
        lambda: save_tensors(path, {"a": torch.ones(2, 2).t()}, {"b": "c"}),
        lambda: atomic_write(path, "text"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(atomic_module.os, "replace", die)
            with pytest.raises(KeyboardInterrupt):
                write()
        assert not list(tmp_path.iterdir())
        write()
        assert [each.name for each in tmp_path.iterdir()] == ["x"]
        path.unlink()


# load_quant


class Old(nn.Module):
    """As someone would write it around one vector case."""

    def __init__(self, bias):
        super().__init__()
        self.inner = nn.ModuleDict({"proj": nn.Linear(256, 256, bias=bias)})
        self.norm = nn.LayerNorm(256)

    def forward(self, x):
        return self.inner["proj"](x)


@pytest.mark.parametrize("suffix", ["safetensors", "pt", "pth", "bin"])
@pytest.mark.parametrize("case", CASES)
def test_files_of_colossalai_and_gptq_for_llama(case, suffix, tmp_path):
    """float32 scales, no g_idx, a bias of zeros where the layer had none."""
    data: dict[str, Any] = {"bias": torch.zeros(256)} | load(case)
    state = {f"inner.proj.{key}": data[key] for key in PARTS}
    state |= {"norm.weight": torch.full((256,), 2.0), "norm.bias": torch.zeros(256)}
    path = tmp_path / f"old.{suffix}"
    save_file(state, path) if suffix == "safetensors" else torch.save(state, path)
    model = Old(bias=bool(data["bias"].any()))
    assert load_quant(model, str(path), data["bits"], data["group_size"]) is model
    assert not model.training
    layer = model.inner["proj"]
    for key in PARTS:
        assert torch.equal(getattr(layer, key), data[key])
        assert getattr(layer, key).dtype == data[key].dtype
    y = model(data["x"].double())
    assert float((y - data["y"]).norm() / data["y"].norm()) < 1e-6  # scales are float32
    assert torch.equal(model.norm.weight, state["norm.weight"])


def test_load_quant_reads_v2_when_told(tmp_path):
    data = load("w4_g128_asym_bias")
    zeros = unpack_zeros(data["qzeros"], 4, 256, "gptq")
    state = {f"proj.{key}": data[key] for key in PARTS} | {"proj.qzeros": pack_zeros(zeros, 4, "gptq_v2")}
    save_file(state, tmp_path / "x.safetensors")
    model = nn.ModuleDict({"proj": nn.Linear(256, 256)})
    load_quant(model, tmp_path / "x.safetensors", 4, 128, checkpoint_format="gptq_v2")
    y = model["proj"](data["x"].double())
    assert float((y - data["y"]).norm() / data["y"].norm()) < 1e-6


class Bomb:
    def __reduce__(self):
        return (print, ("boom",))


def test_load_quant_refusals(tmp_path, capsys):
    data = load("w4_g128_asym_bias")
    state = {f"proj.{key}": data[key] for key in PARTS}

    def model():
        return nn.ModuleDict({"proj": nn.Linear(256, 256)})

    def attempt(content, error, message, bits=4, name="x.pt"):
        torch.save(content, tmp_path / name)
        with pytest.raises(error, match=message):
            load_quant(model(), tmp_path / name, bits, 128)

    attempt(
        {"proj.weight": torch.ones(2)}, ValueError, r"x\.pt holds no quantized layers \(no tensor ends in \.qweight\)"
    )
    attempt({"model": state}, ValueError, r"x\.pt must hold one dict of names to tensors")
    attempt([1, 2], ValueError, r"x\.pt must hold one dict")
    attempt({"proj.qweight": Bomb()}, ValueError, r"x\.pt is not a readable file of tensors alone")
    assert "boom" not in capsys.readouterr().out
    attempt({f"other.{key}": data[key] for key in ("qweight", "qzeros")}, ValueError, "does not have: other")
    attempt({key: state[key] for key in state if "scales" not in key}, ValueError, "proj: scales is missing")
    attempt(state | {"proj.more": torch.ones(1)}, ValueError, r"holds surplus 1 tensors: proj\.more")
    attempt(state, ValueError, "proj has 4 bits and groups of 128, asked for were 8 and 128", bits=8)
    attempt(state, ValueError, r"bits must be one of", bits=5)
    for content in (b"", b"not a pickle"):
        (tmp_path / "y.pt").write_bytes(content)
        with pytest.raises(ValueError, match=r"y\.pt is not a readable file of tensors alone"):
            load_quant(model(), tmp_path / "y.pt", 4, 128)
        (tmp_path / "y.safetensors").write_bytes(content)
        with pytest.raises(ValueError, match=r"y\.safetensors is not a readable safetensors file"):
            load_quant(model(), tmp_path / "y.safetensors", 4, 128)
    whole = (tmp_path / "x.pt").read_bytes()
    (tmp_path / "y.pt").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"y\.pt is not a readable file of tensors alone"):
        load_quant(model(), tmp_path / "y.pt", 4, 128)
