"""What each refinement of the solver does on SmolLM2-135M: to layers, one switch at a time, and to the whole model.

Layers: those of blocks 11 and 29, with Hessians of the full-precision inputs. Calibration: 32 random segments of 512
tokens (16 of State of the Union speeches 1982-2000, seed 0; 16 of the first 60% of the Debian handbook, seed 1). Held
out: 16 evenly spaced segments of 512 tokens (8 of the speeches from 2002 on, 8 of the rest of the handbook). A figure
is the geometric mean over layers of ``tr(E H E^T) / tr(W H W^T)`` under the Hessian of either text, and that over the
figure of the row "off" of the same width; seconds are those of solving all of them, on cores that other work shared:
a row may have taken several times what it needs. Whole models: the first calibration segments (half of either text),
perplexity and KL(full || quantized) on held-out segments, as many as the row says. Group 128, asymmetric, groups in
order unless a row says act-order.

Rows already in the result file are kept, so that a run that was stopped goes on.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from quality import HANDBOOK, handbook
from record import RESULTS, provenance, write
from torch import Tensor

from gptq_triton import QuantizeConfig, quantize_model
from gptq_triton.demo import load_smollm2, speeches
from gptq_triton.evaluate import evaluate, even_segments, log_probabilities, random_segments, tokenize
from gptq_triton.hessian import Hessian
from gptq_triton.layers import find_layers, weight_of
from gptq_triton.ranks import Ranks
from gptq_triton.solver import solve
from gptq_triton.streaming import Observer, decoder_blocks

BLOCKS = (11, 29)
SWITCHES: dict[str, dict[str, Any]] = {
    "off": {},
    "mse": {"mse": True},
    "clip": {"clip": True},
    "refine 1": {"refine": 1},
    "refine 2": {"refine": 2},
    "clip, refine 1": {"clip": True, "refine": 1},
    "clip, refine 2": {"clip": True, "refine": 2},
    "act-order": {"desc_act": True},
    "act-order, clip, refine 2": {"desc_act": True, "clip": True, "refine": 2},
}
WHOLE = ("off", "clip, refine 1", "clip", "refine 1")


def texts(tokenizer: Any, folder: Path) -> tuple[list[Tensor], list[Tensor]]:
    """Segments to calibrate on, those of both texts in turn, and segments that are held out."""
    train, test = handbook(folder)
    seen = [
        random_segments(tokenize(tokenizer, text), 512, 16, seed)
        for seed, text in enumerate((speeches(1982, 2000), train))
    ]
    unseen = [even_segments(tokenize(tokenizer, text), 512, 8) for text in (speeches(2002, 9999), test)]
    return [s for pair in zip(*seen, strict=True) for s in pair], [s for segments in unseen for s in segments]


@torch.no_grad()
def collect(model: Any, seen: list[Tensor], unseen: list[Tensor]) -> list[dict[str, Any]]:
    """Per input of layers: their weights by name, and the Hessians of both texts."""
    layers = {}
    for index, (name, block) in enumerate(decoder_blocks(model).items()):
        if index in BLOCKS:
            layers |= find_layers(block, name=name)
    observers = []
    for segments in (seen, unseen):
        observer = Observer(layers)
        observer.watch(
            lambda i, _, given=segments: model(given[i][None]).logits, [None] * len(segments), Ranks(len(segments))
        )
        observers.append(observer)
    return [
        {
            "weights": {name: weight_of(layers[name]).detach().clone() for name in names},
            "hessians": [observer.hessian(names[0]) for observer in observers],
        }
        for names in observers[0].groups(dict.fromkeys(layers))
    ]


def relative_loss(weight: Tensor, dequantized: Tensor, hessian: Hessian) -> float:
    """``tr(E H E^T) / tr(W H W^T)`` in float64."""
    H, W = hessian.sum.double(), weight.double()
    E = W - dequantized.double()
    return float(((E @ H) * E).sum() / ((W @ H) * W).sum())


def layer_row(inputs: list[dict[str, Any]], config: QuantizeConfig) -> dict[str, Any]:
    """Geometric means over layers, on seen and on held-out text."""
    logs: list[list[float]] = [[], []]
    seconds = 0.0
    for item in inputs:
        started = time.perf_counter()
        solved = solve(item["weights"], item["hessians"][0], config.spec(), config.solver_options())
        seconds += time.perf_counter() - started
        for found, hessian in zip(logs, item["hessians"], strict=True):
            weights = item["weights"].items()
            found += [math.log(relative_loss(w, solved[name].dequantized, hessian)) for name, w in weights]
    seen, unseen = (math.exp(sum(found) / len(found)) for found in logs)
    return {"calibration": seen, "held_out": unseen, "layers": len(logs[0]), "seconds": round(seconds, 1)}


def of_layers(options: argparse.Namespace) -> Callable[[QuantizeConfig], dict[str, Any]]:
    """Measures layers: collects what they need, or reads it from the cache."""
    if options.cache and options.cache.exists():
        inputs = torch.load(options.cache, weights_only=False)
    else:
        model, tokenizer = load_smollm2(torch.float32)
        inputs = collect(model, *texts(tokenizer, options.handbook))
        if options.cache:
            torch.save(inputs, options.cache)
    return lambda config: layer_row(inputs, config)


def of_models(options: argparse.Namespace) -> Callable[[QuantizeConfig], dict[str, Any]]:
    """Measures whole models."""
    full, tokenizer = load_smollm2(torch.float32)
    seen, unseen = texts(tokenizer, options.handbook)
    half = len(unseen) // 2
    parts = {"speeches": unseen[:half][:: options.every], "handbook": unseen[half:][:: options.every]}
    expected = {name: [log_probabilities(full, s) for s in segments] for name, segments in parts.items()}

    def measure(config: QuantizeConfig) -> dict[str, Any]:
        model, started = copy.deepcopy(full), time.perf_counter()
        quantize_model(model, seen[: options.segments], config)
        seconds = time.perf_counter() - started
        row = {"segments": options.segments, "held_out_segments": sum(map(len, parts.values())), "seconds": seconds}
        for name, segments in parts.items():
            quality = asdict(evaluate(model, segments, expected[name]))
            row |= {f"{name}_{key}": quality[key] for key in ("perplexity", "kl", "top1")}
        return row

    return measure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=["layers", "models"])
    parser.add_argument("--handbook", type=Path, default=HANDBOOK)
    parser.add_argument("--bits", type=int, nargs="+", default=[3, 4, 2])
    parser.add_argument("--cache", type=Path, help="layers: file that keeps weights and Hessians between runs")
    parser.add_argument("--segments", type=int, default=16, help="models: calibration segments (default %(default)s)")
    parser.add_argument("--every", type=int, default=1, help="models: evaluate every n-th held-out segment")
    parser.add_argument("--only", nargs="*", help="switches to measure (default: all that are missing)")
    parser.add_argument("--out", type=Path, default=RESULTS / "cpu" / "refinement.json")
    options = parser.parse_args()

    measure = (of_layers if options.part == "layers" else of_models)(options)
    here = provenance("")
    where = {key: here[key] for key in ("commit", "dirty", "cpu", "python", "torch")}
    wanted = options.only or (SWITCHES if options.part == "layers" else WHOLE)
    for bits in options.bits:
        for name in wanted:
            row: dict[str, Any] = {"part": options.part, "bits": bits, "switch": name}
            if any(row.items() <= old.items() for old in _rows(options.out)):
                continue
            row |= measure(QuantizeConfig(bits, 128, sym=False, **SWITCHES[name]))
            print(row, flush=True)
            _add(options.out, row | where)


def _rows(path: Path) -> list[dict[str, Any]]:
    return json.loads(path.read_text())["rows"] if path.exists() else []


def _add(path: Path, row: dict[str, Any]) -> None:
    """Write the file again with one more row, and every layer row's loss over that of "off"."""
    rows = [*_rows(path), row]
    off = {r["bits"]: r for r in rows if r["part"] == "layers" and r["switch"] == "off"}
    for r in rows:
        if r["part"] == "layers" and r["bits"] in off:
            for key in ("calibration", "held_out"):
                r[f"{key}_over_off"] = round(r[key] / off[r["bits"]][key], 4)
    method = " ".join((__doc__ or "").split("\n\n")[1].split())
    write(path, {"method": method, "rows": sorted(rows, key=lambda r: (r["part"], r["bits"]))})


if __name__ == "__main__":
    main()
