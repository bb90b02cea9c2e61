"""What kernels share in which a warp copies and warpgroups multiply: places of tiles, partial sums. Gluon, sm_90."""

# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# (Gluon's own types are constexprs here and tensors there)

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.runtime.jit import MockTensor

from .common import arrive, barrier, bits_of, linear, share, wait_for

ROWS_LAYOUT = gl.constexpr(gl.NVMMASharedLayout(128, 16, 2))  # of operands and results, 64 columns of halves
FLAT_LAYOUT = gl.constexpr(gl.NVMMASharedLayout(0, 32, 2))  # of words


def sums_layout(block_m: int) -> gl.DistributedLinearLayout:
    """Of `by_registers`."""
    rows = block_m // 2
    return linear(
        [[0, 1], [0, 2], *[[4 * b, 0] for b in bits_of(rows // 4)]],
        [[0, 4 * b] for b in bits_of(32)],
        [[1, 0], [2, 0]],
        [rows, 128],
    )


def options(resident: int, pdl: bool) -> dict[str, int | bool | None]:
    """Of a launch, two programs a multiprocessor or one; of two, threads begin with few registers."""
    return {"num_warps": 4, "maxnreg": 80 if resident == 2 else None, "launch_pdl": pdl}


def described(dtype: torch.dtype, box: list[int], layout: gl.NVMMASharedLayout) -> TensorDescriptor:
    """A descriptor of tensors to compile for, of which ``box`` is copied at a time."""
    return TensorDescriptor(MockTensor(dtype), box, [box[1], 1], box, layout)


@gluon.jit
def by_registers(acc, L: gl.constexpr):
    """Sums of a warpgroup [64, BLOCK_M] in the order of its registers, so that lanes move 16 bytes."""
    BLOCK_M: gl.constexpr = acc.shape[1]
    v = acc.reshape((4, 2, 8, BLOCK_M // 8, 4, 2)).permute((3, 0, 2, 4, 1, 5)).reshape((BLOCK_M // 2, 128))
    return gl.convert_layout(v, L, assert_trivial=True)


@gluon.jit
def from_registers(v, BLOCK_M: gl.constexpr, MMA: gl.constexpr):
    """The inverse of `by_registers`."""
    acc = v.reshape((BLOCK_M // 8, 4, 8, 4, 2, 2)).permute((1, 4, 2, 0, 3, 5)).reshape((64, BLOCK_M))
    return gl.convert_layout(acc, MMA, assert_trivial=True)


@gluon.jit
def offsets(BLOCK_M: gl.constexpr, L: gl.constexpr):
    """Where `by_registers` has its elements."""
    offs = gl.expand_dims(gl.arange(0, BLOCK_M // 2, gl.SliceLayout(1, L)), 1) * 128
    return offs + gl.expand_dims(gl.arange(0, 128, gl.SliceLayout(0, L)), 0)


@gluon.jit
def place(tile, blocks_m, columns, GROUP_M: gl.constexpr):
    """Where a tile is: block of rows, column of tiles. GROUP_M blocks of rows go through the columns together.

    Plain arithmetic, which Python can follow too.
    """
    group = tile // (GROUP_M * columns)
    rows = min(blocks_m - group * GROUP_M, GROUP_M)
    within = tile - group * GROUP_M * columns
    return group * GROUP_M + within % rows, within // rows


# A cut of tiles, of so many units each: how many programs there are, how many of them share tiles, and how many tiles
# these share, which are the first. (programs, sharing, streamed, units)


@gluon.jit
def _shared(p, cut):
    """The units of streamed tiles that are program p's, if it shares any: from, to."""
    _, sharing, streamed, units = cut
    lo, hi = share(p, sharing, streamed, units)
    return min(lo, streamed * units), min(hi, streamed * units)


@gluon.jit
def first_tile(p, cut):
    """The first tile that program p has units of; the number of tiles or more: it has none."""
    _, _, streamed, units = cut
    lo, hi = _shared(p, cut)
    return lo // units if lo < hi else streamed + p


@gluon.jit
def next_tile(tile, p, cut):
    """The tile after one of program p's."""
    programs, _, streamed, units = cut
    _, hi = _shared(p, cut)
    shared = tile + 1 if (tile + 1) * units < hi else streamed + p
    return shared if tile < streamed else tile + programs


@gluon.jit
def extent(tile, p, cut):
    """The units of a tile that are program p's: from, to."""
    _, _, streamed, units = cut
    lo, hi = _shared(p, cut)
    start = max(lo - tile * units, 0)
    stop = min(hi - tile * units, units) if tile < streamed else units
    return start, stop


@gluon.jit
def others(tile, p, cut):
    """How many programs go on with a tile that program p begins: p + 1, p + 2, ..."""
    _, sharing, streamed, units = cut
    count = 0
    _, reached = share(p, sharing, streamed, units)
    while reached < (tile + 1) * units:
        count += 1
        _, reached = share(p + count, sharing, streamed, units)
    return count


@gluon.jit
def following(stage, phase, STAGES: gl.constexpr):
    """The next stage of a ring, and the parity that waits there have."""
    stage += 1
    if stage == STAGES:
        stage = 0
        phase ^= 1
    return stage, phase


@gluon.jit
def meet(
    acc, part, tile, p, start, stop, cut, workspace_ptr, counters_ptr, offs, PARTS: gl.constexpr, MMA: gl.constexpr,
    R: gl.constexpr, AT_ONCE: gl.constexpr,
):  # fmt: skip
    """Sums of a tile of several programs: one that goes on with it leaves them, the one that begins it has them all.

    A program's sums have so many parts, each of a warpgroup. Those of AT_ONCE programs are on their way together.
    """
    BLOCK_M: gl.constexpr = acc.shape[1]
    counter = counters_ptr + tile * PARTS + part
    if start > 0:  # somebody else's tile
        gl.store(workspace_ptr + (p * PARTS + part) * (64 * BLOCK_M) + offs, by_registers(acc, R))
        arrive(counter)
    elif stop < cut[3]:
        more = others(tile, p, cut)
        wait_for(counter, more)
        v = by_registers(acc, R)
        for first in range(0, more, AT_ONCE):
            sums = ()
            for j in gl.static_range(AT_ONCE):
                sums_ptrs = workspace_ptr + ((p + 1 + first + j) * PARTS + part) * (64 * BLOCK_M) + offs
                present = gl.full(offs.shape, first + j < more, gl.int1, offs.type.layout)
                sums = sums + (gl.load(sums_ptrs, mask=present, other=0.0, cache_modifier=".cg"),)
            for j in gl.static_range(AT_ONCE):
                v += sums[j]
        acc = from_registers(v, BLOCK_M, MMA)
        barrier()
        gl.store(counter, 0)
    return acc
