"""Saved beside the weights, for `trust_remote_code=True` to run: the model's code is the package pkmem."""

from pkmem.lm.huggingface import PkmemConfig, PkmemForCausalLM

__all__ = ["PkmemConfig", "PkmemForCausalLM"]
