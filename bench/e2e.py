"""A whole model: tokens per second of a Llama-3.1-8B-shaped model in fp16 and with quantized decoder layers.

    python bench/e2e.py
    python bench/e2e.py --jobs decode-1 prefill --seconds 400

Random weights, made on the GPU. "decode-B": greedy decoding of B sequences with transformers' static cache,
compiled by torch.compile and captured in a CUDA graph. "prefill": the forward of 2048 tokens, eager. "lora": a
training step of 4 x 1024 tokens with adapters of rank 16 on every decoder layer, eager. The decoder's linear layers
are also timed alone, in a graph of their own with the same weights: the rest of a step is what no kernel of ours can
help.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from cases import Case
from ledger import Ledger
from method import Captured, capture, interleaved
from record import folder, provenance
from torch import Tensor, nn
from torch._inductor import config as inductor
from weights import random_weight

import gptq_triton
from gptq_triton import QuantLinear, find_layers

PROMPT, CACHE = 128, 256  # tokens; attention goes over the whole static cache
STEPS = 4  # decoded in one graph
PREFILL = 2048
LORA_BATCH, LORA_TOKENS, LORA_RANK = 4, 1024, 16
JOBS = ("decode-1", "decode-16", "prefill", "lora")
METHOD = (
    f"random weights; decode: prompt {PROMPT}, static cache {CACHE}, torch.compile, CUDA graph of {STEPS} greedy "
    f"steps; prefill: {PREFILL} tokens, eager; lora: {LORA_BATCH} x {LORA_TOKENS} tokens, rank {LORA_RANK} on every "
    "decoder layer, AdamW, eager; kinds interleaved, medians; linear: the decoder's linear layers alone, in a graph; "
    "pdl: with torch._inductor.config.triton.enable_pdl, which lets a kernel begin before the one before it ends"
)


@dataclass(frozen=True)
class Eager:
    """A call with the face of a graph."""

    replay: Callable[[], Any]


class Lora(nn.Module):
    """A frozen layer and a trainable product of rank r beside it."""

    def __init__(self, layer: nn.Linear | QuantLinear, rank: int, like: Tensor):
        super().__init__()
        self.layer = layer
        self.down = nn.Parameter(torch.randn(rank, layer.in_features, device=like.device, dtype=like.dtype) * 0.01)
        self.up = nn.Parameter(torch.zeros(layer.out_features, rank, device=like.device, dtype=like.dtype))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + (x @ self.down.t()) @ self.up.t()


def llama(layers: int, device: str = "cuda", **sizes: Any) -> Any:
    """Llama-3.1-8B with so many layers and random weights, float16."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    settings: dict[str, Any] = {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": layers,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "max_position_embeddings": 131072,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
        "pad_token_id": 0,
    }
    config = LlamaConfig(**(settings | sizes))
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=torch.float16).eval().requires_grad_(False)


def quantized(model: Any, bits: int) -> Any:
    """A copy whose decoder layers hold random codes."""
    model = copy.deepcopy(model)
    layers: dict[str, Any] = find_layers(model.model)
    for seed, (name, layer) in enumerate(layers.items()):
        case = Case("matmul", 0, layer.out_features, layer.in_features, bits)
        model.model.set_submodule(name, QuantLinear.from_packed(random_weight(case, model.device, seed)))
    return model


def models(layers: int, bits: int, **sizes: Any) -> dict[str, Any]:
    """Kind to model: fp16, quantized, with merged siblings, and with the output head quantized too."""
    full = llama(layers, **sizes)
    fused = quantized(full, bits)
    gptq_triton.fuse(fused)
    headed = copy.deepcopy(fused)
    case = Case("matmul", 0, full.lm_head.out_features, full.lm_head.in_features, bits)
    headed.lm_head = QuantLinear.from_packed(random_weight(case, full.device))
    plain = f"{bits}-bit"
    return {"fp16": full, plain: quantized(full, bits), f"{plain} fused": fused, f"{plain} fused, head": headed}


def decoder_layers(model: Any) -> list[nn.Linear | QuantLinear]:
    """All linear layers but the head."""
    return [layer for layer in model.model.modules() if isinstance(layer, (nn.Linear, QuantLinear))]


def decode_step(model: Any, batch: int) -> tuple[Callable[[], None], Callable[[], None]]:
    """A greedy step, compiled, after a prompt; and what turns the cache back to the prompt's end."""
    from transformers import StaticCache

    cache: Any = StaticCache(config=model.config, max_cache_len=CACHE)
    prompt = torch.randint(0, model.config.vocab_size, (batch, PROMPT), device=model.device)
    tokens = model(prompt, past_key_values=cache, logits_to_keep=1).logits.argmax(-1)
    forward = torch.compile(model.forward, dynamic=False)
    lengths = [layer.cumulative_length for layer in cache.layers]

    def step() -> None:
        tokens.copy_(forward(tokens, past_key_values=cache).logits.argmax(-1))

    def reset() -> None:
        for length in lengths:
            length.fill_(PROMPT)

    return step, reset


def linear_ms(model: Any, rows: int) -> float:
    """Milliseconds of all decoder layers in a row, for an input of so many rows."""
    inputs = {}
    calls = []
    for layer in decoder_layers(model):
        size = layer.in_features
        x = inputs.setdefault(size, torch.randn(rows, size, device=model.device, dtype=model.dtype))
        calls.append(lambda layer=layer, x=x: layer(x))
    item = capture(calls, len(calls))
    return interleaved({"linear": item}, preheat=0.1)["linear"] * item.calls / 1e3


def decode(model: Any, batch: int) -> Captured:
    step, reset = decode_step(model, batch)
    step()  # compiles
    reset()
    item = capture([step], STEPS)
    return replace(item, reset=reset)


def prefill(model: Any) -> Captured:
    ids = torch.randint(0, model.config.vocab_size, (1, PREFILL), device=model.device)
    return Captured(Eager(lambda: model(ids, use_cache=False, logits_to_keep=1)), 1)


def lora(model: Any) -> Captured:
    """Puts adapters into the model, for good."""
    for name, layer in list(model.model.named_modules()):
        if isinstance(layer, (nn.Linear, QuantLinear)):
            model.model.set_submodule(name, Lora(layer, LORA_RANK, model.model.embed_tokens.weight))
    adapters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(adapters, lr=1e-6, fused=True)
    ids = torch.randint(0, model.config.vocab_size, (LORA_BATCH, LORA_TOKENS), device=model.device)

    def step() -> None:
        with torch.enable_grad():
            model(ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return Captured(Eager(step), 1)


def measure(job: str, kinds: dict[str, Any]) -> list[dict[str, Any]]:
    """One row for each kind of model."""
    name, _, batch = job.partition("-")
    rows, captured = {}, {}
    for kind, model in kinds.items():
        row = rows[kind] = {"job": job, "kind": kind, "weights_gb": round(nbytes(model) / 1e9, 2)}
        began = time.perf_counter()
        try:
            if name == "decode":
                row["linear_ms"] = round(linear_ms(model, int(batch)), 4)
                captured[kind] = decode(model, int(batch))
            elif name == "prefill":
                row["linear_ms"] = round(linear_ms(model, PREFILL), 4)
                captured[kind] = prefill(model)
            else:
                captured[kind] = lora(model)
            captured[kind].graph.replay()
            torch.cuda.synchronize()
        except Exception as problem:  # the other kinds go on
            captured.pop(kind, None)
            row["error"] = f"{type(problem).__name__}: {problem}".replace("\n", " ")[:300]
            print(kind, row["error"], flush=True)
        row["setup_s"] = round(time.perf_counter() - began, 1)
    tokens = {"decode": int(batch or 1), "prefill": PREFILL, "lora": LORA_BATCH * LORA_TOKENS}[name]
    times = interleaved(captured, preheat=0.3) if captured else {}
    for kind, us in times.items():
        row = rows[kind]
        row |= {"ms": round(us / 1e3, 4), "tokens_per_s": round(tokens / us * 1e6, 1)}
        if "linear_ms" in row:
            row["outside_ms"] = round(us / 1e3 - row["linear_ms"], 4)
        if "fp16" in times:
            row["vs_fp16"] = round(times["fp16"] / us, 3)
    return list(rows.values())


def nbytes(model: nn.Module) -> int:
    """Of all that a module holds on this rank."""
    return sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", nargs="*", choices=JOBS, default=JOBS, help="lora changes the models: it goes last")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--kinds", nargs="*", default=[], help="of models, as in e2e.json; all without it")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="start no job after so many seconds")
    parser.add_argument("--renew", action="store_true", help="measure again what another commit measured")
    parser.add_argument("--pdl", action="store_true", help="compile with torch._inductor.config.triton.enable_pdl")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    started = time.perf_counter()
    torch._dynamo.config.recompile_limit = 64  # one compiled forward for each kind and batch
    inductor.triton.enable_pdl = options.pdl
    kinds = models(options.layers, options.bits)
    if options.kinds:
        kinds = {kind: kinds[kind] for kind in options.kinds}
    print(f"models in {time.perf_counter() - started:.0f} s", flush=True)
    ledger = Ledger(
        options.out or folder() / "e2e.json",
        provenance(METHOD) | {"layers": options.layers},
        renew=options.renew,
        identity=("job", "kind", "pdl"),
    )
    for job in sorted(options.jobs, key=JOBS.index):
        if time.perf_counter() - started > options.seconds:
            break
        how = {"pdl": True} if options.pdl else {}
        if all(ledger.has({"job": job, "kind": kind} | how) for kind in kinds):
            continue
        rows = [row | how for row in measure(job, kinds)]
        ledger.add(rows)
        for row in rows:
            print(row, flush=True)
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
