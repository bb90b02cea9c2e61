"""Files of named tensors, read without trusting them: safetensors, and ``.pt`` of which only tensors are read.

safetensors files are read with plain reads, never mapped into memory: a file that shrinks while it is mapped
kills the process, and mapped pages count as memory, so that a scan of a large file would look like a leak.

Source of the format: https://huggingface.co/docs/safetensors (8 bytes of header length, a JSON header, data).
"""

from __future__ import annotations

import json
import math
import os
import struct
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
MAX_HEADER = 100_000_000  # bytes; the limit of the safetensors library


@dataclass(frozen=True)
class Entry:
    """Where one tensor lies in a file: its first byte, counted from the start of the file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int = 0

    @property
    def size(self) -> int:
        """Bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


class TensorFile:
    """An open safetensors file; a context manager.

    Args:
        path: The file.

    Raises:
        ValueError: It is not a whole, well-formed safetensors file.
    """

    def __init__(self, path: Path):
        self.path = path
        try:
            self._file = path.open("rb", buffering=0)
        except OSError as error:
            raise self._error(str(error)) from None
        try:
            self.entries, self.metadata = self._header()
        except BaseException:
            self._file.close()
            raise

    def read(self, name: str) -> Tensor:
        """One tensor."""
        entry = self.entries[name]
        return self._read(entry.start, entry.dtype, entry.shape)

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows start to stop of one matrix."""
        entry = self.entries[name]
        stride = entry.dtype.itemsize * math.prod(entry.shape[1:])
        return self._read(entry.start + start * stride, entry.dtype, (stop - start, *entry.shape[1:]))

    def __enter__(self) -> TensorFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def _error(self, rule: str) -> ValueError:
        return ValueError(f"{self.path} is not a readable safetensors file: {rule}")

    def _read(self, start: int, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
        raw = torch.empty(math.prod(shape) * dtype.itemsize, dtype=torch.uint8)
        view = raw.numpy().data
        try:
            self._file.seek(start)
            while len(view):
                got = self._file.readinto(view)
                if not got:
                    raise self._error("it became shorter while it was read")
                view = view[got:]
        except OSError as error:
            raise self._error(str(error)) from None
        return raw.view(dtype).view(shape)

    def _header(self) -> tuple[dict[str, Entry], dict[str, str]]:
        try:
            size = os.fstat(self._file.fileno()).st_size
            first = self._file.read(8)
            length = struct.unpack("<Q", first)[0] if len(first) == 8 else -1
            if length < 2:
                raise self._error("it has no header")
            if length > min(size - 8, MAX_HEADER):
                raise self._error(f"its header claims {length} bytes; the file has {size}")
            raw = b""
            while len(raw) < length and (more := self._file.read(length - len(raw))):
                raw += more
            content = json.loads(raw.decode(), object_pairs_hook=_unique, parse_constant=_refuse)
        except OSError as error:
            raise self._error(str(error)) from None
        except (ValueError, RecursionError) as error:
            if str(error).startswith(str(self.path)):
                raise
            raise self._error(f"its header is not valid JSON: {error}") from None
        if not isinstance(content, dict):
            raise self._error("its header is not a JSON object")
        metadata = content.pop("__metadata__", None)
        metadata = {} if metadata is None else metadata
        if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
            raise self._error("__metadata__ must map names to strings")
        entries = {name: self._entry(name, about, 8 + length) for name, about in content.items()}
        expected = 8 + length
        for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].size)):
            if entry.start != expected:
                raise self._error(f"{name} starts at byte {entry.start}, where {expected} was expected")
            expected += entry.size
        if expected != size:
            raise self._error(f"its tensors end at byte {expected}, the file at {size}")
        return entries, metadata

    def _entry(self, name: str, about: Any, base: int) -> Entry:
        if not isinstance(about, dict) or about.keys() != {"dtype", "shape", "data_offsets"}:
            raise self._error(f"{name} must have dtype, shape and data_offsets, got {str(about)[:100]}")
        shape, offsets = about["shape"], about["data_offsets"]
        for field, values in (("shape", shape), ("data_offsets", offsets)):
            if not isinstance(values, list) or not all(type(v) is int and 0 <= v < 2**63 for v in values):
                raise self._error(f"{name}: {field} must be a list of sizes, got {str(values)[:100]}")
        if not isinstance(about["dtype"], str) or about["dtype"] not in DTYPES:
            raise self._error(f"{name}: dtype must be one of {', '.join(DTYPES)}, got {str(about['dtype'])[:20]!r}")
        if len(offsets) != 2 or len(shape) > 16:
            raise self._error(f"{name}: data_offsets must be two numbers and shape at most 16")
        entry = Entry(DTYPES[about["dtype"]], tuple(shape), base + offsets[0])
        if offsets[1] - offsets[0] != entry.size:
            raise self._error(f"{name} takes {entry.size} bytes, its offsets say {offsets[1] - offsets[0]}")
        return entry


class TorchFile:
    """The same for a ``.pt``, ``.pth`` or ``.bin`` file: one dict of names to tensors.

    Only tensors are unpickled, and their data stays in the file until it is asked for. Compressed members
    and sizes beyond the file's own are refused before that. Every member's checksum is checked.

    Raises:
        ValueError: The file is damaged or holds anything but tensors by name.
    """

    def __init__(self, path: Path):
        self.path, self.metadata = path, dict[str, str]()
        try:
            with zipfile.ZipFile(path) as archive:
                members = archive.infolist()
                if any(member.compress_type != zipfile.ZIP_STORED for member in members):
                    raise ValueError("a member is compressed")
                if sum(member.file_size for member in members) > path.stat().st_size:
                    raise ValueError("its members claim more bytes than the file has")
                broken = archive.testzip()
                if broken is not None:
                    raise ValueError(f"the checksum of {broken} is wrong")
            tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except Exception as error:  # the unpickler fails in as many ways as there are damaged files
            raise ValueError(f"{path} is not a readable file of tensors alone: {error or type(error)}") from None
        if not isinstance(tensors, Mapping) or not all(
            isinstance(key, str) and isinstance(tensor, Tensor) for key, tensor in tensors.items()
        ):
            raise ValueError(f"{path} must hold one dict of names to tensors")
        strange = [key for key, t in tensors.items() if t.layout != torch.strided or t.is_quantized or t.is_meta]
        if strange:
            raise ValueError(f"{path}: {strange[0]} must be a dense tensor")
        self._tensors: dict[str, Tensor] = {key: tensor.detach() for key, tensor in tensors.items()}
        self.entries = {key: Entry(t.dtype, tuple(t.shape)) for key, t in self._tensors.items()}

    def read(self, name: str) -> Tensor:
        """One tensor."""
        return self._tensors[name].clone()  # out of the file, which may change

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows start to stop of one matrix."""
        return self._tensors[name][start:stop].clone()

    def __enter__(self) -> TorchFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._tensors = {}


def open_tensors(path: Path) -> TensorFile | TorchFile:
    """The file, opened; its suffix tells which of the two it is.

    Raises:
        ValueError: It is not readable.
    """
    return TensorFile(path) if path.suffix == ".safetensors" else TorchFile(path)


def write_tensors(
    path: Path, entries: Mapping[str, Entry], tensors: Iterable[tuple[str, Tensor]], metadata: Mapping[str, str]
) -> None:
    """Write a safetensors file one tensor at a time.

    Args:
        path: The file, made or overwritten; :mod:`gptq_triton.atomic` keeps half a file from being seen.
        entries: Name to dtype and shape, in the order of :func:`file_order`.
        tensors: Each name and its tensor, in the same order.
        metadata: Of the file.

    Raises:
        ValueError: A tensor is not the one that ``entries`` announce.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name, entry in entries.items():
        header[name] = {
            "dtype": NAMES[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [end, end + entry.size],
        }
        end += entry.size
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)  # so that tensors are aligned
    announced = iter(entries.items())
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(raw)) + raw)
        for (name, tensor), (expected, entry) in zip(tensors, announced, strict=True):
            if name != expected or tensor.dtype != entry.dtype or tuple(tensor.shape) != entry.shape:
                raise ValueError(f"{name} is {tensor.dtype} {tuple(tensor.shape)}, announced was {expected} {entry}")
            if tensor.numel():
                file.write(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)


def file_order(entries: Mapping[str, Entry]) -> Iterator[str]:
    """Names with the widest dtypes first, so that every tensor is aligned."""
    return iter(sorted(entries, key=lambda name: (-entries[name].dtype.itemsize, name)))


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name occurs twice")
    return found


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")
