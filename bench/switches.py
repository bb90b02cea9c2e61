"""What each switch of the solver does to a whole model, on held-out text: KL(full || quantized), perplexity.

Calibration: random segments of 512 tokens, half of State of the Union speeches 1982-2000 (seed 0), half of the first
60% of the Debian handbook (seed 1). Held out: evenly spaced segments of 512 tokens of the speeches from 2002 on and of
the rest of the handbook; KL on every third of them. SmolLM2-135M: 64 calibration segments, 24 of each text held out;
Gemma 3 270M: 32 and 12. Group 128, asymmetric, float32, groups in order unless a row says act-order.

Rows already in the result file are kept, so that a run that was stopped goes on.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from quality import HANDBOOK, handbook, thirds_first
from record import RESULTS, provenance, write

from gptq_triton import QuantizeConfig, quantize_model
from gptq_triton.demo import load_gguf, load_smollm2, speeches
from gptq_triton.evaluate import Text, evaluate, even_segments, log_probabilities, random_segments, tokenize

SEGMENTS = {"smollm2": (64, 24), "gemma3-270m": (32, 12)}  # for calibration; held out, of each text
BEST = {"clip": True, "refine": 1, "feedback": 1.0}
SWITCHES: dict[str, dict[str, Any]] = {
    "off": dict.fromkeys(BEST, 0) | {"clip": False},
    "clip, refine 1": BEST | {"feedback": 0.0},
    "clip, refine 1, feedback 1": BEST,
    "act-order, clip, refine 1, feedback 1": BEST | {"desc_act": True},
    "clip, refine 1, feedback 0.5": BEST | {"feedback": 0.5},
    "act-order, clip, refine 1": BEST | {"feedback": 0.0, "desc_act": True},
    "clip": {"clip": True, "refine": 0, "feedback": 0.0},
    "refine 1": {"clip": False, "refine": 1, "feedback": 0.0},
    "feedback 1": {"clip": False, "refine": 0, "feedback": 1.0},
    "act-order": {"clip": False, "refine": 0, "feedback": 0.0, "desc_act": True},
    "clip, refine 2, feedback 1": BEST | {"refine": 2},
    "clip, refine 1, feedback 1, true_sequential": BEST | {"true_sequential": True},
    "clip, refine 1, true_sequential": BEST | {"feedback": 0.0, "true_sequential": True},
    "clip, refine 3, feedback 1, true_sequential": BEST | {"refine": 3, "true_sequential": True},
    "act-order, clip, refine 1, feedback 0.5": BEST | {"feedback": 0.5, "desc_act": True},
    "clip, refine 1, feedback 1, damp 0.05": BEST | {"damp_percent": 0.05},
    "mse": {"mse": True, "clip": False, "refine": 0, "feedback": 0.0},
    "columns in order": {"group_aware": False, "clip": False, "refine": 0, "feedback": 0.0},
}


def measure_all(
    full: Any, texts: dict[str, tuple[Text, Text]], name: str, out: Path, device: torch.device, options: Any
) -> None:
    """Measure every switch at every width.

    Args:
        full: The model, float32.
        texts: Name to what is seen and what is held out.
        name: Of the model.
        out: The result file.
        device: Where all of it runs.
        options: ``bits``, ``only``, ``seconds``.
    """
    started = time.perf_counter()
    count, held_out = SEGMENTS[name]
    seen = [random_segments(text, 512, count // 2, seed) for seed, (text, _) in enumerate(texts.values())]
    batches = [torch.stack(segments[i : i + 8]) for segments in seen for i in range(0, len(segments), 8)]
    unseen = {key: thirds_first(even_segments(text, 512, held_out)) for key, (_, text) in texts.items()}
    full = full.to(device)
    expected = {key: [log_probabilities(full, s) for s in part[: held_out // 3]] for key, part in unseen.items()}
    here = provenance("") | {"device": torch.cuda.get_device_name() if device.type == "cuda" else "CPU"}
    where = {key: here[key] for key in ("commit", "dirty", "device", "python", "torch")}
    jobs = [(bits, switch) for switch in options.only or SWITCHES for bits in options.bits]
    for bits, switch in jobs:
        row: dict[str, Any] = {"model": name, "bits": bits, "switch": switch}
        if any(row.items() <= old.items() for old in _rows(out)):
            continue
        if time.perf_counter() - started > options.seconds:
            break
        model, begun = copy.deepcopy(full), time.perf_counter()
        quantize_model(model, batches, QuantizeConfig(bits, 128, sym=False, **SWITCHES[switch]), progress=False)
        row["seconds"] = round(time.perf_counter() - begun, 1)
        for key, segments in unseen.items():
            row[key] = {k: round(v, 5) for k, v in asdict(evaluate(model, segments, expected[key])).items()}
        kl = "  ".join(f"{key} {row[key]['kl']:.4f}" for key in unseen)
        print(f"{name} {bits} bits  {switch:<48} {kl}  ({row['seconds']} s)", flush=True)
        rows = [*_rows(out), row | where]
        method = " ".join((__doc__ or "").split("\n\n")[1].split())
        write(out, {"method": method, "rows": sorted(rows, key=lambda r: (r["model"], -r["bits"]))})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gemma", type=Path, metavar="GGUF", help="measure Gemma 3 270M (default: SmolLM2-135M)")
    parser.add_argument("--handbook", type=Path, default=HANDBOOK)
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3, 2])
    parser.add_argument("--only", nargs="*", help="switches to measure (default: all that are missing)")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="start no row after so long")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()

    model, tokenizer = (
        load_gguf(options.gemma.parent, options.gemma.name, torch.float32)
        if options.gemma
        else load_smollm2(torch.float32)
    )
    train, test = handbook(options.handbook)
    pairs = {"speeches": (speeches(1982, 2000), speeches(2002, 9999)), "handbook": (train, test)}
    texts = {name: (tokenize(tokenizer, a), tokenize(tokenizer, b)) for name, (a, b) in pairs.items()}
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    out = options.out or RESULTS / ("h200" if device.type == "cuda" else "cpu") / "switches.json"
    measure_all(model, texts, "gemma3-270m" if options.gemma else "smollm2", out, device, options)


def _rows(path: Path) -> list[dict[str, Any]]:
    return json.loads(path.read_text())["rows"] if path.exists() else []


if __name__ == "__main__":
    main()
