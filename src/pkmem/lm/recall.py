"""What a language model has stored: recall of facts it was trained on, in bits."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pkmem.layer.counting import count_parameters
from pkmem.layer.memory import memories_in
from pkmem.lm.evaluation import in_eval_mode
from pkmem.lm.huggingface import context_tokens
from pkmem.text.synthetic import VALUES, SyntheticFacts

BATCH_PROMPTS = 64


def measure_recall(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, facts: SyntheticFacts, progress: bool = False
) -> dict[str, float]:
    """How many facts a model completes in the phrasing it was never shown, and how many bits of them it holds.

    A fact's bits are log2(64), what a guess among the values lacks, less -log2 of the probability that the model
    gives to the right one among them. Their mean is 0 for a model that knows nothing (and for one that does worse),
    and log2(64) = 6 for one that knows everything.

    Args:
        model: a causal language model trained on the text of `facts`; evaluated in eval mode.
        tokenizer: its tokenizer, with an end-of-text (eos) token, which precedes every prompt.
        facts: what to ask, all of it.
        progress: show a progress bar.

    Returns:
        recall: share of facts whose value is what the model would write, token by token, in [0, 1].
        bits_per_fact: mean, in [0, log2(64)].
        stored_bits: of all facts.
        bits_per_param, bits_per_dense_param, bits_per_active_param: stored bits over all parameters, over those
            outside the value tables, and over those that work on one token (dense and the values it reads).

    Raises:
        ValueError: the tokenizer does not cut the text between prompt and value, or the model's context is too short.
    """
    prompts, right, candidates = _encode(tokenizer, facts)
    longest = max(map(len, prompts)) + max(map(len, candidates)) - 1
    if longest > context_tokens(model):
        raise ValueError(
            f"a prompt and its value take {longest} tokens but the model's context is {context_tokens(model)}"
        )
    num_recalled, nats = 0, 0.0
    with in_eval_mode(model):
        for first in tqdm(range(0, facts.num, BATCH_PROMPTS), "recalling", disable=not progress):
            batch = slice(first, first + BATCH_PROMPTS)
            log_probs, is_greedy = _score(model, prompts[batch], candidates)
            chosen = right[batch].to(log_probs.device)[:, None]
            num_recalled += int(is_greedy.gather(1, chosen).sum())
            nats -= log_probs.log_softmax(-1).gather(1, chosen).sum().item()
    bits_per_fact = max(0.0, math.log2(len(VALUES)) - nats / facts.num / math.log(2))
    stored = facts.num * bits_per_fact
    return {
        "recall": num_recalled / facts.num,
        "bits_per_fact": bits_per_fact,
        "stored_bits": stored,
        **{f"bits_per_{name}": stored / count for name, count in _parameters(model).items()},
    }


def _encode(
    tokenizer: PreTrainedTokenizerBase, facts: SyntheticFacts
) -> tuple[list[list[int]], Tensor, list[list[int]]]:
    """Tokens of each prompt, the place of its right value in VALUES, and the tokens of each value."""

    def tokens(texts: list[str]) -> list[list[int]]:
        return tokenizer(texts, add_special_tokens=False)["input_ids"]

    texts = [fact.prompt(fact.held_out) for fact in facts.all]
    prompts = tokens(texts)
    candidates = [ids[len(prompts[0]) :] for ids in tokens([f"{texts[0]} {value}" for value in VALUES])]
    right = [VALUES.index(fact.value) for fact in facts.all]
    whole = tokens([f"{text} {VALUES[place]}" for text, place in zip(texts, right, strict=True)])
    for text, ids, prompt, place in zip(texts, whole, prompts, right, strict=True):
        if ids != prompt + candidates[place]:
            raise ValueError(
                f"the tokenizer has other tokens for {text!r} where {VALUES[place]!r} follows: recall needs one that "
                "cuts before a space, such as the byte-level BPE that `pkmem train` makes"
            )
    return [[tokenizer.eos_token_id, *prompt] for prompt in prompts], torch.tensor(right), candidates


def _score(model: nn.Module, prompts: list[list[int]], candidates: list[list[int]]) -> tuple[Tensor, Tensor]:
    """Log-probability of every candidate after every prompt, and whether greedy decoding writes it; (n, candidates)."""
    device = next(model.parameters()).device
    log_probs = torch.zeros(len(prompts), len(candidates), dtype=torch.float64, device=device)
    is_greedy = torch.ones_like(log_probs, dtype=torch.bool)
    by_prefix: dict[tuple[int, ...], list[int]] = {}
    for place, ids in enumerate(candidates):
        for length in range(len(ids)):
            by_prefix.setdefault(tuple(ids[:length]), []).append(place)
    # Candidates that begin alike share a pass: one for all of them where each is a single token.
    for prefix, places in by_prefix.items():
        logits = _last_logits(model, [[*prompt, *prefix] for prompt in prompts])
        following = torch.tensor([candidates[place][len(prefix)] for place in places], device=device)
        log_probs[:, places] += logits.log_softmax(-1)[:, following]
        is_greedy[:, places] &= logits.argmax(-1, keepdim=True) == following
    return log_probs, is_greedy


def _last_logits(model: nn.Module, sequences: list[list[int]]) -> Tensor:
    """What a causal model predicts after each sequence, (n, vocabulary) float64."""
    device = next(model.parameters()).device
    lengths = torch.tensor([len(tokens) for tokens in sequences], device=device)
    tokens = pad_sequence([torch.tensor(tokens) for tokens in sequences], batch_first=True).to(device)
    is_token = torch.arange(tokens.shape[1], device=device) < lengths[:, None]
    logits = model(input_ids=tokens, attention_mask=is_token.long(), use_cache=False).logits
    return logits[torch.arange(len(sequences), device=device), lengths - 1].double()


def _parameters(model: nn.Module) -> dict[str, int]:
    count = count_parameters(model)
    dense = count["dense_params"]
    configs = [memory.config for memory in memories_in(model).values()]
    read = sum(c.heads * c.knn * (c.value_width + c.experts * c.bound_dim) for c in configs)
    return {"param": dense + count["memory_params"], "dense_param": dense, "active_param": dense + read}
