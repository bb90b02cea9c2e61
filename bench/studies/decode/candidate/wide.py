"""y = x @ dequantize(w) for up to 64 rows of x: register-A tensor-core product in plain Triton (wgmma on Hopper, mma.sync elsewhere)."""
import triton
import triton.language as tl

from unpack import OFFSETS, UNIT, meta_asm, unpack_asm


@triton.jit
def _join4(a, b, c, d):
    return tl.join(tl.join(a, c), tl.join(b, d))


@triton.jit
def _join8(o0, o1, o2, o3, o4, o5, o6, o7):
    return tl.join(_join4(o0, o2, o4, o6), _join4(o1, o3, o5, o7))


@triton.jit
def _spread(c, S: tl.constexpr, KT: tl.constexpr, L: tl.constexpr):
    return tl.broadcast_to(c[:, None, :, None], (S, KT, 8, L)).reshape(S, KT * 8 * L)


@triton.jit(do_not_specialize=["M"])
def wide(x_ptr, q_ptr, h_ptr, sz_ptr, y_ptr, ws_ptr, cnt_ptr, M, N, K, stride_xm, ASM: tl.constexpr, CON: tl.constexpr, META0: tl.constexpr, META1: tl.constexpr, MCON0: tl.constexpr, MCON1: tl.constexpr,
         SASM: tl.constexpr, BITS: tl.constexpr, BF: tl.constexpr, INV: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, SPLIT: tl.constexpr, PDL: tl.constexpr):
    S: tl.constexpr = BN // 16
    LB: tl.constexpr = 2 if BITS == 3 else BITS
    QW: tl.constexpr = 64 * LB
    DT: tl.constexpr = tl.bfloat16 if BF else tl.float16
    pn = tl.program_id(0)
    pk = tl.program_id(1)
    G = K // 128
    lo = (G * pk) // SPLIT
    hi = (G * (pk + 1)) // SPLIT
    offs_m = tl.arange(0, BM)
    offs_n = pn * BN + tl.arange(0, BN)
    strip = pn * S + tl.arange(0, S)
    q_ptrs = q_ptr + strip.to(tl.int64)[:, None] * (K * LB // 2) + (lo * QW + tl.arange(0, QW))[None, :]
    h_ptrs = h_ptr + strip.to(tl.int64)[:, None] * (K // 2) + (lo * 64 + tl.arange(0, 64))[None, :]
    x_ptrs = x_ptr + offs_m[:, None] * stride_xm + (lo * 128 + tl.arange(0, 128))[None, :]
    m_ptrs = sz_ptr + lo * N + offs_n
    s_ptrs = sz_ptr + lo * N + (offs_n // 16) * 16 + (offs_n % 8) * 2 + (offs_n // 8) % 2
    acc = tl.zeros((BN, BM), tl.float32)
    for _ in range(lo, hi):
        q = tl.load(q_ptrs)
        x = tl.load(x_ptrs, mask=offs_m[:, None] < M, other=0.0)
        m0, m1 = tl.split(tl.load(m_ptrs).reshape(S, 8, 2))
        scale = tl.inline_asm_elementwise(SASM, "=r,r", [tl.load(s_ptrs)], dtype=tl.float32, is_pure=True, pack=1)
        if BITS == 8 and not BF:
            _, c0 = tl.inline_asm_elementwise(META0, MCON0, [m0], dtype=(tl.float32, tl.int32), is_pure=True, pack=1)
            _, c1 = tl.inline_asm_elementwise(META1, MCON1, [m1], dtype=(tl.float32, tl.int32), is_pure=True, pack=1)
            o0, o1, o2, o3 = tl.inline_asm_elementwise(ASM, CON, [q, _spread(c0, S, 4, 16), _spread(c1, S, 4, 16)], dtype=(tl.float16, tl.float16, tl.float16, tl.float16), is_pure=True, pack=2)
            a = _join4(o0, o1, o2, o3).reshape(S, 4, 8, 4, 2, 2, 2, 2).permute(0, 7, 2, 1, 4, 6, 3, 5)
        elif BITS == 4:
            _, c0 = tl.inline_asm_elementwise(META0, MCON0, [m0], dtype=(tl.float32, tl.int32), is_pure=True, pack=1)
            _, c1 = tl.inline_asm_elementwise(META1, MCON1, [m1], dtype=(tl.float32, tl.int32), is_pure=True, pack=1)
            o0, o1, o2, o3, o4, o5, o6, o7 = tl.inline_asm_elementwise(ASM, CON, [q, _spread(c0, S, 2, 16), _spread(c1, S, 2, 16)], dtype=(tl.float16, tl.float16, tl.float16, tl.float16, tl.float16, tl.float16, tl.float16, tl.float16), is_pure=True, pack=2)
            a = _join8(o0, o1, o2, o3, o4, o5, o6, o7).reshape(S, 2, 8, 4, 2, 2, 2, 2, 2).permute(0, 8, 2, 1, 4, 6, 7, 3, 5)
        elif BITS == 2 and not BF:
            _, c0, c1 = tl.inline_asm_elementwise(META0, MCON0, [m0], dtype=(tl.float32, tl.int32, tl.int32), is_pure=True, pack=1)
            _, c2, c3 = tl.inline_asm_elementwise(META1, MCON1, [m1], dtype=(tl.float32, tl.int32, tl.int32), is_pure=True, pack=1)
            o = tl.inline_asm_elementwise(ASM, CON, [q, _spread(c0, S, 1, 16), _spread(c1, S, 1, 16), _spread(c2, S, 1, 16), _spread(c3, S, 1, 16)],
                dtype=(tl.float16, tl.float16, tl.float16, tl.float16, tl.float16, tl.float16, tl.float16, tl.float16, tl.float16, tl.float16, tl.float16, tl.float16, tl.float16, tl.float16, tl.float16, tl.float16), is_pure=True, pack=2)
            a = tl.join(_join8(o[0], o[2], o[4], o[6], o[8], o[10], o[12], o[14]), _join8(o[1], o[3], o[5], o[7], o[9], o[11], o[13], o[15]))
            a = a.reshape(S, 8, 4, 2, 2, 2, 2, 2, 2).permute(0, 8, 1, 3, 5, 6, 7, 2, 4)
        else:
            h = tl.load(h_ptrs)
            h = tl.join(h, h).reshape(S, QW)
            _, c0, c1 = tl.inline_asm_elementwise(META0, MCON0, [m0], dtype=(tl.float32, tl.int32, tl.int32), is_pure=True, pack=1)
            _, c2, c3, c4 = tl.inline_asm_elementwise(META1, MCON1, [m1], dtype=(tl.float32, tl.int32, tl.int32, tl.int32), is_pure=True, pack=1)
            o = tl.inline_asm_elementwise(ASM, CON, [q, h, _spread(c0, S, 1, 16), _spread(c1, S, 1, 16), _spread(c2, S, 1, 16), _spread(c3, S, 1, 16), _spread(c4, S, 1, 16)],
                dtype=(tl.float16, tl.float16, tl.float16, tl.float16, tl.float16, tl.float16, tl.float16, tl.float16, tl.float16, tl.float16, tl.float16, tl.float16, tl.float16, tl.float16, tl.float16, tl.float16), is_pure=True, pack=2)
            a = tl.join(_join8(o[0], o[2], o[4], o[6], o[8], o[10], o[12], o[14]), _join8(o[1], o[3], o[5], o[7], o[9], o[11], o[13], o[15]))
            a = a.reshape(S, 8, 4, 2, 2, 2, 2, 2, 2).permute(0, 8, 1, 3, 5, 6, 7, 2, 4)
        a = a.reshape(BN, 128)
        if BF:
            a = a.to(tl.bfloat16, bitcast=True)
        acc += tl.dot(a, x.T) * scale[:, None]
        q_ptrs += QW
        h_ptrs += 64
        x_ptrs += 128
        m_ptrs += N
        s_ptrs += N
    acc *= INV
    offs = offs_m[None, :] * N + offs_n[:, None]
    mask = (offs_m < M)[None, :]
    if SPLIT == 1:
        tl.store(y_ptr + offs, acc.to(DT), mask=mask)
    else:
        tl.store(ws_ptr + pk * M * N + offs, acc, mask=mask)
        tl.debug_barrier()
        if tl.atomic_add(cnt_ptr + pn, 1, sem="acq_rel") == SPLIT - 1:
            flat_m = tl.arange(0, BM)[:, None]
            flat = flat_m * N + pn * BN + tl.arange(0, BN)[None, :]
            y = tl.zeros((BM, BN), tl.float32)
            for j in tl.static_range(SPLIT):
                y += tl.load(ws_ptr + j * M * N + flat, mask=flat_m < M, other=0.0, cache_modifier=".cg")
            tl.store(y_ptr + flat, y.to(DT), mask=flat_m < M)
            tl.store(cnt_ptr + pn, 0)


def consts(bits, bf, BM, R, WN, WK, U, CR, SPLIT, PDL, DBG=0):
    """R, WN: BN = 16 R WN; U: stages"""
    a, con, _ = unpack_asm(bits, bf)
    (m0, k0), (m1, k1) = (meta_asm(bits, bf, r, bf) for r in (0, 1))
    return dict(ASM=a, CON=con, META0=m0, META1=m1, MCON0=k0, MCON1=k1, SASM="and.b32 $0, $1, 0xffff0000;" if bf else "{ .reg .b16 l, h; mov.b32 {l, h}, $1; cvt.f32.f16 $0, h; }",
                BITS=bits, BF=bf, INV=1 / UNIT[bits, bf], BM=BM, BN=16 * R * WN, SPLIT=SPLIT, PDL=PDL)


def nw(j):
    return j["WN"]


def stages(j):
    return j["U"]


def bn(j):
    return 16 * j["R"] * j["WN"]
