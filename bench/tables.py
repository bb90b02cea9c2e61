"""Write the README's tables from the result files, or check that they are up to date (``--check``)."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
README = Path(__file__).parent.parent / "README.md"


def quality() -> str:
    """Perplexity and KL of every method; of several machines' rows, those made with the newest torch."""
    found = json.loads((RESULTS / "cpu" / "quality.json").read_text())["rows"]
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
    return "\n".join(lines)


def _order(row: dict) -> tuple:
    bits = re.search(r"(\d)-bit", row["label"])
    return (-int(bits[1]) if bits else -99, not row["label"].startswith("RTN"), row["label"])


TABLES = {"quality": quality}


def generate(text: str) -> str:
    """The README's text with every table made anew."""
    for name, table in TABLES.items():
        head, begin, rest = text.partition(f"<!-- {name} -->\n")
        _, end, tail = rest.partition(f"<!-- /{name} -->")
        if not begin or not end:
            raise SystemExit(f"README has no place for the table {name!r}")
        text = f"{head}{begin}{table()}\n{end}{tail}"
    return text


def main() -> None:
    text = README.read_text()
    fresh = generate(text)
    if "--check" in sys.argv and fresh != text:
        raise SystemExit("README is stale: run python bench/tables.py")
    README.write_text(fresh)


if __name__ == "__main__":
    main()
