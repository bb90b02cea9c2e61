"""The vLLM plugin: its parts that need no vLLM, and the whole where vLLM can be imported."""

import importlib.util
import socket
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as processes

from gptq_triton import QuantizeConfig, QuantLinear, load_quantized, quantize_model, reference, save_quantized
from gptq_triton.integrations.pieces import Piece, is_orphan, side_by_side
from tests import vllm_ranks
from tests.strategies import random_weight
from tests.test_sharding import parts_of
from tests.tiny import batches, tiny, tokenizer

FIELDS = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True, "desc_act": False}
ORPHANS = [
    {"sym": False},
    {"bits": 3},
    {"bits": 2},
    {"desc_act": True},
    {"checkpoint_format": "gptq_v2"},
    {"dynamic": {".*mlp": {"sym": False}}},
]
MODELS = {
    "asym": QuantizeConfig(3, 32, sym=False),
    "act_order": QuantizeConfig(4, 32, desc_act=True),
    "two_bits": QuantizeConfig(2, 16, sym=False, checkpoint_format="gptq_v2"),
    "sym": QuantizeConfig(8, 64),
}
needs_vllm = pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None, reason="vLLM pins another torch; it is tested where it is installed"
)


@pytest.fixture
def plugin():
    from gptq_triton.integrations import vllm

    vllm.register()
    return vllm


def take(piece, weight):
    for part, tensor in parts_of(weight).items():
        piece.take(part, tensor, "cpu")


def columns(weight, run):
    return reference.dequantize(weight, torch.float32)[:, run.start : run.stop]


@pytest.mark.parametrize("fields", ORPHANS)
def test_orphans(fields):
    assert is_orphan(FIELDS | fields)


def test_what_vllm_reads_itself_is_left_to_it():
    assert not is_orphan(FIELDS)
    assert not is_orphan(FIELDS | {"bits": 8, "desc_act": True, "group_size": -1, "dynamic": {"-:.*mlp": {}}})


@pytest.mark.parametrize("rows", [range(0, 96), range(32, 96), range(30, 61)])
@pytest.mark.parametrize(("bits", "act_order"), [(3, False), (4, True)])
def test_pieces_keep_one_ranks_part(rows, bits, act_order):
    weight = random_weight(96, 64, bits, 16, act_order=act_order)
    runs = [range(8, 24), range(40, 64)]
    piece = Piece(QuantizeConfig(bits, 16, sym=False, checkpoint_format="gptq"), (96, 64), rows, runs)
    take(piece, weight)
    held = sum(part.numel() for part in piece.parts["qweight"].runs.values())
    assert held * 64 <= weight.qweight.numel() * 40
    expected = torch.cat([columns(weight, run) for run in runs], 1)[rows.start : rows.stop]
    assert torch.equal(reference.dequantize(piece.weight(), torch.float32), expected)


def test_pieces_say_what_does_not_fit():
    piece = Piece(QuantizeConfig(4, 32), (64, 64), range(64), [range(64)])
    with pytest.raises(ValueError, match="qweight, qzeros, scales did not come"):
        piece.weight()
    with pytest.raises(ValueError, match=r"qweight must have shape \(8, 64\), got \(8, 32\)"):
        piece.take("qweight", torch.zeros(8, 32, dtype=torch.int32), "cpu")


def test_symmetric_pieces_prove_their_dialect():
    weight = random_weight(64, 32, 4, 32, sym=True, checkpoint_format="gptq_v2")
    piece = Piece(QuantizeConfig(4, 32), (64, 32), range(64), [range(32)])  # labelled v1
    take(piece, weight)
    assert torch.equal(reference.dequantize(piece.weight()), reference.dequantize(weight))


def test_layers_with_the_same_groups_become_one():
    weights = [random_weight(96, N, 3, 32, seed=N, checkpoint_format=f) for N, f in ((32, "gptq"), (20, "gptq_v2"))]
    (joined,) = side_by_side(weights)
    expected = torch.cat([reference.dequantize(weight) for weight in weights], 1)
    assert torch.equal(reference.dequantize(joined), expected)
    orders = [random_weight(96, 32, 4, 32, act_order=True, seed=seed) for seed in (1, 2)]
    assert len(side_by_side(orders)) == 2
    assert len(side_by_side([orders[0], orders[0]])) == 1
    assert len(side_by_side([weights[0], random_weight(96, 32, 4, 32)])) == 2


@needs_vllm
def test_the_plugin_claims_orphans(plugin):
    from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS

    plugin.register()
    assert QUANTIZATION_METHODS.count("gptq_triton") == 1
    override = plugin.GptqTritonVllmConfig.override_quantization_method
    assert [override(FIELDS | fields, None) for fields in ORPHANS] == ["gptq_triton"] * len(ORPHANS)
    assert override(FIELDS, None) is None
    assert override(FIELDS, "gptq_triton") == override(FIELDS | {"quant_method": "gptq_triton"}, None) == "gptq_triton"
    assert override(FIELDS | {"sym": False}, "gptq_marlin") is None
    assert override({"quant_method": "awq"}, None) is None
    config = plugin.GptqTritonVllmConfig.from_config(FIELDS)
    assert (config.get_name(), config.get_config_filenames()) == ("gptq_triton", ["quantize_config.json"])
    mapper = config.get_checkpoint_weight_mapper()
    assert [name for name, _ in mapper.apply([("a.g_idx", torch.zeros(1))])] == ["a.g_idx"]


@needs_vllm
def test_which_layers_are_quantized(plugin):
    config = plugin.GptqTritonVllmConfig.from_config(
        FIELDS | {"dynamic": {"-:.*o_proj": {}, r".*\.v_proj": {"bits": 8}}}
    )
    config.packed_modules_mapping = {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}
    assert [own.bits for own in config.configs("model.layers.0.qkv_proj")] == [4, 4, 8]
    assert config.configs("model.layers.0.o_proj") == [None]
    assert config.configs("lm_head") == [None]
    config.quantized = {"model.layers.0.qkv_proj", "model.layers.0.up"}
    assert [own.bits for own in config.configs("model.layers.0.qkv_proj")] == [4]
    assert config.configs("model.layers.1.up") == [None]


class Layer(torch.nn.Module):
    """What the method knows of a layer of vLLM."""

    def __init__(self, rank, ranks, replicas=1):
        super().__init__()
        self.tp_rank, self.tp_size, self.num_kv_head_replicas = rank, ranks, replicas


@needs_vllm
@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("form", [QuantizeConfig(3, 32, sym=False), QuantizeConfig(4, 16, sym=False, desc_act=True)])
def test_joined_columns_under_tensor_parallel(form, ranks, plugin):
    """q, k and v of a model with 2 heads of keys, on up to 4 ranks."""
    sizes, replicas = (128, 64, 64), max(1, ranks // 2)
    options = {"act_order": form.desc_act, "checkpoint_format": form.checkpoint_format}
    weights = [random_weight(96, N, form.bits, form.group_size, **options, seed=N + i) for i, N in enumerate(sizes)]
    x = torch.randn(5, 96)
    method = plugin.GptqTritonLinearMethod([form] * 3)
    for rank in range(ranks):
        layer = Layer(rank, ranks, replicas)
        shares = [128 // ranks, *[64 * replicas // ranks] * 2]
        method.create_weights(layer, 96, shares, 96, sum(shares) * ranks, torch.float16)
        for shard, weight in zip("qkv", weights, strict=True):
            for part, tensor in parts_of(weight).items():
                parameter = getattr(layer, part)
                parameter.weight_loader(parameter, tensor, shard)
        method.process_weights_after_loading(layer)
        starts = [rank * shares[0], *[rank // replicas * shares[1]] * 2]
        runs = [range(start, start + share) for start, share in zip(starts, shares, strict=True)]
        dense = torch.cat([columns(weight, run) for weight, run in zip(weights, runs, strict=True)], 1)
        bias = torch.randn(dense.shape[1])
        y = method.apply(layer, x, bias)
        assert (y - (x @ dense + bias)).norm() <= 1e-6 * y.norm()
        assert len(layer.gptq) == (3 if form.desc_act else 1)


@needs_vllm
def test_rows_under_tensor_parallel(plugin):
    form, weight = QuantizeConfig(4, 16, sym=False, desc_act=True), None
    weight = random_weight(96, 64, 4, 16, act_order=True, checkpoint_format="gptq_v2")
    x, found = torch.randn(5, 96), []
    for rank in range(2):
        layer, method = Layer(rank, 2), plugin.GptqTritonLinearMethod([form])
        method.create_weights(layer, 48, [64], 96, 64, torch.float16)
        for part, tensor in parts_of(weight).items():
            getattr(layer, part).weight_loader(getattr(layer, part), tensor)
        method.process_weights_after_loading(layer)
        found.append(method.apply(layer, x[:, 48 * rank : 48 * rank + 48]))
    expected = x @ reference.dequantize(weight, torch.float32)
    assert (sum(found) - expected).norm() <= 1e-6 * expected.norm()


@needs_vllm
def test_layers_of_vllm(plugin):
    """vLLM's own layers, in one process without a GPU."""
    from vllm.config import DeviceConfig, VllmConfig, set_current_vllm_config
    from vllm.distributed import (
        destroy_distributed_environment,
        destroy_model_parallel,
        init_distributed_environment,
        initialize_model_parallel,
    )
    from vllm.model_executor.layers import linear

    config = plugin.GptqTritonVllmConfig.from_config(FIELDS | {"sym": False, "checkpoint_format": "gptq_v2"})
    config.packed_modules_mapping = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up": ["gate", "up"]}
    with socket.socket() as free:
        free.bind(("localhost", 0))
        where = f"tcp://localhost:{free.getsockname()[1]}"
    made = {
        "m.qkv_proj": (
            lambda **o: linear.QKVParallelLinear(96, 32, 4, 2, bias=True, **o),
            {"q": 128, "k": 64, "v": 64},
        ),
        "m.gate_up": (lambda **o: linear.MergedColumnParallelLinear(96, [64, 64], bias=False, **o), {0: 64, 1: 64}),
        "m.o_proj": (lambda **o: linear.RowParallelLinear(96, 64, bias=True, **o), {None: 64}),
        "m.gate": (lambda **o: linear.ReplicatedLinear(96, 64, bias=False, **o), {None: 64}),
    }
    with set_current_vllm_config(VllmConfig(device_config=DeviceConfig(device="cpu"))):
        init_distributed_environment(1, 0, where, 0, "gloo")
        try:
            initialize_model_parallel(1, 1)
            for prefix, (make, shards) in made.items():
                layer = make(quant_config=config, prefix=prefix)
                weights = [random_weight(96, N, 4, 32, seed=N, checkpoint_format="gptq_v2") for N in shards.values()]
                for shard, weight in zip(shards, weights, strict=True):
                    for part, tensor in parts_of(weight).items():
                        parameter = getattr(layer, part)
                        parameter.weight_loader(parameter, tensor, *([] if shard is None else [shard]))
                layer.quant_method.process_weights_after_loading(layer)
                x = torch.randn(3, 96)
                expected = x @ torch.cat([reference.dequantize(weight, torch.float32) for weight in weights], 1)
                if layer.bias is not None:
                    expected += layer.bias.data.normal_()
                assert (layer(x)[0] - expected).norm() <= 1e-6 * expected.norm(), prefix
        finally:
            destroy_model_parallel()
            destroy_distributed_environment()


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders of Llamas in forms that vLLM does not read, and one that it does."""
    parent = tmp_path_factory.mktemp("vllm") / "models"
    for name, config in MODELS.items():
        model = tiny("llama", hidden_size=128, intermediate_size=256, head_dim=32)
        quantize_model(model, batches(2), config, method="gptq" if config.desc_act else "rtn", progress=False)
        save_quantized(model, parent / name, tokenizer())
    return parent


@needs_vllm
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_model_of_vllm(ranks, models, tmp_path):
    """Its loader, its Llama, its tensor parallelism and torch.compile; logits are those of the checkpoint."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    processes.start_processes(
        vllm_ranks.run, (ranks, models, tmp_path, port), nprocs=ranks, start_method="spawn"
    )  # fmt: skip
    every = [torch.load(tmp_path / f"{rank}.pt") for rank in range(ranks)]
    for name in MODELS:
        whole = load_quantized(models / name, "cpu")
        with torch.no_grad():
            expected = whole(batches(1)[0]).logits[0]
        buffers = [
            b for m in whole.modules() if isinstance(m, QuantLinear) for n, b in m.named_buffers() if n != "g_idx"
        ]
        for found in (rank[name] for rank in every):
            assert found["layers"] == 2 * 4  # q, k and v are one, gate and up too
            assert (found["logits"] - expected).norm() <= 1e-5 * expected.norm()
            assert found["compiled_off"] <= 1e-5
            assert found["compilations"] <= 2
            assert found["held"] <= 0.55 * 2 / ranks * sum(b.nbytes for b in buffers)


@needs_vllm
def test_layers_joined_in_the_checkpoint(plugin):
    weight = random_weight(64, 128, 4, 32, checkpoint_format="gptq_v2")
    for rank in range(2):
        layer, method = Layer(rank, 2), plugin.GptqTritonLinearMethod([QuantizeConfig(4, 32, sym=False)])
        method.create_weights(layer, 64, [32, 32], 64, 128, torch.float16)
        for part, tensor in parts_of(weight).items():
            getattr(layer, part).weight_loader(getattr(layer, part), tensor)
        method.process_weights_after_loading(layer)
        x = torch.randn(3, 64)
        runs = [range(32 * rank, 32 * rank + 32), range(64 + 32 * rank, 96 + 32 * rank)]
        expected = x @ torch.cat([columns(weight, run) for run in runs], 1)
        assert (method.apply(layer, x) - expected).norm() <= 1e-6 * expected.norm()
    empty = Layer(0, 1)
    method.create_weights(empty, 64, [32], 64, 32, torch.float16)
    with pytest.raises(ValueError, match="no quantized tensor came"):
        method.process_weights_after_loading(empty)


def test_the_entry_point():
    text = (Path(__file__).parent.parent / "pyproject.toml").read_text()
    section = text.partition('[project.entry-points."vllm.general_plugins"]\n')[2]
    module, _, function = section.split("\n")[0].partition('"')[2].strip('"').partition(":")
    path = Path(__file__).parent.parent / (module.replace(".", "/") + ".py")
    assert f"def {function}() -> None:" in path.read_text()
