"""Perplexity and KL divergence of every method on SmolLM2-135M, two domains, held-out text.

Calibration: 64 random segments of 512 tokens (32 of State of the Union speeches 1982-2000, seed 0; 32 of
the first 60% of the Debian handbook, seed 1). Evaluation: 24 evenly spaced segments of 512 tokens of the
speeches from 2002 on and of the rest of the handbook; KL(full || quantized) on every third of them. The
handbook is Debian's package ``debian-handbook``.

Rows already in the result file are kept, so that a run that was stopped goes on: an hour in all on 2 cores.
Another torch or processor rounds sums differently, one code turns another way, and the rest follows:
figures of one method then differ by a few percent, so each row says where it was made.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from dataclasses import asdict, replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import torch
from record import RESULTS, provenance, write

from gptq_triton import QuantizeConfig, quantize_model
from gptq_triton.demo import load_smollm2, speeches
from gptq_triton.evaluate import evaluate, even_segments, log_probabilities, random_segments, tokenize

HANDBOOK = Path("/usr/share/doc/debian-handbook/html/en-US")

# An independent float32 implementation after the paper, same model, texts and settings (its handbook
# paragraphs were cut slightly differently): perplexity speeches, handbook; KL speeches, handbook.
REFERENCE = {
    "full precision": (23.81, 26.20, 0, 0),
    "RTN 8-bit": (23.84, 26.23, 0.0015, 0.0014),
    "RTN 4-bit": (30.87, 34.67, 0.368, 0.352),
    "RTN 3-bit": (92.2, 123, 1.471, 1.613),
    "GPTQ 4-bit, columns in order": (31.31, 34.74, 0.283, 0.284),
    "GPTQ 4-bit, act-order": (28.76, 31.44, 0.175, 0.186),
    "GPTQ 3-bit, columns in order": (56.8, 66.1, 0.919, 0.941),
    "GPTQ 3-bit, act-order": (50.5, 54.7, 0.750, 0.714),
}


def methods() -> dict[str, tuple[str, QuantizeConfig]]:
    """Label to method and configuration: the paper's, without clipping and refinement, which switches.py measures."""
    found = {}
    for bits in (8, 4, 3):
        plain = QuantizeConfig(bits, 128, sym=False, clip=False, refine=0)
        found[f"RTN {bits}-bit"] = ("rtn", plain)
        if bits < 8:
            found[f"GPTQ {bits}-bit"] = ("gptq", plain)
            found[f"GPTQ {bits}-bit, columns in order"] = ("gptq", replace(plain, group_aware=False))
            found[f"GPTQ {bits}-bit, act-order"] = ("gptq", replace(plain, desc_act=True))
    return found


class _Paragraphs(HTMLParser):
    """The text of each ``<div class="para">`` and ``<p>`` of a page."""

    def __init__(self):
        super().__init__()
        self.paragraphs: list[str] = []
        self.open = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "p" or (tag == "div" and ("class", "para") in attrs):
            self.paragraphs.append("")
            self.open = True

    def handle_endtag(self, tag: str) -> None:
        if tag in ("p", "div"):
            self.open = False

    def handle_data(self, data: str) -> None:
        if self.open:
            self.paragraphs[-1] += data


def handbook(folder: Path) -> tuple[str, str]:
    """Paragraphs over 200 characters: the first 60% of the text, and the rest."""
    paragraphs = []
    for page in sorted(folder.glob("*.html")):
        parser = _Paragraphs()
        parser.feed(page.read_text(encoding="utf-8"))
        paragraphs += [" ".join(p.split()) for p in parser.paragraphs]
    text = "\n\n".join(p for p in paragraphs if len(p) > 200)
    if not text:
        raise SystemExit(f"{folder} holds no handbook; on Debian: apt-get install debian-handbook")
    return text[: int(0.6 * len(text))], text[int(0.6 * len(text)) :]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--handbook", type=Path, default=HANDBOOK)
    parser.add_argument("--only", nargs="*", help="labels to measure (default: all that are missing)")
    parser.add_argument("--out", type=Path, default=RESULTS / "cpu" / "quality.json")
    options = parser.parse_args()

    full, tokenizer = load_smollm2(torch.float32)
    train, test = handbook(options.handbook)
    calibration = [
        *random_segments(tokenize(tokenizer, speeches(1982, 2000)), 512, 32, seed=0),
        *random_segments(tokenize(tokenizer, train), 512, 32, seed=1),
    ]
    texts = {
        name: thirds_first(even_segments(tokenize(tokenizer, text), 512, 24))
        for name, text in (("speeches", speeches(2002, 9999)), ("handbook", test))
    }
    expected = {name: [log_probabilities(full, s) for s in segments[:8]] for name, segments in texts.items()}

    here = provenance("")
    where = {key: here[key] for key in ("commit", "cpu", "python", "torch")}
    result: dict[str, Any] = json.loads(options.out.read_text()) if options.out.exists() else {"rows": []}
    result["method"] = " ".join((__doc__ or "").split("\n\n")[1].split())
    rows = {row["label"] for row in result["rows"] if row["torch"] == where["torch"]}
    todo: dict[str, tuple | None] = {"full precision": None, **methods()}
    for label, job in todo.items():
        if label in rows or (options.only and label not in options.only):
            continue
        model, reports, started = copy.deepcopy(full), [], time.perf_counter()
        if job is not None:
            how, config = job
            # rounding needs no calibration: one segment, for its report
            reports = quantize_model(model, calibration if how == "gptq" else calibration[:1], config, method=how)
        seconds = time.perf_counter() - started
        row = {"label": label, "seconds": round(seconds, 1), "reference": REFERENCE.get(label)}
        for name, segments in texts.items():
            row[name] = asdict(evaluate(model, segments, expected[name]))
        row["layers"] = _by_kind([asdict(report) for report in reports])
        print(label, row, flush=True)
        result["rows"].append(row | where)
        write(options.out, result)


def thirds_first(segments: list[torch.Tensor]) -> list[torch.Tensor]:
    """Every third segment, where KL is measured, and then the others."""
    return segments[::3] + [s for i, s in enumerate(segments) if i % 3]


def _by_kind(reports: list[dict]) -> dict[str, dict[str, float]]:
    """Mean relative output errors of the layers of each kind."""
    kinds: dict[str, list[dict]] = {}
    for report in reports:
        kinds.setdefault(report["name"].rpartition(".")[2], []).append(report)
    return {
        kind: {key: sum(r[key] for r in found) / len(found) for key in ("error", "error_rtn")}
        for kind, found in kinds.items()
    }


if __name__ == "__main__":
    main()
