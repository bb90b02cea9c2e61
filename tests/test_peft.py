"""LoRA and DoRA over quantized layers: gradients, training, and what PEFT does with a model around them."""

import pytest
import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from transformers import AutoModelForCausalLM

from gptq_triton import QuantizeConfig, QuantLinear, fuse, merge_lora, quantize_model, save_quantized, unfuse
from gptq_triton.integrations.peft import LoraQuantLinear, register
from gptq_triton.integrations.transformers import GptqTritonConfig
from tests.tiny import batches, tiny

TARGETS = ["q_proj", "v_proj", "down_proj"]
FORMS = {
    "llama": QuantizeConfig(4, 32, desc_act=True),
    "gemma3": QuantizeConfig(3, 48, sym=False),
    "opt": QuantizeConfig(8, -1, sym=False),  # with biases
    "gpt2": QuantizeConfig(2, 16, sym=False),  # Conv1D
}
TARGETS_OF = {"opt": ["q_proj", "fc2"], "gpt2": ["c_attn", "mlp.c_proj"]}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    parent = tmp_path_factory.mktemp("peft")
    for name, config in FORMS.items():
        model = tiny(name)
        quantize_model(model, batches(2), config, method="gptq" if config.desc_act else "rtn", progress=False)
        save_quantized(model, parent / name)
    return parent


def load(folder, name="llama"):
    return AutoModelForCausalLM.from_pretrained(folder / name)


def lora(name="llama", **fields):
    return LoraConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM", target_modules=TARGETS_OF.get(name, TARGETS), **fields)


def adapted(model, config, dtype=torch.float32):
    """The model with adapters that do something, always the same."""
    torch.set_default_dtype(dtype)  # of new adapters
    try:
        found = get_peft_model(model, config)
    finally:
        torch.set_default_dtype(torch.float32)
    rng = torch.Generator().manual_seed(0)
    for name, parameter in found.named_parameters():
        if "lora_" in name and "magnitude" not in name:
            parameter.data.copy_(0.1 * torch.randn(parameter.shape, generator=rng))
    return found.eval()


def loss(model, batch=0):
    tokens = batches()[batch]
    return model(tokens, labels=tokens).loss


@torch.no_grad()
def logits(model):
    return model(batches(1)[0]).logits


def gradients(model):
    model.zero_grad()
    loss(model).backward()
    return {name: p.grad.detach() for name, p in model.named_parameters() if p.requires_grad}


def error(found, exact):
    """The relative error of all gradients together."""
    assert found.keys() == exact.keys()
    off = sum(((found[name].double() - exact[name]) ** 2).sum() for name in exact)
    return (off / sum((exact[name] ** 2).sum() for name in exact)).sqrt().item()


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("name", FORMS)
def test_gradients(name, dora, folders):
    """Against float64, no worse than floating layers are; in float64, the same."""

    def ours():
        return load(folders, name), register(lora(name, use_dora=dora))

    def plain():
        return load(folders, name).dequantize(), lora(name, use_dora=dora, fan_in_fan_out=name == "gpt2")

    def wide(model, config):
        return adapted(model.double(), config, torch.float64)

    model, floating = adapted(*ours()), adapted(*plain())
    assert sum(isinstance(m, LoraQuantLinear) for m in model.modules()) == 2 * len(lora(name).target_modules)
    exact = gradients(wide(*plain()))
    assert all(gradient.abs().max() > 0 for gradient in exact.values())
    assert error(gradients(wide(*ours())), exact) <= 1e-12
    assert error(gradients(model), exact) <= 2 * error(gradients(floating), exact)
    assert (logits(model) - logits(floating)).norm() <= 1e-5 * logits(floating).norm()


@pytest.mark.parametrize("dora", [False, True])
def test_a_new_adapter_changes_nothing(dora, folders):
    model = load(folders)
    expected = logits(model)
    found = logits(get_peft_model(model, register(lora(use_dora=dora))))
    assert (found - expected).norm() <= (1e-6 if dora else 0) * expected.norm()


def test_dora_with_dropout_and_bfloat16(folders):
    model = adapted(load(folders), register(lora(use_dora=True, lora_dropout=0.5)))
    expected = logits(model)
    model.train()
    torch.manual_seed(0)
    noisy = logits(model)
    assert not torch.equal(noisy, expected)
    assert (noisy - expected).norm() < expected.norm()
    half = adapted(load(folders).bfloat16(), register(lora(use_dora=True)))
    assert logits(half).dtype == torch.bfloat16
    assert (logits(half) - expected).norm() <= 0.05 * expected.norm()
    assert error(gradients(half), {n: g.double() for n, g in gradients(model.eval()).items()}) < 0.1


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("name", FORMS)
def test_layers_that_hold_tiles(name, dora, folders, tmp_path):
    """As they do on a GPU."""
    model, tiled = load(folders, name), load(folders, name)
    for layer in tiled.modules():
        if isinstance(layer, QuantLinear):
            layer._tile()
    model, tiled = (adapted(each, register(lora(name, use_dora=dora))) for each in (model, tiled))
    assert error(gradients(tiled), {n: g.double() for n, g in gradients(model).items()}) <= 1e-5
    tiled.save_pretrained(tmp_path)
    config = register(PeftConfig.from_pretrained(tmp_path))
    again = PeftModel.from_pretrained(load(folders, name), tmp_path, config=config)
    assert (logits(again) - logits(tiled)).norm() <= 1e-5 * logits(tiled).norm()


def test_kbit_training_and_gradient_checkpointing(folders):
    model = load(folders)
    assert all(p.requires_grad for p in model.parameters())
    expected = gradients(adapted(prepare_model_for_kbit_training(load(folders), False), register(lora())))
    assert all("lora_" in name for name in expected)
    for reentrant in (True, False):
        options = {"gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
        prepared = prepare_model_for_kbit_training(load(folders), **options)
        assert any(getattr(module, "gradient_checkpointing", False) for module in prepared.modules())
        model = adapted(prepared, register(lora())).train()
        found = gradients(model)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_fifty_steps_of_training(folders):
    """The loss falls as it does over the dequantized model."""

    def train(model):
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
        losses = []
        for step in range(50):
            optimizer.zero_grad()
            found = loss(model.train(), step % 6)
            found.backward()
            optimizer.step()
            losses.append(found.item())
        return sum(losses[:6]) / 6, sum(losses[-6:]) / 6

    start, end = train(adapted(load(folders), register(lora())))
    plain_start, plain_end = train(adapted(load(folders).dequantize(), lora()))
    assert end < 0.8 * start
    assert abs(end - plain_end) <= 0.02 * plain_end
    assert abs(start - plain_start) <= 0.02 * plain_start


def test_merging_is_refused_and_the_way_out_works(folders, tmp_path):
    model = adapted(load(folders), register(lora()))
    model.save_pretrained(tmp_path)
    expected = logits(model)
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match="Cannot merge LORA layers when the model is gptq quantized"):  # PEFT's own
            merge()
    assert torch.equal(logits(model), expected)
    base = model.unload()
    assert torch.equal(logits(base), logits(load(folders)))
    rounded = load(folders)
    assert {r.method for r in merge_lora(rounded, tmp_path)} == {"rtn"}
    base_error = (logits(load(folders)) - expected).norm()
    assert (logits(rounded) - expected).norm() < base_error  # some of it arrives
    merged = PeftModel.from_pretrained(base.dequantize(), tmp_path).merge_and_unload()
    assert (logits(merged) - expected).norm() <= 1e-5 * expected.norm()


def test_merging_is_refused_without_transformers_help(folders):
    model = load(folders)
    model.quantization_method = None
    with pytest.raises(ValueError, match=r"cannot be merged into a quantized layer"):
        adapted(model, register(lora(use_dora=True))).merge_and_unload()


@pytest.mark.parametrize("dora", [False, True])
def test_save_load_and_switch(dora, folders, tmp_path):
    model = adapted(load(folders), register(lora(use_dora=dora)))
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(load(folders), tmp_path, config=register(PeftConfig.from_pretrained(tmp_path)))
    assert torch.equal(logits(again), logits(model))
    with again.disable_adapter():
        assert torch.equal(logits(again), logits(load(folders)))


def test_one_adapter_per_row_of_a_batch(folders):
    model = adapted(load(folders), register(lora()))
    alone = logits(model)
    rows = batches(1)[0].repeat(2, 1)
    with torch.no_grad():
        found = model(rows, adapter_names=["default", "__base__"]).logits
    assert (found[:1] - alone).norm() <= 1e-5 * alone.norm()
    base = logits(load(folders))
    assert (found[1:] - base).norm() <= 1e-5 * base.norm()


def test_all_linear(folders):
    model = load(folders)
    config = LoraConfig(target_modules="all-linear")
    with pytest.raises(ValueError, match="needs the model"):
        register(config)
    found = get_peft_model(model, register(config, model))
    layers = [name for name, m in load(folders).named_modules() if isinstance(m, QuantLinear)]
    assert sorted(found.targeted_module_names) == sorted(layers)


def test_merged_layers_take_no_adapters(folders):
    model = fuse(load(folders))
    with pytest.raises(ValueError, match=r"unfuse\(model\) first"):
        register(LoraConfig(target_modules="all-linear"), model)
    with pytest.raises(ValueError, match=r"unfuse\(model\) first"):
        get_peft_model(model, register(lora()))
    assert logits(get_peft_model(unfuse(model), register(lora()))).shape == logits(load(folders)).shape


def test_transformers_own_adapters(folders):
    model = load(folders)
    before = logits(model)
    model.add_adapter(register(lora(init_lora_weights="gaussian")))
    assert torch.equal(logits(model), before)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    assert not torch.equal(logits(model), before)
    model.disable_adapters()
    assert torch.equal(logits(model), before)


def test_a_model_named_after_this_package(folders, tmp_path):
    model = load(folders)
    assert isinstance(model.config.quantization_config, GptqTritonConfig)
    model.config.quantization_config.quant_method = "gptq_triton"
    model.save_pretrained(tmp_path / "llama")
    found = adapted(prepare_model_for_kbit_training(load(tmp_path)), register(lora()))
    assert found.base_model.model.model.layers[0].mlp.down_proj.base_layer.scales.dtype == torch.float16
