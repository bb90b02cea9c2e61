"""The commands around checkpoints and kernels: ``gptq-triton inspect | convert | selftest``."""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict
from typing import Any

import torch

from .spec import BITS


def say(text: str) -> None:
    """A message, which is no result."""
    print(text, file=sys.stderr, flush=True)


def inspect(options: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """``gptq-triton inspect``: what a checkpoint is, and what is wrong with it."""
    from .inspection import inspect_checkpoint
    from .report import as_text, draw

    if not options.against:
        torch.set_num_threads(1)  # on tensors this small, threads wait for each other longer than they compute
    found = inspect_checkpoint(options.path, against=options.against, zero_points=options.zero_points)
    if options.picture:
        draw(found, options.picture)
    return asdict(found), as_text(found)


def convert(options: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """``gptq-triton convert``: the same checkpoint, its zero points stored in another form."""
    from .conversion import convert_checkpoint

    done = convert_checkpoint(
        options.path, options.out, options.to, repair=options.repair, zero_points=options.zero_points
    )
    lines = [f"wrote {done.out}: {done.layers} layers, zero points of {done.changed} changed to {options.to}"]
    lines += [f"  mended: {finding}" for finding in done.repaired]
    return asdict(done), "\n".join(lines)


def selftest(options: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """``gptq-triton selftest``: whether the kernels of this machine keep the error contract."""
    from .selftest import Check
    from .selftest import selftest as check

    def line(found: Check) -> str:
        verdict = "ok" if found.ok else "BROKEN"
        return (
            f"{found.bits:>4} {found.dtype:<9}{found.regime:<27}{found.error:10.2e}{found.bound:10.2e}"
            f"{found.share:8.1%}{found.relative:10.2e}  {verdict}"
        )

    device = options.device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found = check(device, None if options.quiet or options.json else lambda each: say(line(each)))
    failed = [each for each in found if not each.ok]
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else "the CPU path"
    lines = [f"bits dtype    regime{'':<21}{'error':>10}{'bound':>10}{'share':>8}{'relative':>10}"]
    lines += [line(max((c for c in found if c.bits == bits), key=lambda c: c.share)) for bits in BITS]
    lines.append(f"{where}: {len(found) - len(failed)} of {len(found)} checks keep the bound; the worst are above")
    lines += [line(each) for each in failed]
    return {"device": where, "failed": len(failed), "checks": [asdict(each) for each in found]}, "\n".join(lines)
