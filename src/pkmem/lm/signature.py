"""A method of the model that shows, and takes, the arguments of its decoder's method of the same name.

transformers reads signatures: generation to know whether a model takes a cache or embeddings, Trainer to know which
columns of a dataset and whether the number of tokens in a batch. Decoders differ, and one class wraps them all, so
each model shows its own decoder's.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn


class decoder_signature:
    """Decorates a method of a module whose attribute `base` is the decoder."""

    def __init__(self, method: Callable[..., Any]) -> None:
        self.method = method
        self.__doc__ = method.__doc__

    def __get__(self, model: nn.Module | None, owner: type | None = None) -> Callable[..., Any]:
        """The method, bound to the model; unbound, as it was written."""
        if model is None:
            return self.method
        # What is compiled asks for no signature, and torch.compile follows a plain partial only.
        return (partial if torch.compiler.is_dynamo_compiling() else _Bound)(self.method, model)


class _Bound(partial):
    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(getattr(self.args[0].base, self.func.__name__))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Arguments after the first by the decoder's names: the second is a mask in Llama and a cache in GPT-2."""
        if len(args) < 2:
            return super().__call__(*args, **kwargs)
        return super().__call__(**self.__signature__.bind_partial(*args).arguments, **kwargs)
