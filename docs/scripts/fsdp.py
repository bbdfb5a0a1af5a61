"""A language model whose dense part FSDP2 splits: torchrun --nproc-per-node 2 fsdp.py"""

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import LlamaConfig, LlamaForCausalLM

import pkmem

dist.init_process_group("gloo")  # "nccl" on GPUs
torch.manual_seed(0)
sizes = {
    "hidden_size": 64,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "vocab_size": 512,
}
decoder = LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=2))
with pkmem.undrawn_tables():  # no process ever holds a whole table
    model = pkmem.add_memory(
        decoder, layers=[1], config=pkmem.MemoryConfig(num_sub_keys=32, heads=2, knn=8, query_dim=32)
    )

mesh = init_device_mesh("cpu", (1, dist.get_world_size()), mesh_dim_names=("replicate", "columns"))
pkmem.shard_values(model, mesh)
fully_shard(model, ignored_params={table.weight for table in pkmem.tables_in(model)})

dense = torch.optim.AdamW(pkmem.dense_parameters(model), lr=1e-3)
optimizer = pkmem.CombinedOptimizer(dense, pkmem.RowAdam(model, lr=1e-3))
for _ in range(20):
    tokens = torch.randint(16, (8, 32))[dist.get_rank() :: dist.get_world_size()]  # a share of the batch each
    loss = model(input_ids=tokens, labels=tokens).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
dist.all_reduce(loss.detach_())
if dist.get_rank() == 0:
    print(f"loss {loss.item() / dist.get_world_size():.5f}")
dist.barrier()
dist.destroy_process_group()
