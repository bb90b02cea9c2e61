"""Tiny transformers models with random weights, a tokenizer without a hub, and token ids to calibrate on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from gptq_triton import model as model_module

VOCABULARY = 128
POSITIONS = 96
WORDS = [f"w{i}" for i in range(VOCABULARY - 3)]

_TOKENS = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_LLAMA = _TOKENS | {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": POSITIONS,
    "initializer_range": 0.1,  # the default leaves every token about as likely as any other
}
_MODELS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "llama": (LlamaForCausalLM, LlamaConfig, _LLAMA | {"tie_word_embeddings": False}),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, _LLAMA | {"tie_word_embeddings": True}),
    # its blocks alternate between two kinds of attention masks and position embeddings
    "gemma3": (
        Gemma3ForCausalLM,
        Gemma3TextConfig,
        _LLAMA | {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]},
    ),
    "mistral": (MistralForCausalLM, MistralConfig, _LLAMA | {"tie_word_embeddings": False, "sliding_window": 16}),
    "opt": (
        OPTForCausalLM,
        OPTConfig,
        _TOKENS
        | {
            "hidden_size": 64,
            "word_embed_proj_dim": 64,
            "ffn_dim": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": POSITIONS,
            "init_std": 0.1,
        },
    ),
    "gpt2": (
        GPT2LMHeadModel,
        GPT2Config,
        _TOKENS | {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": POSITIONS, "initializer_range": 0.1},
    ),
}
ARCHITECTURES = tuple(_MODELS)


def tiny(name: str, seed: int = 0, **overrides: Any) -> Any:
    """A float32 model with random weights; the global random state is left as it was.

    Args:
        name: One of :data:`ARCHITECTURES`.
        seed: Of the weights.
        overrides: Fields of the model's config.
    """
    model, config, fields = _MODELS[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = model(config(**fields | overrides))
        for key, tensor in made.named_parameters():
            if key.endswith("bias"):  # zero by default, which would hide a bias that gets lost
                torch.nn.init.normal_(tensor, std=0.1)
    return made.eval()


def batches(count: int = 6, length: int = 32, seed: int = 0) -> list[Tensor]:
    """Token ids, each (1, length), of a language in which most words have a few likely successors."""
    rng = torch.Generator().manual_seed(seed)
    walk = torch.randint(0, 4, (count, length), generator=rng)
    jump = torch.randint(3, VOCABULARY, (count, length), generator=rng)
    fresh = torch.rand(count, length, generator=rng) < 0.3
    tokens = torch.empty(count, length, dtype=torch.long)
    last = jump[:, 0]
    for i in range(length):
        last = torch.where(fresh[:, i], jump[:, i], 3 + (last * 7 + walk[:, i]) % (VOCABULARY - 3))
        tokens[:, i] = last
    return list(tokens[:, None])


def text(count: int = 400, seed: int = 0) -> str:
    """Words that :func:`tokenizer` knows."""
    return " ".join(WORDS[token - 3] for token in batches(1, count, seed)[0][0].tolist())


def tokenizer() -> PreTrainedTokenizerFast:
    """One token per word ``w0`` to ``w124``."""
    vocabulary = {word: i for i, word in enumerate(["<unk>", "<s>", "</s>", *WORDS])}
    whole = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    whole.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=whole, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def save_tiny(folder: Path, name: str = "llama", seed: int = 0, **overrides: Any) -> Path:
    """A tiny model and its tokenizer as a folder."""
    tiny(name, seed, **overrides).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def dies_in_the_second_block(monkeypatch: Any) -> list[Any]:
    """Have the next quantize_model interrupted, once, at its second block; returns what is solved, a growing list."""
    real, solved = model_module._solve_block, []

    def solve(*arguments: Any) -> Any:
        solved.append(arguments)
        if len(solved) == 2:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(model_module, "_solve_block", solve)
    return solved
