"""The attention mask reaches the memories of the pass it belongs to, and of no other."""

import copy
import re
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointImpl, checkpoint_wrapper
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from pkmem import MemoryConfig, MemoryUsage, RowAdam, add_memory
from pkmem.layer import room
from pkmem.layer.memory import memories_in
from pkmem.layer.optim import dense_parameters
from pkmem.lm.huggingface import PkmemForCausalLM
from pkmem.lm.padding import mask_of_pass, real_tokens
from pkmem.lm.placement import find_blocks

KIND = "Padding and recomputation"
NORMS = ("batch", "layer", "rms", "none")
MEMORY = MemoryConfig(num_sub_keys=6, heads=2, knn=3, query_dim=8)
LEFT = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1]])
RIGHT = torch.tensor([[1, 1, 1, 1, 1, 0, 0], [1, 1, 1, 0, 0, 0, 0]])
READS = 2 * 3  # of one token in one memory
WAYS = ("plain", "not reentrant", "reentrant")


def decoder(family: str = "gpt2", dropout: float = 0.0) -> PreTrainedModel:
    sizes = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 4, "head_dim": 8, "intermediate_size": 64, "bos_token_id": 0, "eos_token_id": 0}
    dropouts = dict.fromkeys(("attn_pdrop", "resid_pdrop", "embd_pdrop", "attention_dropout"), dropout)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **sizes, **dropouts, loss_type="ForCausalLM"))


def with_memories(family: str = "gpt2", norm: str = "batch", dropout: float = 0.0) -> PkmemForCausalLM:
    options = {"query_norm": norm, "dropout": dropout, "query_dropout": dropout}
    return add_memory(decoder(family, dropout), [0, 2], MemoryConfig(**MEMORY.to_dict() | options)).train()


def ids(batch: int = 2, length: int = 7) -> Tensor:
    return torch.randint(1, 64, (batch, length))


def loss_of(model: Callable[..., Any], x: Tensor, mask: Tensor) -> Tensor:
    return model(input_ids=x, attention_mask=mask, labels=x.where(mask.bool(), -100), use_cache=False).loss


def trained(model: PkmemForCausalLM) -> dict[str, Tensor]:
    """Weights, statistics and usage after two updates, each of two passes that go forward before one goes back."""
    usages = [MemoryUsage(memory) for memory in memories_in(model).values()]
    optimizers = torch.optim.AdamW(dense_parameters(model), 1e-3), RowAdam(model, lr=0.1)
    torch.manual_seed(1)
    for _ in range(2):
        losses = [loss_of(model, ids(), mask) for mask in (LEFT, RIGHT)]
        for loss in losses:
            loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    counts = {
        f"{i}.{name}": getattr(usage, name) for i, usage in enumerate(usages) for name in ("num_reads", "weight_sum")
    }
    return {**model.state_dict(), **counts}


@pytest.mark.case(
    KIND,
    "gradient_checkpointing_enable (transformers), both kinds, every query norm, dropout, padded batches, several "
    "forward passes before one backward",
    "works",
    "",
)
@pytest.mark.parametrize("norm", NORMS)
def test_gradient_checkpointing_trains_and_counts_bitwise_as_without(norm) -> None:
    model = with_memories(norm=norm, dropout=0.1)
    found = {}
    for way in WAYS:
        made = copy.deepcopy(model)
        if way != "plain":
            made.gradient_checkpointing_enable({"use_reentrant": way == "reentrant"})
            made = copy.deepcopy(made)  # takes along how it checkpoints
        found[way] = trained(made)
        torch.testing.assert_close(found[way], found["plain"], rtol=0, atol=0)
    assert found["plain"]["0.num_reads"].sum() == 2 * (LEFT.sum() + RIGHT.sum()) * READS


def checkpointed_by_others(model: PkmemForCausalLM, way: str) -> PkmemForCausalLM:
    """As those do who know blocks and no `PkmemForCausalLM`, such as FSDP's activation checkpointing."""
    impl = CheckpointImpl.REENTRANT if way.endswith("kind reentrant") else CheckpointImpl.NO_REENTRANT
    if way.startswith("the decoder"):
        model.base.gradient_checkpointing_enable({"use_reentrant": impl is CheckpointImpl.REENTRANT})
    else:
        blocks = find_blocks(model.base)
        for place, block in enumerate(blocks):
            blocks[place] = checkpoint_wrapper(block, impl)
    return model


OTHERS = [f"{who}, kind {kind}" for who in ("the decoder", "wrapped blocks") for kind in WAYS[1:]]


@pytest.mark.case(
    KIND,
    "checkpoint_wrapper (FSDP's activation checkpointing) around blocks, or checkpointing turned on at the inner decoder",
    "works: for several forward passes before one backward call gradient_checkpointing_enable of the whole model",
    "",
)
@pytest.mark.parametrize("way", OTHERS)
@pytest.mark.parametrize("norm", ["batch", "rms"])
def test_checkpoints_that_know_no_mask_recompute_under_it_all_the_same(norm, way) -> None:
    plain = with_memories("llama", norm)
    saving = checkpointed_by_others(copy.deepcopy(plain), way)
    for mask in (LEFT, RIGHT):
        x = ids()
        for model in (plain, saving):
            loss_of(model, x, mask).backward()
    for (name, one), other in zip(plain.named_parameters(), saving.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=0, atol=0, msg=name)
    for one, other in zip(plain.buffers(), saving.buffers(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


@pytest.mark.parametrize("way", OTHERS)
def test_checkpoints_that_know_no_mask_are_refused_where_there_are_several(way) -> None:
    model = checkpointed_by_others(with_memories(), way)
    losses = [loss_of(model, ids(), mask) for mask in (LEFT, RIGHT)]
    with pytest.raises(ValueError, match=r"mixes up the attention masks .* gradient_checkpointing_enable of the model"):
        losses[0].backward()
    del losses
    loss_of(model, ids(), LEFT).backward()


@pytest.mark.case(
    KIND, "torch.compile(fullgraph=True) of a padded training step with gradient checkpointing", "works", ""
)
def test_a_compiled_training_step_with_padding_and_checkpoints_is_the_eager_one() -> None:
    eager = with_memories("llama")
    saving = copy.deepcopy(eager)
    saving.gradient_checkpointing_enable({"use_reentrant": False})
    compiled = torch.compile(saving, backend="aot_eager", fullgraph=True)
    x = ids()
    for call in (eager, compiled):
        loss_of(call, x, LEFT).backward()
    for (name, one), other in zip(eager.named_parameters(), saving.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-5, atol=1e-7, msg=name)
    torch.testing.assert_close(dict(saving.named_buffers()), dict(eager.named_buffers()), rtol=1e-5, atol=1e-6)


@pytest.mark.case(KIND, "A forward that raises, and then the decoder inside without the model", "works", "")
def test_no_mask_outlives_its_pass() -> None:
    model = with_memories(norm="rms").eval()
    loss_of(model, ids(), LEFT)
    assert mask_of_pass() is None
    model.base.lm_head.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(ids(), attention_mask=LEFT)
    assert mask_of_pass() is None
    with MemoryUsage(next(iter(memories_in(model).values()))) as usage, pytest.raises(ZeroDivisionError):
        model.base(ids())
    assert usage.num_reads.sum() == LEFT.numel() * READS


@pytest.mark.case(KIND, "Forward passes of one model in several threads, with different masks", "works", "")
def test_a_thread_sees_the_mask_of_its_own_pass() -> None:
    model = with_memories(norm="rms").eval()
    meeting, x = threading.Barrier(2), ids()
    alone = [model(x, attention_mask=mask).logits for mask in (LEFT, RIGHT)]
    seen: dict[int, Tensor] = {}
    first = find_blocks(model.base)[0]
    first.register_forward_pre_hook(lambda *_: meeting.wait(10) * 0 or None)

    def run(place: int, mask: Tensor) -> None:
        with torch.no_grad():
            seen[place] = model(x, attention_mask=mask).logits

    threads = [threading.Thread(target=run, args=pair) for pair in enumerate((LEFT, RIGHT))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for place, logits in enumerate(alone):
        torch.testing.assert_close(seen[place], logits, rtol=1e-5, atol=1e-6)


@pytest.mark.case(KIND, "MemoryUsage while a left-padded batch generates with a cache", "works", "")
def test_a_generating_batch_counts_no_padding() -> None:
    model = with_memories().eval()
    settings = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    for use_cache, num_tokens in ((True, LEFT.sum() + 2 * 3), (False, 4 * LEFT.sum() + 2 * (1 + 2 + 3))):
        with MemoryUsage(next(iter(memories_in(model).values()))) as usage:
            model.generate(ids(), attention_mask=LEFT, use_cache=use_cache, **settings)
        assert usage.num_reads.sum() == num_tokens * READS


def test_embeddings_in_place_of_tokens_have_a_mask_too() -> None:
    model = with_memories().eval()
    embeddings = model.get_input_embeddings()(ids())
    with MemoryUsage(next(iter(memories_in(model).values()))) as usage:
        model(inputs_embeds=embeddings, attention_mask=LEFT)
    assert usage.num_reads.sum() == LEFT.sum() * READS


@pytest.mark.case(
    KIND,
    "A 4-d attention mask, as packed sequences have",
    "works: it does not tell padding, so every token counts as real",
    "",
)
def test_a_mask_of_queries_and_keys_tells_no_padding() -> None:
    model = with_memories(norm="rms").train()
    square = torch.ones(7, 7).tril().bool().expand(2, 1, 7, 7)
    with MemoryUsage(next(iter(memories_in(model).values()))) as usage:
        model(ids(), attention_mask=square, use_cache=False)
    assert usage.num_reads.sum() == LEFT.numel() * READS


def test_real_tokens_are_the_last_of_the_mask_and_none_without_padding() -> None:
    assert torch.equal(real_tokens(LEFT, 7), LEFT.bool())
    assert torch.equal(real_tokens(LEFT, 6), LEFT.bool()[:, 1:])
    assert real_tokens(LEFT, 5) is None
    assert real_tokens(None, 7) is None
    assert real_tokens({"full_attention": LEFT}, 7) is None
    assert real_tokens(LEFT.to("meta"), 7).shape == (2, 7)


def test_a_mask_without_padding_is_bitwise_no_mask() -> None:
    model = with_memories()
    twin, x = copy.deepcopy(model), ids()
    first, second = model(x, attention_mask=torch.ones_like(x)), twin(x)
    assert torch.equal(first.logits, second.logits)
    torch.testing.assert_close(dict(model.named_buffers()), dict(twin.named_buffers()), rtol=0, atol=0)


@pytest.mark.case(
    "Gradual surprises",
    "add_memory with tables that do not fit together, though each would",
    "refused: ValueError with the bytes needed and the bytes there; the model is left as it was",
    "",
)
@pytest.mark.parametrize(("share", "fits"), [(False, False), (True, True)])
def test_memories_that_do_not_fit_together_are_refused_before_the_model_is_edited(share, fits, monkeypatch) -> None:
    one = room.num_weights(MEMORY.bound_to(32))
    monkeypatch.setattr(room, "bytes_of", lambda device: 4 * 2 * one - 4)
    model = decoder()
    before = [name for name, _ in model.named_modules()]
    if fits:
        add_memory(model, [0, 2], MEMORY, share_values=share)
        return
    message = (
        f"2 memories of 36 slots of {2 * one:,} float32 numbers needs {8 * one:,} bytes but cpu has {8 * one - 4:,}"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        add_memory(model, [0, 2], MEMORY, share_values=share)
    assert [name for name, _ in model.named_modules()] == before


@pytest.mark.case("Gradual surprises", "add_memory with layers from NumPy, saved and loaded", "works", "")
def test_layers_from_numpy_are_saved(tmp_path) -> None:
    model = add_memory(decoder(), np.arange(0, 3, 2), MEMORY)
    model.save_pretrained(tmp_path)
    assert AutoModelForCausalLM.from_pretrained(tmp_path).config.layers == [0, 2]


def test_a_decoder_that_joins_batch_and_tokens_hands_over_the_mask_alike() -> None:
    class Joined(nn.Module):
        def __init__(self, mlp: nn.Module) -> None:
            super().__init__()
            self.inner = mlp

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x.flatten(0, 1)).view_as(x)

    model, x = with_memories(norm="rms").eval(), ids()
    expected = model(x, attention_mask=LEFT).logits
    for block in find_blocks(model.base)[::2]:
        block.mlp = Joined(block.mlp)
    torch.testing.assert_close(model(x, attention_mask=LEFT).logits, expected, rtol=1e-5, atol=1e-6)
