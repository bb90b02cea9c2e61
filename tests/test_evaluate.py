"""Segments, perplexity and KL divergence, against their definitions."""

import copy
import itertools
import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers.processors import TemplateProcessing
from torch import nn

from gptq_triton.evaluate import Quality, Text, evaluate, even_segments, log_probabilities, random_segments, tokenize
from tests.tiny import batches, text, tiny, tokenizer

sizes = st.tuples(st.integers(1, 60), st.integers(0, 300)).map(lambda pair: (pair[0], pair[0] + pair[1]))


def plain(count):
    """A text of the tokens 0, 1, 2, ..."""
    return Text(torch.arange(count), torch.empty(0, dtype=torch.int64))


class Bigrams(nn.Module):
    """A model whose logits after token t are row t of a table."""

    device = torch.device("cpu")

    def __init__(self, table):
        super().__init__()
        self.table = table

    def forward(self, tokens, use_cache):
        assert not use_cache
        return SimpleNamespace(logits=self.table[tokens])


@given(sizes, st.integers(0, 12), st.integers(0, 2**32))
def test_random_segments(size, count, seed):
    length, total = size
    tokens = plain(total)
    segments = random_segments(tokens, length, count, seed)
    assert len(segments) == count
    for segment in segments:
        assert torch.equal(segment, torch.arange(int(segment[0]), int(segment[0]) + length))
    again = random_segments(tokens, length, count, seed)
    assert all(torch.equal(a, b) for a, b in zip(segments, again, strict=True))


def test_random_segments_differ_and_reach_both_ends():
    starts = {int(segment[0]) for segment in random_segments(plain(10), 7, 200, seed=0)}
    assert starts == {0, 1, 2, 3}
    first, second = (random_segments(plain(10**6), 2, 5, seed) for seed in (0, 1))
    assert [int(segment[0]) for segment in first] != [int(segment[0]) for segment in second]


@given(sizes, st.integers(1, 12))
def test_even_segments_cover_the_text_without_overlap(size, count):
    length, total = size
    segments = even_segments(plain(total), length, count)
    starts = [int(segment[0]) for segment in segments]
    assert len(segments) == min(count, total // length)
    assert all(len(segment) == length for segment in segments)
    assert starts[0] == 0
    assert len(segments) == 1 or starts[-1] == total - length
    gaps = [b - a for a, b in itertools.pairwise(starts)]
    assert all(gap >= length for gap in gaps)
    assert not gaps or max(gaps) - min(gaps) <= 1


@pytest.mark.parametrize("cut", [lambda *a: random_segments(*a, seed=0), even_segments])
def test_text_that_is_too_short(cut):
    with pytest.raises(ValueError, match="the text has 9 tokens, fewer than one segment of 10"):
        cut(plain(9), 10, 1)
    with pytest.raises(ValueError, match="length must be at least 1, got 0"):
        cut(plain(9), 0, 1)


def test_segments_start_as_the_tokenizer_starts_a_text():
    words = tokenizer()
    assert tokenize(words, "w0").start.tolist() == []
    words.backend_tokenizer.post_processor = TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    assert words("w0")["input_ids"] == [1, 3]
    found = tokenize(words, "w0 w2  w124\nnonsense")
    assert found.tokens.tolist() == [3, 5, 127, 0]
    assert [segment.tolist() for segment in even_segments(found, 3, 2)] == [[1, 3, 5], [1, 127, 0]]
    assert {segment.tolist()[0] for segment in random_segments(found, 2, 9, seed=0)} == {1}
    with pytest.raises(ValueError, match="length must be at least 2, got 1"):
        even_segments(found, 1, 2)


def test_quality_by_its_definition():
    """Two tokens; probabilities that can be written down."""
    ours = torch.tensor([[0.6, 0.4], [0.25, 0.75]])
    theirs = torch.tensor([[0.9, 0.1], [0.7, 0.3]])
    model, reference = Bigrams(ours.log()), Bigrams(theirs.log() + 3)  # logits are free up to a constant
    segments = [torch.tensor([0, 1, 1]), torch.tensor([1, 0])]
    got = evaluate(model, segments, reference)  # pyright: ignore[reportArgumentType]
    likelihood = 0.4 * 0.75 * 0.25
    after0 = 0.9 * math.log(0.9 / 0.6) + 0.1 * math.log(0.1 / 0.4)
    after1 = 0.7 * math.log(0.7 / 0.25) + 0.3 * math.log(0.3 / 0.75)
    assert got.tokens == 3
    assert got.perplexity == pytest.approx(likelihood ** (-1 / 3), rel=1e-6)
    assert got.kl == pytest.approx((after0 + 2 * after1) / 3, rel=1e-5)
    assert got.top1 == pytest.approx(1 / 3)  # they agree on what follows 0


def test_kl_is_measured_where_there_is_a_reference():
    model, other, data = tiny("llama"), tiny("llama", seed=1), [batch[0] for batch in batches(3)]
    whole = evaluate(model, data, other)
    part = evaluate(model, data, [log_probabilities(other, segment) for segment in data[:2]])
    assert part.perplexity == whole.perplexity
    assert part.kl == evaluate(model, data[:2], other).kl != whole.kl
    assert evaluate(model, data) == Quality(whole.perplexity, None, None, 3 * 31)
    assert evaluate(model, data, []) == Quality(whole.perplexity, None, None, 3 * 31)


def test_a_model_against_itself():
    model, data = tiny("gpt2"), [batch[0] for batch in batches(2)]
    got = evaluate(model, data, copy.deepcopy(model))
    assert got.kl == 0
    assert got.top1 == 1
    logits = model(torch.stack(data)).logits[:, :-1]
    loss = nn.functional.cross_entropy(logits.flatten(0, 1), torch.stack(data)[:, 1:].flatten())
    assert got.perplexity == pytest.approx(math.exp(loss.item()), rel=1e-5)


def test_half_precision_is_measured_in_float32():
    model, segment = tiny("llama").half(), batches(1)[0][0]
    with torch.no_grad():
        logits = model(segment[None]).logits[0, :-1]
    assert logits.dtype == torch.float16
    assert torch.equal(log_probabilities(model, segment), logits.float().log_softmax(-1))


def test_a_hopeless_model_has_a_finite_perplexity():
    table = torch.tensor([[0.0, -1e5], [0.0, -1e5]])
    got = evaluate(Bigrams(table), [torch.tensor([0, 1])])  # pyright: ignore[reportArgumentType]
    assert got.perplexity == math.exp(700)


def test_refusals():
    model = tiny("llama")
    with pytest.raises(ValueError, match="segments must not be empty"):
        evaluate(model, [])
    for shape in ((1,), (2, 3), ()):
        with pytest.raises(ValueError, match=r"a segment must be \(S,\) with S >= 2"):
            evaluate(model, [torch.zeros(shape, dtype=torch.long)])
    segment = batches(1)[0][0]
    with pytest.raises(ValueError, match=r"reference gives .* \(31, 160\), the model of \(31, 128\)"):
        evaluate(model, [segment], tiny("llama", vocab_size=160))
    with pytest.raises(ValueError, match="reference gives"):
        evaluate(model, [segment], [log_probabilities(model, segment[:5])])


def test_text_is_long_enough_for_other_tests():
    assert len(tokenize(tokenizer(), text(400)).tokens) == 400
    assert not (tokenize(tokenizer(), text(400)).tokens == 0).any()
