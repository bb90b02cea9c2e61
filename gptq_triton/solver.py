"""GPTQ for one layer: collect the Hessian of its inputs, then round its columns one by one, each
time moving the error onto the columns that are still free.

Source: Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained
Transformers" (2022), algorithm 1. Group-aware reordering: Gafni et al. (2025), as GPTQModel's
``act_group_aware``. Kept eager and plain: it is the oracle for faster solvers.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from .layers import weight_of
from .packing import PackedWeight, pack_weight, storable, trivial_g_idx
from .quantizer import encode, group_params
from .refinement import Rounded as _Rounded
from .refinement import check_refinement, clipped_params, refine
from .spec import QuantSpec

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SolverOptions:
    """How a layer is solved.

    Args:
        damp: Added to the Hessian's diagonal, as a fraction of its mean; raised tenfold as often as
            the factorisation fails, up to 1.
        block: Columns between two updates of the rest of the weight.
        static_groups: Find scales on the original weights, before any column is rounded. With
            act-order this keeps groups in order (a trivial g_idx).
        group_aware: Without act-order, visit groups, and columns inside them, by falling importance.
            Groups stay in order.
        mse: Clip each group's range where that lowers the rounding error.
        clip: The same, with each input's error weighed by what it costs the solver's output: the
            square over the factor's diagonal, ``(w - q)^2 / U_jj^2`` (the paper's equation 2); by the
            Hessian's diagonal where scales are found before the walk. Excludes ``mse``.
        feedback: How much of the error of the layers before is made up for, from 0 to 1: the weight is fitted to
            ``x_full W`` where x differs from the full-precision model's x_full. Needs a Hessian with ``drift``.
        refine: Rounds that choose scales, zero points and codes again under the Hessian; see
            :func:`gptq_triton.refinement.refine`. Each costs about three walks.
        min_tokens: Below this many tokens a layer is rounded to nearest; default: K / 8.
        scale_dtype: What scales are rounded to before any code is chosen.
        checkpoint_format: How zero points are stored; default: "gptq" if symmetric, else "gptq_v2",
            because v1 has no agreed way to store a zero point of 0.
        fused: Walk a block of columns in one kernel where the weight is on a GPU; of at most 128 columns.

    Raises:
        ValueError: A value is out of range.
    """

    damp: float = 0.01
    block: int = 128
    static_groups: bool = False
    group_aware: bool = True
    mse: bool = False
    clip: bool = False
    feedback: float = 0.0
    refine: int = 0
    min_tokens: int | None = None
    scale_dtype: torch.dtype = torch.float16
    checkpoint_format: str | None = None
    fused: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.damp <= 1:
            raise ValueError(f"damp must lie in (0, 1], got {self.damp}")
        if self.block < 1:
            raise ValueError(f"block must be at least 1, got {self.block}")
        check_refinement(self.mse, self.clip, self.refine, self.feedback)


class Hessian:
    """``sum x^T x`` over the tokens a layer saw, in float32.

    Args:
        K: In-features.
        device: Where to accumulate.
    """

    def __init__(self, K: int, device: torch.device | str | None = None):
        self.sum = torch.zeros(K, K, dtype=torch.float32, device=device)
        self.drift: Tensor | None = None  # sum x^T (x_full - x)
        self.tokens = 0

    def add(self, x: Tensor, full: Tensor | None = None) -> None:
        """Count the rows of x, (..., K), floating. float16 and bfloat16 products are exact here.

        Args:
            x: What the layer is given.
            full: What it is given in the full-precision model, like x.
        """
        rows = x.reshape(-1, self.sum.shape[0]).to(self.sum)
        self.tokens += rows.shape[0]
        self.sum.addmm_(rows.t(), rows)
        if full is not None:
            if self.drift is None:
                self.drift = torch.zeros_like(self.sum)
            self.drift.addmm_(rows.t(), full.reshape(rows.shape).to(rows) - rows)


@dataclass(frozen=True, eq=False)
class Solution:
    """One solved layer.

    Attributes:
        weight: The codes and group parameters, packed.
        dequantized: What they stand for, (N, K), float32.
        method: "gptq" or "rtn" (too few tokens, or a Hessian that cannot be factored).
        error: Relative output error ``tr(E H E^T) / tr(W H W^T)`` over the tokens seen.
        error_rtn: The same for round-to-nearest with the same grid rules.
        damp: The damping that was used.
        tokens: Tokens seen.
    """

    weight: PackedWeight
    dequantized: Tensor
    method: Literal["gptq", "rtn"]
    error: float
    error_rtn: float
    damp: float
    tokens: int


class GPTQ:
    """Solver of one layer.

    Args:
        layer: nn.Linear, nn.Conv2d (one group) or transformers' Conv1D; never changed.
        spec: Target format. ``spec.desc_act`` asks for act-order.
        options: How to solve.
        hessian: One that is shared with layers of the same input; default: a new one.
        name: Used in messages.

    Raises:
        TypeError: Another kind of layer.
        ValueError: A grouped convolution.
    """

    def __init__(
        self,
        layer: nn.Module,
        spec: QuantSpec,
        options: SolverOptions | None = None,
        hessian: Hessian | None = None,
        name: str = "layer",
    ):
        weight = weight_of(layer)
        if isinstance(layer, nn.Conv2d) and layer.groups != 1:
            raise ValueError(f"{name}: a convolution must have groups=1, got {layer.groups}")
        self.layer, self.spec, self.name = layer, spec, name
        self.options = options or SolverOptions()
        self.hessian = hessian or Hessian(weight.shape[1], weight.device)

    def add_batch(self, x: Tensor) -> None:
        """Count one batch of the layer's inputs, shaped as the layer takes them."""
        if isinstance(self.layer, nn.Conv2d):
            if isinstance(self.layer.padding, str):
                raise ValueError(f"{self.name}: padding must be given in numbers, got {self.layer.padding!r}")
            x = nn.functional.unfold(
                x, self.layer.kernel_size, self.layer.dilation, self.layer.padding, self.layer.stride
            ).transpose(1, 2)
        self.hessian.add(x)

    def solve(self) -> Solution:
        """Quantize the layer's weight with what was counted so far.

        Raises:
            ValueError: The weight or the inputs seen are not finite.
        """
        weights = {self.name: weight_of(self.layer).detach()}
        return solve(weights, self.hessian, self.spec, self.options)[self.name]


def solve(
    weights: dict[str, Tensor],
    hessian: Hessian,
    spec: QuantSpec,
    options: SolverOptions,
    method: Literal["gptq", "rtn"] = "gptq",
) -> dict[str, Solution]:
    """Quantize the weights of layers that share an input: their rows do not interact, so one walk serves all.

    Args:
        weights: Name to weight (N, K), floating; not changed.
        hessian: Of the K inputs.
        spec: Target format.
        options: How to solve.
        method: "rtn" rounds to nearest and only measures the error.

    Returns:
        Name to solution.

    Raises:
        ValueError: A weight or the Hessian is not finite, or their sizes differ.
    """
    names, H = ", ".join(weights), hessian.sum
    for name, weight in weights.items():
        if weight.shape[1] != H.shape[0]:
            raise ValueError(f"{name}: the Hessian has {H.shape[0]} inputs, the weight {weight.shape[1]}")
        if not bool(torch.isfinite(weight).all()):
            raise ValueError(f"{name}: the weight must be finite, got NaN or infinity")
    if not bool(torch.isfinite(H).all()):
        raise ValueError(f"{names}: the inputs seen must be finite, got NaN or infinity")
    target = torch.cat([w.t().to(H) for w in weights.values()], dim=1)  # (K, N)
    nearest = _round_to_nearest(target, H.diagonal(), spec, options)
    found, damp = None, options.damp
    needed = _needed_tokens(H.shape[0], options)
    if method == "rtn":
        pass
    elif hessian.tokens < needed:
        logger.warning("%s: saw %d tokens, needs %d; rounded to nearest", names, hessian.tokens, needed)
    else:
        order, g_idx = _order(H.diagonal(), spec, options)
        factor, damp = _inverse_factor(H[order][:, order], options.damp)
        if factor is None:
            logger.warning("%s: the Hessian cannot be factored even with damping 1; rounded to nearest", names)
        else:
            if options.feedback and hessian.drift is not None:
                pull = (hessian.drift @ target)[order].mul_(options.feedback)
                target = target.index_add(0, order, factor.t() @ (factor @ pull))
            found = _walk(target[order], factor, order, g_idx, nearest, spec, options)
            if options.refine:
                found = _refined(target, H, order, factor, damp, found, spec, options)
    solutions, start = {}, 0
    for name, weight in weights.items():
        stop = start + weight.shape[0]
        W, rtn = target[:, start:stop], nearest.slice(start, stop)
        chosen = rtn if found is None else found.slice(start, stop)
        dequantized = chosen.dequantize()
        size = _energy(W, H)
        error_rtn = _relative(_energy(W - rtn.dequantize(), H), size)
        solutions[name] = Solution(
            weight=_pack(chosen, spec, options),
            dequantized=dequantized.t(),
            method="rtn" if found is None else "gptq",
            error=error_rtn if found is None else _relative(_energy(W - dequantized, H), size),
            error_rtn=error_rtn,
            damp=damp,
            tokens=hessian.tokens,
        )
        start = stop
    return solutions


def requantize(
    weight: Tensor,
    hessian: Hessian | None,
    scales: Tensor,
    zeros: Tensor,
    g_idx: Tensor,
    spec: QuantSpec,
    options: SolverOptions,
) -> tuple[Tensor, Literal["gptq", "rtn"]]:
    """Codes of a weight on a grid that is given, as when a layer changes and keeps its scales.

    Args:
        weight: (N, K), floating; not changed.
        hessian: Of the K inputs; None, or one that saw too little, rounds to nearest.
        scales: (G, N), > 0.
        zeros: (G, N), integral, in [0, spec.maxq].
        g_idx: (K,), the group of each input.
        spec: The format.
        options: How to solve; its grid options do not matter.

    Returns:
        uint8 (K, N), and how they were found.
    """
    columns, rows = weight.t().float(), g_idx.long()
    scales, zeros = scales.float(), zeros.float()
    scales = scales.masked_fill(scales == 0, 1)  # whatever the code, such a weight is 0
    codes = encode(columns, scales[rows], zeros[rows], spec.maxq).to(torch.uint8)
    if hessian is None or hessian.tokens < max(
        len(columns) // 8 if options.min_tokens is None else options.min_tokens, 1
    ):
        return codes, "rtn"
    order = torch.argsort(hessian.sum.diagonal(), descending=True, stable=True)
    factor, _ = _inverse_factor(hessian.sum[order][:, order], options.damp)
    if factor is None:
        return codes, "rtn"
    nearest = _Rounded(codes, scales, zeros, rows)
    return _walk(columns[order], factor, order, rows, nearest, spec, replace(options, static_groups=True)).codes, "gptq"


def _needed_tokens(K: int, options: SolverOptions) -> int:
    return max(K // 8 if options.min_tokens is None else options.min_tokens, 1)


def _order(importance: Tensor, spec: QuantSpec, options: SolverOptions) -> tuple[Tensor, Tensor]:
    """The order in which columns are rounded, and each column's group; both int64 (K,)."""
    K = importance.shape[0]
    g_idx = trivial_g_idx(K, spec.group_size, importance.device).long()
    if spec.desc_act:
        order = torch.argsort(importance, descending=True, stable=True)
        if not options.static_groups:
            g_idx = torch.empty_like(g_idx).index_copy_(0, order, g_idx)
        return order, g_idx
    if not options.group_aware:
        return torch.arange(K, device=importance.device), g_idx
    peaks = torch.zeros(spec.groups(K), device=importance.device).scatter_reduce_(0, g_idx, importance, "amax")
    rank = torch.argsort(torch.argsort(peaks, descending=True, stable=True))  # of each group
    order = torch.argsort(importance, descending=True, stable=True)
    return order[torch.argsort(rank[g_idx[order]], stable=True)], g_idx


def _inverse_factor(H: Tensor, damp: float, dtype: torch.dtype = torch.float64) -> tuple[Tensor | None, float]:
    """Upper U with (H + damping)^-1 = U^T U, float32, and the damping it took; None if none up to 1 helps.

    One Cholesky of the matrix J H J, J reversing rows and columns, gives H = R R^T with R upper, and U = R^-1.

    Args:
        H: (K, K), symmetric, float32.
        damp: The least damping, as a fraction of the mean of H's diagonal.
        dtype: Of the arithmetic.
    """
    mean = H.diagonal().double().mean()
    while True:
        damped = H.flip(0, 1).to(dtype)
        damped.diagonal().add_(damp * mean)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not int(failed):
            return _invert_lower(lower).float().flip(0, 1), damp
        if damp >= 1:
            return None, damp
        damp = min(10 * damp, 1.0)


def _invert_lower(matrix: Tensor, leaf: int = 512) -> Tensor:
    """The inverse of a lower triangular (K, K): two products instead of solving for the zeros of the identity too.

    [[A, 0], [B, C]]^-1 = [[A^-1, 0], [-C^-1 B A^-1, C^-1]]
    """
    K = len(matrix)
    if leaf >= K:
        eye = torch.eye(K, dtype=matrix.dtype, device=matrix.device)
        return torch.linalg.solve_triangular(matrix, eye, upper=False)
    half = K // 2
    inverse = torch.zeros_like(matrix)
    upper = inverse[:half, :half].copy_(_invert_lower(matrix[:half, :half], leaf))
    lower = inverse[half:, half:].copy_(_invert_lower(matrix[half:, half:], leaf))
    torch.mm(lower.neg() @ matrix[half:, :half], upper, out=inverse[half:, :half])
    return inverse


def _walk(
    columns: Tensor,
    factor: Tensor,
    order: Tensor,
    g_idx: Tensor,
    nearest: _Rounded,
    spec: QuantSpec,
    options: SolverOptions,
) -> _Rounded:
    """Algorithm 1 of the paper on columns (K, N), already in processing order; they are used up.

    Groups are found when their first column is reached, on weights that carry every error so far:
    blocks are cut so that a group lies inside one, or starts one.
    """
    if options.fused and columns.is_cuda:
        with torch.cuda.device(columns.device):
            return _walk_fused(columns, factor, order, g_idx, nearest, spec, options)
    K = len(order)
    groups, positions = g_idx[order].tolist(), order.tolist()
    scales, zeros = nearest.scales.clone(), nearest.zeros.clone()
    codes = torch.empty_like(nearest.codes)
    runs = [K] if options.static_groups else [len(list(run)) for _, run in itertools.groupby(groups)]
    ends = dict(zip(itertools.accumulate(runs, initial=0), itertools.accumulate(runs), strict=False))
    diagonal = factor.diagonal().tolist()
    for start, stop in _blocks(runs, options.block):
        errors = torch.empty_like(columns[start:stop])
        for j in range(start, stop):
            group = groups[j]
            if j in ends and not options.static_groups:
                cost = factor.diagonal()[j : ends[j]] ** -2
                scales[group], zeros[group] = _group_params(columns[j : ends[j]], cost, spec, options)
            scale, zero = scales[group].float(), zeros[group]
            code = encode(columns[j], scale, zero, spec.maxq)
            codes[positions[j]] = code
            error = errors[j - start]
            torch.sub(columns[j], (code - zero).mul_(scale), out=error).div_(diagonal[j])
            columns[j + 1 : stop].addr_(factor[j, j + 1 : stop], error, alpha=-1)
        columns[stop:].addmm_(factor[start:stop, stop:].t(), errors, alpha=-1)
    return _Rounded(codes, scales, zeros, g_idx)


def _walk_fused(
    columns: Tensor,
    factor: Tensor,
    order: Tensor,
    g_idx: Tensor,
    nearest: _Rounded,
    spec: QuantSpec,
    options: SolverOptions,
    **launch: int,
) -> _Rounded:
    """:func:`_walk`, a kernel and a product a block; ``launch`` is for the kernel.

    The kernel finds the groups that lie inside a block. Longer ones start a block, and so does every group where the
    range is clipped: what starts a block is found here, before it.
    """
    from .kernels import solve as kernel

    K, N = columns.shape
    device, limit = columns.device, min(options.block, kernel.BLOCK_K)
    columns, factor, groups = columns.contiguous(), factor.contiguous(), g_idx[order]
    scales, zeros = (t.clone(memory_format=torch.contiguous_format) for t in (nearest.scales, nearest.zeros))
    runs, blocks = None, _blocks([K], limit)
    searched = options.mse or options.clip
    outside: dict[int, tuple[int, int]] = {}  # first column of a group found here: its end, its index
    if not options.static_groups:
        names, lengths = (t.tolist() for t in groups.unique_consecutive(return_counts=True))
        ends = list(itertools.accumulate(lengths))
        spans = [(end - length, end) for length, end in zip(lengths, ends, strict=True)]
        blocks = _blocks(lengths, limit)
        if searched:
            blocks = [(a + first, b + first) for first, end in spans for a, b in _blocks([end - first], limit)]
        outside = {a: (b, g) for (a, b), g in zip(spans, names, strict=True) if searched or b - a > limit}
        if len(outside) < len(spans):
            lengths_at = {a: b - a for a, b in spans if a not in outside}
            runs = torch.tensor([lengths_at.get(k, 0) for k in range(K)], dtype=torch.int32, device=device)
    groups, positions = groups.to(torch.int32), order.to(torch.int32)
    codes = torch.empty(K, N, dtype=torch.uint8, device=device)
    errors, loss = torch.empty(limit, N, device=device), torch.zeros(N, device=device)
    for start, stop in blocks:
        if start in outside:
            end, group = outside[start]
            cost = factor.diagonal()[start:end] ** -2
            scales[group], zeros[group] = _group_params(columns[start:end], cost, spec, options)
        kernel.solve(
            columns, factor, groups, runs, positions, scales, zeros, codes, errors, loss,
            first=start, count=stop - start, maxq=spec.maxq, sym=spec.sym, **launch,
        )  # fmt: skip
        columns[stop:].addmm_(factor[start:stop, stop:].t(), errors[: stop - start], alpha=-1)
    return _Rounded(codes, storable(scales, scales.dtype), zeros, g_idx)


def _refined(
    columns: Tensor,
    H: Tensor,
    order: Tensor,
    factor: Tensor,
    damp: float,
    found: _Rounded,
    spec: QuantSpec,
    options: SolverOptions,
) -> _Rounded:
    """``options.refine`` rounds on columns (K, N), not permuted; order, factor and damp are those of the first walk.

    Once scales are given nothing ties the order to the groups: columns go by falling importance.
    """
    importance = torch.argsort(H.diagonal(), descending=True, stable=True)
    if not torch.equal(importance, order):
        order, (again, _) = importance, _inverse_factor(H[importance][:, importance], damp)
        if again is None:  # failed by rounding alone: what was found stays
            return found
        factor = again
    given = replace(options, static_groups=True)
    damped = H.double()
    damped.diagonal().add_(damp * damped.diagonal().mean())

    def walk(start: Tensor, factor: Tensor, grid: _Rounded) -> _Rounded:
        return _walk(start[order], factor, order, grid.g_idx, grid, spec, given)

    return refine(columns, damped, found, spec, order, factor, walk, options.refine)


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


def _group_params(rows: Tensor, cost: Tensor, spec: QuantSpec, options: SolverOptions) -> tuple[Tensor, Tensor]:
    """Scale as it will be stored, and zero point, of the (rows, N) of one group; cost of their errors, (rows,)."""
    if options.clip:
        return clipped_params(rows, cost, spec.maxq, spec.sym, options.scale_dtype)
    scale, zero = group_params(rows.t(), spec.maxq, spec.sym, options.mse)
    return storable(scale, options.scale_dtype), zero


def _round_to_nearest(columns: Tensor, cost: Tensor, spec: QuantSpec, options: SolverOptions) -> _Rounded:
    g_idx = trivial_g_idx(len(columns), spec.group_size, columns.device).long()
    length, N = spec.rows_per_group(len(columns)), columns.shape[1]
    # all whole groups at once, as rows of one matrix; clipping makes temporaries of that size, so one by one
    whole = 0 if options.mse or options.clip else len(columns) // length
    first = whole * length
    rest = zip(columns[first:].split(length), cost[first:].split(length), strict=True) if first < len(columns) else ()
    found = [tuple(t[None] for t in _group_params(rows, costs, spec, options)) for rows, costs in rest]
    if whole:
        rows = columns[:first].unflatten(0, (whole, length)).transpose(0, 1).flatten(1)
        scale, zero = _group_params(rows, cost[:length], spec, options)
        found.insert(0, (scale.view(whole, N), zero.view(whole, N)))
    scales, zeros = (torch.cat(values) for values in zip(*found, strict=True))
    codes = encode(columns, scales.float()[g_idx], zeros[g_idx], spec.maxq)
    return _Rounded(codes.to(torch.uint8), scales, zeros, g_idx)


def _pack(rounded: _Rounded, spec: QuantSpec, options: SolverOptions) -> PackedWeight:
    g_idx = rounded.g_idx.to(torch.int32)
    trivial = torch.equal(g_idx, trivial_g_idx(len(g_idx), spec.group_size, g_idx.device))
    return pack_weight(
        rounded.codes,
        rounded.scales,
        rounded.zeros,
        None if trivial else g_idx,
        spec,
        options.checkpoint_format or ("gptq" if spec.sym else "gptq_v2"),
    )


def _energy(columns: Tensor, H: Tensor) -> float:
    """tr(E^T H E)."""
    return float((H @ columns).mul_(columns).sum(dtype=torch.float64))


def _relative(error: float, size: float) -> float:
    return error / size if size > 0 else 0.0
