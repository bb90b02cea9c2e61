"""GPTQ for one layer: the Hessian of its inputs, an order of its columns, the walk that rounds them, what came out.

Source: Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained
Transformers" (2022), algorithm 1. Group-aware reordering: Gafni et al. (2025), as GPTQModel's
``act_group_aware``.
"""

from __future__ import annotations

import itertools
import logging
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from .aside import Aside
from .halves import has_tensor_cores
from .hessian import Factor, Hessian, attempt, energy, factorize
from .layers import weight_of
from .options import SolverOptions
from .packing import PackedWeight, pack, pack_zeros, storable, trivial_g_idx
from .quantizer import encode
from .refinement import Members, Rounded, refine, spans_of
from .spec import QuantSpec
from .walk import find_groups, group_lengths, stored, walk

logger = logging.getLogger(__name__)


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
    names, needed = ", ".join(weights), needed_tokens(len(hessian.sum), options)
    for name, weight in weights.items():
        if weight.shape[1] != len(hessian.sum):
            raise ValueError(f"{name}: the Hessian has {len(hessian.sum)} inputs, the weight {weight.shape[1]}")
    if method == "gptq" and hessian.tokens < needed:
        logger.warning("%s: saw %d tokens, needs %d; rounded to nearest", names, hessian.tokens, needed)
        method = "rtn"
    while True:
        trial = try_to_solve(weights, hessian, spec, options, method)
        found = solutions(list(weights), trial, hessian.tokens, spec, options)
        if found is not None:
            return found
        if options.damp < 1:
            options = replace(options, damp=min(10 * options.damp, 1.0))
        else:
            logger.warning("%s: the Hessian cannot be factored even with damping 1; rounded to nearest", names)
            method = "rtn"


@dataclass(frozen=True, eq=False)
class Trial:
    """What becomes of layers that share an input, with one damping; a GPU may still be at work on it.

    Attributes:
        finite: Whether each weight and the Hessian are, bool (layers + 1,). If not, the rest may be anything.
        factored: Whether the Hessian could be, or need not be, bool (). If not, likewise.
        method: How codes were chosen.
        chosen: The layers side by side.
        words: Their codes, packed.
        dequantized: What their codes stand for, float32 (K, N).
        figures: ``tr(W H W^T)``, ``tr(E H E^T)`` and the latter of the nearest codes, float64 (3, layers).
        widths: N of each layer.
    """

    finite: Tensor
    factored: Tensor
    method: Literal["gptq", "rtn"]
    chosen: Rounded
    words: Tensor
    dequantized: Tensor
    figures: Tensor
    widths: list[int]


def try_to_solve(
    weights: dict[str, Tensor],
    hessian: Hessian,
    spec: QuantSpec,
    options: SolverOptions,
    method: Literal["gptq", "rtn"],
) -> Trial:
    """`solve` with the damping of the options; a GPU is not waited for.

    Raises:
        ValueError: On a CPU, a weight or the Hessian is not finite, or a scale cannot be stored.
    """
    H, widths = hessian.sum, [len(weight) for weight in weights.values()]
    finite = torch.stack([_finite(tensor) for tensor in (*weights.values(), H)])
    factored = torch.ones((), dtype=torch.bool, device=H.device)
    if not H.is_cuda:
        _check_finite(finite, list(weights))
    target = torch.empty(len(H), sum(widths), device=H.device)  # (K, N)
    for part, weight in zip(target.split(widths, dim=1), weights.values(), strict=True):
        part.copy_(weight.t())
    order, g_idx = _order(H.diagonal(), spec, options)

    def energies(columns: Tensor) -> Tensor:
        """Of each layer's share."""
        return torch.stack([energy(part, H) for part in columns.split(widths, dim=1)])

    def before() -> tuple[Rounded, Tensor, Tensor]:
        """The nearest codes, the energies of what is rounded and of their errors."""
        nearest = round_to_nearest(target, H.diagonal(), spec, options)
        return nearest, energies(target), energies(target - nearest.dequantize())

    aside, factor, loss = Aside(H.device, "nearest"), None, None
    if method == "gptq":
        factor, failed = attempt(H, order, options.damp)
        factored = failed == 0
    chosen, size, error_rtn = aside.run(before)  # a GPU has little to do while it factors a matrix
    error = error_rtn
    aside.join()
    if factor is not None and (H.is_cuda or bool(factored)):
        if options.feedback and hessian.drift is not None:
            pull = (hessian.drift @ target)[order].mul_(options.feedback)
            target = target.index_add(0, order, factor.divide(pull))
            size, error_rtn = energies(target), energies(target - chosen.dequantize())
        chosen, loss = walk(target[order], factor, order, replace(chosen, g_idx=g_idx), spec, options)
        if options.refine:
            chosen, loss = _refined(target, H, order, factor, chosen, spec, options)
    dequantized = chosen.dequantize()
    if loss is not None:  # that under the damped Hessian
        squares = torch.linalg.vector_norm(target - dequantized, dim=0).double().square_()
        loss = (loss.double() - squares * _ridge(H, options.damp)).clamp_(min=0)
        error = torch.stack([part.sum() for part in loss.split(widths)])
    figures = torch.stack([size, error, error_rtn])
    return Trial(finite, factored, method, chosen, pack(chosen.codes, spec.bits), dequantized, figures, widths)


def solutions(
    names: list[str], trial: Trial, tokens: int, spec: QuantSpec, options: SolverOptions
) -> dict[str, Solution] | None:
    """What a trial came to, layer by layer; None if it could not factor the Hessian. A GPU is waited for.

    Raises:
        ValueError: A weight, the Hessian or a scale is not finite.
    """
    _check_finite(trial.finite, names)
    if not bool(trial.factored):
        return None
    scales, g_idx = storable(trial.chosen.scales, options.scale_dtype), trial.chosen.g_idx.to(torch.int32)
    trivial = torch.equal(g_idx, trivial_g_idx(len(g_idx), spec.group_size, g_idx.device))
    label = options.checkpoint_format or ("gptq" if spec.sym else "gptq_v2")
    ends = list(itertools.accumulate(trial.widths))
    found = {}
    for name, width, end, figures in zip(names, trial.widths, ends, trial.figures.t().tolist(), strict=True):
        here, (size, error, error_rtn) = slice(end - width, end), figures
        packed = PackedWeight(
            qweight=trial.words[:, here].contiguous(),
            scales=scales[:, here].contiguous(),
            qzeros=pack_zeros(trial.chosen.zeros[:, here], spec.bits, label),
            g_idx=None if trivial else g_idx.clone(),  # each layer's own, or none could be saved
            spec=spec,
            K=len(g_idx),
            checkpoint_format=label,
        )
        found[name] = Solution(
            weight=packed.validate(),
            dequantized=trial.dequantized[:, here].t(),
            method=trial.method,
            error=_relative(error, size),
            error_rtn=_relative(error_rtn, size),
            damp=options.damp,
            tokens=tokens,
        )
    return found


def _finite(tensor: Tensor) -> Tensor:
    """Whether all elements are, bool (), in one pass."""
    return torch.isfinite(torch.stack(torch.aminmax(tensor))).all()


def _check_finite(finite: Tensor, names: list[str]) -> None:
    """Of weights by these names and of their inputs."""
    *weights, inputs = finite.tolist()
    for name, each in zip(names, weights, strict=True):
        if not each:
            raise ValueError(f"{name}: the weight must be finite, got NaN or infinity")
    if not inputs:
        raise ValueError(f"{', '.join(names)}: the inputs seen must be finite, got NaN or infinity")


def _ridge(H: Tensor, damp: float) -> Tensor:
    """What damping adds to each element of H's diagonal, float64 ()."""
    return damp * H.diagonal().double().mean()


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
    if hessian is None or hessian.tokens < needed_tokens(len(columns), options):
        return codes, "rtn"
    order = torch.argsort(hessian.sum.diagonal(), descending=True, stable=True)
    factor, _ = factorize(hessian.sum, order, options.damp)
    if factor is None:
        return codes, "rtn"
    given = replace(options, static_groups=True)
    return walk(columns[order], factor, order, Rounded(codes, scales, zeros, rows), spec, given)[0].codes, "gptq"


def needed_tokens(K: int, options: SolverOptions) -> int:
    """Tokens below which a layer of K inputs is rounded to nearest."""
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
    if K % spec.rows_per_group(K):
        peaks[-1] = -1  # the short group stays last
    rank = torch.argsort(torch.argsort(peaks, descending=True, stable=True))  # of each group
    order = torch.argsort(importance, descending=True, stable=True)
    return order[torch.argsort(rank[g_idx[order]], stable=True)], g_idx


def _refined(
    columns: Tensor,
    H: Tensor,
    order: Tensor,
    factor: Factor,
    found: Rounded,
    spec: QuantSpec,
    options: SolverOptions,
) -> tuple[Rounded, Tensor]:
    """``options.refine`` rounds on columns (K, N), not permuted; order and factor are those of the first walk.

    Once scales are given nothing ties the order to the groups: columns go by falling importance.

    Returns:
        What it becomes, and the loss of each output under the damped Hessian, float64 (N,).
    """
    given = replace(options, static_groups=True)
    if not (spec.desc_act or (options.group_aware and spec.groups(len(H)) == 1)):
        order = torch.argsort(H.diagonal(), descending=True, stable=True)
        factor, _ = attempt(H, order, options.damp)  # should rounding fail it, what it gives loses against all else
    # halves are exact to float32, other products take what they are given
    damped = H.clone() if has_tensor_cores(H) else H.double()
    damped.diagonal().add_(_ridge(H, options.damp))
    ordered = columns[order]
    by_group = found.g_idx.argsort(stable=True) if spec.desc_act and not options.static_groups else None
    spans = [(group, *span) for group, span in enumerate(spans_of(group_lengths(len(H), spec)))]

    def again_from(factor: Factor, grid: Rounded, moved: Tensor | None) -> Rounded:
        return walk(ordered, factor, order, grid, spec, given, moved)[0]

    return refine(
        columns, damped, found, spec, order, factor, again_from, options.refine,
        members=Members(by_group, spans), fused=options.fused,
    )  # fmt: skip


def round_to_nearest(columns: Tensor, cost: Tensor, spec: QuantSpec, options: SolverOptions) -> Rounded:
    """Every number of columns (K, N) to the nearest code, with the grids that the options ask for; cost (K,) weighs."""
    K, N = columns.shape
    g_idx = trivial_g_idx(K, spec.group_size, columns.device).long()
    length = spec.rows_per_group(K)
    scales = torch.empty(spec.groups(K), N, dtype=options.scale_dtype, device=columns.device)
    zeros = torch.empty(scales.shape, device=columns.device)
    # all whole groups at once, as rows of one matrix; a search makes temporaries of that size
    whole = 0 if options.mse or options.clip else K // length
    if whole:
        rows = columns[: whole * length].unflatten(0, (whole, length)).transpose(0, 1).flatten(1)
        found = scales[:whole].view(1, -1), zeros[:whole].view(1, -1)
        find_groups(rows, cost[:length], length, spec, options, *found)
    if whole < len(scales):
        first = whole * length
        find_groups(columns[first:], cost[first:], length, spec, options, scales[whole:], zeros[whole:])
    scales = stored(scales, scales.dtype)
    codes = encode(columns, scales.float()[g_idx], zeros[g_idx], spec.maxq)
    return Rounded(codes.to(torch.uint8), scales, zeros, g_idx)


def _relative(error: float, size: float) -> float:
    return error / size if size > 0 else 0.0
