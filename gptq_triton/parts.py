"""The quantized layers of a checkpoint's files: each layer's tensors under short names."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from torch import Tensor

from .files import Files
from .tensorfile import Entry

PARTS = ("qweight", "qzeros", "scales", "g_idx", "bias")


@dataclass(frozen=True)
class LayerParts:
    """The tensors of one layer; nothing is read before it is asked for.

    Attributes:
        files: The open checkpoint.
        name: Full name of the layer in it.
    """

    files: Files
    name: str

    @cached_property
    def entries(self) -> dict[str, Entry]:
        """Part to dtype and shape, of those that are there."""
        keys = {part: f"{self.name}.{part}" for part in PARTS}
        return {part: self.files[key].entries[key] for part, key in keys.items() if key in self.files}

    @property
    def path(self) -> Path:
        """The file that holds the codes."""
        return self.files[f"{self.name}.qweight"].path

    @property
    def metadata(self) -> dict[str, str]:
        """Of that file."""
        return self.files[f"{self.name}.qweight"].metadata

    def read(self, part: str) -> Tensor:
        """A whole part."""
        key = f"{self.name}.{part}"
        return self.files[key].read(key)

    def rows(self, part: str, start: int, stop: int) -> Tensor:
        """Some rows of a part."""
        key = f"{self.name}.{part}"
        return self.files[key].rows(key, start, stop)


def layer_parts(files: Files) -> dict[str, LayerParts]:
    """Every quantized layer by name, sorted.

    Raises:
        ValueError: There are none.
    """
    names = sorted(key.removesuffix(".qweight") for key in files if key.endswith(".qweight"))
    if not names:
        where = next((file.path for file in files.values()), "the checkpoint")
        raise ValueError(f"{where} holds no quantized layers (no tensor ends in .qweight)")
    return {name: LayerParts(files, name) for name in names}
