"""Better codes and scales for a layer that is already quantized, judged by its outputs.

With the error ``E = W - Wq`` (K, N) and the Hessian H (K, K) of the inputs, the loss is ``tr(E^T H E)``. Outputs do
not interact, and for each of them the loss is quadratic in every scale and in every code. GPTQ fixes a group's scale
before it chooses the group's codes, and a code before it chooses the next; here each is chosen again, exactly, while
all others are held, so that no step raises the loss.

Source of the descent over codes: Behdin et al., "QuantEase: Optimization-based Quantization for Language Models"
(2023), algorithm 1. Scales are the solution of the normal equations, rounded to what is stored.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from .halves import LOW, Halves, empty_like, inner, splittable
from .hessian import Factor, reordered
from .packing import storable
from .quantizer import group_params
from .spec import QuantSpec

CANDIDATES = 24  # ranges that are tried
MOST_CLIPPED = 0.6  # of a range
LONGEST_FUSED = 128  # rows of a group
AT_ONCE = (1 << 18, 1 << 27)  # values of all candidates that are tried at once: on a CPU, on a GPU


@dataclass(frozen=True, eq=False)
class Rounded:
    """A quantized weight before it is packed.

    Attributes:
        codes: uint8 (K, N).
        scales: As they are stored, > 0, floating (G, N).
        zeros: Integral values, float32 (G, N).
        g_idx: The group of each input, int64 (K,).
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor
    g_idx: Tensor

    def where(self, chosen: Tensor, other: Rounded) -> Rounded:
        """Outputs where ``chosen``, bool (N,), and those of ``other`` elsewhere; the groups must be the same."""
        return Rounded(
            torch.where(chosen, self.codes, other.codes),
            torch.where(chosen, self.scales, other.scales),
            torch.where(chosen, self.zeros, other.zeros),
            self.g_idx,
        )

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """What the codes stand for, (K, N)."""
        if self.codes.is_cuda and dtype == torch.float32:
            from .kernels.passes import values

            out = torch.empty(self.codes.shape, dtype=dtype, device=self.codes.device)
            values(self.codes.contiguous(), self.g_idx, self.scales.contiguous(), self.zeros.contiguous(), out)
            return out
        return self.scales.to(dtype)[self.g_idx].mul_(self.codes - self.zeros.to(dtype)[self.g_idx])


class Descent:
    """A pass over the codes in a fixed order, each becoming the best one under H while all others are held.

    It is GPTQ's walk with another factor and another start: a column's best value is its weight plus
    ``sum_i H_ij d_i / H_jj``, with ``d = w - q`` of all other columns, as they are now before it and were after it.

    Args:
        H: (K, K), floating, with a positive diagonal.
        order: Of the pass, int64 (K,).
    """

    def __init__(self, H: Tensor, order: Tensor):
        H, self.order = reordered(H, order, H.dtype), order
        diagonal = H.diagonal().clone()
        H.div_(diagonal)
        self.later = splittable(H.tril(-1).float())
        self.factor = Factor(H.triu_().float(), diagonal.float())

    def moved(self, columns: Tensor, rounded: Rounded) -> Tensor:
        """What the columns that come later move onto each, float32 (K, N), in the order of the pass."""
        return inner(self.later, splittable((columns - rounded.dequantize())[self.order]))


def refine(
    columns: Tensor,
    H: Tensor,
    rounded: Rounded,
    spec: QuantSpec,
    order: Tensor,
    factor: Factor,
    walk: Callable[[Factor, Rounded, Tensor | None], Rounded],
    rounds: int,
    *,
    members: Members | None = None,
    fused: bool = False,
) -> tuple[Rounded, Tensor]:
    """Rounds of better scales and better codes; no output's loss ever rises.

    A round refits the scales, and then improves the codes in two ways, of which each output keeps the better: a
    pass over those it has, and GPTQ from the start on the scales as they are now, followed by the same pass.

    Args:
        columns: The weight (K, N), floating.
        H: (K, K), with a positive diagonal; float64, or float32 where products are made of halves.
        rounded: Its quantized form; not changed.
        spec: The format.
        order: The order of walks, int64 (K,).
        factor: GPTQ's, in that order.
        walk: Rounds the columns in that order with a factor, on a grid that is given, from what is moved onto each:
            it changes codes alone.
        rounds: How often, at least 1.
        members: Of the groups, if known.
        fused: As `refit_scales` takes it.

    Returns:
        What it becomes, and `losses` of that.
    """
    members = Members.of(rounded.g_idx) if members is None else members
    descent, metric, best = Descent(H, order), Metric(H), torch.empty(0)

    def descend(rounded: Rounded) -> Rounded:
        return walk(descent.factor, rounded, descent.moved(columns, rounded))

    for _ in range(rounds):
        rounded, best = refit_scales(columns, metric, rounded, spec, members, fused=fused)
        for tried in (descend(rounded), descend(walk(factor, rounded, None))):
            loss = losses(columns, metric, tried)
            rounded, best = tried.where(loss < best, rounded), torch.fmin(loss, best)
    return rounded, best


@dataclass(frozen=True, eq=False)
class Members:
    """Which inputs are in which group.

    Attributes:
        order: Inputs sorted by group, int64 (K,); None where they are so already.
        spans: Group, start and end in that order, of each group that has inputs.
    """

    order: Tensor | None
    spans: list[tuple[int, int, int]]

    @classmethod
    def of(cls, g_idx: Tensor) -> Members:
        """Those of a g_idx, int64 (K,)."""
        order = g_idx.argsort(stable=True)
        groups = g_idx[order]
        names, lengths = (t.tolist() for t in groups.unique_consecutive(return_counts=True))
        spans = [(name, *span) for name, span in zip(names, spans_of(lengths), strict=True)]
        return cls(None if torch.equal(groups, g_idx) else order, spans)


def spans_of(lengths: Iterable[int]) -> list[tuple[int, int]]:
    """Start and end of each of consecutive runs."""
    return list(itertools.pairwise(itertools.accumulate(lengths, initial=0)))


class Metric:
    """What errors cost: ``e^T H e``.

    Args:
        H: (K, K), symmetric; float64, or float32 where products are made of halves.
    """

    def __init__(self, H: Tensor):
        self.H, self.products = H, splittable(H)

    def gradient(self, error: Tensor) -> Tensor:
        """``H error``, (K, N), of H's dtype."""
        return inner(self.products, splittable(error.to(self.H.dtype)))

    def of_rows(self, index: Tensor) -> Metric:
        """The same with inputs in another order."""
        return Metric(reordered(self.H, index, self.H.dtype))


def losses(columns: Tensor, metric: Metric, rounded: Rounded) -> Tensor:
    """``e^T H e`` of each output.

    Args:
        columns: The weight (K, N), floating.
        metric: Of H.
        rounded: Its quantized form.

    Returns:
        float64 (N,).
    """
    error = columns.to(metric.H.dtype) - rounded.dequantize(metric.H.dtype)
    return metric.gradient(error).mul_(error).sum(0, dtype=torch.float64)


def refit_scales(
    columns: Tensor, metric: Metric, rounded: Rounded, spec: QuantSpec, members: Members, *, fused: bool = False
) -> tuple[Rounded, Tensor]:
    """The best scale of each group under the Hessian, one group after another; codes stay.

    Unless the spec is symmetric, the zero point may move too: every one that can be stored is tried with its own
    best scale. A scale is rounded to its dtype, and the nearest stored value of a quadratic's minimum is the best
    stored value.

    Args:
        columns: The weight (K, N), floating.
        metric: Of H.
        rounded: Its quantized form; not changed.
        spec: The format.
        members: Of the groups.
        fused: A group in one kernel, where products are made of halves.

    Returns:
        The quantized form, and `losses` of it.
    """
    codes, groups, by_group = rounded.codes, rounded.g_idx, members.order
    if by_group is not None:
        metric, columns, codes, groups = metric.of_rows(by_group), columns[by_group], codes[by_group], groups[by_group]
    dtype = metric.H.dtype
    error = columns.to(dtype) - Rounded(codes, rounded.scales, rounded.zeros, groups).dequantize(dtype)
    gradient = metric.gradient(error)
    loss = error.mul_(gradient).sum(0, dtype=torch.float64)
    changes = empty_like(columns.to(dtype))
    scales, zeros = rounded.scales.clone(), rounded.zeros.clone()
    longest = max(stop - start for _, start, stop in members.spans)
    if fused and isinstance(changes, Halves) and longest <= LONGEST_FUSED:
        from .kernels.refit import refit

        for group, start, stop in members.spans:
            before = inner(metric.products[:start, start:stop], changes[:start])
            refit(
                codes, metric.H, gradient, before, scales, zeros, loss, changes.high, changes.low, changes.scale,
                group=group, first=start, count=stop - start, maxq=spec.maxq, sym=spec.sym, low_unit=LOW,
            )  # fmt: skip
        return Rounded(rounded.codes, scales, zeros, rounded.g_idx), loss
    shifts = torch.zeros(1) if spec.sym else torch.arange(-spec.maxq, spec.maxq + 1)
    shifts = shifts.to(gradient.device, torch.float64)[:, None]  # (Z, 1)
    for group, start, stop in members.spans:
        H_group = metric.H[start:stop, start:stop].double()
        scale, zero = scales[group].double(), zeros[group].double()
        steps = codes[start:stop].double().sub_(zero)
        ones, H_steps = H_group.sum(0), H_group @ steps
        target = gradient[start:stop].sub_(inner(metric.products[:start, start:stop], changes[:start])).double()
        target.addcmul_(scale, H_steps)
        # the loss of scale s and zero point zero + shift, up to a constant: s^2 square - 2 s product
        square = (steps * H_steps).sum(0) - 2 * shifts * (ones @ steps) + shifts**2 * ones.sum()
        product = (steps * target).sum(0) - shifts * target.sum(0)
        best = product / square
        moved = zero + shifts
        limits = torch.finfo(scales.dtype)
        valid = (square > 0) & (best >= limits.tiny) & (best <= limits.max) & (moved >= 0) & (moved <= spec.maxq)
        best = torch.where(valid, best, scale).to(scales.dtype).double()
        there = (best**2 * square - 2 * best * product).masked_fill_(~valid, torch.inf)
        here = (len(shifts) - 1) // 2  # no shift
        before = scale**2 * square[here] - 2 * scale * product[here]
        there, choice = there.min(0)
        better = there < before
        loss += torch.where(better, there - before, 0)
        new_scale = torch.where(better, best.gather(0, choice[None])[0], scale)
        new_zero = torch.where(better, moved.gather(0, choice[None])[0], zero)
        scales[group], zeros[group] = new_scale.to(scales.dtype), new_zero.to(zeros.dtype)
        changes[start:stop] = (steps + (zero - new_zero)).mul_(new_scale).sub_(steps * scale).to(dtype)
    return Rounded(rounded.codes, scales, zeros, rounded.g_idx), loss


def clipped_params(rows: Tensor, importance: Tensor, maxq: int, sym: bool, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Scale and zero point of one group whose range is shrunk where that lowers ``sum_j importance_j (w_j - q_j)^2``.

    Args:
        rows: The group's weights, float32 (R, N).
        importance: What an error in each input costs, >= 0, float32 (R,).
        maxq: Largest code.
        sym: Zero points in the middle of the range.
        dtype: What scales are stored in; candidates are rounded to it before they are compared.

    Returns:
        scale, > 0, dtype (N,), and zero, integral in [0, maxq], float32 (N,).
    """
    low, high = rows.amin(0).clamp(max=0), rows.amax(0).clamp(min=0)
    if sym:
        high = torch.maximum(-low, high)
        low = -high
    ends = torch.stack([low, high], 1) * kept_shares(rows.device)[:, None, None]  # (candidates, N, 2)
    scales, zeros = (t.view(CANDIDATES, -1) for t in group_params(ends.flatten(0, 1), maxq, sym))
    scales = storable(scales, dtype)
    at_once = max(1, AT_ONCE[rows.device.type == "cuda"] // rows.numel())
    parts = zip(scales.split(at_once), zeros.split(at_once), strict=True)
    loss = torch.cat([_losses_of_grids(rows, importance, s.float(), z, maxq) for s, z in parts])
    best = loss.argmin(0, keepdim=True)  # the first of equals: the least clipped
    return scales.gather(0, best)[0], zeros.gather(0, best)[0]


@functools.cache
def kept_shares(device: torch.device) -> Tensor:
    """What is kept of a range, float32 (CANDIDATES,)."""
    return 1 - torch.arange(CANDIDATES, device=device) / CANDIDATES * MOST_CLIPPED


def _losses_of_grids(rows: Tensor, importance: Tensor, scales: Tensor, zeros: Tensor, maxq: int) -> Tensor:
    """What each grid costs each output, (candidates, N), for rows (R, N)."""
    steps = rows / scales[:, None]
    miss = torch.round(steps).clamp_(-zeros[:, None], maxq - zeros[:, None]).sub_(steps).square_()
    return (importance @ miss).mul_(scales).mul_(scales)
