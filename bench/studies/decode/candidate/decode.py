"""y = x @ dequantize(w)^T + bias for few rows of x, bound by the speed at which the weights arrive.

    y[m, n] = sum_g scale[g, n] * sum_{k in g} (code[k, n] - zero[g, n]) * x[m, k]

The weights are the A operand of ``mma.m16n8k16`` and never touch shared memory: every lane loads its own 16-byte vectors
(layout.py) straight into registers, ``DEPTH`` groups ahead, and turns them into exact (code - zero) operands (unpack.py).
Rows of x are the n side, staged in shared memory for all warps. A program owns 16 * STRIPS * WARPS_N rows of w and one of
SPLIT ranges of k; its warps form a grid of WARPS_N (rows) by WARPS_K (interleaved groups of 128 columns). Partial sums meet in
shared memory, then in a workspace where the last program to arrive adds them in a fixed order.

Dispatch picks it for M <= 16 on NVIDIA GPUs from sm_80 on, for groups that are a multiple of 128; needs Gluon. Source: this project.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy, mma_v2

from unpack import OFFSETS, UNIT, meta_asm, unpack_asm

LOAD4 = gl.constexpr("ld.global.L1::no_allocate.v4.b32 {$0, $1, $2, $3}, [$4];")
LOAD2 = gl.constexpr("ld.global.v2.b32 {$0, $1}, [$2];")
FENCE = gl.constexpr("bar.warp.sync 0xffffffff; // $0")  # memory operations do not cross it; one NOP
PDL_LAUNCH = gl.constexpr("griddepcontrol.launch_dependents; // $0")
PDL_WAIT = gl.constexpr("griddepcontrol.wait; // $0")

if hasattr(gl, "barrier"):
    _barrier = gl.barrier
else:  # Triton 3.6
    _barrier = gl.thread_barrier


@gluon.jit
def _load4(ptrs):
    """One 16-byte load a lane; `ptrs` must run over 4 consecutive words in registers."""
    return gl.inline_asm_elementwise(LOAD4, "=r,=r,=r,=r,l,l,l,l", [ptrs], dtype=gl.int32, is_pure=False, pack=4)


@gluon.jit
def _load2(ptrs):
    return gl.inline_asm_elementwise(LOAD2, "=r,=r,l,l", [ptrs], dtype=gl.int32, is_pure=False, pack=2)


@gluon.jit
def _do(ASM: gl.constexpr):
    gl.inline_asm_elementwise(ASM, "=r", [], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def _join4(a, b, c, d):
    return gl.join(gl.join(a, c), gl.join(b, d))


@gluon.jit
def _join8(o, I: gl.constexpr, STEP: gl.constexpr):
    return gl.join(_join4(o[I], o[I + 2 * STEP], o[I + 4 * STEP], o[I + 6 * STEP]), _join4(o[I + STEP], o[I + 3 * STEP], o[I + 5 * STEP], o[I + 7 * STEP]))


@gluon.jit
def _spread(c, L: gl.constexpr, SHAPE: gl.constexpr):
    """A value per row [K, S, 8] -> a copy for every word of that row."""
    c = gl.convert_layout(c, gl.SliceLayout(2, gl.SliceLayout(4, L)), assert_trivial=True)
    return gl.expand_dims(gl.expand_dims(c, 2), 4).broadcast_to(SHAPE)


@gluon.jit
def _halves(q, top, BITS: gl.constexpr, WARPS_K: gl.constexpr, S: gl.constexpr):
    """Words of 128 columns -> words of columns 0-63 and 64-127, each [WARPS_K, S, tile, g, (t, word)]."""
    if BITS == 8:
        lo, hi = gl.split(q.reshape((WARPS_K, S, 2, 256)).permute((0, 1, 3, 2)))
        shape: gl.constexpr = (WARPS_K, S, 2, 8, 16)
    elif BITS == 4:
        lo, hi = gl.split(q.reshape((WARPS_K, S, 2, 128)).permute((0, 1, 3, 2)))
        shape: gl.constexpr = (WARPS_K, S, 1, 8, 16)
    else:
        lo, hi = gl.split(q.reshape((WARPS_K, S, 32, 2, 2)).permute((0, 1, 2, 4, 3)))
        shape: gl.constexpr = (WARPS_K, S, 1, 8, 8)
    q = (lo.reshape(shape), hi.reshape(shape))
    t = q
    if BITS == 3:
        t = gl.split(top.reshape((WARPS_K, S, 32, 2)))
    return q, t


@gluon.jit
def _operand(a, ROWS: gl.constexpr, W: gl.constexpr, WARPS_K: gl.constexpr, L: gl.constexpr):
    a = gl.convert_layout(a.reshape((WARPS_K, ROWS, 64)), L, assert_trivial=True)
    if W.bf16:
        a = a.to(gl.bfloat16, bitcast=True)
    return a


@gluon.jit
def _unpack(q, top, c, W: gl.constexpr, WARPS_K: gl.constexpr, S: gl.constexpr, L: gl.constexpr):
    """Words of 64 columns -> (code - zero) * unit, [WARPS_K, 16 S, 64]; for 8-bit bf16 two operands (low, high nibble) to be added."""
    Q: gl.constexpr = q.type.layout
    SHAPE: gl.constexpr = q.shape
    s = ()
    for i in gl.static_range(W.kinds0 + W.kinds1):
        s = s + (_spread(c[i], Q, SHAPE),)
    if W.bits == 8:
        # tile g t step word k3 r8
        if W.bf16:
            o = gl.inline_asm_elementwise(W.asm, W.constraints, [q, s[0], s[1], s[2], s[3]], dtype=(gl.float16, gl.float16, gl.float16, gl.float16, gl.float16, gl.float16, gl.float16, gl.float16), is_pure=True, pack=2)
            a = _operand(_join4(o[0], o[2], o[4], o[6]).reshape((WARPS_K, S, 2, 8, 4, 2, 2, 2, 2)).permute((0, 1, 8, 3, 2, 5, 7, 4, 6)), 16 * S, W, WARPS_K, L)
            high = _operand(_join4(o[1], o[3], o[5], o[7]).reshape((WARPS_K, S, 2, 8, 4, 2, 2, 2, 2)).permute((0, 1, 8, 3, 2, 5, 7, 4, 6)), 16 * S, W, WARPS_K, L)
        else:
            o = gl.inline_asm_elementwise(W.asm, W.constraints, [q, s[0], s[1]], dtype=(gl.float16, gl.float16, gl.float16, gl.float16), is_pure=True, pack=2)
            a = _operand(_join4(o[0], o[1], o[2], o[3]).reshape((WARPS_K, S, 2, 8, 4, 2, 2, 2, 2)).permute((0, 1, 8, 3, 2, 5, 7, 4, 6)), 16 * S, W, WARPS_K, L)
            high = a
    elif W.bits == 4:
        o = gl.inline_asm_elementwise(W.asm, W.constraints, [q, s[0], s[1]], dtype=(gl.float16, gl.float16, gl.float16, gl.float16, gl.float16, gl.float16, gl.float16, gl.float16), is_pure=True, pack=2)
        # g t w1 h step k3 r8
        a = _operand(_join8(o, 0, 1).reshape((WARPS_K, S, 8, 4, 2, 2, 2, 2, 2)).permute((0, 1, 8, 2, 4, 6, 7, 3, 5)), 16 * S, W, WARPS_K, L)
        high = a
    else:
        F16: gl.constexpr = (gl.float16, gl.float16, gl.float16, gl.float16, gl.float16, gl.float16, gl.float16, gl.float16, gl.float16, gl.float16, gl.float16, gl.float16, gl.float16, gl.float16, gl.float16, gl.float16)
        if W.bits == 3:
            t = gl.convert_layout(gl.join(top, top).reshape(SHAPE), Q, assert_trivial=True)
            o = gl.inline_asm_elementwise(W.asm, W.constraints, [q, t, s[0], s[1], s[2], s[3], s[4]], dtype=F16, is_pure=True, pack=2)
        elif W.bf16:
            o = gl.inline_asm_elementwise(W.asm, W.constraints, [q, s[0], s[1]], dtype=F16, is_pure=True, pack=2)
        else:
            o = gl.inline_asm_elementwise(W.asm, W.constraints, [q, s[0], s[1], s[2], s[3]], dtype=F16, is_pure=True, pack=2)
        # g t h word step k3 r8
        a = _operand(gl.join(_join8(o, 0, 2), _join8(o, 1, 2)).reshape((WARPS_K, S, 8, 4, 2, 2, 2, 2, 2)).permute((0, 1, 8, 2, 5, 6, 7, 3, 4)), 16 * S, W, WARPS_K, L)
        high = a
    return a, high


@gluon.jit
def _rows(v, WARPS_K: gl.constexpr, STRIPS: gl.constexpr, WARPS_N: gl.constexpr, BM: gl.constexpr):
    """[WARPS_K, rows, BM] -> rows r8 = 0 and r8 = 1, each [WARPS_K, STRIPS, WARPS_N, 8, BM]."""
    return gl.split(v.reshape((WARPS_K, STRIPS, WARPS_N, 2, 8, BM)).permute((0, 1, 2, 4, 5, 3)))


@gluon.jit
def _decode_meta(words, ASM: gl.constexpr, CONSTRAINTS: gl.constexpr, KINDS: gl.constexpr):
    """(scale as float, subtrahend of each of the KINDS offsets as two equal halves)."""
    if KINDS == 1:
        o = gl.inline_asm_elementwise(ASM, CONSTRAINTS, [words], dtype=(gl.float32, gl.int32), is_pure=True, pack=1)
    elif KINDS == 2:
        o = gl.inline_asm_elementwise(ASM, CONSTRAINTS, [words], dtype=(gl.float32, gl.int32, gl.int32), is_pure=True, pack=1)
    else:
        o = gl.inline_asm_elementwise(ASM, CONSTRAINTS, [words], dtype=(gl.float32, gl.int32, gl.int32, gl.int32), is_pure=True, pack=1)
    return o


@gluon.jit
def _step(acc0, acc1, q, top, meta, xs, W: gl.constexpr, WARPS_K: gl.constexpr, STRIPS: gl.constexpr, WARPS_N: gl.constexpr, BM: gl.constexpr, mma: gl.constexpr):
    """acc += scale * (code - zero) . x over 128 columns, all of one group."""
    S: gl.constexpr = STRIPS * WARPS_N
    AL: gl.constexpr = gl.DotOperandLayout(0, mma, 2)
    BL: gl.constexpr = gl.DotOperandLayout(1, mma, 2)
    SCALE: gl.constexpr = gl.SliceLayout(4, acc0.type.layout)
    m0, m1 = gl.split(meta.reshape((WARPS_K, S, 8, 2)))
    row0 = _decode_meta(m0, W.meta0, W.meta0_constraints, W.kinds0)
    row1 = _decode_meta(m1, W.meta1, W.meta1_constraints, W.kinds1)
    q, top = _halves(q, top, W.bits, WARPS_K, S)
    p = gl.zeros((WARPS_K, 16 * S, BM), gl.float32, mma)
    for i in gl.static_range(2):
        x = xs.slice(64 * i, 64, dim=2).permute((0, 2, 1)).load(BL)
        a, high = _unpack(q[i], top[i], row0[1:] + row1[1:], W, WARPS_K, S, AL)
        p = mma_v2(a, x, p)
        if W.bits == 8 and W.bf16:
            p = mma_v2(high, x, p)
    p0, p1 = _rows(p, WARPS_K, STRIPS, WARPS_N, BM)
    s0 = gl.convert_layout(row0[0].reshape((WARPS_K, STRIPS, WARPS_N, 8)), SCALE, assert_trivial=True)
    s1 = gl.convert_layout(row1[0].reshape((WARPS_K, STRIPS, WARPS_N, 8)), SCALE, assert_trivial=True)
    acc0 += p0 * gl.expand_dims(s0, 4)
    acc1 += p1 * gl.expand_dims(s1, 4)
    return acc0, acc1


@gluon.jit(do_not_specialize=["M", "strips"])
def _kernel(x_ptr, words_ptr, top_ptr, meta_ptr, bias_ptr, y_ptr, workspace_ptr, counter_ptr, M, N, K, strips, stride_xm,
            W: gl.constexpr, BM: gl.constexpr, STRIPS: gl.constexpr, WARPS_N: gl.constexpr, WARPS_K: gl.constexpr, DEPTH: gl.constexpr, CHUNK: gl.constexpr, SPLIT: gl.constexpr,
            GROUP_STEPS: gl.constexpr, BIAS: gl.constexpr, PDL: gl.constexpr, QL: gl.constexpr, TL: gl.constexpr, ML: gl.constexpr, XL: gl.constexpr, YL: gl.constexpr):
    LOW_BITS: gl.constexpr = 2 if W.bits == 3 else W.bits
    QW: gl.constexpr = 64 * LOW_BITS  # words of a strip of 128 columns
    S: gl.constexpr = STRIPS * WARPS_N
    BN: gl.constexpr = 16 * S
    DT: gl.constexpr = gl.bfloat16 if W.bf16 else gl.float16
    mma: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [WARPS_K, WARPS_N, 1], [1, 16, 8])
    if PDL:
        _do(PDL_LAUNCH)

    # which tile is mine: rows BN * pid_n ..., rounds lo ... hi of WARPS_K steps of 128 columns
    pid_n = gl.program_id(0)
    pid_k = gl.program_id(1)
    steps = (K + 127) // 128
    rounds = (steps + WARPS_K - 1) // WARPS_K
    lo = rounds * pid_k // SPLIT
    hi = rounds * (pid_k + 1) // SPLIT
    last = gl.maximum(gl.minimum(hi * WARPS_K, steps) - 1, 0)

    # first pointers; loads of w stay inside (clamped, never masked), x is zero beyond: whatever is read there counts nothing
    Q1: gl.constexpr = gl.SliceLayout(2, QL)
    step_q = gl.expand_dims(gl.expand_dims(gl.arange(0, WARPS_K, gl.SliceLayout(1, Q1)), 1), 2) + lo * WARPS_K
    strip_q = gl.expand_dims(gl.expand_dims(gl.minimum(pid_n * S + gl.arange(0, S, gl.SliceLayout(0, Q1)), strips - 1), 0), 2)
    offs_q = gl.expand_dims(gl.expand_dims(gl.arange(0, QW, gl.SliceLayout(0, gl.SliceLayout(1, QL))), 0), 1)
    q_ptrs = words_ptr + strip_q.to(gl.int64) * (steps * QW) + offs_q
    T1: gl.constexpr = gl.SliceLayout(2, TL)
    step_t = gl.expand_dims(gl.expand_dims(gl.arange(0, WARPS_K, gl.SliceLayout(1, T1)), 1), 2) + lo * WARPS_K
    strip_t = gl.expand_dims(gl.expand_dims(gl.minimum(pid_n * S + gl.arange(0, S, gl.SliceLayout(0, T1)), strips - 1), 0), 2)
    offs_t = gl.expand_dims(gl.expand_dims(gl.arange(0, 64, gl.SliceLayout(0, gl.SliceLayout(1, TL))), 0), 1)
    t_ptrs = top_ptr + strip_t.to(gl.int64) * (steps * 64) + offs_t
    step_m = gl.expand_dims(gl.arange(0, WARPS_K, gl.SliceLayout(1, ML)), 1) + lo * WARPS_K
    offs_e = gl.expand_dims(gl.arange(0, BN, gl.SliceLayout(0, ML)), 0)
    m_ptrs = meta_ptr + gl.minimum(pid_n * S + offs_e // 16, strips - 1) * 16 + offs_e % 16
    X1: gl.constexpr = gl.SliceLayout(2, XL)
    offs_xk = gl.expand_dims(gl.expand_dims(gl.arange(0, CHUNK * WARPS_K, gl.SliceLayout(1, X1)), 1), 2) + lo * WARPS_K
    offs_xk = offs_xk * 128 + gl.expand_dims(gl.expand_dims(gl.arange(0, 128, gl.SliceLayout(0, gl.SliceLayout(1, XL))), 0), 1)
    offs_m = gl.expand_dims(gl.expand_dims(gl.arange(0, BM, gl.SliceLayout(0, X1)), 0), 2)
    x_ptrs = x_ptr + offs_m * stride_xm + offs_xk
    end_k = gl.minimum(K, gl.minimum(hi * WARPS_K, steps) * 128)
    SWIZZLE: gl.constexpr = gl.SwizzledSharedLayout(8, 1, 8, [2, 1, 0])
    chunks = gl.allocate_shared_memory(DT, [2, CHUNK * WARPS_K, BM, 128], SWIZZLE)
    staged = chunks._reinterpret(DT, [2 * CHUNK, WARPS_K, BM, 128], SWIZZLE)
    q = ()
    top = ()
    meta = ()
    for d in gl.static_range(DEPTH):
        q = q + (_load4(q_ptrs + gl.minimum(step_q, last) * QW),)
        top = top + ((_load2(t_ptrs + gl.minimum(step_t, last) * 64) if W.bits == 3 else 0),)
        meta = meta + (_load2(m_ptrs + gl.minimum(step_m, last) // GROUP_STEPS * strips * 16),)
        step_q += WARPS_K
        step_t += WARPS_K
        step_m += WARPS_K
    if PDL:
        _do(PDL_WAIT)  # the weights are on their way; x and the workspace belong to the kernels before
    async_copy.async_copy_global_to_shared(chunks.index(0), x_ptrs, mask=(offs_m < M) & (offs_xk < end_k))
    async_copy.commit_group()
    acc0, acc1 = _rows(gl.zeros((WARPS_K, BN, BM), gl.float32, mma), WARPS_K, STRIPS, WARPS_N, BM)

    # the loop over K: chunks of CHUNK rounds of x, rounds of WARPS_K steps
    side = 0
    for first in range(lo, hi, CHUNK):
        async_copy.wait_group(0)
        _barrier()
        x_ptrs += CHUNK * WARPS_K * 128
        offs_xk += CHUNK * WARPS_K * 128
        async_copy.async_copy_global_to_shared(chunks.index(1 - side), x_ptrs, mask=(offs_m < M) & (offs_xk < end_k))
        async_copy.commit_group()
        _barrier()  # before the first read of the chunk, or the compiler adds one to every round
        n = gl.minimum(CHUNK, hi - first)
        for i in range(0, n, DEPTH):
            for d in gl.static_range(DEPTH):
                if i + d < n:  # this branch and the fence below keep ptxas from sinking the loads to the end of the body
                    acc0, acc1 = _step(acc0, acc1, q[d], top[d], meta[d], staged.index(side * CHUNK + i + d), W, WARPS_K, STRIPS, WARPS_N, BM, mma)
                q = q[:d] + (_load4(q_ptrs + gl.minimum(step_q, last) * QW),) + q[d + 1:]
                if W.bits == 3:
                    top = top[:d] + (_load2(t_ptrs + gl.minimum(step_t, last) * 64),) + top[d + 1:]
                meta = meta[:d] + (_load2(m_ptrs + gl.minimum(step_m, last) // GROUP_STEPS * strips * 16),) + meta[d + 1:]
                step_q += WARPS_K
                step_t += WARPS_K
                step_m += WARPS_K
                _do(FENCE)
        side = 1 - side
    async_copy.wait_group(0)

    # epilogue: add the WARPS_K partial sums, then those of the SPLIT programs in a fixed order
    acc = gl.join(acc0, acc1).permute((0, 1, 2, 5, 3, 4)).reshape((WARPS_K, BN, BM))
    partial = gl.allocate_shared_memory(gl.float32, [WARPS_K, BM, BN], gl.SwizzledSharedLayout(8, 2, 4, [2, 1, 0]))
    partial.permute((0, 2, 1)).store(gl.convert_layout(acc, mma, assert_trivial=True) * W.inverse_unit)
    _barrier()
    y = gl.sum(partial.load(YL), 0)
    OUT: gl.constexpr = gl.SliceLayout(0, YL)
    offs_ym = gl.expand_dims(gl.arange(0, BM, gl.SliceLayout(1, OUT)), 1)
    offs_n = gl.expand_dims(pid_n * BN + gl.arange(0, BN, gl.SliceLayout(0, OUT)), 0)
    mask = (offs_ym < M) & (offs_n < N)
    offs_y = offs_ym * N + offs_n
    if SPLIT > 1:
        width = strips * 16
        offs_w = offs_ym * width + offs_n
        mask_w = (offs_ym < M) & (offs_n < width)
        gl.store(workspace_ptr + pid_k * M * width + offs_w, y, mask=mask_w)
        _barrier()
        arrived = gl.atomic_add(counter_ptr + pid_n, 1, sem="acq_rel")
        if arrived == SPLIT - 1:
            y = gl.load(workspace_ptr + offs_w, mask=mask_w, other=0.0, cache_modifier=".cg")
            for j in gl.static_range(1, SPLIT):
                y += gl.load(workspace_ptr + j * M * width + offs_w, mask=mask_w, other=0.0, cache_modifier=".cg")
            if BIAS:
                y += gl.load(bias_ptr + offs_n, mask=offs_n < N, other=0.0).to(gl.float32)
            gl.store(y_ptr + offs_y, y.to(DT), mask=mask)
            gl.store(counter_ptr + pid_n, 0)
    else:
        if BIAS:
            y += gl.load(bias_ptr + offs_n, mask=offs_n < N, other=0.0).to(gl.float32)
        gl.store(y_ptr + offs_y, y.to(DT), mask=mask)


class _Weights:
    """How the words of a width become operands of a dtype: the constants of the unpack, one constexpr."""

    def __init__(self, bits: int, bf16: bool, scales_bf16: bool) -> None:
        self.key = (bits, bf16, scales_bf16)
        asm, constraints, _ = unpack_asm(bits, bf16)
        meta0, constraints0 = meta_asm(bits, bf16, 0, scales_bf16)
        meta1, constraints1 = meta_asm(bits, bf16, 1, scales_bf16)
        kinds0, kinds1 = (len(o) for o in OFFSETS[bits, bf16])
        self.bits, self.bf16 = gl.constexpr(bits), gl.constexpr(bf16)
        self.asm, self.constraints = gl.constexpr(asm), gl.constexpr(constraints)
        self.meta0, self.meta0_constraints, self.kinds0 = gl.constexpr(meta0), gl.constexpr(constraints0), gl.constexpr(kinds0)
        self.meta1, self.meta1_constraints, self.kinds1 = gl.constexpr(meta1), gl.constexpr(constraints1), gl.constexpr(kinds1)
        self.inverse_unit = gl.constexpr(1 / UNIT[bits, bf16])

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Weights) and self.key == other.key

    def __hash__(self) -> int:
        return hash(self.key)

    def __repr__(self) -> str:
        return f"_Weights{self.key}"


@dataclass(frozen=True)
class DecodePlan:
    """Tile of the decode kernel: plain data, so tuned tables are JSON."""

    bm: int  # rows of x a program computes: 8, 16 or 32
    strips: int  # strips of 16 rows of w a warp owns
    warps_n: int  # warps over the rows of w
    warps_k: int  # warps over the groups of k
    depth: int  # rounds of w in flight in registers
    chunk: int  # rounds of x staged at a time; a power of two, a multiple of depth
    split: int  # programs over k
    pdl: bool = True

    @property
    def rows(self) -> int:
        return 16 * self.strips * self.warps_n

    @property
    def num_warps(self) -> int:
        return self.warps_n * self.warps_k


# Measured on an H200, N = 8192, K = 28672 (FINDINGS.md); programs that fit on one multiprocessor beside each tile.
TILES = {
    8: {8: (DecodePlan(8, 2, 4, 4, 1, 4, 1), 1), 4: (DecodePlan(8, 2, 2, 8, 2, 2, 1), 1), 3: (DecodePlan(8, 2, 2, 8, 2, 2, 1), 1), 2: (DecodePlan(8, 4, 2, 2, 4, 8, 1), 2)},
    16: {8: (DecodePlan(16, 2, 4, 4, 1, 4, 1), 1), 4: (DecodePlan(16, 2, 8, 2, 2, 4, 1), 1), 3: (DecodePlan(16, 2, 4, 4, 2, 2, 1), 1), 2: (DecodePlan(16, 2, 4, 4, 1, 4, 1), 1)},
}
SMALL = {8: DecodePlan(8, 2, 1, 8, 4, 4, 1), 16: DecodePlan(16, 4, 2, 4, 2, 2, 1)}  # most of a program's weights in flight at once


def choose(M: int, N: int, K: int, bits: int, multiprocessors: int = 132) -> DecodePlan:
    """The tile and the split over k with the least estimated time: bytes of the busiest multiprocessor plus the cost of meeting."""
    bm = 8 if M <= 8 else 16
    best = (float("inf"), SMALL[bm])
    small = replace(SMALL[bm], depth=1) if (bm, bits) == (16, 8) else SMALL[bm]
    for tile, resident in (TILES[bm][bits], (small, 1)):
        if tile is small and N * K * bits > 8 * 48e6:
            continue
        rounds = -(-K // (128 * tile.warps_k))
        for split in range(1, min(16, rounds) + 1):
            programs = -(-N // tile.rows) * split
            waves = -(-programs // (resident * multiprocessors))
            busiest = waves * resident * multiprocessors / programs  # 1 when all are equally busy
            us = N * K * bits / 8 / 4.3e6 * busiest + (0.0 if split == 1 else 1.0 + 0.05 * split)
            us += 0.5 * (rounds / split < tile.depth)
            if us < best[0]:
                best = (us, replace(tile, split=split))
    return best[1]


def _words_layout(width: int, vector: int, plan: DecodePlan) -> gl.DistributedLinearLayout:
    """[warps_k, strips, words]: a lane holds `vector` consecutive words; strips go to warps first, then to registers."""
    bits = [1 << i for i in range(width.bit_length() - 1)]
    v = vector.bit_length() - 1
    strips = [1 << i for i in range((plan.strips * plan.warps_n).bit_length() - 1)]
    wn = plan.warps_n.bit_length() - 1
    reg = [[0, 0, b] for b in bits[:v] + bits[v + 5 :]] + [[0, s, 0] for s in strips[wn:]]
    warp = [[0, s, 0] for s in strips[:wn]] + [[1 << i, 0, 0] for i in range(plan.warps_k.bit_length() - 1)]
    return gl.DistributedLinearLayout(reg, [[0, 0, b] for b in bits[v : v + 5]], warp, [], [plan.warps_k, plan.strips * plan.warps_n, width])


@lru_cache(maxsize=None)
def constants(plan: DecodePlan, bits: int, bf16: bool, scales_bf16: bool, group_steps: int, bias: bool) -> dict:
    """The constexpr arguments of the kernel."""
    rows, wn = plan.rows, plan.warps_n.bit_length() - 1
    row_bits = [16 << i for i in range((rows // 16).bit_length() - 1)]
    meta = gl.DistributedLinearLayout(
        [[0, 1]] + [[0, b] for b in row_bits[wn:]], [[0, 0], [0, 0], [0, 2], [0, 4], [0, 8]],
        [[0, b] for b in row_bits[:wn]] + [[1 << i, 0] for i in range(plan.warps_k.bit_length() - 1)], [], [plan.warps_k, rows])
    lanes_n = min(32, rows // 4)
    return dict(
        W=_Weights(bits, bf16, scales_bf16), BM=plan.bm, STRIPS=plan.strips, WARPS_N=plan.warps_n, WARPS_K=plan.warps_k, DEPTH=plan.depth, CHUNK=plan.chunk, SPLIT=plan.split,
        GROUP_STEPS=group_steps, BIAS=bias, PDL=plan.pdl,
        QL=_words_layout(64 * (2 if bits == 3 else bits), 4, plan), TL=_words_layout(64, 2, plan), ML=meta,
        XL=gl.BlockedLayout([1, 1, 8], [1, 2, 16], [plan.warps_k, plan.warps_n, 1], [2, 1, 0]),
        YL=gl.BlockedLayout([plan.warps_k, 1, 4], [1, 32 // lanes_n, lanes_n], [1, plan.num_warps, 1], [2, 1, 0]),
    )


def decode(
    x: torch.Tensor, words: torch.Tensor, top: torch.Tensor | None, meta: torch.Tensor, bias: torch.Tensor | None, y: torch.Tensor,
    workspace: torch.Tensor | None, counters: torch.Tensor | None, *, bits: int, group_size: int, scales_bf16: bool, plan: DecodePlan,
) -> None:
    """Launches the kernel on the current stream. Allocates nothing.

    Args:
        x: (M, K) fp16 or bf16, M <= plan.bm; rows contiguous, 16-byte aligned; K and the stride multiples of 16.
        words, top: tiles of `layout.tile`, columns padded to 128 k and rows to 16.
        meta: int32 (G, rows of w padded to 16) of `layout.pack_meta`.
        bias: (N,) or None.
        y: (M, N), written whole; dtype of x.
        workspace: fp32, at least plan.split * M * padded N elements (None when plan.split is 1).
        counters: int32, at least ceil(N / plan.rows) zeros; left at zero. One per stream.
        bits: 2, 3, 4 or 8.
        group_size: a multiple of 128, or -1 for one group.
        scales_bf16: whether the scales in `meta` are bf16 (else fp16).
        plan: the tile.
    """
    M, K = x.shape
    N = y.shape[1]
    strips = meta.shape[1] // 16
    steps = 1 << 30 if group_size == -1 else group_size // 128
    _kernel[((strips * 16 + plan.rows - 1) // plan.rows, plan.split)](
        x, words, words if top is None else top, meta, x if bias is None else bias, y, y if workspace is None else workspace, meta if counters is None else counters,
        M, N, K, strips, x.stride(0),
        **constants(plan, bits, x.dtype == torch.bfloat16, scales_bf16, steps, bias is not None),
        num_warps=plan.num_warps, launch_pdl=plan.pdl,
    )
