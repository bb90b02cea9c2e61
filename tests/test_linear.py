"""QuantLinear: vectors, shapes, state dicts, autograd, and the functions that put it into a model."""

import copy
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from gptq_triton.layers import find_layers, weight_of
from gptq_triton.linear import QuantLinear, make_quant
from gptq_triton.packing import pack_zeros, trivial_g_idx
from gptq_triton.quantizer import group_params
from tests.vectors import CASES, load


def packed(K=64, N=48, bits=4, group=32, bias=True, sym=False, seed=0, g_idx=None, **options):
    """A QuantLinear rounded from a random nn.Linear, and that layer."""
    generator = torch.Generator().manual_seed(seed)
    linear = nn.Linear(K, N, bias=bias)
    linear.weight.data = torch.randn(N, K, generator=generator)
    if bias:
        linear.bias.data = torch.randn(N, generator=generator)
    layer = QuantLinear(bits, group, K, N, **options)
    rows = trivial_g_idx(K, group) if g_idx is None else g_idx
    found = [group_params(linear.weight.data[:, rows == g], 2**bits - 1, sym) for g in range(layer.spec.groups(K))]
    layer.pack(linear, *(torch.stack(values, 1) for values in zip(*found, strict=True)), g_idx=g_idx)
    return layer, linear


def shuffled(K, group, seed=0):
    return trivial_g_idx(K, group)[torch.randperm(K, generator=torch.Generator().manual_seed(seed))]


@pytest.mark.parametrize("case", CASES)
def test_vectors(case):
    data = load(case)
    N, K = data["weight"].shape
    linear = nn.Linear(K, N, bias="bias" in data)
    linear.weight.data = data["weight"]
    if "bias" in data:
        linear.bias.data = data["bias"]
    layer = QuantLinear(data["bits"], data["group_size"], K, N)
    layer.pack(linear, data["scales_nk"], data["zeros_nk"])
    for name in ("qweight", "qzeros", "scales", *(["bias"] if "bias" in data else [])):
        assert torch.equal(layer.state_dict()[name], data[name]), name
    for dtype in (torch.float16, torch.float32):
        y = layer(data["x"].to(dtype)).double()
        assert (y - data["y"]).norm() <= 1e-3 * data["y"].norm()


@settings(deadline=None)
@given(
    bits=st.sampled_from([2, 3, 4, 8]),
    K=st.integers(1, 70),
    N=st.integers(1, 40),
    group=st.one_of(st.just(-1), st.integers(1, 80)),
    sym=st.booleans(),
    bias=st.booleans(),
    act_order=st.booleans(),
    label=st.sampled_from(["gptq", "gptq_v2"]),
    lead=st.sampled_from([(), (0,), (3,), (2, 0), (2, 3), (2, 1, 2)]),
)
def test_forward_is_the_dequantized_product(bits, K, N, group, sym, bias, act_order, label, lead):
    g_idx = shuffled(K, group) if act_order else None
    layer, linear = packed(K, N, bits, group, bias, sym, g_idx=g_idx, checkpoint_format=label)
    x = torch.randn(*lead, K, dtype=torch.float64)
    expected = nn.functional.linear(x, layer.dequantize(torch.float64), None if not bias else layer.bias.double())
    assert torch.allclose(layer(x), expected, rtol=1e-12, atol=1e-12)
    # the grid covers every group's range: each weight is at most one step away
    rows = layer.g_idx.long()
    assert ((layer.dequantize() - linear.weight).abs() <= layer.scales[rows].t() * (1 + 1e-4)).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_dtypes_and_strides(dtype):
    layer, _ = packed()
    x = torch.randn(6, 128, dtype=dtype)[::2, ::2]
    assert not x.is_contiguous()
    y = layer(x)
    assert y.dtype == dtype
    expected = x.double() @ layer.dequantize(torch.float64).t() + layer.bias.double()
    # one rounding of the output, and float32 sums of 64 terms before it
    size = x.double().abs() @ layer.dequantize(torch.float64).abs().t() + layer.bias.double().abs()
    bound = torch.finfo(dtype).eps * expected.abs() + 66 * torch.finfo(torch.float32).eps * size
    assert ((y.double() - expected).abs() <= bound).all()


def test_autocast_sets_the_dtype():
    layer, _ = packed()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(torch.randn(2, 64)).dtype == torch.bfloat16


@pytest.mark.parametrize("act_order", [False, True])
def test_gradient_reaches_x_and_only_x(act_order):
    layer, _ = packed(K=12, N=7, group=5, g_idx=shuffled(12, 5) if act_order else None)
    layer.double()
    x = torch.randn(3, 12, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layer, (x,))
    assert torch.autograd.gradgradcheck(layer, (x,))
    assert list(layer.parameters()) == []


def test_lora_trains_on_top():
    layer, linear = packed(bias=False)
    torch.manual_seed(0)
    down, up = nn.Linear(64, 4, bias=False), nn.Linear(4, 48, bias=False)
    nn.init.zeros_(up.weight)
    first = nn.Linear(64, 64)  # gradients must also pass through the frozen layer
    x = torch.randn(32, 64)
    target = linear(x).detach()
    optimizer = torch.optim.Adam([*down.parameters(), *up.parameters(), *first.parameters()], lr=1e-2)
    losses = []
    for _ in range(60):
        h = first(x)
        loss = (layer(h) + up(down(h)) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_copies_are_equal_and_independent(copier):
    layer, _ = packed(g_idx=shuffled(64, 32))
    x = torch.randn(2, 64)
    twin = copier(layer)
    assert torch.equal(twin(x), layer(x))
    assert twin.act_order
    twin.qweight.zero_()
    assert not torch.equal(twin(x), layer(x))


def test_moves_and_casts():
    layer, _ = packed()
    assert layer.half().scales.dtype == layer.bias.dtype == torch.float16
    assert layer.qweight.dtype == layer.qzeros.dtype == layer.g_idx.dtype == torch.int32
    assert layer.to("meta").qweight.is_meta


def test_resident_memory_is_the_checkpoint():
    layer, _ = packed(K=512, N=512, group=128)
    checkpoint = sum(t.nbytes for name, t in layer.state_dict().items() if name != "g_idx")
    resident = sum(t.nbytes for t in vars(layer)["_buffers"].values() if t is not None)
    assert resident <= 1.05 * checkpoint
    assert not any(isinstance(value, torch.Tensor) for value in vars(layer).values())


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("label", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("act_order", [False, True])
def test_state_dict_round_trip_is_exact(assign, label, act_order):
    layer, _ = packed(g_idx=shuffled(64, 32) if act_order else None, checkpoint_format=label)
    layer.half()
    twin = QuantLinear(4, 32, 64, 48, checkpoint_format=label)
    twin.load_state_dict(layer.state_dict(), assign=assign)
    assert twin.act_order == act_order
    for name, tensor in layer.state_dict().items():
        assert torch.equal(twin.state_dict()[name], tensor)
        assert twin.state_dict()[name].dtype == tensor.dtype
        assert (twin.state_dict()[name].data_ptr() == tensor.data_ptr()) == assign


def test_loads_old_dicts_strictly():  # no g_idx, float32 scales, a bias that is all zeros (trap 12)
    layer, _ = packed(bias=False)
    old = {name: tensor for name, tensor in layer.state_dict().items() if name != "g_idx"}
    old["bias"] = torch.zeros(48)
    model = nn.Sequential(QuantLinear(4, 32, 64, 48))
    model.load_state_dict({f"0.{name}": tensor for name, tensor in old.items()})
    x = torch.randn(3, 64)
    assert torch.equal(model(x), layer(x))
    assert torch.equal(model.state_dict()["0.bias"], torch.zeros(48))


@pytest.mark.parametrize("label", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("stored", ["gptq", "gptq_v2"])
def test_symmetric_dicts_tell_their_format(label, stored):  # trap 2
    layer, _ = packed(sym=True, checkpoint_format=stored)
    twin = QuantLinear(4, 32, 64, 48, checkpoint_format=label)
    twin.load_state_dict(layer.state_dict())
    assert twin.checkpoint_format == stored
    assert torch.equal(twin.dequantize(), layer.dequantize())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"g_idx": torch.full((64,), 2, dtype=torch.int32)}, "g_idx must lie in"),
        ({"g_idx": torch.full((64,), -(2**40))}, "g_idx must lie in"),
        ({"qweight": torch.zeros(9, 48, dtype=torch.int32)}, "qweight must have shape"),
        ({"qweight": torch.zeros(8, 47, dtype=torch.int32)}, "qweight must have 48 columns"),
        ({"bias": torch.zeros(3)}, "bias must have shape"),
        ({"scales": None}, "Missing key"),
        ({"surplus": torch.zeros(3)}, "Unexpected key"),
    ],
)
def test_bad_state_dicts_are_refused_and_change_nothing(change, message):
    layer, _ = packed()
    before = copy.deepcopy(layer.state_dict())
    bad = {name: tensor for name, tensor in (layer.state_dict() | change).items() if tensor is not None}
    with pytest.raises(RuntimeError, match=message):
        layer.load_state_dict(bad)
    assert all(torch.equal(tensor, before[name]) for name, tensor in layer.state_dict().items())


def test_a_missing_bias_is_missing():
    layer = QuantLinear(4, 32, 64, 48, bias=True)
    state = {name: tensor for name, tensor in layer.state_dict().items() if name != "bias"}
    with pytest.raises(RuntimeError, match="bias"):
        layer.load_state_dict(state)


def test_pack_leaves_its_arguments_alone():  # trap 7
    linear = nn.Linear(32, 16)
    scales, zeros = torch.rand(16, 1) + 0.1, torch.full((16, 1), 3.0)
    copies = scales.clone(), zeros.clone(), linear.weight.detach().clone()
    layer = QuantLinear(4, -1, 32, 16)
    layer.pack(linear, scales, zeros)
    layer.bias.add_(1)
    assert torch.equal(scales, copies[0])
    assert torch.equal(zeros, copies[1])
    assert torch.equal(linear.weight, copies[2])
    assert torch.equal(layer.qzeros, pack_zeros(zeros.t(), 4, "gptq"))


def test_pack_conv1d():
    from transformers.pytorch_utils import Conv1D

    linear, conv = nn.Linear(32, 16), Conv1D(16, 32)
    conv.weight.data, conv.bias.data = linear.weight.data.t().contiguous(), linear.bias.data
    scales, zeros = torch.rand(16, 2) + 0.1, torch.full((16, 2), 7.0)
    layers = [QuantLinear(4, 16, 32, 16) for _ in range(2)]
    for layer, source in zip(layers, (linear, conv), strict=True):
        layer.pack(source, scales, zeros)
    x = torch.randn(2, 32)
    assert torch.equal(layers[0](x), layers[1](x))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((5, 32, 64, 48), ValueError, "bits"),
        ((4, 0, 64, 48), ValueError, "group_size"),
        ((4, 32, 0, 48), ValueError, "infeatures"),
        ((4, 32, 64, -1), ValueError, "outfeatures"),
        ((4, 32, 64.0, 48), TypeError, "infeatures"),
    ],
)
def test_constructor_refuses(arguments, error, message):
    with pytest.raises(error, match=message):
        QuantLinear(*arguments)


def test_refusals():
    with pytest.raises(TypeError, match="dtype"):
        QuantLinear(4, 32, 64, 48, dtype=torch.int8)
    with pytest.raises(ValueError, match="checkpoint_format"):
        QuantLinear(4, 32, 64, 48, checkpoint_format="v3")
    layer, linear = packed()
    with pytest.raises(ValueError, match="x must have 64 features"):
        layer(torch.randn(2, 63))
    with pytest.raises(ValueError, match="x must have 64 features"):
        layer(torch.tensor(1.0))
    with pytest.raises(TypeError, match="x"):
        layer(torch.ones(2, 64, dtype=torch.int64))
    scales, zeros = torch.ones(48, 2), torch.zeros(48, 2)
    with pytest.raises(ValueError, match="in-features"):
        layer.pack(nn.Linear(63, 48), scales, zeros)
    with pytest.raises(ValueError, match="scales must have shape"):
        layer.pack(linear, scales[:, :1], zeros)
    with pytest.raises(ValueError, match="scales must be greater"):
        layer.pack(linear, -scales, zeros)
    with pytest.raises(ValueError, match="zeros must be integers"):
        layer.pack(linear, scales, zeros + 16)
    with pytest.raises(TypeError, match="ReLU"):
        layer.pack(nn.ReLU(), scales, zeros)
    with pytest.raises(ValueError, match="g_idx"):
        layer.pack(linear, scales, zeros, g_idx=torch.full((64,), 9))


class Tree(nn.Module):
    """Nested names, a root-level name, a ModuleList and a tied layer; no property may be touched."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(32, 64)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(32, 32, bias=False), nn.ReLU()) for _ in range(2))
        self.tied = self.blocks[0][0]
        self.conv = nn.Conv2d(1, 1, 1)

    @property
    def trap(self):
        raise AssertionError("make_quant must not walk over dir(module)")


def test_find_layers():
    assert list(find_layers(Tree())) == ["head", "blocks.0.0", "blocks.1.0", "tied", "conv"]
    assert list(find_layers(Tree(), [nn.Linear], name="model")) == [
        "model.head",
        "model.blocks.0.0",
        "model.blocks.1.0",
        "model.tied",
    ]
    assert list(find_layers(nn.Linear(2, 2), name="own")) == ["own"]


def test_make_quant_replaces_what_is_named():
    tree = Tree().half()
    make_quant(tree, ["head", "blocks.0.0"], 4, 16)
    assert isinstance(tree.head, QuantLinear)
    assert tree.head.scales.dtype == torch.float16
    assert tree.head.bias is not None
    assert isinstance(tree.blocks[0][0], QuantLinear)
    assert tree.blocks[0][0].bias is None
    assert tree.tied is tree.blocks[0][0]
    assert type(tree.blocks[1][0]) is nn.Linear
    head = tree.head
    make_quant(tree, {"m.head": None, "m.blocks.1.0": None}, 4, 16, name="m")
    assert tree.head is head
    assert isinstance(tree.blocks[1][0], QuantLinear)


def test_make_quant_refuses():
    with pytest.raises(ValueError, match=r"blocks\.9, nothing"):
        make_quant(Tree(), ["head", "nothing", "blocks.9"], 4, 16)
    with pytest.raises(TypeError, match="Conv2d"):
        make_quant(Tree(), ["conv"], 4, 16)
    with pytest.raises(TypeError, match="ModuleList"):
        make_quant(Tree(), ["blocks"], 4, 16)


def test_print_says_what_it_is():
    layer, _ = packed()
    assert "in_features=64, out_features=48, bits=4, groupsize=32" in repr(layer)
    assert weight_of(nn.Linear(3, 2)).shape == (2, 3)
