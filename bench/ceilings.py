"""What the machine can do at best: a kernel that only reads, and cuBLAS at its favourite size."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from cases import Ceilings
from method import capture, interleaved

WORDS = 2**30  # int32: 4.3 GB, many times the L2 cache
SIZE = 8192
# words a program reads at once, how often, warps
READERS = ((4096, 8, 8), (2048, 16, 4), (8192, 8, 8), (4096, 32, 8), (4096, 16, 4))


@triton.jit
def _read(x_ptr, sums_ptr, BLOCK: tl.constexpr, STEPS: tl.constexpr):
    pid = tl.program_id(0)
    total = tl.zeros((BLOCK,), tl.int32)
    first = pid.to(tl.int64) * BLOCK * STEPS
    for step in range(STEPS):
        total += tl.load(x_ptr + first + step * BLOCK + tl.arange(0, BLOCK))
    tl.store(sums_ptr + pid, tl.sum(total, 0))


def measure() -> Ceilings:
    """The best of several configurations, and cuBLAS in both 16-bit formats."""
    return Ceilings(read_gbps=_read_gbps(), tflops={name: _tflops(name) for name in ("float16", "bfloat16")})


def _read_gbps() -> float:
    x = torch.randint(-(2**31), 2**31, (WORDS,), dtype=torch.int32, device="cuda")
    sums = torch.empty(WORDS // 2048, dtype=torch.int32, device="cuda")
    found = {}
    for block, steps, warps in READERS:
        grid = (WORDS // (block * steps),)

        def read(grid=grid, block=block, steps=steps, warps=warps):
            _read[grid](
                x,
                sums,
                block,
                steps,
                num_warps=warps,  # pyright: ignore[reportCallIssue] an option of the launch
            )

        found[f"{block} {steps} {warps}"] = capture([read], 8)
    return 4 * WORDS / min(interleaved(found, preheat=0.1).values()) / 1e3


def _tflops(dtype: str) -> float:
    a, b = (torch.randn(SIZE, SIZE, device="cuda", dtype=getattr(torch, dtype)) for _ in range(2))
    us = interleaved({"mm": capture([lambda: torch.mm(a, b)], 8)}, preheat=0.5)["mm"]
    return 2 * SIZE**3 / us / 1e6
