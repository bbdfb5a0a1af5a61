"""A product-key memory in any Hugging Face decoder: built, saved and loaded the Hugging Face way.

Where a memory goes, for every family alike: the blocks are the model's one `nn.ModuleList` with
`num_hidden_layers` entries that each have an MLP; in a block, the attribute `mlp_name` ("mlp" in GPT-2,
Llama, Qwen, Mistral, Gemma and GPT-NeoX) is replaced by the memory, or the memory is added beside it.

tests/test_private_names.py lists the private names of transformers used here and in training/trainer.py.
"""

from __future__ import annotations

import ast
import inspect
import os
import shutil
import textwrap
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
)

from pkmem.layer.config import MemoryConfig, is_integer, plain_number
from pkmem.layer.memory import ProductKeyMemory, memories_in
from pkmem.layer.room import num_weights, require_room
from pkmem.lm.padding import keep_mask_with, keeping_mask, mask_of_pass, real_tokens, under_mask
from pkmem.lm.signature import decoder_signature

Placement = Literal["replace", "parallel"]
_OF_THE_DECODER = ("main_input_name", "input_modalities", "accepts_loss_kwargs", "_is_stateful")


class PkmemConfig(PreTrainedConfig):
    """A decoder's config and where its memories are.

    Args:
        text_config: the decoder's own config.
        memory: the fields of a `MemoryConfig`.
        layers: blocks with a memory, counted from 0.
        placement: "replace" the MLP, or "parallel" to it.
        share_values: one value table for all memories.
        mlp_name: the MLP's attribute in a block.
    """

    model_type = "pkmem"
    sub_configs: ClassVar = {"text_config": AutoConfig}

    text_config: dict | PreTrainedConfig | None = None
    memory: dict | None = None
    layers: list[int] | None = None
    placement: str = "replace"
    share_values: bool = False
    mlp_name: str = "mlp"
    tie_word_embeddings: bool = True  # of ours, shared tables: the decoder ties its embeddings by its own config

    def __post_init__(self, **kwargs: Any) -> None:
        if not isinstance(self.text_config, PreTrainedConfig):
            self.text_config = AutoConfig.for_model(**{"model_type": "gpt2", **(self.text_config or {})})
        self.tie_word_embeddings = True  # PEFT says no when it merges, of a decoder that ties none
        super().__post_init__(**kwargs)

    def get_text_config(self, *args: Any, **kwargs: Any) -> PreTrainedConfig:
        """The config of the language model: the decoder's own, or a part of it where that sees pictures, too."""
        config: PreTrainedConfig = super().get_text_config(*args, **kwargs)
        return config if config is self else config.get_text_config(*args, **kwargs)

    @property
    def vocab_size(self) -> int:
        """The decoder's."""
        size: int = self.get_text_config().vocab_size
        return size

    def save_pretrained(self, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> None:
        """Saves the config, and beside it the file that `trust_remote_code=True` runs."""
        stub = Path(__file__).with_name("modeling_pkmem.py")
        names = {"AutoConfig": PkmemConfig.__name__, "AutoModelForCausalLM": PkmemForCausalLM.__name__}
        self.auto_map = {auto: f"{stub.stem}.{name}" for auto, name in names.items()}
        super().save_pretrained(save_directory, *args, **kwargs)
        shutil.copyfile(stub, Path(save_directory) / stub.name)

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = "AutoConfig") -> None:
        """Does nothing: what is saved names its code already, and transformers would save a copy of this file."""


class MemoryMLP(nn.Module):
    """Stands where a block had its MLP: the memory alone, or the MLP's output plus the memory's."""

    def __init__(self, memory: ProductKeyMemory, mlp: nn.Module | None = None) -> None:
        super().__init__()
        self.memory = memory
        self.mlp = mlp

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """(..., d) -> (..., d), and beside an MLP that returns more, such as router scores, those too."""
        mask = mask_of_pass()
        if mask is not None:
            mask = mask.to(hidden_states.device)  # another one's, where a model is spread over several
            mask = mask.flatten() if hidden_states.dim() == 2 else mask
        out: Tensor = self.memory(hidden_states, mask)
        if self.mlp is None:
            return out
        mlps = self.mlp(hidden_states, *args, **kwargs)
        return (out + mlps[0], *mlps[1:]) if isinstance(mlps, tuple) else out + mlps


class PkmemForCausalLM(PreTrainedModel, GenerationMixin):
    """A Hugging Face decoder with product-key memories; made by `add_memory` or loaded.

    Args:
        config: the decoder's config and where its memories are.
        base: the decoder to edit; None builds it anew from `config.text_config`.

    Attributes:
        base: the decoder, a Hugging Face model of its own family.
    """

    config_class = PkmemConfig
    base_model_prefix = "base"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True

    def __init__(self, config: PkmemConfig, base: PreTrainedModel | None = None) -> None:
        super().__init__(config)
        self.base = AutoModelForCausalLM.from_config(config.text_config) if base is None else base
        config.text_config = self.base.config  # one config: what changes the decoder's is saved
        for name in _OF_THE_DECODER:
            if hasattr(self.base, name):
                setattr(self, name, getattr(self.base, name))
        self._tied_weights_keys = _insert_memories(self.base, config)
        self._keep_in_fp32_modules = [f"base.{name}" for name in memories_in(self.base)]  # what quantisers leave alone
        self.post_init()

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """Loads what `save_pretrained` wrote; reads safetensors only, and no incomplete file.

        Raises:
            ValueError: weights are missing from the file.
        """
        wants_info = kwargs.pop("output_loading_info", False)
        kwargs["use_safetensors"] = True
        model, info = super().from_pretrained(*args, **kwargs, output_loading_info=True)
        if info["missing_keys"]:
            missing = sorted(info["missing_keys"])
            raise ValueError(
                f"the checkpoint lacks {len(missing)} weights, {missing[0]} among them: "
                "it is broken or of another model; save it again with save_pretrained"
            )
        return (model, info) if wants_info else model

    def _get_dtype_plan(self, dtype: torch.dtype) -> dict[str, torch.dtype]:
        """Which modules stay in fp32 when loaded in half precision: the decoder's, not the memories."""
        plan = super()._get_dtype_plan(dtype)
        return {name: kept for name, kept in plan.items() if name not in memories_in(self)}

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = "AutoModel") -> None:
        """Does nothing, see `PkmemConfig.register_for_auto_class`."""

    @decoder_signature
    def forward(
        self,
        input_ids: Tensor | None = None,
        *,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """What the decoder's forward takes and returns."""
        if self.training:
            self._require_one_shared_table()
        tokens = kwargs.get("inputs_embeds") if input_ids is None else input_ids
        mask = None if tokens is None else real_tokens(attention_mask, tokens.shape[1])
        with under_mask(mask):
            outputs = self.base(input_ids=input_ids, attention_mask=attention_mask, labels=labels, **kwargs)
            keep_mask_with(outputs)
        return outputs

    def _set_gradient_checkpointing(
        self, enable: bool = True, gradient_checkpointing_func: Callable[..., Any] = checkpoint, **options: Any
    ) -> None:
        super()._set_gradient_checkpointing(enable, keeping_mask(gradient_checkpointing_func), **options)

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """As in transformers; weights keep the names that they have here, which no rule of the decoder's renames.

        Raises:
            ValueError: memories that share a table by the config hold several.
        """
        self._require_one_shared_table()
        super().save_pretrained(*args, **{"save_original_format": False} | kwargs)

    def _require_one_shared_table(self) -> None:
        if not self.config.share_values:
            return
        num_tables = len({id(memory.values) for memory in memories_in(self.base).values()})
        if num_tables > 1:
            raise ValueError(
                f"share_values is set but the memories hold {num_tables} tables, as after modules_to_save or "
                "target_parameters of PEFT, which see each memory alone: instead let gradients reach the one table, "
                "`values.weight.requires_grad_()` after get_peft_model, or build the model with share_values=False"
            )

    def memory_mlps(self) -> list[MemoryMLP]:
        """The modules that hold a memory, by block."""
        return [module for module in self.base.modules() if isinstance(module, MemoryMLP)]

    @decoder_signature
    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """The decoder's own."""
        inputs: dict[str, Any] = self.base.prepare_inputs_for_generation(*args, **kwargs)
        return inputs

    def _supports_default_dynamic_cache(self) -> bool:
        """Whether the decoder, which transformers knows by its name, takes the usual cache."""
        takes: bool = self.base._supports_default_dynamic_cache()
        return takes

    def get_input_embeddings(self) -> nn.Module:
        """The decoder's own."""
        return self.base.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Sets the decoder's own."""
        self.base.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module | None:
        """The decoder's own."""
        return self.base.get_output_embeddings()

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Sets the decoder's own."""
        self.base.set_output_embeddings(new_embeddings)

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> nn.Module:
        """Resizes the decoder's own; some decoders keep the size of the vocabulary beside their config."""
        return self.base.resize_token_embeddings(*args, **kwargs)


def add_memory(
    model: PreTrainedModel,
    layers: Iterable[int],
    config: MemoryConfig | None = None,
    placement: Placement = "replace",
    *,
    share_values: bool = False,
    mlp_name: str = "mlp",
) -> PkmemForCausalLM:
    """Puts product-key memories into a Hugging Face decoder (Lample et al. 2019, section 3.3).

    The model given is edited, and its replaced MLPs are gone; use the one returned, which saves, loads,
    generates and trains like any other.

    Args:
        model: a causal language model with an MLP per block.
        layers: blocks that get a memory, counted from 0 (the paper counts from 1).
        config: the memories' shape and options; the width is the model's.
        placement: "replace" the MLP as in the paper, or "parallel" beside it.
        share_values: let all memories read one value table, as in Memory+.
        mlp_name: the name of the MLP in a block, for families that do not call it "mlp".

    Raises:
        ValueError: a layer is out of range or named twice, the width or the model does not fit, no block with
            such an MLP is found, or the MLP to replace takes or returns more than hidden states.
    """
    if isinstance(model, PkmemForCausalLM):
        raise ValueError("the model has memories already: name all layers in one add_memory call")
    text_config = model.config.get_text_config(decoder=True)
    config = (config or MemoryConfig()).bound_to(text_config.hidden_size)
    wrapped = PkmemConfig(
        text_config=model.config,
        memory=config.to_dict(),
        layers=list(map(plain_number, layers)),
        placement=placement,
        share_values=share_values,
        mlp_name=mlp_name,
        dtype=text_config.dtype,
        attn_implementation=model.config._attn_implementation,  # or the decoder would lose its own, as the next
        experts_implementation={"text_config": getattr(text_config, "_experts_implementation", None)},
    )
    made = PkmemForCausalLM(wrapped, base=model)
    if getattr(model, "generation_config", None) is not None:
        made.generation_config = model.generation_config
    return made.train(model.training)


def find_blocks(model: PreTrainedModel, mlp_name: str = "mlp") -> nn.ModuleList:
    """The decoder's blocks: its one list of `num_hidden_layers` modules that each have an MLP.

    Raises:
        ValueError: there is none; the message names what the blocks do have.
    """
    num_layers = getattr(model.config.get_text_config(decoder=True), "num_hidden_layers", None)
    lists = [part for part in model.modules() if isinstance(part, nn.ModuleList) and len(part) == num_layers]
    for blocks in lists:
        if all(isinstance(getattr(block, mlp_name, None), nn.Module) for block in blocks):
            return blocks
    children = [name for name, _ in lists[0][0].named_children()] if lists and num_layers else []
    raise ValueError(
        f"{type(model).__name__} has no block with an MLP called {mlp_name!r}"
        + (f": its blocks have {', '.join(children)}; name the MLP with mlp_name=..." if children else "")
    )


def context_tokens(model: PreTrainedModel) -> int:
    """The longest context a model takes, by its config; 1024 where that names none."""
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return longest or 1024


def _insert_memories(model: PreTrainedModel, config: PkmemConfig) -> dict[str, str]:
    """Edits the decoder; returns the tied weights (name -> name it repeats) of shared tables."""
    if config.placement not in ("replace", "parallel"):
        raise ValueError(f"placement is {config.placement!r} but must be 'replace' or 'parallel'")
    blocks = find_blocks(model, config.mlp_name)
    layers = _checked_layers(config.layers or [], len(blocks))
    memory_config = MemoryConfig.from_dict(config.memory or {})
    if memory_config.output_dim != memory_config.bound_dim:
        raise ValueError(
            f"value_dim is {memory_config.value_dim} but the block needs the model's width "
            f"{memory_config.bound_dim}: leave value_dim out, or set gate=True"
        )
    if config.placement == "replace":
        for layer in layers:
            _require_replaceable(getattr(blocks[layer], config.mlp_name))
    _require_room_for_memories(blocks, layers, memory_config, config)
    shared = None
    for layer in layers:
        old = getattr(blocks[layer], config.mlp_name)
        like = next(old.parameters())
        memory = ProductKeyMemory(memory_config, values=shared).to(device=like.device, dtype=like.dtype)
        if config.share_values:
            shared = memory.values
        for module in memory.modules():  # drawn already: not to be drawn again by the decoder's own rule
            module._is_hf_initialized = True  # type: ignore[assignment]
        mlp = MemoryMLP(memory, old if config.placement == "parallel" else None)
        setattr(blocks[layer], config.mlp_name, mlp.train(model.training))
    names = [f"base.{name}.values.weight" for name in memories_in(model)]
    return dict.fromkeys(names[1:], names[0]) if config.share_values else {}


def _require_room_for_memories(
    blocks: nn.ModuleList, layers: list[int], memory: MemoryConfig, config: PkmemConfig
) -> None:
    """Refuses memories that do not fit together, before a block is edited."""
    sizes: Counter[tuple[torch.device, torch.dtype]] = Counter()
    for place, layer in enumerate(layers):
        like = next(getattr(blocks[layer], config.mlp_name).parameters())
        sizes[like.device, like.dtype] += num_weights(memory, shares_values=config.share_values and place > 0)
    for (device, dtype), size in sizes.items():
        require_room(f"{len(layers)} memories of {memory.num_slots:,} slots", size, device, dtype)


def _require_replaceable(mlp: nn.Module) -> None:
    """Refuses an MLP that takes or returns more than hidden states.

    BLOOM's is handed the residual, which the block would lose; GPT-OSS's returns router scores, and the block would
    take a memory's output apart, silently in a batch of two.
    """
    inputs = [p.name for p in inspect.signature(mlp.forward).parameters.values() if p.default is p.empty]
    if len(inputs) > 1:
        raise ValueError(
            f"{type(mlp).__name__} takes {', '.join(inputs)}, a memory hidden states alone: use placement='parallel'"
        )
    outputs = _tuple_returned(type(mlp))
    if outputs:
        raise ValueError(
            f"{type(mlp).__name__} ends with `{outputs}`, a memory returns hidden states alone: use placement='parallel'"
        )


def _tuple_returned(kind: type[nn.Module]) -> str | None:
    """The statement by which a module's forward returns several values; None where there is none, or no source."""
    try:
        source = textwrap.dedent(inspect.getsource(kind.forward))
    except OSError:  # typed into an interpreter, or installed without source
        return None
    returns = (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Return))
    return next((ast.unparse(node) for node in returns if isinstance(node.value, ast.Tuple)), None)


def _checked_layers(layers: list[int], num_layers: int) -> list[int]:
    for layer in layers:
        if not (is_integer(layer, 0) and layer < num_layers):
            raise ValueError(f"layer {layer!r} is outside [0, {num_layers}): layers are integers counted from 0")
    twice = [layer for layer in layers if layers.count(layer) > 1]
    if twice:
        raise ValueError(f"layer {twice[0]} is named twice in layers={layers}")
    if not layers:
        raise ValueError("layers is empty: name at least one block, counted from 0")
    return sorted(layers)


AutoConfig.register(PkmemConfig.model_type, PkmemConfig, exist_ok=True)
AutoModelForCausalLM.register(PkmemConfig, PkmemForCausalLM, exist_ok=True)
