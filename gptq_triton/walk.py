"""GPTQ's walk: columns are rounded one by one, each error moved onto those that follow.

Between blocks of columns the errors are moved by products with the factor of H, those of all columns before onto a
strip of blocks at once; inside a block one column at a time, by the eager loop here or by one kernel. With
``d = w - q`` of the columns before, ``unit`` of the factor, and ``F = unit[block, block]^-1``, a block starts as

    w + F^T (unit[before, block]^T d)        and its column j moves  w[i] -= F[j, i] (w[j] - q[j])  for i > j

which is algorithm 1 of the paper (Frantar et al., 2022), without H^-1 and without a product that waits for it.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.linalg import solve_triangular

from .halves import empty_like, inner
from .hessian import Factor
from .options import SolverOptions
from .packing import storable
from .quantizer import MSE_NORM, encode, group_params, mse_shares
from .refinement import Rounded, clipped_params, kept_shares
from .spec import QuantSpec

STRIP = 512  # columns onto which the errors of all before are moved at once; inside, block after block is


@dataclass(frozen=True, eq=False)
class Cuts:
    """How columns are cut.

    Attributes:
        strips: Blocks, as (start, stop), in lists: each list is brought up to date at once.
        inside: Groups that are found inside their block: first column to end.
        ahead: Groups that are found before a block: its start to the group's end and index.
        blocks: All blocks, int64 (B, 2), on the device of the columns.
        runs: Where a group starts that is found inside a block, its columns, else 0; int32 (K,) on that device.
    """

    strips: list[list[tuple[int, int]]]
    inside: dict[int, int]
    ahead: dict[int, tuple[int, int]]
    blocks: Tensor
    runs: Tensor


def walk(
    columns: Tensor,
    factor: Factor,
    order: Tensor,
    grid: Rounded,
    spec: QuantSpec,
    options: SolverOptions,
    moved: Tensor | None = None,
    cuts: Cuts | None = None,
) -> Rounded:
    """Round columns in an order, which is the factor's; a GPU is not waited for if cuts are given.

    Groups are found when their first column is reached, on weights that carry every error so far, unless
    ``options.static_groups``. Scales that are found may not be finite in their dtype.

    Args:
        columns: float32 (K, N), in processing order.
        factor: Of the Hessian.
        order: int64 (K,): where each column lies in the layer.
        grid: Scales and zero points, of which those that are found are replaced, and each column's group.
        spec: The format.
        options: How.
        moved: What is moved onto each column before the first, float32 (K, N), in units of ``unit^T d``, where no
            group is to be found.
        cuts: What `cut` makes of ``grid.g_idx[order]`` and the options.
    """
    (K, N), columns = columns.shape, columns.contiguous()
    groups = grid.g_idx[order]
    cuts = cut(groups, options) if cuts is None else cuts
    scales, zeros = (t.clone(memory_format=torch.contiguous_format) for t in (grid.scales, grid.zeros))
    codes = torch.empty(K, N, dtype=torch.uint8, device=columns.device)
    step = (_kernel if _fused(columns, options) else _loop)(_Walk(groups, order, cuts, scales, zeros, codes, spec))
    unit, errors = factor.unit, empty_like(columns)
    spreads = _inverses(unit, cuts, _longest(columns, options))

    def reach(start: int, stop: int, first: int) -> Tensor:
        """What the errors of all columns before the first move onto some."""
        found = inner(factor.products[:first, start:stop], errors[:first])
        return found if moved is None else found.add_(moved[start:stop])

    for strip in cuts.strips:
        first, last = strip[0][0], strip[-1][1]
        near, change = reach(first, last, first), torch.empty_like(columns[first:last])
        for start, stop in strip:
            spread, inside = next(spreads), slice(start - first, stop - first)
            tile = torch.addmm(columns[start:stop], spread[: stop - start, : stop - start].t(), near[inside])
            if start in cuts.ahead:
                end, group = cuts.ahead[start]
                rows = tile[: end - start]
                if end > stop:
                    rows = columns[start:end]
                    if start:
                        ahead = unit[start:end, start:end].t()
                        rows = rows + solve_triangular(ahead, reach(start, end, start), upper=False, unitriangular=True)
                here = scales[group : group + 1], zeros[group : group + 1]
                find_groups(rows, factor.cost[start:end], end - start, spec, options, *here)
            step(tile, columns[start:stop], change[inside], spread, start)
            if stop < last:
                near[stop - first :].addmm_(unit[start:stop, stop:last].t(), change[inside])
        errors[first:last] = change
    return Rounded(codes, scales, zeros, grid.g_idx)


def _fused(columns: Tensor, options: SolverOptions) -> bool:
    return options.fused and columns.is_cuda


def _longest(columns: Tensor, options: SolverOptions) -> int | None:
    """Columns of the longest block of the kernel, which takes inverses of that size; None where the loop runs."""
    if not _fused(columns, options):
        return None
    from .kernels.solve import BLOCK_K

    return BLOCK_K


def find_groups(
    columns: Tensor,
    cost: Tensor,
    length: int,
    spec: QuantSpec,
    options: SolverOptions,
    scales: Tensor,
    zeros: Tensor,
) -> None:
    """Scales as they will be stored, and zero points, of groups of columns.

    Args:
        columns: float32 (K, N).
        cost: Of their errors, (K,).
        length: Columns of a group; the last may have fewer.
        spec: The format.
        options: How.
        scales: (G, N), overwritten; on a GPU one beyond its dtype is left infinite, elsewhere a ValueError.
        zeros: float32 (G, N), overwritten.
    """
    if (options.clip or options.mse) and _fused(columns, options):
        from .kernels.clip import clip

        how: dict[str, Any] = {"length": length, "maxq": spec.maxq, "sym": spec.sym}
        keep = kept_shares(columns.device)
        if options.mse:
            how |= {"power": MSE_NORM, "stored": False}
            keep, cost = mse_shares(columns.device), torch.ones_like(cost)
        clip(columns.contiguous(), cost, keep, scales, zeros, **how)
        return
    for group, (rows, costs) in enumerate(zip(columns.split(length), cost.split(length), strict=True)):
        if options.clip:
            scale, zero = clipped_params(rows, costs, spec.maxq, spec.sym, scales.dtype)
        else:
            scale, zero = group_params(rows.t(), spec.maxq, spec.sym, options.mse)
        scales[group], zeros[group] = _stored(scale, scales.dtype), zero


def _stored(scales: Tensor, dtype: torch.dtype) -> Tensor:
    """`storable` without waiting for a GPU."""
    return scales.to(dtype).clamp(min=torch.finfo(dtype).tiny) if scales.is_cuda else storable(scales, dtype)


@dataclass(frozen=True, eq=False)
class _Walk:
    """What the steps of one walk share.

    Attributes:
        groups: Each column's group, int64 (K,).
        order: Which row of codes each column writes, int64 (K,).
        cuts: Where groups are to be found.
        scales, zeros: Of all groups; those found are written.
        codes: uint8 (K, N), written.
        spec: The format.
    """

    groups: Tensor
    order: Tensor
    cuts: Cuts
    scales: Tensor
    zeros: Tensor
    codes: Tensor
    spec: QuantSpec


# rounds a tile (columns, N), that starts at a column: what was moved onto the columns, these as they were, room for how
# much less their codes stand for, the inverse of a block at least as long
Step = Callable[[Tensor, Tensor, Tensor, Tensor, int], None]


def _loop(walk: _Walk) -> Step:
    """A block by operations of PyTorch, a few for each column: the oracle of the kernel."""
    groups, positions, inside = walk.groups.tolist(), walk.order.tolist(), walk.cuts.inside
    scales, zeros, codes, spec = walk.scales, walk.zeros, walk.codes, walk.spec

    def step(tile: Tensor, columns: Tensor, change: Tensor, spread: Tensor, start: int) -> None:
        for j in range(len(tile)):
            group = groups[start + j]
            if start + j in inside:
                rows = tile[j : inside[start + j] - start]
                scale, zeros[group] = group_params(rows.t(), spec.maxq, spec.sym)
                scales[group] = _stored(scale, scales.dtype)
            scale, zero = scales[group].float(), zeros[group]
            code = encode(tile[j], scale, zero, spec.maxq)
            codes[positions[start + j]] = code
            value = (code - zero).mul_(scale)
            tile[j + 1 :].addr_(spread[j, j + 1 : len(tile)], tile[j] - value, alpha=-1)
            torch.sub(columns[j], value, out=change[j])

    return step


def _kernel(walk: _Walk) -> Step:
    """The same by one kernel."""
    from .kernels.solve import solve

    groups, positions = walk.groups.to(torch.int32), walk.order.to(torch.int32)
    runs = walk.cuts.runs if walk.cuts.inside else None

    def step(tile: Tensor, columns: Tensor, change: Tensor, spread: Tensor, start: int) -> None:
        tensors = tile, columns, change, spread, groups, runs, positions, walk.scales, walk.zeros, walk.codes
        solve(*tensors, first=start, maxq=walk.spec.maxq, sym=walk.spec.sym)

    return step


def cut(groups: Tensor, options: SolverOptions) -> Cuts:
    """Blocks, and where groups, each a run of columns, are found.

    A group that fits lies inside one block, a longer one starts a block, and so does every one whose range is clipped.

    Args:
        groups: Each column's group, int64 (K,), on the device of the columns.
        options: How the columns will be walked.
    """
    limit = min(options.block, _longest(groups, options) or options.block)
    inside: dict[int, int] = {}
    ahead: dict[int, tuple[int, int]] = {}
    if options.static_groups:
        blocks = list(_blocks([len(groups)], limit))
    else:
        names, lengths = (t.tolist() for t in groups.unique_consecutive(return_counts=True))
        spans = list(itertools.pairwise(itertools.accumulate(lengths, initial=0)))
        searched = options.mse or options.clip
        if searched:
            blocks = [(first + a, first + b) for first, end in spans for a, b in _blocks([end - first], limit)]
        else:
            blocks = list(_blocks(lengths, limit))
        ahead = {a: (b, name) for (a, b), name in zip(spans, names, strict=True) if searched or b - a > limit}
        inside = {a: b for a, b in spans if a not in ahead}
    runs = torch.zeros(len(groups), dtype=torch.int32)
    runs[list(inside)] = torch.tensor([end - start for start, end in inside.items()], dtype=torch.int32)
    strips = _strips(blocks, {a for a, (b, _) in ahead.items() if b - a > limit})
    return Cuts(strips, inside, ahead, torch.tensor(blocks, device=groups.device), runs.to(groups.device))


def _blocks(runs: list[int], block: int) -> Iterator[tuple[int, int]]:
    """Cut consecutive runs into blocks of at most ``block`` columns; no run starts inside a block and leaves it."""
    start = stop = 0
    for run in runs:
        if start < stop and stop + run - start > block:
            yield start, stop
            start = stop
        stop += run
        while stop - start > block:
            yield start, start + block
            start += block
    if start < stop:
        yield start, stop


def _strips(blocks: list[tuple[int, int]], starts: set[int]) -> list[list[tuple[int, int]]]:
    """Consecutive blocks in lists of about STRIP columns; a list begins wherever it must."""
    strips: list[list[tuple[int, int]]] = []
    for start, stop in blocks:
        if not strips or start in starts or stop - strips[-1][0][0] > STRIP:
            strips.append([])
        strips[-1].append((start, stop))
    return strips


def _inverses(unit: Tensor, cuts: Cuts, size: int | None) -> Iterator[Tensor]:
    """The inverse of each diagonal block, float32, of one size, which may be given: shorter ones end in an identity."""
    size = size or max(stop - start for strip in cuts.strips for start, stop in strip)
    starts, stops = cuts.blocks.t()
    rows = starts[:, None] + torch.arange(size, device=unit.device)
    inside = rows < stops[:, None]
    rows = rows.clamp_(max=len(unit) - 1)
    eye = torch.eye(size, dtype=torch.float64, device=unit.device)
    stack = unit[rows[:, :, None], rows[:, None]].double().where(inside[:, :, None] & inside[:, None], eye)
    yield from solve_triangular(stack, eye, upper=True, unitriangular=True).float().contiguous()
