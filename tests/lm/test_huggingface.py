import copy
import dataclasses
import json
import pickle
import re
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    pipeline,
)

from decoders import FAMILIES, MEMORY, MODEL, NORMS, VOCAB, decoder, ids, reloaded, with_memories
from pkmem import CombinedOptimizer, MemoryConfig, MemoryUsage, RowAdam, add_memory
from pkmem.layer.memory import memories_in
from pkmem.layer.optim import dense_parameters
from pkmem.layer.values import tables_in
from pkmem.lm.build import build_model
from pkmem.lm.huggingface import PkmemForCausalLM
from pkmem.lm.placement import MemoryMLP, find_blocks

KIND = "Hugging Face protocol"


# --- every family -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("placement", ["replace", "parallel"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_old_weights_are_kept_and_only_replaced_mlps_are_gone(family, placement) -> None:
    model = decoder(family)
    old = {name: weight.clone() for name, weight in model.state_dict().items()}
    prefix = next(name for name, part in model.named_modules() if part is find_blocks(model))
    made = add_memory(model, [0, 2], MEMORY, placement)
    new = made.base.state_dict()
    for name, weight in old.items():
        block, _, rest = name.removeprefix(f"{prefix}.").partition(".mlp.")
        if block not in ("0", "2") or not rest:
            assert torch.equal(new.pop(name), weight), name
        elif placement == "parallel":
            assert torch.equal(new.pop(f"{prefix}.{block}.mlp.mlp.{rest}"), weight), name
    added = {f"{prefix}.{i}.mlp.memory.{name}" for i in (0, 2) for name in made.memory_mlps()[0].memory.state_dict()}
    assert set(new) == added
    blocks = find_blocks(made.base)
    assert [isinstance(block.mlp, MemoryMLP) for block in blocks] == [True, False, True]
    assert memories_in(made) == {f"base.{prefix}.{i}.mlp.memory": blocks[i].mlp.memory for i in (0, 2)}


@pytest.mark.parametrize("placement", ["replace", "parallel"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_model_loads_to_the_same_bits(family, placement, tmp_path) -> None:
    model = with_memories(family, placement=placement)
    loaded = reloaded(model, tmp_path)
    x = ids()
    assert type(loaded) is PkmemForCausalLM
    assert not loaded.training
    assert torch.equal(model(x).logits, loaded(x).logits)
    torch.testing.assert_close(loaded.state_dict(), model.state_dict(), rtol=0, atol=0)
    for name in ("memory", "layers", "placement", "share_values", "mlp_name"):
        assert getattr(loaded.config, name) == getattr(model.config, name)
    again = reloaded(loaded, tmp_path / "again")
    assert torch.equal(model(x).logits, again(x).logits)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_memories_have_a_say_in_the_output(family) -> None:
    model = with_memories(family)
    x = ids()
    before = model(x).logits
    for memory in memories_in(model).values():
        nn.init.zeros_(memory.values.weight)
        assert not torch.equal(before, model(x).logits)
        before = model(x).logits


@pytest.mark.parametrize("family", FAMILIES)
def test_generation_with_a_cache_is_generation_without(family) -> None:
    model = with_memories(family)
    settings = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    settings |= {"output_logits": True, "return_dict_in_generate": True}
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1]])  # prompts are padded on the left
    x = ids() * mask
    cached = model.generate(x, attention_mask=mask, use_cache=True, **settings)
    plain = model.generate(x, attention_mask=mask, use_cache=False, **settings)
    assert cached.sequences.shape == (2, 13)
    assert torch.equal(cached.sequences, plain.sequences)
    for one, other in zip(cached.logits, plain.logits, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_beside_an_mlp_a_memory_of_zeros_changes_nothing(family) -> None:
    model = decoder(family)
    x = ids()
    before = model(x).logits
    made = add_memory(model, [0, 2], MEMORY, "parallel")
    for table in tables_in(made):
        nn.init.zeros_(table.weight)
    assert torch.equal(made(x).logits, before)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_backward_pass_reaches_every_weight(family) -> None:
    model = with_memories(family, norm="layer", placement="parallel").train()
    x = ids()
    loss = model(x, labels=x).loss
    loss.backward()
    assert loss.isfinite()
    unreached = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert [name for name in unreached if "memory" in name] == []
    assert [name for name in unreached if "bias" not in name] == []  # softmax takes out a key's bias


# --- tables and embeddings that are shared ----------------------------------------------------------------


def test_a_shared_table_is_stored_once_and_shared_again(tmp_path) -> None:
    model = with_memories(share_values=True)
    loaded = reloaded(model, tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        stored = list(file.keys())
    assert [name for name in stored if "values" in name] == ["base.transformer.h.0.mlp.memory.values.weight"]
    for made in (model, loaded):
        first, second = memories_in(made).values()
        assert first.values.weight is second.values.weight
        assert not torch.equal(first.keys.sub_keys, second.keys.sub_keys)
        assert len(tables_in(made)) == 1
    x = ids()
    assert torch.equal(model(x).logits, loaded(x).logits)
    assert len(tables_in(with_memories(share_values=False))) == 2


@pytest.mark.parametrize("share_values", [False, True])
def test_parameters_are_counted_as_they_are(share_values) -> None:
    dense = decoder()
    mlp = sum(p.numel() for p in find_blocks(dense)[0].mlp.parameters())
    query, sub_keys, values = (32 * 16 + 16) + 2 * 16, 2 * 2 * 6 * 4, 36 * 32
    expected = dense.num_parameters() + 2 * (query + sub_keys - mlp) + (1 if share_values else 2) * values
    assert add_memory(dense, [0, 2], MEMORY, share_values=share_values).num_parameters() == expected


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_word_embeddings_stay_tied_or_apart(family, tied, tmp_path) -> None:
    config = decoder(family).config
    config.tie_word_embeddings = tied
    model = add_memory(AutoModelForCausalLM.from_config(config), [1], MEMORY)
    loaded = reloaded(model, tmp_path)
    for made in (model, loaded):
        assert (made.get_output_embeddings().weight is made.get_input_embeddings().weight) == tied
    x = ids()
    assert torch.equal(model.eval()(x).logits, loaded(x).logits)
    assert len(load_file(tmp_path / "model.safetensors")) == len(model.state_dict()) - tied


def test_embeddings_can_be_replaced_through_the_model() -> None:
    model = with_memories("llama")
    embeddings, head = nn.Embedding(VOCAB, 32), nn.Linear(32, VOCAB, bias=False)
    model.set_input_embeddings(embeddings)
    model.set_output_embeddings(head)
    assert model.base.get_input_embeddings() is model.get_input_embeddings() is embeddings
    assert model.base.get_output_embeddings() is model.get_output_embeddings() is head


# --- what of the model given is kept ----------------------------------------------------------------------


def test_a_model_keeps_its_mode_dtype_attention_and_generation_settings(tmp_path) -> None:
    model = AutoModelForCausalLM.from_config(decoder().config, attn_implementation="eager").to(torch.bfloat16)
    model.generation_config.max_new_tokens = 3
    made = add_memory(model.train(), [0], MEMORY)
    assert all(part.training for part in made.modules())
    assert {p.dtype for p in made.parameters()} == {torch.bfloat16}
    assert made.config._attn_implementation == made.base.config._attn_implementation == "eager"
    assert made.generate(ids(), do_sample=False, min_new_tokens=3).shape == (2, 10)
    made = add_memory(decoder(), [0], MEMORY)
    assert not any(part.training for part in made.modules())
    assert made.config.vocab_size == VOCAB


def test_half_precision_is_saved_and_loaded_as_such(tmp_path) -> None:
    model = add_memory(decoder().to(torch.bfloat16), [0, 2], MEMORY, share_values=True)
    loaded = reloaded(model, tmp_path)
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    x = ids()
    assert torch.equal(model(x).logits, loaded(x).logits)


def test_all_options_of_a_memory_are_saved(tmp_path) -> None:
    config = MemoryConfig(6, 6, 1, 2, 4, 5, "rms", 7, True, True, "flat", 0.1, 0.2)
    config = dataclasses.replace(config, dim=None)
    loaded = reloaded(add_memory(decoder(), [1], config, "parallel"), tmp_path)
    (memory,) = memories_in(loaded).values()
    assert memory.config == config.bound_to(32)


def test_the_paper_counts_layers_from_one_and_the_order_given_does_not_matter() -> None:
    model = add_memory(decoder(), (layer for layer in (2, 0)), MEMORY)
    assert [name.split(".")[3] for name in memories_in(model)] == ["0", "2"]


def test_a_family_that_calls_its_mlp_otherwise_takes_memories_by_that_name(tmp_path) -> None:
    config = AutoConfig.for_model("ctrl", vocab_size=VOCAB, n_embd=32, dff=64, n_layer=2, n_head=4, n_positions=32)
    model = add_memory(AutoModelForCausalLM.from_config(config), [1], MEMORY, mlp_name="ffn").eval()
    assert len(memories_in(model)) == 1
    x = ids()
    assert torch.equal(model(x).logits, reloaded(model, tmp_path)(x).logits)


def test_an_mlp_that_adds_the_residual_itself_is_not_replaced_silently() -> None:
    config = AutoConfig.for_model("bloom", vocab_size=VOCAB, hidden_size=32, n_layer=2, n_head=4)
    model = AutoModelForCausalLM.from_config(config).eval()
    with pytest.raises(ValueError, match=r"^BloomMLP takes hidden_states, residual, a memory .* placement='parallel'$"):
        add_memory(model, [1], MEMORY)
    x = ids()
    before = model(x).logits
    made = add_memory(model, [1], MEMORY, "parallel")
    nn.init.zeros_(tables_in(made)[0].weight)
    assert torch.equal(made(x).logits, before)


def test_an_mlp_that_returns_router_scores_too_is_not_replaced_silently() -> None:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4}
    experts = {"intermediate_size": 16, "num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt_oss", vocab_size=VOCAB, **sizes, **experts))
    x = ids()
    before = model.eval()(x).logits
    with pytest.raises(ValueError, match=r"^GptOssMLP ends with `return .*`, a memory .* use placement='parallel'$"):
        add_memory(model, [1], MEMORY)
    made = add_memory(model, [1], MEMORY, "parallel")
    assert x.shape[0] == 2  # that many sequences a block would take for output and scores
    assert not torch.equal(made(x).logits, before)
    nn.init.zeros_(tables_in(made)[0].weight)
    assert torch.equal(made(x).logits, before)


def test_an_mlp_without_source_is_replaced() -> None:
    names: dict = {"nn": nn}
    exec("class Typed(nn.Linear):\n    def forward(self, x): return super(nn.Linear, self).forward(x)", names)
    model = decoder()
    find_blocks(model)[1].mlp = names["Typed"](32, 32)
    assert len(memories_in(add_memory(model, [1], MEMORY))) == 1


# --- padding, causality, compilers ------------------------------------------------------------------------


def test_what_stands_in_the_padding_reaches_neither_batch_norm_nor_the_output() -> None:
    model = with_memories().train()
    mask = torch.tensor([[1, 1, 1, 1, 1, 0, 0], [1, 1, 1, 0, 0, 0, 0]])
    x, others = ids(), ids()
    padded = [torch.where(mask.bool(), x, filling) for filling in (torch.zeros_like(x), others)]
    twin = copy.deepcopy(model)
    first, second = (made(tokens, attention_mask=mask) for made, tokens in zip((model, twin), padded, strict=True))
    torch.testing.assert_close(first.logits[mask.bool()], second.logits[mask.bool()], rtol=1e-5, atol=1e-6)
    assert_close = torch.testing.assert_close
    assert_close(dict(model.named_buffers()), dict(twin.named_buffers()), rtol=1e-5, atol=1e-6)
    first, second = (made(tokens) for made, tokens in zip((model, twin), padded, strict=True))
    assert (first.logits - second.logits)[mask.bool()].abs().max() > 1e-3  # without the mask it would


@torch.no_grad()
def test_a_mask_may_cover_what_a_cache_holds() -> None:
    model, x = with_memories(norm="layer").train(), ids()
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1]])
    whole = model(x, attention_mask=mask).logits
    start = model(x[:, :5], attention_mask=mask[:, :5], use_cache=True)
    for rest in ({"input_ids": x[:, 5:]}, {"inputs_embeds": model.get_input_embeddings()(x[:, 5:])}):
        end = model(attention_mask=mask, past_key_values=copy.deepcopy(start.past_key_values), **rest)
        torch.testing.assert_close(end.logits, whole[:, 5:], rtol=1e-5, atol=1e-5)


def test_a_batch_without_a_mask_forgets_the_mask_before() -> None:
    model = with_memories().train()
    twin = copy.deepcopy(model)
    model(ids(), attention_mask=torch.ones(2, 7))
    twin(ids())
    for made in (model, twin):
        for memory in memories_in(made).values():
            memory.query.norm.reset_running_stats()
    x = ids(3, 5)
    assert torch.equal(model(x).logits, twin(x).logits)
    torch.testing.assert_close(dict(model.named_buffers()), dict(twin.named_buffers()), rtol=0, atol=0)


def reach(model: PreTrainedModel, length: int = 6) -> Tensor:
    """(length, length) the largest gradient of output t, row, in input embedding u, column."""
    embeddings = model.get_input_embeddings()(ids(2, length)).detach().requires_grad_()
    logits = model(inputs_embeds=embeddings).logits
    directions = torch.randn(logits.shape[-1])
    rows = [torch.autograd.grad((logits[0, t] @ directions), embeddings, retain_graph=True)[0] for t in range(length)]
    return torch.stack([gradient[0].abs().amax(-1) for gradient in rows])


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("training", [False, True])
def test_no_output_depends_on_a_later_token_but_by_batch_norm_in_training(training, norm) -> None:
    found = reach(with_memories(norm=norm).train(training))
    assert (found.tril() > 0).sum() == 21  # every output depends on all tokens up to its own
    is_causal = not (training and norm == "batch")
    assert (found.triu(1) == 0).all() == is_causal


def test_batch_norm_in_training_mixes_sequences_and_nothing_else_does() -> None:
    for norm in NORMS:
        model = with_memories(norm=norm).train()
        embeddings = model.get_input_embeddings()(ids()).detach().requires_grad_()
        (gradient,) = torch.autograd.grad(model(inputs_embeds=embeddings).logits[0].square().sum(), embeddings)
        assert bool(gradient[1].any()) == (norm == "batch")


def test_a_model_compiled_whole_gives_the_same_logits() -> None:
    model = with_memories("llama")
    x = ids()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x, use_cache=False).logits, model(x).logits, rtol=1e-5, atol=1e-6)


def test_gradient_checkpointing_gives_the_same_gradients() -> None:
    plain = with_memories(norm="layer").train()
    saving = copy.deepcopy(plain)
    saving.gradient_checkpointing_enable({"use_reentrant": False})
    x = ids()
    optimizers = RowAdam(plain), RowAdam(saving)
    for model in (plain, saving):
        with MemoryUsage(next(iter(memories_in(model).values()))) as usage:
            model(x, labels=x, use_cache=False).loss.backward()
        assert usage.num_reads.sum() == x.numel() * 2 * 3  # a recomputed pass is not a second one
        assert [len(table.log.entries) for table in tables_in(model)] == [1, 1]
    assert optimizers[0].grad_norm() == pytest.approx(optimizers[1].grad_norm(), rel=1e-5)
    for (name, one), (_, other) in zip(plain.named_parameters(), saving.named_parameters(), strict=True):
        if "values" not in name:
            torch.testing.assert_close(one.grad, other.grad, rtol=1e-5, atol=1e-7, msg=name)


# --- what is refused --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layers", "options", "message"),
    [
        ([3], {}, "layer 3 is outside [0, 3): layers are integers counted from 0"),
        (["1"], {}, "layer '1' is outside [0, 3): layers are integers counted from 0"),
        ([-1], {}, "layer -1 is outside [0, 3): layers are integers counted from 0"),
        ([1, 0, 1], {}, "layer 1 is named twice in layers=[1, 0, 1]"),
        ([], {}, "layers is empty: name at least one block, counted from 0"),
        ([0], {"config": MemoryConfig(dim=16)}, "the memory has dim=16 but the model is 32 wide: leave dim out"),
        (
            [0],
            {"config": MemoryConfig(value_dim=16)},
            "value_dim is 16 but the block needs the model's width 32: leave value_dim out, or set gate=True",
        ),
        (
            [0],
            {"mlp_name": "feed_forward"},
            "GPT2LMHeadModel has no block with an MLP called 'feed_forward': "
            "its blocks have ln_1, attn, ln_2, mlp; name the MLP with mlp_name=...",
        ),
        ([0], {"placement": "beside"}, "placement is 'beside' but must be 'replace' or 'parallel'"),
    ],
)
def test_what_does_not_fit_is_said_in_one_line_and_the_model_is_left_alone(layers, options, message) -> None:
    model = decoder()
    before = [name for name, _ in model.named_modules()]
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        add_memory(model, layers, **options)
    assert [name for name, _ in model.named_modules()] == before


def test_a_second_add_memory_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^the model has memories already: name all layers in one add_memory call$"):
        add_memory(with_memories(), [1], MEMORY)


def test_a_decoder_without_mlps_is_refused_with_what_its_blocks_have() -> None:
    sizes = {"hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 32, "num_hidden_layers": 2}
    model = OPTForCausalLM(OPTConfig(vocab_size=VOCAB, num_attention_heads=4, **sizes))
    with pytest.raises(
        ValueError, match=r"OPTForCausalLM has no block with an MLP called 'mlp': its blocks.*fc1"
    ) as it:
        add_memory(model, [0], MEMORY)
    assert "\n" not in str(it.value)


def test_a_checkpoint_with_missing_weights_is_refused(tmp_path) -> None:
    with_memories().save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    lost = "base.transformer.h.2.mlp.memory.values.weight"
    del weights[lost]
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=f"the checkpoint lacks 1 weights, {lost} among them") as error:
        AutoModelForCausalLM.from_pretrained(tmp_path)
    assert "\n" not in str(error.value)


def test_loading_can_tell_what_it_loaded(tmp_path) -> None:
    with_memories().save_pretrained(tmp_path)
    model, info = PkmemForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert isinstance(model, PkmemForCausalLM)
    assert not info["missing_keys"]


@pytest.mark.parametrize("options", [{}, {"use_safetensors": False}])
def test_a_pickle_is_never_loaded(options, tmp_path) -> None:
    model = with_memories()
    model.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(OSError, match=r"model\.safetensors") as error:
        AutoModelForCausalLM.from_pretrained(tmp_path, **options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("family", "hint"), [("lama", "did you mean 'llama'"), ("gtp2", "did you mean 'gpt2'"), ("pkmem", "gpt_neox$")]
)
def test_an_unknown_family_is_named_with_the_nearest(family, hint) -> None:
    with pytest.raises(ValueError, match=f"model.family is '{family}' but must be a decoder family.*{hint}") as error:
        decoder(family)
    assert "\n" not in str(error.value)


# --- building ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", [*FAMILIES, "falcon"])
def test_a_model_is_built_as_its_recipe_says(family) -> None:
    recipe = dataclasses.replace(MODEL, family=family, memory_layers=[1], placement="parallel", dropout=0.1)
    model = build_model(recipe, MEMORY, VOCAB, eos_token_id=5)
    config = model.config.get_text_config()
    sizes = (config.num_hidden_layers, config.hidden_size, config.num_attention_heads, config.vocab_size)
    assert sizes == (3, 32, 4, VOCAB)
    assert (config.max_position_embeddings, config.eos_token_id, model.generation_config.pad_token_id) == (32, 5, 5)
    assert (config.attn_pdrop if family == "gpt2" else config.attention_dropout) == 0.1
    assert [mlp.mlp is not None for mlp in model.memory_mlps()] == [True]
    assert next(iter(memories_in(model).values())).config == MEMORY.bound_to(32)


@pytest.mark.case("Gradual surprises", "the end-of-text token as padding, as most recipes have it, in a family whose embedding "
    "keeps the padding token's row at zero (Llama)", "works: a model built here pads in `generate` alone, so the row is drawn and trains",
    "https://github.com/h2oai/h2o-llmstudio/pull/298")  # fmt: skip
@pytest.mark.parametrize("family", FAMILIES)
def test_the_end_of_text_token_trains_though_it_pads(family, tmp_path) -> None:
    model = build_model(dataclasses.replace(MODEL, family=family, memory_layers=[1]), MEMORY, VOCAB, eos_token_id=0)
    model.save_pretrained(tmp_path)
    tokens = torch.tensor([[0, 3, 4], [5, 0, 6]])
    for held in (model, AutoModelForCausalLM.from_pretrained(tmp_path)):
        embedding = held.get_input_embeddings()
        assert embedding.weight[0].abs().sum() > 0
        embedding(tokens).sum().backward()
        assert embedding.weight.grad[0].abs().sum() > 0


@pytest.mark.parametrize("family", [*FAMILIES, "opt"])
def test_mlps_are_as_wide_as_asked(family) -> None:
    def width(ffn_width) -> int:
        model = build_model(dataclasses.replace(MODEL, family=family, ffn_width=ffn_width), MEMORY, VOCAB, 5)
        return max(max(w.shape) for name, w in model.named_parameters() if "mlp" in name or "fc1" in name)

    assert [width(None), width(48)] == [4 * MODEL.width, 48]


def test_a_model_without_memory_layers_is_the_plain_decoder() -> None:
    assert type(decoder("llama")).__name__ == "LlamaForCausalLM"


# --- Hugging Face's Trainer -------------------------------------------------------------------------------


def trained(
    model: PreTrainedModel, folder: Path, optimizer=None, steps: int = 3, resume: Path | None = None, **options
) -> Trainer:
    """The model after some steps of the unmodified Trainer on the CPU."""
    torch.manual_seed(0)
    data = [{"input_ids": tokens, "labels": tokens} for tokens in ids(8, 9)]
    settings = {"report_to": [], "save_strategy": "no", "disable_tqdm": True, "logging_steps": 1, "use_cpu": True}
    arguments = TrainingArguments(folder, max_steps=steps, per_device_train_batch_size=2, **settings | options)
    trainer = Trainer(model, arguments, train_dataset=data, optimizers=(optimizer, None))
    trainer.train(resume_from_checkpoint=resume and str(resume))
    return trainer


def losses(trainer: Trainer) -> list[float]:
    return [record["loss"] for record in trainer.state.log_history if "loss" in record]


def union_for(model: nn.Module, lr: float = 1e-2) -> CombinedOptimizer:
    return CombinedOptimizer(torch.optim.AdamW(dense_parameters(model), lr=lr), RowAdam(model, lr=lr))


def test_the_trainer_trains_rows(tmp_path) -> None:
    model = with_memories(share_values=True)
    (table,) = tables_in(model)
    before = copy.deepcopy(model.state_dict())
    usages = [MemoryUsage(memory) for memory in memories_in(model).values()]
    trainer = trained(model, tmp_path, union_for(model), gradient_accumulation_steps=2)
    was_read = sum(usage.num_reads for usage in usages) > 0
    changed = (table.weight != before["base.transformer.h.0.mlp.memory.values.weight"]).any(1)
    assert torch.equal(changed, was_read)
    assert was_read.any()
    assert table.log.entries == []
    assert table.weight.grad is None
    unchanged = [name for name, p in model.named_parameters() if torch.equal(p, before[name])]
    assert [name for name in unchanged if "bias" not in name] == []
    assert len(losses(trainer)) == 3
    assert trainer.lr_scheduler.get_last_lr() == [0, 0]  # the Trainer's own schedule, over both parts


def test_a_trainers_step_over_rows_is_its_step_over_a_dense_table(tmp_path) -> None:
    rows = with_memories(share_values=True).double()
    dense = copy.deepcopy(rows)
    tables = [table.weight for table in tables_in(dense)]
    adam = torch.optim.Adam(tables, lr=1e-2, betas=(0.9, 0.98))
    pairs = (
        (rows, union_for(rows)),
        (dense, CombinedOptimizer(torch.optim.AdamW(dense_parameters(dense), 1e-2), adam)),
    )
    for model, optimizer in pairs:
        trained(model, tmp_path, optimizer, steps=1, gradient_accumulation_steps=2, max_grad_norm=0)
    torch.testing.assert_close(rows.state_dict(), dense.state_dict(), rtol=1e-7, atol=1e-9)


def test_the_trainers_default_optimizer_trains_a_dense_table(tmp_path) -> None:
    model = with_memories(share_values=True)
    before = tables_in(model)[0].weight.clone()
    trainer = trained(model, tmp_path, learning_rate=1e-2)
    assert len(losses(trainer)) == 3
    assert losses(trainer)[-1] < losses(trainer)[0]
    assert (tables_in(model)[0].weight != before).any()


def test_the_trainers_checkpoint_resumes_rows_bitwise(tmp_path) -> None:
    start = with_memories(share_values=True)
    options = {"save_strategy": "steps", "save_steps": 2, "steps": 4}
    whole = copy.deepcopy(start)
    trained(whole, tmp_path, union_for(whole), **options)
    resumed = copy.deepcopy(start)
    trainer = trained(resumed, tmp_path, union_for(resumed), resume=tmp_path / "checkpoint-2", **options)
    assert len(losses(trainer)) == 4  # the first two from the checkpoint's log
    assert not torch.equal(tables_in(start)[0].weight, tables_in(resumed)[0].weight)
    torch.testing.assert_close(resumed.state_dict(), whole.state_dict(), rtol=0, atol=0)


# --- what transformers' guide does with a model -----------------------------------------------------------


@pytest.mark.case(
    KIND,
    "`resize_token_embeddings`, then loss, generation, save and reload",
    "works",
    "https://github.com/huggingface/transformers/issues/36590",
)
@pytest.mark.parametrize("loaded", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_embeddings_are_resized_and_stay_so(family, loaded, tmp_path) -> None:
    model = with_memories(family)
    model = reloaded(model, tmp_path / "old") if loaded else model
    x = ids()
    before = model(x).logits
    model.resize_token_embeddings(VOCAB + 6, mean_resizing=False)
    assert model.config.vocab_size == model.base.config.vocab_size == VOCAB + 6
    torch.testing.assert_close(model(x).logits[..., :VOCAB], before, rtol=1e-5, atol=1e-6)
    new = torch.tensor([[VOCAB + 3, 4, 5, VOCAB + 5]])
    chances = model(new).logits[:, :-1].log_softmax(-1)
    expected = -chances.gather(-1, new[:, 1:, None]).mean()
    torch.testing.assert_close(model(new, labels=new).loss, expected, rtol=1e-5, atol=1e-6)
    assert model.generate(new, max_new_tokens=2, do_sample=False, pad_token_id=0).shape[1] > 4
    again = reloaded(model, tmp_path / "new")
    assert again.config.vocab_size == VOCAB + 6
    assert torch.equal(again(new).logits, model(new).logits)
    tied = decoder(family).config.tie_word_embeddings
    assert (again.get_output_embeddings().weight is again.get_input_embeddings().weight) == tied


@pytest.mark.case(KIND, "A text-generation pipeline, from a folder, with a batch of texts", "works", "")
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_pipeline_writes_text(family, tmp_path) -> None:
    words = {f"w{number}": number for number in range(VOCAB)}
    backend = Tokenizer(WordLevel(words, unk_token="w1"))
    backend.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="w0", padding_side="left")
    model = with_memories(family)
    model.generation_config.eos_token_id = None
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path)
    writer = pipeline("text-generation", model=str(tmp_path), tokenizer=str(tmp_path), device="cpu")
    assert isinstance(writer.model, PkmemForCausalLM)
    prompts = ["w5 w6 w7", "w9 w8 w7 w6 w5"]
    written = writer(prompts, batch_size=2, max_new_tokens=4, do_sample=False, return_full_text=False)
    for prompt, found in zip(prompts, written, strict=True):
        tokens = torch.tensor([[words[word] for word in prompt.split()]])
        expected = model.generate(tokens, max_new_tokens=4, do_sample=False, pad_token_id=0)[
            0, tokens.shape[1] :
        ].tolist()
        assert [words[word] for word in found[0]["generated_text"].split()] == [t for t in expected if t]


@pytest.mark.case(
    KIND,
    "Hidden states, attentions, another attention (`set_attn_implementation`), the decoder (`get_decoder`)",
    "works: as from the decoder",
    "",
)
@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_asked_of_a_decoder_is_answered_by_it(family) -> None:
    model, x = with_memories(family), ids()
    model.set_attn_implementation("eager")
    found = model(x, output_hidden_states=True, output_attentions=True, use_cache=False)
    assert len(found.hidden_states) == 4
    assert [tuple(attention.shape) for attention in found.attentions] == [(2, 4, 7, 7)] * 3
    decoded = model.get_decoder()(x).last_hidden_state
    assert decoded is not model
    torch.testing.assert_close(decoded, found.hidden_states[-1], rtol=1e-5, atol=1e-5)
    assert model.base.config._attn_implementation == "eager"
    assert model._no_split_modules == set(model.base._no_split_modules)


@pytest.mark.case(KIND, "Copy or pickle a model, or make a fresh one from its config", "works", "")
def test_a_model_is_copied_pickled_and_made_anew(tmp_path) -> None:
    model, x = with_memories("llama", share_values=True), ids()
    for made in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(made(x).logits, model(x).logits)
        assert len(tables_in(made)) == 1
    model.save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    assert json.loads(config.to_json_string())["memory"] == model.config.memory
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(config)
    assert empty.device.type == "meta"
    assert empty.num_parameters() == model.num_parameters()
    fresh = AutoModelForCausalLM.from_config(config)
    assert [name for name, _ in fresh.named_parameters()] == [name for name, _ in model.named_parameters()]
    assert not torch.equal(fresh(x).logits, model(x).logits)


@pytest.mark.case(
    KIND,
    "`add_memory` on a model that sees pictures, too (`AutoModelForCausalLM` gives such a class for some families)",
    "works: the memories are in its language model",
    "",
)
def test_a_model_that_sees_pictures_is_saved_whole(tmp_path) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    text = sizes | {"vocab_size": VOCAB, "num_key_value_heads": 4, "head_dim": 8, "max_position_embeddings": 64}
    vision = sizes | {"num_hidden_layers": 3, "image_size": 28, "patch_size": 14}
    special = {"image_token_index": 5, "boi_token_index": 6, "eoi_token_index": 7, "mm_tokens_per_image": 4}
    config = AutoConfig.for_model("gemma3", text_config=text, vision_config=vision, **special)
    model = add_memory(AutoModelForCausalLM.from_config(config), [0, 1], MEMORY).eval()
    nn.init.normal_(model.get_parameter("base.model.multi_modal_projector.mm_input_projection_weight"))  # was zero
    assert all("language_model" in name for name in memories_in(model))
    assert model.config.vocab_size == VOCAB
    x = torch.tensor([[1, 5, 5, 5, 5, 2]])
    inputs = {"input_ids": x, "pixel_values": torch.randn(1, 3, 28, 28), "token_type_ids": (x == 5).long()}
    loaded = reloaded(model, tmp_path)
    assert type(loaded.base) is type(model.base)
    torch.testing.assert_close(loaded(**inputs).logits, model(**inputs).logits, rtol=1e-5, atol=1e-6)
    other = {**inputs, "pixel_values": -inputs["pixel_values"]}
    assert not torch.equal(loaded(**other).logits, loaded(**inputs).logits)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_memory_of_zeros_leaves_logits_and_text_as_they_are(family, tmp_path):
    model, tokens = decoder(family), ids()
    logits = model(tokens).logits
    text = model.generate(tokens, max_new_tokens=3, do_sample=False, pad_token_id=0)
    model = add_memory(model, [0, 2], MEMORY, placement="parallel", values="zero")
    for held in (model, reloaded(model, tmp_path)):
        assert torch.equal(held(tokens).logits, logits)
        assert torch.equal(held.generate(tokens, max_new_tokens=3, do_sample=False, pad_token_id=0), text)
    first = next(iter(memories_in(model).values()))
    first.reset_parameters()
    assert not first.values.weight.any()
    assert first.keys.sub_keys.any()


def test_values_start_normal_or_at_zero():
    with pytest.raises(ValueError, match="values is 'zeros' but must be 'normal' or 'zero'"):
        add_memory(decoder(), [0], MEMORY, values="zeros")
