"""What is measured: one product with one quantized weight; the best time a machine allows it; the suites."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from shapes import MODELS, Shape, layers, shapes

DECODE_ROWS = (1, 2, 4, 8, 16, 32, 64)
PREFILL_ROWS = (64, 96, 128, 192, 256, 512, 1024, 2048, 4096, 8192)
VARIANT_ROWS = (1, 4, 16, 64, 256, 1024, 4096)
VARIANT_SHAPES = (Shape(4096, 4096), Shape(8192, 28672))
WIDTHS = (4, 8, 3, 2)  # the width most people use first, should time run out


@dataclass(frozen=True)
class Case:
    """One product.

    Attributes:
        op: "matmul" (x @ W) or "matmul_transposed" (dy @ W.T), as in ``gptq_triton.ops``.
        M, N, K: Rows, out-features, in-features.
        bits, group_size, sym: Of the weight.
        act_order: Rows of the weight belong to groups in random order.
        dtype: Of activations: "float16" or "bfloat16".
    """

    op: str
    M: int
    N: int
    K: int
    bits: int
    group_size: int = 128
    sym: bool = False
    act_order: bool = False
    dtype: str = "float16"

    @property
    def weight(self) -> Case:
        """What cases of one weight have in common: the case with M = 0."""
        return replace(self, M=0)

    @property
    def flops(self) -> int:
        """Of the product, a multiplication and an addition counted as two."""
        return 2 * self.M * self.N * self.K

    def nbytes(self, dense: bool = False) -> int:
        """What must be moved once: codes, a scale and a zero point in 4 bytes, x and y in 16 bits each.

        Args:
            dense: The weight is held in 16 bits.
        """
        return self.weight_nbytes(dense) + 2 * self.M * (self.K + self.N)

    def weight_nbytes(self, dense: bool = False) -> int:
        """Of the weight alone."""
        if dense:
            return 2 * self.N * self.K
        groups = 1 if self.group_size == -1 else -(-self.K // self.group_size)
        return self.N * self.K * self.bits // 8 + groups * self.N * 4


@dataclass(frozen=True)
class Ceilings:
    """What the machine did best in the same process.

    Attributes:
        read_gbps: A kernel that only reads, in 10**9 bytes per second.
        tflops: dtype to cuBLAS at 8192 x 8192 x 8192.
    """

    read_gbps: float
    tflops: dict[str, float]

    def floor_us(self, case: Case, dense: bool = False) -> float:
        """The larger of the time to move the bytes and the time to do the sums."""
        return max(case.nbytes(dense) / self.read_gbps / 1e3, case.flops / self.tflops[case.dtype] / 1e6)


def products(op: str, rows: Iterable[int]) -> list[Case]:
    """Every width, shape and M, groups of 128 with zero points."""
    rows = tuple(rows)
    return [Case(op, M, *shape, bits) for bits in WIDTHS for shape in shapes() for M in rows]


def variants() -> list[Case]:
    """Dtype, act-order and group size, each against the plain case, on two shapes."""
    changes: list[dict] = [{}, {"dtype": "bfloat16"}, {"act_order": True}, *({"group_size": g} for g in (32, 64, -1))]
    return [
        Case("matmul", M, *shape, bits, **change)
        for bits in WIDTHS
        for shape in VARIANT_SHAPES
        for change in changes
        for M in VARIANT_ROWS
    ]


SUITES: dict[str, Callable[[], list[Case]]] = {
    "decode": lambda: products("matmul", DECODE_ROWS),
    "prefill": lambda: products("matmul", PREFILL_ROWS),
    "backward": lambda: products("matmul_transposed", PREFILL_ROWS),
    "variants": variants,
}

_FIELDS: dict[str, Callable[[Case], str]] = {
    "shape": lambda case: f"{case.N}x{case.K}",
    "m": lambda case: str(case.M),
    "bits": lambda case: str(case.bits),
    "group": lambda case: str(case.group_size),
    "dtype": lambda case: case.dtype,
    "act_order": lambda case: str(case.act_order).lower(),
}


def only(cases: list[Case], filters: Iterable[str]) -> list[Case]:
    """The cases that every filter lets through.

    Args:
        cases: To choose from.
        filters: "key=value,value", with key one of model, shape, m, bits, group, dtype, act_order.

    Raises:
        ValueError: A filter's key or model is unknown.
    """
    for text in filters:
        key, _, values = text.partition("=")
        wanted = set(values.split(","))
        if key == "model":
            if wanted - MODELS.keys():
                raise ValueError(f"model must be one of {', '.join(MODELS)}, got {values}")
            chosen = {shape for model in wanted for shape in layers(model).values()}
            cases = [case for case in cases if (case.N, case.K) in chosen]
        elif key in _FIELDS:
            cases = [case for case in cases if _FIELDS[key](case) in wanted]
        else:
            raise ValueError(f"a filter must start with model or one of {', '.join(_FIELDS)}, got {text!r}")
    return cases
