"""What NVIDIA's assembler says of a compiled kernel."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

SHARED_MEMORY = {  # bytes a program may use
    "sm_80": 166912,
    "sm_86": 101376,
    "sm_89": 101376,
    "sm_90": 232448,
    "sm_100": 232448,
    "sm_120": 101376,
    "gfx942": 65536,
}


def ptxas_report(compiled, folder: Path) -> str:
    """What ptxas says of registers, spills and serialization."""
    import triton.backends.nvidia

    text = compiled.asm["ptx"]
    target = re.search(r"^\.target (\w+)", text, re.MULTILINE)
    assert target
    name = "ptxas-blackwell" if compiled.metadata.target.arch >= 100 else "ptxas"
    (folder / "kernel.ptx").write_text(text)
    command = [
        str(Path(triton.backends.nvidia.__file__).parent / "bin" / name),
        "-v",
        f"--gpu-name={target[1]}",
        str(folder / "kernel.ptx"),
        "-o",
        str(folder / "kernel.cubin"),
    ]
    return subprocess.run(command, capture_output=True, text=True, check=True).stderr
