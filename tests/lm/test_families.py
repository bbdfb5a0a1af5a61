"""Every family of transformers' causal language models whose blocks have an MLP, as tiny as its config lets it be."""

import inspect
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from decoders import MEMORY, VOCAB
from pkmem import MemoryConfig, add_memory
from pkmem.layer.memory import memories_in
from pkmem.lm.placement import find_blocks

SIZES = {
    "vocab_size": VOCAB,
    **dict.fromkeys(("hidden_size", "n_embd", "intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size"), 32),
    **dict.fromkeys(("num_hidden_layers", "num_layers", "n_layer", "n_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "num_key_value_heads", "num_kv_heads", "n_head", "n_heads"), 4),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    **dict.fromkeys(("head_dim", "rotary_dim", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim"), 8),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "q_lora_rank", "kv_lora_rank"), 16),
    **dict.fromkeys(("max_position_embeddings", "n_positions"), 64),
    **dict.fromkeys(("n_group", "topk_group", "first_k_dense_replace"), 1),
    **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id", "num_nextn_predict_layers"), 0),
    **dict.fromkeys(("vocab_size_per_layer_input",), VOCAB),
    **dict.fromkeys(("hidden_size_per_layer_input",), 8),
    **dict.fromkeys(("num_kv_shared_layers",), 0),
    "num_experts_per_tok": 2,
    "sliding_window": 16,
}
LARGEST = 2_000_000  # weights: beyond that the sizes above are not those of the family


def tiny(family: str) -> PreTrainedModel | None:
    """A decoder with blocks for memories; None where there are none, or its config wants other sizes."""
    try:
        known = AutoConfig.for_model(family)
        sizes = {name: size for name, size in SIZES.items() if hasattr(known, name)}
        sizes = {name: size for name, size in sizes.items() if not isinstance(getattr(type(known), name, 0), property)}
        config = AutoConfig.for_model(family, **sizes)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        find_blocks(model)
    except Exception:  # any of a config's own checks
        return None
    small = sum(weight.numel() for weight in model.parameters()) < LARGEST
    return AutoModelForCausalLM.from_config(config).eval() if small else None


@torch.no_grad()
def failures(model: PreTrainedModel, folder: Path) -> dict[str, str]:
    """What does not go as it should, and why."""
    x = torch.tensor([[5, 9, 3, 17, 4, 8, 2]])
    settings = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0, "eos_token_id": VOCAB + 1}

    def generates() -> bool:
        tokens = x
        for _ in range(3):
            tokens = torch.cat([tokens, model(tokens, use_cache=False).logits[:, -1:].argmax(-1)], 1)
        return torch.equal(model.generate(x, **settings), tokens)

    def is_helped_by_lookup() -> bool:
        return torch.equal(model.generate(x, prompt_lookup_num_tokens=2, **settings), model.generate(x, **settings))

    def starts_with_embeddings() -> bool:
        embeddings = model.get_input_embeddings()(x)
        return torch.equal(model.generate(inputs_embeds=embeddings, **settings), model.generate(x, **settings)[:, 7:])

    def comes_back() -> bool:
        model.save_pretrained(folder)
        loaded = AutoModelForCausalLM.from_pretrained(folder)
        state = loaded.state_dict()
        shutil.rmtree(folder)
        return all(torch.equal(state[name], weight) for name, weight in model.state_dict().items())

    def grows() -> bool:
        model.resize_token_embeddings(VOCAB + 6, mean_resizing=False)
        new = torch.tensor([[VOCAB + 3, 4, VOCAB + 5]])
        return bool(model(new, labels=new).loss.isfinite()) and comes_back()

    found = {}
    checks: tuple[Callable[[], bool], ...] = (
        generates,
        is_helped_by_lookup,
        starts_with_embeddings,
        comes_back,
        grows,
    )
    for check in checks:
        try:
            if not check():
                found[check.__name__] = "another result"
        except Exception as error:
            found[check.__name__] = f"{type(error).__name__}: {error}"[:200]
    return found


@pytest.mark.slow
@pytest.mark.case(
    "Hugging Face protocol",
    "Generate, save, reload and resize a model of every family whose blocks have an MLP (about a hundred)",
    "works: what the decoder itself can do",
    "",
)
def test_every_family_does_with_memories_what_it_does_without(tmp_path) -> None:
    tried, broken = [], {}
    for family in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        torch.manual_seed(0)
        model = None if family == "pkmem" else tiny(family)
        if model is None:
            continue
        tried.append(family)
        memory = MemoryConfig(**{**MEMORY.to_dict(), "query_norm": "layer"})
        made = add_memory(model, [0, 1], memory, "parallel")
        assert len(memories_in(made)) == 2
        assert inspect.signature(made.forward) == inspect.signature(made.base.forward)
        failed = failures(made, tmp_path / family)
        if failed:
            torch.manual_seed(0)
            alone = failures(tiny(family), tmp_path / family)
            broken |= {f"{family}: {name}": why for name, why in failed.items() if name not in alone}
    assert broken == {}
    assert len(tried) > 40
