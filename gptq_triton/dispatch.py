"""Which kernel, with which tiles: a table over plain values, testable without a GPU."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from .spec import QuantSpec

SMALLEST_BLOCK_K = 16  # what one product of the tensor cores takes


@dataclass(frozen=True)
class Plan:
    """How one product is launched.

    Attributes:
        kernel: The module in ``kernels/``, and its launcher.
        block_m: Rows of x per tile.
        block_n: Columns of W per tile or step.
        block_k: Rows of W per step or tile.
        num_warps: Warps per program.
        num_stages: Steps of the loop in flight.
    """

    kernel: str
    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


# (M up to, plan): few rows take narrow tiles, so that there are programs for every SM
_HALF = (
    (16, Plan("matmul", 16, 32, 128, 4, 4)),
    (64, Plan("matmul", 64, 64, 64, 4, 4)),
    (None, Plan("matmul", 128, 128, 64, 8, 3)),
)
_FLOAT = (
    (16, Plan("matmul", 16, 32, 32, 4, 3)),
    (None, Plan("matmul", 64, 64, 16, 8, 3)),
)
_HALF_TRANSPOSED = (
    (16, Plan("matmul_transposed", 16, 64, 32, 4, 4)),
    (64, Plan("matmul_transposed", 64, 64, 64, 4, 4)),
    (None, Plan("matmul_transposed", 128, 64, 128, 8, 3)),
)
_FLOAT_TRANSPOSED = (
    (16, Plan("matmul_transposed", 16, 32, 32, 4, 3)),
    (None, Plan("matmul_transposed", 64, 16, 32, 8, 2)),
)


def choose(M: int, N: int, K: int, spec: QuantSpec, dtype: torch.dtype, arch: str, *, transposed: bool = False) -> Plan:
    """The plan for ``x @ W``, or for ``dy @ W.T`` if transposed.

    Args:
        M: Rows of x (or dy).
        N: Out-features.
        K: In-features.
        spec: Of the weight; ``desc_act`` says that rows carry a g_idx.
        dtype: Of x: float16, bfloat16 or float32.
        arch: "sm_90" and the like, or AMD's "gfx942" and the like.
        transposed: Multiply by the transpose.

    Returns:
        A plan that is valid for every shape and fits the shared memory of every known arch.

    Raises:
        TypeError: The kernels do not take ``dtype``.
    """
    if dtype not in (torch.float16, torch.bfloat16, torch.float32):
        raise TypeError(f"dtype must be float16, bfloat16 or float32 on a GPU, got {dtype}")
    if dtype == torch.float32:
        table = _FLOAT_TRANSPOSED if transposed else _FLOAT
    else:
        table = _HALF_TRANSPOSED if transposed else _HALF
    rows = spec.rows_per_group(K)
    whole = rows & -rows  # the tallest tile that never straddles groups
    scattered = spec.desc_act or (rows < K and whole < SMALLEST_BLOCK_K)
    plan = next(plan for limit, plan in table if limit is None or limit >= (min(M, 64) if scattered else M))
    if scattered:
        # a scale and a zero point per element: registers and shared memory hold less of the rest
        plan = replace(plan, block_k=min(plan.block_k, 32), num_stages=2)
    elif rows < K:
        plan = replace(plan, block_k=min(plan.block_k, whole))
    if arch.startswith("gfx"):
        # 64 KiB of shared memory, and loads wait in registers instead
        plan = replace(plan, num_stages=min(plan.num_stages, 2))
    return plan
