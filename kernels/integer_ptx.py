"""PTX of the decode product: words to byte registers, registers times digits of x to fp32 sums. Text only, no Triton.

A register holds codes as unsigned bytes, rows n + 8 of a strip times ``2**shift(bits)`` (`gptq_triton/layout.py`), so a
mask is all the unpacking there is. The other factor is x in two signed digits to the base 256 (`digits.py`):
``mma.m16n8k32`` multiplies and adds exactly in int32.
"""


def shift(bits: int) -> int:
    """The codes of rows n + 8 are multiplied by two to this power in a register."""
    return bits % 8


def words(bits: int) -> int:
    """Words of a lane, strip and step."""
    return 2 * bits


def load_asm(bits: int, addresses: int = 1) -> tuple[str, str]:
    """The words of a lane, strip and step, padded to whole vectors.

    Inputs addresses, a step, the last step that there is, so many times each; the first counts. Beyond the last step
    nothing is loaded: a program ends when all that it loads has arrived.
    """
    n = words(bits)
    whole = -(-n // 4) * 4 if addresses > 1 else n
    # a vector of all lanes, then the next one
    load = "@on ld.global.L1::no_allocate.v{}.b32 {{{}}}, [{}];"
    lines = [
        load.format(4, ", ".join(f"${first + i}" for i in range(4)), f"${whole} + {first * 128}")
        for first in range(0, n - n % 4, 4)
    ]
    if n % 4:  # the lanes of a shorter vector are closer together
        lines.insert(0, f".reg .b32 l; .reg .b64 p; mov.u32 l, %laneid; mul.wide.u32 p, l, 8; sub.s64 p, ${whole}, p;")
        lines.append(load.format(2, f"${n - 2}, ${n - 1}", f"p + {(n - 2) * 128}"))
        lines += [f"mov.b32 ${i}, 0;" for i in range(n, whole)]
    lines.insert(0, f".reg .pred on; setp.le.s32 on, ${whole + addresses}, ${whole + 2 * addresses};")
    inputs = ["l"] * addresses + ["r"] * (2 * addresses)
    return "{ " + " ".join(lines) + " }", ",".join(["=&r"] * whole + inputs)


def registers_asm(bits: int, *, signed: bool = False) -> tuple[str, str]:
    """Outputs the 16 registers in the order [s][hb][r8], inputs the words, for a signed product padded to vectors.

    Signed bytes hold less: where codes fill a byte, half the range is subtracted (`meta_asm` does so to zero points).
    """
    lines: list[str] = []
    temporaries: list[str] = []

    def masked(out: int, word: str, mask: int) -> None:
        if signed and mask & 0x80:
            lines.append(f"lop3.b32 ${out}, {word}, {mask * 0x01010101:#010x}, 0x80808080, 0x6a;")
        else:
            lines.append(f"and.b32 ${out}, {word}, {mask * 0x01010101:#010x};")

    def moved(word: str, by: int) -> str:
        name = f"t{len(temporaries)}"
        temporaries.append(name)
        lines.append(f"shr.b32 {name}, {word}, {by};")
        return name

    for s in range(4):
        for hb in range(2):
            out = 4 * s + 2 * hb
            if bits == 8:
                masked(out, f"${16 + out}", 0xFF)
                masked(out + 1, f"${17 + out}", 0xFF)
            elif bits == 4:
                word = f"${16 + 2 * s + hb}"
                masked(out, word, 0x0F)
                masked(out + 1, word, 0xF0)
            elif bits == 2:
                word = f"${16 + 2 * (s % 2) + hb}"
                word = moved(word, 4) if s >= 2 else word
                masked(out, word, 0x03)
                masked(out + 1, word, 0x0C)
            else:
                A, B, C = (f"${16 + i}" for i in (2 * (s // 2), 2 * (s // 2) + 1, 4 + s // 2))
                if s % 2 == 0 or hb == 0:
                    word = C if s % 2 else (A, B)[hb]
                    masked(out, word, 0x07)
                    masked(out + 1, word, 0x38)
                    continue
                # the eighth pair: two bits from A or B, the lowest from C; that of rows n + 8 three bits higher
                for r8, (high, by, low) in enumerate(((A, 5, 6), (B, 2, 4))):
                    masked(out + r8, moved(high, by), 0x06 << 3 * r8)
                    bit = (1 << 3 * r8) * 0x01010101
                    lines.append(f"lop3.b32 ${out + r8}, {moved(C, low)}, {bit:#010x}, ${out + r8}, 0xea;")
    declared = f".reg .b32 {', '.join(temporaries)}; " if temporaries else ""
    inputs = -(-words(bits) // 4) * 4 if signed else words(bits)
    return "{ " + declared + "\n".join(lines) + " }", ",".join(["=&r"] * 16 + ["r"] * inputs)


def _offset(bits: int, r8: int) -> int:
    """What a signed register holds less than an unsigned one, in codes."""
    return {8: 128, 4: 8 * r8}.get(bits, 0)


def meta_asm(bits: int, r8: int, scales_bf16: bool, *, signed: bool = False) -> tuple[str, str]:
    """Outputs the scale as fp32 and the zero point, multiplied as the codes of these rows are; input a word of meta."""
    scale = "and.b32 $0, $2, 0xffff0000;" if scales_bf16 else "mov.b32 {l, h}, $2; cvt.f32.f16 $0, h;"
    zero = "and.b32 $1, $2, 0xffff;"
    if signed and _offset(bits, r8):
        zero += f" sub.s32 $1, $1, {_offset(bits, r8)};"
    if r8 and shift(bits):
        zero += f" shl.b32 $1, $1, {shift(bits)};"
    return f"{{ .reg .b16 l, h; {scale} {zero} }}", "=&f,=&r,r"


def largest_asm(bf16: bool) -> tuple[str, str]:
    """The largest of eight halves without their signs, NaN above all: inputs four words of two."""
    half = "bf16" if bf16 else "f16"
    lines = ["and.b32 a, $1, 0x7fff7fff;"]
    for i in range(2, 5):
        lines.append(f"and.b32 b, ${i}, 0x7fff7fff; max.NaN.{half}x2 a, a, b;")
    lines.append(f"mov.b32 {{l, h}}, a; max.NaN.{half} l, l, h; cvt.u32.u16 $0, l;")
    return "{ .reg .b32 a, b; .reg .b16 l, h;\n" + "\n".join(lines) + " }", "=&r,r,r,r,r"


def digits_asm(bf16: bool) -> tuple[str, str]:
    """Eight halves times a power of two that leaves at most 15 bits, to nearest, as two signed digits to the base 256.

    Outputs the words of high digits [hb], those of low ones, and minus the sum of the numbers. Inputs four words of two
    columns [hb][i1], the power of two. Byte 2 i0 + i1 of an output is column 8 i1 + i0 of the 16 of hb.
    """
    # beyond 2**23 a float is an integer plus the bits of 1.5 * 2**23; 128 more, and byte 1 is the high digit
    lines = ["mov.b32 c, 0x4b400080; mov.b32 ones, 0xffffffff; mov.b32 h, 0; mov.b32 s, 0;"]
    for hb in range(2):
        for i1 in range(2):
            word = f"${5 + 2 * hb + i1}"
            if bf16:
                lines.append(f"shl.b32 x0, {word}, 16; and.b32 x1, {word}, 0xffff0000;")
            else:
                lines.append(f"mov.b32 {{l0, l1}}, {word}; cvt.f32.f16 x0, l0; cvt.f32.f16 x1, l1;")
            lines += [f"fma.rn.f32 r{i0}{i1}, x{i0}, $9, c;" for i0 in range(2)]
        lines += [
            "prmt.b32 a, r00, r01, 0x4051; prmt.b32 b, r10, r11, 0x4051;",
            f"prmt.b32 ${hb}, a, b, 0x5410; prmt.b32 a, a, b, 0x7632; xor.b32 ${2 + hb}, a, 0x80808080;",
            f"dp4a.s32.s32 h, ${hb}, ones, h; dp4a.s32.s32 s, ${2 + hb}, ones, s;",
        ]
    lines.append("mad.lo.s32 $4, h, 256, s;")
    declared = ".reg .b16 l0, l1; .reg .b32 a, b, c, h, s, ones, x0, x1, r00, r01, r10, r11;"
    return f"{{ {declared}\n" + "\n".join(lines) + " }", ",".join(["=&r"] * 5 + ["r"] * 4 + ["f"])


def product_asm(turns: int, chains: int = 1) -> tuple[str, str]:
    """Sums of one step, strip and tile of x, added to the accumulators of rows n and n + 8.

    Two chains of products, each adding to the one before, take four additions more and are done sooner than one.

    Outputs two fp32 accumulators. Inputs, in this order: 16 registers [s][hb][r8]; 8 words of digits [s][hb]; for each
    group that is taken in turn, 1, 2 or 4, the scales of rows n and n + 8, their zero points, and minus the sum of x
    over the group; the unit of x; the accumulators.
    """
    A, B, group, unit = 2, 18, 26, 26 + 5 * turns
    lines = [f"mov.f32 $0, ${unit + 1}; mov.f32 $1, ${unit + 2}; mov.b32 z, 0;"]
    for turn in range(turns):
        steps = range(4 * turn // turns, 4 * (turn + 1) // turns)
        for s in steps:
            a = ", ".join(f"${A + 4 * s + i}" for i in range(4))
            sums = "{e0, e1, e2, e3}" if chains == 2 and s % 2 else "{c0, c1, c2, c3}"
            before = sums if s - chains in steps else "{z, z, z, z}"
            lines.append(
                f"mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {sums}, "
                f"{{{a}}}, {{${B + 2 * s}, ${B + 2 * s + 1}}}, {before};"
            )
        if chains == 2:
            lines += [f"add.s32 c{i}, c{i}, e{i};" for i in range(4)]
        scale, zero, total = group + 5 * turn, group + 5 * turn + 2, group + 5 * turn + 4
        for r8, (high, low) in enumerate((("c0", "c1"), ("c2", "c3"))):
            lines += [
                f"mad.lo.s32 {low}, {high}, 256, {low};",
                f"mad.lo.s32 {low}, ${zero + r8}, ${total}, {low};",
                f"cvt.rn.f32.s32 f, {low};",
                f"mul.f32 g, ${scale + r8}, ${unit};",
                f"fma.rn.f32 ${r8}, f, g, ${r8};",
            ]
    kinds = ["r"] * 24 + ["f", "f", "r", "r", "r"] * turns + ["f"] * 3
    declared = ".reg .b32 z, c0, c1, c2, c3, e0, e1, e2, e3; .reg .f32 f, g;"
    return f"{{ {declared}\n" + "\n".join(lines) + " }", ",".join(["=&f"] * 2 + kinds)
