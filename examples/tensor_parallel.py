"""Generate with a GPTQ model whose layers are split over several processes, each on a GPU of its own or on the CPU.

torchrun --nproc-per-node 2 examples/tensor_parallel.py MODEL "Once upon a time"
"""

import argparse
from typing import Any

import torch.distributed
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.distributed.configuration_utils import DistributedConfig

import gptq_triton.integrations.transformers  # noqa: F401 - teaches transformers to load GPTQ folders

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("model", help="folder of a GPTQ model")
parser.add_argument("prompt")
parser.add_argument("--tokens", type=int, default=20)
options = parser.parse_args()

tokenizer = AutoTokenizer.from_pretrained(options.model)
model: Any = AutoModelForCausalLM.from_pretrained(options.model, distributed_config=DistributedConfig(tp_plan="auto"))
prompt = tokenizer(options.prompt, return_tensors="pt").to(model.device)
tokens = model.generate(**prompt, max_new_tokens=options.tokens, do_sample=False)
if torch.distributed.get_rank() == 0:
    print(tokenizer.decode(tokens[0]))
torch.distributed.destroy_process_group()
