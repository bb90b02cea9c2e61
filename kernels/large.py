"""``y = x @ W + bias`` for many rows of x: tensor cores that never wait for weights. Gluon, sm_90.

    y[m, n] = bias[n] + sum_k x[m, k] * round(scales[g, n] * (codes[k, n] - zeros[g, n]))

A program is one warp that copies and some groups of four warps that multiply. The copying warp brings steps of 128
columns into a ring in shared memory, words, meta and x, by the tensor copy engine. A multiplying group owns 64 rows of
W for a tile of y: it turns words into weights in its registers, a quarter of a step at a time, which are the A operand
of ``wgmma``, with x in shared memory as the B operand; while its products run, the other groups unpack.

Programs are as many as can run at once, and take tile after tile. Tiles that do not come out even, the *streamed* ones,
are cut in ranges of k for all programs or some: the program that begins a tile waits for the partial sums of those that
go on with it, all of which were started before it, and adds them in their order.

Dispatch picks it above the rows that decode kernels are for, for scales of 16 bits. Weights are rounded to the dtype of
x, as a dense weight would be. Source: this project.
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# pyright: reportAttributeAccessIssue=false, reportIndexIssue=false, reportAssignmentType=false
# (Gluon's own types are constexprs here and tensors there)

from collections.abc import Callable

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from .common import LAUNCH_DEPENDENTS, WAIT_FOR_EARLIER, barrier, do
from .launch import Map, prepare
from .operands import STRIPS, Form, load_meta, load_words, weights
from .warpgroups import (
    FLAT_LAYOUT,
    ROWS_LAYOUT,
    described,
    extent,
    first_tile,
    following,
    meet,
    next_tile,
    offsets,
    options,
    place,
    sums_layout,
)

ROOM = 225 << 10  # bytes of shared memory, beside barriers
BAND = gl.constexpr(8)  # tiles of y along M that programs take before they go on along N


class Tiles(Form):
    """What the kernel is compiled for, as one constexpr.

    Args:
        bits, bf16, scales_bf16, group_columns: As `Form` takes them.
        block_m: Rows of x of a tile: a power of two from 16 to 256.
        groups: Multiplying groups of a program, 64 rows of W each: 2, 3 or 4.
        stages: Steps in the ring.
        resident: Programs of a multiprocessor at a time: 1, or 2 of two groups and 64 rows of x at most.
        shares: Whether programs share tiles.
        bias: Whether there is one.
        pdl: Programmatic dependent launch.
    """

    def __init__(
        self, bits: int, bf16: bool, scales_bf16: bool, group_columns: int, block_m: int, groups: int, stages: int,
        resident: int, shares: bool, bias: bool, pdl: bool,
    ) -> None:  # fmt: skip
        super().__init__(bits, bf16, scales_bf16, group_columns)
        self.key += (block_m, groups, stages, resident, shares, bias, pdl)
        rows = 16 * STRIPS.value * groups
        registers, copying = (104, 32) if resident == 2 else {2: (208, 40), 3: (160, 24), 4: (112, 24)}[groups]
        stage = 256 * block_m + rows * (16 * bits + 4 * self.subgroups)
        # with more steps of 64 rows or of more groups, registers or the cache of code do not suffice
        late = block_m == 128 and groups == 2
        self.keep(
            block_m=block_m,
            out_m=block_m if stages * stage + 2 * rows * block_m <= ROOM // resident else block_m // 2,
            groups=groups,
            stages=stages,
            shares=shares,
            bias=bias,
            pdl=pdl,
            rows=rows,
            pieces=3 if groups == 3 else 1,  # of a step's words in shared memory: strips are a power of two
            registers=240 if block_m > 128 else registers,
            ahead=2 if late else 1,  # quarters on their way before the products of the step before are waited for
            unroll=4 if late else 2,  # steps between two waits for all products
            at_once=max(1, min(4, 2 * (registers - 56) // block_m - 1)),
            copying_registers=copying,
            sums_layout=sums_layout(block_m),
        )


@gluon.jit
def _cut(shares, steps, C: gl.constexpr):
    """Who has which tiles."""
    sharing, streamed = shares
    programs = gl.num_programs(0)
    if C.shares:
        return programs, sharing, streamed, steps
    return programs, programs, 0, steps  # fewer divisions


@gluon.jit
def _copy_weight(sources, ring, stage, tile_n, step, C: gl.constexpr):
    """Words and meta of a step, and how much the step is in all."""
    words, rest, meta = sources
    _, ws, rs, ms, full, _ = ring
    here = full.index(stage)
    strip = tile_n * STRIPS * C.groups
    mbarrier.expect(here, C.block_m * 256 + C.rows * (16 * C.bits + 4 * C.subgroups))
    row = step * C.subgroups if C.subgroups > 1 else step // C.group_steps
    for piece in gl.static_range(C.pieces):
        at = stage + piece * C.stages
        for v in gl.static_range(C.vectors):
            to = ws.index(at * C.vectors + v)
            tma.async_copy_global_to_shared(words, [strip + piece * STRIPS, step * 64 * C.bits + 128 * v], here, to)
        if C.bits == 3:
            tma.async_copy_global_to_shared(rest, [strip + piece * STRIPS, step * 192 + 128], here, rs.index(at))
        tma.async_copy_global_to_shared(meta, [row, tile_n * C.rows + piece * 16 * STRIPS], here, ms.index(at))


@gluon.jit
def _copy_x(x, ring, stage, tile_m, step, C: gl.constexpr):
    xs, _, _, _, full, _ = ring
    for half in gl.static_range(2):
        at = xs.index(2 * stage + half)
        tma.async_copy_global_to_shared(x, [tile_m * C.block_m, step * 128 + 64 * half], full.index(stage), at)


@gluon.jit
def _copy(copies, C: gl.constexpr):
    """The copying warp."""
    x, sources, ring, M, N, shares, steps = copies
    empty = ring[5]
    tiles_m = gl.cdiv(M, C.block_m)
    tiles_n = gl.cdiv(N, C.rows)
    p = gl.num_programs(0) - 1 - gl.program_id(0)
    cut = _cut(shares, steps, C)

    # The weight does not depend on kernels before: as much of it as the ring holds sets out at once
    tile = first_tile(p, cut)
    start, stop = extent(tile, p, cut)
    tile_m, tile_n = place(tile, tiles_m, tiles_n, BAND)
    ahead = gl.minimum(stop - start, C.stages)
    for i in range(ahead):
        _copy_weight(sources, ring, i, tile_n, start + i, C)
    if C.pdl:
        do(WAIT_FOR_EARLIER)
        do(LAUNCH_DEPENDENTS)  # what follows may count on the kernels before without waiting for this one
    for i in range(ahead):
        _copy_x(x, ring, i, tile_m, start + i, C)

    stage = ahead % C.stages
    phase = 1 - ahead // C.stages
    while tile < tiles_m * tiles_n:
        start, stop = extent(tile, p, cut)
        tile_m, tile_n = place(tile, tiles_m, tiles_n, BAND)
        for step in range(start + ahead, stop):
            mbarrier.wait(empty.index(stage), phase)
            _copy_weight(sources, ring, stage, tile_n, step, C)
            _copy_x(x, ring, stage, tile_m, step, C)
            stage, phase = following(stage, phase, C.stages)
        ahead = 0
        tile = next_tile(tile, p, cut)


@gluon.jit
def _steps(acc, stage, phase, N: gl.constexpr, ring, group: gl.constexpr, C: gl.constexpr, A: gl.constexpr):
    """N steps, a product always on its way; at the end none is, or ptxas would wait for every one."""
    xs, ws, rs, ms, full, empty = ring
    PIECE: gl.constexpr = group if C.pieces > 1 else 0  # which has my words
    WITHIN: gl.constexpr = 0 if C.pieces > 1 else group  # it, where they are
    previous = stage
    for u in gl.static_range(N):
        mbarrier.wait(full.index(stage), phase)
        at = stage + PIECE * C.stages
        q = load_words(ws, rs, at, WITHIN, C)
        m = load_meta(ms, at, WITHIN, C)
        for s in gl.static_range(4):
            a = weights(q[s], m[s * C.subgroups // 4], s, C, A)
            b = xs.index(2 * stage + s // 2).slice(32 * (s % 2), 32, dim=1).permute((1, 0))
            acc = warpgroup_mma(a, b, acc, is_async=True)
            if u > 0 and s == C.ahead - 1:
                acc = warpgroup_mma_wait(C.ahead, deps=(acc,))
                mbarrier.arrive(empty.index(previous))
        previous = stage
        stage, phase = following(stage, phase, C.stages)
    acc = warpgroup_mma_wait(0, deps=(acc,))
    mbarrier.arrive(empty.index(previous))
    return acc, stage, phase


@gluon.jit
def _halves(y, MMA: gl.constexpr):
    """The first rows of x, and the others."""
    N: gl.constexpr = y.shape[1] // 2
    L: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, N, 16])
    first, others = gl.split(y.reshape((y.shape[0], 2, N)).permute((0, 2, 1)))
    return gl.convert_layout(first, L, assert_trivial=True), gl.convert_layout(others, L, assert_trivial=True)


@gluon.jit
def _multiply(group: gl.constexpr, work, C: gl.constexpr):
    """A multiplying group."""
    ring, y, ys, bias_ptr, meeting, M, N, shares, steps = work
    workspace_ptr, counters_ptr = meeting
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, C.block_m, 16])
    A: gl.constexpr = gl.DotOperandLayout(0, mma, 2)
    SHIFT: gl.constexpr = group * C.unroll // C.groups  # groups wait in turns
    tiles_m = gl.cdiv(M, C.block_m)
    tiles_n = gl.cdiv(N, C.rows)
    p = gl.num_programs(0) - 1 - gl.program_id(0)
    cut = _cut(shares, steps, C)
    stage = 0
    phase = 0
    mine = ys.index(group)
    tile = first_tile(p, cut)
    while tile < tiles_m * tiles_n:
        # Which part of the tile is mine
        start, stop = extent(tile, p, cut)
        tile_m, tile_n = place(tile, tiles_m, tiles_n, BAND)
        first_n = (tile_n * C.groups + group) * 16 * STRIPS

        # The loop over k
        acc = gl.zeros((16 * STRIPS, C.block_m), gl.float32, mma)
        left = stop - start
        if SHIFT > 0:  # noqa: SIM102 - known when it compiles
            if left >= C.unroll:
                acc, stage, phase = _steps(acc, stage, phase, SHIFT, ring, group, C, A)
                left -= SHIFT
        for _ in range(left // C.unroll):
            acc, stage, phase = _steps(acc, stage, phase, C.unroll, ring, group, C, A)
        if C.unroll > 2:
            for _ in range(left % C.unroll // 2):
                acc, stage, phase = _steps(acc, stage, phase, 2, ring, group, C, A)
        for _ in range(left % 2):
            acc, stage, phase = _steps(acc, stage, phase, 1, ring, group, C, A)

        # Epilogue: partial sums in a fixed order
        if C.shares:
            offs = offsets(C.block_m, C.sums_layout)
            acc = meet(
                acc, group, tile, p, start, stop, cut, workspace_ptr, counters_ptr, offs, C.groups, mma, C.sums_layout,
                C.at_once,
            )  # fmt: skip

        # Store
        if start == 0:
            if C.bias:
                offs_n = first_n + gl.arange(0, 16 * STRIPS, gl.SliceLayout(1, mma))
                bias = gl.load(bias_ptr + offs_n, mask=offs_n < N, other=0.0).to(gl.float32)
                acc += gl.expand_dims(bias, 1)
            parts = _halves(acc.to(C.half), mma) if C.out_m < C.block_m else (acc.to(C.half),)
            for part in gl.static_range(len(parts)):
                tma.store_wait(0)
                barrier()
                mine.permute((1, 0)).store(parts[part])
                fence_async_shared()
                barrier()
                tma.async_copy_shared_to_global(y, [tile_m * C.block_m + part * C.out_m, first_n], mine)
        tile = next_tile(tile, p, cut)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["M", "N", "steps", "sharing", "streamed"], do_not_specialize_on_alignment=["bias_ptr"])
def large_kernel(
    x, words, rest, meta, y, bias_ptr, workspace_ptr, counters_ptr, M, N, steps, sharing, streamed, C: gl.constexpr
):
    """As many programs as there are multiprocessors, or units of work if these are fewer."""
    xs = gl.allocate_shared_memory(C.half, [2 * C.stages, C.block_m, 64], ROWS_LAYOUT)
    PIECES: gl.constexpr = C.pieces * C.stages
    ROWS: gl.constexpr = C.rows // C.pieces
    ws = gl.allocate_shared_memory(gl.int32, [C.vectors * PIECES, ROWS // 16, 128], FLAT_LAYOUT)
    rs = ws
    if C.bits == 3:
        rs = gl.allocate_shared_memory(gl.int32, [PIECES, ROWS // 16, 64], FLAT_LAYOUT)
    ms = gl.allocate_shared_memory(gl.int32, [PIECES, C.subgroups, ROWS], FLAT_LAYOUT)
    ys = gl.allocate_shared_memory(C.half, [C.groups, C.out_m, 16 * STRIPS], ROWS_LAYOUT)
    full = gl.allocate_shared_memory(gl.int64, [C.stages, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [C.stages, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(C.stages):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=C.groups)
    sources = (words, rest, meta)
    ring = (xs, ws, rs, ms, full, empty)
    meeting = (workspace_ptr, counters_ptr)
    shares = (sharing, streamed)
    work = (ring, y, ys, bias_ptr, meeting, M, N, shares, steps)
    copies = (x, sources, ring, M, N, shares, steps)
    if C.groups == 2:
        gl.warp_specialize(
            [(_multiply, (0, work, C)), (_multiply, (1, work, C)), (_copy, (copies, C))],
            [4, 1], [C.registers, C.copying_registers],
        )  # fmt: skip
    elif C.groups == 3:
        gl.warp_specialize(
            [(_multiply, (0, work, C)), (_multiply, (1, work, C)), (_multiply, (2, work, C)), (_copy, (copies, C))],
            [4, 4, 1], [C.registers, C.registers, C.copying_registers],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [(_multiply, (0, work, C)), (_multiply, (1, work, C)), (_multiply, (2, work, C)),
             (_multiply, (3, work, C)), (_copy, (copies, C))],
            [4, 4, 4, 1], [C.registers, C.registers, C.registers, C.copying_registers],
        )  # fmt: skip


def prepare_large(
    device: int, dtype: torch.dtype, bias: torch.dtype | None, *, bits: int, scales_bf16: bool, group_columns: int,
    block_m: int, groups: int, stages: int, resident: int, shares: bool, pdl: bool,
) -> Callable[..., None]:  # fmt: skip
    """Compile for these constants.

    Args:
        device: Index of the GPU.
        dtype: Of x and y: float16 or bfloat16.
        bias: Its dtype, or None.
        bits: 2, 3, 4 or 8.
        scales_bf16: Whether scales are bfloat16, not float16.
        group_columns: Columns that share a scale: 32, 64 or a multiple of 128.
        block_m: Rows of x of a tile: a power of two from 16 to 256.
        groups: Multiplying groups of a program, 64 rows of W each: 2, 3 or 4.
        stages: Steps in the ring.
        resident: Programs of a multiprocessor at a time: 1, or 2 of two groups and 64 rows of x at most.
        shares: Whether programs may share tiles of y.
        pdl: Programmatic dependent launch.

    Returns:
        ``launch(shares, stream, x, words, meta, y, bias, workspace, counters)``: a `plans.Shares` of y; x (M, K) and
        y (M, N) with rows that start at multiples of 16 bytes, words int32 (strips, steps, 64 * bits), meta int32
        (groups of columns, 16 * strips), a bias (N,) or its absence; of the workspace, 64 * groups * block_m float32 a
        program that shares tiles; of counters, ``groups`` a streamed tile, zero before and after; both None if no tile
        is shared.
    """
    C = Tiles(
        bits,
        dtype == torch.bfloat16,
        scales_bf16,
        group_columns,
        block_m,
        groups,
        stages,
        resident,
        shares,
        bias is not None,
        pdl,
    )
    subgroups, strips = max(1, 128 // group_columns), STRIPS.value * groups // C.pieces.value
    rows, flat = ROWS_LAYOUT.value, FLAT_LAYOUT.value
    boxes = [
        described(dtype, [block_m, 64], rows),
        described(torch.int32, [strips, 128], flat),
        described(torch.int32, [strips, 64], flat),
        described(torch.int32, [subgroups, 16 * strips], flat),
        described(dtype, [C.out_m.value, 64], rows),
    ]
    meeting = (torch.float32, torch.int32) if shares else (None, None)
    run = prepare(large_kernel, device, (*boxes, bias, *meeting), {"C": C}, **options(resident, pdl))

    def launch(
        shares: tuple[int, int, int], stream: int, x: Tensor, words: Tensor, meta: Tensor, y: Tensor,
        bias: Tensor | None, workspace: Tensor | None, counters: Tensor | None,
    ) -> None:  # fmt: skip
        programs, sharing, streamed = shares
        words_map = Map.of(words.view(len(words), -1))
        addresses = [None if t is None else t.data_ptr() for t in (bias, workspace, counters)]
        run(
            programs, 1, stream, Map.of(x), words_map, words_map, Map.of(meta), Map.of(y), *addresses,
            *y.shape, words.shape[1], sharing, streamed,
        )  # fmt: skip

    return launch
