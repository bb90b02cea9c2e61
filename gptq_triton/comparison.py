"""How far the layers of a checkpoint are from a full-precision model beside it."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from types import TracebackType

import torch

from .files import Files, open_checkpoint
from .findings import Layout
from .packing import RUN, trivial_g_idx, unpack
from .parts import LayerParts
from .zeros import decode_zeros

ROWS = 32 * RUN  # inputs at a time


class Reference:
    """A full-precision checkpoint; a context manager.

    Args:
        path: Folder or file; None for none, which knows no error of any layer.

    Raises:
        ValueError: It cannot be read.
    """

    def __init__(self, path: str | Path | None):
        self._stack = ExitStack()
        self._files: Files = {}
        if path is not None:
            self._files = self._stack.enter_context(open_checkpoint(Path(path)))

    def __enter__(self) -> Reference:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def error(self, part: LayerParts, layout: Layout) -> float | None:
        """``||W' - W|| / ||W||`` of one layer; None where the reference has no such weight.

        Raises:
            ValueError: The weight has another shape.
        """
        key = f"{part.name}.weight"
        if key not in self._files:
            return None
        weight, (K, N) = self._files[key].read(key), (layout.K, layout.N)
        ways = [w for w in (weight.t(), weight) if tuple(w.shape) == (K, N)]  # nn.Linear's, transformers' Conv1D's
        if not ways:
            raise ValueError(f"the full-precision weight has shape {tuple(weight.shape)}, needs {(N, K)}")
        scales = part.read("scales").float()
        zeros = decode_zeros(part.read("qzeros"), layout.bits, N, layout.zeros)
        g_idx = part.read("g_idx").long() if layout.act_order else trivial_g_idx(K, layout.group_size).long()
        wrong, size = [0.0] * len(ways), 0.0
        for start in range(0, K, ROWS):
            stop = min(start + ROWS, K)
            words = part.rows("qweight", start * layout.bits // 32, -(-stop * layout.bits // 32))
            groups = g_idx[start:stop]
            found = (unpack(words, layout.bits, stop - start).float() - zeros[groups]) * scales[groups]
            for index, way in enumerate(ways):
                wrong[index] += float((found - way[start:stop].float()).square().sum(dtype=torch.float64))
            size += float(ways[0][start:stop].float().square().sum(dtype=torch.float64))
        return (min(wrong) / size) ** 0.5 if size else 0.0
