"""Every kernel variant, compiled for every target without a GPU: it fits, no spills, weights stay in registers."""

from __future__ import annotations

import ast
import importlib
import itertools
import os
import re
import sys
from pathlib import Path

import pytest

from gptq_triton.spec import BITS
from tests.ptxas import SHARED_MEMORY, ptxas_report

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="triton is on Linux only"),
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="an interpreted kernel cannot be compiled"),
]

KERNELS = Path(__file__).parent.parent / "kernels"
POINTERS = ("x", "i32", "i64", "u8", "fp16", "fp32", "fp64")
UNALIGNED = (
    "M",
    "group_steps",
    "first",
    "count",
    "maxq",
    "K",
    "length",
    "candidates",
)  # no kernel is specialized on these
NO_PLAN = (None, None, 4, 2, None)


def plans(module: str, arch: str, dtype: str) -> tuple[tuple[int | None, ...], ...]:
    """(block_m, block_n, num_warps, num_stages, max_registers) to try."""
    if module in ("solve", "clip", "refit"):
        tiles = importlib.import_module(f"gptq_triton.kernels.{module}").TILES
        return tuple((None, block_n, num_warps, 1, None) for block_n, num_warps in tiles)
    if module != "matmul":
        return (NO_PLAN,)
    from gptq_triton.kernels import matmul

    if dtype == "fp32":
        return matmul.FLOAT
    if arch.startswith("gfx"):
        return matmul.AMD
    return matmul.HOPPER if arch == "sm_90" else matmul.NVIDIA


def matrix():
    """What is compiled: all widths and dtypes for sm_90; 3 bits, which take most room, elsewhere."""
    for path in sorted(KERNELS.glob("*.py")):
        module = path.stem
        variants = getattr(importlib.import_module(f"gptq_triton.kernels.{module}"), "VARIANTS", ())
        cases = [("sm_90", dtype, bits) for dtype in ("fp16", "bf16", "fp32") for bits in BITS]
        cases += [(arch, dtype, 3) for arch in SHARED_MEMORY for dtype in ("fp16", "fp32")]
        cases += [("sm_80", "bf16", 8), ("gfx942", "bf16", 8)]
        for index, (arch, dtype, bits) in itertools.product(range(len(variants)), dict.fromkeys(cases)):
            if bits == 3 or "SPAN" in variants[index]:  # what knows no groups knows no widths
                for plan in plans(module, arch, dtype):
                    yield module, index, arch, dtype, bits, plan


def compile_variant(variant: dict, plan: tuple, arch: str, dtype: str, bits: int, aligned: bool = True):
    """The compiled kernel."""
    import triton
    from triton.backends.compiler import GPUTarget

    from gptq_triton.kernels.unpack_ptx import unpack_ptx

    amd, kernel = arch.startswith("gfx"), variant["kernel"]
    block_m, block_n, num_warps, num_stages, max_registers = plan
    half = "bf16" if dtype == "bf16" and "STRIPS" not in variant else "fp16"  # dequantize unpacks to float16
    asm, constraints = (None, None) if amd or dtype == "fp32" else unpack_ptx(bits, half == "bf16")
    constants = {"BITS": bits, "SCALES_BF16": dtype == "bf16", "ASM": asm, "CONSTRAINTS": constraints}
    constants |= {"BLOCK_M": block_m, "BLOCK_N": block_n, "STAGES": num_stages}
    constants |= {name: value for name, value in variant.items() if value not in POINTERS}
    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    types = {name: "*" + (dtype if value == "x" else value) for name, value in variant.items() if value in POINTERS}
    types |= {"low_unit": "fp32"}
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in kernel.arg_names}
    attrs = {
        (i,): [["tt.divisibility", 16]]
        for i, (name, kind) in enumerate(signature.items())
        if kind != "constexpr" and (kind.startswith("*") or (aligned and name not in UNALIGNED))
    }
    target = GPUTarget("hip", arch, 64) if amd else GPUTarget("cuda", int(arch[3:]), 32)
    source = triton.compiler.ASTSource(kernel, signature, constexprs=constants, attrs=attrs)
    options = {"num_warps": num_warps, "num_stages": num_stages}
    if max_registers is not None and variant.get("SPAN") == 128:
        options["maxnreg"] = max_registers
    return triton.compile(source, target, options=options)


def allowed_spill(dtype: str) -> int:
    """Bytes: none, but ptxas parks registers of some float32 kernels; with Triton 3.6 more, and two of another."""
    import triton

    old = triton.__version__.startswith("3.6.")
    if dtype == "fp32":
        return 128 if old else 32
    return 8 if old else 0


def check(compiled, arch: str, dtype: str, tmp_path: Path) -> None:
    assert compiled.metadata.shared <= SHARED_MEMORY[arch]
    if arch.startswith("gfx"):
        spills = re.findall(r"\.[sv]gpr_spill_count:\s*(\d+)", compiled.asm["amdgcn"])
        assert spills
        assert set(spills) == {"0"}
    else:
        report = ptxas_report(compiled, tmp_path)
        spilled = re.search(r"(\d+) bytes spill stores", report)
        assert spilled
        assert int(spilled[1]) <= allowed_spill(dtype), report
        assert "C75" not in report, report  # wgmma serialized


@pytest.mark.parametrize(
    ("module", "index", "arch", "dtype", "bits", "plan"),
    [pytest.param(*case, id="-".join(map(str, case))) for case in matrix()],
)
def test_variant_compiles_and_fits(module, index, arch, dtype, bits, plan, tmp_path):
    variant = importlib.import_module(f"gptq_triton.kernels.{module}").VARIANTS[index]
    compiled = compile_variant(variant, plan, arch, dtype, bits)
    check(compiled, arch, dtype, tmp_path)
    if module == "matmul" and arch == "sm_90" and dtype != "fp32":
        # weights are the A operand in registers: the loop writes nothing to shared memory but what cp.async brings
        loop, product, _ = compiled.asm["ptx"].rpartition("wgmma.mma_async")
        assert product
        assert "st.shared" not in loop


@pytest.mark.parametrize("module", ["matmul", "dequantize", "gather", "solve", "clip", "refit", "passes"])
def test_ragged_shapes_compile_and_fit(module):
    # unaligned rows take an address and a mask per element: a few spilled bytes are allowed
    for variant in importlib.import_module(f"gptq_triton.kernels.{module}").VARIANTS:
        for arch in ("sm_86", "sm_90", "gfx942"):
            for plan in plans(module, arch, "fp16"):
                compiled = compile_variant(variant, plan, arch, "fp16", 3, aligned=False)
                assert compiled.metadata.shared <= SHARED_MEMORY[arch]


@pytest.mark.parametrize("path", sorted(KERNELS.glob("*.py")), ids=lambda path: path.stem)
def test_no_kernel_is_missing_from_the_list(path):
    # a jitted function is a kernel unless another jitted function calls it
    jitted, called = set(), set()
    for file in KERNELS.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.FunctionDef) and "jit" in " ".join(map(ast.unparse, node.decorator_list)):
                called |= {ast.unparse(call.func) for call in ast.walk(node) if isinstance(call, ast.Call)}
                called |= {each.id for each in ast.walk(node) if isinstance(each, ast.Name)}  # parts of warp_specialize
                jitted |= {node.name} if file == path else set()
    listed = {
        v["kernel"].__name__
        for v in getattr(importlib.import_module(f"gptq_triton.kernels.{path.stem}"), "VARIANTS", ())
    }
    elsewhere = {
        "decode_kernel",
        "wide_kernel",
        "digits_kernel",
        "large_kernel",
        "transposed_kernel",
    }  # test_gluon_compile.py
    assert jitted - called - elsewhere == listed
