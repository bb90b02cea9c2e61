"""GPTQ's walk: columns are rounded one by one, each error moved onto those that follow.

Between blocks of columns the errors are moved by products with the factor of H, those of all columns before onto a
strip of blocks at once; inside a block one column at a time, by the eager loop here or by one kernel. With
``d = w - q`` of the columns before, ``unit`` of the factor, and ``F = unit[block, block]^-1``, a block starts as

    w + F^T (unit[before, block]^T d)        and its column j moves  w[i] -= F[j, i] (w[j] - q[j])  for i > j

which is algorithm 1 of the paper (Frantar et al., 2022), without H^-1 and without a product that waits for it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.linalg import solve_triangular

from .halves import empty_like, inner
from .hessian import Factor
from .options import SolverOptions
from .packing import storable, trivial_g_idx
from .quantizer import MSE_NORM, encode, group_params, mse_shares
from .refinement import Rounded, clipped_params, kept_shares, spans_of
from .spec import QuantSpec

STRIP = 512  # columns onto which the errors of all before are moved at once; inside, block after block is


@dataclass(frozen=True, eq=False)
class Cuts:
    """How columns are cut.

    Attributes:
        strips: Blocks, as (start, stop), in lists: each list is brought up to date at once.
        inside: Groups that are found inside their block: first column to end.
        ahead: Groups that are found before a block: its start to the group's end and place among all.
        blocks: All blocks, int64 (B, 2).
        runs: Where a group starts that is found inside a block, its columns, else 0; int32 (K,).
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
) -> tuple[Rounded, Tensor]:
    """Round columns in an order, which is the factor's; a GPU is not waited for.

    Groups are found when their first column is reached, on weights that carry every error so far, unless
    ``options.static_groups``. Scales that are found may not be finite in their dtype.

    Args:
        columns: float32 (K, N), in processing order.
        factor: Of the Hessian.
        order: int64 (K,): where each column lies in the layer.
        grid: Each column's group, and if groups are static their scales and zero points. Others are runs in that
            order, as long as those of the spec.
        spec: The format.
        options: How.
        moved: What is moved onto each column before the first, float32 (K, N), in units of ``unit^T d``, where no
            group is to be found.

    Returns:
        What they become, and what the errors of each output cost, float32 (N,), if nothing was moved.
    """
    (K, N), columns, device = columns.shape, columns.contiguous(), columns.device
    groups, lengths = grid.g_idx[order], group_lengths(K, spec)
    longest = _longest(device, options)
    cuts = cut((K,) if options.static_groups else lengths, options, longest, device)
    if options.static_groups:
        names = None
        scales, zeros = (t.clone(memory_format=torch.contiguous_format) for t in (grid.scales, grid.zeros))
    else:  # numbered as they come
        names, groups = groups[:: lengths[0]], trivial_g_idx(K, spec.group_size, device).long()
        scales, zeros = (torch.empty(t.shape, dtype=t.dtype, device=device) for t in (grid.scales, grid.zeros))
    codes, loss = torch.empty(K, N, dtype=torch.uint8, device=device), torch.zeros(N, device=device)
    shared = _Walk(groups, order, cuts, factor.cost, scales, zeros, codes, loss, spec)
    step = (_kernel if _fused(device, options) else _loop)(shared)
    unit, errors = factor.unit, empty_like(columns)
    spreads = _inverses(unit, cuts, longest)

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
    if names is not None:
        by_name = names.argsort()
        scales, zeros = scales[by_name], zeros[by_name]
    return Rounded(codes, scales, zeros, grid.g_idx), loss


def _fused(device: torch.device, options: SolverOptions) -> bool:
    return options.fused and device.type == "cuda"


def _longest(device: torch.device, options: SolverOptions) -> int | None:
    """Columns of the longest block of the kernel, which takes inverses of that size; None where the loop runs."""
    if not _fused(device, options):
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
    if (options.clip or options.mse) and _fused(columns.device, options):
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
        scales[group], zeros[group] = stored(scale, scales.dtype), zero


def stored(scales: Tensor, dtype: torch.dtype) -> Tensor:
    """`storable` without waiting for a GPU: there a scale beyond the dtype becomes infinite."""
    return scales.to(dtype).clamp(min=torch.finfo(dtype).tiny) if scales.is_cuda else storable(scales, dtype)


@dataclass(frozen=True, eq=False)
class _Walk:
    """What the steps of one walk share.

    Attributes:
        groups: Each column's group, int64 (K,).
        order: Which row of codes each column writes, int64 (K,).
        cuts: Where groups are to be found.
        cost: Of an error in each column, float32 (K,).
        scales, zeros: Of all groups; those found are written.
        codes: uint8 (K, N), written.
        loss: float32 (N,), to which what errors cost is added.
        spec: The format.
    """

    groups: Tensor
    order: Tensor
    cuts: Cuts
    cost: Tensor
    scales: Tensor
    zeros: Tensor
    codes: Tensor
    loss: Tensor
    spec: QuantSpec


# rounds a tile (columns, N), that starts at a column: what was moved onto the columns, these as they were, room for how
# much less their codes stand for, the inverse of a block at least as long
Step = Callable[[Tensor, Tensor, Tensor, Tensor, int], None]


def _loop(walk: _Walk) -> Step:
    """A block by operations of PyTorch, a few for each column: the oracle of the kernel."""
    groups, positions, inside = walk.groups.tolist(), walk.order.tolist(), walk.cuts.inside
    scales, zeros, codes, spec = walk.scales, walk.zeros, walk.codes, walk.spec

    def step(tile: Tensor, columns: Tensor, change: Tensor, spread: Tensor, start: int) -> None:
        misses = torch.empty_like(tile)
        for j in range(len(tile)):
            group = groups[start + j]
            if start + j in inside:
                rows = tile[j : inside[start + j] - start]
                scale, zeros[group] = group_params(rows.t(), spec.maxq, spec.sym)
                scales[group] = stored(scale, scales.dtype)
            scale, zero = scales[group].float(), zeros[group]
            code = encode(tile[j], scale, zero, spec.maxq)
            codes[positions[start + j]] = code
            value = (code - zero).mul_(scale)
            miss = torch.sub(tile[j], value, out=misses[j])
            tile[j + 1 :].addr_(spread[j, j + 1 : len(tile)], miss, alpha=-1)
            torch.sub(columns[j], value, out=change[j])
        walk.loss.addmv_(misses.square_().t(), walk.cost[start : start + len(tile)])

    return step


def _kernel(walk: _Walk) -> Step:
    """The same by one kernel."""
    from .kernels.solve import solve

    groups, positions = walk.groups.to(torch.int32), walk.order.to(torch.int32)
    runs = walk.cuts.runs if walk.cuts.inside else None

    def step(tile: Tensor, columns: Tensor, change: Tensor, spread: Tensor, start: int) -> None:
        of_block = tile, columns, change, spread
        of_all = groups, runs, positions, walk.cost, walk.scales, walk.zeros, walk.codes, walk.loss
        solve(*of_block, *of_all, first=start, maxq=walk.spec.maxq, sym=walk.spec.sym)

    return step


def group_lengths(K: int, spec: QuantSpec) -> tuple[int, ...]:
    """Columns of each group; the last may have fewer."""
    rows = spec.rows_per_group(K)
    return tuple(min(rows, K - start) for start in range(0, K, rows))


@functools.lru_cache(32)
def cut(lengths: tuple[int, ...], options: SolverOptions, longest: int | None, device: torch.device) -> Cuts:
    """Blocks, and where groups, each a run of columns, are found.

    A group that fits lies inside one block, a longer one starts a block, and so does every one whose range is clipped.

    Args:
        lengths: Of the groups, in the order they come in; if groups are given, of all columns.
        options: How the columns will be walked.
        longest: Columns of the longest block that can be walked, if there is a limit.
        device: Where the columns are.
    """
    limit = min(options.block, longest or options.block)
    spans, searched = spans_of(lengths), options.mse or options.clip
    inside: dict[int, int] = {}
    ahead: dict[int, tuple[int, int]] = {}
    if searched:
        blocks = [(first + a, first + b) for first, end in spans for a, b in _blocks([end - first], limit)]
    else:
        blocks = list(_blocks(list(lengths), limit))
    if not options.static_groups:
        ahead = {a: (b, place) for place, (a, b) in enumerate(spans) if searched or b - a > limit}
        inside = {a: b for a, b in spans if a not in ahead}
    runs = torch.zeros(sum(lengths), dtype=torch.int32)
    runs[list(inside)] = torch.tensor([end - start for start, end in inside.items()], dtype=torch.int32)
    strips = _strips(blocks, {a for a, (b, _) in ahead.items() if b - a > limit})
    return Cuts(strips, inside, ahead, torch.tensor(blocks).to(device), runs.to(device))


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
