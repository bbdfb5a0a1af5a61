"""Evaluation: the loss is the textbook's, the model is left as it was, and speeds are measured in turns."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from pkmem.layer.counting import count_parameters
from pkmem.layer.memory import memories_in
from pkmem.layer.usage import watching
from pkmem.lm.build import build_model
from pkmem.lm.evaluation import evaluate
from pkmem.lm.speed import measure_speed
from tiny import MEMORY, MODEL


@pytest.fixture
def model() -> nn.Module:
    return build_model(MODEL, MEMORY, vocab_size=300, eos_token_id=0)


@pytest.fixture
def blocks() -> list[dict[str, torch.Tensor]]:
    return [{"input_ids": torch.randint(300, (32,))} for _ in range(11)]


def test_loss_is_the_mean_of_minus_log_softmax_at_the_next_token(model: nn.Module, blocks: list) -> None:
    model.eval()
    losses = []
    for block in blocks:
        tokens = block["input_ids"]
        with torch.no_grad():
            logits = model(input_ids=tokens[None]).logits[0].double().numpy()
        for i in range(len(tokens) - 1):
            losses.append(np.log(np.exp(logits[i]).sum()) - logits[i, tokens[i + 1]])
    figures = evaluate(model, blocks, bytes_per_token=3.5)
    loss = np.mean(losses)
    assert figures["loss"] == pytest.approx(loss, rel=1e-6)
    assert figures["perplexity"] == pytest.approx(np.exp(loss), rel=1e-5)
    assert figures["bits_per_byte"] == pytest.approx(np.log2(np.e) * loss / 3.5, rel=1e-6)
    assert figures["num_tokens"] == len(losses) == 11 * 31


def test_labels_say_what_is_predicted(model: nn.Module, blocks: list) -> None:
    """Of two halves that count by themselves, the loss of all is the mean by the tokens of each."""
    halves = []
    for ignored in (slice(0, 20), slice(20, None)):
        labelled = [{**block, "labels": block["input_ids"].clone()} for block in blocks]
        for block in labelled:
            block["labels"][ignored] = -100
        halves.append(evaluate(model, labelled, 1.0))
    assert [half["num_tokens"] for half in halves] == [12 * 11, 19 * 11]
    whole = evaluate(model, blocks, 1.0)["loss"]
    assert whole == pytest.approx(sum(half["loss"] * half["num_tokens"] for half in halves) / (31 * 11), rel=1e-5)


def test_what_repeats_a_pair_of_its_block_is_counted_apart(model: nn.Module) -> None:
    """Against a search of each pair in what stood before it, with pairs that overlap and blocks that share none."""
    blocks = [{"input_ids": torch.tensor(tokens)} for tokens in ([7, 7, 7, 7, 1, 2, 7, 1], [1, 2, 3, 1, 2, 3, 1, 3])]
    repeated, new = [], []
    for tokens in (block["input_ids"] for block in blocks):
        with torch.no_grad():
            log_probs = model.eval()(input_ids=tokens[None]).logits[0].double().log_softmax(-1)
        pairs = list(zip(tokens.tolist(), tokens.tolist()[1:], strict=False))
        for i, pair in enumerate(pairs):
            (repeated if pair in pairs[:i] else new).append(-log_probs[i, pair[1]].item())
    figures = evaluate(model, blocks, 1.0)
    assert len(repeated) == 2 + 1 + 3
    assert figures["repeated_share"] == pytest.approx(len(repeated) / 14)
    assert figures["repeated_loss"] == pytest.approx(np.mean(repeated), rel=1e-5)
    assert figures["new_loss"] == pytest.approx(np.mean(new), rel=1e-5)
    assert figures["loss"] == pytest.approx(np.mean(repeated + new), rel=1e-5)


def test_a_kind_of_token_that_is_not_there_has_no_loss(model: nn.Module) -> None:
    figures = evaluate(model, [{"input_ids": torch.arange(8)}], 1.0)
    assert figures["repeated_share"] == 0
    assert "repeated_loss" not in figures
    assert figures["new_loss"] == figures["loss"]


def test_batches_do_not_change_the_loss(model: nn.Module, blocks: list) -> None:
    one, eight = (evaluate(model, blocks, 1.0, batch_sequences=n) for n in (1, 8))
    assert one["loss"] == pytest.approx(eight["loss"], rel=1e-6)
    assert one["num_tokens"] == eight["num_tokens"]


@pytest.mark.parametrize(("max_tokens", "num_blocks"), [(1, 1), (64, 2), (95, 2), (10_000, 11), (None, 11)])
def test_max_tokens_takes_the_first_blocks(
    model: nn.Module, blocks: list, max_tokens: int | None, num_blocks: int
) -> None:
    assert evaluate(model, blocks, 1.0, max_tokens=max_tokens) == evaluate(model, blocks[:num_blocks], 1.0)


@pytest.mark.parametrize("training", [True, False])
def test_evaluation_leaves_the_model_as_it_was(model: nn.Module, blocks: list, training: bool) -> None:
    model.train(training)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    evaluate(model, blocks, 1.0)
    assert all(module.training is training for module in model.modules())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())


def test_mode_comes_back_after_an_error(model: nn.Module) -> None:
    model.train()
    with pytest.raises(IndexError):
        evaluate(model, [{"input_ids": torch.full((4,), 10_000)}], 1.0)
    assert model.training


def test_a_hopeless_model_has_infinite_perplexity() -> None:
    class Sure(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.logits = nn.Parameter(torch.tensor([1e4, 0.0]))

        def forward(self, input_ids: torch.Tensor, use_cache: bool) -> SimpleNamespace:
            return SimpleNamespace(logits=self.logits.expand(*input_ids.shape, 2))

    figures = evaluate(Sure(), [{"input_ids": torch.ones(3, dtype=torch.int64)}], 1.0)
    assert figures["loss"] == 1e4
    assert figures["perplexity"] == math.inf


def test_every_memory_reports_its_own_use(blocks: list) -> None:
    model = build_model(
        SimpleNamespace(**{**vars(MODEL), "memory_layers": [0, 1]}), MEMORY, vocab_size=300, eos_token_id=0
    ).eval()
    slots: dict[str, list] = {"memory_0": [], "memory_1": []}
    for name, memory in zip(slots, memories_in(model).values(), strict=True):
        memory.keys.register_forward_hook(lambda _, __, output, name=name: slots[name].append(output[0].flatten()))
    figures = evaluate(model, blocks, 1.0)
    for name, read in slots.items():
        used = torch.cat(read).unique().numel()
        assert figures[f"{name}/dead_slots"] == 64 - used
        assert figures[f"{name}/usage"] == used / 64
        assert {f"{name}/top1_usage", f"{name}/kl", f"{name}/hottest_share"} <= figures.keys()
    assert figures["memory_0/kl"] != figures["memory_1/kl"]


def test_watching_ends_with_its_block(model: nn.Module, blocks: list) -> None:
    with watching(model) as usages:
        model(input_ids=blocks[0]["input_ids"][None])
    model(input_ids=blocks[1]["input_ids"][None])
    assert usages["memory_0"].num_reads.sum() == 32 * MEMORY.heads * MEMORY.knn


def test_a_shared_table_counts_once() -> None:
    options = {**vars(MODEL), "memory_layers": [0, 1]}
    apart, shared = (
        build_model(SimpleNamespace(**options | {"share_values": share}), MEMORY, 300, 0) for share in (False, True)
    )
    assert count_parameters(apart)["memory_params"] == 2 * 64 * 32
    assert count_parameters(shared)["memory_params"] == 64 * 32
    assert count_parameters(apart)["dense_params"] == count_parameters(shared)["dense_params"]
    for model in (apart, shared):
        counts = count_parameters(model)
        assert sum(counts.values()) == sum(p.numel() for p in set(model.parameters()))
    dense = build_model(SimpleNamespace(**options | {"memory_layers": []}), MEMORY, 300, 0)
    assert count_parameters(dense) == {"dense_params": sum(p.numel() for p in dense.parameters()), "memory_params": 0}


@pytest.mark.parametrize("context_tokens", [2, 5, 32])
def test_speeds_are_measured_in_turns_within_the_context(context_tokens: int) -> None:
    models, order = {}, []
    for name in ("first", "second"):
        models[name] = build_model(MODEL, MEMORY, vocab_size=300, eos_token_id=0).train()
        models[name].register_forward_pre_hook(
            lambda model, _, kwargs, name=name: order.append((name, tuple(kwargs["input_ids"].shape))), with_kwargs=True
        )
    speeds = measure_speed(models, context_tokens, batch_sequences=3, repeats=2)
    assert speeds.keys() == models.keys()
    for figures in speeds.values():
        assert figures.keys() == {"prefill_tokens_per_s", "decode_tokens_per_s"}
        assert all(0 < figure < math.inf for figure in figures.values())
    assert [name for name, shape in order if shape == (3, context_tokens)] == ["first", "second"] * 3
    assert order.count(("first", (1, 1))) >= 3
    assert all(model.training for model in models.values())


def test_an_untrained_model_is_as_good_as_chance(model: nn.Module, blocks: list) -> None:
    assert evaluate(model, blocks, 1.0)["loss"] == pytest.approx(math.log(300), abs=0.2)
