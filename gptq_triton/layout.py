"""Checkpoint words <-> kernel tiles: the same codes in the order in which tensor cores want them. Pure torch.

Rows n of a weight come in *strips* of 16, columns k in *steps* of 128. Lane ``4 g + t`` of a warp keeps, of one strip
and one step, 64 codes in 16 *registers* of four bytes: byte ``i`` of register ``(s, hb, r8)`` is the code of

    row n = 16 strip + 8 r8 + g          column k = 128 step + 32 s + 16 hb + 2 t + (0, 8, 1, 9)[i]

which is the A operand of ``mma.m16n8k32`` over bytes (with the columns of x in the same order) and, bytes 0 and 2 or
1 and 3 of a register taken as two halves, that of ``mma.m16n8k16`` over halves (with x in its natural order). At 8 bits
a stored word is a register. Below, several registers share a word, as bit fields of the same bytes. The fields of
``r8 = 1`` always lie higher by the same number of bits, so that a mask alone yields codes of rows n and codes of rows
n + 8 times a power of two:

| bits | words of a lane, strip and step | a byte, least significant bit first                        |
|------|---------------------------------|------------------------------------------------------------|
| 8    | 16: [s][hb][r8]                 | the code                                                   |
| 4    | 8: [s][hb]                      | r8 = 0, r8 = 1                                             |
| 2    | 4: [s % 2][hb]                  | r8 = 0, r8 = 1 of s < 2, then r8 = 0, r8 = 1 of s >= 2     |
| 3    | 6: [s // 2] A, B; [s // 2] C    | see `_pack3`                                               |

A lane's words follow each other in fours (3 bits: four, then two), one vector load each:
``[N / 16][K / 128][vector][32 lanes][4]``. Exactly ``bits`` bits a weight, whatever the width.

Groups are whole numbers of *subgroups* of 32 columns. Where they are not (act-order, odd group sizes), columns are
sorted by group and every group is padded; ``order`` says which column of x goes where.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor

from .packing import PackedWeight, pack_weight, unpack, unpack_zeros
from .spec import QuantSpec

STRIP = 16  # rows of a strip
STEP = 128  # columns of a step
ONE_GROUP = 1 << 30  # `group_columns` of a weight whose columns all share a group


@dataclass(frozen=True, eq=False)
class TiledWeight:
    """One weight in kernel tiles.

    Attributes:
        words: int32 (strips, steps, 64 * bits): strips = ceil(N / 16), steps = ceil(columns / 128).
        meta: int32 (groups of columns, strips * 16), scale bits above the zero point, rows g and g + 8 of a strip
            adjacent; where scales have 32 bits, the zero point alone. All groups of the last step are there.
        scales: float32 (groups of columns, strips * 16) in the order of ``meta``, or None when they fit into it.
        order: int32 (steps * 128,), which column of x is multiplied by each column of the tiles, -1 for padding; None
            when it is the identity.
        group_columns: Columns of the tiles that share a scale: 32, 64, a multiple of 128, or `ONE_GROUP`.
        spec: The mathematics.
        K: In-features.
        N: Out-features.
        dtype: Of the checkpoint's scales.
        checkpoint_format: How the checkpoint stores zero points.
        launches: Products with this weight that are ready to be launched (`product.py`'s own).
    """

    words: Tensor
    meta: Tensor
    scales: Tensor | None
    order: Tensor | None
    group_columns: int
    spec: QuantSpec
    K: int
    N: int
    dtype: torch.dtype
    checkpoint_format: str = "gptq"
    launches: dict[Any, Any] = field(default_factory=dict, init=False, repr=False)

    def __getstate__(self) -> dict[str, Any]:
        """What a copy has, or a pickle: nothing that was compiled."""
        return self.__dict__ | {"launches": {}}

    @property
    def strips(self) -> int:
        """Strips of 16 rows."""
        return self.words.shape[0]

    @property
    def steps(self) -> int:
        """Steps of 128 columns."""
        return self.words.shape[1]

    def inverse_order(self) -> Tensor:
        """int64 (K,), which column of the tiles belongs to each column of x; only where there is an order."""
        order = cast(Tensor, self.order).long()
        inverse = torch.empty(self.K + 1, dtype=torch.int64, device=order.device)
        places = torch.where(order < 0, self.K, order)  # padding goes to a place beyond the last
        return inverse.scatter_(0, places, torch.arange(len(order), device=order.device))[: self.K]


def tile_weight(weight: PackedWeight) -> TiledWeight:
    """A checkpoint weight in kernel tiles, on its device; no reference to its tensors is kept.

    Args:
        weight: A valid packed weight; its scales are float16, bfloat16 or float32 (float64 is rounded, so refused).

    Raises:
        TypeError: The scales are float64.
    """
    spec, K, N = weight.spec, weight.K, weight.N
    if weight.scales.dtype == torch.float64:
        raise TypeError("scales must be float16, bfloat16 or float32 to be tiled, got torch.float64")
    codes = unpack(weight.qweight, spec.bits, K)
    zeros = unpack_zeros(weight.qzeros, spec.bits, N, weight.checkpoint_format)
    order, rows, group_columns = _arrange(weight.g_idx, spec, K, weight.qweight.device)
    scales = weight.scales
    if order is not None:
        codes = torch.nn.functional.pad(codes, (0, 0, 0, 1))[order]  # -1 is the row of padding
        order = order.to(torch.int32)
    if rows is not None:
        scales, zeros = scales[rows], zeros[rows]
    missing = -len(scales) % max(1, STEP // group_columns)  # every step has all its rows of meta
    if missing:
        scales, zeros = (torch.cat((t, t[-1:].expand(missing, -1))) for t in (scales, zeros))
    strips = -(-N // STRIP)
    pad_n = strips * STRIP - N
    codes = torch.nn.functional.pad(codes, (0, pad_n, 0, -codes.shape[0] % STEP))
    meta, wide = pack_meta(torch.nn.functional.pad(scales, (0, pad_n)), torch.nn.functional.pad(zeros, (0, pad_n)))
    return TiledWeight(
        tile(codes, spec.bits), meta, wide, order, group_columns, spec, K, N, scales.dtype, weight.checkpoint_format
    )


def untile_weight(weight: TiledWeight, g_idx: Tensor | None) -> PackedWeight:
    """The exact inverse of :func:`tile_weight`.

    Args:
        weight: The tiles.
        g_idx: int32 (K,), the packed weight's, or None when it had none.
    """
    spec, K, N = weight.spec, weight.K, weight.N
    codes = untile(weight.words, spec.bits)[:, :N]
    scales, zeros = unpack_meta(weight.meta, weight.scales, weight.dtype)
    scales, zeros = scales[:, :N], zeros[:, :N]
    order, rows, _ = _arrange(g_idx, spec, K, weight.words.device)
    if order is not None:
        real = order >= 0
        codes = torch.empty_like(codes[:K]).index_copy_(0, order[real], codes[: len(order)][real])
    if rows is None:
        scales, zeros = scales[: spec.groups(K)], zeros[: spec.groups(K)]
    else:
        # a group may have several equal rows of meta: any of them
        G = spec.groups(K)
        last = torch.full((G,), -1, dtype=torch.int64, device=rows.device)
        last[rows] = torch.arange(len(rows), device=rows.device)
        scales, zeros = scales[last], zeros[last]
    return pack_weight(codes[:K], scales, zeros, g_idx, spec, weight.checkpoint_format)


def dequantize_tiles(weight: TiledWeight, dtype: torch.dtype | None = None) -> Tensor:
    """The weight as floats, (K, N): as `reference.dequantize`, from tiles."""
    dtype = dtype or weight.dtype
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    codes = untile(weight.words, weight.spec.bits)
    scales, zeros = unpack_meta(weight.meta, weight.scales, weight.dtype)
    group = torch.arange(len(codes), device=codes.device) // weight.group_columns
    floats = (codes.to(wide) - zeros.to(wide)[group]).mul_(scales.to(wide)[group])
    if weight.order is not None:
        real = weight.order >= 0
        floats = torch.empty_like(floats[: weight.K]).index_copy_(0, weight.order[real].long(), floats[real])
    return floats[: weight.K, : weight.N].to(dtype)


def _arrange(
    g_idx: Tensor | None, spec: QuantSpec, K: int, device: torch.device
) -> tuple[Tensor | None, Tensor | None, int]:
    """How columns meet groups in the tiles.

    Returns:
        order: int64, the column of the checkpoint for each of the tiles, -1 for padding; None for the identity.
        rows: int64, the checkpoint's group for each row of meta; None for the identity.
        group_columns: As in TiledWeight.
    """
    size = spec.rows_per_group(K)
    groups = spec.groups(K)
    if groups == 1 and g_idx is None:
        return None, None, ONE_GROUP
    if g_idx is None and (size in (32, 64) or size % STEP == 0):
        return None, None, size
    group = torch.arange(K, device=device) // size if g_idx is None else g_idx.long()
    counts = torch.bincount(group, minlength=groups)
    largest = int(counts.max())
    # one row of meta per group where groups are about equal; otherwise one per subgroup of 32 columns
    columns = next((c for c in (32, 64) if largest <= c), -(-largest // STEP) * STEP)
    pieces = torch.ones_like(counts) if columns * groups <= 2 * K else (-(-counts // 32)).clamp(min=1)
    columns = columns if columns * groups <= 2 * K else 32
    rows = torch.repeat_interleave(torch.arange(groups, device=device), pieces)
    total = -(-len(rows) * columns // STEP) * STEP
    if total > len(rows) * columns:  # the last step ends with padding; its meta is never multiplied by anything but 0
        rows = torch.cat((rows, rows[-1:].expand((total - len(rows) * columns) // columns)))
    by_group = torch.argsort(group, stable=True)
    starts = torch.cumsum(pieces, 0) - pieces  # in pieces
    within = torch.arange(K, device=device) - (torch.cumsum(counts, 0) - counts)[group[by_group]]
    order = torch.full((total,), -1, dtype=torch.int64, device=device)
    order[starts[group[by_group]] * columns + within] = by_group
    if len(rows) == groups and pieces.eq(1).all():
        rows = None
    return order, rows, columns


def tile(codes: Tensor, bits: int) -> Tensor:
    """Codes (K, N), uint8, K a multiple of 128 and N of 16, to words, int32 (N / 16, K / 128, 64 * bits)."""
    K, N = codes.shape
    if K % STEP or N % STRIP:
        raise ValueError(f"codes must have a multiple of {STEP} rows and of {STRIP} columns, got {(K, N)}")
    # strip r8 g, step s hb i1 t i0 -> strip step s g t hb r8 i0 i1: byte i = 2 i0 + i1 is column 2 t + i0 + 8 i1
    f = codes.t().reshape(N // 16, 2, 8, K // STEP, 4, 2, 2, 4, 2).permute(0, 3, 4, 2, 7, 5, 1, 8, 6)
    if bits == 8:
        out = f
    elif bits == 4:
        out = (f[..., 0, :, :] | f[..., 1, :, :] << 4).unflatten(2, (2, 2)).permute(0, 1, 2, 4, 5, 3, 6, 7, 8)
    elif bits == 2:
        low, high = f[:, :, :2], f[:, :, 2:]
        out = low[..., 0, :, :] | low[..., 1, :, :] << 2 | high[..., 0, :, :] << 4 | high[..., 1, :, :] << 6
        out = out.permute(0, 1, 3, 4, 2, 5, 6, 7)
    else:
        return _pack3(f)
    return out.reshape(N // 16, K // STEP, 256 * bits).view(torch.int32)


def untile(words: Tensor, bits: int) -> Tensor:
    """The exact inverse of :func:`tile`: codes, uint8 (K, N)."""
    strips, steps = words.shape[:2]
    w = words.contiguous().view(torch.uint8)
    if bits == 8:
        f = w.view(strips, steps, 4, 8, 4, 2, 2, 2, 2)
    elif bits == 4:
        w = w.view(strips, steps, 2, 8, 4, 2, 2, 1, 2, 2).permute(0, 1, 2, 5, 3, 4, 6, 7, 8, 9)
        f = torch.cat((w & 15, w >> 4), 7).flatten(2, 3)
    elif bits == 2:
        w = w.view(strips, steps, 8, 4, 2, 2, 1, 2, 2).permute(0, 1, 4, 2, 3, 5, 6, 7, 8)
        f = torch.cat([torch.cat((w >> shift & 3, w >> shift + 2 & 3), 6) for shift in (0, 4)], 2)
    else:
        f = _unpack3(words)
    return f.permute(0, 6, 3, 1, 2, 5, 8, 4, 7).reshape(strips * 16, steps * STEP).t().contiguous()


def _pack3(f: Tensor) -> Tensor:
    """Three bits: the eight registers r = 4 (s % 2) + 2 hb + r8 of two s share three words, byte by byte.

    A = r0 | r1 << 3 | (r6 >> 1) << 6
    B = r2 | r3 << 3 | (r7 >> 1) << 6
    C = r4 | r5 << 3 | (r6 & 1) << 6 | (r7 & 1) << 7
    """
    strips, steps = f.shape[:2]
    # strip step (q s) g t (hb r8) byte -> strip step g t q r byte, r = 4 s + 2 hb + r8
    f = f.reshape(strips, steps, 2, 2, 8, 4, 4, 4).permute(0, 1, 4, 5, 2, 3, 6, 7).reshape(strips, steps, 32, 2, 8, 4)
    r = f.unbind(4)
    A = r[0] | r[1] << 3 | r[6] >> 1 << 6
    B = r[2] | r[3] << 3 | r[7] >> 1 << 6
    C = r[4] | r[5] << 3 | (r[6] & 1) << 6 | (r[7] & 1) << 7
    low = torch.stack((A, B), 4).view(torch.int32).reshape(strips, steps, 128)
    return torch.cat((low, C.contiguous().view(torch.int32).reshape(strips, steps, 64)), 2)


def _unpack3(words: Tensor) -> Tensor:
    strips, steps = words.shape[:2]
    low = words[:, :, :128].contiguous().view(torch.uint8).view(strips, steps, 32, 2, 2, 4)
    A, B = low.unbind(4)
    C = words[:, :, 128:].contiguous().view(torch.uint8).view(strips, steps, 32, 2, 4)
    sixth = A >> 6 << 1 | (C >> 6) & 1
    seventh = B >> 6 << 1 | C >> 7
    r = torch.stack((A & 7, (A >> 3) & 7, B & 7, (B >> 3) & 7, C & 7, (C >> 3) & 7, sixth, seventh), 4)
    f = r.view(strips, steps, 8, 4, 2, 2, 4, 4).permute(0, 1, 4, 5, 2, 3, 6, 7)  # strip step q s g t (hb r8) byte
    return f.reshape(strips, steps, 4, 8, 4, 2, 2, 2, 2)


def pack_meta(scales: Tensor, zeros: Tensor) -> tuple[Tensor, Tensor | None]:
    """Scales (G, N) and zero points uint8 (G, N), N a multiple of 16, to ``meta`` and ``scales`` of tiles."""
    scales, zeros = (_pair_rows(tensor) for tensor in (scales, zeros))
    low = zeros.to(torch.int32)
    if scales.dtype == torch.float32:
        return low, scales
    return scales.view(torch.int16).to(torch.int32) << 16 | low, None


def unpack_meta(meta: Tensor, scales: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The inverse of :func:`pack_meta`: scales (G, N) in their dtype, zero points uint8 (G, N)."""
    if scales is None:
        scales = (meta >> 16).to(torch.int16).view(dtype)
    return _unpair_rows(scales), _unpair_rows((meta & 0xFFFF).to(torch.uint8))


def _pair_rows(tensor: Tensor) -> Tensor:
    """(G, 16 strips): row 8 r8 + g of each strip to 2 g + r8."""
    G, N = tensor.shape
    return tensor.reshape(G, N // 16, 2, 8).transpose(2, 3).reshape(G, N).contiguous()


def _unpair_rows(tensor: Tensor) -> Tensor:
    G, N = tensor.shape
    return tensor.reshape(G, N // 16, 8, 2).transpose(2, 3).reshape(G, N).contiguous()
