"""Whether the kernels of this machine keep the error contract: every width, dtype and regime against float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .bounds import error_bound, oracle
from .linear import QuantLinear
from .packing import PackedWeight
from .samples import random_rows, random_weight
from .spec import BITS

DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@dataclass(frozen=True)
class Regime:
    """One way in which a layer is used.

    Attributes:
        name: In a few words.
        M: Rows of x.
        K: In-features.
        N: Out-features.
        group_size: Rows per group; -1 for all.
        act_order: Rows in random groups.
        sym: Zero points in the middle.
        checkpoint_format: Of the zero points.
        gradient: Check ``dy @ W.T`` instead of ``x @ W``.
    """

    name: str
    M: int
    K: int = 1024
    N: int = 512
    group_size: int = 128
    act_order: bool = False
    sym: bool = False
    checkpoint_format: str = "gptq_v2"
    gradient: bool = False


REGIMES = (
    Regime("one row", 1),
    Regime("one row, v1, symmetric", 1, sym=True, checkpoint_format="gptq"),
    Regime("one row, act-order", 1, act_order=True),
    Regime("a few rows", 7, group_size=32),
    Regime("a batch", 32),
    Regime("a batch, one group", 32, group_size=-1),
    Regime("a batch, act-order", 32, act_order=True),
    Regime("a prompt", 300),
    Regime("ragged in every dimension", 5, K=200, N=100, group_size=64),
    Regime("gradient", 32, gradient=True),
    Regime("gradient, act-order", 3, act_order=True, gradient=True),
)


@dataclass(frozen=True)
class Check:
    """The outcome of one regime at one width and dtype.

    Attributes:
        bits: Width.
        dtype: Of x and y.
        regime: Its name.
        error: Largest ``|y - exact|``.
        bound: What is allowed at that element.
        share: Largest error over what is allowed at its own element; above 1 the contract is broken.
        relative: ``||y - exact|| / ||exact||``.
        ok: Whether every element keeps the contract.
    """

    bits: int
    dtype: str
    regime: str
    error: float
    bound: float
    share: float
    relative: float
    ok: bool


def selftest(device: torch.device | str | None = None, say: Callable[[Check], None] | None = None) -> list[Check]:
    """Run every regime at every width and dtype through :class:`QuantLinear`.

    Args:
        device: Default: the GPU if there is one, else the CPU path.
        say: Called with each outcome as it comes.
    """
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    checks = []
    for bits in BITS:
        for dtype in DTYPES:
            for regime in REGIMES:
                checks.append(_check(bits, dtype, regime, device))
                if say is not None:
                    say(checks[-1])
    return checks


def _check(bits: int, dtype: torch.dtype, regime: Regime, device: torch.device) -> Check:
    weight = random_weight(
        regime.K,
        regime.N,
        bits,
        regime.group_size,
        act_order=regime.act_order,
        sym=regime.sym,
        checkpoint_format=regime.checkpoint_format,
    )
    bias = random_rows(1, regime.N, dtype, seed=1)[0]
    width = regime.N if regime.gradient else regime.K
    x = random_rows(regime.M, width, dtype, seed=2)
    y = _run(weight, x, bias, regime.gradient, device).cpu()
    bias = None if regime.gradient else bias
    exact = oracle(x, weight, bias, transposed=regime.gradient)
    bound = error_bound(x, weight, bias, transposed=regime.gradient)
    error = (y.double() - exact).abs()
    worst = int(error.nan_to_num(torch.inf).argmax())
    return Check(
        bits=bits,
        dtype=str(dtype).removeprefix("torch."),
        regime=regime.name,
        error=float(error.flatten()[worst]),
        bound=float(bound.flatten()[worst]),
        share=float((error / bound).max()),
        relative=float(error.norm() / exact.norm()),
        ok=y.dtype == dtype and bool((error <= bound).all()),
    )


def _run(weight: PackedWeight, x: Tensor, bias: Tensor, gradient: bool, device: torch.device) -> Tensor:
    layer = QuantLinear.from_packed(weight, bias).to(device)
    x = x.to(device)
    if not gradient:
        return layer(x)
    start = torch.zeros(len(x), weight.K, dtype=x.dtype, device=device, requires_grad=True)
    layer(start).backward(x)
    if start.grad is None:
        raise RuntimeError("no gradient reached the input")
    return start.grad
