"""Processes killed at a random moment of a save or of a quantization, and what they leave behind."""

from __future__ import annotations

import os
import random
import shutil
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from tqdm import tqdm

from gptq_triton import QuantizeConfig, load_quantized, quantize_model, save_quantized
from tests.tiny import batches, tiny

# the lock that tqdm shares between processes: a killed copy of this one would hold it for ever
tqdm.set_lock(threading.RLock())

SIZES = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 3}


def contents(folder: Path) -> dict[str, bytes] | None:
    """Every file of a folder; None where there is none."""
    return {path.name: path.read_bytes() for path in folder.iterdir()} if folder.exists() else None


def in_a_process(work: Callable[[], Any]) -> int:
    """Run something in a copy of this process; returns the copy's id."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        work()
        code = 0
    finally:
        os._exit(code)


def killed_after(work: Callable[[], Any], seconds: float) -> bool:
    """Run something in a process of its own and kill it; False if it was done before."""
    child = in_a_process(work)
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    return os.waitpid(child, 0)[1] == signal.SIGKILL


def duration(work: Callable[[], Any]) -> float:
    """Seconds that something takes in a process of its own."""
    started = time.perf_counter()
    assert os.waitpid(in_a_process(work), 0)[1] == 0
    return time.perf_counter() - started


def kill_saves(home: Path, count: int, seed: int = 0) -> dict[str, int]:
    """Kill saves until ``count`` died of it, every other one over an old folder; returns what each left.

    Raises:
        AssertionError: A folder is neither absent, the old one nor the new one, or cannot be written again.
    """
    rng, target = random.Random(seed), home / "target"
    models = [_model(seed, QuantizeConfig(4, 32, sym=bool(seed))) for seed in (0, 1)]
    for index, model in enumerate(models):
        save_quantized(model, home / f"whole{index}")
    whole = [contents(home / f"whole{index}") for index in (0, 1)]
    left = {"killed": 0, "too late": 0, "absent": 0, "old": 0, "new": 0}
    seconds = duration(lambda: save_quantized(models[1], target))
    while left["killed"] < count:
        shutil.rmtree(target, ignore_errors=True)
        if old := left["killed"] % 2:
            shutil.copytree(home / "whole0", target)
        if not killed_after(lambda: save_quantized(models[1], target), rng.uniform(0, seconds)):
            left["too late"] += 1
            continue
        left["killed"] += 1
        found = contents(target)
        assert found in ([whole[0], whole[1]] if old else [None, whole[1]]), "a folder that is neither old nor new"
        left["absent" if found is None else "new" if found == whole[1] else "old"] += 1
    save_quantized(models[1], target)
    assert contents(target) == whole[1]
    return left


def kill_quantizations(home: Path, count: int, seed: int = 0) -> dict[str, int]:
    """Kill quantizations until ``count`` died of it, and let each resume; returns how far they had come.

    Raises:
        AssertionError: A folder is neither absent nor the finished one, or resuming gives other codes.
    """
    rng, target, work = random.Random(seed), home / "quantized", home / "work"
    config = QuantizeConfig(4, 32, sym=False)

    def quantize() -> None:
        save_quantized(_model(0, config, work), target)

    seconds = duration(quantize)
    expected = load_file(target / "model.safetensors")
    left = {"killed": 0, "too late": 0, "absent": 0, "new": 0, "blocks kept": 0}
    while left["killed"] < count:
        for folder in (target, work):
            shutil.rmtree(folder, ignore_errors=True)
        if not killed_after(quantize, rng.uniform(0, seconds)):
            left["too late"] += 1
            continue
        left["killed"] += 1
        left["new" if target.exists() else "absent"] += 1
        if target.exists():
            _assert_equal(load_file(target / "model.safetensors"), expected)
        left["blocks kept"] += len(list(work.glob("block-*.safetensors")))
        quantize()
        _assert_equal(load_file(target / "model.safetensors"), expected)
    load_quantized(target)
    return left


def _model(seed: int, config: QuantizeConfig, work: Path | None = None) -> Any:
    model = tiny("llama", seed, **SIZES)
    method = "rtn" if work is None else "gptq"
    quantize_model(model, batches(3, 96), config, method=method, workdir=work, progress=False)
    return model


def _assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())
