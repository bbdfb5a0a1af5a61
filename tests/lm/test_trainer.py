"""What people ask of transformers' own Trainer, for a model with memories, against plain steps of torch."""

import copy
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import EarlyStoppingCallback, PreTrainedModel, Trainer, TrainingArguments

from decoders import FAMILIES, VOCAB, ids, with_memories, with_todays_transformers
from pkmem import CombinedOptimizer, RowAdam
from pkmem.layer.memory import memories_in
from pkmem.layer.optim import dense_parameters

KIND = "Hugging Face protocol"


def examples(count: int = 8, length: int = 9) -> list[dict[str, Tensor]]:
    """Sequences without a label for their first token: nothing predicts it, but transformers 5.6 counts it."""
    made = [{"input_ids": tokens, "labels": tokens.clone()} for tokens in ids(count, length)]
    for one in made:
        one["labels"][0] = -100
    return made


def padded_examples(lengths: tuple[int, ...]) -> list[dict[str, Tensor]]:
    """As many sequences as lengths, padded on the right."""
    made = []
    for length, tokens in zip(lengths, ids(len(lengths), 9), strict=True):
        real = torch.arange(9) < length
        labels = torch.where(real, tokens, -100)
        labels[0] = -100  # as in `examples`
        made.append({"input_ids": tokens * real, "attention_mask": real.long(), "labels": labels})
    return made


def trainer_of(
    model: PreTrainedModel, folder: Path, data: list, optimizer: torch.optim.Optimizer | None = None, **options: object
) -> Trainer:
    settings = {"report_to": [], "save_strategy": "no", "disable_tqdm": True, "use_cpu": True, "logging_steps": 1}
    settings |= {"per_device_train_batch_size": 2, "max_grad_norm": 0, "max_steps": 1, "lr_scheduler_type": "constant"}
    arguments = TrainingArguments(folder, **settings | options)
    # without a shuffle, so that a batch is known
    trainer = Trainer(model, arguments, train_dataset=data, eval_dataset=data, optimizers=(optimizer, None))
    trainer._get_train_sampler = lambda *_: torch.utils.data.SequentialSampler(data)
    return trainer


def union_for(model: nn.Module, lr: float = 1e-2) -> CombinedOptimizer:
    return CombinedOptimizer(torch.optim.AdamW(dense_parameters(model), lr=lr), RowAdam(model, lr=lr))


def losses(trainer: Trainer) -> list[float]:
    return [record["loss"] for record in trainer.state.log_history if "loss" in record]


@pytest.mark.case(
    KIND,
    "Trainer: a column that only some decoders take (position_ids), and one that none takes",
    "works",
    "https://github.com/huggingface/transformers/issues/43598",
)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_trainer_gives_the_model_every_column_its_decoder_takes(family, tmp_path) -> None:
    model = with_memories(family, "layer").double()
    data = [{**one, "position_ids": torch.arange(9).flip(0), "source": "web"} for one in examples(2)]
    batch = {name: torch.stack([one[name] for one in data]) for name in ("input_ids", "labels", "position_ids")}
    expected = model(**batch).loss.item()
    without = model(batch["input_ids"], labels=batch["labels"]).loss.item()
    trainer = trainer_of(model, tmp_path, data)
    trainer.train()
    assert losses(trainer)[0] == pytest.approx(expected, rel=1e-12)
    assert abs(expected / without - 1) > 1e-9


@pytest.mark.case(
    KIND,
    "Trainer: gradient_accumulation_steps=2 against one batch of twice the size, sequences of unequal length",
    "works: batch norm takes each part's own statistics, the other query norms none",
    "https://github.com/huggingface/transformers/issues/24725",
)
@pytest.mark.parametrize("rows", [False, True])
@pytest.mark.parametrize("norm", ["layer", "rms", "none"])
def test_accumulated_parts_are_one_batch(norm, rows, tmp_path) -> None:
    data = padded_examples((9, 3, 2, 6))
    start = with_memories("llama", norm).double()
    results = []
    for size, parts in ((4, 1), (2, 2), (1, 4)):
        model = copy.deepcopy(start)
        optimizer = union_for(model) if rows else torch.optim.SGD(model.parameters(), lr=1.0)
        options = {"per_device_train_batch_size": size, "gradient_accumulation_steps": parts}
        trainer_of(model, tmp_path, data, optimizer, **options).train()
        results.append(model.state_dict())
    torch.testing.assert_close(results[1], results[0], rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(results[2], results[0], rtol=1e-6, atol=1e-9)
    if not rows:  # and both are the step of torch
        batch = {name: torch.stack([one[name] for one in data]) for name in data[0]}
        start.train()(**batch).loss.backward()
        with torch.no_grad():
            for weight in start.parameters():
                weight -= weight.grad
        torch.testing.assert_close(dict(results[0]), dict(start.state_dict()), rtol=1e-6, atol=1e-9)


@pytest.mark.case(
    KIND,
    "Trainer: auto_find_batch_size after an out-of-memory error",
    "works",
    "https://github.com/huggingface/sentence-transformers/issues/3145",
)
def test_a_smaller_batch_is_found_and_nothing_of_the_failed_one_stays(tmp_path) -> None:
    def no_room(gradient: Tensor) -> None:
        if gradient.shape[0] > 2:
            raise RuntimeError("CUDA out of memory.")

    start, data = with_memories("llama", "layer"), examples()
    results = []
    for size in (2, 8):
        model = copy.deepcopy(start)
        # in the backward pass, when the memory of the last block has its gradients already
        model.get_input_embeddings().register_forward_hook(lambda _, __, output: output.register_hook(no_room) and None)
        options = {"per_device_train_batch_size": size, "auto_find_batch_size": size > 2, "max_steps": 2}
        trainer_of(model, tmp_path, data, union_for(model), **options).train()
        results.append(model.state_dict())
    torch.testing.assert_close(results[1], results[0], rtol=1e-6, atol=1e-7)


@pytest.mark.case(
    KIND,
    "Trainer: load_best_model_at_end, early stopping, then resume_from_checkpoint, with CombinedOptimizer",
    "works",
    "",
)
@pytest.mark.parametrize("family", ["gpt2", "llama", "mixtral"])
def test_the_best_model_comes_back_at_the_end_and_training_goes_on(family, tmp_path) -> None:
    model = with_memories(family, "layer", share_values=True, placement="parallel")
    options = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1, "max_steps": 4}
    options |= {"load_best_model_at_end": True, "metric_for_best_model": "loss", "greater_is_better": True}
    trainer = trainer_of(model, tmp_path, examples(), union_for(model), **options)  # the worst, which is an early one
    trainer.add_callback(EarlyStoppingCallback(3))
    trainer.train()
    measured = {record["step"]: record["eval_loss"] for record in trainer.state.log_history if "eval_loss" in record}
    best = max(measured, key=lambda step: measured[step])
    assert best < 4
    saved = load_file(tmp_path / f"checkpoint-{best}" / "model.safetensors")
    state = model.state_dict()
    for name, weight in saved.items():
        assert torch.equal(state[name], weight), name
    assert trainer.evaluate()["eval_loss"] == pytest.approx(measured[best], rel=1e-5)
    first, *others = memories_in(model).values()
    assert all(other.values.weight is first.values.weight for other in others)

    options = {"save_strategy": "steps", "save_steps": 1, "max_steps": 4}
    again = with_memories(family, "layer", share_values=True, placement="parallel")
    resumed = trainer_of(again, tmp_path / "again", examples(), union_for(again), **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert len(losses(resumed)) == 4
    assert json.loads((tmp_path / "again" / "checkpoint-4" / "trainer_state.json").read_text())["global_step"] == 4


@pytest.mark.case(KIND, "Trainer: predict, with compute_metrics", "works", "")
@pytest.mark.parametrize("family", FAMILIES)
@with_todays_transformers
def test_predictions_are_the_logits(family, tmp_path) -> None:
    model, data = with_memories(family), examples()
    found = trainer_of(model, tmp_path, data).predict(data)
    expected = model(torch.stack([one["input_ids"] for one in data])).logits
    assert found.predictions.shape == (8, 9, VOCAB)
    torch.testing.assert_close(torch.tensor(found.predictions), expected.detach(), rtol=1e-5, atol=1e-5)


@pytest.mark.case(
    KIND, "Trainer: bf16, gradient_checkpointing, label smoothing, NEFTune noise, torch_compile", "works", ""
)
@pytest.mark.filterwarnings("ignore:.gradient_checkpointing")
@pytest.mark.parametrize(
    "options",
    [
        {"bf16": True},
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
        {"label_smoothing_factor": 0.1},
        {"neftune_noise_alpha": 5.0},
        {"torch_compile": True, "torch_compile_backend": "eager"},
        {"optim": "adafactor"},
    ],
)
def test_the_trainers_options_train_every_part(options, tmp_path) -> None:
    model = with_memories("llama", "layer")
    before = copy.deepcopy(model.state_dict())
    trainer_of(model, tmp_path, examples(), learning_rate=1e-2, max_steps=2, **options).train()
    changed = {name for name, weight in model.state_dict().items() if not torch.equal(weight, before[name])}
    assert {table for table in changed if "values" in table} == {name for name in before if "values" in name}
    assert {name for name in before if "memory" in name and "bias" not in name} <= changed
    assert model.eval()(ids(1)).logits.isfinite().all()
