"""How a layer is solved."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class SolverOptions:
    """How a layer is solved.

    Args:
        damp: Added to the Hessian's diagonal, as a fraction of its mean; raised tenfold as often as
            the factorisation fails, up to 1.
        block: Columns between two updates of the rest of the weight.
        static_groups: Find scales on the original weights, before any column is rounded. With
            act-order this keeps groups in order (a trivial g_idx).
        group_aware: Without act-order, visit groups, and columns inside them, by falling importance; one that is
            shorter than the others comes last. Groups stay in order.
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
        fused: Round a block of columns, at most 128, in one kernel where the weight is on a GPU.

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
    fused: bool = True

    def __post_init__(self) -> None:
        if not 0 < self.damp <= 1:
            raise ValueError(f"damp must lie in (0, 1], got {self.damp}")
        if self.block < 1:
            raise ValueError(f"block must be at least 1, got {self.block}")
        check_refinement(self.mse, self.clip, self.refine, self.feedback)


def check_refinement(mse: bool, clip: bool, refine: int, feedback: float) -> None:
    """Refuse options that contradict each other.

    Raises:
        ValueError: mse and clip together, a negative number of rounds, or feedback outside [0, 1].
        TypeError: refine is not an integer, or feedback not a number.
    """
    if mse and clip:
        raise ValueError("mse and clip are two ways to choose a group's range: set one of them")
    if not isinstance(refine, int) or isinstance(refine, bool):
        raise TypeError(f"refine must be a number of rounds, got {refine!r}")
    if refine < 0:
        raise ValueError(f"refine must be at least 0, got {refine}")
    if not isinstance(feedback, (int, float)) or isinstance(feedback, bool):
        raise TypeError(f"feedback must be a number, got {feedback!r}")
    if not 0 <= feedback <= 1:
        raise ValueError(f"feedback must lie in [0, 1], got {feedback}")
