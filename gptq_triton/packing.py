"""Codes to int32 words and back, and the packed weight: pure torch, any device.

A word stream is plain least-significant-first: code ``j`` of a run of 32 occupies bits
``[bits * j, bits * (j + 1))`` of ``bits`` consecutive words. For 2, 4 and 8 bits no code crosses
a word; for 3 bits codes 10 and 21 do (AutoGPTQ's format).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .spec import BITS, QuantSpec

RUN = 32  # codes per run: the shortest stretch that fills whole words at every width

SCALE_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

# What `checkpoint_format` says a stored zero-point field holds, as z = (field + offset) & maxq.
ZERO_OFFSETS = {"gptq": 1, "gptq_v2": 0}


def words(length: int, bits: int) -> int:
    """Number of int32 words that hold ``length`` codes."""
    return -(-length * bits // 32)


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack codes along dimension 0.

    Args:
        codes: (L, C), any integer or floating dtype, integral values; clamped to [0, 2**bits - 1]
            so that no code can run into its neighbours.
        bits: 2, 3, 4 or 8.

    Returns:
        int32, (ceil(L * bits / 32), C); the fields past L are zero.

    Raises:
        ValueError: ``bits`` is not a supported width or ``codes`` is not a matrix.
    """
    _check(codes, bits, "codes")
    length, columns = codes.shape
    run, run_words = _run(bits)
    runs = -(-length // run)
    codes = codes.clamp(0, 2**bits - 1)
    if length % run:
        codes = torch.nn.functional.pad(codes, (0, 0, 0, runs * run - length))
    codes = codes.reshape(runs, run, columns)
    packed = torch.zeros(runs * run_words, columns, dtype=torch.int32, device=codes.device)
    out = packed.view(runs, run_words, columns)
    for j in range(run):
        word, shift = divmod(j * bits, 32)
        code = codes[:, j].to(torch.int32)
        out[:, word] |= code << shift
        if shift + bits > 32:
            out[:, word + 1] |= code >> (32 - shift)
    return packed if runs * run == length else packed[: words(length, bits)].clone()


def _run(bits: int) -> tuple[int, int]:
    """Codes of the shortest stretch that fills whole words, and these words."""
    codes = math.lcm(bits, 32) // bits
    return codes, codes * bits // 32


def unpack(packed: Tensor, bits: int, length: int) -> Tensor:
    """The exact inverse of :func:`pack`.

    Args:
        packed: int32, (ceil(length * bits / 32), C).
        bits: 2, 3, 4 or 8.
        length: Number of codes along dimension 0.

    Returns:
        uint8, (length, C).

    Raises:
        ValueError: ``bits``, the number of words or the dtype does not fit.
    """
    _check(packed, bits, "packed")
    if packed.dtype != torch.int32:
        raise ValueError(f"packed must be int32, got {packed.dtype}")
    if packed.shape[0] != words(length, bits):
        raise ValueError(
            f"packed has {packed.shape[0]} words, but {length} codes of {bits} bits take {words(length, bits)}"
        )
    run, run_words = _run(bits)
    runs, columns = -(-length // run), packed.shape[1]
    if packed.shape[0] % run_words:
        packed = torch.nn.functional.pad(packed, (0, 0, 0, runs * run_words - packed.shape[0]))
    packed = packed.reshape(runs, run_words, columns)
    out = torch.empty(runs, run, columns, dtype=torch.uint8, device=packed.device)
    for j in range(run):
        word, shift = divmod(j * bits, 32)
        here = min(bits, 32 - shift)
        # >> on int32 copies the sign: mask after the shift
        code = (packed[:, word] >> shift) & (2**here - 1)
        if here < bits:
            code |= (packed[:, word + 1] & (2 ** (bits - here) - 1)) << here
        out[:, j] = code
    return out.view(runs * run, columns)[:length]


def pack_zeros(zeros: Tensor, bits: int, checkpoint_format: str) -> Tensor:
    """Zero points (G, N) to the stored form, int32 (G, ceil(N * bits / 32)).

    v1 ("gptq") stores z - 1, wrapped inside its own field; v2 ("gptq_v2") stores z. The caller's
    tensor is never changed.
    """
    offset = zero_offset(checkpoint_format)
    fields = (zeros.to(torch.int32) - offset) & (2**bits - 1)
    return pack(fields.t(), bits).t().contiguous()


def unpack_zeros(qzeros: Tensor, bits: int, N: int, checkpoint_format: str) -> Tensor:
    """Stored zero points to uint8 (G, N), each in [0, 2**bits - 1]."""
    fields = unpack(qzeros.t(), bits, N).t().to(torch.int32)
    return ((fields + zero_offset(checkpoint_format)) & (2**bits - 1)).to(torch.uint8)


def zero_offset(checkpoint_format: str) -> int:
    """What to add to a stored zero-point field: 1 for v1 ("gptq"), 0 for v2 ("gptq_v2")."""
    if checkpoint_format not in ZERO_OFFSETS:
        raise ValueError(f"checkpoint_format must be one of {tuple(ZERO_OFFSETS)}, got {checkpoint_format!r}")
    return ZERO_OFFSETS[checkpoint_format]


def trivial_g_idx(K: int, group_size: int, device: torch.device | str | None = None) -> Tensor:
    """int32 (K,): row k belongs to group k // group_size (-1: one group)."""
    rows = QuantSpec(8, group_size).rows_per_group(K)
    places = torch.arange(K, dtype=torch.int32, device=device)
    return places if places.is_meta else places // rows  # there, a division takes a millisecond


@dataclass(frozen=True, eq=False)
class PackedWeight:
    """One weight in checkpoint form, as kernels read it.

    Attributes:
        qweight: int32 (ceil(K * bits / 32), N), codes packed along K.
        scales: Floating (G, N).
        qzeros: int32 (G, ceil(N * bits / 32)), zero points packed along N.
        g_idx: int32 (K,), or None when row k belongs to group k // group_size.
        spec: The mathematics.
        K: In-features.
        checkpoint_format: "gptq" (fields hold z - 1) or "gptq_v2" (fields hold z).
    """

    qweight: Tensor
    scales: Tensor
    qzeros: Tensor
    g_idx: Tensor | None
    spec: QuantSpec
    K: int
    checkpoint_format: str = "gptq"

    @property
    def N(self) -> int:  # noqa: N802 - the name used everywhere
        """Out-features."""
        return self.qweight.shape[1]

    @property
    def zero_offset(self) -> int:
        """What to add to a stored zero-point field."""
        return zero_offset(self.checkpoint_format)

    def validate(self) -> PackedWeight:
        """Check every shape, dtype and index once, so that no kernel has to.

        Raises:
            ValueError: A tensor does not have the shape, dtype, device or range it must have.
        """
        if self.qweight.dim() != 2:
            raise ValueError(f"qweight must be a matrix, got shape {tuple(self.qweight.shape)}")
        spec, K, N, G = self.spec, self.K, self.N, self.spec.groups(self.K)
        zero_offset(self.checkpoint_format)
        _expect("qweight", self.qweight, (torch.int32,), (words(K, spec.bits), N))
        _expect("scales", self.scales, SCALE_DTYPES, (G, N))
        _expect("qzeros", self.qzeros, (torch.int32,), (G, words(N, spec.bits)))
        if self.g_idx is not None:
            check_g_idx(self.g_idx, K, G)
        return self


def pack_weight(
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor,
    g_idx: Tensor | None,
    spec: QuantSpec,
    checkpoint_format: str = "gptq",
) -> PackedWeight:
    """Pack codes and group parameters into one weight.

    Args:
        codes: (K, N), integral.
        scales: (G, N), float16, bfloat16, float32 or float64.
        zeros: (G, N), integral, in [0, spec.maxq].
        g_idx: int32 (K,), or None when row k belongs to group k // group_size.
        spec: The mathematics.
        checkpoint_format: How zero points are stored.

    Raises:
        ValueError: A shape, dtype or range does not fit.
    """
    if zeros.numel() and not bool(((zeros >= 0) & (zeros <= spec.maxq) & (zeros == zeros.round())).all()):
        raise ValueError(f"zeros must be integers in [0, {spec.maxq}] for {spec.bits} bits")
    return PackedWeight(
        qweight=pack(codes, spec.bits),
        scales=scales.contiguous(),
        qzeros=pack_zeros(zeros, spec.bits, checkpoint_format),
        g_idx=g_idx,
        spec=spec,
        K=codes.shape[0],
        checkpoint_format=checkpoint_format,
    ).validate()


def symmetric_format(weight: PackedWeight) -> str | None:
    """The format that the tensors of a symmetric weight prove, whatever their label says.

    Symmetric zero points are all ``2**(bits - 1)``: v2 stores that value, v1 one less.

    Returns:
        "gptq", "gptq_v2", or None when the zero points are not symmetric.
    """
    stored = unpack_zeros(weight.qzeros, weight.spec.bits, weight.N, "gptq_v2")
    if stored.numel() == 0 or bool((stored != stored.flatten()[0]).any()):
        return None
    middle = 2 ** (weight.spec.bits - 1)
    return {middle: "gptq_v2", middle - 1: "gptq"}.get(int(stored.flatten()[0]))


def storable(scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Scales as a checkpoint can hold them: rounded to dtype, never below its smallest normal number.

    Raises:
        ValueError: A scale is not finite in dtype.
    """
    stored = scales.to(dtype).clamp(min=torch.finfo(dtype).tiny)
    if not bool(torch.isfinite(stored).all()):
        raise ValueError(f"scales must be finite in {dtype}, got up to {float(scales.abs().max())}")
    return stored


def check_g_idx(g_idx: Tensor, K: int, G: int) -> None:
    """Refuse a g_idx that would read outside scales and qzeros.

    Raises:
        ValueError: Wrong dtype, length or range (negatives too).
    """
    _expect("g_idx", g_idx, (torch.int32,), (K,))
    if K and not g_idx.is_meta:
        low, high = (int(v) for v in g_idx.aminmax())
        if low < 0 or high >= G:
            raise ValueError(f"g_idx must lie in [0, {G - 1}] for {G} groups, got values in [{low}, {high}]")


def _expect(name: str, tensor: Tensor, dtypes: tuple[torch.dtype, ...], shape: tuple[int, ...]) -> None:
    if tensor.dtype not in dtypes:
        raise ValueError(f"{name} must be {' or '.join(map(str, dtypes))}, got {tensor.dtype}")
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} must have shape {shape}, got {tuple(tensor.shape)}")


def _check(matrix: Tensor, bits: int, name: str) -> None:
    if bits not in BITS:
        raise ValueError(f"bits must be one of {BITS}, got {bits}")
    if matrix.dim() != 2:
        raise ValueError(f"{name} must be a matrix, got shape {tuple(matrix.shape)}")
