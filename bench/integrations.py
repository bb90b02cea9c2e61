"""transformers and PEFT on SmolLM2-135M: what must hold on tiny models, on a real one. 10 minutes on 2 cores."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from record import folder, provenance, write
from torch import Tensor
from transformers import AutoModelForCausalLM

import gptq_triton.integrations.transformers  # noqa: F401 - teaches transformers to load GPTQ folders
from gptq_triton import QuantizeConfig, load_quantized, quantize_model, save_quantized
from gptq_triton.demo import PROMPT, load_smollm2, speeches
from gptq_triton.evaluate import random_segments, tokenize
from gptq_triton.integrations.peft import register

STEPS, LENGTH = 50, 128


@torch.no_grad()
def logits(model: Any, tokens: Tensor) -> Tensor:
    return model(tokens).logits


def loading(saved: Path, again: Path, tokens: Tensor, prompt: Tensor) -> dict[str, Any]:
    """Load, generate, save and reload through transformers, against load_quantized."""
    reference: Any = load_quantized(saved, "cpu")
    model: Any = AutoModelForCausalLM.from_pretrained(saved, device_map="cpu")
    expected = logits(reference, tokens)
    spoken: dict[str, Any] = {"max_new_tokens": 20, "do_sample": False}
    out = reference.generate(prompt, **spoken)
    model.save_pretrained(again)
    reloaded: Any = AutoModelForCausalLM.from_pretrained(again)
    return {
        "logits_equal": torch.equal(logits(model, tokens), expected),
        "generated_equal": torch.equal(model.generate(prompt, **spoken), out),
        "static_cache_equal": torch.equal(model.generate(prompt, **spoken, cache_implementation="static"), out),
        "reloaded_equal": torch.equal(logits(reloaded, tokens), expected),
        "memory_footprint": model.get_memory_footprint(),
    }


def adapted(model: Any, dora: bool) -> Any:
    config = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", use_dora=dora, task_type="CAUSAL_LM")
    torch.manual_seed(0)
    return get_peft_model(prepare_model_for_kbit_training(model, False), register(config, model))


def train(model: Any, samples: list[Tensor]) -> list[float]:
    """The loss of every step, each on a sample of its own."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    losses = []
    for tokens in samples:
        loss = model.train()(tokens[None], labels=tokens[None]).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def gradients(model: Any, tokens: Tensor) -> Tensor:
    """All of an adapter's gradients in a row; they are 0 for A as long as B is, so B is not."""
    rng = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.copy_(0.01 * torch.randn(parameter.shape, generator=rng))
    model.zero_grad()
    model.eval()(tokens[None], labels=tokens[None]).loss.backward()
    return torch.cat([p.grad.double().flatten() for p in model.parameters() if p.requires_grad])


def adapters(saved: Path, samples: list[Tensor]) -> dict[str, Any]:
    """Losses over the quantized and the dequantized model, gradients against float64."""
    found: dict[str, Any] = {}
    for dora in (False, True):
        quantized = train(adapted(AutoModelForCausalLM.from_pretrained(saved), dora), samples)
        floating = train(adapted(AutoModelForCausalLM.from_pretrained(saved).dequantize(), dora), samples)
        ends = [sum(losses[-10:]) / 10 for losses in (quantized, floating)]
        found["dora" if dora else "lora"] = {
            "loss_first_10": sum(quantized[:10]) / 10,
            "loss_last_10": ends[0],
            "loss_last_10_dequantized": ends[1],
            "off": abs(ends[0] / ends[1] - 1),
        }
        print(found, flush=True)
    exact = gradients(adapted(AutoModelForCausalLM.from_pretrained(saved).dequantize().double(), False), samples[0])
    for name in ("quantized", "dequantized"):
        model = AutoModelForCausalLM.from_pretrained(saved)
        model = adapted(model if name == "quantized" else model.dequantize(), False)
        off = (gradients(model, samples[0]) - exact).norm() / exact.norm()
        found[f"gradient_error_{name}"] = off.item()
    return found


def main() -> None:
    model, tokenizer = load_smollm2()
    text = tokenize(tokenizer, speeches(1982, 2000))
    config = QuantizeConfig(4, 128, sym=False, desc_act=True)
    quantize_model(model, random_segments(text, 512, 4, seed=0), config)
    prompt: Any = tokenizer(PROMPT, return_tensors="pt").input_ids
    tokens = random_segments(text, 256, 1, seed=1)[0][None]
    with tempfile.TemporaryDirectory() as scratch:
        saved = Path(scratch) / "model"
        save_quantized(model, saved, tokenizer)
        del model
        result: dict[str, Any] = {"transformers": loading(saved, Path(scratch) / "again", tokens, prompt)}
        print(result, flush=True)
        result["peft"] = adapters(saved, random_segments(text, LENGTH, STEPS, seed=2))
    method = f"SmolLM2-135M, 4 bits, groups of 128, asymmetric, act-order; LoRA rank 8, {STEPS} x {LENGTH} tokens"
    write(folder() / "integrations.json", provenance(method) | result)


if __name__ == "__main__":
    main()
