"""Decoding that never waits for the host: ``generate`` with steps that are CUDA graphs.

transformers' own compiled loop prepares every step in Python while the GPU waits, because it must know whether the last
token ended the text; a quantized model's step is over so soon that this takes about as long.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import StaticCache
from transformers.cache_utils import StaticLayer
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria

__all__ = ["GraphedDecoding"]

_PASSED = {"attention_mask", "position_ids", "past_key_values", "use_cache", "logits_to_keep", "cache_position"}
_ROUND = 256  # lengths of caches are multiples, so that few graphs serve prompts of any length
_BLOCK = 8  # steps in a row in one graph, where a token decides nothing but the next one and the end
_TRIALS = 2  # steps before the capture, of which the first compiles; the cache must have room for them


class GraphedDecoding:
    """What ``generate`` is given as ``custom_generate``: greedy decoding or sampling, token for token as its own.

    ``model.generate(**inputs, max_new_tokens=100, custom_generate=GraphedDecoding())``. Keep the object: the first
    call with a batch size compiles a step and captures it, later ones replay it, and its cache grows when a call
    needs more. Logits processors and stopping criteria work as ever; beams, scores, caches of your own and sliding
    windows are refused, and a streamer is not handed on by transformers. On the CPU it is the same loop without graphs.
    """

    def __init__(self) -> None:
        self._steps: dict[int, _Steps] = {}  # by batch size

    def __deepcopy__(self, memo: Any) -> GraphedDecoding:
        return GraphedDecoding()  # graphs cannot be copied

    @torch.no_grad()
    def __call__(
        self,
        model: Any,
        input_ids: Tensor,
        logits_processor: Callable[[Tensor, Tensor], Tensor],
        stopping_criteria: Any,
        generation_config: Any,
        **model_kwargs: Any,
    ) -> Tensor:
        """Called by ``generate``.

        Returns:
            (B, S + new), as ``generate`` does.

        Raises:
            ValueError: Something is asked for that needs transformers' own loop.
        """
        _check(model, generation_config, model_kwargs)
        with torch.cuda.device_of(input_ids):
            return self._decode(model, input_ids, logits_processor, stopping_criteria, generation_config, model_kwargs)

    def _decode(
        self, model: Any, input_ids: Tensor, processor: Any, criteria: Any, config: Any, model_kwargs: dict[str, Any]
    ) -> Tensor:
        batch = input_ids.shape[0]
        length = -(-(config.max_length + _TRIALS) // _ROUND) * _ROUND
        steps = self._steps.get(batch)
        if steps is None or steps.model is not model or steps.length < length:
            self._steps.pop(batch, None)  # its memory is needed first
            steps = self._steps[batch] = _Steps(model, batch, length)
        mask = model_kwargs.get("attention_mask")
        logits = steps.begin(input_ids, torch.ones_like(input_ids) if mask is None else mask, model_kwargs)
        kinds = {type(criterion) for criterion in criteria}
        if not config.do_sample and not processor and kinds <= {EosTokenCriteria, MaxLengthCriteria}:
            ends = [criterion.eos_token_id for criterion in criteria if isinstance(criterion, EosTokenCriteria)]
            end = torch.cat(ends).to(logits.device) if ends else None
            new = _greedy(steps, logits.argmax(-1), config.max_length - input_ids.shape[1], end)
            return torch.cat([input_ids, new if end is None else _ended(new, end, config._pad_token_tensor)], 1)
        ends = any(hasattr(criterion, "eos_token_id") for criterion in criteria)
        unfinished = torch.ones(batch, dtype=torch.bool, device=input_ids.device)
        late = _Late(input_ids.device)
        ids = input_ids
        while True:
            scores = processor(ids, logits)
            if config.do_sample:
                tokens = torch.multinomial(scores.softmax(-1), 1).squeeze(1)
            else:
                tokens = scores.argmax(-1)
            if ends:
                tokens = torch.where(unfinished, tokens, config._pad_token_tensor.to(tokens.device))
            ids = torch.cat([ids, tokens[:, None]], 1)
            unfinished = unfinished & ~criteria(ids, None)
            if late.over(unfinished):
                return ids[:, :-1]
            if ids.shape[1] >= config.max_length:
                return ids
            logits = steps.next(tokens)


def _greedy(steps: _Steps, first: Tensor, count: int, end: Tensor | None) -> Tensor:
    """The first token (B,) and those that follow, (B, count); fewer once all sequences have ended."""
    made = [first[:, None]]
    unfinished = torch.ones_like(first, dtype=torch.bool)
    late = _Late(first.device)
    left = count - 1
    while left:
        if end is not None:
            unfinished = unfinished & ~torch.isin(made[-1], end).any(1)
            if late.over(unfinished):
                break
        last = made[-1][:, -1]
        made.append(steps.block(last) if left >= _BLOCK else steps.next(last).argmax(-1, keepdim=True))
        left -= made[-1].shape[1]
    return torch.cat(made, 1)


def _ended(new: Tensor, end: Tensor, pad: Tensor) -> Tensor:
    """Tokens (B, S) with padding after the first one that ends a sequence, up to the end of the longest."""
    found = torch.isin(new, end).int()
    after = found.cumsum(1) > found
    return torch.where(after, pad.to(new), new)[:, : int((~after).sum(1).max())]


class _Steps:
    """A step of one token for every sequence of a batch, over a cache of its own."""

    def __init__(self, model: Any, batch: int, length: int):
        self.model, self.length = model, length
        device = model.device
        self.cache: Any = StaticCache(config=model.config.get_text_config(decoder=True), max_cache_len=length)
        if any(type(layer) is not StaticLayer for layer in self.cache.layers):
            raise ValueError(
                f"GraphedDecoding: {type(model).__name__} has layers with sliding windows, whose steps are not alike; "
                "generate without custom_generate"
            )
        self.tokens = torch.zeros(batch, 1, dtype=torch.long, device=device)
        self.positions = torch.zeros_like(self.tokens)
        self.mask = torch.ones(batch, length, dtype=torch.long, device=device)
        self.made = torch.zeros(batch, _BLOCK, dtype=torch.long, device=device)
        self.graph: torch.cuda.CUDAGraph | None = None
        self.graph_of_block: torch.cuda.CUDAGraph | None = None
        self.logits = torch.empty(0)
        self.forward = torch.compile(model.forward, dynamic=False) if device.type == "cuda" else model.forward

    def begin(self, input_ids: Tensor, mask: Tensor, model_kwargs: dict[str, Any]) -> Tensor:
        """The prompt's forward pass: logits (B, V) of the token that follows."""
        for layer in self.cache.layers:
            if layer.is_initialized:
                layer.reset()
        self.mask[:, : mask.shape[1]] = mask
        self.mask[:, mask.shape[1] :] = 1
        positions = model_kwargs.get("position_ids")
        if positions is None:
            positions = (mask.cumsum(-1) - 1).clamp(min=0)
        keep = {"logits_to_keep": model_kwargs["logits_to_keep"]} if "logits_to_keep" in model_kwargs else {}
        out = self.model(
            input_ids=input_ids, attention_mask=mask, position_ids=positions, past_key_values=self.cache, **keep
        )
        self.positions.copy_(positions[:, -1:])
        if self.tokens.is_cuda and self.graph is None:
            self._capture(input_ids.shape[1])
        return out.logits[:, -1].float()

    def next(self, tokens: Tensor) -> Tensor:
        """Logits (B, V) after one more token; valid until the next call."""
        self.tokens.copy_(tokens[:, None])
        if self.graph is None:
            return self._run()
        self.graph.replay()
        return self.logits

    def block(self, tokens: Tensor) -> Tensor:
        """The most likely tokens after one more, (B, _BLOCK)."""
        self.tokens.copy_(tokens[:, None])
        if self.graph is None:
            self._run_block()
        else:
            if self.graph_of_block is None:
                self.graph_of_block = torch.cuda.CUDAGraph()
                with torch.cuda.graph(self.graph_of_block):
                    self._run_block()
            self.graph_of_block.replay()
        return self.made.clone()

    def _run(self) -> Tensor:
        self.positions.add_(1)
        out = self.forward(
            input_ids=self.tokens,
            attention_mask=self.mask,
            position_ids=self.positions,
            past_key_values=self.cache,
            use_cache=True,
        )
        return out.logits[:, -1].float()

    def _run_block(self) -> None:
        for i in range(_BLOCK):
            self.tokens.copy_(self._run().argmax(-1, keepdim=True))
            self.made[:, i : i + 1] = self.tokens

    def _capture(self, start: int) -> None:
        """Compile and run the step beside the current stream, capture it, and forget what it left in the cache."""
        positions = self.positions.clone()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(_TRIALS):
                self._run()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=stream):
                self.logits = self._run()
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = graph
        self.positions.copy_(positions)
        for layer in self.cache.layers:
            layer.cumulative_length.fill_(start)  # what lies behind is overwritten before it is seen


class _Late:
    """Whether all sequences were finished one call ago, which the host can know without waiting."""

    def __init__(self, device: torch.device):
        self.pinned = device.type == "cuda"
        self.last: tuple[Tensor, Any] | None = None

    def over(self, unfinished: Tensor) -> bool:
        """Note how things are; say how they were."""
        flag = torch.empty((), dtype=torch.bool, pin_memory=self.pinned)
        flag.copy_(unfinished.any(), non_blocking=True)
        event = torch.cuda.Event() if self.pinned else None
        if event is not None:
            event.record()
        last, self.last = self.last, (flag, event)
        if last is None:
            return False
        if last[1] is not None:
            last[1].synchronize()
        return not bool(last[0])


def _check(model: nn.Module, config: Any, model_kwargs: dict[str, Any]) -> None:
    """Refuse what the loop does not do."""
    cache = model_kwargs.get("past_key_values")
    others = sorted(name for name, value in model_kwargs.items() if name not in _PASSED and isinstance(value, Tensor))
    wrong = {
        "num_beams must be 1": config.num_beams not in (None, 1),
        "return_dict_in_generate must be off": config.return_dict_in_generate,
        "the model must be a decoder": model.config.is_encoder_decoder,  # pyright: ignore[reportAttributeAccessIssue]
        "the model must be on one device": len({p.device for p in model.parameters()}) > 1,
        "past_key_values must be empty": cache is not None and cache.get_seq_length() > 0,
        f"{', '.join(others)} cannot be passed on": bool(others),
    }
    for rule, broken in wrong.items():
        if broken:
            raise ValueError(f"GraphedDecoding: {rule}; generate without custom_generate")
