"""A tiny model and a tokenizer of bytes, shared by the tests of what teaches models facts.

PYTEST_DONT_REWRITE: the tests import it before pytest takes its fixtures.
"""

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from pkmem.experiments.learning.examination import Size

SIZE = Size(
    misses_per_kind=2,
    chats_per_kind=2,
    chat_tokens=4,
    blocks=4,
    block_tokens=32,
    facts_after_epochs=4,
    facts_held_out=6,
)
CHAT = "{% for m in messages %}<{{ m.role }}> {{ m.content }}\n{% endfor %}<answer>"


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """A token a byte, but for one word."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = [*letters, "th", "the", "Ġthe", "<eos>"]
    merges = [("t", "h"), ("th", "e"), ("Ġ", "the")]
    made = Tokenizer(models.BPE(vocab={piece: i for i, piece in enumerate(pieces)}, merges=merges))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<eos>", pad_token="<eos>", chat_template=CHAT)


VOCAB = 260


def llama() -> LlamaForCausalLM:
    """Small and random."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=VOCAB, max_position_embeddings=512)).eval()
