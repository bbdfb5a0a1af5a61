"""What a product-key memory is made of: one frozen dataclass, checked once."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal


@dataclass(frozen=True)
class MemoryConfig:
    """The shape and the options of one product-key memory (Lample et al. 2019, section 3).

    Args:
        dim: width d of the hidden states read; None until the memory is bound to a model.
        num_sub_keys: sub-keys s per half and head, >= 1; the table has s ** 2 slots.
        heads: heads H, >= 1; each has its own query and sub-keys, all share the values.
        knn: slots read per head and token, in [1, num_sub_keys].
        query_dim: width q of one head's query, even and >= 2.
        query_hidden_dim: None for a linear query network, else the hidden width of a two-layer one.
        query_norm: "batch" is the paper's; it lets later tokens reach earlier ones in training mode.
            "layer" and "rms" normalise each query alone and are causal; "none".
        value_dim: width v of a value; None means `dim`.
        gate: Memory+'s output `W2(m(x) * silu(W1 x))` (Berges et al. 2024), of width `dim`.
        experts: each slot is an expert of one neuron, `v * gelu(u x)`, with u in a second table of width `dim` (PEER,
            He 2024), instead of the value v alone.
        keys: "product", or "flat": s ** 2 full keys compared one by one, for comparison only.
        query_dropout: share of query components dropped in training, in [0, 1).
        dropout: share of output components dropped in training, in [0, 1).

    Raises:
        ValueError: a field is outside its range.
    """

    dim: int | None = None
    num_sub_keys: int = 512
    heads: int = 4
    knn: int = 32
    query_dim: int = 256
    query_hidden_dim: int | None = None
    query_norm: Literal["batch", "layer", "rms", "none"] = "batch"
    value_dim: int | None = None
    gate: bool = False
    experts: bool = False
    keys: Literal["product", "flat"] = "product"
    query_dropout: float = 0.0
    dropout: float = 0.0

    def __post_init__(self) -> None:
        take_plain_numbers(self)
        for name in ("num_sub_keys", "heads", "knn", "query_dim", "dim", "query_hidden_dim", "value_dim"):
            count, may_be_none = getattr(self, name), name in ("dim", "query_hidden_dim", "value_dim")
            require(is_integer(count, 1) or (count is None and may_be_none), name, count, "an integer >= 1")
        if self.knn > self.num_sub_keys:
            raise ValueError(
                f"knn is {self.knn} but must be in [1, num_sub_keys = {self.num_sub_keys}]: "
                "lower knn or raise num_sub_keys"
            )
        require(self.query_dim % 2 == 0, "query_dim", self.query_dim, "even: its halves meet two sub-key sets")
        for name, choices in (("query_norm", ("batch", "layer", "rms", "none")), ("keys", ("product", "flat"))):
            choice = getattr(self, name)
            require(choice in choices, name, choice, f"one of {', '.join(map(repr, choices))}")
        for name in ("gate", "experts"):
            require(isinstance(getattr(self, name), bool), name, getattr(self, name), "True or False")
        for name in ("query_dropout", "dropout"):
            require(is_share(getattr(self, name)), name, getattr(self, name), "in [0, 1)")

    @property
    def num_slots(self) -> int:
        """Slots of the table, s ** 2."""
        return self.num_sub_keys**2

    @property
    def value_width(self) -> int:
        """Width of one value, `value_dim` or, where that is None, `dim`."""
        return self.value_dim or self.bound_dim

    @property
    def output_dim(self) -> int:
        """Width of the memory's output, that of the values or, behind a gate, `dim`."""
        return self.bound_dim if self.gate else self.value_width

    @property
    def bound_dim(self) -> int:
        """`dim`, once known.

        Raises:
            ValueError: `dim` is None.
        """
        if self.dim is None:
            raise ValueError("dim is None: give MemoryConfig the width of the hidden states, dim=...")
        return self.dim

    def bound_to(self, dim: int) -> MemoryConfig:
        """The same memory for hidden states of width `dim`.

        Raises:
            ValueError: the memory already has another `dim`.
        """
        if self.dim not in (None, dim):
            raise ValueError(f"the memory has dim={self.dim} but the model is {dim} wide: leave dim out")
        return replace(self, dim=dim)

    def to_dict(self) -> dict[str, Any]:
        """All fields as plain values, fit for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, document: dict[str, Any]) -> MemoryConfig:
        """The config that `to_dict` wrote.

        Raises:
            ValueError: an unknown field, or one outside its range.
        """
        known = [field.name for field in fields(cls)]
        unknown = sorted(set(document) - set(known))
        if unknown:
            raise ValueError(f"unknown memory option {unknown[0]!r}: the options are {', '.join(known)}")
        return cls(**document)


def plain_number(number: Any) -> Any:
    """Python's number for one of NumPy or torch, which JSON does not take; anything else as it is."""
    return number.item() if hasattr(number, "item") else number


def take_plain_numbers(config: Any) -> None:
    """Puts Python's numbers into a frozen dataclass in place of others' numbers."""
    for field in fields(config):
        object.__setattr__(config, field.name, plain_number(getattr(config, field.name)))


def is_integer(number: Any, lowest: int) -> bool:
    """Whether this is an integer, and not a float or a quoted one out of YAML, from `lowest` on."""
    return isinstance(number, int) and not isinstance(number, bool) and number >= lowest


def is_share(number: Any) -> bool:
    """Whether this is a number in [0, 1)."""
    return isinstance(number, int | float) and not isinstance(number, bool) and 0 <= number < 1


def require(holds: bool, name: str, given: Any, allowed: str) -> None:
    """Refuses what a caller can get wrong, naming what was given and what is allowed.

    Raises:
        ValueError: `holds` is False.
    """
    if not holds:
        raise ValueError(f"{name} is {given!r} but must be {allowed}")
