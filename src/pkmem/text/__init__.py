"""Text -> tokenizer -> token blocks, resumable, with never more than a few pieces of text in memory.

`read_documents` streams the documents of one split, `train_tokenizer` learns a vocabulary from them, `tokenize`
writes their tokens once to a cached file, and `TokenBlocks` cuts that file into training or evaluation blocks.
"""

from __future__ import annotations

from pkmem.text.blocks import TokenBlocks
from pkmem.text.documents import Split, read_documents
from pkmem.text.tokenizer import END_OF_TEXT, train_tokenizer
from pkmem.text.tokens import TokenFile, tokenize

__all__ = ["END_OF_TEXT", "Split", "TokenBlocks", "TokenFile", "read_documents", "tokenize", "train_tokenizer"]
