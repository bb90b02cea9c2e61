"""Pictures and tables of the documentation, made from the code and the result files each time it is built."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from mkdocs.structure.files import File, Files

from gptq_triton.layout import STEP, STRIP, untile
from gptq_triton.packing import RUN, pack

ROOT = Path(__file__).parent.parent
RESULTS, GPU = ROOT / "bench" / "results" / "cpu", ROOT / "bench" / "results" / "h200"
COLOURS = ("#3f51b5", "#7986cb")


def on_files(files: Files, config: Any) -> Files:
    """Add the pictures."""
    pictures = {"words-4.svg": words(4, 1), "words-3.svg": words(3, 3), "tiles.svg": tiles(), "quality.svg": quality()}
    for name, picture in pictures.items():
        files.append(File.generated(config, name, content=picture))
    for plot in GPU.glob("*.svg"):
        files.append(File.generated(config, plot.name, content=plot.read_text()))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Fill the tables in."""
    made = {
        "integrations": integrations,
        "speed": lambda: section("speed"),
        "quality": lambda: section("quality"),
        "whole models": whole_models,
        "aims": aims,
    }
    for name, make in made.items():
        if (mark := f"<!-- {name} -->") in markdown:
            markdown = markdown.replace(mark, make())
    return markdown


def section(name: str) -> str:
    """What `bench/tables.py` wrote into the README."""
    mark = f"<!-- {name} -->"
    text = (ROOT / "README.md").read_text()
    return text[text.index(mark) + len(mark) : text.index(f"<!-- /{name} -->")].replace(f"{GPU.relative_to(ROOT)}/", "")


def whole_models() -> str:
    """``generate`` on one GPU, and two GPUs against one; nothing where it has not been measured."""
    parts = []
    if (GPU / "generate.json").exists():
        found = json.loads((GPU / "generate.json").read_text())
        parts += ["## generate", f"A Llama-3.1-8B-shaped model on one {found['gpu']} ({found['method']}).", ""]
        parts += ["| | ms a step | tokens/s | against the loop |", "|---|---|---|---|"]
        parts += [
            f"| {row['job']}, {row['kind']}, {row['way']} | {row['ms']:.2f} | {row['tokens_per_s']:.0f} "
            f"| {row['vs_loop']:.2f} |"
            for row in found["rows"]
            if "ms" in row
        ]
    if (GPU / "parallel.json").exists():
        found = json.loads((GPU / "parallel.json").read_text())
        times = {(row["job"], row["kind"]): row for row in found["rows"]}
        parts += ["## Two GPUs", f"{found['layers']} layers of Llama-3.1-70B on {found['gpu']} ({found['method']})."]
        parts += ["", "| | one, ms | two, ms | speed-up |", "|---|---|---|---|"]
        for job in dict.fromkeys(row["job"] for row in found["rows"]):
            one, two = times[job, "one"], times[job, "two"]
            gain = two["tokens_per_s"] / one["tokens_per_s"] if "tokens_per_s" in one else one["ms"] / two["ms"]
            parts.append(f"| {job} | {one['ms']:.2f} | {two['ms']:.2f} | {gain:.2f} |")
    return "\n".join(parts)


def aims() -> str:
    """What was aimed at, what was measured, and the worst cases of what is missed."""
    found = subprocess.run([sys.executable, ROOT / "bench" / "targets.py"], capture_output=True, text=True, check=True)
    return f"```text\n{found.stdout}```"


def svg(width: int, height: int, shapes: list[str]) -> str:
    """A picture."""
    style = "<style>text{font:11px sans-serif;text-anchor:middle} rect{stroke:#fff}</style>"
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}">'
    back = f'<rect width="{width}" height="{height}" fill="#fff"/>'
    return head + style + back + "".join(shapes) + "</svg>"


def box(x: float, y: float, width: float, height: float, label: str, colour: str) -> str:
    """A rectangle with a word in it."""
    middle = f'x="{x + width / 2:.1f}" y="{y + height / 2 + 4:.1f}"'
    return (
        f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" fill="{colour}"/>'
        f'<text {middle} fill="#fff">{label}</text>'
    )


def words(bits: int, count: int) -> str:
    """Which bit of which word belongs to which code."""
    bit, shapes = 22, []
    for code in range(RUN * count // bits if bits != 3 else RUN):
        codes = torch.zeros(RUN, 1, dtype=torch.int32)
        codes[code] = 2**bits - 1
        for word, value in enumerate(pack(codes, bits).flatten().tolist()[:count]):
            own = [i for i in range(32) if value >> i & 1]
            if own:
                x = (31 - own[-1]) * bit
                shapes.append(box(x + 30, 24 + 34 * word, len(own) * bit, 26, str(code), COLOURS[code % 2]))
    shapes += [
        f'<text x="{30 + (31 - i) * bit + bit / 2}" y="14">{i}</text>' for i in range(0, 32, 4 if bits == 4 else 8)
    ]
    shapes += [f'<text x="14" y="{41 + 34 * word}">w{word}</text>' for word in range(count)]
    return svg(32 * bit + 40, 30 + 34 * count, shapes)


def tiles() -> str:
    """Which lane of a warp keeps which code: 32 columns of a strip of 16 rows."""
    lane = torch.zeros(STEP, STRIP, dtype=torch.int32)
    for bit in range(5):  # words whose lane has this bit are all ones, and so are their codes
        words = torch.where(torch.arange(32) >> bit & 1 == 1, -1, 0).to(torch.int32)
        kept = untile(words[None, :, None].expand(2, 32, 4).reshape(1, 1, 256), 4)  # two vectors of four words
        lane |= (kept != 0).int() << bit
    size, shapes = 24, []
    for n in range(STRIP):
        shapes.append(f'<text x="16" y="{20 + n * size + 16}">n {n}</text>')
        for k in range(32):
            own = int(lane[k, n])
            x, y = 32 + k * size, 20 + n * size
            shapes.append(box(x, y, size, size, str(own), COLOURS[(own // 4 + own) % 2]))
    shapes += [f'<text x="{32 + k * size + 12}" y="14">{k}</text>' for k in range(0, 32, 8)]
    return svg(32 * size + 40, STRIP * size + 30, shapes)


def quality() -> str:
    """KL divergence of every method, as bars."""
    rows = json.loads((RESULTS / "quality.json").read_text())["rows"]
    newest = {row["label"]: row for row in sorted(rows, key=lambda row: row["torch"])}
    bars = sorted((row["speeches"]["kl"], label) for label, row in newest.items() if "RTN 8" not in label)
    bars = [(kl, label) for kl, label in bars if kl > 0]
    scale = 420 / max(kl for kl, _ in bars)
    shapes = []
    for i, (kl, label) in enumerate(bars):
        y = 10 + 30 * i
        shapes.append(f'<text x="220" y="{y + 16}" style="text-anchor:end">{label}</text>')
        shapes.append(box(230, y, kl * scale, 22, "", COLOURS[label.startswith("RTN")]))
        shapes.append(f'<text x="{236 + kl * scale}" y="{y + 16}" style="text-anchor:start">{kl:.3f}</text>')
    return svg(720, 20 + 30 * len(bars), shapes)


def integrations() -> str:
    """What was measured on a real model."""
    found = json.loads((RESULTS / "integrations.json").read_text())
    loaded, peft = found["transformers"], found["peft"]
    equal = "yes" if all(value is True for name, value in loaded.items() if name.endswith("_equal")) else "no"
    lines = ["| | |", "|---|---|", f"| logits and texts equal to `load_quantized`, after saving too | {equal} |"]
    for name, label in (("lora", "LoRA"), ("dora", "DoRA")):
        own = peft[name]
        lines.append(
            f"| {label}, 50 steps: loss, and over the dequantized model | {own['loss_first_10']:.3f} to "
            f"{own['loss_last_10']:.3f}, {own['loss_last_10_dequantized']:.3f} |"
        )
    lines.append(f"| gradients in float32 against float64 | {peft['gradient_error_quantized']:.1e} |")
    return "\n".join([*lines, "", f"Measured with torch {found['torch']} on {found['cpu']}."])
