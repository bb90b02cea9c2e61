"""``generate`` of transformers, compiled, against the decoding loop of e2e.py on the same model in the same run.

    python bench/generate.py
    python bench/generate.py --batches 1 --kinds fp16 "4-bit fused"

A Llama-3.1-8B-shaped model with random weights. "static": ``generate`` compiles its forward pass by itself for a static
cache and replays CUDA graphs; between steps it prepares inputs, picks the token and checks criteria, while the GPU
waits. "graphed": the same with ``custom_generate=GraphedDecoding()``.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import e2e
import torch
from ledger import Ledger
from method import interleaved
from record import folder, provenance
from torch._inductor import config as inductor

from gptq_triton.integrations.generation import GraphedDecoding

NEW_TOKENS, CALLS = 120, 5  # with what GraphedDecoding tries out, all fit into a cache of the loop's length
WAYS = ("graphed", "static")
METHOD = (
    f"random weights; {NEW_TOKENS} greedy tokens after a prompt of {e2e.PROMPT}, wall clock, "
    f"median of {CALLS} calls after the first two; ms: of a step, prompt and first token apart; tokens_per_s: of whole "
    f"calls; loop_ms: a step of e2e.py's loop (torch.compile, CUDA graph of {e2e.STEPS} steps, cache {e2e.CACHE})"
)


def seconds(model: Any, prompt: torch.Tensor, new: int, **how: Any) -> float:
    """Of one call."""
    torch.cuda.synchronize()
    began = time.perf_counter()
    out = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=new,
        do_sample=False,
        eos_token_id=None,
        **how,
    )
    torch.cuda.synchronize()
    taken = time.perf_counter() - began
    if out.shape[1] != prompt.shape[1] + new:
        raise RuntimeError(f"generate made {out.shape[1] - prompt.shape[1]} tokens instead of {new}")
    return taken


def measure(model: Any, batch: int, chosen: list[str]) -> list[dict[str, Any]]:
    """A row for each way."""
    loop = interleaved({"loop": e2e.decode(model, batch)}, preheat=0.3)["loop"] / 1e3
    print(f"loop: {loop:.3f} ms", flush=True)
    prompt = torch.randint(0, model.config.vocab_size, (batch, e2e.PROMPT), device=model.device)
    ways = {"graphed": {"custom_generate": GraphedDecoding()}, "static": {"cache_implementation": "static"}}
    rows = []
    for way in chosen:
        how = ways[way]
        row: dict[str, Any] = {"job": f"generate-{batch}", "way": way}
        rows.append(row)
        try:
            first = seconds(model, prompt, NEW_TOKENS, **how)
            seconds(model, prompt, NEW_TOKENS, **how)  # the last CUDA graphs are recorded
            whole, start = (
                statistics.median(seconds(model, prompt, new, **how) for _ in range(CALLS)) for new in (NEW_TOKENS, 1)
            )
        except Exception as problem:  # the others go on
            row["error"] = f"{type(problem).__name__}: {problem}".replace("\n", " ")[:300]
            print(row, flush=True)
            continue
        ms = (whole - start) / (NEW_TOKENS - 1) * 1e3
        tokens = batch * NEW_TOKENS / whole
        row |= {"first_call_s": round(first, 1), "ms": round(ms, 4), "tokens_per_s": round(tokens, 1)}
        row |= {"loop_ms": round(loop, 4), "vs_loop": round(loop / ms, 3)}
        print(row, flush=True)
    return rows


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", nargs="*", type=int, default=[1, 16])
    parser.add_argument("--kinds", nargs="*", default=["4-bit fused"], help="of models, as in e2e.json")
    parser.add_argument("--ways", nargs="*", choices=WAYS, default=WAYS)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--pdl", action="store_true", help="compile with torch._inductor.config.triton.enable_pdl")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    inductor.triton.enable_pdl = options.pdl
    torch._dynamo.config.recompile_limit = 64
    run = provenance(METHOD) | {"layers": options.layers}
    ledger = Ledger(options.out or folder() / "generate.json", run, renew=True, identity=("job", "kind", "way", "pdl"))
    kinds = e2e.models(options.layers, 4)
    print("models made", flush=True)
    for kind in options.kinds:
        for batch in options.batches:
            how = {"kind": kind} | ({"pdl": True} if options.pdl else {})
            ledger.add(how | row for row in measure(kinds[kind], batch, options.ways))


if __name__ == "__main__":
    main()
