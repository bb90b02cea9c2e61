"""PTX that turns packed words into 16-bit float operands: 1 LOP3 a field pair, shifts shared."""


def _lop(dst, src, mask, magic):
    return f"lop3.b32 ${dst}, {src}, {mask * 0x10001:#x}, {magic * 0x10001:#x}, 0xea;\n"


def _merge(dst, src, mask):
    return f"lop3.b32 ${dst}, {src}, {mask * 0x10001:#x}, ${dst}, 0xea;\n"


def asm(bits, bf16):
    """Two words (three for 3 bits) -> fields; outputs first, then inputs. Returns (asm, constraints, number of outputs)."""
    nf = {8: 4 if bf16 else 2, 4: 4, 3: 8, 2: 8}[bits]  # outputs per word
    n = 2 * nf
    body, regs = "", set()

    def ror(src, amount):
        nonlocal body
        amount %= 32
        if amount == 0:
            return src
        name = f"r{src[1:]}_{amount}"
        if name not in regs:
            regs.add(name)
            body += f"shf.r.wrap.b32 {name}, {src}, {src}, {amount};\n"
        return name

    for i in range(2):
        w, top = f"${n + i}", f"${n + 2}"
        if bits == 8 and not bf16:
            fields = [(0, 2, 0x3C00), (8, 2, 0x3C00)]
        elif bits == 8:  # low and high nibble of field 0, then of field 1
            fields = [(0, 2, 0x3F80), (4, 2, 0x4180), (8, 2, 0x3F80), (12, 2, 0x4180)]
        elif bits == 4 and not bf16:
            fields = [(0, 6, 0x3C00), (0, 2, 0x4C00), (8, 6, 0x3C00), (8, 2, 0x4C00)]
        elif bits == 4:
            fields = [(4, 2, 0x3F80), (0, 2, 0x3F80), (12, 2, 0x3F80), (8, 2, 0x3F80)]
        elif not bf16:
            p = 8 if bits == 2 else 7
            fields = [(r, p - 2 * j, (0x3C00, 0x4400, 0x4C00, 0x5400)[j]) for r in (0, 8) for j in range(4)]
        else:
            p = 4 if bits == 2 else 3
            fields = [(r, p - 2 * j, (0x3F80, 0x4080)[j]) for r in (4, 0, 12, 8) for j in range(2)]
        width = {8: 15 if bf16 else 255, 4: 15, 3: 3, 2: 3}[bits]
        for j, (r, pos, magic) in enumerate(fields):
            source = ror(w, r)
            body += _lop(nf * i + j, source, width << pos, magic)
            if bits == 3:
                source = ror(top, r - i)
                body += _merge(nf * i + j, source, 4 << pos)
    decl = "".join(f".reg .b32 {r};\n" for r in sorted(regs))
    ins = 4 if bits == 3 else 2
    return "{\n" + decl + body + "}", ",".join(["=&r" if bits == 3 else "=r"] * n + ["r"] * ins), n


# value of a field = off + unit * code; off by (r8, k3)
def affine(bits, bf16):
    if bits == 8:
        return (1 / 32, (17.0, 17.0), False) if bf16 else (1 / 256, (1.0, 1.0), False)
    if bits == 4:
        return (1 / 32, (1.0, 1.0), False) if bf16 else (1 / 16, (1.0, 16.0), False)
    unit = {2: 1 / 4, 3: 1 / 8}[bits]
    return (unit / 2, (1.0, 4.0), False) if bf16 else (unit, (1.0, 4.0), True)
