"""Device helpers: packed words to codes, zero points and weights, in plain Triton.

A word stream is least significant first: code ``j`` sits at bits ``[BITS * j, BITS * (j + 1))`` of
consecutive words (drawing in README.md). At 2, 4 and 8 bits a word holds whole codes. At 3 bits
some codes cross words, but eight of them are 24 bits that touch two words at most. So a stream is
read in runs of PACK codes: as many as a word holds, or eight.

Only shifts and masks: the same text runs on every target and in the interpreter.

Source: the checkpoint format of GPTQ-for-LLaMa and AutoGPTQ.
"""

# pyright: reportOperatorIssue=false, reportAssignmentType=false
# (only Triton's compiler knows that a constexpr is an int here)

import triton
import triton.language as tl


@triton.jit
def load_runs(ptrs, step, bit, mask, mask_next, BITS: tl.constexpr):
    """The word that starts with the run at ``bit`` of its stream, any shape.

    Args:
        ptrs: To the word in which each run starts.
        step: From a word of the stream to the next.
        bit: Where in the stream the run starts.
        mask: Whether that word exists.
        mask_next: Whether the next one does.
        BITS: Of a code.

    Returns:
        uint32, the first code in the lowest bits.
    """
    low = tl.load(ptrs, mask=mask, other=0).to(tl.uint32, bitcast=True)
    if BITS != 3:
        return low
    shift = bit % 32  # 0, 24, 16 or 8: only then do 24 bits end in the next word
    high = tl.load(ptrs + step, mask=mask & mask_next & (shift > 8), other=0).to(tl.uint32, bitcast=True)
    # high << (32 - shift) in two steps: a shift by 32 is undefined
    return (low >> shift) | ((high << 1) << (31 - shift))


@triton.jit
def load_codes(
    qweight_ptr, stride_qk, first_k, first_n, K, N, BITS: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr
):
    """Codes of a tile; rows past K come from padding or are 0.

    Returns:
        int32 (BLOCK_K, BLOCK_N), in [0, 2**BITS - 1].
    """
    PACK: tl.constexpr = 8 if BITS == 3 else 32 // BITS
    # three dimensions from the start: the compiler then keeps neighbouring columns in one thread
    bit = ((first_k + PACK * tl.arange(0, BLOCK_K // PACK)) * BITS)[:, None, None]
    offs_n = (first_n + tl.arange(0, BLOCK_N))[None, None, :]
    row, rows = bit // 32, (K * BITS + 31) // 32
    ptrs = qweight_ptr + row.to(tl.int64) * stride_qk + offs_n
    runs = load_runs(ptrs, stride_qk, bit, (row < rows) & (offs_n < N), row + 1 < rows, BITS)
    codes = (runs >> (BITS * tl.arange(0, PACK))[None, :, None]) & ((1 << BITS) - 1)
    return tl.reshape(codes.to(tl.int32), (BLOCK_K, BLOCK_N))


@triton.jit
def load_zeros(qzeros_ptrs, mask, first_n, N, BITS: tl.constexpr, ZERO_OFFSET: tl.constexpr, BLOCK_N: tl.constexpr):
    """Zero points of BLOCK_N columns of some rows.

    Args:
        qzeros_ptrs: (R,), to the first word of each row.
        mask: (R,), which rows exist.
        first_n: The first column, a multiple of BLOCK_N.
        N: Columns there are.
        BITS: Of a zero point.
        ZERO_OFFSET: What to add to a stored field.
        BLOCK_N: Columns to load.

    Returns:
        int32 (R, BLOCK_N), in [0, 2**BITS - 1].
    """
    PACK: tl.constexpr = 8 if BITS == 3 else 32 // BITS
    bit = ((first_n + PACK * tl.arange(0, BLOCK_N // PACK)) * BITS)[None, :, None]
    word, words = bit // 32, (N * BITS + 31) // 32
    ptrs = qzeros_ptrs[:, None, None] + word
    runs = load_runs(ptrs, 1, bit, mask[:, None, None] & (word < words), word + 1 < words, BITS)
    # v1 stores z - 1, wrapped inside its field: mask after adding
    zeros = ((runs >> (BITS * tl.arange(0, PACK))[None, None, :]) + ZERO_OFFSET) & ((1 << BITS) - 1)
    return tl.reshape(zeros.to(tl.int32), (mask.shape[0], BLOCK_N))


@triton.jit
def load_weights(
    qweight_ptr,
    scales_ptr,
    qzeros_ptr,
    g_idx_ptr,
    first_k,
    first_n,
    K,
    N,
    rows_per_group,
    stride_qk,
    stride_sg,
    stride_zg,
    BITS: tl.constexpr,
    ZERO_OFFSET: tl.constexpr,
    ONE_GROUP: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """A tile of the weight: ``scales[g] * (codes - zeros[g])``, rounded once to float32.

    Args:
        first_k: The first row, a multiple of BLOCK_K, which is a power of two from 16.
        first_n: The first column, likewise.
        g_idx_ptr: The group of each row, or None when row k belongs to group k // rows_per_group.
        ONE_GROUP: All rows of the tile share a group, so one row of scales and zero points serves it.

    Returns:
        float32 (BLOCK_K, BLOCK_N); finite, if the scales are, also past K and N.
    """
    tl.static_assert(BLOCK_K % 16 == 0, "a tile must hold whole runs of codes")
    tl.static_assert(BLOCK_N % 16 == 0, "a tile must hold whole runs of zero points")
    codes = load_codes(qweight_ptr, stride_qk, first_k, first_n, K, N, BITS, BLOCK_K, BLOCK_N)
    offs_k = first_k + tl.arange(0, 1 if ONE_GROUP else BLOCK_K)
    offs_n = first_n + tl.arange(0, BLOCK_N)
    mask_k = offs_k < K
    if g_idx_ptr is None:
        group = (offs_k // rows_per_group).to(tl.int64)
    else:
        group = tl.load(g_idx_ptr + offs_k, mask=mask_k, other=0).to(tl.int64)
    scales_ptrs = scales_ptr + group[:, None] * stride_sg + offs_n[None, :]
    scales = tl.load(scales_ptrs, mask=mask_k[:, None] & (offs_n < N)[None, :], other=0)
    zeros = load_zeros(qzeros_ptr + group * stride_zg, mask_k, first_n, N, BITS, ZERO_OFFSET, BLOCK_N)
    return (codes - zeros).to(tl.float32) * scales.to(tl.float32)
