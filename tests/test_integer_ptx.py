"""The PTX of the integer kernels, run on the CPU instruction by instruction for 32 lanes, against the layout."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor

from gptq_triton.kernels.integer_ptx import (
    digits_asm,
    largest_asm,
    load_asm,
    meta_asm,
    product_asm,
    registers_asm,
    shift,
    words,
)
from gptq_triton.layout import tile
from gptq_triton.spec import BITS
from tests.strategies import generator

LANES = torch.arange(32)
WORD = 0xFFFFFFFF


def to_float(bits: Tensor) -> Tensor:
    return (bits - (bits >> 31 << 32)).to(torch.int32).view(torch.float32)


def to_bits(value: Tensor) -> Tensor:
    return value.float().view(torch.int32).long() & WORD


def signed(bits: Tensor) -> Tensor:
    return bits - (bits >> 31 << 32)


def bytes_of(register: Tensor, is_signed: bool) -> Tensor:
    """(32,) registers to (32, 4) numbers."""
    parts = torch.stack([register >> 8 * i & 255 for i in range(4)], 1)
    return parts - (parts >> 7 << 8) if is_signed else parts


def mma(a: list[Tensor], b: list[Tensor], c: list[Tensor]) -> list[Tensor]:
    """mma.m16n8k32: lane 4 g + t holds rows g, g + 8 of A, column g of B, columns 2 t, 2 t + 1 of C."""
    A, B = torch.zeros(16, 32, dtype=torch.int64), torch.zeros(32, 8, dtype=torch.int64)
    g, t = LANES // 4, LANES % 4
    for i in range(4):
        for hb in range(2):
            for r8 in range(2):
                A[g + 8 * r8, 16 * hb + 4 * t + i] = bytes_of(a[2 * hb + r8], False)[:, i]
            B[16 * hb + 4 * t + i, g] = bytes_of(b[hb], True)[:, i]
    C = A @ B
    return [(signed(c[2 * r8 + j]) + C[g + 8 * r8, 2 * t + j]) & WORD for r8 in range(2) for j in range(2)]


def run(asm: tuple[str, str], inputs: list[Tensor]) -> list[Tensor]:
    """The output registers of an inline assembly whose registers are (32,) int64 in [0, 2**32)."""
    text, constraints = asm
    kinds = constraints.split(",")
    outputs = sum(kind.startswith("=") for kind in kinds)
    assert len(kinds) - outputs == len(inputs)
    assert all(kind.startswith("=&") for kind in kinds[:outputs])  # outputs are written while inputs are read
    values = {f"${outputs + i}": value for i, value in enumerate(inputs)}

    def get(name: str) -> Tensor:
        return values[name] if name in values else torch.full((32,), int(name, 0))

    for line in re.sub(r"[\n ]+", " ", text.strip("{} ")).split(";"):
        line = line.strip()
        if not line or line.startswith(".reg"):
            continue
        operation, rest = line.split(" ", 1)
        groups = [[v.strip() for v in group.split(",")] for group in re.findall(r"\{([^}]*)\}", rest)]
        names = [v.strip() for v in re.sub(r"\{[^}]*\}", "_", rest).rstrip(" }").split(",")]
        if operation.startswith("mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32"):
            c, a, b, before = groups
            for name, value in zip(c, mma(*[[get(v) for v in group] for group in (a, b, before)]), strict=True):
                values[name] = value
            continue
        if operation == "mov.b32" and groups:  # {l, h}, word
            low, high = groups[0]
            values[low], values[high] = get(names[1]) & 0xFFFF, get(names[1]) >> 16
            continue
        target, a = names[0], [get(v) for v in names[1:]]
        if operation in ("mov.b32", "mov.f32"):
            result = a[0]
        elif operation == "and.b32":
            result = a[0] & a[1]
        elif operation == "shr.b32":
            result = a[0] >> a[1]
        elif operation == "shl.b32":
            result = a[0] << a[1]
        elif operation == "xor.b32":
            result = a[0] ^ a[1]
        elif operation == "add.s32":
            result = a[0] + a[1]
        elif operation == "sub.s32":
            result = a[0] - a[1]
        elif re.fullmatch(r"max\.NaN\.b?f16(x2)?", operation):  # no signs: the order of integers, NaN above all
            result = sum(torch.maximum(*(v & 0xFFFF << i for v in a)) for i in (0, 16))
        elif operation == "cvt.u32.u16":
            result = a[0] & 0xFFFF
        elif operation == "prmt.b32":
            pool = torch.cat([bytes_of(v, False) for v in a[:2]], 1)
            result = sum(pool[:, int(names[3], 0) >> 4 * i & 7] << 8 * i for i in range(4))
        elif operation == "dp4a.s32.s32":
            result = (bytes_of(a[0], True) * bytes_of(a[1], True)).sum(1) + signed(a[2])
        elif operation == "lop3.b32":
            result = {0xEA: a[0] & a[1] | a[2], 0x6A: a[0] & a[1] ^ a[2]}[int(names[4], 0)]
        elif operation == "mad.lo.s32":
            result = signed(a[0]) * signed(a[1]) + signed(a[2])
        elif operation == "cvt.rn.f32.s32":
            result = to_bits(signed(a[0]))
        elif operation == "cvt.f32.f16":
            result = to_bits((a[0] - (a[0] >> 15 << 16)).to(torch.int16).view(torch.float16))
        elif operation == "mul.f32":
            result = to_bits(to_float(a[0]) * to_float(a[1]))
        else:
            assert operation == "fma.rn.f32"
            result = to_bits(to_float(a[0]).double() * to_float(a[1]).double() + to_float(a[2]).double())
        values[target] = result & WORD
    return [values[f"${i}"] for i in range(outputs)]


def lane_words(tiles: Tensor, bits: int) -> list[Tensor]:
    """What each lane loads of the one strip and step of ``tiles``."""
    stored = tiles[0, 0].long() & WORD
    vectors, first = [], 0
    while first < words(bits):
        width = min(4, words(bits) - first)
        vector = stored[32 * first : 32 * (first + width)].view(32, width)
        vectors += list(vector.unbind(1))
        first += width
    return vectors


def registers_of(codes: Tensor, bits: int, *, is_signed: bool = False) -> list[Tensor]:
    if bits == 8 and not is_signed:
        return lane_words(tile(codes, bits), bits)
    inputs = lane_words(tile(codes, bits), bits)
    inputs += [torch.zeros(32, dtype=torch.int64)] * (-len(inputs) % 4 if is_signed else 0)
    return run(registers_asm(bits, signed=is_signed), inputs)


@pytest.mark.parametrize("is_signed", [False, True])
@pytest.mark.parametrize("bits", BITS)
def test_registers_hold_the_codes(bits, is_signed):
    codes = torch.randint(0, 2**bits, (128, 16), generator=generator(bits), dtype=torch.uint8)
    registers = registers_of(codes, bits, is_signed=is_signed)
    g, t = LANES // 4, LANES % 4
    for s in range(4):
        for hb in range(2):
            for r8 in range(2):
                found = bytes_of(registers[4 * s + 2 * hb + r8], is_signed)
                for i, column in enumerate((0, 8, 1, 9)):
                    code = codes[32 * s + 16 * hb + 2 * t + column, g + 8 * r8].long() * 2 ** (shift(bits) * r8)
                    less = 128 if is_signed and (bits == 8 or (bits == 4 and r8)) else 0
                    assert torch.equal(found[:, i], code - less)


@pytest.mark.parametrize("scales_bf16", [False, True])
@pytest.mark.parametrize("is_signed", [False, True])
@pytest.mark.parametrize("bits", BITS)
def test_meta_words(bits, is_signed, scales_bf16):
    dtype = torch.bfloat16 if scales_bf16 else torch.float16
    scales = torch.rand(32, generator=generator(0)).to(dtype)
    zeros = torch.randint(0, 2**bits, (32,), generator=generator(1))
    word = (scales.view(torch.int16).long() & 0xFFFF) << 16 | zeros
    for r8 in range(2):
        scale, zero = run(meta_asm(bits, r8, scales_bf16, signed=is_signed), [word])
        assert torch.equal(to_float(scale), scales.float())
        less = 128 if is_signed and (bits == 8 or (bits == 4 and r8)) else 0
        assert torch.equal(signed(zero), zeros * 2 ** (shift(bits) * r8) - less)


@pytest.mark.parametrize(
    ("subgroups", "turns", "chains"), [(1, 1, 1), (1, 1, 2), (2, 1, 1), (4, 1, 2), (1, 2, 1), (1, 4, 1)]
)
@pytest.mark.parametrize("bits", BITS)
def test_the_product_of_a_step(bits, subgroups, turns, chains):
    rng = generator(bits)
    codes = torch.randint(0, 2**bits, (128, 16), generator=rng, dtype=torch.uint8)
    groups, rows = subgroups * turns, 4 // subgroups
    columns = 128 // groups
    q = torch.randint(-32639, 32640, (rows, 128), generator=rng)  # rows of x as integers
    scales = torch.rand(groups, 16, generator=rng).float()
    zeros = torch.randint(0, 2**bits, (groups, 16), generator=rng)
    unit, start = torch.rand(rows, generator=rng).float(), torch.rand(4, 16, generator=rng).float()
    g, t = LANES // 4, LANES % 4
    high = q + 128 >> 8
    # column n = 2 (subgroups m + u) + digit of the product is 0 outside of subgroup u
    inside = (torch.arange(128) * subgroups // 128 == torch.arange(subgroups)[:, None]).long()
    digits = (torch.stack((high, q - 256 * high), 1)[:, None] * inside[:, None]).view(8, 128)
    assert int(digits.abs().max()) <= 128
    b = []
    for s in range(4):
        for hb in range(2):
            columns_of = [digits[g, 32 * s + 16 * hb + 2 * t + column] for column in (0, 8, 1, 9)]
            b.append(sum((value & 255) << 8 * i for i, value in enumerate(columns_of)))
    inputs = registers_of(codes, bits) + b
    m = t // subgroups
    for turn in range(turns):
        u = t % subgroups + turn
        inputs += [to_bits(scales[u, g]), to_bits(scales[u, g + 8]), zeros[u, g], zeros[u, g + 8] * 2 ** shift(bits)]
        inputs.append(-q.view(rows, groups, columns).sum(2)[m, u] & WORD)
    inputs += [to_bits(unit[m]), to_bits(start[t, g]), to_bits(start[t, g + 8] * 2 ** shift(bits))]
    found = run(product_asm(turns, chains), inputs)
    weight = (codes.double().view(groups, columns, 16) - zeros[:, None]) * scales[:, None].double()

    def product(q: Tensor, weight: Tensor) -> Tensor:
        """Of a lane's rows and groups, [t, n]."""
        parts = (q.double().view(rows, groups, 1, columns) @ weight)[:, :, 0]  # (rows, groups, 16)
        return (unit.double()[:, None, None] * parts.view(rows, subgroups, turns, 16).sum(2)).view(4, 16)

    expected, size = start.double() + product(q, weight), start.double() + product(q.abs(), weight.abs())
    for r8 in range(2):
        y = to_float(found[r8]).double() / 2 ** (shift(bits) * r8)
        error = (y - expected[t, g + 8 * r8]).abs()
        assert bool((error <= (3 + turns) * 2.0**-24 * size[t, g + 8 * r8]).all())


@pytest.mark.parametrize("bf16", [False, True])
def test_halves_become_digits(bf16):
    rng = generator(0)
    x = (torch.randn(32, 2, 2, 2, generator=rng) * 100).to(torch.bfloat16 if bf16 else torch.float16)  # hb, i1, i0
    x[5, 0, 0, 0] = 0
    patterns = x.view(torch.int16).long() & 0xFFFF
    pairs = [patterns[:, hb, i1, 0] | patterns[:, hb, i1, 1] << 16 for hb in range(2) for i1 in range(2)]
    (largest,) = run(largest_asm(bf16), pairs)
    assert torch.equal(largest.to(torch.int16).view(x.dtype), x.abs().view(32, 8).amax(1))
    power = 2.0 ** torch.floor(torch.log2(32639 / x.abs().view(32, 8).amax(1).float()))
    found = run(digits_asm(bf16), [*pairs, to_bits(power)])
    integers = (x.double() * power.double()[:, None, None, None]).round()
    high, low = (torch.stack([bytes_of(w, True) for w in found[i : i + 2]], 1) for i in (0, 2))
    assert torch.equal((256 * high + low).view(32, 2, 2, 2).transpose(2, 3).double(), integers)  # byte 2 i0 + i1
    assert torch.equal(signed(found[4]), -integers.view(32, 8).sum(1).long())


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_above_all(bad):
    x = torch.full((32, 8), 60000.0).half()
    x[torch.arange(32), torch.arange(32) % 8] = bad
    patterns = x.view(torch.int16).long() & 0xFFFF
    (largest,) = run(largest_asm(False), [patterns[:, 2 * i] | patterns[:, 2 * i + 1] << 16 for i in range(4)])
    assert bool((largest >= 0x7C00).all())


@pytest.mark.parametrize("addresses", [1, 4])
@pytest.mark.parametrize("bits", BITS)
def test_loads_follow_each_other(bits, addresses):
    text, constraints = load_asm(bits, addresses)
    loads = re.findall(r"\.v(\d)\.b32 \{([^}]*)\}, \[(.*?) \+ (\d+)\]", text)
    outputs = [name.strip() for _, names, _, _ in loads for name in names.split(",")]
    assert outputs == [f"${i}" for i in range(words(bits))]
    assert [int(offset) for *_, offset in loads] == [512 * i for i in range(len(loads))]
    padded = -(-words(bits) // 4) * 4 if addresses > 1 else words(bits)
    assert constraints.split(",") == ["=&r"] * padded + ["l"] * addresses + ["r"] * (2 * addresses)
    assert f"setp.le.s32 on, ${padded + addresses}, ${padded + 2 * addresses};" in text
    assert all(re.search(r"@on ld[^;]*$", part) for part in text.split(";") if "ld." in part)
