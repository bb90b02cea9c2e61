"""PTX that makes A operands of the words of kernel tiles: ``code - zero``, exactly. Text only, no Triton.

A word holds the same bit fields of four codes, a code a byte (README.md). Bytes 0 and 2, or 1 and 3, are the two
halves of a register as tensor cores take it, so nothing has to move: one LOP3 leaves a field in each half below an
exponent that makes the field's lowest bit worth 1, and the half reads ``magic + code``. Subtracting ``magic + zero``
leaves ``code - zero``. float16 has room for eight bits below its exponent, bfloat16 for seven.
"""

import functools
import struct


@functools.cache
def unpack_ptx(bits: int, bf16: bool) -> tuple[str, str]:
    """PTX that turns a word (3 bits: words A, B and C) into ``code - zero``.

    Args:
        bits: 2, 3, 4 or 8.
        bf16: Whether the halves are bfloat16, not float16.

    Returns:
        Text and constraints of an inline assembly. Outputs: 16-bit registers [field][i1][i0], fields [s][hb][r8] as far
        as they share the word or words. Inputs: those, then the words of meta of those [s][r8] (8 bits: of r8).
    """
    ptx = _Ptx(bf16)
    fields = 8 if bits == 3 else 8 // bits
    words, metas = (3, 4) if bits == 3 else (1, fields)
    outputs = 4 * fields
    inputs = [f"${outputs + i}" for i in range(words + metas)]
    halves = []
    for start in (0, 8):  # i1
        if bits == 8:
            halves.append([ptx.byte(inputs[0], start, inputs[1])])
        elif bits != 3:
            halves.append([ptx.field(inputs[0], start, bits * i, bits, inputs[1 + i]) for i in range(fields)])
        else:
            a, b, c = inputs[:3]
            meta = inputs[3:5] * 2 + inputs[5:7] * 2  # of register r
            low = [ptx.field(inputs[r // 2], start, 3 * (r % 2), 3, meta[r]) for r in range(6)]
            halves.append([*low, ptx.split_field(a, c, start, 6, meta[6]), ptx.split_field(b, c, start, 7, meta[7])])
    pairs = [pair for both in zip(*halves, strict=True) for pair in both]
    return ptx.text(pairs), ",".join(["=h"] * outputs + ["r"] * len(inputs))


@functools.cache
def weights_ptx(bits: int, bf16: bool, quarter: int, parts: int) -> tuple[str, str]:
    """PTX that turns the words of a quarter of a step, 32 columns, into ``(code - zero) * scale``, rounded.

    Args:
        bits: 2, 3, 4 or 8.
        bf16: Whether the halves are bfloat16, not float16.
        quarter: s, from 0 to 3.
        parts: Halves that a scale is the sum of: 1, or 2 where bfloat16 alone is too coarse for it.

    Returns:
        Text and constraints of an inline assembly. Outputs: 16-bit registers [hb][r8][i1][i0], of hb and r8 only what
        shares words (8 bits: neither; 4 and 2 bits: r8). Inputs: a word (3 bits: A and B, for odd quarters C too); the
        words of meta of r8 (8 bits: of one r8); for each of these, its scale in both halves, part by part.
    """
    ptx = _Ptx(bf16)
    words = 1 if bits != 3 else 2 + quarter % 2
    rows = 1 if bits == 8 else 2
    outputs = 4 * {8: 1, 4: 2, 2: 2, 3: 4}[bits]
    inputs = [f"${outputs + i}" for i in range(words + rows * (1 + parts))]
    given, meta, scales = inputs[:words], inputs[words : words + rows], inputs[words + rows :]
    halves = []
    for start in (0, 8):  # i1
        if bits == 8:
            codes = [ptx.byte(given[0], start, meta[0])]
        elif bits != 3:
            low = 4 * (quarter // 2) if bits == 2 else 0
            codes = [ptx.field(given[0], start, low + bits * r8, bits, meta[r8]) for r8 in range(2)]
        elif quarter % 2 == 0:
            codes = [ptx.field(word, start, 3 * r8, 3, meta[r8]) for word in given for r8 in range(2)]
        else:
            a, b, c = given
            codes = [ptx.field(c, start, 3 * r8, 3, meta[r8]) for r8 in range(2)]
            codes += [ptx.split_field(a, c, start, 6, meta[0]), ptx.split_field(b, c, start, 7, meta[1])]
        halves.append([ptx.times(code, *scales[i % rows * parts :][:parts]) for i, code in enumerate(codes)])
    pairs = [pair for both in zip(*halves, strict=True) for pair in both]
    return ptx.text(pairs), ",".join(["=h"] * outputs + ["r"] * len(inputs))


def scale_ptx(bf16: bool, scales_bf16: bool) -> tuple[str, str, int]:
    """PTX that takes the scale out of a word of meta. float16 has not the range to hold scales that are bfloat16.

    Returns:
        Text and constraints of an inline assembly, and how many parts it puts out: 32-bit registers with a part in
        both halves, whose sum is the scale (a bfloat16 has fewer digits than a float16).
    """
    if bf16 == scales_bf16:
        return "prmt.b32 $0, $1, $1, 0x3232;", "=r,r", 1
    convert = (
        "mov.b32 {g, h}, $2; cvt.f32.f16 s, h; cvt.rn.bf16.f32 h, s; mov.b32 $0, {h, h};"
        " mov.b32 t, {z, h}; sub.f32 s, s, t; cvt.rn.bf16.f32 h, s; mov.b32 $1, {h, h};"
    )
    return "{ .reg .b32 s, t; .reg .b16 g, h, z; mov.b16 z, 0; " + convert + " }", "=&r,=r,r", 2


def transposed_ptx(bits: int, upper: bool, bf16: bool, through_fp32: bool) -> tuple[str, str]:
    """PTX that turns a warp's words of a strip and step into an A operand of W.T: columns k as rows, n as columns.

    Warp ``2 s + hb`` of eight takes columns 32 s + 16 hb and on. ``movmatrix`` turns a register's 8 x 8 weights over.

    Args:
        bits: 2, 3, 4 or 8.
        upper: For warps of s >= 2.
        bf16: Whether the halves are bfloat16, not float16.
        through_fp32: Multiply by float32 scales, which are inputs of their own; else by those in meta, of bf16 or not.

    Returns:
        Text and constraints of an inline assembly. Outputs: 16-bit registers [i1][r8][n % 2], of rows 8 i1 + g and
        columns 8 r8 + 2 t + n % 2 of the operand. Inputs: the warp's word, or words [r8] (8 bits), or A, B, C and
        2 * (s % 2) + hb (3 bits); then meta [r8], then scales [r8] if they are float32.
    """
    ptx = _Ptx(bf16 or through_fp32)
    words = {3: 4, 8: 2}.get(bits, 1)
    inputs = [f"${8 + i}" for i in range(words + (4 if through_fp32 else 2))]
    meta, scales = inputs[words : words + 2], inputs[words + 2 :]
    word = ptx.one_of_three(*inputs[:4]) if bits == 3 else inputs[0]
    pairs = []
    for start in (0, 8):  # i1
        for r8 in range(2):
            if bits == 8:
                value = ptx.byte(inputs[r8], start, meta[r8])
            else:
                value = ptx.field(word, start, bits * r8 + 4 * (bits == 2 and upper), bits, meta[r8])
            if through_fp32:
                low, high = ptx.emit("shl.b32", value, 16), ptx.emit("and.b32", value, 0xFFFF0000)
                products = [ptx.emit("mul.f32", part, scales[r8]) for part in (high, low)]
                value = ptx.emit(f"cvt.rn.{'bf16x2' if bf16 else 'f16x2'}.f32", *products)
            else:
                value = ptx.times(value, ptx.emit("prmt.b32", meta[r8], 0, "0x3232"))
            pairs.append(ptx.emit("movmatrix.sync.aligned.m8n8.trans.b16", value))
    return ptx.text(pairs), ",".join(["=h"] * 8 + ["r"] * (len(inputs) - len(scales)) + ["f"] * len(scales))


class _Ptx:
    """Instructions under construction: each operation returns the register of its result; equal ones are one."""

    def __init__(self, bf16: bool):
        self.bf16 = bf16
        self.digits = 7 if bf16 else 10  # below the leading one
        self.registers: dict[tuple[str, ...], str] = {}

    def text(self, pairs: list[str]) -> str:
        """The whole; pairs of halves become outputs last, so that none is written before an input is read."""
        moves = [f"mov.b32 {{${2 * i}, ${2 * i + 1}}}, {pair};" for i, pair in enumerate(pairs)]
        body = [f"{op} {name}, {', '.join(rest)};" for (op, *rest), name in self.registers.items()]
        return "\n".join(["{", f".reg .b32 t<{len(self.registers)}>;", *body, *moves, "}"])

    def emit(self, operation: str, *operands: str | int) -> str:
        key = (operation, *(v if isinstance(v, str) else f"{v:#x}" for v in operands))
        return self.registers.setdefault(key, f"t{len(self.registers)}")

    def both(self, value: float) -> int:
        """A number in both halves."""
        packed = struct.pack(">f" if self.bf16 else ">e", value)
        return int.from_bytes(packed[:2], "big") * 0x10001

    def shift(self, word: str, amount: int) -> str:
        return self.emit("shr.b32", word, amount) if amount else word

    def select(self, word: str, mask: int, under: str | int) -> str:
        return self.emit("lop3.b32", word, mask * 0x10001, under, 0xEA)  # word & mask | under

    def constant(self, value: float) -> str:
        return self.emit("mov.b32", self.both(value))

    def plus(self, a: str, b: str) -> str:
        if self.bf16:  # add.bf16x2 needs sm_90
            return self.emit("fma.rn.bf16x2", a, self.constant(1), b)
        return self.emit("add.f16x2", a, b)

    def minus(self, a: str, b: str) -> str:
        if self.bf16:
            return self.emit("fma.rn.bf16x2", b, self.constant(-1), a)
        return self.emit("sub.f16x2", a, b)

    def times(self, value: str, scale: str, rest: str | None = None) -> str:
        """``value * (scale + rest)``, rounded once but for a hair."""
        kind = "bf16x2" if self.bf16 else "f16x2"  # for bfloat16, sm_90
        if rest is None:
            return self.emit(f"mul.{kind}", value, scale)
        return self.emit(f"fma.rn.{kind}", value, scale, self.emit(f"mul.{kind}", value, rest))

    def one_of_three(self, a: str, b: str, c: str, which: str) -> str:
        """Three bits: a word whose bytes hold registers 2 which and 2 which + 1 of the eight, the later one higher."""
        sixth = self.emit("lop3.b32", self.shift(a, 5), 0x06060606, self.masked(self.shift(c, 6), 0x01010101), 0xEA)
        seventh = self.emit("lop3.b32", self.shift(b, 2), 0x30303030, self.masked(self.shift(c, 4), 0x08080808), 0xEA)
        word = self.emit("or.b32", sixth, seventh)
        for i, other in ((3, c), (2, b), (1, a)):  # slct: the first where the last is not negative
            word = self.emit("slct.b32.s32", word, other, self.emit("sub.s32", which, i))
        return word

    def masked(self, word: str, mask: int) -> str:
        return self.emit("and.b32", word, mask)

    def minus_zero(self, value: str, low: int, meta: str) -> str:
        """``value`` less its magic and the zero point, the lowest byte of ``meta``."""
        top, magic = 2.0**self.digits, 2.0 ** (self.digits - low)
        zero = self.emit("prmt.b32", meta, self.both(top) >> 8 & 0xFF, "0x4040")  # top + zero
        return self.minus(value, self.plus(zero, self.constant(magic - top)) if low else zero)

    def place(self, start: int, low: int, bits: int) -> tuple[int, int, int]:
        """Shift and new lowest bit that bring a field below the exponent; the magic that makes that bit worth 1."""
        excess = max(0, low + bits - self.digits)
        return start + excess, low - excess, self.both(2.0 ** (self.digits - low + excess))

    def field(self, word: str, start: int, low: int, bits: int, meta: str) -> str:
        """Code - zero of bits [start + low, start + low + bits) of each half."""
        amount, low, magic = self.place(start, low, bits)
        return self.minus_zero(self.select(self.shift(word, amount), (1 << bits) - 1 << low, magic), low, meta)

    def split_field(self, upper: str, lower: str, start: int, bit: int, meta: str) -> str:
        """Three bits: bits 6 and 7 of ``upper``, above one of ``lower``."""
        amount, low, magic = self.place(start, 5, 3)
        part = self.select(self.shift(upper, amount), 6 << low, magic)
        return self.minus_zero(self.select(self.shift(lower, start + bit - low), 1 << low, part), low, meta)

    def byte(self, word: str, start: int, meta: str) -> str:
        """Code - zero of eight bits."""
        places = "0x4341" if start else "0x4240"
        if not self.bf16:
            return self.minus_zero(self.emit("prmt.b32", word, 0x64, places), 0, meta)
        # no room below an exponent, but eight bits alone are a number below or just above the smallest normal one:
        # as many times 2**-133, which no one factor undoes
        code = self.scaled(self.emit("prmt.b32", word, 0, places), 2.0**127)
        zero = self.scaled(self.emit("prmt.b32", meta, 0, "0x4040"), 2.0**127)
        return self.emit("fma.rn.bf16x2", code, self.constant(64), self.scaled(zero, -64))

    def scaled(self, value: str, factor: float) -> str:
        """bfloat16: value * factor."""
        return self.emit("fma.rn.bf16x2", value, self.constant(factor), self.constant(-0.0))
