"""Every kernel variant, compiled for every target without a GPU: it fits, and it does not spill."""

from __future__ import annotations

import ast
import importlib
import itertools
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from gptq_triton.dispatch import Plan, choose
from gptq_triton.spec import BITS, QuantSpec

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="triton is on Linux only"),
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="an interpreted kernel cannot be compiled"),
]

KERNELS = Path(__file__).parent.parent / "kernels"
SHARED_MEMORY = {  # bytes a program may use
    "sm_80": 166912,
    "sm_86": 101376,
    "sm_89": 101376,
    "sm_90": 232448,
    "sm_100": 232448,
    "sm_120": 101376,
    "gfx942": 65536,
}
TYPES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}
ROWS = (1, 64, 4096)  # one M for every row of dispatch's tables


def variants():
    """(module, index into its VARIANTS) of every kernel file."""
    for path in sorted(KERNELS.glob("*.py")):
        for index in range(len(getattr(importlib.import_module(f"gptq_triton.kernels.{path.stem}"), "VARIANTS", ()))):
            yield path.stem, index


def matrix():
    """What is compiled: all widths and dtypes for sm_90; 3 bits, which take most room, elsewhere."""
    for module, index in variants():
        for dtype, bits in itertools.product(TYPES, BITS):
            yield module, index, "sm_90", dtype, bits, 4096
        for arch in SHARED_MEMORY:
            for M in ROWS[1:] if index else ROWS:
                yield module, index, arch, torch.float16, 3, M
            if arch != "sm_90":
                yield module, index, arch, torch.float32, 3, 4096
        yield module, index, "gfx942", torch.bfloat16, 4, 1
        yield module, index, "sm_80", torch.bfloat16, 4, 1


def plan_for(module: str, variant: dict, arch: str, dtype: torch.dtype, bits: int, M: int) -> Plan:
    """The plan that dispatch has for weights that need this variant."""
    if variant["ONE_GROUP"]:
        spec = QuantSpec(bits, 128)
    else:
        spec = QuantSpec(bits, 100, desc_act=variant["g_idx_ptr"] is not None)
    return choose(M, 4096, 4096, spec, dtype, arch, transposed=module == "matmul_transposed")


def compile_variant(variant: dict, plan: Plan, arch: str, dtype: torch.dtype, bits: int, aligned: bool = True):
    """The compiled kernel."""
    import triton
    from triton.backends.compiler import GPUTarget

    constants = {
        "BITS": bits,
        "ZERO_OFFSET": 1,
        "BLOCK_M": plan.block_m,
        "BLOCK_N": plan.block_n,
        "BLOCK_K": plan.block_k,
    }
    constants |= {name: value for name, value in variant.items() if name != "kernel" and not isinstance(value, str)}
    pointers = {
        name: "*" + (TYPES[dtype] if value == "x" else value)
        for name, value in variant.items()
        if value in ("x", "i32", "fp16", "fp32")
    }
    kernel = variant["kernel"]
    signature = {name: "constexpr" if name in constants else pointers.get(name, "i32") for name in kernel.arg_names}
    attrs = {
        (i,): [["tt.divisibility", 16]]
        for i, (name, kind) in enumerate(signature.items())
        if kind != "constexpr" and (kind.startswith("*") or (aligned and name != "M"))
    }
    target = GPUTarget("hip", arch, 64) if arch.startswith("gfx") else GPUTarget("cuda", int(arch[3:]), 32)
    source = triton.compiler.ASTSource(kernel, signature, constexprs=constants, attrs=attrs)
    return triton.compile(source, target, options={"num_warps": plan.num_warps, "num_stages": plan.num_stages})


def ptxas_report(compiled, tmp_path: Path) -> str:
    """What ptxas says of registers, spills and serialization."""
    import triton.backends.nvidia

    text = compiled.asm["ptx"]
    target = re.search(r"^\.target (\w+)", text, re.MULTILINE)
    assert target
    name = "ptxas-blackwell" if compiled.metadata.target.arch >= 100 else "ptxas"
    (tmp_path / "kernel.ptx").write_text(text)
    command = [
        str(Path(triton.backends.nvidia.__file__).parent / "bin" / name),
        "-v",
        f"--gpu-name={target[1]}",
        str(tmp_path / "kernel.ptx"),
        "-o",
        str(tmp_path / "kernel.cubin"),
    ]
    return subprocess.run(command, capture_output=True, text=True, check=True).stderr


def allowed_spill() -> int:
    """Bytes: none, but Triton 3.6 parks two registers in one variant (float32, act-order, 8 bits, sm_90)."""
    import triton

    return 8 if triton.__version__.startswith("3.6.") else 0


def check(compiled, arch: str, tmp_path: Path) -> None:
    assert compiled.metadata.shared <= SHARED_MEMORY[arch]
    if arch.startswith("gfx"):
        spills = re.findall(r"\.[sv]gpr_spill_count:\s*(\d+)", compiled.asm["amdgcn"])
        assert spills
        assert set(spills) == {"0"}
    else:
        report = ptxas_report(compiled, tmp_path)
        spilled = re.search(r"(\d+) bytes spill stores", report)
        assert spilled
        assert int(spilled[1]) <= allowed_spill(), report
        assert "C75" not in report, report  # wgmma serialized


@pytest.mark.parametrize(
    ("module", "index", "arch", "dtype", "bits", "M"),
    [pytest.param(*case, id="-".join(str(v).removeprefix("torch.") for v in case)) for case in dict.fromkeys(matrix())],
)
def test_variant_compiles_and_fits(module, index, arch, dtype, bits, M, tmp_path):
    variant = importlib.import_module(f"gptq_triton.kernels.{module}").VARIANTS[index]
    plan = plan_for(module, variant, arch, dtype, bits, M)
    check(compile_variant(variant, plan, arch, dtype, bits), arch, tmp_path)


@pytest.mark.parametrize(("module", "index"), list(variants()))
def test_ragged_shapes_compile_and_fit(module, index):
    # unaligned rows take an address and a mask per element: a few spilled bytes are allowed
    variant = importlib.import_module(f"gptq_triton.kernels.{module}").VARIANTS[index]
    for arch in ("sm_86", "gfx942"):
        plan = plan_for(module, variant, arch, torch.float16, 3, 4096)
        compiled = compile_variant(variant, plan, arch, torch.float16, 3, aligned=False)
        assert compiled.metadata.shared <= SHARED_MEMORY[arch]


@pytest.mark.parametrize("path", sorted(KERNELS.glob("*.py")), ids=lambda path: path.stem)
def test_no_kernel_is_missing_from_the_list(path):
    # a jitted function is a kernel unless another jitted function calls it
    jitted, called = set(), set()
    for file in KERNELS.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.FunctionDef) and "jit" in " ".join(map(ast.unparse, node.decorator_list)):
                called |= {ast.unparse(call.func) for call in ast.walk(node) if isinstance(call, ast.Call)}
                jitted |= {node.name} if file == path else set()
    listed = {
        v["kernel"].__name__
        for v in getattr(importlib.import_module(f"gptq_triton.kernels.{path.stem}"), "VARIANTS", ())
    }
    assert jitted - called == listed
