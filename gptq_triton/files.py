"""The tensor files of a checkpoint folder: which there are, and what is in them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

from torch import Tensor

from .atomic import renamed
from .tensorfile import Entry, TensorFile, TorchFile, file_order, open_tensors, write_tensors

INDEX = "model.safetensors.index.json"
INDEXES = (INDEX, "pytorch_model.bin.index.json")
SUFFIXES = (".safetensors", ".bin", ".pt", ".pth")
# in folders without an index: what each suffix's main file is called, and files that hold no weights
MAIN = ("model.safetensors", "pytorch_model.bin")
OTHER = ("training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth", "optimizer.bin", "scheduler.bin")

Files = Mapping[str, TensorFile | TorchFile]  # tensor name to the open file that holds it


def tensor_files(folder: Path) -> list[Path]:
    """The files that together hold the model, safetensors if there are any.

    Raises:
        ValueError: There are none, or an index is malformed or names a file outside.
    """
    for name, suffix in zip(INDEXES, (".safetensors", ".bin"), strict=True):
        if (folder / name).exists():
            return _indexed(folder / name, suffix)
        main = folder / MAIN[INDEXES.index(name)]
        if main.exists():  # others beside it are of another making, as LoRA adapters
            return [main]
        if suffix == ".safetensors" and (found := sorted(folder.glob("*.safetensors"))):
            return found
    found = sorted(p for p in folder.iterdir() if p.suffix in SUFFIXES[1:] and p.name not in OTHER)
    if not found:
        raise ValueError(f"{folder} has no .safetensors file, nor a .bin or .pt one")
    return found


@contextmanager
def open_checkpoint(path: Path) -> Iterator[Files]:
    """Tensor name to the open file that holds it, for a folder or a single file.

    Raises:
        ValueError: There is no file of tensors, one is malformed, two hold the same tensor, or the index
            names a file outside.
    """
    found: dict[str, TensorFile | TorchFile] = {}
    with ExitStack() as stack:
        for each in tensor_files(path) if path.is_dir() else [path]:
            file = stack.enter_context(open_tensors(each))
            for key in file.entries:
                if key in found:
                    raise ValueError(f"{key} is in both {found[key].path.name} and {each.name}")
                found[key] = file
        yield found


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors and the metadata of one file."""
    with open_tensors(path) as file:
        return {key: file.read(key) for key in file.entries}, file.metadata


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write one safetensors file: the whole of it or nothing."""
    entries = {name: Entry(tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    ordered = {name: entries[name] for name in file_order(entries)}
    with renamed(path) as fresh:
        write_tensors(fresh, ordered, ((name, tensors[name]) for name in ordered), metadata)


def _indexed(index: Path, suffix: str) -> list[Path]:
    try:
        names = set(json.loads(index.read_text())["weight_map"].values())
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise ValueError(f"{index} is not a shard index: {error!r}") from None
    for name in names:
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(suffix) or "\0" in name:
            raise ValueError(f"{index} names {name!r}, which is not a {suffix} file of this folder")
    if not names:
        raise ValueError(f"{index} names no file")
    return [index.parent / name for name in sorted(names)]
