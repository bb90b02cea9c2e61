"""What two processes do for test_tensor_parallel.py; each writes what it found to a file."""

import os
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import parallelize_module
from transformers import AutoModelForCausalLM
from transformers.distributed.configuration_utils import DistributedConfig

import gptq_triton.integrations.transformers  # noqa: F401
from gptq_triton import QuantLinear, fuse, unfuse
from gptq_triton.fusing import FusedPart
from gptq_triton.integrations.generation import GraphedDecoding
from gptq_triton.integrations.peft import register
from gptq_triton.integrations.tensor_parallel import ColwiseQuantLinear, RowwiseQuantLinear
from tests.strategies import random_weight
from tests.tiny import batches

FORMS = [(4, 32, False), (3, 48, False), (2, -1, False), (8, 16, True), (4, 64, True)]
SIZES = [(96, 128, 64), (100, 90, 36)]  # of an MLP; the latter respect no group, no word and no half
ADAPTERS = {"r": 4, "target_modules": "all-linear", "init_lora_weights": False}
GREEDY = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
STEPS = 3


def prompt(model):
    return (batches(1)[0] % model.config.vocab_size).to(model.device)


def mlp(sizes, form):
    """Two layers with biases, the same for the same arguments."""
    (K, H, N), (bits, group_size, act_order) = sizes, form
    options = {"act_order": act_order, "scale_dtype": torch.float32}
    up = QuantLinear.from_packed(random_weight(K, H, bits, group_size, **options, seed=1), torch.linspace(-1, 1, H))
    down = QuantLinear.from_packed(random_weight(H, N, bits, group_size, **options, seed=2), torch.linspace(-1, 1, N))
    return nn.Sequential(up, nn.Tanh(), down)


def rows(K):
    return torch.randn(5, K, generator=torch.Generator().manual_seed(3), requires_grad=True)


def forward_and_gradient(model, x):
    y = model(x)
    (dx,) = torch.autograd.grad(y.square().sum(), x)
    return y.detach(), dx


def adapted(model):
    torch.manual_seed(0)
    return get_peft_model(model, register(LoraConfig(**ADAPTERS), model))


def train(model, samples):
    """The loss of every step."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    losses = []
    for tokens in samples:
        loss = model(tokens, labels=tokens).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def local(tensor):
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def held(model):
    """Bytes of one rank's decoder blocks; older transformers leave embeddings whole, which tiny models feel."""
    blocks = model.get_decoder().layers
    return sum(local(tensor).nbytes for tensor in [*blocks.parameters(), *blocks.buffers()])


def run(rank, folders, out, port):
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=120))
    try:
        found = {"styles": styles(), "gathered": gathered(), "merged": merged(), "models": {}}
        for folder in sorted(Path(folders).iterdir()):
            found["models"][folder.name] = from_pretrained(folder)
        found["fsdp"] = data_parallel(Path(folders) / "llama", rank)
        torch.save(found, Path(out) / f"{rank}.pt")
    finally:
        dist.destroy_process_group()


def run_on_gpus(rank, folders, out, port):
    """The models only, each rank on a GPU of its own."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    torch.cuda.set_device(rank)
    dist.init_process_group("nccl", timeout=timedelta(seconds=120))
    try:
        found = {folder.name: from_pretrained(folder) for folder in sorted(Path(folders).iterdir())}
        torch.save(found, Path(out) / f"{rank}.pt")
    finally:
        dist.destroy_process_group()


def styles():
    """Column-wise, then row-wise, for every form and size."""
    mesh, found = dist.init_device_mesh("cpu", (2,)), {}
    for sizes in SIZES:
        for form in FORMS:
            model = mlp(sizes, form)
            parallelize_module(model, mesh, {"0": ColwiseQuantLinear(), "2": RowwiseQuantLinear()})
            found[sizes, form] = forward_and_gradient(model, rows(sizes[0]))
    return found


def gathered():
    """Layers that split what they are given and gather what they make."""
    mesh, (sizes, form) = dist.init_device_mesh("cpu", (2,)), (SIZES[1], FORMS[0])
    model = mlp(sizes, form)
    plan = {
        "0": ColwiseQuantLinear(output_layouts=Replicate()),
        "2": RowwiseQuantLinear(input_layouts=Replicate(), output_layouts=Shard(0), use_local_output=False),
    }
    y, dx = forward_and_gradient(parallelize_module(model, mesh, plan), rows(sizes[0]))
    return y.full_tensor(), local(dx)


class Gated(nn.Module):
    """Two layers with one input."""

    def __init__(self, form):
        super().__init__()
        bits, group_size, act_order = form
        options = {"act_order": act_order, "scale_dtype": torch.float32}
        for seed, (name, sizes) in enumerate(
            {"gate_proj": (96, 128), "up_proj": (96, 128), "down_proj": (128, 64)}.items()
        ):
            seed = 0 if act_order else seed  # siblings in one order
            setattr(self, name, QuantLinear.from_packed(random_weight(*sizes, bits, group_size, **options, seed=seed)))

    def forward(self, x):
        return self.down_proj(torch.tanh(self.gate_proj(x)) * self.up_proj(x))


def merged():
    """Siblings that are split, and then merged."""
    mesh, found = dist.init_device_mesh("cpu", (2,)), {}
    plan = {"gate_proj": ColwiseQuantLinear(), "up_proj": ColwiseQuantLinear(), "down_proj": RowwiseQuantLinear()}
    for form in FORMS:
        model = fuse(parallelize_module(Gated(form), mesh, plan))
        both = isinstance(model.gate_proj, FusedPart) and isinstance(model.up_proj, FusedPart)
        try:
            unfuse(model)
        except ValueError as error:
            found[form] = *forward_and_gradient(model, rows(96)), both, str(error)
    return found


def from_pretrained(folder):
    model = AutoModelForCausalLM.from_pretrained(folder, distributed_config=DistributedConfig(tp_size=2))
    found = {"held": held(model), "format": model.config.quantization_config.checkpoint_format}
    with torch.no_grad():
        found["logits"] = local(model(prompt(model)).logits)
        found["tokens"] = model.generate(prompt(model), **GREEDY).cpu()
        if type(model).__name__ == "LlamaForCausalLM":  # others' windows slide
            found["graphed"] = model.generate(prompt(model), **GREEDY, custom_generate=GraphedDecoding()).cpu()
    for name, refused in {"save": lambda: model.save_pretrained(folder / "no"), "floats": model.dequantize}.items():
        try:
            refused()
        except ValueError as error:
            found[name] = str(error)
    return found


def data_parallel(folder, rank):
    """Adapters spread over the ranks by FSDP2, each rank with samples of its own."""
    model = adapted(AutoModelForCausalLM.from_pretrained(folder))
    for block in model.base_model.model.model.layers:
        fully_shard(block)
    fully_shard(model)
    spread = [p for p in model.parameters() if p.requires_grad]
    assert all(isinstance(p, DTensor) for p in spread)
    return train(model, [batches()[2 * step + rank] for step in range(STEPS)])
