"""The unpacking PTX, run instruction by instruction on the CPU, yields ``code - zero`` where the layout says."""

from __future__ import annotations

import re

import pytest
import torch

from gptq_triton.bounds import unit_roundoff
from gptq_triton.kernels.unpack_ptx import unpack_ptx, weights_ptx
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


def byte(registers: list[torch.Tensor], selector: int) -> torch.Tensor:
    return (registers[selector // 4] >> 8 * (selector % 4)) & 0xFF


def run(
    text: str, inputs: list[torch.Tensor], outputs: int, dtype: torch.dtype, *, rounds: bool = False
) -> list[torch.Tensor]:
    """The outputs of an inline assembly, float64, for a tensor of each input register; sums are exact unless rounds."""
    shape = inputs[0].shape
    values = {f"${outputs + i}": value for i, value in enumerate(inputs)}
    result: dict[str, torch.Tensor] = {}

    def operand(name: str) -> torch.Tensor:
        return values[name] if name in values else torch.full(shape, int(name, 0))

    for line in text.splitlines():
        if line in "{}" or line.startswith(".reg"):
            continue
        operation, target, rest = re.fullmatch(r"(\S+) (\{.*?\}|\w+), (.*);", line).groups()  # pyright: ignore
        a = [operand(name) for name in rest.split(", ")]
        if operation == "mov.b32" and target.startswith("{"):
            for name, half in zip(target.strip("{}").split(", "), halves(a[0], dtype).unbind(-1), strict=True):
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
            value = sum(byte(a[:2], selector >> 4 * i & 7) << 8 * i for i in range(4))
        else:
            x = [halves(v, dtype) for v in a]
            if operation == "add.f16x2":
                value = register(x[0] + x[1], dtype)
            elif operation == "sub.f16x2":
                value = register(x[0] - x[1], dtype)
            elif operation == "fma.rn.bf16x2":
                exact = x[0] * x[1] + x[2]
                value = register(exact.to(dtype).double() if rounds else exact, dtype)
            elif operation in ("mul.f16x2", "mul.bf16x2"):
                value = register((x[0] * x[1]).to(dtype).double(), dtype)
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
    return [[ab[..., 0], ab[..., 1], c][: 2 + s % 2]]


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


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bits", BITS)
def test_operands_fit_the_constraints(bits, dtype):
    text, constraints = unpack_ptx(bits, dtype == torch.bfloat16)
    named = {int(i) for i in re.findall(r"\$(\d+)", text)}
    assert named == set(range(len(constraints.split(","))))
    assert set(constraints.split(",")) == {"=h", "r"}
