"""The layers that GPTQ quantizes: finding them, and reading their weight as a matrix."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from torch import Tensor, nn


def conv1d() -> type[nn.Module] | None:
    """transformers' Conv1D (GPT-2's linear layer), or None while nobody has imported it."""
    module = sys.modules.get("transformers.pytorch_utils")
    return None if module is None else module.Conv1D


def find_layers(
    module: nn.Module, layers: Sequence[type[nn.Module]] | None = None, name: str = ""
) -> dict[str, nn.Module]:
    """Every layer of the given types in a module.

    Args:
        module: Where to look; it may be such a layer itself.
        layers: Exact types; default: nn.Linear, nn.Conv2d and transformers' Conv1D.
        name: Prefix of the returned names.

    Returns:
        Dotted name to layer, in the module's order. A layer that is tied to several names is listed
        under each.
    """
    if layers is None:
        layers = [nn.Linear, nn.Conv2d, *filter(None, [conv1d()])]
    return {
        ".".join(filter(None, (name, path))): child
        for path, child in module.named_modules(remove_duplicate=False)
        if type(child) in layers
    }


def weight_of(layer: nn.Module) -> Tensor:
    """The weight of a layer as a matrix (N, K), one row per output; a view.

    Raises:
        TypeError: Not an nn.Linear, nn.Conv2d or transformers' Conv1D.
    """
    if isinstance(layer, nn.Linear):
        return layer.weight
    if isinstance(layer, nn.Conv2d):
        return layer.weight.flatten(1)
    if isinstance(layer, conv1d() or ()):
        return layer.weight.t()  # pyright: ignore[reportCallIssue]
    raise TypeError(f"expected nn.Linear, nn.Conv2d or transformers' Conv1D, got {type(layer).__name__}")
