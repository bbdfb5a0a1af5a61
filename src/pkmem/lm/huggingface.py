"""A product-key memory in any Hugging Face decoder: built, saved and loaded the Hugging Face way.

tests/test_private_names.py lists the private names of transformers used here and in training/trainer.py.
"""

from __future__ import annotations

import os
import shutil
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

from pkmem.layer.config import MemoryConfig, plain_number
from pkmem.layer.memory import memories_in
from pkmem.layer.quantised import quantise_values
from pkmem.layer.values import tables_in
from pkmem.lm.mapping import leave_out_tables_that_come_later, map_tables, require_another_folder, tables_come_later
from pkmem.lm.offloading import keep_tables_where_they_are
from pkmem.lm.padding import keep_mask_with, keeping_mask, real_tokens, under_mask
from pkmem.lm.placement import MemoryMLP, Placement, insert_memories
from pkmem.lm.signature import decoder_signature
from pkmem.lm.stored import require_as_configured

VALUE_BITS = {"bf16": 16, "int8": 8, "int4": 4}
_MAPPED = "mmap"
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
        value_bits: of a number of the value tables: 8 or 4 where they are quantised, 16 where they are bf16 whatever the
            rest of the model is; None where they are as the rest.
    """

    model_type = "pkmem"
    sub_configs: ClassVar = {"text_config": AutoConfig}

    text_config: dict | PreTrainedConfig | None = None
    memory: dict | None = None
    layers: list[int] | None = None
    placement: str = "replace"
    share_values: bool = False
    mlp_name: str = "mlp"
    value_bits: int | None = None
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
        names = insert_memories(
            self.base,
            config.layers or [],
            MemoryConfig.from_dict(config.memory or {}),
            config.placement,
            share_values=config.share_values,
            mlp_name=config.mlp_name,
        )
        if config.value_bits is not None:
            quantise_values(self.base, config.value_bits)
        tables = [f"base.{name}.values.weight" for name in names]
        self._tied_weights_keys = dict.fromkeys(tables[1:], tables[0]) if config.share_values else {}
        self._keep_in_fp32_modules = [f"base.{name}" for name in names]  # which quantisers leave alone
        if leave_out_tables_that_come_later(self):
            self._tied_weights_keys = {}  # there is nothing to tie
            self._keys_to_ignore_on_load_unexpected = [r"\.(values|neurons)\.weight$"]
        self.post_init()

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """Loads what `save_pretrained` wrote; reads safetensors only, and no incomplete file.

        Args:
            args, kwargs: as in transformers; and `values`: "bf16", "int8" or "int4" stores the value tables so; "mmap"
                leaves all tables in the files of a directory, in whatever form they are, and reads rows when they are
                needed; None loads them as they are.

        Raises:
            ValueError: weights are missing from the file, a table is not what the config says, it cannot be stored so, or
                it cannot be mapped.
        """
        stored, wants_info = kwargs.pop("values", None), kwargs.pop("output_loading_info", False)
        if stored not in (None, _MAPPED, *VALUE_BITS):
            known = ", ".join(map(repr, (*VALUE_BITS, _MAPPED)))
            raise ValueError(f"values is {stored!r} but must be one of {known}, or None")
        kwargs["use_safetensors"] = True
        cls._require_as_configured(*args, **kwargs)
        if stored == _MAPPED:
            return cls._with_mapped_tables(wants_info, *args, **kwargs)
        model, info = super().from_pretrained(*args, **kwargs, output_loading_info=True)
        if info["missing_keys"]:
            missing = sorted(info["missing_keys"])
            raise ValueError(
                f"the checkpoint lacks {len(missing)} weights, {missing[0]} among them: "
                "it is broken or of another model; save it again with save_pretrained"
            )
        keep_tables_where_they_are(model)
        if stored is not None and model.config.value_bits != VALUE_BITS[stored]:
            model.quantise_values(stored)
        return (model, info) if wants_info else model

    @classmethod
    def _require_as_configured(cls, *args: Any, **kwargs: Any) -> None:
        folder = _folder_of(*args, **kwargs)
        if folder is None or not folder.is_dir():
            return
        config = kwargs.get("config")
        if not isinstance(config, PkmemConfig):
            config = PkmemConfig.from_pretrained(folder)
        memory = MemoryConfig.from_dict(config.memory or {}).bound_to(config.get_text_config().hidden_size)
        require_as_configured(folder, memory, config.value_bits)

    @classmethod
    def _with_mapped_tables(cls, wants_info: bool, *args: Any, **kwargs: Any) -> Any:
        folder = _folder_of(*args, **kwargs)
        if folder is None or not folder.is_dir():
            raise ValueError(
                f"{folder} is no directory, and tables are mapped from one: huggingface_hub.snapshot_download gets a model "
                "of the Hub, and says where it is"
            )
        with tables_come_later():
            model, info = cls.from_pretrained(*args, **kwargs, output_loading_info=True)
        map_tables(model, folder)
        del model._keys_to_ignore_on_load_unexpected
        tables = [f"base.{name}.values.weight" for name in memories_in(model.base)]
        model._tied_weights_keys = dict.fromkeys(tables[1:], tables[0]) if model.config.share_values else {}
        return (model, info) if wants_info else model

    def quantise_values(self, stored: str) -> None:
        """Stores the value tables in few bits, in place, for inference.

        Args:
            stored: "int8" or "int4", bits of a number, with a scale for each row besides; or "bf16".

        Raises:
            ValueError: `stored` is none of these, the tables are quantised already, or as `pkmem.layer.quantised`.
        """
        if stored not in VALUE_BITS:
            raise ValueError(f"values is {stored!r} but must be one of {', '.join(map(repr, VALUE_BITS))}")
        if self.config.value_bits is not None:
            raise ValueError(
                f"the values are stored in {self.config.value_bits} bits already: start from the model as it was trained"
            )
        quantise_values(self.base, VALUE_BITS[stored])
        self.config.value_bits = VALUE_BITS[stored]

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
            ValueError: memories that share a table by the config hold several, tables are sharded, or they are mapped
                from that directory.
        """
        self._require_one_shared_table()
        require_another_folder(self, Path(args[0] if args else kwargs["save_directory"]))
        if any(table.others is not None for table in tables_in(self)):
            raise ValueError(
                "this process holds some columns of the tables: save model.state_dict() on all processes with "
                "torch.distributed.checkpoint, or train with `pkmem train`, after which `pkmem export` writes the model"
            )
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
    values: Literal["normal", "zero"] = "normal",
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
        values: "normal" as in the paper, or "zero": beside the MLPs of a pretrained model, such memories leave its
            logits as they are, to the last bit, until they are trained.
        share_values: let all memories read one value table, as in Memory+.
        mlp_name: the name of the MLP in a block, for families that do not call it "mlp".

    Raises:
        ValueError: a layer is out of range or named twice, the width or the model does not fit, no block with
            such an MLP is found, or the MLP to replace takes or returns more than hidden states.
    """
    if isinstance(model, PkmemForCausalLM):
        raise ValueError("the model has memories already: name all layers in one add_memory call")
    text_config = model.config.get_text_config(decoder=True)
    if values not in ("normal", "zero"):
        raise ValueError(f"values is {values!r} but must be 'normal' or 'zero'")
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
    if values == "zero":
        for memory in memories_in(made).values():
            memory.values.start_at_zero()
    if getattr(model, "generation_config", None) is not None:
        made.generation_config = model.generation_config
    return made.train(model.training)


def _folder_of(*args: Any, **kwargs: Any) -> Path | None:
    """Where the arguments of `from_pretrained` say that the model is, if it is a directory; None where they name none."""
    place = args[0] if args else kwargs.get("pretrained_model_name_or_path")
    return None if place is None else Path(place, kwargs.get("subfolder") or "")


def context_tokens(model: PreTrainedModel) -> int:
    """The longest context a model takes, by its config; 1024 where that names none."""
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return longest or 1024


AutoConfig.register(PkmemConfig.model_type, PkmemConfig, exist_ok=True)
AutoModelForCausalLM.register(PkmemConfig, PkmemForCausalLM, exist_ok=True)
