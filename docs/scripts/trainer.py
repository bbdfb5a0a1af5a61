"""Hugging Face's Trainer on several processes: torchrun --nproc-per-node 2 trainer.py"""

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import pkmem

arguments = TrainingArguments(  # makes the process group
    "runs/trainer", max_steps=20, per_device_train_batch_size=8, learning_rate=1e-3, lr_scheduler_type="constant",
    save_strategy="no", report_to="none", use_cpu=True, disable_tqdm=True, ddp_find_unused_parameters=False,
)  # fmt: skip
arguments.per_device_train_batch_size //= arguments.world_size
torch.manual_seed(0)
sizes = {
    "hidden_size": 64,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "vocab_size": 512,
}
decoder = LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=2))
model = pkmem.add_memory(decoder, layers=[1], config=pkmem.MemoryConfig(num_sub_keys=32, heads=2, knn=8, query_dim=32))

mesh = init_device_mesh("cpu", (1, dist.get_world_size()), mesh_dim_names=("replicate", "columns"))
pkmem.shard_values(model, mesh)
dense = torch.optim.AdamW(pkmem.dense_parameters(model), lr=1e-3)
optimizer = pkmem.CombinedOptimizer(dense, pkmem.RowAdam(model, lr=1e-3))

tokens = torch.randint(16, (160, 32))
data = [{"input_ids": row, "labels": row} for row in tokens]
trainer = Trainer(model, arguments, train_dataset=data, optimizers=(optimizer, None))
trainer.train()
loss = trainer.state.log_history[-1]["train_loss"]
if dist.get_rank() == 0:
    print(f"loss {loss:.5f}")
dist.barrier()
dist.destroy_process_group()
