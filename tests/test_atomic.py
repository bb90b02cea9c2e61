"""Whole or not at all, whatever kills the process, fills the disk, or saves at the same time."""

import os
import resource
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch

from gptq_triton import (
    QuantizeConfig,
    convert_checkpoint,
    inspect_checkpoint,
    load_quantized,
    quantize_model,
    save_quantized,
)
from gptq_triton import atomic as atomic_module
from gptq_triton.atomic import _exchange, atomic_write, mend, replacing, unreplaced
from gptq_triton.files import save_tensors
from gptq_triton.tensorfile import TensorFile
from tests import killing
from tests.killing import contents, in_a_process
from tests.tiny import batches, tiny


def model_folder(path, text):
    path.mkdir()
    (path / "config.json").write_text(text)
    return path


def write(folder, text):
    with replacing(folder) as fresh:
        (fresh / "config.json").write_text(text)


def checkpoint(seed=0):
    model = tiny("llama", seed)
    quantize_model(model, batches(1), QuantizeConfig(4, 32), method="rtn", progress=False)
    return model


# one step


def test_two_folders_change_places(tmp_path):
    one, other = model_folder(tmp_path / "one", "1"), model_folder(tmp_path / "other", "2")
    assert _exchange(one, other)
    assert ((one / "config.json").read_text(), (other / "config.json").read_text()) == ("2", "1")
    with pytest.raises(FileNotFoundError):
        _exchange(one, tmp_path / "none")


@pytest.mark.parametrize("exchange", [True, False])
def test_replacing(tmp_path, monkeypatch, exchange):
    if not exchange:
        monkeypatch.setattr(atomic_module, "_exchange", lambda one, other: False)
    for text in ("1", "2", "3"):
        write(tmp_path / "m", text)
        assert contents(tmp_path / "m") == {"config.json": text.encode()}
        assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_no_exchange_where_the_system_has_none(tmp_path, monkeypatch):
    one, other = model_folder(tmp_path / "one", "1"), model_folder(tmp_path / "other", "2")
    monkeypatch.setattr(atomic_module.ctypes, "CDLL", lambda *args, **kwargs: object())
    assert not _exchange(one, other)
    assert (one / "config.json").read_text() == "1"


def test_a_kill_between_two_renames_is_mended_by_whoever_comes_next(tmp_path, monkeypatch):
    """Without an exchange there is a moment with no folder."""
    save_quantized(checkpoint(), tmp_path / "m")
    old, model = contents(tmp_path / "m"), checkpoint(1)
    real, calls = os.rename, []

    def rename(source, target):
        calls.append(source)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        real(source, target)

    def save():
        monkeypatch.setattr(atomic_module, "_exchange", lambda one, other: False)
        monkeypatch.setattr(atomic_module.os, "rename", rename)
        save_quantized(model, tmp_path / "m")

    assert os.waitpid(in_a_process(save), 0)[1] == signal.SIGKILL
    assert not (tmp_path / "m").exists()
    load_quantized(tmp_path / "m")
    assert contents(tmp_path / "m") == old
    mend(tmp_path / "m")  # nothing to do
    save_quantized(model, tmp_path / "m")
    assert contents(tmp_path / "m") != old


def test_what_a_killed_save_left_is_removed_by_the_next_but_never_a_living_ones(tmp_path, monkeypatch):
    monkeypatch.setattr(atomic_module, "STALE_AFTER", -1)
    stale = tmp_path / ".m.dead"
    (stale / "new").mkdir(parents=True)
    (tmp_path / ".m.blocks").mkdir()  # another kind of folder beside it
    (tmp_path / ".m.blocks" / "run.json").write_text("x")
    with replacing(tmp_path / "m") as fresh:
        assert not stale.exists()
        (fresh / "config.json").write_text("outer")
        assert os.waitpid(in_a_process(lambda: write(tmp_path / "m", "inner")), 0)[1] == 0
        assert (fresh / "config.json").exists()
        assert (tmp_path / "m" / "config.json").read_text() == "inner"
    assert (tmp_path / "m" / "config.json").read_text() == "outer"
    assert sorted(path.name for path in tmp_path.iterdir()) == [".m.blocks", "m"]


def test_a_young_folder_may_not_be_locked_yet(tmp_path):
    (tmp_path / ".m.young" / "new").mkdir(parents=True)
    write(tmp_path / "m", "1")
    assert (tmp_path / ".m.young").exists()


# kill -9


def test_killed_saves(tmp_path):
    left = killing.kill_saves(tmp_path, 8)
    assert left["absent"] + left["old"] + left["new"] == left["killed"] == 8


def test_killed_quantizations_resume_to_the_same_codes(tmp_path):
    left = killing.kill_quantizations(tmp_path, 5)
    assert left["absent"] + left["new"] == left["killed"] == 5


# two at a time


@pytest.mark.parametrize("exchange", [True, False])
def test_two_processes_save_to_one_folder(tmp_path, monkeypatch, exchange):
    if not exchange:
        monkeypatch.setattr(atomic_module, "_exchange", lambda one, other: False)
    models = [checkpoint(seed) for seed in (0, 1)]
    for index, model in enumerate(models):
        save_quantized(model, tmp_path / f"whole{index}")
    whole, target = [contents(tmp_path / f"whole{index}") for index in (0, 1)], tmp_path / "m"
    savers = [in_a_process(lambda model=model: [save_quantized(model, target) for _ in range(8)]) for model in models]
    seen, running = 0, set(savers)
    while running:
        for saver in list(running):
            done, status = os.waitpid(saver, os.WNOHANG)
            if done:
                assert status == 0
                running.remove(saver)
        try:
            with unreplaced(target):
                found = contents(target)
        except (ValueError, OSError):
            continue  # it was replaced meanwhile, and said so
        assert found in whole
        seen += 1
    assert seen > 0
    assert contents(target) in whole
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m", "whole0", "whole1"]


@pytest.mark.parametrize("read", ["load", "inspect", "convert"])
def test_a_folder_that_is_replaced_while_it_is_read(tmp_path, monkeypatch, read):
    save_quantized(checkpoint(), tmp_path / "m")
    real = TensorFile.read

    def replaced(*arguments):
        if not (tmp_path / "away").exists():
            os.rename(tmp_path / "m", tmp_path / "away")
            shutil.copytree(tmp_path / "away", tmp_path / "m")
        return real(*arguments)

    monkeypatch.setattr(TensorFile, "read", replaced)
    works = {
        "load": lambda: load_quantized(tmp_path / "m"),
        "inspect": lambda: inspect_checkpoint(tmp_path / "m"),
        "convert": lambda: convert_checkpoint(tmp_path / "m", tmp_path / "out", "v2"),
    }
    with pytest.raises(ValueError, match="m was replaced while it was read; read it again"):
        works[read]()
    assert not (tmp_path / "out").exists()


# a full disk: a limit on the size of files makes every write fail in the same way


@pytest.mark.parametrize("old", [True, False])
def test_a_disk_that_is_full(tmp_path, old):
    model, target = checkpoint(), tmp_path / "m"
    save_quantized(checkpoint(1), tmp_path / "source")
    if old:
        shutil.copytree(tmp_path / "source", target)
    before = contents(target)
    works = {
        "save": lambda: save_quantized(model, target),
        "convert": lambda: convert_checkpoint(tmp_path / "source", target, "v2"),
        "tensors": lambda: save_tensors(tmp_path / "x", {"a": torch.ones(20000)}, {}),
        "text": lambda: atomic_write(tmp_path / "x", "x" * 50000),
    }
    for name, work in works.items():

        def full(work=work):
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))
            try:
                work()
            except OSError as error:
                Path(tmp_path / "error").write_text(str(error))
                return
            raise AssertionError("the disk was not full")

        assert os.waitpid(in_a_process(full), 0)[1] == 0, name
        message = (tmp_path / "error").read_text()
        assert "File too large" in message
        if name == "save":
            assert f"{target} could not be written, and is as it was: " in message
        (tmp_path / "error").unlink()
        assert contents(target) == before
        assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["source"] + ["m"] * old)


def test_a_name_that_others_keep_taking(tmp_path, monkeypatch):
    model_folder(tmp_path / "m", "theirs")
    monkeypatch.setattr(atomic_module, "ATTEMPTS", 3)
    tried = []

    def gone(one, other):
        tried.append(time.time())
        raise FileNotFoundError

    monkeypatch.setattr(atomic_module, "_exchange", gone)
    with pytest.raises(OSError, match="other processes keep replacing the folder"):
        write(tmp_path / "m", "mine")
    assert len(tried) == 3
    assert contents(tmp_path / "m") == {"config.json": b"theirs"}
