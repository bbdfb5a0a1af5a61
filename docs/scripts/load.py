"""A saved model directory on several processes: torchrun --nproc-per-node 2 load.py DIR"""

import sys

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as checkpoint
from torch.distributed.device_mesh import init_device_mesh
from transformers import AutoConfig, AutoModelForCausalLM

import pkmem

dist.init_process_group("gloo")  # "nccl" on GPUs
folder = sys.argv[1]
with pkmem.undrawn_tables():
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder)).eval()
mesh = init_device_mesh("cpu", (1, dist.get_world_size()), mesh_dim_names=("replicate", "columns"))
pkmem.shard_values(model, mesh)

state = {name: tensor for name, tensor in model.state_dict().items() if name not in model.all_tied_weights_keys}
checkpoint.load(state, storage_reader=checkpoint.HuggingFaceStorageReader(folder))  # of a table, these columns alone
model.load_state_dict(state, strict=False)  # tied weights have one name in the file

tokens = torch.arange(16)[None]
with torch.no_grad():
    loss = model(input_ids=tokens, labels=tokens).loss
if dist.get_rank() == 0:
    print(f"loss {loss.item():.5f}")
dist.barrier()
dist.destroy_process_group()
