"""What each process does for test_vllm.py: vLLM's own Llama and its own loader, with attention that needs no GPU."""

import os
from pathlib import Path

import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.functional import scaled_dot_product_attention

from gptq_triton.linear import QuantLinear
from tests.tiny import batches

LENGTHS = range(3, 23)


class Attention(nn.Module):
    """In place of vLLM's, which has no backend without a GPU: one sequence, no cache."""

    def __init__(self, num_heads, head_size, scale, num_kv_heads, **_):
        super().__init__()
        self.sizes, self.scale = (num_heads, num_kv_heads, num_kv_heads, head_size), scale

    def forward(self, q, k, v):
        *heads, size = self.sizes
        q, k, v = (x.view(-1, n, size).transpose(0, 1) for x, n in zip((q, k, v), heads, strict=True))
        y = scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.scale, enable_gqa=True)
        return y.transpose(0, 1).flatten(1)


def run(rank, ranks, folder, out, port):
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    torch.accelerator.empty_cache = lambda: None  # vLLM's loader calls it, and there is none
    from vllm.config import (
        CompilationConfig,
        DeviceConfig,
        ModelConfig,
        ParallelConfig,
        VllmConfig,
        set_current_vllm_config,
    )
    from vllm.distributed import init_distributed_environment, initialize_model_parallel
    from vllm.model_executor.model_loader import get_model_loader
    from vllm.model_executor.models import llama

    from gptq_triton.integrations import vllm as plugin

    plugin.register()
    llama.Attention = Attention
    found = {}
    for path in sorted(Path(folder).iterdir()):
        asked = "gptq_triton" if path.name == "sym" else None
        options = {"dtype": "float32", "skip_tokenizer_init": True, "enforce_eager": True, "quantization": asked}
        config = VllmConfig(
            device_config=DeviceConfig(device="cpu"),
            model_config=ModelConfig(model=str(path), **options),
            parallel_config=ParallelConfig(tensor_parallel_size=ranks, distributed_executor_backend="mp"),
            compilation_config=CompilationConfig(custom_ops=["none"]),  # what needs no compiled extension
        )
        with set_current_vllm_config(config):
            if not found:
                init_distributed_environment(ranks, rank, "env://", rank, "gloo")
                initialize_model_parallel(ranks, 1)
            model = get_model_loader(config.load_config).load_model(config, config.model_config)
            found[path.name] = measured(model)
            torch._dynamo.reset()
    torch.save(found, Path(out) / f"{rank}.pt")


@torch.no_grad()
def measured(model):
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model.model.forward, backend=counter, fullgraph=True)
    tokens = batches(1)[0][0]
    off = 0.0
    for length in LENGTHS:
        ids, positions = tokens[:length], torch.arange(length)
        expected = model(ids, positions)
        off = max(off, float((compiled(ids, positions, None) - expected).norm() / expected.norm()))
    layers = [layer for layer in model.modules() if isinstance(layer, QuantLinear)]
    return {
        "logits": model.compute_logits(model(tokens, torch.arange(len(tokens)))),
        "compiled_off": off,
        "compilations": counter.frame_count,
        "held": sum(b.nbytes for layer in layers for name, b in layer.named_buffers() if name != "g_idx"),
        "layers": len(layers),
    }
