"""The unpacking PTX, run instruction by instruction on the CPU, yields ``code - zero`` where the layout says."""

from __future__ import annotations

import re

import pytest
import torch

from gptq_triton.bounds import unit_roundoff
from gptq_triton.kernels.unpack_ptx import transposed_ptx, unpack_ptx, weights_ptx
from gptq_triton.layout import tile
from gptq_triton.spec import BITS
from tests.strategies import generator

WORD = 0xFFFFFFFF


def halves(registers: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """(...) int64 registers to (..., 2) float64, the lower half first."""
    both = torch.stack((registers & 0xFFFF, registers >> 16), -1)
    return (both - (both >> 15 << 16)).to(torch.int16).view(dtype).double()


def register(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The inverse; fails unless both halves are exact."""
    rounded = values.to(dtype)
    assert torch.equal(rounded.double(), values)
    both = rounded.view(torch.int16).long() & 0xFFFF
    return both[..., 0] | both[..., 1] << 16


def rounded(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """As `register`, but the halves need not be exact."""
    return register(values.to(dtype).double(), dtype)


def single(registers: torch.Tensor) -> torch.Tensor:
    """Registers to the float32 that they hold."""
    return (registers - (registers >> 31 << 32)).to(torch.int32).view(torch.float32)


def byte(registers: list[torch.Tensor], selector: int) -> torch.Tensor:
    return (registers[selector // 4] >> 8 * (selector % 4)) & 0xFF


def run(
    text: str, inputs: list[torch.Tensor], outputs: int, dtype: torch.dtype, *, rounds: bool = False
) -> list[torch.Tensor]:
    """The outputs of an inline assembly, float64, for a tensor of each input register; sums are exact unless rounds."""
    shape = inputs[0].shape
    values = {f"${outputs + i}": value for i, value in enumerate(inputs)}
    result: dict[str, torch.Tensor] = {}
    of_outputs = dtype

    def operand(name: str) -> torch.Tensor:
        return values[name] if name in values else torch.full(shape, int(name, 0))

    for line in text.splitlines():
        if line in "{}" or line.startswith(".reg"):
            continue
        operation, target, rest = re.fullmatch(r"(\S+) (\{.*?\}|\w+), (.*);", line).groups()  # pyright: ignore
        a = [operand(name) for name in rest.split(", ")]
        if operation == "mov.b32" and target.startswith("{"):
            for name, half in zip(target.strip("{}").split(", "), halves(a[0], of_outputs).unbind(-1), strict=True):
                result[name] = half
            continue
        assert not result, "an output is written while inputs may still be read"
        if operation == "mov.b32":
            value = a[0]
        elif operation == "shr.b32":
            value = a[0] >> a[1]
        elif operation == "lop3.b32":
            table = int(rest.split(", ")[3], 0)
            value = torch.zeros(shape, dtype=torch.int64)
            for row in range(8):
                if table >> row & 1:
                    picks = [v if row >> 2 - i & 1 else ~v & WORD for i, v in enumerate(a[:3])]
                    value |= picks[0] & picks[1] & picks[2]
        elif operation == "prmt.b32":
            selector = int(rest.split(", ")[2], 0)
            value = sum((byte(a[:2], selector >> 4 * i & 7) << 8 * i for i in range(4)), torch.zeros_like(a[0]))
        elif operation in ("and.b32", "or.b32"):
            value = a[0] & a[1] if operation == "and.b32" else a[0] | a[1]
        elif operation == "shl.b32":
            value = a[0] << a[1] & WORD
        elif operation == "sub.s32":
            value = a[0] - a[1]
        elif operation == "slct.b32.s32":
            value = torch.where(a[2] >= 0, a[0], a[1])
        elif operation == "mul.f32":
            value = (single(a[0]) * single(a[1])).view(torch.int32).long() & WORD
        elif operation in ("cvt.rn.f16x2.f32", "cvt.rn.bf16x2.f32"):
            of_outputs = torch.bfloat16 if "bf16" in operation else torch.float16
            value = rounded(torch.stack((single(a[1]), single(a[0])), -1).double(), of_outputs)
        elif operation == "movmatrix.sync.aligned.m8n8.trans.b16":  # lane 4 g + t holds row g, columns 2 t, 2 t + 1
            both = torch.stack((a[0] & 0xFFFF, a[0] >> 16), -1).flatten(-2).transpose(-1, -2).unflatten(-1, (4, 2))
            value = both[..., 0] | both[..., 1] << 16
        else:
            x = [halves(v, dtype) for v in a]
            if operation == "add.f16x2":
                value = register(x[0] + x[1], dtype)
            elif operation == "sub.f16x2":
                value = register(x[0] - x[1], dtype)
            elif operation == "fma.rn.bf16x2":
                exact = x[0] * x[1] + x[2]
                value = rounded(exact, dtype) if rounds else register(exact, dtype)
            elif operation in ("mul.f16x2", "mul.bf16x2"):
                value = rounded(x[0] * x[1], dtype)
            else:
                raise ValueError(operation)
        values[target] = value
    return [result[f"${i}"] for i in range(outputs)]


def fragments(words: torch.Tensor, meta: torch.Tensor, bits: int, dtype: torch.dtype) -> torch.Tensor:
    """Words of tiles and meta (strips, steps, s, g, r8) to (strips, steps, s, hb, r8, i1, i0, g, t)."""
    text, constraints = unpack_ptx(bits, dtype == torch.bfloat16)
    outputs = constraints.count("=")
    strips, steps = words.shape[:2]
    found = torch.full((strips, steps, 4, 2, 2, 2, 2, 8, 4), float("nan"), dtype=torch.float64)
    m = meta[..., None].expand(*meta.shape, 4)  # strips steps s g r8 t

    def group(s: int, r8: int) -> torch.Tensor:
        return m[:, :, s, :, r8]

    for s in range(4):
        for hb in range(2):
            for r8 in range(2):
                if bits == 8:
                    w = words.view(strips, steps, 4, 8, 4, 2, 2)
                    o = run(text, [w[:, :, s, :, :, hb, r8], group(s, r8)], outputs, dtype)
                elif bits == 4:
                    w = words.view(strips, steps, 2, 8, 4, 2, 2)
                    o = run(text, [w[:, :, s // 2, :, :, s % 2, hb], group(s, 0), group(s, 1)], outputs, dtype)
                    o = o[4 * r8 :]
                elif bits == 2:
                    w = words.view(strips, steps, 8, 4, 2, 2)[..., s % 2, hb]
                    metas = [group(t, row) for t in (s % 2, s % 2 + 2) for row in range(2)]
                    o = run(text, [w, *metas], outputs, dtype)[8 * (s // 2) + 4 * r8 :]
                else:
                    ab = words[:, :, :128].reshape(strips, steps, 8, 4, 2, 2)[..., s // 2, :]
                    c = words[:, :, 128:].reshape(strips, steps, 8, 4, 2)[..., s // 2]
                    metas = [group(t, row) for t in (s // 2 * 2, s // 2 * 2 + 1) for row in range(2)]
                    o = run(text, [ab[..., 0], ab[..., 1], c, *metas], outputs, dtype)
                    o = o[16 * (s % 2) + 8 * hb + 4 * r8 :]
                found[:, :, s, hb, r8] = torch.stack(o[:4], 2).view(strips, steps, 2, 2, 8, 4)
    return found


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bits", BITS)
def test_codes_less_zero_points_are_exact_and_in_place(bits, dtype):
    rng = generator(bits)
    strips, steps = 8, 16
    codes = torch.randint(0, 2**bits, (128 * steps, 16 * strips), generator=rng, dtype=torch.uint8)
    zeros = torch.randint(0, 2**bits, (strips, steps, 4, 8, 2), generator=rng)  # a group is 32 columns
    codes[:256, :16], zeros[0, :2] = 2**bits - 1, 0
    codes[256:512, :16], zeros[0, 2:4] = 0, 2**bits - 1
    words = tile(codes, bits).long() & WORD
    noise = torch.randint(0, 2**16, zeros.shape, generator=rng) << 16  # where the scale would be
    found = fragments(words, noise | zeros, bits, dtype)
    # columns are step s hb i1 t i0, rows strip r8 g
    q = codes.long().view(steps, 4, 2, 2, 4, 2, strips, 2, 8).permute(6, 0, 1, 2, 7, 3, 5, 8, 4)
    z = zeros.permute(0, 1, 2, 4, 3)[:, :, :, None, :, None, None, :, None]
    assert torch.equal(found, (q - z).double())


def quarters(words: torch.Tensor, s: int, bits: int) -> list[list[torch.Tensor]]:
    """For each [hb][r8], or those of them that share words, the words (strips, steps, g, t) of quarter s."""
    strips, steps = words.shape[:2]
    if bits == 8:
        w = words.view(strips, steps, 4, 8, 4, 2, 2)[:, :, s]
        return [[w[..., hb, r8]] for hb in range(2) for r8 in range(2)]
    if bits == 4:
        return [[words.view(strips, steps, 2, 8, 4, 2, 2)[:, :, s // 2, :, :, s % 2, hb]] for hb in range(2)]
    if bits == 2:
        return [[words.view(strips, steps, 8, 4, 2, 2)[..., s % 2, hb]] for hb in range(2)]
    ab = words[:, :, :128].reshape(strips, steps, 8, 4, 2, 2)[..., s // 2, :]
    c = words[:, :, 128:].reshape(strips, steps, 8, 4, 2)[..., s // 2]
    return [[ab[..., 0], ab[..., 1], c]]


@pytest.mark.parametrize(("dtype", "parts"), [(torch.float16, 1), (torch.bfloat16, 1), (torch.bfloat16, 2)])
@pytest.mark.parametrize("bits", BITS)
def test_weights_are_rounded_once_and_in_place(bits, dtype, parts):
    rng = generator(bits)
    strips, steps = 8, 4
    codes = torch.randint(0, 2**bits, (128 * steps, 16 * strips), generator=rng, dtype=torch.uint8)
    zeros = torch.randint(0, 2**bits, (strips, steps, 4, 8, 2), generator=rng)  # strip step s g r8
    scales = (0.01 + torch.rand(zeros.shape, generator=rng)).to(torch.float16 if parts == 2 else dtype)
    high = scales.to(dtype).double()
    low = scales.double() - high  # exact in dtype, or `register` fails
    registers = [register(part[..., None].expand(*part.shape, 2), dtype) for part in (high, low)][:parts]
    words = tile(codes, bits).long() & WORD
    found = torch.empty(strips, steps, 4, 4, 2, 2, 8, 4, dtype=torch.float64)  # strip step s (hb r8) i1 i0 g t
    for s in range(4):
        text, constraints = weights_ptx(bits, dtype == torch.bfloat16, s, parts)
        outputs, place = constraints.count("="), 0
        for word in quarters(words, s, bits):
            word = word[: 2 + s % 2] if bits == 3 else word  # even quarters need no C
            rows = [place % 2] if bits == 8 else [0, 1]
            beside = [t[:, :, s, :, r8, None].expand(word[0].shape) for t in [zeros] for r8 in rows]
            beside += [t[:, :, s, :, r8, None].expand(word[0].shape) for r8 in rows for t in registers]
            o = torch.stack(run(text, [*word, *beside], outputs, dtype, rounds=True), 2)
            o = o.view(strips, steps, outputs // 4, 2, 2, 8, 4)
            found[:, :, s, place : place + outputs // 4] = o
            place += outputs // 4
        assert place == 4
    q = codes.double().view(steps, 4, 2, 2, 4, 2, strips, 2, 8).permute(6, 0, 1, 2, 7, 3, 5, 8, 4)
    z, scale = (t.double().permute(0, 1, 2, 4, 3)[:, :, :, None, :, None, None, :, None] for t in (zeros, scales))
    exact, found = (q - z) * scale, found.view(q.shape)
    if parts == 1:
        assert torch.equal(found, exact.to(dtype).double())
    else:
        u = unit_roundoff(dtype)
        assert bool(((found - exact).abs() <= u * (1 + u) * exact.abs()).all())
        assert (found == exact.to(dtype).double()).double().mean() > 0.99


def test_a_float16_is_the_sum_of_two_bfloat16():
    every = torch.arange(2**15, dtype=torch.int16).view(torch.float16).double()
    every = every[every.isfinite()]
    high = every.bfloat16().double()
    assert torch.equal(high + (every - high).bfloat16().double(), every)


def operands(
    words: torch.Tensor, meta: torch.Tensor, bits: int, dtype: torch.dtype, scales: torch.dtype
) -> torch.Tensor:
    """Words of tiles and meta (strips, steps, s, g, r8) to A operands of W.T.

    These are (strips, steps, s, hb, i1, r8, g, t, n % 2).
    """
    strips, steps = words.shape[:2]
    found = torch.full((strips, steps, 4, 2, 2, 2, 8, 4, 2), float("nan"), dtype=torch.float64)
    for s in range(4):
        text, _ = transposed_ptx(bits, s >= 2, dtype == torch.bfloat16, dtype != scales)
        for hb in range(2):
            own = quarters(words, s, bits)
            if bits == 8:
                inputs = [*own[2 * hb], *own[2 * hb + 1]]
            elif bits == 3:
                a, b, c = own[0]
                inputs = [a, b, c, torch.full_like(c, 2 * (s % 2) + hb)]
            else:
                inputs = own[hb]
            both = [meta[:, :, s, :, r8, None].expand(strips, steps, 8, 4) for r8 in range(2)]
            inputs = inputs + both
            if dtype != scales:
                inputs += [halves(m, scales)[..., 1].float().view(torch.int32).long() & WORD for m in both]
            middle = torch.bfloat16 if dtype != scales else dtype
            o = run(text, inputs, 8, middle)
            found[:, :, s, hb] = torch.stack(o, -1).view(strips, steps, 8, 4, 2, 2, 2).permute(0, 1, 4, 5, 2, 3, 6)
    return found


@pytest.mark.parametrize("scales", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bits", BITS)
def test_operands_of_the_transpose_are_rounded_weights_in_place(bits, dtype, scales):
    rng = generator(bits)
    strips, steps = 4, 8
    codes = torch.randint(0, 2**bits, (128 * steps, 16 * strips), generator=rng, dtype=torch.uint8)
    zeros = torch.randint(0, 2**bits, (strips, steps, 4, 8, 2), generator=rng)
    scale = (0.01 + torch.rand(zeros.shape, generator=rng)).to(scales)
    meta = (scale.view(torch.int16).long() & 0xFFFF) << 16 | zeros
    found = operands(tile(codes, bits).long() & WORD, meta, bits, dtype, scales)
    # columns are step s hb i1 g', rows strip r8 t' n % 2: lane 4 g' + t' of the operand has row g', columns 2 t' and on
    q = codes.long().view(steps, 4, 2, 2, 8, strips, 2, 8).permute(5, 0, 1, 2, 3, 6, 4, 7).unflatten(-1, (4, 2))
    z, s = (v.permute(0, 1, 2, 4, 3)[:, :, :, None, None, :, None].unflatten(-1, (4, 2)) for v in (zeros, scale))
    expected = ((q - z).float() * s.float()).to(dtype)
    assert torch.equal(found, expected.double())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bits", BITS)
def test_operands_fit_the_constraints(bits, dtype):
    text, constraints = unpack_ptx(bits, dtype == torch.bfloat16)
    named = {int(i) for i in re.findall(r"\$(\d+)", text)}
    assert named == set(range(len(constraints.split(","))))
    assert set(constraints.split(",")) == {"=h", "r"}
