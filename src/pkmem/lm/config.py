"""What a language model is made of: a pretrained model, or a decoder of a Hugging Face family and where its memories are."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Literal

from pkmem.layer.config import MemoryConfig, is_integer, is_share, require, take_plain_numbers

# Memories beside the MLPs of a pretrained model. Few neighbours: what is learned moves little else.
BESIDE_MLPS = MemoryConfig(num_sub_keys=128, heads=4, knn=4, query_dim=128, query_norm="layer")


@dataclass(frozen=True)
class ModelConfig:
    """A decoder of a Hugging Face family, and the blocks of it that get a memory; or a pretrained model as it is.

    Args:
        family: a Hugging Face model type of a decoder: gpt2, llama, qwen3, mistral, gemma, gpt_neox, ...
        num_layers: blocks, >= 1.
        width: hidden width d, >= 1, a multiple of num_heads.
        num_heads: attention heads, >= 1.
        ffn_width: hidden width of the MLPs, >= 1; None is 4 * width.
        context_tokens: tokens of a training block and longest context, >= 2.
        vocab_size: tokens of the byte-level BPE that is trained, >= 257.
        dropout: of the decoder, in [0, 1).
        memory_layers: blocks with a memory, counted from 0; empty for a dense model.
        placement: "replace" the MLP, or "parallel" beside it.
        share_values: one value table for all memories.
        pretrained: a saved model to train on from: a Hugging Face directory, a pkmem run, or a name on the Hugging Face
            Hub; None makes a fresh decoder, which all other fields but context_tokens describe.
    """

    family: str = "gpt2"
    num_layers: int = 4
    width: int = 256
    num_heads: int = 4
    ffn_width: int | None = None
    context_tokens: int = 256
    vocab_size: int = 4096
    dropout: float = 0.0
    memory_layers: list[int] = field(default_factory=list)
    placement: Literal["replace", "parallel"] = "replace"
    share_values: bool = False
    pretrained: str | None = None

    def __post_init__(self) -> None:
        take_plain_numbers(self)
        if self.pretrained is not None:
            self._require_nothing_fresh()
        lowest = {"num_layers": 1, "width": 1, "num_heads": 1, "context_tokens": 2, "vocab_size": 257}
        for name, low in lowest.items():
            require(is_integer(getattr(self, name), low), f"model.{name}", getattr(self, name), f"an integer >= {low}")
        if self.ffn_width is not None:
            require(is_integer(self.ffn_width, 1), "model.ffn_width", self.ffn_width, "an integer >= 1")
        require(is_share(self.dropout), "model.dropout", self.dropout, "in [0, 1)")
        if self.width % self.num_heads:
            raise ValueError(
                f"model.width is {self.width} but must be a multiple of model.num_heads = {self.num_heads}: "
                f"try width {self.width + self.num_heads - self.width % self.num_heads}"
            )

    def _require_nothing_fresh(self) -> None:
        """A pretrained model has its own sizes: other ones beside it are a mistake."""
        fresh = ModelConfig()
        for name in (option.name for option in fields(self) if option.name not in ("pretrained", "context_tokens")):
            if getattr(self, name) != getattr(fresh, name):
                fix = f"leave it out: {self.pretrained} has its own"
                if name in ("memory_layers", "placement", "share_values"):
                    fix = (
                        f"put memories into {self.pretrained} with `pkmem retrofit`, and train on from what that makes"
                    )
                raise ValueError(
                    f"model.{name} describes a fresh decoder and cannot stand beside model.pretrained: {fix}"
                )
