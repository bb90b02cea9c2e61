"""Device helpers: packed words to codes, zero points and weights, in plain Triton.

A word stream is least significant first: code ``j`` sits at bits ``[BITS * j, BITS * (j + 1))`` of
consecutive words (drawing in README.md). At 2, 4 and 8 bits a word holds whole codes. At 3 bits
some codes cross words, but eight of them are 24 bits that touch two words at most.

Only shifts and masks: the same text runs on every target and in the interpreter.

Source: the checkpoint format of GPTQ-for-LLaMa and AutoGPTQ.
"""

# pyright: reportOperatorIssue=false, reportAssignmentType=false
# (only Triton's compiler knows that a constexpr is an int here)

import triton
import triton.language as tl


@triton.jit
def funnel(low, high, shift):
    """The 32 bits from bit ``shift`` (0 to 31) of the pair of words; uint32 in and out."""
    # high << (32 - shift) in two steps: a shift by 32 is undefined
    return (low >> shift) | ((high << 1) << (31 - shift))


@triton.jit
def load_codes(qweight_ptr, stride_qk, first_k, K, offs_n, mask_n, BITS: tl.constexpr, BLOCK_K: tl.constexpr):
    """Codes of rows ``first_k`` to ``first_k + BLOCK_K`` and columns ``offs_n``.

    Each load brings PACK codes, unfolded in registers. first_k is a multiple of BLOCK_K, which is a
    multiple of 16. Rows past K come from padding or are 0.

    Returns:
        int32 (BLOCK_K, BLOCK_N), in [0, 2**BITS - 1].
    """
    PACK: tl.constexpr = 8 if BITS == 3 else 32 // BITS
    tl.static_assert(BLOCK_K % 16 == 0, "a tile must hold whole words of codes")
    # three dimensions from the start: the compiler then keeps runs of columns together in a thread
    offs_n, mask_n = offs_n[None, None, :], mask_n[None, None, :]
    bit = ((first_k + PACK * tl.arange(0, BLOCK_K // PACK)) * BITS)[:, None, None]
    row, rows = bit // 32, (K * BITS + 31) // 32
    ptrs = qweight_ptr + row.to(tl.int64) * stride_qk + offs_n
    words = tl.load(ptrs, mask=(row < rows) & mask_n, other=0).to(tl.uint32, bitcast=True)
    if BITS == 3:
        shift = bit % 32
        crosses = (shift > 8) & (row + 1 < rows) & mask_n
        words = funnel(words, tl.load(ptrs + stride_qk, mask=crosses, other=0).to(tl.uint32, bitcast=True), shift)
    codes = (words >> (BITS * tl.arange(0, PACK))[None, :, None]) & ((1 << BITS) - 1)
    return tl.reshape(codes.to(tl.int32), (BLOCK_K, offs_n.shape[2]))


@triton.jit
def load_zeros(qzeros_ptrs, offs_n, mask, BITS: tl.constexpr, ZERO_OFFSET: tl.constexpr):
    """Zero points of columns ``offs_n`` of the rows that ``qzeros_ptrs`` point at, any shape.

    Returns:
        int32, the broadcast shape of the arguments, in [0, 2**BITS - 1].
    """
    bit = offs_n * BITS
    shift = bit % 32
    ptrs = qzeros_ptrs + bit // 32
    fields = tl.load(ptrs, mask=mask, other=0).to(tl.uint32, bitcast=True)
    if BITS == 3:
        # only where a field crosses: there may be no next word
        fields = funnel(fields, tl.load(ptrs + 1, mask=mask & (shift > 29), other=0).to(tl.uint32, bitcast=True), shift)
    else:
        fields = fields >> shift
    # v1 stores z - 1, wrapped inside its field: mask again after adding
    return (fields.to(tl.int32) + ZERO_OFFSET) & ((1 << BITS) - 1)


@triton.jit
def load_weights(
    qweight_ptr,
    scales_ptr,
    qzeros_ptr,
    g_idx_ptr,
    first_k,
    offs_n,
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
):
    """A tile of the weight: ``scales[g] * (codes - zeros[g])``, rounded once to float32.

    Args:
        g_idx_ptr: The group of each row, or None when row k belongs to group k // rows_per_group.
        ONE_GROUP: All rows of the tile share a group, so scale and zero point are loaded once.

    Returns:
        float32 (BLOCK_K, BLOCK_N); finite, if the scales are, also past K and N.
    """
    mask_n = offs_n < N
    codes = load_codes(qweight_ptr, stride_qk, first_k, K, offs_n, mask_n, BITS, BLOCK_K)
    if ONE_GROUP:
        group = (first_k // rows_per_group).to(tl.int64)
        scales = tl.load(scales_ptr + group * stride_sg + offs_n, mask=mask_n, other=0)[None, :]
        zeros = load_zeros(qzeros_ptr + group * stride_zg, offs_n, mask_n, BITS, ZERO_OFFSET)[None, :]
    else:
        offs_k = first_k + tl.arange(0, BLOCK_K)
        mask_k = offs_k < K
        if g_idx_ptr is None:
            group = offs_k // rows_per_group
        else:
            group = tl.load(g_idx_ptr + offs_k, mask=mask_k, other=0)
        group = group.to(tl.int64)[:, None]
        mask = mask_k[:, None] & mask_n[None, :]
        scales = tl.load(scales_ptr + group * stride_sg + offs_n[None, :], mask=mask, other=0)
        zeros = load_zeros(qzeros_ptr + group * stride_zg, offs_n[None, :], mask, BITS, ZERO_OFFSET)
    return (codes - zeros).to(tl.float32) * scales.to(tl.float32)
