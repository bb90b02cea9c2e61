"""Time to quantize: one layer against the eager solver, Hessians, and a Llama-3.1-8B-shaped model from disk to disk.

    python bench/quantize.py
    python bench/quantize.py --parts solver hessian
    python bench/quantize.py --parts model --layers 8 --folder /tmp/model
    torchrun --nproc-per-node 2 bench/quantize.py    # calibration shared by two GPUs, against one of them

The model has random weights, which are saved first, untimed; calibration is random tokens.
"""

from __future__ import annotations

import argparse
import copy
import functools
import gc
import hashlib
import multiprocessing
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from ledger import Ledger
from record import folder, provenance

from gptq_triton import QuantizeConfig, quantize_model, save_quantized
from gptq_triton import model as model_module
from gptq_triton.hessian import Hessian
from gptq_triton.packing import unpack
from gptq_triton.solver import SolverOptions, solve
from gptq_triton.spec import QuantSpec

PARTS = ("hessian", "solver", "experts", "model")
SWITCHES: dict[str, dict[str, Any]] = {
    "default": {},
    "none": {"clip": False, "refine": 0},
    "feedback 1, true_sequential": {"feedback": 1.0, "true_sequential": True},
}
CONFIG = QuantizeConfig(bits=4, group_size=128, sym=False)
IDENTITY = ("part", "N", "K", "layers", "act_order", "switches", "ranks")
SHAPES = ((4096, 4096), (4096, 14336))  # N, K
SEGMENTS, LENGTH = 128, 2048
METHOD = (
    "solver: solve() with factorisation, energies and packing, 4 bits, groups of 128, zero points, eager and fused in "
    "turns, medians of 7, of 3 where K > 4096; loss: tr(E H E^T) in float64, fused over eager. hessian: 16384 tokens "
    "of float16, and how far off float64 in norm. model: random float16 weights, "
    f"{SEGMENTS} x {LENGTH} tokens, 4 bits, groups of 128; seconds from the model on disk to the checkpoint on disk, "
    "of the first one with compiling kernels. experts: a block of Qwen3-30B-A3B, 128 experts; kernels are compiled. "
    "ranks: the same tokens and 4 layers of the model, on the GPU; calibration: all but solving"
)


def timed(call: Callable[..., Any], *arguments: Any) -> tuple[float, Any]:
    """Seconds of one call, the GPU's work included, and what it returned."""
    _synchronize()
    began = time.perf_counter()
    result = call(*arguments)
    _synchronize()
    return time.perf_counter() - began, result


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def inputs(K: int, tokens: int) -> torch.Tensor:
    """Correlated and of uneven energy, float16 (tokens, K)."""
    spread = torch.logspace(0, -1.5, K, device="cuda")[torch.randperm(K, device="cuda")]
    common = torch.randn(tokens, K // 16, device="cuda") @ torch.randn(K // 16, K, device="cuda") / (K // 16) ** 0.5
    return ((torch.randn(tokens, K, device="cuda") + common) * spread).half()


def measure_hessian(K: int) -> dict[str, Any]:
    """float16 as it comes against the same in float32."""
    x = inputs(K, 16384)
    exact = torch.zeros(K, K, dtype=torch.float64, device="cuda")
    for rows in x.split(4096):
        exact.addmm_(rows.t().double(), rows.double())
    row: dict[str, Any] = {"part": "hessian", "K": K}
    for name, rows in (("half", x), ("float32", x.float())):
        hessian = Hessian(K, "cuda")
        hessian.add(rows)
        row[f"{name}_rel_err"] = float(f"{(hessian.sum - exact).norm() / exact.norm():.3g}")
        row[f"{name}_ms"] = round(statistics.median(timed(hessian.add, rows)[0] for _ in range(5)) * 1e3, 3)
    return row


def measure_solver(N: int, K: int, desc_act: bool) -> dict[str, Any]:
    """One layer, eager and fused."""
    hessian = Hessian(K, "cuda")
    hessian.add(inputs(K, 2 * K))
    weights = {"layer": (torch.randn(N, K, device="cuda") * 0.02).half()}
    spec = QuantSpec(4, 128, False, desc_act)
    options = {"eager": SolverOptions(fused=False), "fused": SolverOptions()}
    times: dict[str, list[float]] = {name: [] for name in options}
    found = {}
    for turn in range(8 if K <= 4096 else 4):
        for name, how in options.items():
            taken, solved = timed(solve, weights, hessian, spec, how)
            found[name] = solved["layer"]
            if turn:  # the first compiles and warms up
                times[name].append(taken)
    ms = {name: statistics.median(values) * 1e3 for name, values in times.items()}
    codes = [unpack(found[name].weight.qweight, 4, K) for name in options]
    H = hessian.sum.double()
    losses = []
    for name in options:
        error = weights["layer"].double() - found[name].dequantized.double()
        losses.append(float(((error @ H) * error).sum()))
    return {
        "part": "solver",
        "N": N,
        "K": K,
        "act_order": desc_act,
        "eager_ms": round(ms["eager"], 2),
        "fused_ms": round(ms["fused"], 2),
        "speedup": round(ms["eager"] / ms["fused"], 1),
        "equal_codes": round(float((codes[0] == codes[1]).float().mean()), 6),
        "loss_ratio": round(losses[1] / losses[0], 7),
        "error": found["fused"].error,
    }


def measure_experts() -> dict[str, Any]:
    """One block of experts, of which each gets a sixteenth of the tokens."""
    from transformers import AutoModelForCausalLM, Qwen3MoeConfig

    sizes: dict[str, Any] = {
        "vocab_size": 512, "hidden_size": 2048, "intermediate_size": 6144, "moe_intermediate_size": 768,
        "num_hidden_layers": 1, "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128,
        "num_experts": 128, "num_experts_per_tok": 8,
    }  # fmt: skip
    torch.manual_seed(0)
    with torch.device("cuda"):
        model: Any = AutoModelForCausalLM.from_config(Qwen3MoeConfig(**sizes), dtype=torch.float16).eval()
    tokens = torch.randint(0, 512, (SEGMENTS, LENGTH), generator=torch.Generator().manual_seed(0))
    taken, reports = timed(functools.partial(quantize_model, progress=False), model, list(tokens), CONFIG)
    return {
        "part": "experts",
        "seconds": round(taken, 2),
        "solve_s": round(sum(report.seconds for report in reports), 2),
        "rounded_to_nearest": sum(report.method == "rtn" for report in reports),
        "digest": _digest(model),
    }


def make_model(source: Path, layers: int) -> None:
    """Save a model with random weights."""
    from e2e import llama

    llama(layers).save_pretrained(source)


def measure_model(source: Path, desc_act: bool, switches: str) -> dict[str, Any]:
    """From disk to disk."""
    from transformers import AutoModelForCausalLM

    calibration = torch.randint(0, 128256, (SEGMENTS, LENGTH), generator=torch.Generator().manual_seed(0))
    gc.collect()  # models before this one
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    laps: dict[str, float] = {}
    began = last = time.perf_counter()

    def lap(name: str) -> None:
        nonlocal last
        torch.cuda.synchronize()
        laps[name], last = round(time.perf_counter() - last, 2), time.perf_counter()

    model: Any = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float16)
    lap("load_s")
    config = replace(CONFIG, desc_act=desc_act, **SWITCHES[switches])
    reports = quantize_model(model, list(calibration), config, device="cuda", progress=False)
    lap("quantize_s")
    with tempfile.TemporaryDirectory(dir=source.parent) as out:
        save_quantized(model, out)
        lap("save_s")
        taken = time.perf_counter() - began
        size = sum(path.stat().st_size for path in Path(out).glob("*.safetensors"))
    return {
        "part": "model",
        "layers": model.config.num_hidden_layers,
        "act_order": desc_act,
        "switches": switches,
        "seconds": round(taken, 2),
        **laps,
        "solve_s": round(sum(report.seconds for report in reports), 2),
        "peak_gb": round(torch.cuda.max_memory_allocated() / 1e9, 2),
        "held_before_gb": round(held / 1e9, 2),
        "checkpoint_gb": round(size / 1e9, 3),
        "rounded_to_nearest": sum(report.method == "rtn" for report in reports),
    }


def measure_ranks(make: Callable[[], Any], calibration: list[torch.Tensor]) -> dict[str, Any]:
    """The same by one process and by all: calibration is what is left of the time without solving."""
    row: dict[str, Any] = {"part": "ranks", "ranks": dist.get_world_size()}
    digests = {}
    solve_groups, solving = model_module._solve_groups, [0.0]

    def clocked(*arguments: Any) -> Iterator[Any]:
        groups = solve_groups(*arguments)
        while True:
            began = time.perf_counter()
            found = next(groups, None)
            solving[0] += time.perf_counter() - began
            if found is None:
                return
            yield found

    model_module._solve_groups = clocked
    for name, group in (("one", None), ("all", dist.group.WORLD)):
        dist.barrier()
        if group is None and dist.get_rank():
            continue  # and wait
        model = make()
        row["layers"] = model.config.num_hidden_layers
        for samples in (calibration[:16], calibration):  # the first compiles
            trial = copy.deepcopy(model)
            run = functools.partial(quantize_model, config=CONFIG, progress=False, group=group)
            solving[0] = 0.0
            taken, _ = timed(run, trial, samples)
        digests[name] = _digest(trial)
        row[f"{name}_s"] = round(taken, 2)
        row[f"{name}_calibration_s"] = round(taken - solving[0], 2)
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, digests)
    row["equal"] = len({digest for each in everyone for digest in each.values()}) == 1
    if "one_s" in row:
        row["speedup"] = round(row["one_calibration_s"] / row["all_calibration_s"], 3)
        row["whole_speedup"] = round(row["one_s"] / row["all_s"], 3)
    return row


def _digest(model: Any) -> str:
    """Of every tensor."""
    found = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        found.update(name.encode() + tensor.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def _ranks(options: argparse.Namespace) -> None:
    """What torchrun starts."""
    from e2e import llama

    local = int(os.environ["LOCAL_RANK"])
    torch.cuda.set_device(local)
    dist.init_process_group("nccl", device_id=torch.device("cuda", local))

    def make() -> Any:
        torch.manual_seed(0)
        return llama(min(options.layers, 4), vocab_size=512)

    tokens = torch.randint(0, 512, (SEGMENTS, LENGTH), generator=torch.Generator().manual_seed(0))
    row = measure_ranks(make, list(tokens))
    if dist.get_rank() == 0:
        print(row, flush=True)
        ledger = Ledger(options.out or folder() / "quantize.json", provenance(METHOD), renew=True, identity=IDENTITY)
        ledger.add([row])
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="*", choices=PARTS, default=PARTS)
    parser.add_argument("--only", nargs="+", metavar="NxK", help="layers for the solver")
    parser.add_argument("--switches", nargs="*", choices=SWITCHES, default=list(SWITCHES), help="of whole models")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--folder", type=Path, help="where the model is kept; default: a temporary one")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if "LOCAL_RANK" in os.environ:
        with torch.no_grad():
            _ranks(options)
        return
    ledger = Ledger(options.out or folder() / "quantize.json", provenance(METHOD), renew=True, identity=IDENTITY)

    def add(row: dict[str, Any]) -> None:
        print(row, flush=True)
        ledger.add([row])

    with torch.no_grad():
        if "hessian" in options.parts:
            for K in (4096, 14336):
                add(measure_hessian(K))
        if "solver" in options.parts:
            for N, K in SHAPES:
                for desc_act in (False, True):
                    if options.only is None or f"{N}x{K}" in options.only:
                        add(measure_solver(N, K, desc_act))
        if "experts" in options.parts:
            measure_experts()  # compiles
            add(measure_experts())
        if "model" in options.parts:
            source = options.folder or Path(tempfile.mkdtemp()) / "model"
            if not source.exists():  # made by another process, so that none of it stays on this one's GPU
                maker = multiprocessing.get_context("spawn").Process(target=make_model, args=(source, options.layers))
                maker.start()
                maker.join()
                if maker.exitcode:
                    raise RuntimeError(f"the model was not made: exit code {maker.exitcode}")
            for switches in options.switches:
                for desc_act in (False, True):
                    add(measure_model(source, desc_act, switches))
            if options.folder is None:
                shutil.rmtree(source.parent)


if __name__ == "__main__":
    main()
