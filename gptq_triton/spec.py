"""QuantSpec: what a quantized weight means, free of format, device and tensors."""

from __future__ import annotations

from dataclasses import dataclass

BITS = (2, 3, 4, 8)


@dataclass(frozen=True)
class QuantSpec:
    """The mathematics of one quantized weight.

    ``W[k, n] = scales[g[k], n] * (codes[k, n] - zeros[g[k], n])`` with codes and zeros in
    ``[0, maxq]`` and ``g[k]`` the group of input row ``k``.

    Args:
        bits: Width of a code: 2, 3, 4 or 8.
        group_size: Input rows that share a scale and a zero point; -1 means all of them.
        sym: Every zero point is ``2**(bits - 1)``.
        desc_act: Rows were assigned to groups by activation order, so ``g`` must be stored.

    Raises:
        ValueError: A field is outside its domain.
        TypeError: ``bits`` or ``group_size`` is not an int.
    """

    bits: int
    group_size: int = 128
    sym: bool = True
    desc_act: bool = False

    def __post_init__(self) -> None:
        for field in ("bits", "group_size"):
            value = getattr(self, field)
            if not isinstance(value, int) or isinstance(value, bool):
                raise TypeError(f"{field} must be an int, got {value!r}")
        if self.bits not in BITS:
            raise ValueError(f"bits must be one of {BITS}, got {self.bits}")
        if self.group_size != -1 and self.group_size < 1:
            raise ValueError(f"group_size must be -1 or at least 1, got {self.group_size}")

    @property
    def maxq(self) -> int:
        """The largest code."""
        return 2**self.bits - 1

    def rows_per_group(self, K: int) -> int:
        """Rows in a full group of a weight with ``K`` input rows."""
        return max(K, 1) if self.group_size == -1 else self.group_size

    def groups(self, K: int) -> int:
        """``G``, the number of groups of a weight with ``K`` input rows (the last may be short)."""
        return -(-K // self.rows_per_group(K))
