"""``y = x @ W + bias`` for 5 to 16 rows of x: the decode kernel's arithmetic on warpgroup products. Gluon, sm_90.

    y[m, n] = bias[n] + sum_g scales[g, n] * unit[m, g] * (sum_k codes[k, n] q[m, k] - zeros[g, n] sum_k q[m, k])

As in decode.py, x comes as two signed digits (digits.py) and codes go from memory to registers, a mask for four codes.
Here the registers are the A operand of ``wgmma``, and the digits of 8 or 16 rows, which all warps share, are its B
operand in shared memory; the sums of a step are added while the products of the next one run. The copy engine brings
digits: a thread's own copies would need a fence before products may read them, and the fence waits for the words in
flight. A program owns 16 * WARPS rows of W and one of several ranges of k; partial sums meet in a workspace, where the
program of the last range waits for the others' and adds them in a fixed order.

Groups of 64 have products of their own, two for a step, each with its scales.

Dispatch picks it for 5 to 16 rows where it beats decode.py, for scales of 16 bits. Source: this project.
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# pyright: reportAttributeAccessIssue=false
# (Gluon's own types are constexprs here and tensors there)

import functools

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait

from .common import (
    FENCE,
    LAUNCH_DEPENDENTS,
    WAIT_FOR_EARLIER,
    Text,
    add_parts,
    arrive,
    barrier,
    bits_of,
    do,
    linear,
    load_meta,
    load_words,
    opaque,
    scales_and_zeros,
    unpack,
    wait_for,
)
from .launch import Address, Launch, Map, prepare
from .warpgroups import described

DIGITS_LAYOUT = gl.constexpr(gl.NVMMASharedLayout(128, 8, 2))


@gluon.jit
def _along(t, DIM: gl.constexpr):
    """[n] to [1, ..., n, ..., 1] of five dimensions."""
    for d in gl.static_range(5):
        if d != DIM:
            t = gl.expand_dims(t, d)
    return t


@gluon.jit
def _operand(r, S: gl.constexpr, A: gl.constexpr):
    """Registers of a step, int8 [S, 32, 4] each, all 16 or those of a half, as the A operand [16 S, 128 or 64]."""
    out = r
    LEVELS: gl.constexpr = len(r).bit_length() - 1
    for level in gl.static_range(LEVELS):
        pairs = ()
        for i in gl.static_range(len(r) >> (level + 1)):
            pairs = pairs + (gl.join(out[2 * i], out[2 * i + 1]),)
        out = pairs
    # strip, g, t, byte, r8, hb, s
    if LEVELS == 4:
        a = out[0].reshape((S, 8, 4, 4, 2, 2, 2, 2)).permute((0, 4, 1, 7, 6, 5, 2, 3))
    else:
        a = out[0].reshape((S, 8, 4, 4, 2, 2, 2)).permute((0, 4, 1, 6, 5, 2, 3))
    return gl.convert_layout(a.reshape((16 * S, 8 * len(r))), A, assert_trivial=True)


@gluon.jit
def _rows_of_x(plane, ROWS: gl.constexpr, ZL: gl.constexpr, P: gl.constexpr):
    """A number for each row of x, [1, ROWS], to [1, 1, 4, ROWS // 4, 1] where sums of these rows are."""
    t = plane.load(ZL).reshape((4, ROWS // 4))
    t = gl.convert_layout(t, gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(4, P))), assert_trivial=True)
    return gl.expand_dims(gl.expand_dims(gl.expand_dims(t, 0), 1), 4)


@gluon.jit
def _rows_of_w(v0, v1, P: gl.constexpr):
    """Numbers for rows n and n + 8, [S, 8] each, to [S, 8, 1, 1, 2]."""
    t = gl.convert_layout(gl.join(v0, v1), gl.SliceLayout(2, gl.SliceLayout(3, P)), assert_trivial=True)
    return gl.expand_dims(gl.expand_dims(t, 2), 3)


@gluon.jit
def _multiply(q, digits, T: gl.constexpr, ROWS: gl.constexpr, WARPS: gl.constexpr, TURNS: gl.constexpr):
    """Start code . q over 128 columns: a product for each group taken in turn."""
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, 2 * ROWS, 32])
    A: gl.constexpr = gl.DotOperandLayout(0, mma, 4)
    registers = unpack(q, T)
    none = gl.zeros((16 * WARPS, 2 * ROWS), gl.int32, mma)
    cs = ()
    for turn in gl.static_range(TURNS):
        a = _operand(registers[16 * turn // TURNS : 16 * (turn + 1) // TURNS], WARPS, A)
        b = digits.slice(128 * turn // TURNS, 128 // TURNS, dim=1)
        cs = cs + (warpgroup_mma(a, b.permute((1, 0)), none, use_acc=False, is_async=True),)
    return cs


@gluon.jit
def _wait(cs):
    """The products, done."""
    return (warpgroup_mma_wait(0, deps=cs),) if len(cs) == 1 else warpgroup_mma_wait(0, deps=cs)


@gluon.jit
def _add(
    acc, cs, meta, sums, T: gl.constexpr, ROWS: gl.constexpr, WARPS: gl.constexpr, TURNS: gl.constexpr,
    ZL: gl.constexpr,
):  # fmt: skip
    """acc + scale * unit * (code . q - zero * sum of q): [strip, g, t, j, r8], row 4 j + t of x."""
    P: gl.constexpr = acc.type.layout
    unit = _rows_of_x(sums.slice(0, 1, dim=0), ROWS, ZL, P).to(gl.float32, bitcast=True)
    for turn in gl.static_range(TURNS):
        summed = _rows_of_x(sums.slice(1 + turn, 1, dim=0), ROWS, ZL, P)
        s0, s1, z0, z1 = scales_and_zeros(meta[turn], T)
        high, low = gl.split(cs[turn].reshape((WARPS, 2, 8, ROWS // 4, 4, 2)).permute((0, 2, 4, 3, 1, 5)))
        high = gl.convert_layout(high, P, assert_trivial=True)
        low = gl.convert_layout(low, P, assert_trivial=True)
        exact = high * 256 + low + _rows_of_w(z0, z1, P) * summed
        acc += exact.to(gl.float32) * (_rows_of_w(s0, s1, P) * unit)
    return acc


@gluon.jit
def _copy_chunk(digits, sums_ptr, sum_offs, row, staged, side, first, end):
    """Start copying the digits and sums of steps first ... end, as many as a side of shared memory has room for."""
    staged_digits, staged_sums, full = staged
    if first < end:
        mbarrier.expect(full.index(side), digits.block_type.nbytes)
        columns: gl.constexpr = staged_digits.shape[1] // staged_sums.shape[1]  # of a step
        tma.async_copy_global_to_shared(digits, [first * columns, 0], full.index(side), staged_digits.index(side))
    present = gl.expand_dims(row < end - first, 1)
    sum_ptrs = sums_ptr + (first * staged_sums.shape[2] + sum_offs)
    async_copy.async_copy_global_to_shared(staged_sums.index(side), sum_ptrs, mask=present)
    async_copy.commit_group()


@gluon.jit(
    do_not_specialize=["M", "N", "steps", "strips", "stride_ym"],
    do_not_specialize_on_alignment=["bias_ptr"],
)
def wide_kernel(
    digits, sums_ptr, words_ptr, meta_ptr, bias_ptr, y_ptr, workspace_ptr, counters_ptr,
    M, N, steps, strips, stride_ym,
    T: gl.constexpr, ROWS: gl.constexpr, WARPS: gl.constexpr, DEPTH: gl.constexpr, CHUNK: gl.constexpr,
    SPLITS: gl.constexpr, GROUP_STEPS: gl.constexpr, TURNS: gl.constexpr, PDL: gl.constexpr, L: gl.constexpr,
    ML: gl.constexpr, ZL: gl.constexpr, CL: gl.constexpr, P: gl.constexpr,
):  # fmt: skip
    """One tile of y, or of a partial sum, a program."""
    WIDTH: gl.constexpr = 2 * TURNS * ROWS  # of the sums of a step

    # Which tile is mine: strips WARPS * pid_n ..., steps lo ... hi
    pid_n = gl.program_id(0)
    pid_k = gl.program_id(1)
    split = gl.num_programs(1)
    lo = steps * pid_k // split
    hi = steps * (pid_k + 1) // split
    last = hi - 1

    # First pointers; strips past the last read it again, and are not stored
    strip = gl.minimum(pid_n * WARPS + gl.arange(0, WARPS, gl.SliceLayout(1, gl.SliceLayout(2, L))), strips - 1)
    strip = gl.expand_dims(gl.expand_dims(strip, 1), 2)
    lane = gl.expand_dims(gl.expand_dims(gl.arange(0, 32, gl.SliceLayout(0, gl.SliceLayout(2, L))), 0), 2)
    word = gl.expand_dims(gl.expand_dims(gl.arange(0, 4, gl.SliceLayout(0, gl.SliceLayout(1, L))), 0), 1)
    q_ptrs = words_ptr + (strip.to(gl.int64) * steps + lo) * T.step_words + lane * 4 + word
    strip_m = gl.minimum(pid_n * WARPS + gl.arange(0, WARPS, gl.SliceLayout(1, ML)), strips - 1)
    m_ptrs = meta_ptr + gl.expand_dims(strip_m, 1) * 16 + gl.expand_dims(gl.arange(0, 8, gl.SliceLayout(0, ML)), 0) * 2
    row = gl.arange(0, CHUNK, gl.SliceLayout(1, CL))
    sum_offs = gl.expand_dims(row, 1) * WIDTH + gl.expand_dims(gl.arange(0, WIDTH, gl.SliceLayout(0, CL)), 0)
    FLAT: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    staged_digits = gl.allocate_shared_memory(gl.int8, [2, CHUNK * 2 * ROWS, 128], DIGITS_LAYOUT)
    staged_sums = gl.allocate_shared_memory(gl.int32, [2, CHUNK, WIDTH], FLAT)
    full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for side in gl.static_range(2):
        mbarrier.init(full.index(side), count=1)
    staged = (staged_digits, staged_sums, full)
    step_digits = staged_digits._reinterpret(gl.int8, [2 * CHUNK, 2 * ROWS, 128], DIGITS_LAYOUT)
    step_sums = staged_sums._reinterpret(gl.int32, [2 * CHUNK, 2 * TURNS, ROWS], FLAT)
    q = ()
    meta = ()
    for d in gl.static_range(DEPTH):
        q = q + (load_words(q_ptrs, d, last - lo, T),)
        meta = meta + (load_meta(m_ptrs, lo + d, last, strips, 1, TURNS, GROUP_STEPS),)
    barrier()  # the mbarriers are there
    if PDL:
        do(WAIT_FOR_EARLIER)  # the weight is on its way; digits and workspace belong to the kernels before
        do(LAUNCH_DEPENDENTS)  # what follows may count on those kernels without waiting for this one
    _copy_chunk(digits, sums_ptr, sum_offs, row, staged, 0, lo, hi)
    acc = gl.zeros((WARPS, 8, 4, ROWS // 4, 2), gl.float32, P)

    # The loop over k: chunks of digits, steps
    side = 0
    phase = 0
    for chunk in range(lo, hi, CHUNK):
        async_copy.wait_group(0)
        barrier()  # all are done with the other side
        _copy_chunk(digits, sums_ptr, sum_offs, row, staged, 1 - side, chunk + CHUNK, hi)
        mbarrier.wait(full.index(side), phase)
        barrier()  # before the first read of the chunk, or the compiler adds one to every step
        for i in range(0, CHUNK if CHUNK == DEPTH else gl.minimum(CHUNK, hi - chunk), DEPTH):
            # The sums of a step are added while the products of the next run. Scales past the last step are 0
            stage = side * CHUNK + i
            step = chunk + i + DEPTH
            q_ptrs += DEPTH * T.step_words
            cs = ()
            for d in gl.static_range(DEPTH + 1):
                if d > 0:
                    done = _wait(cs)
                if d < DEPTH:
                    cs = _multiply(q[d], step_digits.index(stage + d), T, ROWS, WARPS, TURNS)
                    q = q[:d] + (load_words(q_ptrs, d, last - step, T),) + q[d + 1 :]
                    do(FENCE)  # keeps ptxas from sinking the loads
                if d > 0:
                    acc = _add(acc, done, meta[d - 1], step_sums.index(stage + d - 1), T, ROWS, WARPS, TURNS, ZL)
                    pairs = load_meta(m_ptrs, step + d - 1, last, strips, 1, TURNS, GROUP_STEPS)
                    meta = meta[: d - 1] + (pairs,) + meta[d:]
                    do(FENCE)
        phase ^= side
        side = 1 - side
    async_copy.wait_group(0)
    y = opaque(acc)  # else a bias, or none, decides how the loop's sums are vectorized, and its registers

    # Epilogue: the partial sums of all programs in a fixed order
    OUT: gl.constexpr = gl.SliceLayout(2, gl.SliceLayout(3, gl.SliceLayout(4, P)))
    in_s = _along(gl.arange(0, WARPS, gl.SliceLayout(1, OUT)), 0)
    in_g = _along(gl.arange(0, 8, gl.SliceLayout(0, OUT)), 1)
    in_t = _along(gl.arange(0, 4, gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(3, gl.SliceLayout(4, P))))), 2)
    in_j = _along(
        gl.arange(0, ROWS // 4, gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(2, gl.SliceLayout(4, P))))), 3
    )
    in_r = _along(gl.arange(0, 2, gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(2, gl.SliceLayout(3, P))))), 4)
    offs_n = (pid_n * WARPS + in_s) * 16 + 8 * in_r + in_g
    offs_m = 4 * in_j + in_t
    mine = True
    if SPLITS:
        PARTIAL: gl.constexpr = 16 * ROWS * WARPS
        part_ptrs = workspace_ptr + pid_n * PARTIAL + ((in_j * 2 + in_r) * WARPS + in_s) * 32 + in_g * 4 + in_t
        stride_part = gl.num_programs(0) * PARTIAL
        mine = pid_k == split - 1  # the last has the others' sums: it runs when all others do or have
        if mine:
            wait_for(counters_ptr + pid_n, split - 1)
            y = add_parts((y,), part_ptrs, stride_part, split - 1, 0)[0]
            barrier()
            gl.store(counters_ptr + pid_n, 0)
        else:
            gl.store(part_ptrs + pid_k * stride_part, y)
            arrive(counters_ptr + pid_n)
    if mine:
        y = y * gl.where(in_r > 0, T.higher, 1.0)
        if bias_ptr is not None:
            y += gl.load(bias_ptr + offs_n, mask=offs_n < N, other=0.0).to(gl.float32)
        y_ptrs = y_ptr + offs_m.to(gl.int64) * stride_ym + offs_n
        gl.store(y_ptrs, y.to(y_ptr.dtype.element_ty), mask=(offs_m < M) & (offs_n < N))


@functools.cache
def constants(
    bits: int, scales_bf16: bool, rows: int, warps: int, depth: int, chunk: int, splits: bool, group_columns: int,
    pdl: bool,
) -> dict:  # fmt: skip
    """The constexpr arguments of the kernel for a plan."""
    t, j, g, lanes, strips = bits_of(4), bits_of(rows // 4), bits_of(8), bits_of(32), bits_of(warps)
    turns = max(1, 128 // group_columns)
    width = 2 * turns * rows
    return {
        "T": Text(bits, scales_bf16, warpgroup=True), "ROWS": rows, "WARPS": warps, "DEPTH": depth,
        "CHUNK": chunk, "SPLITS": splits,
        "GROUP_STEPS": max(1, group_columns // 128), "TURNS": turns, "PDL": pdl,
        "L": linear([[0, 0, 1], [0, 0, 2]], [[0, b, 0] for b in lanes], [[w, 0, 0] for w in strips], [warps, 32, 4]),
        "ML": linear([], [[0, 0]] * 2 + [[0, b] for b in g], [[w, 0] for w in strips], [warps, 8]),
        "ZL": linear(
            [[0, b] for b in j], [[0, rows // 4 * b] for b in t] + [[0, 0]] * 3, [[0, 0] for _ in strips], [1, rows]
        ),
        "CL": gl.BlockedLayout([1, 4], [128 // width, width // 4], [warps, 1], [1, 0]),  # rows of as many numbers
        "P": linear(
            [[0, 0, 0, 0, 1]] + [[0, 0, 0, b, 0] for b in j],
            [[0, 0, b, 0, 0] for b in t] + [[0, b, 0, 0, 0] for b in g],
            [[w, 0, 0, 0, 0] for w in strips], [warps, 8, 4, rows // 4, 2],
        ),
    }  # fmt: skip


def prepare_wide(
    device: int, dtype: torch.dtype, bias: torch.dtype | None, *, bits: int, scales_bf16: bool, group_columns: int,
    rows: int, warps: int, depth: int, chunk: int, split: int, max_registers: int, pdl: bool,
) -> Launch:  # fmt: skip
    """Compile for these constants.

    Args:
        device: Index of the GPU.
        dtype: Of y: float16, bfloat16 or float32.
        bias: Its dtype, or None.
        bits: 2, 3, 4 or 8.
        scales_bf16: Whether scales are bfloat16, not float16.
        group_columns: Columns that share a scale: 64 or a multiple of 128.
        rows: Of x, at most: 8 or 16.
        warps: Of a program, each with a strip of 16 rows of W: 4, 8 or 16.
        depth: Steps of words in flight.
        chunk: Steps of digits staged at a time, a multiple of depth.
        split: Programs over k.
        max_registers: Of a thread.
        pdl: Programmatic dependent launch.

    Returns:
        A launch as `decode.prepare_decode` returns it, without x: M at most ``rows``, ``programs = ceil(all_strips /
        warps)``, the workspace of (split - 1) * programs * 16 * warps * rows elements.
    """
    names = constants(bits, scales_bf16, rows, warps, depth, chunk, split > 1, group_columns, pdl)
    meeting = (torch.float32, torch.int32) if split > 1 else (None, None)
    digits_box = described(torch.int8, [chunk * 2 * rows, 128], DIGITS_LAYOUT.value)
    pointers = (digits_box, *[torch.int32] * 3, bias, dtype, *meeting)
    options = {"num_warps": warps, "maxnreg": max_registers, "launch_pdl": pdl}
    run = prepare(wide_kernel, device, pointers, names, **options)

    def launch(
        programs: int, split: int, stream: int, x: None, order: None, digits: int, sums: int, words: int, meta: int,
        bias: int | None, y: int, workspace: int | None, counters: int | None,
        M: int, N: int, K: int, steps: int, strips: int, stride_xm: int, stride_ym: int,
    ) -> None:  # fmt: skip
        digits_map = Map(Address(digits), [steps * 2 * rows, 128], [128, 1])
        run(
            programs, split, stream, digits_map, sums, words, meta, bias, y, workspace, counters,
            M, N, steps, strips, stride_ym,
        )  # fmt: skip

    return launch
