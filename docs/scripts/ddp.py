"""A loop of plain torch on several processes: torchrun --nproc-per-node 2 ddp.py"""

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

import pkmem

dist.init_process_group("gloo")  # "nccl" on GPUs
torch.manual_seed(0)
memory = pkmem.ProductKeyMemory(pkmem.MemoryConfig(dim=64, num_sub_keys=32, heads=2, knn=8, query_dim=32))
model = torch.nn.Sequential(torch.nn.Linear(64, 64), memory, torch.nn.Linear(64, 64))

mesh = init_device_mesh("cpu", (1, dist.get_world_size()), mesh_dim_names=("replicate", "columns"))
pkmem.shard_values(model, mesh)  # before DistributedDataParallel, which then leaves the tables alone
table_optimizer = pkmem.RowAdam(model, lr=1e-3)

parallel = DistributedDataParallel(model)
optimizer = torch.optim.Adam(pkmem.dense_parameters(model), lr=1e-3)
for _ in range(20):
    x = torch.randn(64, 64)[dist.get_rank() :: dist.get_world_size()]  # a share of the batch each
    loss = (parallel(x) - x.flip(-1)).square().mean()
    loss.backward()
    for part in (optimizer, table_optimizer):
        part.step()
        part.zero_grad()
dist.all_reduce(loss.detach_())
if dist.get_rank() == 0:
    print(f"loss {loss.item() / dist.get_world_size():.5f}")
dist.barrier()
dist.destroy_process_group()
