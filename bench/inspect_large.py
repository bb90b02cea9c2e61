"""``gptq-triton inspect`` on a synthetic checkpoint of 4 GB: seconds and resident memory of its process.

Shapes of a 7B Llama at 4 bits with groups of 128, asymmetric; random words. Read once with nothing of it in the
page cache and once with all of it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from record import RESULTS, provenance, write
from torch import Tensor

from gptq_triton.tensorfile import Entry, file_order, write_tensors

K, WIDE, LAYERS, VOCABULARY, GROUP = 4096, 11008, 32, 32000, 128
LINEARS = {
    **{f"self_attn.{name}_proj": (K, K) for name in "qkvo"},
    **{f"mlp.{name}_proj": (K, WIDE) for name in ("gate", "up")},
    "mlp.down_proj": (WIDE, K),
}

# its own high-water mark: ru_maxrss of a child starts at that of the process that made it
COMMAND = """
import re, sys, time
from gptq_triton.cli import main
main(["inspect", sys.argv[1], "--json"])
resident = re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1]
print(resident, time.process_time(), file=sys.stderr)
"""


def main() -> None:
    with tempfile.TemporaryDirectory(dir=sys.argv[1] if sys.argv[1:] else None) as scratch:
        folder = Path(scratch) / "large"
        make(folder)
        os.sync()  # what is still being written would slow the reading
        rows = [measure(folder, cold) for cold in (True, False)]
    method = "gptq-triton inspect FOLDER --json in a process of its own, import included; its VmHWM"
    write(RESULTS / "cpu" / "inspect_large.json", provenance(method) | {"rows": rows})
    print(json.dumps(rows, indent=1))


def make(folder: Path) -> None:
    """Two shards, an index and the config files."""
    folder.mkdir()
    where = {}
    for shard in range(2):
        entries: dict[str, Entry] = {}
        if shard == 0:
            entries["model.embed_tokens.weight"] = Entry(torch.float16, (VOCABULARY, K))
            entries["lm_head.weight"] = Entry(torch.float16, (VOCABULARY, K))
        for layer in range(shard * LAYERS // 2, (shard + 1) * LAYERS // 2):
            for name, (ins, outs) in LINEARS.items():
                prefix = f"model.layers.{layer}.{name}"
                entries[f"{prefix}.qweight"] = Entry(torch.int32, (ins // 8, outs))
                entries[f"{prefix}.qzeros"] = Entry(torch.int32, (ins // GROUP, outs // 8))
                entries[f"{prefix}.scales"] = Entry(torch.float16, (ins // GROUP, outs))
                entries[f"{prefix}.g_idx"] = Entry(torch.int32, (ins,))
        file = f"model-{shard + 1:05d}-of-00002.safetensors"
        ordered = {key: entries[key] for key in file_order(entries)}
        write_tensors(folder / file, ordered, _tensors(ordered), {"format": "pt"})
        where |= dict.fromkeys(entries, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    fields = {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "sym": False, "checkpoint_format": "gptq_v2"}
    (folder / "quantize_config.json").write_text(json.dumps(fields))
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "quantization_config": fields}))


def _tensors(entries: dict[str, Entry]) -> Iterator[tuple[str, Tensor]]:
    words = torch.randint(-(2**31), 2**31, (WIDE * K // 8,), generator=torch.Generator().manual_seed(0)).int()
    for key, entry in entries.items():
        count = entry.size // entry.dtype.itemsize
        if key.endswith("g_idx"):
            yield key, torch.arange(count, dtype=torch.int32) // GROUP
        elif entry.dtype == torch.int32:
            yield key, words[:count].view(entry.shape)
        else:
            yield key, torch.rand(entry.shape).add_(0.5).mul_(0.01).half()


def measure(folder: Path, cold: bool) -> dict[str, Any]:
    size = 0
    for path in folder.glob("*.safetensors"):
        size += path.stat().st_size
        if cold:
            with path.open("rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    started = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", COMMAND, str(folder)], capture_output=True, text=True, check=True)
    seconds = time.perf_counter() - started
    found, (resident, cpu) = json.loads(done.stdout), done.stderr.split()
    return {
        "cold cache": cold,
        "gigabytes": size / 1e9,
        "layers": len(found["layers"]),
        "findings": len(found["findings"]),
        "seconds": round(seconds, 2),
        "cpu_seconds": round(float(cpu), 2),
        "load_average": round(os.getloadavg()[0], 1),
        "resident_megabytes": round(int(resident) * 1024 / 1e6),
    }


if __name__ == "__main__":
    main()
