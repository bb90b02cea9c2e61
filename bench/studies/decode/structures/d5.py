"""v1: LDG weights straight to registers, x ring by cp.async, warps WN x WK, R strips a warp, depth U."""
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy as cp, mma_v2
from unpack_gl import asm, affine

CFG = {}
for b in (8, 4, 3, 2):
    for h in (False, True):
        CFG[b, h] = asm(b, h)


@gluon.jit
def join4(a, b, c, d):
    return gl.join(gl.join(a, c), gl.join(b, d))


@gluon.jit
def join8(o0, o1, o2, o3, o4, o5, o6, o7):
    return gl.join(join4(o0, o2, o4, o6), join4(o1, o3, o5, o7))


@gluon.jit
def chunks(q, BITS: gl.constexpr, WK: gl.constexpr, S: gl.constexpr):
    """words of 128 columns -> words of columns 0..63 and 64..127"""
    if BITS == 8:
        lo, hi = gl.split(q.reshape((WK, S, 2, 256)).permute((0, 1, 3, 2)))
    elif BITS == 4:
        lo, hi = gl.split(q.reshape((WK, S, 2, 128)).permute((0, 1, 3, 2)))
    else:
        lo, hi = gl.split(q.reshape((WK, S, 32, 2, 2)).permute((0, 1, 2, 4, 3)))
        lo = lo.reshape((WK, S, 64))
        hi = hi.reshape((WK, S, 64))
    return lo, hi


@gluon.jit
def unpack(q, h, ASM: gl.constexpr, CON: gl.constexpr, BITS: gl.constexpr, BF: gl.constexpr, WK: gl.constexpr, S: gl.constexpr, L: gl.constexpr):
    """words of 64 columns -> A operand(s) [WK, 16 S, 64] (two for 8-bit bf16: low and high nibble)"""
    if BITS == 8 and not BF:
        o = gl.inline_asm_elementwise(ASM, CON, [q], dtype=(gl.float16, gl.float16, gl.float16, gl.float16), is_pure=True, pack=2)
        a = join4(o[0], o[1], o[2], o[3]).reshape((WK, S, 2, 8, 4, 2, 2, 2, 2)).permute((0, 1, 8, 3, 2, 5, 7, 4, 6))
        lo = gl.convert_layout(a.reshape((WK, S * 16, 64)), L, assert_trivial=True)
        hi = lo
    elif BITS == 8:
        o = gl.inline_asm_elementwise(ASM, CON, [q], dtype=(gl.float16, gl.float16, gl.float16, gl.float16, gl.float16, gl.float16, gl.float16, gl.float16), is_pure=True, pack=2)
        a = join4(o[0], o[2], o[4], o[6]).reshape((WK, S, 2, 8, 4, 2, 2, 2, 2)).permute((0, 1, 8, 3, 2, 5, 7, 4, 6))
        lo = gl.convert_layout(a.reshape((WK, S * 16, 64)), L, assert_trivial=True)
        a = join4(o[1], o[3], o[5], o[7]).reshape((WK, S, 2, 8, 4, 2, 2, 2, 2)).permute((0, 1, 8, 3, 2, 5, 7, 4, 6))
        hi = gl.convert_layout(a.reshape((WK, S * 16, 64)), L, assert_trivial=True)
    elif BITS == 4:
        o = gl.inline_asm_elementwise(ASM, CON, [q], dtype=(gl.float16, gl.float16, gl.float16, gl.float16, gl.float16, gl.float16, gl.float16, gl.float16), is_pure=True, pack=2)
        a = join8(o[0], o[1], o[2], o[3], o[4], o[5], o[6], o[7]).reshape((WK, S, 8, 4, 2, 2, 2, 2, 2)).permute((0, 1, 8, 2, 4, 6, 7, 3, 5))
        lo = gl.convert_layout(a.reshape((WK, S * 16, 64)), L, assert_trivial=True)
        hi = lo
    else:
        if BITS == 2:
            o = gl.inline_asm_elementwise(ASM, CON, [q], dtype=(gl.float16, gl.float16, gl.float16, gl.float16, gl.float16, gl.float16, gl.float16, gl.float16, gl.float16, gl.float16, gl.float16, gl.float16, gl.float16, gl.float16, gl.float16, gl.float16), is_pure=True, pack=2)
        else:
            h = gl.convert_layout(gl.join(h, h).reshape((WK, S, 64)), q.type.layout, assert_trivial=True)
            o = gl.inline_asm_elementwise(ASM, CON, [q, h], dtype=(gl.float16, gl.float16, gl.float16, gl.float16, gl.float16, gl.float16, gl.float16, gl.float16, gl.float16, gl.float16, gl.float16, gl.float16, gl.float16, gl.float16, gl.float16, gl.float16), is_pure=True, pack=2)
        a = gl.join(join8(o[0], o[2], o[4], o[6], o[8], o[10], o[12], o[14]), join8(o[1], o[3], o[5], o[7], o[9], o[11], o[13], o[15]))
        a = a.reshape((WK, S, 8, 4, 2, 2, 2, 2, 2)).permute((0, 1, 8, 2, 5, 6, 7, 3, 4))
        lo = gl.convert_layout(a.reshape((WK, S * 16, 64)), L, assert_trivial=True)
        hi = lo
    if BF:
        lo = lo.to(gl.bfloat16, bitcast=True)
        hi = hi.to(gl.bfloat16, bitcast=True)
    return lo, hi


FENCE = gl.constexpr("bar.warp.sync 0xffffffff; // $0")
LD4 = gl.constexpr("ld.global.L1::no_allocate.v4.b32 {$0, $1, $2, $3}, [$4];")
LD2 = gl.constexpr("ld.global.L1::no_allocate.v2.b32 {$0, $1}, [$2];")
LD1 = gl.constexpr("ld.global.b32 $0, [$1];")


@gluon.jit
def ldw4(p):
    return gl.inline_asm_elementwise(LD4, "=r,=r,=r,=r,l,l,l,l", [p], dtype=gl.int32, is_pure=False, pack=4)


@gluon.jit
def ldw2(p):
    return gl.inline_asm_elementwise(LD2, "=r,=r,l,l", [p], dtype=gl.int32, is_pure=False, pack=2)


@gluon.jit
def ldw1(p):
    return gl.inline_asm_elementwise(LD1, "=r,l", [p], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def rows(v, WK: gl.constexpr, R: gl.constexpr, WN: gl.constexpr, BM: gl.constexpr):
    """[WK, 16 R WN, BM] -> rows r8 = 0 and r8 = 1, each [WK, R, WN, 8, BM]"""
    return gl.split(v.reshape((WK, R, WN, 2, 8, BM)).permute((0, 1, 2, 4, 5, 3)))


def meta_asm(bf):
    s = "{ .reg .b16 l, h; mov.b32 {l, h}, $2; cvt.f32.f16 $1, l; "
    return s + ("and.b32 $0, $2, 0xffff0000; }" if bf else "cvt.f32.f16 $0, h; }")


@gluon.jit
def scale_zero(m, MASM: gl.constexpr, P: gl.constexpr):
    s, z = gl.inline_asm_elementwise(MASM, "=&r,=&r,r", [m], dtype=(gl.float32, gl.float32), is_pure=True, pack=1)
    s = gl.expand_dims(gl.convert_layout(s, gl.SliceLayout(4, P), assert_trivial=True), 4)
    z = gl.expand_dims(gl.convert_layout(z, gl.SliceLayout(4, P), assert_trivial=True), 4)
    return s, z


@gluon.jit
def group(acc0, acc1, q, h, sz, xs, ones, ASM: gl.constexpr, MASM: gl.constexpr, CON: gl.constexpr, BITS: gl.constexpr, BF: gl.constexpr, UNIT: gl.constexpr, O0: gl.constexpr, O1: gl.constexpr,
          MIX: gl.constexpr, WK: gl.constexpr, R: gl.constexpr, WN: gl.constexpr, BM: gl.constexpr, mma: gl.constexpr):
    """acc += scale * (codes - zero) . x over the 128 columns of one group"""
    AL: gl.constexpr = gl.DotOperandLayout(0, mma, 2)
    BL: gl.constexpr = gl.DotOperandLayout(1, mma, 2)
    P: gl.constexpr = acc0.type.layout
    S: gl.constexpr = R * WN
    p = gl.zeros((WK, 16 * S, BM), gl.float32, mma)
    c = gl.zeros((WK, 16 * WN, BM), gl.float32, mma)
    qc = chunks(q, BITS, WK, S)
    hc = qc
    if BITS == 3:
        hc = gl.split(h.reshape((WK, S, 32, 2)))
    for i in gl.static_range(2):
        x = xs.slice(64 * i, 64, dim=2).permute((0, 2, 1)).load(BL)
        lo, hi = unpack(qc[i], hc[i], ASM, CON, BITS, BF, WK, S, AL)
        c = mma_v2(ones, x, c)
        p = mma_v2(lo, x, p)
        if BITS == 8 and BF:
            p = mma_v2(hi, x, p)
    p0, p1 = rows(p, WK, R, WN, BM)
    so, sx = gl.split(c.reshape((WK, WN, 2, 8, BM)).permute((0, 1, 3, 4, 2)))
    so = gl.expand_dims(gl.convert_layout(so, gl.SliceLayout(1, P), assert_trivial=True), 1)
    sx = gl.expand_dims(gl.convert_layout(sx, gl.SliceLayout(1, P), assert_trivial=True), 1)
    m0, m1 = gl.split(sz.reshape((WK, R, WN, 2, 8)).permute((0, 1, 2, 4, 3)))
    s0, z0 = scale_zero(m0, MASM, P)
    s1, z1 = scale_zero(m1, MASM, P)
    if MIX:
        acc0 += (p0 - so - (z0 * UNIT) * sx) * s0
        acc1 += (p1 - so * O1 - (z1 * UNIT) * sx) * s1
    else:
        acc0 += (p0 - (z0 * UNIT + O0) * sx) * s0
        acc1 += (p1 - (z1 * UNIT + O1) * sx) * s1
    return acc0, acc1


@gluon.jit
def d5(x_ptr, q_ptr, h_ptr, sz_ptr, y_ptr, ws_ptr, cnt_ptr, M, N, K, stride_xm,
       ASM: gl.constexpr, MASM: gl.constexpr, CON: gl.constexpr, BITS: gl.constexpr, BF: gl.constexpr, UNIT: gl.constexpr, O0: gl.constexpr, O1: gl.constexpr, MIX: gl.constexpr,
       BM: gl.constexpr, R: gl.constexpr, WN: gl.constexpr, WK: gl.constexpr, U: gl.constexpr, CR: gl.constexpr, SPLIT: gl.constexpr, PDL: gl.constexpr, DBG: gl.constexpr,
       QRL: gl.constexpr, HRL: gl.constexpr, XL: gl.constexpr, Y3: gl.constexpr):
    mma: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [WK, WN, 1], [1, 16, 8])
    AL: gl.constexpr = gl.DotOperandLayout(0, mma, 2)
    BL: gl.constexpr = gl.DotOperandLayout(1, mma, 2)
    DT: gl.constexpr = gl.bfloat16 if BF else gl.float16
    LB: gl.constexpr = 2 if BITS == 3 else BITS
    QW: gl.constexpr = 64 * LB
    HW: gl.constexpr = 64
    S: gl.constexpr = R * WN
    BN: gl.constexpr = 16 * S
    if PDL:
        gl.inline_asm_elementwise("griddepcontrol.launch_dependents; // dummy $0", "=r", [], dtype=gl.int32, is_pure=False, pack=1)
    pn = gl.program_id(0)
    pk = gl.program_id(1)
    NG = K // 128
    NR = (NG + WK - 1) // WK
    lo = (NR * pk) // SPLIT
    hi = (NR * (pk + 1)) // SPLIT
    last = gl.minimum(hi * WK, NG)  # first group that is not ours

    # pointers: the k part (kq, km) stays within our groups, so that nothing is masked; x is zero beyond them
    Q1: gl.constexpr = gl.SliceLayout(2, QRL)
    kq = gl.expand_dims(gl.expand_dims(gl.arange(0, WK, gl.SliceLayout(1, Q1)), 1), 2) + lo * WK
    sq = gl.expand_dims(gl.expand_dims(gl.arange(0, S, gl.SliceLayout(0, Q1)), 0), 2)
    wq = gl.expand_dims(gl.expand_dims(gl.arange(0, QW, gl.SliceLayout(0, gl.SliceLayout(1, QRL))), 0), 1)
    qp = q_ptr + ((pn * S).to(gl.int64) + sq) * (K * LB // 2) + wq
    H1: gl.constexpr = gl.SliceLayout(2, HRL)
    kh = gl.expand_dims(gl.expand_dims(gl.arange(0, WK, gl.SliceLayout(1, H1)), 1), 2) + lo * WK
    sh = gl.expand_dims(gl.expand_dims(gl.arange(0, S, gl.SliceLayout(0, H1)), 0), 2)
    wh = gl.expand_dims(gl.expand_dims(gl.arange(0, HW, gl.SliceLayout(0, gl.SliceLayout(1, HRL))), 0), 1)
    hp = h_ptr + ((pn * S).to(gl.int64) + sh) * (K // 2) + wh
    ML: gl.constexpr = gl.SliceLayout(2, mma)
    km = gl.expand_dims(gl.arange(0, WK, gl.SliceLayout(1, ML)), 1) + lo * WK
    nm = gl.expand_dims(gl.arange(0, BN, gl.SliceLayout(0, ML)), 0)
    mp = sz_ptr + (pn * BN + nm)
    X1: gl.constexpr = gl.SliceLayout(2, XL)
    kx = gl.expand_dims(gl.expand_dims(gl.arange(0, CR * WK, gl.SliceLayout(1, X1)), 1), 2) + lo * WK
    mx = gl.expand_dims(gl.expand_dims(gl.arange(0, BM, gl.SliceLayout(0, X1)), 0), 2)
    cx = gl.expand_dims(gl.expand_dims(gl.arange(0, 128, gl.SliceLayout(0, gl.SliceLayout(1, XL))), 0), 1)
    xp = x_ptr + mx * stride_xm + (kx * 128 + cx)
    SL: gl.constexpr = gl.SwizzledSharedLayout(8, 1, 8, [2, 1, 0])
    xs = gl.allocate_shared_memory(DT, [2, CR * WK, BM, 128], SL)
    xv = xs._reinterpret(DT, [2 * CR, WK, BM, 128], SL)

    # prefetch
    qb = ()
    hb = ()
    mb = ()
    for u in gl.static_range(U):
        qb = qb + (ldw4(qp + gl.minimum(kq, last - 1) * QW),)
        if BITS == 3:
            hb = hb + (ldw2(hp + gl.minimum(kh, last - 1) * HW),)
        else:
            hb = hb + (0,)
        mb = mb + (ldw1(mp + gl.minimum(km, last - 1) * N),)
        kq += WK
        kh += WK
        km += WK
    if PDL:
        gl.inline_asm_elementwise("griddepcontrol.wait; // dummy $0", "=r", [], dtype=gl.int32, is_pure=False, pack=1)
    cp.async_copy_global_to_shared(xs.index(0), xp, mask=(mx < M) & (kx < last))
    cp.commit_group()

    # constant A: rows r8 = 0 weigh the offsets of the unpacked values, rows r8 = 1 are ones
    ones = gl.full((WK, 16 * WN, 64), 1.0, DT, AL)
    if MIX:
        big = gl.full((WK, WN, 8, 4, 8), 16.0, DT, gl.BlockedLayout([1, 1, 1, 4, 2], [1, 1, 8, 1, 4], [WK, WN, 1, 1, 1], [4, 3, 2, 1, 0]))
        oo = gl.full((WK, WN, 8, 4, 8), 1.0, DT, gl.BlockedLayout([1, 1, 1, 4, 2], [1, 1, 8, 1, 4], [WK, WN, 1, 1, 1], [4, 3, 2, 1, 0]))
        pat = gl.join(gl.join(oo, big), gl.join(oo, oo))       # wk wn g s tk | k3 r8
        pat = pat.permute((0, 1, 6, 2, 3, 5, 4)).reshape((WK, 16 * WN, 64))
        ones = gl.convert_layout(pat, AL, assert_trivial=True)
    a0, a1 = rows(gl.zeros((WK, BN, BM), gl.float32, mma), WK, R, WN, BM)

    buf = 0
    tq = qb[0]
    tm = mb[0]
    for c in range(lo, hi, CR):
        cp.wait_group(0)
        gl.thread_barrier()
        xp += CR * WK * 128
        kx += CR * WK
        cp.async_copy_global_to_shared(xs.index(1 - buf), xp, mask=(mx < M) & (kx < last))
        cp.commit_group()
        gl.thread_barrier()
        n = gl.minimum(CR, hi - c)
        for i in range(0, n, U):
            for u in gl.static_range(U):
                if i + u < n:  # a branch and a fence keep the compiler from delaying the loads to the end of the body
                    if DBG == 1:
                        tq ^= qb[u]
                        tm ^= mb[u]
                    else:
                      a0, a1 = group(a0, a1, qb[u], hb[u], mb[u], xv.index(buf * CR + i + u), ones, ASM, MASM, CON, BITS, BF, UNIT, O0, O1, MIX, WK, R, WN, BM, mma)
                if DBG == 2:
                    qb = qb[:u] + (qb[u] ^ i,) + qb[u + 1:]
                else:
                    qb = qb[:u] + (ldw4(qp + gl.minimum(kq, last - 1) * QW),) + qb[u + 1:]
                if BITS == 3:
                    hb = hb[:u] + (ldw2(hp + gl.minimum(kh, last - 1) * HW),) + hb[u + 1:]
                if DBG < 2:
                  mb = mb[:u] + (ldw1(mp + gl.minimum(km, last - 1) * N),) + mb[u + 1:]
                kq += WK
                kh += WK
                km += WK
                gl.inline_asm_elementwise(FENCE, "=r", [], dtype=gl.int32, is_pure=False, pack=1)
        buf = 1 - buf
    cp.wait_group(0)
    if DBG == 1:
        gl.store(ws_ptr + wq + sq + kq, tq.to(gl.float32), mask=tq == 0x1234567)
        gl.store(ws_ptr + nm + km, tm.to(gl.float32), mask=tm == 0x1234567)

    # sum over the warps that share rows, through shared memory laid out [k warp, m, n]
    RSL: gl.constexpr = gl.SwizzledSharedLayout(8, 2, 4, [2, 1, 0])
    red = gl.allocate_shared_memory(gl.float32, [WK, BM, BN], RSL)
    acc = gl.join(a0, a1).permute((0, 1, 2, 5, 3, 4)).reshape((WK, BN, BM))
    acc = gl.convert_layout(acc, mma, assert_trivial=True) * (1.0 / UNIT)
    red.permute((0, 2, 1)).store(acc)
    gl.thread_barrier()
    out = gl.sum(red.load(Y3), 0)
    YL: gl.constexpr = gl.SliceLayout(0, Y3)
    om = gl.expand_dims(gl.arange(0, BM, gl.SliceLayout(1, YL)), 1)
    on = gl.expand_dims(pn * BN + gl.arange(0, BN, gl.SliceLayout(0, YL)), 0)
    off = om * N + on
    msk = om < M
    if SPLIT == 1:
        gl.store(y_ptr + off, out.to(DT), mask=msk)
    else:
        gl.store(ws_ptr + pk * M * N + off, out, mask=msk)
        gl.thread_barrier()
        n = gl.atomic_add(cnt_ptr + pn, 1, sem="acq_rel")
        if n == SPLIT - 1:
            t = gl.load(ws_ptr + off, mask=msk, other=0., cache_modifier=".cg")
            for j in gl.static_range(1, SPLIT):
                t += gl.load(ws_ptr + j * M * N + off, mask=msk, other=0., cache_modifier=".cg")
            gl.store(y_ptr + off, t.to(DT), mask=msk)
            gl.store(cnt_ptr + pn, 0)


def ylayout(WK, BN, nw):
    tn = min(32, BN // 4)
    return gl.BlockedLayout([WK, 1, 4], [1, 32 // tn, tn], [1, nw, 1], [2, 1, 0])


def layouts(bits, R, WN, WK):
    lb = 2 if bits == 3 else bits

    def lay(W, v):
        reg, c = [], 1
        while c < v:
            reg.append([0, 0, c]); c *= 2
        lane = []
        for _ in range(5):
            lane.append([0, 0, c]); c *= 2
        while c < W:
            reg.append([0, 0, c]); c *= 2
        warp, r = [], 1
        while r < WN:
            warp.append([0, r, 0]); r *= 2
        while r < R * WN:
            reg.append([0, r, 0]); r *= 2
        r = 1
        while r < WK:
            warp.append([r, 0, 0]); r *= 2
        return gl.DistributedLinearLayout(reg, lane, warp, [], [WK, R * WN, W])

    XL = gl.BlockedLayout([1, 1, 8], [1, 2, 16], [WK, WN, 1], [2, 1, 0])
    return lay(64 * lb, 4), lay(64, 2), XL


def consts(bits, bf, BM, R, WN, WK, U, CR, SPLIT, PDL, DBG=0):
    a, con, _ = CFG[bits, bf]
    unit, (o0, o1), mix = affine(bits, bf)
    Q, H, X = layouts(bits, R, WN, WK)
    return dict(ASM=a, MASM=meta_asm(bf), CON=con, BITS=bits, BF=bf, UNIT=unit, O0=o0, O1=o1, MIX=mix, BM=BM, R=R, WN=WN, WK=WK, U=U, CR=CR, SPLIT=SPLIT, PDL=PDL, DBG=DBG, QRL=Q, HRL=H, XL=X, Y3=ylayout(WK, 16 * R * WN, WN * WK))
