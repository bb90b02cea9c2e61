"""Quantize a model while transformers loads it, save it, load it again and let it speak.

python examples/quantize_on_load.py MODEL TEXT OUT
"""

import argparse
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, AutoTokenizer

from gptq_triton.integrations.transformers import GptqTritonConfig

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("model", help="folder or hub name of a floating model")
parser.add_argument("text", type=Path, help="text to calibrate on; a paragraph is a sample")
parser.add_argument("out", help="folder for the quantized model")
parser.add_argument("--bits", type=int, default=4)
parser.add_argument("--group-size", type=int, default=128)
options = parser.parse_args()

tokenizer = AutoTokenizer.from_pretrained(options.model)
paragraphs = [paragraph for paragraph in options.text.read_text().split("\n\n") if paragraph.strip()]
config = GptqTritonConfig(
    bits=options.bits, group_size=options.group_size, sym=False, dataset=paragraphs[:128], tokenizer=tokenizer
)
model: Any = AutoModelForCausalLM.from_pretrained(options.model, quantization_config=config, device_map="auto")
model.save_pretrained(options.out)
tokenizer.save_pretrained(options.out)

model = AutoModelForCausalLM.from_pretrained(options.out, device_map="auto")
prompt = tokenizer(paragraphs[0][:100], return_tensors="pt").to(model.device)
tokens = model.generate(**prompt, max_new_tokens=20, do_sample=False)
print(tokenizer.decode(tokens[0]))
print(f"{model.get_memory_footprint() / 1e6:.1f} MB")
