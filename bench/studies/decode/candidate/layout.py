"""Kernel tiles: integer codes <-> the words that a warp feeds to the tensor cores, in pure torch.

A *strip* is 16 consecutive rows n. Lane l = 4 g + t of a warp owns, of one strip and one tile of KT columns k, exactly the
codes of its own A operand of ``mma.m16n8k16`` (and of ``wgmma``, warp w taking rows 16 w of each 64):

    row n = 16 strip + g + 8 r8          column k = KT tile + 16 step + 8 k3 + 2 t + h

and keeps them in one 16-byte vector: ``[N/16][K/KT][32 lanes][4 words]``.

| bits | KT  | planes                                                     |
|------|-----|------------------------------------------------------------|
| 8    | 32  | one, 4 words a lane                                         |
| 4    | 64  | one, 4 words a lane                                         |
| 3    | 128 | two, 4 and 2 words a lane: columns 0-63 in words 0, 1 and 4, the rest in 2, 3 and 5 |
| 2    | 128 | one, 4 words a lane                                         |

Inside a word both 16-bit halves (h = 0, 1) hold the same number of fields, so that one AND/OR (a single LOP3) with a
magic number turns a field of both halves into two floating-point operands. `FIELDS` says where the fields sit.
"""

from __future__ import annotations

import torch

TILE_K = {8: 32, 4: 64, 3: 128, 2: 128}  # columns of one tile

# Position in the 16-bit half of field j of a word, and whether the word is first rotated right by 8.
# Field j belongs to rows r8 = j & 1 and columns k3 = (j >> 1) & 1 (8 bits: k3 is the word's parity).
FIELDS = {
    8: ((2, False), (2, True)),
    4: ((6, False), (2, False), (6, True), (2, True)),
    2: tuple((p, r) for r in (False, True) for p in (8, 6, 4, 2)),
}


# 3 bits: each half of the three words of 64 columns holds five fields at bits 0, 3, 6, 9, 12; the 16th field takes bit 15 of
# the three words, top bit first. Fields (word, position) of rows r8 = 0 and r8 = 1, in the order (step, k3).
FIELDS_3 = (
    ((0, 6), (0, 12), (1, 6), (1, 12), (2, 6), (2, 12), (0, 0), (1, 0)),
    ((0, 3), (0, 9), (1, 3), (1, 9), (2, 3), (2, 9), (2, 0), None),
)


def _fields3(chunk: int):
    """Yields ((step, k3, r8), [(word of 6, bit in the half, bit of the code, number of bits)]) of 64 columns."""
    words = (2 * chunk, 2 * chunk + 1, 4 + chunk)
    for r8, slots in enumerate(FIELDS_3):
        for i, slot in enumerate(slots):
            where = (4 * chunk + i // 2, i % 2, r8)
            if slot is None:
                yield where, [(words[0], 15, 2, 1), (words[1], 15, 1, 1), (words[2], 15, 0, 1)]
            else:
                yield where, [(words[slot[0]], slot[1], 0, 3)]


def _fragments(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes (K, N) in the order [strip, tile, g, t, step, k3, r8, h]."""
    K, N = codes.shape
    KT = TILE_K[bits]
    f = codes.t().reshape(N // 16, 2, 8, K // KT, KT // 16, 2, 4, 2)  # strip r8 g tile step k3 t h
    return f.permute(0, 3, 2, 6, 4, 5, 1, 7)


def _codes(fragments: torch.Tensor) -> torch.Tensor:
    """Inverse of `_fragments`."""
    strips, tiles, _, _, steps = fragments.shape[:5]
    return fragments.permute(0, 6, 2, 1, 4, 5, 3, 7).reshape(strips * 16, tiles * steps * 16).t().contiguous()


def _slot(bits: int, word: int, field: int) -> tuple[int, int, int]:
    """(step, k3, r8) of a field of a word of a lane."""
    if bits == 8:
        return word // 2, word % 2, field
    steps_per_word = len(FIELDS[bits]) // 4
    return word * steps_per_word + field // 4, (field >> 1) & 1, field & 1


def _bit(position: int, rotated: bool, h: int) -> int:
    """Bit of the stored word that a rotation to the right by 8 (if rotated) brings to `position` of half h."""
    return (position + 16 * h + (8 if rotated else 0)) % 32


def _signed(words: torch.Tensor) -> torch.Tensor:
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)


def tile(codes: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Packs integer codes into kernel tiles.

    Args:
        codes: (K, N) integers in [0, 2**bits); K a multiple of `TILE_K[bits]`, N of 16.
        bits: 2, 3, 4 or 8.

    Returns:
        The words, int32 (N/16, K/KT, 128), and for 3 bits the top-bit plane, int32 (N/16, K/KT, 64).
    """
    KT = TILE_K[bits]
    K, N = codes.shape
    if K % KT or N % 16:
        raise ValueError(f"codes of shape {(K, N)}: K must be a multiple of {KT} and N of 16")
    f = _fragments(codes, bits)
    lanes = (N // 16, K // KT, 8, 4)
    if bits == 3:
        out = torch.zeros(*lanes, 6, dtype=torch.int64, device=codes.device)
        for chunk in range(2):
            for (step, k3, r8), pieces in _fields3(chunk):
                for h in range(2):
                    v = f[:, :, :, :, step, k3, r8, h].to(torch.int64)
                    for word, bit, low, count in pieces:
                        out[..., word] |= ((v >> low) & ((1 << count) - 1)) << (bit + 16 * h)
        out = _signed(out)
        return out[..., :4].reshape(N // 16, K // KT, 128), out[..., 4:].reshape(N // 16, K // KT, 64)
    words = torch.zeros(*lanes, 4, dtype=torch.int64, device=codes.device)
    for word in range(4):
        for j, (position, rotated) in enumerate(FIELDS[bits]):
            step, k3, r8 = _slot(bits, word, j)
            for h in range(2):
                v = f[:, :, :, :, step, k3, r8, h].to(torch.int64)
                b = _bit(position, rotated, h)
                words[..., word] |= ((v << b) | (v >> (32 - b))) & 0xFFFFFFFF
    return _signed(words).reshape(N // 16, K // KT, 128), None


def untile(words: torch.Tensor, top: torch.Tensor | None, bits: int) -> torch.Tensor:
    """Inverse of `tile`: the codes, int32 (K, N)."""
    strips, tiles = words.shape[:2]
    KT = TILE_K[bits]
    w = words.reshape(strips, tiles, 8, 4, 4).to(torch.int64) & 0xFFFFFFFF
    f = torch.zeros(strips, tiles, 8, 4, KT // 16, 2, 2, 2, dtype=torch.int32, device=words.device)
    if bits == 3:
        if top is None:
            raise ValueError("3-bit tiles have two planes: `top` is missing")
        w = torch.cat((w, top.reshape(strips, tiles, 8, 4, 2).to(torch.int64) & 0xFFFFFFFF), -1)
        for chunk in range(2):
            for (step, k3, r8), pieces in _fields3(chunk):
                for h in range(2):
                    for word, bit, low, count in pieces:
                        v = (w[..., word] >> (bit + 16 * h)) & ((1 << count) - 1)
                        f[:, :, :, :, step, k3, r8, h] |= (v << low).to(torch.int32)
        return _codes(f)
    for word in range(4):
        for j, (position, rotated) in enumerate(FIELDS[bits]):
            step, k3, r8 = _slot(bits, word, j)
            for h in range(2):
                b = _bit(position, rotated, h)
                v = ((w[..., word] >> b) | (w[..., word] << (32 - b))) & ((1 << bits) - 1)
                f[:, :, :, :, step, k3, r8, h] = v.to(torch.int32)
    return _codes(f)


def pack_meta(scales: torch.Tensor, zeros: torch.Tensor) -> torch.Tensor:
    """One word per (group, row n): the scale's 16 bits above the zero point as a half; rows g and g + 8 of a strip adjacent.

    Args:
        scales: (G, N) fp16 or bf16; N a multiple of 16.
        zeros: (G, N) integer zero points in [0, 256] (exact in a half).

    Returns:
        int32 (G, N), element 16 s + 2 g + r8 belonging to row 16 s + g + 8 r8.
    """
    G, N = scales.shape
    high = scales.contiguous().view(torch.int16).to(torch.int32) << 16
    low = zeros.to(torch.float16).view(torch.int16).to(torch.int32) & 0xFFFF
    return (high | low).view(G, N // 16, 2, 8).transpose(2, 3).reshape(G, N)


def unpack_meta(meta: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Inverse of `pack_meta`: scales (G, N) in `dtype`, zeros (G, N) int32."""
    G, N = meta.shape
    meta = meta.view(G, N // 16, 8, 2).transpose(2, 3).reshape(G, N)
    scales = (meta >> 16).to(torch.int16).view(dtype)
    zeros = (meta & 0xFFFF).to(torch.int16).view(torch.float16).to(torch.int32)
    return scales, zeros
