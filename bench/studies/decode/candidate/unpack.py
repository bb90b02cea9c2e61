"""PTX: packed words -> exact (code - zero) * unit as 16-bit floats. One LOP3 isolates a field of both halves of a word under
a magic exponent (value = offset + unit * code), one subtraction removes offset + unit * zero: no rounding anywhere."""

# field -> (rotate or shift right, lowest bit after it, magic, kind); kind = which offset, hence which prepared subtrahend
UNIT = {(8, False): 1 / 256, (4, False): 1 / 16, (3, False): 1 / 8, (2, False): 1 / 4,
        (8, True): 1 / 32, (4, True): 1 / 32, (3, True): 1 / 16, (2, True): 1 / 8}
# offsets of the kinds, of rows r8 = 0 and r8 = 1
OFFSETS = {(8, False): ((1,), (1,)), (4, False): ((1,), (16,)), (2, False): ((1, 16), (4, 64)), (3, False): ((2, 128), (16, 128, 1)),
           (8, True): ((1, 16), (1, 16)), (4, True): ((1,), (1,)), (2, True): ((1,), (4,)), (3, True): ((1, 8), (1, 8, 0.5))}


def _dup(v):
    return f"{v * 0x10001:#x}"


def unpack_asm(bits, bf):
    """(asm, constraints, number of outputs). Outputs in the order [word][field]; inputs: 2 words, (2 top words,) 2 of each subtrahend."""
    k0, k1 = (len(o) for o in OFFSETS[bits, bf])
    n = {8: 8 if bf else 4, 4: 8, 3: 16, 2: 16}[bits]
    first = n + (4 if bits == 3 else 2)
    sub = [[f"${first + 2 * i}" for i in range(k0)], [f"${first + 2 * (k0 + i)}" for i in range(k1)]]
    lines, regs = [], {}

    def ror(src, amount, logical=False):
        if amount == 0:
            return src
        key = (src, amount, logical)
        if key not in regs:
            regs[key] = f"t{len(regs)}"
            lines.append(f"shr.b32 {regs[key]}, {src}, {amount};" if logical else f"shf.r.wrap.b32 {regs[key]}, {src}, {src}, {amount};")
        return regs[key]

    def lop(dst, src, mask, magic):
        lines.append(f"lop3.b32 ${dst}, {src}, {_dup(mask)}, {_dup(magic) if isinstance(magic, int) else magic}, 0xea;")

    def minus(dst, r8, kind):
        lines.append(f"sub.{'b' if bf else ''}f16x2 ${dst}, ${dst}, {sub[r8][kind]};")

    if bits == 3:
        a, b, c = f"${n}", f"${n + 1}", f"${n + 2}"
        # F0..F4 at bits 0, 3, 6, 9, 12 of a half; bit 15 of the three words makes one more field
        if bf:
            where = {0: (0, 0, 0x4100, 1), 1: (0, 3, 0x3F80, 0), 2: (6, 0, 0x4100, 1), 3: (6, 3, 0x3F80, 0), 4: (9, 3, 0x3F80, 0)}
        else:
            where = {0: (0, 0, 0x5800, 1), 1: (0, 3, 0x4C00, 0), 2: (0, 6, 0x4000, 0), 3: (6, 3, 0x4C00, 0), 4: (6, 6, 0x4000, 0)}
        slots = {0: [(a, 2), (a, 4), (b, 2), (b, 4), (c, 2), (c, 4), (a, 0), (b, 0)], 1: [(a, 1), (a, 3), (b, 1), (b, 3), (c, 1), (c, 3), (c, 0), None]}
        for r8 in range(2):
            for i, slot in enumerate(slots[r8]):
                dst = 2 * i + r8
                if slot is None:
                    s, low = (9, 6) if bf else (6, 9)  # bit 15 lands at `low`
                    src = ror(a, s, True)
                    lop(dst, src, 1 << low, 0x3F00 if bf else 0x3C00)
                    src = ror(b, s + 1, True)
                    lop(dst, src, 1 << (low - 1), f"${dst}")
                    src = ror(c, s + 2, True)
                    lop(dst, src, 1 << (low - 2), f"${dst}")
                    minus(dst, r8, 2)
                else:
                    s, low, magic, kind = where[slot[1]]
                    src = ror(slot[0], s, True)
                    lop(dst, src, 7 << low, magic)
                    minus(dst, r8, kind)
    else:
        for i in range(2):
            w = f"${n + i}"
            if bits == 8 and not bf:
                fields = [(0, 2, 255, 0x3C00, 0, 0), (8, 2, 255, 0x3C00, 1, 0)]
            elif bits == 8:
                fields = [(0, 2, 15, 0x3F80, 0, 0), (4, 2, 15, 0x4180, 0, 1), (8, 2, 15, 0x3F80, 1, 0), (12, 2, 15, 0x4180, 1, 1)]
            elif bits == 4 and not bf:
                fields = [(0, 6, 15, 0x3C00, 0, 0), (0, 2, 15, 0x4C00, 1, 0), (8, 6, 15, 0x3C00, 0, 0), (8, 2, 15, 0x4C00, 1, 0)]
            elif bits == 4:
                fields = [(r, 2, 15, 0x3F80, j & 1, 0) for j, r in enumerate((4, 0, 12, 8))]
            elif not bf:
                fields = [(r, 8 - 2 * j, 3, (0x3C00, 0x4400, 0x4C00, 0x5400)[j], j & 1, j >> 1) for r in (0, 8) for j in range(4)]
            else:
                fields = [(r, 4 - 2 * j, 3, (0x3F80, 0x4080)[j], j, 0) for r in (4, 0, 12, 8) for j in range(2)]
            for j, (r, low, mask, magic, r8, kind) in enumerate(fields):
                dst = n // 2 * i + j
                src = ror(w, r)
                lop(dst, src, mask << low, magic)
                minus(dst, r8, kind)
    decl = "".join(f".reg .b32 {r};" for r in regs.values())
    return "{ " + decl + "\n" + "\n".join(lines) + "\n}", ",".join(["=&r"] * n + ["r"] * (first - n + 2 * (k0 + k1))), n


def _hex16(value, bf):
    import struct

    return struct.unpack("<H", struct.pack("<e", value))[0] if not bf else struct.unpack("<I", struct.pack("<f", value))[0] >> 16


def _hex32(value):
    import struct

    return f"0f{struct.unpack('<I', struct.pack('<f', value))[0]:08X}"


def meta_asm(bits, bf, r8, scale_bf):
    """One word (scale above, zero as a half below) -> scale as float, then one subtrahend per kind. Returns (asm, constraints)."""
    offs, unit = OFFSETS[bits, bf][r8], UNIT[bits, bf]
    m = f"${len(offs) + 1}"
    body = [f"mov.b32 {{l, h}}, {m};", f"and.b32 $0, {m}, 0xffff0000;" if scale_bf else "cvt.f32.f16 $0, h;"]
    if not bf:
        body.append("mov.b32 z, {l, l};")
        for i, o in enumerate(offs):
            body.append(f"mov.b32 u, {_dup(_hex16(unit, False))}; mov.b32 v, {_dup(_hex16(o, False))}; fma.rn.f16x2 ${i + 1}, z, u, v;")
    elif bits == 8:  # zero = 16 high + low
        body += ["cvt.f32.f16 f, l;", f"add.rm.f32 g, f, {_hex32(134217728.0)};", f"sub.f32 g, g, {_hex32(134217728.0)};", "sub.f32 f, f, g;",
                 f"fma.rn.f32 f, f, {_hex32(unit)}, {_hex32(1.0)}; cvt.rn.bf16x2.f32 $1, f, f;", f"fma.rn.f32 g, g, {_hex32(unit)}, {_hex32(16.0)}; cvt.rn.bf16x2.f32 $2, g, g;"]
    else:
        body.append("cvt.f32.f16 f, l;")
        for i, o in enumerate(offs):
            body.append(f"fma.rn.f32 g, f, {_hex32(unit)}, {_hex32(o)}; cvt.rn.bf16x2.f32 ${i + 1}, g, g;")
    return "{ .reg .b16 l, h; .reg .b32 z, u, v; .reg .f32 f, g;\n" + "\n".join(body) + "\n}", ",".join(["=&r"] * (len(offs) + 1) + ["r"])
