"""A fresh decoder of any Hugging Face family, with memories where its config says."""

from __future__ import annotations

import difflib

from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from pkmem.layer.config import MemoryConfig
from pkmem.lm.config import ModelConfig
from pkmem.lm.huggingface import PkmemConfig, add_memory


def build_model(model: ModelConfig, memory: MemoryConfig, vocab_size: int, eos_token_id: int) -> PreTrainedModel:
    """A decoder with fresh weights, and its memories if the config names blocks for them.

    Args:
        model: the decoder and where its memories are.
        memory: the memories' shape and options.
        vocab_size: of the tokenizer.
        eos_token_id: the token that begins, ends and pads texts.

    Raises:
        ValueError: the family is unknown, or its config or a memory does not fit.
    """
    if model.family not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or model.family == PkmemConfig.model_type:
        near = difflib.get_close_matches(model.family, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(
            f"model.family is {model.family!r} but must be a decoder family of Hugging Face, "
            f"such as gpt2, llama, qwen3, mistral, gemma2 or gpt_neox{hint}"
        )
    ffn_width = model.ffn_width or 4 * model.width
    sizes = {
        "vocab_size": vocab_size,
        "hidden_size": model.width,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_heads,
        "num_key_value_heads": model.num_heads,
        "head_dim": model.width // model.num_heads,
        **dict.fromkeys(("intermediate_size", "n_inner", "ffn_dim"), ffn_width),
        "max_position_embeddings": model.context_tokens,
        **dict.fromkeys(("attention_dropout", "attn_pdrop", "embd_pdrop", "resid_pdrop"), model.dropout),
        **dict.fromkeys(("bos_token_id", "eos_token_id"), eos_token_id),
        "pad_token_id": None,  # of what the config pads with, nn.Embedding keeps the row at zero, untrained
    }
    known = AutoConfig.for_model(model.family)
    given = {name for name in sizes if hasattr(known, name) and not isinstance(getattr(type(known), name, 0), property)}
    config = AutoConfig.for_model(model.family, **{name: sizes[name] for name in sizes if name in given})
    decoder = AutoModelForCausalLM.from_config(config)
    decoder.generation_config.pad_token_id = eos_token_id
    decoder.loss_type = "ForCausalLM"  # GPT-2's class name hides it from transformers, which then warns
    if not model.memory_layers:
        return decoder
    return add_memory(decoder, model.memory_layers, memory, model.placement, share_values=model.share_values)
