"""Text in segments of tokens, and how well a model predicts them."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Quality:
    """How well a model predicts a text.

    Attributes:
        perplexity: ``exp`` of the mean negative log-likelihood per predicted token.
        kl: Mean ``KL(reference || model)`` per token, in nats; None without a reference.
        top1: Fraction of tokens where both models' most likely token agrees; None without a reference.
        tokens: Tokens predicted.
    """

    perplexity: float
    kl: float | None
    top1: float | None
    tokens: int


@dataclass(frozen=True, eq=False)
class Text:
    """A tokenized text.

    Attributes:
        tokens: int64 (T,), without special tokens.
        start: int64 (0,) or (1,): the token that this tokenizer puts before every text (Llama, Gemma:
            ``<bos>``), which each segment then starts with, because such models are lost without it.
    """

    tokens: Tensor
    start: Tensor

    def segment(self, first: int, length: int) -> Tensor:
        """``length`` tokens, ``start`` among them, of the text from token ``first`` on."""
        return torch.cat([self.start, self.tokens[first : first + length - len(self.start)]])

    def last(self, length: int) -> int:
        """Where the last possible segment starts.

        Raises:
            ValueError: The text is shorter than one segment, or the segment holds none of it.
        """
        if length <= len(self.start):
            raise ValueError(f"length must be at least {1 + len(self.start)}, got {length}")
        last = len(self.tokens) + len(self.start) - length
        if last < 0:
            raise ValueError(f"the text has {len(self.tokens)} tokens, fewer than one segment of {length}")
        return last


def tokenize(tokenizer: PreTrainedTokenizerBase, text: str) -> Text:
    """A text as its tokenizer sees it."""
    encode: Any = tokenizer
    tokens = encode(text, return_tensors="pt", add_special_tokens=False, verbose=False)["input_ids"][0]
    start = [t for t in encode("")["input_ids"][:1] if t == tokenizer.bos_token_id]
    return Text(tokens.long(), torch.tensor(start, dtype=torch.int64))


def random_segments(text: Text, length: int, count: int, seed: int) -> list[Tensor]:
    """``count`` segments (length,) that start at random places of a text.

    Raises:
        ValueError: The text is shorter than one segment.
    """
    numbers, last = random.Random(seed), text.last(length)
    return [text.segment(numbers.randint(0, last), length) for _ in range(count)]


def even_segments(text: Text, length: int, count: int) -> list[Tensor]:
    """``count`` segments (length,) evenly spaced over a text; fewer if they would overlap.

    Raises:
        ValueError: The text is shorter than one segment.
    """
    last = text.last(length)
    count = min(count, len(text.tokens) // (length - len(text.start)))
    return [text.segment(round(i * last / max(count - 1, 1)), length) for i in range(count)]


@torch.no_grad()
def log_probabilities(model: PreTrainedModel, segment: Tensor) -> Tensor:
    """What a model expects after each token of a segment (S,) but the last: float32 (S - 1, vocabulary)."""
    logits = model(segment[None].to(model.device), use_cache=False).logits[0, :-1]
    return torch.log_softmax(logits.float(), dim=-1)


def evaluate(
    model: PreTrainedModel | Sequence[Tensor],
    segments: Sequence[Tensor],
    reference: PreTrainedModel | Sequence[Tensor] | None = None,
) -> Quality:
    """Measure a model on segments of held-out text.

    Args:
        model: A causal language model, or its :func:`log_probabilities` for every segment.
        segments: Token ids, each (S,) with S >= 2.
        reference: The full-precision model, or its :func:`log_probabilities` for the first segments;
            KL and agreement are measured on as many segments as it covers.

    Raises:
        ValueError: There is nothing to measure, or the reference has another vocabulary or other segments.
    """
    if not segments:
        raise ValueError("segments must not be empty")
    for segment in segments:
        if segment.dim() != 1 or len(segment) < 2:
            raise ValueError(f"a segment must be (S,) with S >= 2, got shape {tuple(segment.shape)}")
    loss = kl = agreed = compared = predicted = 0.0
    for index, segment in enumerate(segments):
        ours = _probabilities(model, index, segment)
        target = segment[1:].to(ours.device)
        loss += float(cross_entropy(ours, target, reduction="sum"))
        predicted += len(target)
        if reference is not None and not (isinstance(reference, Sequence) and index >= len(reference)):
            theirs = _probabilities(reference, index, segment).to(ours.device)
            if theirs.shape != ours.shape:
                raise ValueError(
                    f"reference gives probabilities of shape {tuple(theirs.shape)}, the model of {tuple(ours.shape)}"
                )
            kl += float((theirs.exp() * (theirs - ours)).sum(dtype=torch.float64))
            agreed += int((theirs.argmax(-1) == ours.argmax(-1)).sum())
            compared += len(target)
    return Quality(
        perplexity=math.exp(min(loss / predicted, 700)),
        kl=kl / compared if compared else None,
        top1=agreed / compared if compared else None,
        tokens=int(predicted),
    )


def _probabilities(model: PreTrainedModel | Sequence[Tensor], index: int, segment: Tensor) -> Tensor:
    return model[index] if isinstance(model, Sequence) else log_probabilities(model, segment)
