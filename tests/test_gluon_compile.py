"""The Gluon kernels and their companion, compiled without a GPU: they fit, and they do not spill."""

from __future__ import annotations

import os
import re
import sys
from dataclasses import asdict, replace

import pytest
import torch

from gptq_triton.dispatch import candidates, transposed_plans, with_own_digits
from gptq_triton.layout import ONE_GROUP
from gptq_triton.plans import DecodePlan, LargePlan, Problem, TransposedPlan, WidePlan, power_of_two
from gptq_triton.spec import BITS
from tests.ptxas import SHARED_MEMORY, ptxas_report

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="triton is on Linux only"),
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="an interpreted kernel cannot be compiled"),
]

LARGE = Problem(1, 512, 224, 4, 128, torch.float16, True, "sm_90", 132)


def compiled(kernel, pointers: dict[str, str | None], integers: tuple[str, ...], constants: dict, arch: str, **options):
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile
    from triton.experimental.gluon._runtime import GluonASTSource

    absent = {name: None for name, kind in pointers.items() if kind is None and name in kernel.arg_names}
    types = {name: kind if "<" in kind else "*" + kind for name, kind in pointers.items() if kind}
    types |= dict.fromkeys(integers, "i32")
    constants = constants | absent
    signature = {name: "constexpr" if name in constants else types[name] for name in kernel.arg_names}
    attrs = {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(signature.values()) if kind.startswith("*")}
    source = (GluonASTSource if kernel.is_gluon() else ASTSource)(kernel, signature, constexprs=constants, attrs=attrs)
    return compile(source, GPUTarget("cuda", int(arch[3:]), 32), options=options)


def test_kernels_on_disk_are_told_apart_by_their_text():
    from gptq_triton.kernels.common import Text

    text, same, other = (Text(4, False, warpgroup=False) for _ in range(3))
    other.keep(unpack="of another release")
    assert repr(text) == repr(same) != repr(other)


def compiled_plan(problem: Problem, plan: DecodePlan | WidePlan, *, bias: bool):
    from gptq_triton.kernels import decode, wide

    tiles = asdict(plan)
    splits = tiles.pop("split") > 1
    module = decode if isinstance(plan, DecodePlan) else wide
    own = tiles.pop("own_digits", False)
    tiles.pop("max_registers", None)
    ordered = problem.ordered and own
    if own:
        tiles |= {"own_rows": problem.M, "bf16": problem.dtype == torch.bfloat16, "pairs": not bias}
        tiles["numbers"] = power_of_two(problem.steps * 128) if ordered else 0
    if module is wide:
        tiles["rows"] = plan.rows(problem)
    pdl = problem.capability >= 90
    constants = module.constants(
        problem.bits, problem.dtype == torch.bfloat16, splits=splits, group_columns=problem.group_columns, pdl=pdl,
        **tiles,
    )  # fmt: skip
    half = "bf16" if problem.dtype == torch.bfloat16 else "fp16"
    pointers: dict[str, str | None] = {"x_ptr": half if own else None, "order_ptr": "i32" if ordered else None}
    pointers |= dict.fromkeys(("digits_ptr", "sums_ptr"), None if own else "i32")
    if module is wide:
        box, layout = [2 * tiles["rows"] * plan.chunk, 128], wide.DIGITS_LAYOUT.value
        pointers["digits"] = f"tensordesc<i8{box},{layout!r}>"
    pointers |= dict.fromkeys(("words_ptr", "meta_ptr"), "i32") | {
        "bias_ptr": half if bias else None,
        "y_ptr": half,
        "workspace_ptr": "fp32" if splits else None,
        "counters_ptr": "i32" if splits else None,
    }
    integers = ("M", "N", "K", "steps", "strips", "stride_xm", "stride_ym")
    if isinstance(plan, WidePlan):
        options = {"num_warps": plan.warps, "maxnreg": plan.max_registers, "launch_pdl": pdl}
        return compiled(wide.wide_kernel, pointers, integers, constants, problem.arch, **options)
    options = {"num_warps": plan.warps, "launch_pdl": pdl}
    return compiled(decode.decode_kernel, pointers, integers, constants, problem.arch, **options)


def cases():
    """The first plan of each kernel for every width and number of rows; fewer where only the target differs."""
    for bits in BITS:
        for M in (1, 4, 8, 16):
            yield replace(LARGE, M=M, bits=bits), M == 8
    for columns in (64, 32, ONE_GROUP):
        for M in {64: (1, 2, 4, 16), 32: (1, 2, 4)}.get(columns, (1, 4, 16)):
            yield replace(LARGE, M=M, bits=3, group_columns=columns, dtype=torch.bfloat16), True
    for bits, M in ((2, 16), (4, 16), (4, 8)):
        yield replace(LARGE, M=M, bits=bits, group_columns=64), False
    for arch in ("sm_80", "sm_86", "sm_89", "sm_100", "sm_120"):
        yield replace(LARGE, M=4, bits=3, arch=arch), False
        yield replace(LARGE, M=16, arch=arch), True
    for bits, M, arch in ((4, 1, "sm_90"), (3, 2, "sm_90"), (8, 1, "sm_80")):
        yield replace(LARGE, M=M, bits=bits, steps=32, arch=arch, ordered=True), bits == 3


@pytest.mark.parametrize(("problem", "bias"), [pytest.param(*case, id=str(i)) for i, case in enumerate(cases())])
def test_plans_compile_and_fit(problem, bias, tmp_path):
    firsts: dict[object, DecodePlan | WidePlan | None] = {}
    for plan in candidates(problem):
        if isinstance(plan, (DecodePlan, WidePlan)):
            if isinstance(plan, DecodePlan) and plan.own_digits:
                continue
            if isinstance(plan, DecodePlan):
                plan = replace(plan, split=1 if bias else 2, persistent=bias)
                splits = [replace(plan, split=split, persistent=bias and split == 1) for split in (1, 2, 4, 8, 16)]
                own = (with_own_digits(problem, plan) for plan in splits)
                firsts.setdefault("own digits", next(filter(None, own), None))  # the longest that fit
                even = replace(plan, split=2, persistent=True)
                firsts.setdefault("even", even)
                firsts.setdefault("own digits, even", with_own_digits(problem, even))
                firsts.setdefault((type(plan), plan.in_turn), plan)
            else:
                firsts.setdefault((type(plan), plan.max_registers), replace(plan, split=1 if bias else 2))
    columns = problem.M * problem.subgroups
    assert ((DecodePlan, problem.subgroups > 1 and columns > 4) in firsts) == (columns <= 16)
    assert (firsts.get("own digits") is not None) == (columns <= 4)
    for plan in filter(None, firsts.values()):
        binary = compiled_plan(problem, plan, bias=bias)
        assert binary.metadata.shared <= SHARED_MEMORY[problem.arch]
        report = ptxas_report(binary, tmp_path)
        spilled = re.search(r"(\d+) bytes spill stores", report)
        assert spilled
        assert int(spilled[1]) == 0, (plan, report)
        assert "C75" not in report, report  # wgmma serialized
        ptx = binary.asm["ptx"]
        if isinstance(plan, DecodePlan):
            assert "mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32" in ptx
        else:
            assert f"wgmma.mma_async.sync.aligned.m64n{2 * plan.rows(problem)}k32.s32.s8.s8" in ptx
            assert "fence.proxy" not in ptx  # which would wait for the words that are on their way


def transposed_cases():
    """Every width at every size of tiles; fewer where only dtypes and groups differ."""
    half, bf16 = torch.float16, torch.bfloat16
    for bits in BITS:
        yield bits, half, half, 128, 256
        yield bits, bf16, half, 64, 128
        yield bits, bf16, bf16, 32, 64
        yield bits, half, half, ONE_GROUP, 32
    yield 8, bf16, bf16, 32, 256
    yield 2, half, bf16, 32, 128


def compiled_gradient(problem: Problem, plan: TransposedPlan, scales: torch.dtype):
    from gptq_triton.kernels import transposed

    names = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.int32: "i32"}
    constants = transposed.constants(
        problem.bits, problem.dtype == torch.bfloat16, scales == torch.bfloat16, problem.group_columns,
        plan.block_m, plan.stages, plan.products(plan.block_m, plan.resident), plan.unit, plan.group_m, plan.resident,
    )  # fmt: skip
    boxes = transposed.descriptors(constants["F"], problem.dtype, plan.block_m)
    pointers = dict.fromkeys(("dy", "words", "low_words", "meta", "dx"))
    for name, box in zip(pointers, boxes, strict=True):
        pointers[name] = box and f"tensordesc<{names[box[0]]}{box[1]},{box[2]!r}>"
    pointers |= {"workspace_ptr": "fp32", "counters_ptr": "i32"}
    integers = ("sharing", "streamed", "blocks_m", "steps", "units")
    options = transposed.options(plan.resident, pdl=True)
    return compiled(transposed.transposed_kernel, pointers, integers, constants, "sm_90", **options)


@pytest.mark.parametrize(("bits", "dtype", "scales", "group_columns", "rows"), list(transposed_cases()))
def test_gradients_compile_and_fit(bits, dtype, scales, group_columns, rows, tmp_path):
    problem = replace(LARGE, M=2048, bits=bits, group_columns=group_columns, dtype=dtype)
    plans = {plan.resident: plan for plan in transposed_plans(problem) if plan.block_m == rows}
    assert plans
    for plan in plans.values():
        binary = compiled_gradient(problem, plan, scales)
        assert binary.metadata.shared <= (SHARED_MEMORY["sm_90"] if plan.resident == 1 else 113 << 10)
        report = ptxas_report(binary, tmp_path)
        assert "0 bytes spill stores" in report, report
        assert "C75" not in report, report  # wgmma serialized
        ptx = binary.asm["ptx"]
        # the A operand is in registers, a product of 16 rows of W each; movmatrix turned every one of them over
        assert f"wgmma.mma_async.sync.aligned.m64n{plan.block_m}k16.f32" in ptx
        assert ptx.count("movmatrix") == 4 * ptx.count("wgmma.mma_async")


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_120"])
@pytest.mark.parametrize("wide", [False, True])
def test_digits_compile(arch, wide, tmp_path):
    from gptq_triton.kernels.digits import constants, digits_kernel

    for dtype, order, subgroups, turns in (("fp16", None, 1, 1), ("bf16", "i32", 4, 1), ("bf16", "i32", 1, 4)):
        tiles, rows = (0, 16) if wide else (2, 0)
        names = constants(
            dtype == "bf16", order is not None, tiles, rows, subgroups, turns, order is None, int(arch[3:]) >= 90
        )
        pointers = {"x_ptr": dtype, "order_ptr": order, "digits_ptr": "i32", "sums_ptr": "i32"}
        binary = compiled(digits_kernel, pointers, ("K", "steps", "stride_xm"), names, arch, num_warps=1)
        assert binary.metadata.shared <= 4 * subgroups * turns  # no more than sums
        assert "0 bytes spill stores" in ptxas_report(binary, tmp_path)
        assert binary.asm["ptx"].count("dp4a") == 4  # eight columns a lane, once


def compiled_large(problem: Problem, plan: LargePlan, *, scales_bf16: bool, bias: bool):
    from gptq_triton.kernels import large

    bf16 = problem.dtype == torch.bfloat16
    tiles = large.Tiles(
        problem.bits, bf16, scales_bf16, problem.group_columns, plan.block_m, plan.groups, plan.stages,
        plan.resident, plan.split > 1, bias, True,
    )  # fmt: skip
    half, rows, flat = "bf16" if bf16 else "fp16", large.ROWS_LAYOUT.value, large.FLAT_LAYOUT.value
    strips, subgroups = plan.strips_of_program // tiles.pieces.value, max(1, 128 // problem.group_columns)
    pointers = {
        "x": f"tensordesc<{half}[{plan.block_m}, 64],{rows!r}>",
        "words": f"tensordesc<i32[{strips}, 128],{flat!r}>",
        "rest": f"tensordesc<i32[{strips}, 64],{flat!r}>",
        "meta": f"tensordesc<i32[{subgroups}, {16 * strips}],{flat!r}>",
        "y": f"tensordesc<{half}[{tiles.out_m.value}, 64],{rows!r}>",
        "bias_ptr": half if bias else None,
        "workspace_ptr": "fp32" if plan.split > 1 else None,
        "counters_ptr": "i32" if plan.split > 1 else None,
    }
    integers = ("M", "N", "steps", "sharing", "streamed")
    options = large.options(plan.resident, pdl=True)
    return compiled(large.large_kernel, pointers, integers, {"C": tiles}, "sm_90", **options)


def large_cases():
    """Every width, dtype and group, at every size of tiles; fewer where only registers differ."""
    for bits in BITS:
        for M in (64, 128, 256):
            yield replace(LARGE, M=M, bits=bits), False
        yield replace(LARGE, M=256, bits=bits, group_columns=32, dtype=torch.bfloat16), False
    yield replace(LARGE, M=32, bits=3, group_columns=64, dtype=torch.bfloat16), True
    yield replace(LARGE, M=17, group_columns=ONE_GROUP), False


@pytest.mark.parametrize(
    ("problem", "scales_bf16"), [pytest.param(*case, id=str(i)) for i, case in enumerate(large_cases())]
)
def test_large_plans_compile_and_fit(problem, scales_bf16, tmp_path):
    plans = {
        (p.block_m, p.groups, p.resident): p for p in candidates(problem) if isinstance(p, LargePlan) and p.split <= 2
    }
    assert plans
    for i, plan in enumerate(plans.values()):
        plan = replace(plan, split=1 + i % 2)
        binary = compiled_large(problem, plan, scales_bf16=scales_bf16, bias=problem.bits == 3)
        assert binary.metadata.shared <= SHARED_MEMORY[problem.arch]
        report = ptxas_report(binary, tmp_path)
        spilled = re.search(r"(\d+) bytes spill stores", report)
        assert spilled
        # two programs on a multiprocessor have half of its registers each: a few wait in memory once every two steps
        assert int(spilled[1]) <= (64 if plan.resident == 2 else 16), (plan, report)
        assert "C75" not in report, report  # wgmma serialized
        # a quarter of a step is two products; a group has code for one step, for two, some for four, and for what sets
        # it apart
        late = (plan.block_m, plan.groups) == (128, 2)
        most = 4 if late else 2
        pieces = [n for group in range(plan.groups) for n in (group * most // plan.groups, 1, 2, *[4] * late)]
        assert binary.asm["ptx"].count("wgmma.mma_async") == 8 * sum(pieces)
        waits = re.findall(r"wgmma\.wait_group\S*\s+(\d)", binary.asm["ptx"])
        assert len(waits) == sum(pieces)
        on_their_way = "2" if late else "1"
        assert waits.count(on_their_way) == sum(max(0, n - 1) for n in pieces)  # all others end a piece of code
