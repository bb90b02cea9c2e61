"""``dx = dy @ W.T``: the gradient of a product, without W as floats in memory. Gluon, sm_90.

    dx[m, k] = sum_n dy[m, n] * (scales[g, n] * (code[k, n] - zero[g, n]))

Tiles of dx are computed transposed, W.T times dy.T: two warpgroups own a step of 128 columns k, and each of their eight
warps needs of a strip just one word a lane (README.md). It becomes weights, rounded as dequantize.py rounds them; then
``movmatrix`` turns them over, and they are the A operand of wgmma, in registers. dy.T is its B operand, in shared
memory. Another warp copies words, meta and dy there, some stages ahead, each of four strips or of twice as many.

Programs are as many as can run at once. Tiles of dx that do not come out even, the *streamed* ones, are cut in ranges
of n for all programs or some: the program that begins a tile waits for the partial sums of those that go on with it,
all of which were started before it, and adds them in their order.

Dispatch picks it on Hopper, for scales of 16 bits. Source: this project.
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# pyright: reportAttributeAccessIssue=false, reportAssignmentType=false, reportOperatorIssue=false
# (Gluon's own types are constexprs here and tensors there)

import functools
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
from .turned import STRIPS, Form, operand
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


@gluon.jit
def _copy_weight(sources, ring, slot, stage, step, F: gl.constexpr, GROUP_STEPS: gl.constexpr):
    """Words and meta of a stage, and how much the stage is in all."""
    words, low_words, meta = sources
    dy_s, words_s, low_s, meta_s, full, _ = ring
    BLOCK_M: gl.constexpr = dy_s.shape[1]
    arrived = full.index(slot)
    mbarrier.expect(arrived, 16 * F.strips * (2 * BLOCK_M + 4 * F.subgroups + 16 * F.bits))
    for b in gl.static_range(F.boxes):
        to = words_s.index(slot * F.boxes + b)
        tma.async_copy_global_to_shared(words, [stage * F.strips, step * (64 * F.bits) + b * F.width], arrived, to)
    if F.bits == 3:
        to = low_s.index(slot)
        tma.async_copy_global_to_shared(low_words, [stage * F.strips, step * 192 + 128], arrived, to)
    for b in gl.static_range(F.meta_boxes):
        row = step * F.subgroups + b * F.meta_rows if F.subgroups > 1 else step // GROUP_STEPS
        to = meta_s.index(slot * F.meta_boxes + b)
        tma.async_copy_global_to_shared(meta, [row, stage * (16 * F.strips)], arrived, to)


@gluon.jit
def _copy_dy(dy, ring, slot, stage, block, F: gl.constexpr):
    dy_s, _, _, _, full, _ = ring
    for i in gl.static_range(F.products):
        at = [block * dy_s.shape[1], (stage * F.products + i) * (16 * STRIPS)]
        tma.async_copy_global_to_shared(dy, at, full.index(slot), dy_s.index(slot * F.products + i))


@gluon.jit
def _copier(
    dy, sources, ring, shares, blocks_m, steps, F: gl.constexpr, GROUP_STEPS: gl.constexpr, GROUP_M: gl.constexpr,
    STAGES: gl.constexpr, UNIT: gl.constexpr,
):  # fmt: skip
    """One warp: everything to shared memory, as soon as there is room."""
    empty = ring[5]
    programs = gl.num_programs(0)
    p = programs - 1 - gl.program_id(0)
    sharing, streamed, units = shares
    cut = (programs, sharing, streamed, units)

    # The weight does not depend on kernels before: as much of it as the ring holds sets out at once
    tile = first_tile(p, cut)
    start, stop = extent(tile, p, cut)
    block, step = place(tile, blocks_m, steps, GROUP_M)
    ahead = gl.minimum((stop - start) * UNIT, STAGES)
    for i in range(ahead):
        _copy_weight(sources, ring, i, start * UNIT + i, step, F, GROUP_STEPS)
    do(WAIT_FOR_EARLIER)
    do(LAUNCH_DEPENDENTS)  # what follows may count on the kernels before without waiting for this one
    for i in range(ahead):
        _copy_dy(dy, ring, i, start * UNIT + i, block, F)

    slot = ahead % STAGES
    phase = 1 - ahead // STAGES
    while tile < blocks_m * steps:
        start, stop = extent(tile, p, cut)
        block, step = place(tile, blocks_m, steps, GROUP_M)
        for stage in range(start * UNIT + ahead, stop * UNIT):
            mbarrier.wait(empty.index(slot), phase)
            _copy_weight(sources, ring, slot, stage, step, F, GROUP_STEPS)
            _copy_dy(dy, ring, slot, stage, block, F)
            slot, phase = following(slot, phase, STAGES)
        ahead = 0
        tile = next_tile(tile, p, cut)


@gluon.jit
def _stages(
    acc, slot, phase, N: gl.constexpr, ring, UPPER: gl.constexpr, F: gl.constexpr, A: gl.constexpr, STAGES: gl.constexpr
):
    """N stages, products always on their way; at the end none is, or ptxas would wait for every one."""
    dy_s, words_s, low_s, meta_s, full, empty = ring
    previous = slot
    for u in gl.static_range(N):
        mbarrier.wait(full.index(slot), phase)
        for i in gl.static_range(F.products):
            a = operand(words_s, low_s, meta_s, slot, i, UPPER, F, A)
            acc = warpgroup_mma(a, dy_s.index(slot * F.products + i).permute((1, 0)), acc, is_async=True)
        if u > 0:
            acc = warpgroup_mma_wait(F.products, deps=(acc,))
            mbarrier.arrive(empty.index(previous))
        previous = slot
        slot, phase = following(slot, phase, STAGES)
    acc = warpgroup_mma_wait(0, deps=(acc,))
    mbarrier.arrive(empty.index(previous))
    return acc, slot, phase


@gluon.jit
def _multiplier(
    UPPER: gl.constexpr, dx, meeting, ring, dx_s, shares, blocks_m, steps, F: gl.constexpr, GROUP_M: gl.constexpr,
    STAGES: gl.constexpr, UNIT: gl.constexpr, R: gl.constexpr, AT_ONCE: gl.constexpr,
):  # fmt: skip
    """A warpgroup: 64 columns of each tile of dx."""
    workspace_ptr, counters_ptr = meeting
    BLOCK_M: gl.constexpr = dx_s.shape[1]
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_M, 16])
    A: gl.constexpr = gl.DotOperandLayout(0, mma, 2)
    SHIFT: gl.constexpr = UNIT // 2  # the waits of the two warpgroups lie apart
    programs = gl.num_programs(0)
    p = programs - 1 - gl.program_id(0)
    sharing, streamed, units = shares
    cut = (programs, sharing, streamed, units)
    slot = 0
    phase = 0
    out = dx_s.index(UPPER)
    offs = offsets(BLOCK_M, R)
    tile = first_tile(p, cut)
    while tile < blocks_m * steps:
        start, stop = extent(tile, p, cut)
        block, step = place(tile, blocks_m, steps, GROUP_M)
        acc = gl.zeros((64, BLOCK_M), gl.float32, mma)
        if UPPER:
            acc, slot, phase = _stages(acc, slot, phase, SHIFT, ring, UPPER, F, A, STAGES)
            for _ in range(start, stop - 1):
                acc, slot, phase = _stages(acc, slot, phase, UNIT, ring, UPPER, F, A, STAGES)
            acc, slot, phase = _stages(acc, slot, phase, UNIT - SHIFT, ring, UPPER, F, A, STAGES)
        else:
            for _ in range(start, stop):
                acc, slot, phase = _stages(acc, slot, phase, UNIT, ring, UPPER, F, A, STAGES)
        acc = meet(acc, UPPER, tile, p, start, stop, cut, workspace_ptr, counters_ptr, offs, 2, mma, R, AT_ONCE)
        if start == 0:
            tma.store_wait(0)
            barrier()
            out.permute((1, 0)).store(acc.to(F.dtype))
            fence_async_shared()
            barrier()
            tma.async_copy_shared_to_global(dx, [block * BLOCK_M, step * 128 + 64 * UPPER], out)
        tile = next_tile(tile, p, cut)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["sharing", "streamed", "blocks_m", "steps", "units"])
def transposed_kernel(
    dy, words, low_words, meta, dx, workspace_ptr, counters_ptr,
    sharing, streamed, blocks_m, steps, units,
    F: gl.constexpr, BLOCK_M: gl.constexpr, STAGES: gl.constexpr, GROUP_STEPS: gl.constexpr, GROUP_M: gl.constexpr,
    UNIT: gl.constexpr, REGISTERS: gl.constexpr, R: gl.constexpr,
):  # fmt: skip
    """Two warpgroups that multiply, one warp that copies."""
    dy_s = gl.allocate_shared_memory(F.dtype, [STAGES * F.products, BLOCK_M, 16 * STRIPS], ROWS_LAYOUT)
    words_s = gl.allocate_shared_memory(gl.int32, [STAGES * F.boxes, F.strips, F.width], FLAT_LAYOUT)
    low_s = gl.allocate_shared_memory(gl.int32, [STAGES, F.strips, 64], FLAT_LAYOUT) if F.bits == 3 else words_s
    meta_s = gl.allocate_shared_memory(gl.int32, [STAGES * F.meta_boxes, F.meta_rows, 16 * F.strips], FLAT_LAYOUT)
    dx_s = gl.allocate_shared_memory(F.dtype, [2, BLOCK_M, 64], ROWS_LAYOUT)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=2)
    fence_async_shared()
    sources = (words, low_words, meta)
    ring = (dy_s, words_s, low_s, meta_s, full, empty)
    meeting = (workspace_ptr, counters_ptr)
    shares = (sharing, streamed, units)
    AT_ONCE: gl.constexpr = 3 if BLOCK_M <= 64 and REGISTERS > 104 else 1  # sums of other programs
    gl.warp_specialize(
        [
            (_multiplier, (0, dx, meeting, ring, dx_s, shares, blocks_m, steps, F, GROUP_M, STAGES, UNIT, R, AT_ONCE)),
            (_multiplier, (1, dx, meeting, ring, dx_s, shares, blocks_m, steps, F, GROUP_M, STAGES, UNIT, R, AT_ONCE)),
            (_copier, (dy, sources, ring, shares, blocks_m, steps, F, GROUP_STEPS, GROUP_M, STAGES, UNIT)),
        ],
        [4, 1],
        [REGISTERS, 24 if REGISTERS == 240 else 40 if REGISTERS > 104 else 32],
    )  # fmt: skip


@functools.cache
def constants(
    bits: int, bf16: bool, scales_bf16: bool, group_columns: int, block_m: int, stages: int, products: int, unit: int,
    group_m: int, resident: int,
) -> dict:  # fmt: skip
    """The constexpr arguments of the kernel."""
    return {
        "F": Form(bits, bf16, scales_bf16, max(1, 128 // group_columns), products),
        "BLOCK_M": block_m,
        "STAGES": stages,
        "GROUP_STEPS": max(1, group_columns // 128),
        "GROUP_M": group_m,
        "UNIT": unit // products,
        "REGISTERS": 104 if resident == 2 else 240 if block_m == 256 else 232,
        "R": sums_layout(block_m),
    }


def descriptors(form: Form, dtype: torch.dtype, block_m: int) -> list:
    """Of dy, words, low_words, meta and dx: dtype, shape and layout of what is copied at a time, or None."""
    n, strips, low = STRIPS.value, form.strips.value, form.bits.value == 3
    return [
        (dtype, [block_m, 16 * n], ROWS_LAYOUT.value),
        (torch.int32, [strips, form.width.value], FLAT_LAYOUT.value),
        (torch.int32, [strips, 64], FLAT_LAYOUT.value) if low else None,
        (torch.int32, [form.meta_rows.value, 16 * strips], FLAT_LAYOUT.value),
        (dtype, [block_m, 64], ROWS_LAYOUT.value),
    ]


Multiply = Callable[..., None]


@functools.cache
def prepare_transposed(
    device: int, dtype: torch.dtype, *, bits: int, scales_bf16: bool, group_columns: int, block_m: int, stages: int,
    products: int, unit: int, group_m: int, resident: int,
) -> Multiply:  # fmt: skip
    """Compile for these constants.

    Args:
        device: Index of the GPU.
        dtype: Of dy and dx: float16 or bfloat16.
        bits: 2, 3, 4 or 8.
        scales_bf16: Whether scales are bfloat16, not float16.
        group_columns: Columns that share a scale: 32, 64 or a multiple of 128.
        block_m: Rows of a tile of dx: a power of two from 32 to 256.
        stages: In shared memory.
        products: Of a stage: 1 or 2, each of 64 rows of W.
        unit: Products between two waits of a warpgroup for all; programs that share a tile cut it there.
        group_m: Blocks of rows that go through the weight together.
        resident: Programs of a multiprocessor at a time: 1, or 2 of 64 rows at most.

    Returns:
        ``multiply(shares, stream, dy, words, meta, dx, workspace, counters)``: a `plans.Shares` of dx; tensors dy
        (M, N), words (strips, steps, 64 * bits), meta (groups, 16 * strips) and dx (M, columns of the tiles that are
        wanted), rows of each at multiples of 16 bytes; addresses of the workspace, 128 * block_m float32 a program that
        shares tiles, and of two zeroed int32 counters a streamed tile, which are left zeroed.
    """
    names = constants(
        bits, dtype == torch.bfloat16, scales_bf16, group_columns, block_m, stages, products, unit, group_m, resident
    )
    boxes = [box and described(*box) for box in descriptors(names["F"], dtype, block_m)]
    pointers = (*boxes, torch.float32, torch.int32)
    launch = prepare(transposed_kernel, device, pointers, names, **options(resident, pdl=True))

    def multiply(
        shares: tuple[int, int, int], stream: int, dy: Tensor, words: Tensor, meta: Tensor, dx: Tensor,
        workspace: int | None, counters: int | None,
    ) -> None:  # fmt: skip
        programs, sharing, streamed = shares
        (strips, steps, _), words_map = words.shape, Map.of(words.view(len(words), -1))
        launch(
            programs, 1, stream, Map.of(dy), words_map, words_map if bits == 3 else None, Map.of(meta), Map.of(dx),
            workspace, counters, sharing, streamed, -(-len(dy) // block_m), steps, -(-strips // (STRIPS.value * unit)),
        )  # fmt: skip

    return multiply
