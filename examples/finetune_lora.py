"""Train a LoRA adapter over a quantized model with transformers' Trainer.

python examples/finetune_lora.py MODEL TEXT OUT
"""

import argparse
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

import gptq_triton.integrations.transformers  # noqa: F401 - teaches transformers to load GPTQ folders
from gptq_triton.integrations.peft import register

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("model", help="folder of a GPTQ model")
parser.add_argument("text", type=Path, help="text to train on")
parser.add_argument("out", help="folder for the adapter")
parser.add_argument("--steps", type=int, default=50)
parser.add_argument("--length", type=int, default=256, help="tokens per sample")
parser.add_argument("--rank", type=int, default=8)
parser.add_argument("--dora", action="store_true")
options = parser.parse_args()

tokenizer = AutoTokenizer.from_pretrained(options.model)
tokens = tokenizer(options.text.read_text(), return_tensors="pt").input_ids[0]
samples = [{"input_ids": piece, "labels": piece} for piece in tokens.split(options.length)[:-1]]

model = AutoModelForCausalLM.from_pretrained(options.model, device_map="auto")
model = prepare_model_for_kbit_training(model, gradient_checkpointing_kwargs={"use_reentrant": False})
config = LoraConfig(
    r=options.rank,
    lora_alpha=2 * options.rank,
    target_modules="all-linear",
    use_dora=options.dora,
    task_type="CAUSAL_LM",
)
model = get_peft_model(model, register(config, model))
model.print_trainable_parameters()

arguments = TrainingArguments(
    output_dir=options.out,
    max_steps=options.steps,
    per_device_train_batch_size=1,
    learning_rate=1e-3,
    lr_scheduler_type="constant",
    logging_steps=max(options.steps // 5, 1),
    save_strategy="no",
    report_to=[],
    use_cpu=not torch.cuda.is_available(),
)
trainer = Trainer(model=model, args=arguments, train_dataset=samples)
trainer.train()
model.save_pretrained(options.out)
losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
