"""Two GPUs against one: decoder layers of Llama-3.1-70B split over both, and adapters trained under FSDP2.

    torchrun --nproc-per-node 2 bench/parallel.py

"decode-B": greedy decoding of B sequences as in e2e.py, by layers of random 4-bit codes, first whole on one GPU, then
split by ColwiseQuantLinear and RowwiseQuantLinear over NCCL. "lora": a step with adapters on every layer (PEFT), each
rank with its own sequences, against one GPU with as many sequences as one rank has.
"""

from __future__ import annotations

import argparse
import copy
import os
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import e2e
import torch
import torch.distributed as dist
from ledger import Ledger
from method import Captured
from record import folder, provenance
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import parallelize_module

from gptq_triton import fuse
from gptq_triton.integrations.tensor_parallel import ColwiseQuantLinear, RowwiseQuantLinear

SIZES: dict[str, Any] = {
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "vocab_size": 512,
}
BATCHES = (1, 16)
ROUNDS = 21
TRAIN_BATCH, TRAIN_TOKENS, RANK = 1, 1024, 16
METHOD = (
    "random 4-bit weights in groups of 128, a vocabulary of 512; decode as in e2e.py: torch.compile, CUDA graph of "
    f"{e2e.STEPS} steps, NCCL inside; lora: {TRAIN_BATCH} x {TRAIN_TOKENS} tokens a rank, rank {RANK}, AdamW, eager; "
    f"medians of {ROUNDS}, the slower rank counts"
)


def split(model: Any, mesh: DeviceMesh) -> Any:
    """Every layer of the decoder cut over the ranks, in place: two sums a block."""
    plan = {}
    for name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj"):
        plan[f"model.layers.*.{name}"] = ColwiseQuantLinear()
    for name in ("self_attn.o_proj", "mlp.down_proj"):
        plan[f"model.layers.*.{name}"] = RowwiseQuantLinear()
    return parallelize_module(model, mesh, plan)


def milliseconds(run: Callable[[], Any], reset: Callable[[], Any] = lambda: None, rounds: int = ROUNDS) -> float:
    """Median time of a call; every rank makes the same number of them."""
    times = []
    for _ in range(rounds + 3):
        reset()
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        run()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times[3:])


def slower(ms: float) -> float:
    """The longest time of all ranks."""
    found = torch.tensor(ms, device="cuda")
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return found.item()


def decode(model: Any, batch: int) -> float:
    """Milliseconds of a step."""
    item: Captured = e2e.decode(model, batch)
    return milliseconds(item.graph.replay, item.reset) / item.calls


def decoding(layers: int, bits: int, mesh: DeviceMesh, add: Callable[..., None]) -> None:
    """Whole on the first GPU, then split over all."""
    model = e2e.quantized(e2e.llama(layers, **SIZES), bits)
    ids = torch.arange(64, device="cuda")[None]
    expected, whole = model(ids).logits, e2e.nbytes(model.model.layers)
    first = dist.get_rank() == 0
    alone: dict[int, float] = {}
    if first:
        for kind, found in {"one": model, "one fused": fuse(copy.deepcopy(model))}.items():
            for batch in BATCHES:
                ms = decode(found, batch)
                alone[batch] = min(ms, alone.get(batch, ms))
                add(f"decode-{batch}", kind, ms=ms, bytes=whole)
        torch.compiler.reset()
    torch.cuda.empty_cache()
    dist.barrier()
    split(model, mesh)
    for kind in ("two", "two fused"):
        if kind == "two fused":
            torch.compiler.reset()
            fuse(model)
        off = float((model(ids).logits - expected).norm() / expected.norm())
        for batch in BATCHES:
            ms = slower(decode(model, batch))
            held = e2e.nbytes(model.model.layers)
            add(f"decode-{batch}", kind, ms=ms, bytes=held, share=held / whole, rel_err=off)
            if first:
                print(f"decode-{batch}, {kind}: {alone[batch] / ms:.2f} times one GPU", flush=True)
    torch.compiler.reset()


def training(layers: int, bits: int, mesh: DeviceMesh, add: Callable[..., None]) -> None:
    """A step on one GPU, then a step on all, each rank with sequences of its own."""
    from peft import LoraConfig, get_peft_model
    from torch.distributed.fsdp import fully_shard

    from gptq_triton.integrations.peft import register

    model = e2e.quantized(e2e.llama(layers), bits)
    config = LoraConfig(r=RANK, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(model, register(config, model))
    ids = torch.randint(0, 512, (TRAIN_BATCH, TRAIN_TOKENS), device="cuda")

    def step() -> Callable[[], None]:
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5)

        def once() -> None:
            with torch.enable_grad():
                model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        return once

    tokens = TRAIN_BATCH * TRAIN_TOKENS
    ms = slower(milliseconds(step()))
    add("lora", "one", ms=ms, tokens_per_s=tokens / ms * 1e3)
    base: Any = model
    for block in base.base_model.model.model.layers:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    spread = [p for p in model.parameters() if p.requires_grad]
    if not all(isinstance(p, DTensor) for p in spread):
        raise RuntimeError("an adapter was not spread")
    ms = slower(milliseconds(step()))
    add("lora", "two", ms=ms, tokens_per_s=tokens * mesh.size() / ms * 1e3)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    rank = int(os.environ["LOCAL_RANK"])
    torch.cuda.set_device(rank)
    mesh = init_device_mesh("cuda", (int(os.environ["WORLD_SIZE"]),))
    torch._dynamo.config.recompile_limit = 64
    torch.manual_seed(0)
    run = provenance(METHOD) | {"layers": options.layers, "bits": options.bits, "gpus": mesh.size()}
    path = options.out or folder() / "parallel.json"
    ledger = Ledger(path, run, renew=True, identity=("job", "kind")) if rank == 0 else None

    def add(job: str, kind: str, **values: float) -> None:
        row = {"job": job, "kind": kind} | {name: round(value, 4) for name, value in values.items()}
        if ledger is not None:
            print(row, flush=True)
            ledger.add([row])

    for work in (decoding, training):
        work(options.layers, options.bits, mesh, add)
        torch.cuda.empty_cache()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
