"""Safetensors files and folders: read what is there, write all of it or nothing."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

INDEX = "model.safetensors.index.json"


def shards(folder: Path) -> dict[str, Path]:
    """Tensor name to the file that holds it.

    Raises:
        ValueError: There is no safetensors file, one is malformed, or the index names a file outside.
    """
    if (folder / INDEX).exists():
        try:
            names = set(json.loads((folder / INDEX).read_text())["weight_map"].values())
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise ValueError(f"{folder / INDEX} is not a shard index: {error!r}") from None
        for name in names:
            if not isinstance(name, str) or Path(name).name != name or name in ("", ".."):
                raise ValueError(f"{folder / INDEX} names {name!r}, which is not a file of this folder")
        files = [folder / name for name in sorted(names)]
    elif (folder / "model.safetensors").exists():  # others beside it are of another making, as LoRA adapters
        files = [folder / "model.safetensors"]
    else:
        files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ValueError(f"{folder} has no .safetensors file")
    where: dict[str, Path] = {}
    for path in files:
        with _opened(path) as file:
            for key in file.keys():  # noqa: SIM118 - not a dict
                if key in where:
                    raise ValueError(f"{key} is in both {where[key].name} and {path.name}")
                where[key] = path
    return where


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors and the metadata of one safetensors file."""
    with _opened(path) as file:
        return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write one safetensors file: the whole of it or nothing."""
    with _renamed(path) as fresh:
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, fresh, metadata=dict(metadata))


def atomic_write(path: Path, text: str) -> None:
    """Write one text file: the whole of it or nothing."""
    with _renamed(path) as fresh:
        fresh.write_text(text)


def check_target(folder: str | Path) -> Path:
    """The absolute path of a folder that :func:`save_quantized` may write or replace.

    Raises:
        ValueError: It exists and is neither empty nor a model folder, or is the working directory.
    """
    folder = Path(folder).resolve()
    if Path.cwd().is_relative_to(folder):
        raise ValueError(f"folder {folder} is the working directory, which cannot be replaced; name another")
    if folder.exists() and not (folder.is_dir() and (not any(folder.iterdir()) or (folder / "config.json").exists())):
        raise ValueError(f"folder {folder} exists and is not a model folder; it is left alone")
    return folder


@contextmanager
def open_files(where: Mapping[str, Path]) -> Iterator[dict[str, Any]]:
    """Tensor name to the open file that holds it. Opening reads the names of all tensors, so it is done once."""
    with ExitStack() as stack:
        files = {path: stack.enter_context(_opened(path)) for path in sorted(set(where.values()))}
        yield {key: files[path] for key, path in where.items()}


def read_tensor(files: Mapping[str, Any], key: str) -> Tensor:
    """One tensor of :func:`open_files`."""
    return files[key].get_tensor(key)


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        opened = safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is not a readable safetensors file: {error}") from None
    with opened as file:
        yield file


@contextmanager
def _renamed(path: Path) -> Iterator[Path]:
    """A temporary name in the same folder, renamed to path if all goes well."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    fresh = Path(name)
    try:
        yield fresh
        os.replace(fresh, path)
    finally:
        fresh.unlink(missing_ok=True)


@contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """A temporary folder beside the target, swapped in if all goes well."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    fresh, old = beside / "new", beside / "old"
    try:
        fresh.mkdir()
        yield fresh
        if folder.exists():
            os.replace(folder, old)
        os.replace(fresh, folder)
    finally:
        if old.exists() and not folder.exists():
            os.replace(old, folder)
        shutil.rmtree(beside, ignore_errors=True)
