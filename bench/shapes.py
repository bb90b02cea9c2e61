"""Models as data: the linear layers of one decoder block, siblings merged as a server runs them.

Sizes are those of each model's config.json: hidden, intermediate, query heads, key-value heads, head size.
"""

from __future__ import annotations

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


def shapes() -> dict[Shape, list[str]]:
    """Every distinct shape, largest first, with the layers that have it."""
    found: dict[Shape, list[str]] = {}
    for model in MODELS:
        for name, shape in layers(model).items():
            found.setdefault(shape, []).append(f"{model} {name}")
    return dict(sorted(found.items(), key=lambda item: -item[0].N * item[0].K))
