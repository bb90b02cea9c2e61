"""GraphedDecoding: token for token what transformers' own loop makes; without graphs, which need a GPU."""

import pytest
import torch
from transformers import LogitsProcessorList

from gptq_triton import QuantizeConfig, quantize_model
from gptq_triton.integrations.generation import GraphedDecoding
from tests.tiny import VOCABULARY, batches, tiny


@pytest.fixture(scope="module")
def model():
    made = tiny("llama")
    quantize_model(made, batches(2), QuantizeConfig(4, 32), method="rtn", progress=False)
    return made


def prompt(rows=1, length=8, seed=0):
    return torch.randint(3, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


def both(model, inputs, seed=0, **options):
    """What transformers makes, and what we make."""
    graphed, found = options.pop("graphed", GraphedDecoding()), []
    for how in ({}, {"custom_generate": graphed}):
        torch.manual_seed(seed)
        found.append(model.generate(inputs, **({"eos_token_id": None} | options), **how))
    return found


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2", "opt"])
def test_greedy(name):
    made = tiny(name)
    quantize_model(made, batches(2), QuantizeConfig(4, 32), method="rtn", progress=False)
    graphed = GraphedDecoding()
    for length, new in ((8, 12), (5, 3), (8, 1), (20, 30)):  # the cache is used again
        expected, found = both(made, prompt(2, length), max_new_tokens=new, do_sample=False, graphed=graphed)
        assert torch.equal(found, expected)
    assert len(graphed._steps) == 1


def test_sampling_and_processors(model):
    options = {"do_sample": True, "temperature": 0.7, "top_k": 20, "top_p": 0.9, "repetition_penalty": 1.3}
    for seed in range(3):
        expected, found = both(model, prompt(3), seed=seed, max_new_tokens=10, **options)
        assert torch.equal(found, expected)


def test_padded_prompts(model):
    inputs = prompt(3, 9)
    mask = torch.ones_like(inputs)
    for row, pads in enumerate((0, 4, 7)):
        inputs[row, :pads], mask[row, :pads] = 0, 0
    options = {"attention_mask": mask, "max_new_tokens": 12, "do_sample": False}
    expected, found = both(model, inputs, **options)
    assert torch.equal(found, expected)
    alone = model.generate(inputs[1:2, 4:], max_new_tokens=12, do_sample=False, eos_token_id=None)
    assert torch.equal(found[1:2, 4:], alone)


@pytest.mark.parametrize("processors", [{}, {"repetition_penalty": 1.2}])
def test_sequences_end_where_they_should(model, processors):
    """Whichever token ends them, and whether the last one ends early or never; in blocks of steps and one by one."""
    inputs = prompt(3)
    options = {"max_new_tokens": 30, "do_sample": False, **processors}
    free = model.generate(inputs, eos_token_id=None, **options)[:, 8:]
    lengths = set()
    for end in [*free[:, 2].tolist(), *free[:, -1].tolist(), free[0, 0].item(), free[1, 9:12].tolist()]:
        expected, found = both(model, inputs, eos_token_id=end, pad_token_id=0, **options)
        assert torch.equal(found, expected)
        one, own = both(model, inputs[:1], eos_token_id=end, pad_token_id=0, **options)
        assert torch.equal(own, one)
        lengths.add(one.shape[1])
    assert min(lengths) == 9
    assert len(lengths) > 1


def test_a_processor_of_ones_own(model):
    seen = []

    def only_even(ids, scores):
        seen.append(ids.shape[1])
        return scores.masked_fill(torch.arange(VOCABULARY) % 2 == 1, -torch.inf)

    found = model.generate(
        prompt(), max_new_tokens=5, do_sample=False, custom_generate=GraphedDecoding(),
        logits_processor=LogitsProcessorList([only_even]), eos_token_id=None,
    )  # fmt: skip
    assert seen == [8, 9, 10, 11, 12]
    assert (found[:, 8:] % 2 == 0).all()


def test_what_it_does_not_do(model):
    def generate(**options):
        return model.generate(prompt(), max_new_tokens=4, custom_generate=GraphedDecoding(), **options)

    with pytest.raises(ValueError, match="num_beams must be 1"):
        generate(num_beams=2)
    with pytest.raises(ValueError, match="return_dict_in_generate must be off"):
        generate(return_dict_in_generate=True)
    with pytest.raises(ValueError, match="past_key_values must be empty"):
        generate(past_key_values=model(prompt()[:, :4], use_cache=True).past_key_values)
    gemma = tiny("gemma3")
    with pytest.raises(ValueError, match="Gemma3ForCausalLM has layers with sliding windows"):
        gemma.generate(prompt(), max_new_tokens=4, custom_generate=GraphedDecoding())
