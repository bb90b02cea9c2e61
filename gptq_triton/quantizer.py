"""Scales and zero points: the round-to-nearest quantizer that GPTQ builds on.

Source: the Quantizer of GPTQ-for-LLaMa and ColossalAI, whose names, arguments and results are kept
bit for bit, except where that code damages its input:

- a symmetric row with no negative value gets the range [-max, max], as every other symmetric row
  does (there, its zero point stayed at the middle while its scale spanned [0, max], which clipped
  the upper half of the values);
- a scale is never below the smallest normal number of its dtype (there, it could underflow to
  zero and make infinite codes);
- no argument is ever changed in place.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn

from .spec import BITS

MSE_NORM, MSE_GRID, MSE_MAXSHRINK = 2.4, 100, 0.8  # GPTQ-for-LLaMa's defaults


def quantize(x: Tensor, scale: Tensor, zero: Tensor, maxq: Tensor | int) -> Tensor:
    """Round x to the grid ``scale * (code - zero)``, code in [0, maxq].

    Args:
        x: Floating, any shape.
        scale: Step, > 0, broadcastable to x.
        zero: Zero point in codes, broadcastable to x.
        maxq: Largest code.

    Returns:
        The nearest grid values, the shape of x.
    """
    return scale * (encode(x, scale, zero, maxq) - zero)


def encode(x: Tensor, scale: Tensor, zero: Tensor, maxq: Tensor | int) -> Tensor:
    """The codes of :func:`quantize`, integral values in the floating dtype of ``x / scale``."""
    return (torch.round(x / scale) + zero).clamp_(0, int(maxq))


def group_params(
    rows: Tensor,
    maxq: int,
    sym: bool,
    mse: bool = False,
    norm: float = MSE_NORM,
    grid: int = MSE_GRID,
    maxshrink: float = MSE_MAXSHRINK,
) -> tuple[Tensor, Tensor]:
    """Scale and zero point of each row; :meth:`Quantizer.configure` says what the arguments mean.

    Args:
        rows: float32 or float64, (R, values).

    Returns:
        scale, > 0, and zero, integral in [0, maxq]; both (R,), the dtype of rows.
    """
    low = rows.amin(1).clamp(max=0)
    high = rows.amax(1).clamp(min=0)
    if sym:
        high = torch.maximum(-low, high)
        low = -high
    unused = high == low
    low, high = low.masked_fill(unused, -1), high.masked_fill(unused, 1)
    scale, zero = _grid(low, high, maxq, sym)
    if not mse:
        return scale, zero
    best = torch.full_like(scale, torch.inf)
    for keep in _shares(grid, maxshrink):
        scale1, zero1 = _grid(keep * low, keep * high, maxq, sym)
        error = quantize(rows, scale1[:, None], zero1[:, None], maxq).sub_(rows).abs_().pow_(norm).sum(1)
        better = error < best
        best = torch.where(better, error, best)
        scale, zero = torch.where(better, scale1, scale), torch.where(better, zero1, zero)
    return scale, zero


@functools.cache
def mse_shares(device: torch.device) -> Tensor:
    """What `group_params` tries to keep of a range with its defaults, float32."""
    return torch.tensor(_shares(MSE_GRID, MSE_MAXSHRINK), dtype=torch.float32, device=device)


def _shares(grid: int, maxshrink: float) -> list[float]:
    """What is kept of a range, from all of it down."""
    return [1 - step / grid for step in range(int(maxshrink * grid))]


def _grid(low: Tensor, high: Tensor, maxq: int, sym: bool) -> tuple[Tensor, Tensor]:
    steps = low.new_full((), maxq)  # a GPU would multiply by a number's reciprocal, which rounds otherwise
    scale = ((high - low) / steps).clamp(min=torch.finfo(low.dtype).tiny)
    zero = torch.full_like(scale, (maxq + 1) / 2) if sym else torch.round(-low / scale)
    return scale, zero


class Quantizer(nn.Module):
    """Finds scale and zero point of weights or activations, per channel or per tensor.

    Args:
        shape: Number of elements of the initial (unset) scale and zero.
    """

    maxq: Tensor
    scale: Tensor
    zero: Tensor

    def __init__(self, shape: int = 1):
        super().__init__()
        self.register_buffer("maxq", torch.tensor(0))
        self.register_buffer("scale", torch.zeros(shape))
        self.register_buffer("zero", torch.zeros(shape))

    def configure(
        self,
        bits: int,
        perchannel: bool = False,
        sym: bool = True,
        mse: bool = False,
        norm: float = MSE_NORM,
        grid: int = MSE_GRID,
        maxshrink: float = MSE_MAXSHRINK,
    ) -> None:
        """Set what :meth:`find_params` looks for.

        Args:
            bits: 2, 3, 4 or 8.
            perchannel: One scale per output channel of a weight (per feature of an activation)
                instead of one for the tensor.
            sym: Zero point fixed at the middle code.
            mse: Shrink the range to minimise ``sum |x - quantize(x)| ** norm``.
            norm: Exponent of that error.
            grid: Steps into which the full range is divided.
            maxshrink: Fraction of the range that may be cut.

        Raises:
            ValueError: ``bits`` is not a supported width, or grid, norm or maxshrink is out of range.
        """
        if bits not in BITS:
            raise ValueError(f"bits must be one of {BITS}, got {bits}")
        if grid < 1 or norm <= 0 or not 0 <= maxshrink < 1:
            raise ValueError(f"need grid >= 1, norm > 0, 0 <= maxshrink < 1; got {grid}, {norm}, {maxshrink}")
        self.maxq = torch.tensor(2**bits - 1)
        self.perchannel = perchannel
        self.sym = sym
        self.mse = mse
        self.norm = norm
        self.grid = grid
        self.maxshrink = maxshrink

    @torch.no_grad()
    def find_params(self, x: Tensor, weight: bool = False) -> None:
        """Set ``scale`` and ``zero`` from data.

        Args:
            x: A weight (channels first) or an activation (features last; dimension 1 when it has
                four dimensions). float16 and bfloat16 are measured in float32.
            weight: Whether x is a weight.

        Raises:
            ValueError: :meth:`configure` was not called, x is empty, or x holds a NaN or infinity.
        """
        if not self.enabled():
            raise ValueError("configure() must be called before find_params()")
        if x.numel() == 0:
            raise ValueError(f"x must not be empty, got shape {tuple(x.shape)}")
        if x.dtype not in (torch.float32, torch.float64):
            x = x.float()
        if not torch.isfinite(x).all():
            raise ValueError("x must be finite, got NaN or infinity")
        self.maxq = self.maxq.to(x.device)
        shape = x.shape
        scale, zero = group_params(
            self._rows(x, weight), int(self.maxq), self.sym, self.mse, self.norm, self.grid, self.maxshrink
        )
        if not self.perchannel:
            count = shape[0] if weight or len(shape) == 1 else shape[2] if len(shape) == 3 else shape[1]
            scale, zero = scale.repeat(count), zero.repeat(count)
        broadcast = [1] * len(shape)
        broadcast[0 if weight else 1 if len(shape) == 4 else -1] = -1
        self.scale, self.zero = scale.reshape(broadcast), zero.reshape(broadcast)

    def quantize(self, x: Tensor) -> Tensor:
        """x on the grid found by :meth:`find_params`; x itself before that."""
        return quantize(x, self.scale, self.zero, self.maxq) if self.ready() else x

    def enabled(self) -> bool:
        """Whether :meth:`configure` was called."""
        return bool(self.maxq > 0)

    def ready(self) -> bool:
        """Whether every scale is set."""
        return bool(torch.all(self.scale != 0))

    def _rows(self, x: Tensor, weight: bool) -> Tensor:
        """x as (channels, values)."""
        if not self.perchannel:
            return x.flatten().unsqueeze(0)
        if weight:
            return x.flatten(1)
        if x.dim() == 4:
            return x.transpose(0, 1).flatten(1)
        return x.reshape(-1, x.shape[-1]).t()
