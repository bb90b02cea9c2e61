"""Mixture-of-experts models: taking experts apart, quantizing them, names on disk."""

import copy
import logging

import pytest
import torch
from safetensors import safe_open
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    GptOssConfig,
    GraniteMoeConfig,
    MixtralConfig,
    NemotronHConfig,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
)

from gptq_triton import QuantizeConfig, QuantLinear, estimate, load_quantized, quantize_model, save_quantized
from gptq_triton.experts import Experts, is_fused, match_checkpoint, routers, skeleton, unfuse
from gptq_triton.ranks import Ranks
from gptq_triton.streaming import Observer, runner

SIZES = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "tie_word_embeddings": False,
}
QWEN = SIZES | {"num_experts": 4, "moe_intermediate_size": 32, "head_dim": 16}
FAMILIES = {
    "mixtral": MixtralConfig(**SIZES, num_local_experts=4),
    "qwen3_moe": Qwen3MoeConfig(**QWEN),
    "qwen2_moe": Qwen2MoeConfig(**QWEN, shared_expert_intermediate_size=32),
    "deepseek_v3": DeepseekV3Config(
        **SIZES | {"num_key_value_heads": 4},
        n_routed_experts=4,
        n_group=1,
        topk_group=1,
        moe_intermediate_size=32,
        first_k_dense_replace=1,
        q_lora_rank=32,
        kv_lora_rank=32,
        qk_rope_head_dim=16,
        qk_nope_head_dim=16,
        v_head_dim=16,
    ),
}
PUBLISHED = {
    "mixtral": "model.layers.1.block_sparse_moe.experts.3.w1",
    "qwen3_moe": "model.layers.1.mlp.experts.3.gate_proj",
    "qwen2_moe": "model.layers.1.mlp.experts.3.gate_proj",
    "deepseek_v3": "model.layers.1.mlp.experts.3.gate_proj",
}
MAIN = ("mixtral", "qwen3_moe")
CONFIG = QuantizeConfig(bits=4, group_size=32)
SPARE = {r"-:.*\.mlp\.experts": {}}


def tiny(config, experts="eager"):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(config), experts_implementation=experts).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.15)
    return model


def batches(count=8, length=32):
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(64, (2, length), generator=generator) for _ in range(count)]


def logits(model, batch):
    with torch.no_grad():
        return model(batch).logits


def on_disk(folder):
    with safe_open(folder / "model.safetensors", "pt") as file:
        return set(file.keys())


@pytest.mark.parametrize("experts", ["eager", "batched_mm", "grouped_mm"])
@pytest.mark.parametrize("name", FAMILIES)
def test_unfused_computes_the_same(name, experts):
    model, batch = tiny(FAMILIES[name], experts), batches(1)[0]
    expected = logits(model, batch)
    weights = sum(p.numel() for p in model.parameters())
    unfuse(model)
    assert not any(map(is_fused, model.modules()))
    assert sum(p.numel() for p in model.parameters()) == weights
    assert (logits(model, batch) - expected).norm() <= 1e-5 * expected.norm()
    assert torch.equal(logits(copy.deepcopy(model), batch), logits(model, batch))
    unfuse(model)  # nothing left to do


def test_bfloat16_and_gradients():
    model = tiny(FAMILIES["mixtral"]).bfloat16()
    x, index = torch.randn(32, 64).bfloat16(), torch.randint(4, (32, 2))
    arguments = (x, index, torch.rand(32, 2).bfloat16())
    expected = model.model.layers[0].mlp.experts(*arguments)
    unfuse(model)
    found = model.model.layers[0].mlp.experts(*arguments)
    assert found.dtype == torch.bfloat16
    assert (found - expected).norm() <= 2**-7 * expected.norm()
    found.sum().backward()
    assert model.model.layers[0].mlp.experts[0].w1.weight.grad is not None


def test_experts_without_a_gate():
    config = NemotronHConfig(
        **SIZES | {"num_hidden_layers": None},
        layers_block_type=["moe", "attention"],
        n_routed_experts=4,
        n_group=1,
        topk_group=1,
        moe_intermediate_size=32,
        moe_shared_expert_intermediate_size=32,
        head_dim=16,
    )
    model, batch = tiny(config), batches(1)[0]
    expected = logits(model, batch)
    unfuse(model)
    (experts,) = (m for m in model.modules() if isinstance(m, Experts))
    assert list(experts[0]) == ["up_proj", "down_proj"]
    assert (logits(model, batch) - expected).norm() <= 1e-5 * expected.norm()


def test_checkpoints_without_names_for_experts_get_the_usual_ones():
    model = tiny(GraniteMoeConfig(**SIZES, num_local_experts=4))
    unfuse(model)
    assert list(model.model.layers[0].block_sparse_moe.experts[0]) == ["gate_proj", "up_proj", "down_proj"]


def test_tokens_and_experts_that_take_no_part():
    experts = unfused_block("mixtral").experts
    x, weights = torch.randn(3, 64), torch.rand(3, 2)
    index = torch.tensor([[0, 2], [4, 4], [2, 4]])  # 4: past the last one
    y = experts(x, index, weights)
    assert not y[1].any()
    assert torch.allclose(y[2], experts(x[2:], torch.tensor([[2]]), weights[2:, :1])[0], atol=1e-6)
    assert experts(x[:0], index[:0], weights[:0]).shape == (0, 64)


def unfused_block(name):
    model = tiny(FAMILIES[name])
    unfuse(model)
    return model.model.layers[1].mlp


def test_gate_and_up_are_given_one_tensor():
    block, seen = unfused_block("mixtral"), {}
    for leaf in ("w1", "w3"):
        layer = block.experts[1][leaf]
        layer.register_forward_pre_hook(lambda _, args, leaf=leaf: seen.setdefault(leaf, args[0]))
    block(torch.randn(1, 16, 64))
    assert seen["w1"] is seen["w3"]


def test_layouts_that_are_not_understood_are_refused_by_name():
    config = GptOssConfig(**SIZES, num_local_experts=4, head_dim=16)
    model = tiny(config)
    with pytest.raises(ValueError, match=r"model\.layers\.0\.mlp\.experts \(GptOssExperts\).*transposed.*dynamic"):
        quantize_model(model, batches(), CONFIG, progress=False)
    assert is_fused(model.model.layers[0].mlp.experts)
    reports = quantize_model(model, batches(), QuantizeConfig(4, 32, dynamic=SPARE), progress=False)
    assert len(reports) == 2 * 4  # attention

    def altered(change):
        model = tiny(FAMILIES["mixtral"])
        change(model.model.layers[1].mlp.experts)
        return model

    changes = {
        "interleaved": lambda m: setattr(m, "is_concatenated", False),
        "interface": lambda m: delattr(m, "is_transposed"),
        "extra": lambda m: m.register_parameter("extra", nn.Parameter(torch.ones(1))),
        "has shape": lambda m: setattr(m, "down_proj", nn.Parameter(torch.ones(4, 64, 32))),
    }
    for reason, change in changes.items():
        model = altered(change)
        with pytest.raises(ValueError, match=rf"layers\.1\.mlp\.experts .*{reason}"):
            unfuse(model)
        assert is_fused(model.model.layers[0].mlp.experts)  # nothing was changed


def test_routers_stay_in_full_precision():
    model = tiny(FAMILIES["qwen2_moe"])
    expected = {f"model.layers.{i}.mlp.shared_expert_gate" for i in range(2)}
    assert routers(model) == expected
    unfuse(model)
    assert routers(model) == expected
    block = model.model.layers[0].mlp
    block.gate = nn.ModuleDict({"wg": nn.Linear(64, 4)})
    assert routers(model) == expected | {"model.layers.0.mlp.gate.wg"}
    assert routers(nn.Sequential(nn.Linear(4, 4))) == set()


@pytest.mark.parametrize("name", FAMILIES)
def test_quantize_save_load(name, tmp_path):
    model, batch = tiny(FAMILIES[name]), batches(1)[0]
    full = logits(model, batch)
    reports = {report.name: report for report in quantize_model(model, batches(), CONFIG, progress=False)}
    inside = [report for path, report in reports.items() if ".experts." in path]
    sparse = 1 if name == "deepseek_v3" else 2
    assert len(inside) == sparse * 4 * 3
    assert all(report.method == "gptq" and report.error < report.error_rtn * 1.05 for report in inside)
    assert any(".self_attn." in path for path in reports)
    assert all(isinstance(model.get_submodule(path), QuantLinear) for path in reports)
    quantized = logits(model, batch)
    assert (quantized - full).norm() < 0.5 * full.norm()

    save_quantized(model, tmp_path / "out")
    keys = on_disk(tmp_path / "out")
    assert {f"{PUBLISHED[name]}.{part}" for part in ("qweight", "qzeros", "scales", "g_idx")} <= keys
    assert PUBLISHED[name].rpartition(".experts")[0] + ".gate.weight" in keys
    assert sum(key.endswith(".qweight") for key in keys) == len(reports)
    loaded = load_quantized(tmp_path / "out", device="cpu")
    assert torch.equal(logits(loaded, batch), quantized)
    state = model.state_dict()
    assert loaded.state_dict().keys() == state.keys()
    assert all(torch.equal(tensor, state[key]) for key, tensor in loaded.state_dict().items())
    save_quantized(loaded, tmp_path / "again")
    assert on_disk(tmp_path / "again") == keys


def test_a_model_that_was_loaded_by_transformers(tmp_path):
    """It remembers the conversions of its checkpoint; the names on disk are the same."""
    tiny(FAMILIES["mixtral"]).save_pretrained(tmp_path / "full")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "full")
    quantize_model(model, batches(), CONFIG, progress=False)
    save_quantized(model, tmp_path / "out")
    assert f"{PUBLISHED['mixtral']}.qweight" in on_disk(tmp_path / "out")
    batch = batches(1)[0]
    assert torch.equal(logits(load_quantized(tmp_path / "out", device="cpu"), batch), logits(model, batch))


@pytest.mark.parametrize("name", MAIN)
def test_experts_may_stay_in_full_precision(name, tmp_path):
    model, batch = tiny(FAMILIES[name]), batches(1)[0]
    reports = quantize_model(model, batches(), QuantizeConfig(4, 32, dynamic=SPARE), progress=False)
    assert len(reports) == 2 * 4
    assert sum(map(is_fused, model.modules())) == 2
    save_quantized(model, tmp_path / "out")
    assert f"{PUBLISHED[name]}.weight" in on_disk(tmp_path / "out")
    loaded, expected = load_quantized(tmp_path / "out", device="cpu"), logits(model, batch)
    assert (logits(loaded, batch) - expected).norm() <= 1e-5 * expected.norm()


def test_rules_reach_single_experts_by_either_name(tmp_path):
    rules = {r"-:.*experts\.0\.": {}, r".*\.mlp\.experts\.1\.w2": {"bits": 8}, r".*experts\.2\.w2": {"group_size": 16}}
    model, batch = tiny(FAMILIES["mixtral"]), batches(1)[0]
    quantize_model(model, batches(), QuantizeConfig(4, 32, dynamic=rules), progress=False)
    experts = model.model.layers[0].mlp.experts
    assert isinstance(experts[0].w1, nn.Linear)
    assert (experts[1].w2.bits, experts[2].w2.groupsize) == (8, 16)
    save_quantized(model, tmp_path / "out")
    loaded = load_quantized(tmp_path / "out", device="cpu")
    assert torch.equal(logits(loaded, batch), logits(model, batch))


@pytest.mark.parametrize("sequential", [False, True])
def test_an_expert_that_saw_too_little_is_rounded_and_named(sequential, caplog):
    model = tiny(FAMILIES["qwen3_moe"])
    with torch.no_grad():
        router = model.model.layers[0].mlp.gate
        router.weight[3] = 0
        forward = router.forward

        def never_the_last(x):
            scores, weights, index = forward(x)
            return scores, weights, index.masked_fill(index == 3, 0)

        router.forward = never_the_last
    config = QuantizeConfig(4, 32, true_sequential=sequential)
    with caplog.at_level(logging.WARNING):
        reports = quantize_model(model, batches(), config, progress=False)
    poor = {report.name for report in reports if report.method == "rtn"}
    prefix = "model.layers.0.mlp.experts.3."
    assert poor == {prefix + leaf for leaf in ("gate_proj", "up_proj", "down_proj")}
    assert all(report.tokens == 0 for report in reports if report.name in poor)
    for name in poor:
        assert name in caplog.text


def test_padding_does_not_reach_experts():
    """Tokens counted with padding are those counted without, for experts and shared experts too."""
    model, data = tiny(FAMILIES["qwen2_moe"]), batches(1)[0]
    unfuse(model)
    block = model.model.layers[0].mlp
    layers = {"expert": block.experts[0].up_proj, "shared": block.shared_expert.up_proj}
    x = model.model.embed_tokens(data)  # (2, 32, 64)
    mask = torch.ones_like(data, dtype=torch.bool)
    mask[1, 20:] = False

    def seen(rows, mask):
        observer = Observer(layers)
        with torch.no_grad():
            observer.watch(runner(block, [rows], [((), {})], torch.device("cpu")), [mask], Ranks(1))
        return {name: observer.hessian(name) for name in layers}

    padded, plain = seen(x, mask), seen(x[mask][None], None)
    for name in layers:
        assert padded[name].tokens == plain[name].tokens > 0
        assert torch.allclose(padded[name].sum, plain[name].sum, rtol=1e-4, atol=1e-4)
    assert padded["shared"].tokens == 32 + 20


def test_estimate_counts_experts_and_leaves_the_model_alone():
    model = tiny(FAMILIES["mixtral"])
    keys = list(model.state_dict())
    found = estimate(model, batches(), CONFIG)
    assert list(model.state_dict()) == keys
    assert found.layers == 2 * (4 + 4 * 3)
    assert all(p.is_meta for p in skeleton(model).parameters())


def test_a_resumed_run_is_identical(tmp_path):
    first, second = tiny(FAMILIES["qwen3_moe"]), tiny(FAMILIES["qwen3_moe"])
    quantize_model(first, batches(), CONFIG, workdir=tmp_path, progress=False)
    (tmp_path / "block-00001.safetensors").unlink()
    quantize_model(second, batches(), CONFIG, workdir=tmp_path, progress=False)
    state = first.state_dict()
    assert all(torch.equal(tensor, state[key]) for key, tensor in second.state_dict().items())


def test_match_checkpoint_names():
    model = tiny(FAMILIES["mixtral"]).to("meta")
    old, new = "model.layers.0.block_sparse_moe.experts.0.w2.qweight", "model.layers.0.mlp.experts.0.w2.qweight"
    assert match_checkpoint(model, [old, "model.norm.weight"]) == {old: new, "model.norm.weight": "model.norm.weight"}
    assert isinstance(model.model.layers[0].mlp.experts, Experts)
    assert match_checkpoint(model, [new, "no.such.thing"]) == {new: new, "no.such.thing": "no.such.thing"}
    assert match_checkpoint(nn.Sequential(nn.Linear(4, 4)), ["0.weight"]) == {"0.weight": "0.weight"}
    with pytest.raises(ValueError, match=r"are both model\.layers\.0\.mlp\.experts\.0\.w2\.qweight"):
        match_checkpoint(model, [old, new])
