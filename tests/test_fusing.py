"""Merged siblings: the same results, the same state dict, one product."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from gptq_triton import QuantizeConfig, QuantLinear, fuse, quantize_model, unfuse
from gptq_triton.fusing import FusedPart
from gptq_triton.integrations.tensor_parallel import shard
from tests.strategies import random_rows, random_weight
from tests.tiny import batches, tiny


class Block(nn.Module):
    def __init__(self, *, act_order: bool = False, bias: bool = True, sizes: tuple[int, ...] = (48, 16, 24)):
        super().__init__()
        for i, (name, N) in enumerate(zip(("q_proj", "k_proj", "v_proj"), sizes, strict=True)):
            weight = random_weight(64, N, 4, 32, seed=0 if act_order else i)
            if act_order:
                weight = random_weight(64, N, 4, 32, act_order=True, seed=0)
                g_idx = random_weight(64, 8, 4, 32, act_order=True, seed=9).g_idx
                weight = type(weight)(
                    weight.qweight, weight.scales, weight.qzeros, g_idx, weight.spec, 64, weight.checkpoint_format
                )
            self.add_module(name, QuantLinear.from_packed(weight, torch.randn(N) if bias else None))

    def forward(self, x):
        return torch.cat([self.q_proj(x), self.k_proj(x), self.v_proj(x)], -1)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("act_order", [False, True])
def test_merged_layers_give_the_same(act_order, bias):
    block = Block(act_order=act_order, bias=bias)
    x = random_rows(6, 64, torch.float32).view(2, 3, 64)
    expected, state = block(x), {name: t.clone() for name, t in block.state_dict().items()}
    fuse(block)
    assert isinstance(block.k_proj, FusedPart)
    merged = [layer for layer in block.modules() if isinstance(layer, QuantLinear)]
    assert [layer.out_features for layer in merged] == [88]
    torch.testing.assert_close(block(x), expected)
    torch.testing.assert_close(block(x + 1), Block.forward(unfuse(fuse(block)), x + 1))
    found = fuse(block).state_dict()
    assert found.keys() == state.keys()
    assert all(torch.equal(found[name], state[name]) for name in state)
    unfuse(block)
    assert torch.equal(block(x), expected)


def test_layers_that_do_more_than_their_product_stay():
    def hook(layer):
        layer.register_forward_hook(lambda module, args, y: y + 1)

    def wrap(layer):  # as transformers' tensor parallelism and accelerate do
        forward = layer.forward
        layer.forward = lambda x: forward(x) + 1

    def split(layer):
        shard(layer, "colwise", 0, 2)

    for change in (hook, wrap, split):
        block = Block()
        for layer in block.children():
            change(layer)
        x = random_rows(6, 64, torch.float32)
        expected = block(x)
        assert torch.equal(fuse(block)(x), expected)
        assert all(isinstance(layer, QuantLinear) for layer in block.children())


def test_one_product_for_all_and_nothing_kept(monkeypatch):
    block = fuse(Block())
    calls = []
    forward = QuantLinear.forward
    monkeypatch.setattr(QuantLinear, "forward", lambda self, x: calls.append(len(x)) or forward(self, x))
    x = random_rows(5, 64, torch.float32)
    block(x)
    assert calls == [5]
    assert block.q_proj._merged.x is None
    y = block.k_proj(x)  # alone, and twice
    assert torch.equal(block.k_proj(x), y)
    assert calls == [5, 5, 5]


def test_layers_that_differ_stay_apart():
    block = Block()
    block.v_proj = QuantLinear.from_packed(random_weight(64, 24, 3, 32))
    fuse(block)
    assert not any(isinstance(layer, FusedPart) for layer in block.modules())
    act_order = Block(act_order=True)
    act_order.v_proj = QuantLinear.from_packed(random_weight(64, 24, 4, 32, act_order=True, seed=3), torch.zeros(24))
    fuse(act_order)
    assert not any(isinstance(layer, FusedPart) for layer in act_order.modules())


def test_a_merged_model_compiles_to_one_graph():
    block = fuse(Block())
    graphs = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(block, fullgraph=True, dynamic=True, backend=graphs)
    for M in (3, 17, 40):
        x = random_rows(M, 64, torch.float32)
        torch.testing.assert_close(compiled(x), block(x))
    assert graphs.frame_count == 1


def test_loading_into_a_merged_layer_is_refused():
    block = Block()
    state = block.state_dict()
    with pytest.raises(RuntimeError, match=r"q_proj: load before the layers are merged by fuse\(\)"):
        fuse(block).load_state_dict(state)


def test_a_transformers_model_gives_the_same_logits():
    model = tiny("llama")
    quantize_model(model, batches(), QuantizeConfig(bits=4, group_size=32))
    ids = batches()[0]
    with torch.no_grad():
        expected = model(ids).logits
        fuse(model)
        merged = sum(isinstance(layer, QuantLinear) for layer in model.modules())
        assert merged == 2 * 4  # qkv, o, gate_up, down of two blocks
        torch.testing.assert_close(model(ids).logits, expected)
