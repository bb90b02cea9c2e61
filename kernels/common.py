"""What the Gluon kernels over integer digits share: PTX as one constexpr, loads that stay where they are written."""

# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# (Gluon's own types are constexprs here and tensors there)

import hashlib
from typing import Any

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from .integer_ptx import load_asm, meta_asm, product_asm, registers_asm, shift, words

barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier  # Triton 3.7, 3.6

LOAD2 = gl.constexpr(
    "{ .reg .pred on; setp.le.s32 on, $3, $4; mov.b32 $0, 0; mov.b32 $1, 0; @on ld.global.v2.b32 {$0, $1}, [$2]; }"
)
FENCE = gl.constexpr("bar.warp.sync 0xffffffff; // $0")  # memory operations do not cross it; costs one NOP
LAUNCH_DEPENDENTS = gl.constexpr("griddepcontrol.launch_dependents; // $0")
WAIT_FOR_EARLIER = gl.constexpr("griddepcontrol.wait; // $0")
WAIT_UNTIL = gl.constexpr(
    "{ .reg .pred p; .reg .b32 t; again: ld.acquire.gpu.global.b32 t, [$1]; setp.lt.s32 p, t, $2; @p bra again;"
    " mov.b32 $0, t; }"
)


class Constants:
    """What a kernel is compiled for, as one constexpr: known by its ``key``."""

    key: tuple

    def keep(self, **constants: Any) -> None:
        """Each as an attribute."""
        for name, value in constants.items():
            setattr(self, name, gl.constexpr(value))

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and other.key == self.key

    def __hash__(self) -> int:
        return hash(self.key)

    def __repr__(self) -> str:
        """What tells compiled kernels apart on disk: other releases have other text for the same key."""
        text = ", ".join(f"{name}={value}" for name, value in sorted(vars(self).items()))
        return f"{type(self).__name__}({hashlib.sha256(text.encode()).hexdigest()})"


class Text(Constants):
    """PTX and what depends on the width of the codes, as one constexpr.

    Args:
        bits: 2, 3, 4 or 8.
        scales_bf16: Whether scales are bfloat16, not float16.
        warpgroup: For products of warpgroups, whose operands are tensors of signed bytes, words four to an element.
        turns: Groups of a step that a lane takes in turn (not for warpgroups).
        chains: Of products (not for warpgroups), 1 or 2; 1 with turns.
    """

    def __init__(self, bits: int, scales_bf16: bool, *, warpgroup: bool, turns: int = 1, chains: int = 1) -> None:
        self.key = (bits, scales_bf16, warpgroup, turns, chains)
        self.bits = gl.constexpr(bits)
        self.step_words = gl.constexpr(64 * bits)
        self.pack = gl.constexpr(4 if warpgroup else 1)
        self.words = (gl.int32,) * (-(-bits // 2) if warpgroup else words(bits))
        self.registers = (gl.int8 if warpgroup else gl.int32,) * 16
        self.as_they_are = gl.constexpr(bits == 8 and not warpgroup)  # words are registers
        self.higher = gl.constexpr(2.0 ** -shift(bits))  # what sums of rows n + 8 are multiplied by
        for name, (asm, constraints) in {
            "load": load_asm(bits, addresses=4 if warpgroup else 1),
            "unpack": registers_asm(bits, signed=warpgroup),
            "meta0": meta_asm(bits, 0, scales_bf16, signed=warpgroup),
            "meta1": meta_asm(bits, 1, scales_bf16, signed=warpgroup),
            "product": product_asm(turns, chains),
        }.items():
            self.keep(**{name: asm, f"{name}_constraints": constraints})


@gluon.jit
def do(ASM: gl.constexpr):
    """One instruction a thread."""
    gl.inline_asm_elementwise(ASM, "=r", (), dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def opaque(t):
    """t, float32, which LLVM takes for new: so what its result is for does not change how it arranges a loop."""
    return gl.inline_asm_elementwise("mov.b32 $0, $1;", "=f,f", (t,), dtype=gl.float32, is_pure=True, pack=1)


@gluon.jit
def arrive(counter_ptr):
    """What all threads have stored can be read by whoever finds the counter higher by one."""
    barrier()
    gl.atomic_add(counter_ptr, 1, sem="release")


@gluon.jit
def wait_for(counter_ptr, count):
    """Wait until so many programs have arrived: ones that began before, or whose arrival waits for nothing."""
    gl.inline_asm_elementwise(WAIT_UNTIL, "=r,l,r", (counter_ptr, count), dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def add_parts(ys, ptr, by, count, STRIDE: gl.constexpr):
    """Add so many partial sums of other programs, ``by`` apart, in their order; four are on their way at once."""
    for first in range(0, count, 4):
        parts = ()
        for i in gl.static_range(4):
            part_ptr = ptr + gl.minimum(first + i, count - 1) * by
            for c in gl.static_range(len(ys)):
                parts = parts + (gl.load(part_ptr + c * STRIDE, cache_modifier=".cg"),)
        for i in gl.static_range(4):
            added = ()
            for c in gl.static_range(len(ys)):
                added = added + (gl.where(first + i < count, ys[c] + parts[i * len(ys) + c], ys[c]),)
            ys = added
    return ys


@gluon.jit
def load_words(ptrs, step, last, T: gl.constexpr):
    """The words of a strip and step, a tensor for each of a lane's words or vectors; nothing beyond the last step."""
    ptrs += step * T.step_words
    return gl.inline_asm_elementwise(
        T.load, T.load_constraints, (ptrs, step, last), dtype=T.words, is_pure=False, pack=T.pack
    )


@gluon.jit
def unpack(q, T: gl.constexpr):
    """Words to the 16 registers of a strip and step."""
    return gl.inline_asm_elementwise(
        T.unpack, T.unpack_constraints, q, dtype=T.registers, is_pure=True, pack=T.pack
    )  # fmt: skip


@gluon.jit
def load_meta(ptrs, step, last, strips, SUBGROUPS: gl.constexpr, TURNS: gl.constexpr, GROUP_STEPS: gl.constexpr):
    """The meta words of rows n and n + 8 for a step, for each group that is taken in turn; 0 beyond the last step."""
    meta = ()
    for turn in gl.static_range(TURNS):
        group = step * (SUBGROUPS * TURNS) // GROUP_STEPS + turn
        group_ptrs = ptrs + group * strips * 16
        pair = gl.inline_asm_elementwise(
            LOAD2, "=&r,=&r,l,r,r", (group_ptrs, step, last), dtype=(gl.int32, gl.int32), is_pure=False, pack=1
        )
        meta = meta + (pair,)
    return meta


@gluon.jit
def scales_and_zeros(meta, T: gl.constexpr):
    """The scales of rows n and n + 8, then their zero points, scaled as their codes are."""
    s0, z0 = gl.inline_asm_elementwise(
        T.meta0, T.meta0_constraints, (meta[0],), dtype=(gl.float32, gl.int32), is_pure=True, pack=1
    )
    s1, z1 = gl.inline_asm_elementwise(
        T.meta1, T.meta1_constraints, (meta[1],), dtype=(gl.float32, gl.int32), is_pure=True, pack=1
    )
    return s0, s1, z0, z1


def linear(registers: list, lanes: list, warps: list, shape: list) -> gl.DistributedLinearLayout:
    """A layout by the coordinates that each bit of register, lane and warp adds."""
    return gl.DistributedLinearLayout(registers, lanes, warps, [], shape)


def bits_of(size: int) -> list[int]:
    """1, 2, 4, ... below a power of two."""
    return [1 << i for i in range(size.bit_length() - 1)]


@gluon.jit
def share(p, programs, streamed, units):
    """The units of streamed tiles that are program p's: from, to."""
    total = streamed * units
    return total * p // programs, total * (p + 1) // programs


@gluon.jit
def sharers(tile, programs, streamed, units):
    """The first program that has units of a streamed tile, and how many have some."""
    total = streamed * units
    first = (programs * (tile * units + 1) - 1) // total
    return first, (programs * (tile + 1) * units - 1) // total - first + 1
