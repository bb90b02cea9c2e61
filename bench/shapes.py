"""Models as data: the linear layers of one decoder block, siblings merged as a server runs them, or as files hold them.

Sizes are those of each model's config.json: hidden, intermediate, query heads, key-value heads, head size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

MODELS = {
    "Llama-3.1-8B": (4096, 14336, 32, 8, 128),
    "Llama-3.1-70B": (8192, 28672, 64, 8, 128),
    "Qwen3-8B": (4096, 12288, 32, 8, 128),
    "Qwen3-32B": (5120, 25600, 64, 8, 128),
    "Mistral-7B": (4096, 14336, 32, 8, 128),
    "SmolLM2-135M": (576, 1536, 9, 3, 64),
}


class Shape(NamedTuple):
    """Out-features and in-features of a layer."""

    N: int
    K: int

    def __str__(self) -> str:
        return f"{self.N}x{self.K}"


def layers(model: str) -> dict[str, Shape]:
    """The four products of a block by name: qkv, o, gate_up, down."""
    hidden, intermediate, heads, kv_heads, head = MODELS[model]
    return {
        "qkv": Shape((heads + 2 * kv_heads) * head, hidden),
        "o": Shape(hidden, heads * head),
        "gate_up": Shape(2 * intermediate, hidden),
        "down": Shape(hidden, intermediate),
    }


def siblings(model: str) -> dict[str, Shape]:
    """The layers of a block that `layers` has merged: q, k (as v is), gate (as up is)."""
    hidden, intermediate, heads, kv_heads, head = MODELS[model]
    return {
        "q": Shape(heads * head, hidden),
        "k": Shape(kv_heads * head, hidden),
        "gate": Shape(intermediate, hidden),
    }


def shapes(of: Callable[[str], dict[str, Shape]] = layers) -> dict[Shape, list[str]]:
    """Every distinct shape, largest first, with the layers that have it."""
    found: dict[Shape, list[str]] = {}
    for model in MODELS:
        for name, shape in of(model).items():
            found.setdefault(shape, []).append(f"{model} {name}")
    return dict(sorted(found.items(), key=lambda item: -item[0].N * item[0].K))
