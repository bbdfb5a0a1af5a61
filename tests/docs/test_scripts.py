"""The scripts of docs/distributed.md train the same model on two processes as on one."""

import multiprocessing
import os
import re
import runpy
import socket
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import pkmem

SCRIPTS = Path(__file__).parents[2] / "docs" / "scripts"


def run_script(name: str, arguments: list[str], out: str, rank: int, world: int, port: int) -> None:
    """As torchrun starts it; torch and transformers are there already."""
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world),
        "MASTER_ADDR": "localhost", "MASTER_PORT": str(port),
    }  # fmt: skip
    import torch

    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)  # in fp32 sums in another order may part: 1.6e-4 on one kind of processor
    sys.argv[1:] = arguments
    with Path(f"{out}-{rank}").open("w", encoding="utf-8") as sys.stdout:
        runpy.run_path(str(SCRIPTS / f"{name}.py"), run_name="__main__")


def loss_of(printed: str) -> float:
    found = re.search(r"^loss (\d\.\d+)$", printed, re.MULTILINE)
    assert found, printed
    return float(found[1])


def loss(name: str, world: int, folder: Path, *arguments: str) -> float:
    with socket.create_server(("", 0)) as free:
        port = free.getsockname()[1]
    context = multiprocessing.get_context("forkserver")
    out = str(folder / f"{name}-{world}")
    processes = [
        context.Process(target=run_script, args=(name, [*arguments], out, rank, world, port)) for rank in range(world)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * world
    return loss_of(Path(f"{out}-0").read_text())


@pytest.mark.linux
@pytest.mark.case(
    "Several devices",
    "a plain torch loop with `DistributedDataParallel`, by torchrun",
    "works: with three lines more",
    "",
)
@pytest.mark.case(
    "Several devices", "a plain torch loop with `fully_shard`, by torchrun", "works: with three lines more", ""
)
@pytest.mark.parametrize("name", ["ddp", "fsdp"])
def test_a_loop_of_plain_torch_trains_the_same_on_two_processes(name, tmp_path) -> None:
    assert loss(name, 2, tmp_path) == pytest.approx(loss(name, 1, tmp_path), abs=2e-5)


@pytest.mark.linux
@pytest.mark.case("Several devices", "Hugging Face's Trainer, by torchrun", "works: with three lines more", "")
def test_the_trainer_trains_on_two_processes(tmp_path) -> None:
    assert loss("trainer", 2, tmp_path) < 5.9  # random tokens of 512 are 6.2; of the 16 that are in the text, 2.8


@pytest.mark.linux
@pytest.mark.case(
    "Several devices",
    "a saved model directory read onto several processes, by torch.distributed.checkpoint",
    "works: each process reads its columns of a table",
    "",
)
def test_a_saved_model_is_read_by_two_processes(tmp_path) -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    decoder = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=32, tie_word_embeddings=True))
    memory = pkmem.MemoryConfig(num_sub_keys=8, heads=2, knn=4, query_dim=16)
    model = pkmem.add_memory(decoder, [0], memory).eval()
    model.save_pretrained(tmp_path / "saved")
    tokens = torch.arange(16)[None]
    with torch.no_grad():
        whole = model(input_ids=tokens, labels=tokens).loss.item()
    assert loss("load", 2, tmp_path, str(tmp_path / "saved")) == pytest.approx(whole, abs=1e-5)
