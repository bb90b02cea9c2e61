"""Write the README's tables from the result files, or check that they are up to date (``--check``)."""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from cases import Case
from reading import Cell, fractions, geomean, read, speedups
from reading import cells as cells_of

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "bench" / "results"
README = ROOT / "README.md"
GPU = RESULTS / "h200"
WIDTHS = (8, 4, 3, 2)
LAYERS = {(4096, 4096): "4096 x 4096", (28672, 4096): "28672 x 4096", (8192, 28672): "8192 x 28672"}
SHOWN_ROWS = (1, 16, 64)
PEERS = ("humming", "cublas")  # with columns of their own among few rows
MANY_ROWS = (128, 256, 512, 1024, 2048, 4096, 8192)
DEFAULT = "clip, refine 1"  # of QuantizeConfig, as bench/switches.py calls it
PLOTS = {"speedup.svg": "Speed-up over fp16 against M", "floor.svg": "Fraction of the floor against M"}


def quality() -> str:
    """Perplexity and KL of every method; of several machines' rows, those made with the newest torch."""
    found = read(RESULTS / "cpu" / "quality.json")["rows"]
    rows = {row["label"]: row for row in sorted(found, key=lambda row: row["torch"])}.values()
    lines = [
        "| | ppl speeches | ppl handbook | KL speeches | KL handbook |",
        "|---|---|---|---|---|",
    ]
    for row in sorted(rows, key=_order):
        a, b = row["speeches"], row["handbook"]
        lines.append(
            f"| {row['label']} | {a['perplexity']:.2f} | {b['perplexity']:.2f} | {a['kl']:.4f} | {b['kl']:.4f} |"
        )
    return "\n".join([*lines, "", *switches()])


def switches() -> list[str]:
    """What each switch does to whole models; several machines' files, the first that has a row."""
    rows: dict[tuple, dict] = {}
    for machine in ("h200", "cpu"):
        for row in read(RESULTS / machine / "switches.json")["rows"]:
            rows.setdefault((row["model"], row["switch"], row["bits"]), row)
    lines = []
    for model, title in (("smollm2", "SmolLM2-135M"), ("gemma3-270m", "Gemma 3 270M")):
        names = list(dict.fromkeys(switch for name, switch, _ in rows if name == model))
        if not names:
            continue
        lines += [f"| {title}, KL speeches, handbook | 4 bits | 3 bits | 2 bits |", "|---|---|---|---|"]
        for switch in names:
            label = f"**{switch}** (default)" if switch == DEFAULT else switch
            lines.append(
                f"| {label} | " + " | ".join(_divergence(rows.get((model, switch, b))) for b in (4, 3, 2)) + " |"
            )
        lines.append("")
    return lines


def _divergence(row: dict | None) -> str:
    return ", ".join(f"{row[text]['kl']:.3f}" for text in ("speeches", "handbook")) if row else "-"


def _order(row: dict) -> tuple:
    bits = re.search(r"(\d)-bit", row["label"])
    return (-int(bits[1]) if bits else -99, not row["label"].startswith("RTN"), row["label"])


def speed() -> str:
    """The whole section on speed; nothing before the first result file exists."""
    prefill = many_rows("prefill.json", "Prefill", ("cublas", "humming"))
    gradients = many_rows("backward.json", "Gradients with respect to x", ("cublas",))
    parts = [decode(), prefill, gradients, end_to_end(), quantizing()]
    if not any(parts):
        return ""
    plots = [f"![{title}](bench/results/h200/{name})" for name, title in PLOTS.items() if (GPU / name).exists()]
    return "\n\n".join(["## How fast it is", *(part for part in parts if part), *plots])


def decode() -> str:
    """Time, fraction of the floor and speed-ups of three layers, and the means over all of them."""
    result = read(GPU / "decode.json")
    found = cells_of(result["rows"])
    if not found:
        return ""
    shapes = {(case.N, case.K) for case in found}
    lines = [
        f"Decoding on one {_machine(result)}: microseconds per product (fraction of the floor), fp16 activations, "
        "groups of 128 with zero points. The floor is the time to read the weight once at the bandwidth of a kernel "
        "that only reads. Speed-ups are geometric means over M = 1 to 64, against humming, the kernels that vLLM "
        f"uses, in its zero-point mode, and against cuBLAS in fp16; the last rows are means over {len(shapes)} layers "
        "of six models. Measured by `make bench-speed`.",
        "",
        "| N x K | bits | " + " | ".join(f"M = {M}" for M in SHOWN_ROWS) + " | x humming | x cuBLAS |",
        "|---|---|" + "---|" * (len(SHOWN_ROWS) + 2),
    ]
    for shape, label in LAYERS.items():
        for bits in WIDTHS:
            group = {case: cell for case, cell in found.items() if shape == (case.N, case.K) and case.bits == bits}
            if group:
                lines.append(_line([label, str(bits), *(_time(group, M) for M in SHOWN_ROWS)], group))
    for bits in WIDTHS:
        group = {case: cell for case, cell in found.items() if case.bits == bits}
        if group:
            lines.append(_line(["all", str(bits), *(_mean_fraction(group, M) for M in SHOWN_ROWS)], group))
    return "\n".join([*lines, *_other_peers(found)])


def many_rows(file: str, title: str, peers: Sequence[str]) -> str:
    """Speed-ups over peers, cuBLAS in fp16 the first of them, at large M, geometric means over all shapes."""
    result = read(GPU / file)
    found = cells_of(result["rows"])
    if not found:
        return ""
    rows = [M for M in MANY_ROWS if any(case.M == M for case in found)]
    shapes = Counter((case.bits, case.M) for case in found if case.M in rows).values()
    count = " to ".join(map(str, sorted({min(shapes), max(shapes)})))
    over = "cuBLAS in fp16" + "".join(f" (over {peer})" for peer in peers[1:])
    lines = [
        f"{title} on one {_machine(result)}: speed-up over {over}, geometric means over the {count} shapes measured.",
        "",
        "| bits | " + " | ".join(f"M = {M}" for M in rows) + " |",
        "|---|" + "---|" * len(rows),
    ]
    for bits in [bits for bits in WIDTHS if any(case.bits == bits for case in found)]:
        entries = []
        for M in rows:
            group = {case: cell for case, cell in found.items() if case.bits == bits and case.M == M}
            first, *others = (_number(geomean(speedups(group, peer).values())) for peer in peers)
            entries.append(" ".join([first, *(f"({other})" for other in others)]))
        lines.append(f"| {bits} | " + " | ".join(entries) + " |")
    return "\n".join(lines)


def kind_of(row: dict) -> str:
    """Of the model of a row of e2e.json, and how it was compiled."""
    return row["kind"] + ", pdl" * row.get("pdl", False)


def end_to_end() -> str:
    """A whole model's decoding, prefill and adapter training."""
    result = read(GPU / "e2e.json")
    rows = [row for row in result["rows"] if "ms" in row]
    if not rows:
        return ""
    lines = [
        f"A Llama-3.1-8B-shaped model on one {_machine(result)} ({result['method']}):",
        "",
        "| | weights | ms | tokens/s | x fp16 | outside the layers, ms |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        outside = f"{row['outside_ms']:.2f}" if "outside_ms" in row else ""
        lines.append(
            f"| {row['job']}, {kind_of(row)} | {row['weights_gb']:.1f} GB | {row['ms']:.2f} "
            f"| {row['tokens_per_s']:.0f} | {row['vs_fp16']:.2f} | {outside} |"
        )
    return "\n".join(lines)


def quantizing() -> str:
    """Seconds to quantize a layer and a whole model."""
    result = read(GPU / "quantize.json")
    if not result["rows"]:
        return ""
    lines = [f"Quantizing on one {_machine(result)}; {result['method']}.", ""]
    lines += ["| layer | eager, ms | fused, ms | | codes equal |", "|---|---|---|---|---|"]
    kinds = {False: "", True: ", act-order"}
    lines += [
        f"| {row['N']} x {row['K']}{kinds[row['act_order']]} | {row['eager_ms']:.0f} | {row['fused_ms']:.1f} "
        f"| {row['speedup']:.1f}x | {row['equal_codes']:.2%} |"
        for row in result["rows"]
        if row["part"] == "solver"
    ]
    lines += ["", "| 8B model, switches | seconds | of these solving | GPU memory |", "|---|---|---|---|"]
    lines += [
        f"| {row['switches']}{kinds[row['act_order']]} | {row['seconds']:.0f} | {row['solve_s']:.0f} "
        f"| {row['peak_gb']:.1f} GB |"
        for row in result["rows"]
        if row["part"] == "model"
    ]
    lines += [
        f"| a block of 128 experts, default | {row['seconds']:.1f} | {row['solve_s']:.1f} | |"
        for row in result["rows"]
        if row["part"] == "experts"
    ]
    return "\n".join(lines)


def _machine(result: dict) -> str:
    return f"{result['gpu']} (torch {result['torch']}, triton {result['triton']})"


def _line(entries: list[str], group: dict[Case, Cell]) -> str:
    ratios = (_number(geomean(speedups(group, peer).values())) for peer in PEERS)
    return "| " + " | ".join([*entries, *ratios]) + " |"


def _other_peers(found: dict[Case, Cell]) -> list[str]:
    peers = {provider for cell in found.values() for provider in cell} - {"ours", *PEERS}
    ratios = {peer: speedups(found, peer).values() for peer in sorted(peers)}
    parts = [
        f"{peer} {_number(geomean(times))} ({len(times)} products, {_number(min(times))} at least)"
        for peer, times in ratios.items()
    ]
    return ["", f"Speed-up over other peers, where they were measured: {', '.join(parts)}."] if parts else []


def _time(group: dict[Case, Cell], M: int) -> str:
    rows = [cell["ours"] for case, cell in group.items() if case.M == M]
    return f"{rows[0]['us']:.1f} ({rows[0]['of_floor']:.2f})" if rows else "-"


def _mean_fraction(group: dict[Case, Cell], M: int) -> str:
    return f"({_number(geomean(value for case, value in fractions(group).items() if case.M == M))})"


def _number(value: float) -> str:
    return "-" if value != value else f"{value:.2f}"


TABLES: dict[str, Callable[[], str]] = {"quality": quality, "speed": speed}


def generate(text: str) -> str:
    """The README's text with every table made anew."""
    for name, table in TABLES.items():
        head, begin, rest = text.partition(f"<!-- {name} -->\n")
        _, end, tail = rest.partition(f"<!-- /{name} -->")
        if not begin or not end:
            raise SystemExit(f"README has no place for the table {name!r}")
        content = table()
        text = f"{head}{begin}{content + chr(10) if content else ''}{end}{tail}"
    return text


def main() -> None:
    text = README.read_text()
    fresh = generate(text)
    if "--check" in sys.argv and fresh != text:
        raise SystemExit("README is stale: run python bench/tables.py")
    README.write_text(fresh)


if __name__ == "__main__":
    main()
