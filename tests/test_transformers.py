"""transformers' own from_pretrained, save_pretrained and generate, with this package's layers."""

import copy
import json
import logging
import shutil
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, GPTQConfig
from transformers.pytorch_utils import Conv1D
from transformers.quantizers import AutoHfQuantizer

import gptq_triton.integrations.transformers as integration
from gptq_triton import QuantizeConfig, QuantLinear, fuse, load_quantized, quantize_model, save_quantized
from gptq_triton.fusing import FusedPart
from gptq_triton.integrations.transformers import GptqTritonConfig, autogptq_config
from gptq_triton.packing import pack_zeros, unpack_zeros
from tests import test_experts as moe
from tests.tiny import ARCHITECTURES, batches, text, tiny, tokenizer

WEIGHTS = "model.safetensors"
Q_PROJ = "model.layers.0.self_attn.q_proj"
PROMPT = batches(1, 8)[0]
FORMS = {
    "llama": QuantizeConfig(4, 32, desc_act=True),
    "qwen3": QuantizeConfig(3, -1, sym=False, lm_head=True),
    "gemma3": QuantizeConfig(2, 16, sym=False, desc_act=True),
    "mistral": QuantizeConfig(4, 48, sym=False),
    "opt": QuantizeConfig(8, 128, sym=False, checkpoint_format="gptq"),
    "gpt2": QuantizeConfig(4, 48, checkpoint_format="gptq_v2"),
}
SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}


def quantized(name="llama", config=None):
    model, config = tiny(name), config or QuantizeConfig(4, 32)
    quantize_model(model, batches(2), config, method="gptq" if config.desc_act else "rtn", progress=False)
    return model


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A quantized model of every architecture, each in another form."""
    parent = tmp_path_factory.mktemp("transformers")
    for name, config in FORMS.items():
        save_quantized(quantized(name, config), parent / name, tokenizer())
    save_quantized(quantized(), parent / "sym")
    return parent


@pytest.fixture
def sym(folders, tmp_path):
    """A copy of a symmetric 4-bit Llama, to change."""
    return shutil.copytree(folders / "sym", tmp_path / "sym")


def change_tensors(folder, change):
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def change_config(folder, **fields):
    content = json.loads((folder / "config.json").read_text())
    content["quantization_config"] |= fields
    (folder / "config.json").write_text(json.dumps(content))


def load(folder, **options):
    return AutoModelForCausalLM.from_pretrained(folder, **options)


@torch.no_grad()
def logits(model):
    return model(batches(1)[0]).logits


def written(folder):
    return json.loads((folder / "config.json").read_text())["quantization_config"]


# loading


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_load_generate_save_reload(name, folders, tmp_path):
    expected = load_quantized(folders / name)
    model = load(folders / name, device_map="cpu")
    assert not model.training
    assert model.is_quantized
    assert model.hf_quantizer.is_trainable
    assert model.hf_quantizer.is_compileable
    assert torch.equal(logits(model), logits(expected))
    greedy = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    tokens = expected.generate(PROMPT, **greedy)
    assert torch.equal(model.generate(PROMPT, **greedy), tokens)
    if name != "opt":  # has no static cache
        assert torch.equal(model.generate(PROMPT, **greedy, cache_implementation="static"), tokens)
    model.save_pretrained(tmp_path / "again", max_shard_size="40KB")
    assert len(list((tmp_path / "again").glob("*.safetensors"))) > 1
    assert written(tmp_path / "again") == written(folders / name)
    for again in (load(tmp_path / "again"), load_quantized(tmp_path / "again")):
        assert torch.equal(logits(again), logits(expected))
        state = again.state_dict()
        for key, tensor in expected.state_dict().items():
            assert state[key].dtype == tensor.dtype, key
            assert torch.equal(state[key], tensor), key


def test_dtype_is_of_what_is_not_quantized(folders):
    model = load(folders / "sym", dtype=torch.bfloat16)
    layer = model.get_submodule(Q_PROJ)
    assert model.lm_head.weight.dtype == torch.bfloat16
    assert layer.scales.dtype == torch.float16
    assert torch.equal(layer.scales, load_file(folders / "sym" / WEIGHTS)[Q_PROJ + ".scales"])
    assert logits(model).dtype == torch.bfloat16


def test_memory_footprint_is_what_the_tensors_take(folders):
    model = load(folders / "sym")
    buffers = sum(tensor.nbytes for _, tensor in model.named_buffers())
    assert model.get_memory_footprint() == sum(p.nbytes for p in model.parameters()) + buffers
    layers = [m for m in model.modules() if isinstance(m, QuantLinear)]
    weights = sum(layer.infeatures * layer.outfeatures for layer in layers)
    assert sum(layer.qweight.nbytes for layer in layers) == weights // 2


def test_a_body_takes_a_whole_model_and_back(folders, tmp_path):
    whole, body = load(folders / "sym"), AutoModel.from_pretrained(folders / "sym")
    tokens = batches(1)[0]
    with torch.no_grad():
        assert torch.equal(body(tokens).last_hidden_state, whole.model(tokens).last_hidden_state)
    body.save_pretrained(tmp_path / "body")
    again = load(tmp_path / "body")  # its head is new
    with torch.no_grad():
        assert torch.equal(again.model(tokens).last_hidden_state, whole.model(tokens).last_hidden_state)


def test_layers_on_several_devices_and_disk(folders, tmp_path):
    places = dict.fromkeys(("model.embed_tokens", "model.layers.0", "model.rotary_emb"), "cpu")
    places |= dict.fromkeys(("model.layers.1", "model.norm", "lm_head"), "disk")
    model = load(folders / "llama", device_map=places, offload_folder=tmp_path)
    assert model.hf_device_map == places
    assert torch.equal(logits(model), logits(load(folders / "llama")))
    # as accelerate leaves a layer whose buffers it offloads
    model.get_submodule(Q_PROJ).g_idx = torch.empty(64, dtype=torch.int32, device="meta")
    with pytest.raises(ValueError, match=rf"{Q_PROJ} is offloaded"):
        model.hf_quantizer._fill(model)


# dialects


def test_zero_points_that_gptqmodel_wrote(folders, tmp_path):
    """GPTQModel subtracts 1 from all fields of a word at once, so zero points of 0 borrow from their neighbours."""
    folder = shutil.copytree(folders / "gemma3", tmp_path / "words")  # 2 bits
    expected = logits(load(folder))
    layers = [layer for layer in load(folder).modules() if isinstance(layer, QuantLinear)]
    assert any((unpack_zeros(layer.qzeros, 2, layer.outfeatures, "gptq_v2") == 0).any() for layer in layers)

    def change(tensors):
        for key in [key for key in tensors if key.endswith(".qzeros")]:
            words = tensors[key].long() - 0x55555555
            tensors[key] = ((words + 2**31) % 2**32 - 2**31).to(torch.int32)

    change_tensors(folder, change)
    change_config(folder, checkpoint_format="gptq", meta={"quantizer": ["gptqmodel:5.0"]})
    model = load(folder)
    assert torch.equal(logits(model), expected)
    model.save_pretrained(tmp_path / "again")
    assert written(tmp_path / "again")["checkpoint_format"] == "gptq_v2"
    assert torch.equal(logits(load(tmp_path / "again")), expected)


def test_v1_and_v2_of_one_model_are_the_same(folders, tmp_path):
    v2 = shutil.copytree(folders / "gpt2", tmp_path / "v2")
    expected = logits(load(v2))
    layers = {n: m for n, m in load(v2).named_modules() if isinstance(m, QuantLinear)}
    assert {layer.checkpoint_format for layer in layers.values()} == {"gptq_v2"}

    def to_v1(tensors):
        for name, layer in layers.items():
            zeros = unpack_zeros(layer.qzeros, layer.bits, layer.outfeatures, "gptq_v2")
            tensors[name + ".qzeros"] = pack_zeros(zeros, layer.bits, "gptq")

    change_tensors(v2, to_v1)
    change_config(v2, checkpoint_format="gptq")
    model = load(v2)
    assert model.config.quantization_config.checkpoint_format == model.config.quantization_config.format == "gptq"
    assert torch.equal(logits(model), expected)


def test_a_wrong_label_is_reported_and_read_right(sym, folders, tmp_path, caplog):
    change_config(sym, checkpoint_format="gptq_v2")
    with caplog.at_level(logging.WARNING):
        model = load(sym)
    assert "labelled 'gptq_v2', but its zero points are stored as v1" in caplog.text
    assert torch.equal(logits(model), logits(load(folders / "sym")))
    model.save_pretrained(tmp_path / "again")
    assert written(tmp_path / "again")["checkpoint_format"] == "gptq"


def test_a_label_decides_for_asymmetric_weights(folders, tmp_path):
    folder = shutil.copytree(folders / "opt", tmp_path / "opt")  # v1, asymmetric
    change_config(folder, checkpoint_format="gptq_v2")
    assert not torch.equal(logits(load(folder)), logits(load(folders / "opt")))


@pytest.mark.parametrize("label", [{}, {"desc_act": None}])
def test_the_gptq_for_llama_family(label, sym, folders):
    """No g_idx, float32 scales, a bias of zeros everywhere."""

    def change(tensors):
        for key in [key for key in tensors if key.endswith(".scales")]:
            name = key.removesuffix(".scales")
            tensors[key] = tensors[key].float()
            del tensors[name + ".g_idx"]
            tensors[name + ".bias"] = torch.zeros(tensors[key].shape[1])

    change_tensors(sym, change)
    change_config(sym, checkpoint_format=None, **label)
    model = load(sym)
    assert model.get_submodule(Q_PROJ).scales.dtype == torch.float32
    assert not model.get_submodule(Q_PROJ).act_order
    assert model.get_submodule(Q_PROJ).bias is not None
    assert torch.equal(logits(model), logits(load(folders / "sym")))


def test_int64_g_idx_and_a_pickle(folders, tmp_path):
    folder = shutil.copytree(folders / "llama", tmp_path / "bin")
    tensors = load_file(folder / WEIGHTS)
    tensors = {key: t.long() if key.endswith("g_idx") else t for key, t in tensors.items()}
    torch.save(tensors, folder / "pytorch_model.bin")
    (folder / WEIGHTS).unlink()
    model = load(folder)
    assert model.get_submodule(Q_PROJ).g_idx.dtype == torch.int32
    assert model.get_submodule(Q_PROJ).act_order
    assert torch.equal(logits(model), logits(load(folders / "llama")))


def test_a_folder_of_autogptq(sym, folders):
    (sym / WEIGHTS).rename(sym / "gptq_model-4bit-32g.safetensors")
    content = json.loads((sym / "config.json").read_text())
    content.pop("quantization_config")
    (sym / "config.json").write_text(json.dumps(content))
    model = load(sym, config=autogptq_config(sym))
    assert torch.equal(logits(model), logits(load(folders / "sym")))
    shutil.copy(sym / "gptq_model-4bit-32g.safetensors", sym / WEIGHTS)
    with pytest.raises(ValueError, match="must hold one model"):
        autogptq_config(sym)
    with pytest.raises(ValueError, match="is quantized already"):
        load(sym, quantization_config=GptqTritonConfig(dataset=batches(2)))


def test_synonyms_in_the_config(sym, folders):
    content = json.loads((sym / "config.json").read_text())
    found = {"quant_method": "gptq", "w_bit": 4, "q_group_size": 32, "zero_point": False, "format": "gptq"}
    content["quantization_config"] = found
    (sym / "config.json").write_text(json.dumps(content))
    assert torch.equal(logits(load(sym)), logits(load(folders / "sym")))


@pytest.mark.parametrize("spare", [{}, moe.SPARE | {r"-:.*\.block_sparse_moe\.experts": {}}, {r"-:.*experts\.0": {}}])
@pytest.mark.parametrize("name", moe.MAIN)
def test_mixture_of_experts(name, spare, tmp_path):
    model = moe.tiny(moe.FAMILIES[name])
    quantize_model(model, moe.batches(), QuantizeConfig(4, 32, dynamic=spare), method="rtn", progress=False)
    save_quantized(model, tmp_path / "moe")
    found, batch = load(tmp_path / "moe"), moe.batches(1)[0]
    assert torch.equal(moe.logits(found, batch), moe.logits(load_quantized(tmp_path / "moe"), batch))
    found.save_pretrained(tmp_path / "again")
    assert moe.on_disk(tmp_path / "again") == moe.on_disk(tmp_path / "moe")
    assert torch.equal(moe.logits(load(tmp_path / "again"), batch), moe.logits(found, batch))


def test_layers_of_different_widths(tmp_path):
    config = QuantizeConfig(4, 32, dynamic={r".*\.mlp\.": {"bits": 8, "group_size": 64}, r"-:.*\.o_proj$": {}})
    model = quantized(config=config)
    save_quantized(model, tmp_path / "mixed")
    found = load(tmp_path / "mixed")
    assert type(found.model.layers[0].self_attn.o_proj) is nn.Linear
    assert (found.model.layers[0].mlp.up_proj.bits, found.model.layers[0].mlp.up_proj.groupsize) == (8, 64)
    assert torch.equal(logits(found), logits(model))
    found.save_pretrained(tmp_path / "again")
    assert written(tmp_path / "again")["dynamic"] == written(tmp_path / "mixed")["dynamic"]


# what is broken is refused by name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(f"{Q_PROJ}.scales"), rf"{Q_PROJ}: scales is missing"),
        (lambda t: [t.pop(key) for key in list(t) if "layers" in key], "holds no quantized layers"),
        (lambda t: t[f"{Q_PROJ}.g_idx"].fill_(9), rf"(?s){Q_PROJ}: .*g_idx must lie in \[0, 1\]"),
        (lambda t: t.update({"model.extra.qweight": t[f"{Q_PROJ}.qweight"].clone()}), "model.extra"),
    ],
)
def test_broken_tensors(sym, change, message):
    change_tensors(sym, change)
    with pytest.raises(ValueError, match=message):
        load(sym)


def test_a_bias_that_is_missing(folders, tmp_path):
    folder = shutil.copytree(folders / "opt", tmp_path / "opt")
    name = "model.decoder.layers.0.fc1"
    change_tensors(folder, lambda tensors: tensors.pop(name + ".bias"))
    with pytest.raises(ValueError, match=rf"{name}: bias is missing"):
        load(folder)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"checkpoint_format": "gptq_p"}, "planar"),
        ({"is_marlin_format": True}, "Marlin"),
        ({"bits": 5}, "bits must be one of"),
        ({"dynamic": {"(": {}}}, "not a valid regex"),
    ],
)
def test_other_kinds_of_checkpoints(sym, fields, message):
    change_config(sym, **fields)
    with pytest.raises(ValueError, match=message):
        load(sym)


def test_a_layer_that_no_checkpoint_holds_is_not_saved(folders, tmp_path):
    model = load(folders / "sym")
    model.set_submodule(Q_PROJ, QuantLinear(4, 32, 64, 60))
    with pytest.raises(ValueError, match=rf"{Q_PROJ} has 64 inputs and 60 outputs"):
        model.save_pretrained(tmp_path / "no")


# the config


def test_every_field_survives(folders, sym, tmp_path):
    fields = {
        "bits": 4,
        "group_size": 32,
        "sym": True,
        "desc_act": False,
        "static_groups": True,
        "damp_percent": 0.05,
        "true_sequential": True,
        "lm_head": False,
        "dynamic": {"-:nothing": {}, "+:other": {"bits": 8}},
        "pack_dtype": "int32",
        "backend": "marlin",
        "model_seqlen": 77,
        "dataset": "c4",  # as optimum writes it
        "tokenizer": None,
        "tomorrow": {"x": [1, None]},
        "meta": {"quantizer": ["gptqmodel:5.0"], "mse": 2.4, "group_aware": True},
    }
    change_config(sym, **fields)
    model = load(sym)
    model.save_pretrained(tmp_path / "again")
    found = written(tmp_path / "again")
    assert {name: found[name] for name in fields} == fields
    assert found["quant_method"] == "gptq"
    assert found == model.config.quantization_config.to_dict()
    config = AutoConfig.from_pretrained(tmp_path / "again")
    assert GptqTritonConfig.from_dict(config.quantization_config).to_dict() == found


def test_the_config_is_transformers_own():
    config = GptqTritonConfig(bits=3, group_size=64, desc_act=True, sym=False, tokenizer="x", dataset=["a"])
    assert isinstance(config, GPTQConfig)
    assert (config.format, config.act_group_aware, config.backend) == ("gptq_v2", False, None)
    assert not {"tokenizer", "dataset"} & set(config.to_dict())
    assert json.loads(config.to_json_string())["bits"] == 3
    assert copy.deepcopy(config).to_dict() == config.to_dict()
    config.bits = 8
    assert config.to_dict()["bits"] == config.to_quantize_config().bits == 8
    assert GptqTritonConfig(4).checkpoint_format == "gptq"
    assert GptqTritonConfig.from_dict({"bits": 4, "sym": False}).checkpoint_format == "gptq"
    assert GptqTritonConfig.from_dict({"bits": 4, "format": "gptq_v2"}).checkpoint_format == "gptq_v2"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"dataset": "c4"}, "dataset must be a sequence"),
        ({"model_seqlen": 0}, "model_seqlen must be at least 1"),
        ({"quant_method": "gptq_other"}, "quant_method must be"),
        ({"quant_method": "awq"}, "awq"),
        ({"group_size": 0}, "group_size"),
    ],
)
def test_fields_out_of_range(fields, message):
    with pytest.raises(ValueError, match=message):
        GptqTritonConfig(**fields)


def test_a_name_of_its_own(folders, tmp_path):
    model = load(folders / "sym")
    model.config.quantization_config.quant_method = "gptq_triton"
    model.save_pretrained(tmp_path / "own")
    assert written(tmp_path / "own")["quant_method"] == "gptq_triton"
    integration.release_gptq()
    try:
        with pytest.raises(ImportError, match="optimum"):
            load(folders / "sym")
        assert torch.equal(logits(load(tmp_path / "own")), logits(model))
    finally:
        integration.claim_gptq()
    assert torch.equal(logits(load_quantized(tmp_path / "own")), logits(model))


# quantizing on load


@pytest.fixture(scope="module")
def floating(tmp_path_factory):
    folder = tmp_path_factory.mktemp("floating")
    tiny("llama").save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def test_quantize_on_load(floating, tmp_path):
    config = GptqTritonConfig(bits=4, group_size=32, sym=False, desc_act=True, dataset=batches())
    model = load(floating, quantization_config=config, device_map="auto")
    expected = tiny("llama")
    quantize_model(expected, batches(), QuantizeConfig(4, 32, sym=False, desc_act=True), progress=False)
    expected.to(model.device)
    assert torch.equal(logits(model), logits(expected))
    model.save_pretrained(tmp_path / "quantized")
    assert written(tmp_path / "quantized") == model.config.quantization_config.to_dict()
    assert torch.equal(logits(load(tmp_path / "quantized")), logits(model).cpu())


def test_texts_and_the_stock_config(floating):
    texts = [text(60, seed) for seed in range(3)]
    options = {"bits": 4, "group_size": 32, "model_seqlen": 24}
    tokens = [tokenizer()(item, return_tensors="pt").input_ids[0, :24] for item in texts]
    expected = logits(load(floating, quantization_config=GptqTritonConfig(dataset=tokens, **options)))
    for given in (tokenizer(), str(floating), None):
        config = GptqTritonConfig(dataset=texts, tokenizer=given, **options)
        assert torch.equal(logits(load(floating, quantization_config=config)), expected)
    stock = GPTQConfig(dataset=texts, tokenizer=tokenizer(), damp_percent=0.01, true_sequential=False, **options)
    assert torch.equal(logits(load(floating, quantization_config=stock)), expected)


def test_quantize_on_load_refuses(floating):
    with pytest.raises(ValueError, match="dataset must be given"):
        load(floating, quantization_config=GptqTritonConfig())
    config = GptqTritonConfig(dataset=batches(2))
    with pytest.raises(ValueError, match="device_map must name one device"):
        load(floating, quantization_config=config, device_map={"model": "cpu", "lm_head": "disk"})


def test_push_to_hub(folders, tmp_path, monkeypatch):
    """What would be sent is a folder that loads."""
    hub = tmp_path / "hub"
    hub.mkdir()

    class Api:
        def create_repo(self, repo_id, **_):
            return SimpleNamespace(repo_id=repo_id)

        def create_commit(self, repo_id, operations, **_):
            assert repo_id == "me/model"
            for operation in operations:
                shutil.copy(operation.path_or_fileobj, hub / operation.path_in_repo)

    monkeypatch.setattr("transformers.utils.hub.hf_api", Api)
    card = ModelCard("a model")  # the hub would be asked for one
    monkeypatch.setattr("transformers.utils.hub.create_and_tag_model_card", lambda *_, **__: card)
    model = load(folders / "llama")
    model.push_to_hub("me/model")
    assert {"config.json", "model.safetensors"} <= {file.name for file in hub.iterdir()}
    for again in (load(hub), load_quantized(hub)):
        assert torch.equal(logits(again), logits(model))


# merged siblings


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_a_fused_model_is_saved_and_dequantized_as_any(name, folders, tmp_path):
    model, expected = load(folders / name), load(folders / name)
    assert any(isinstance(module, FusedPart) for module in fuse(model).modules())
    assert (logits(model) - logits(expected)).norm() <= 1e-6 * logits(expected).norm()
    model.save_pretrained(tmp_path / "transformers")
    save_quantized(model, tmp_path / "ours")
    for again in (load(tmp_path / "transformers"), load_quantized(tmp_path / "ours")):
        assert again.state_dict().keys() == expected.state_dict().keys()
        assert torch.equal(logits(again), logits(expected))
    assert written(tmp_path / "transformers") == written(folders / name)
    floats = model.dequantize()
    assert not any(isinstance(module, (QuantLinear, FusedPart)) for module in floats.modules())
    assert (logits(floats) - logits(expected)).norm() <= 1e-6 * logits(expected).norm()


# back to floats


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_dequantize(name, folders, tmp_path):
    model = load(folders / name)
    expected = logits(model)
    floats = model.dequantize()
    assert not floats.is_quantized
    assert not any(isinstance(layer, QuantLinear) for layer in floats.modules())
    if name == "gpt2":
        assert isinstance(floats.transformer.h[0].mlp.c_fc, Conv1D)
    assert (logits(floats) - expected).norm() <= 1e-6 * expected.norm()
    floats.save_pretrained(tmp_path / "floats")
    again = load(tmp_path / "floats")
    assert torch.equal(logits(again), logits(floats))
    half = load(folders / name).dequantize(torch.float16)
    assert half.get_output_embeddings().weight.dtype == torch.float32
    assert torch.float16 in {p.dtype for p in half.parameters()}


def test_registered_under_both_names():
    for method in ("gptq", "gptq_triton"):
        made = AutoHfQuantizer.from_config({"quant_method": method, "bits": 4}, pre_quantized=True)
        assert isinstance(made, integration.GptqTritonQuantizer)
