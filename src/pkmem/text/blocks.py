"""Token blocks for training and evaluation, resumable at any block."""

from __future__ import annotations

import numpy as np
import torch

from pkmem.text.encoder import BEGINS, COUNTS
from pkmem.text.tokens import TokenFile

_IGNORED = -100  # the label that a loss leaves out


class TokenBlocks(torch.utils.data.Dataset):
    """Blocks of consecutive tokens, read from disk one at a time.

    For evaluation (`num_blocks` is None) they are all blocks, once, in order. For training they are `num_blocks`
    blocks, epoch after epoch: an epoch takes the tokens as a ring, cuts it from a start of its own into blocks that
    do not overlap, and shuffles them. Block i depends on the seed and i alone, so a run that is resumed at block i
    reads on exactly as if it had never stopped. The tokens left over, less than a block, are dropped.

    Where not all tokens count for the loss (`TokenFile.marks`), a block begins with a document and has as many as are
    whole in it; what fills it up after them does not count. Every epoch has the same blocks. Of a document longer than a
    block the beginning alone is used, if something in it counts, but plain text is cut into several.

    Args:
        tokens: what `tokenize` returns.
        block_tokens: tokens per block.
        num_blocks: blocks of a whole training run; None for all blocks once.
        seed: of the starts and the shuffles.

    Raises:
        ValueError: a number is below 1, the seed below 0, or the file holds less than one block of plain text
            or no completion that begins within a block.
    """

    def __init__(self, tokens: TokenFile, block_tokens: int, num_blocks: int | None = None, seed: int = 0) -> None:
        if block_tokens < 1 or (num_blocks is not None and num_blocks < 1) or seed < 0:
            raise ValueError(
                f"block_tokens {block_tokens} and num_blocks {num_blocks} must be at least 1, seed {seed} at least 0"
            )
        self._marks = tokens.marks()
        if self._marks is None and tokens.num_tokens < block_tokens:
            raise ValueError(
                f"the text has {tokens.num_tokens} tokens and a block needs {block_tokens}; "
                "use shorter blocks (context_tokens) or give more data"
            )
        self._arguments = (tokens, block_tokens, num_blocks, seed)
        self._tokens = tokens.tokens()
        self._block_tokens = block_tokens
        self._blocks_per_epoch = tokens.num_tokens // block_tokens
        if self._marks is not None:
            self._starts, self._stops = _whole_documents(self._marks, block_tokens)
            self._blocks_per_epoch = len(self._starts)
        self._num_blocks = num_blocks
        self._seed = seed
        self._epoch = -1  # whose order is held; the order is a function of it, so this changes no block

    def __reduce__(self) -> tuple:
        # A pickled memmap would carry all tokens to each worker of a DataLoader.
        return type(self), self._arguments

    def __len__(self) -> int:
        return self._blocks_per_epoch if self._num_blocks is None else self._num_blocks

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """Block `index`: its `input_ids`, (block_tokens,) int64, and `labels` equal to them, -100 where one does not count.

        Raises:
            IndexError: `index` is outside [0, len(self)).
        """
        if not 0 <= index < len(self):
            raise IndexError(f"block {index} is outside [0, {len(self)})")
        epoch, place = divmod(index, self._blocks_per_epoch)
        if self._num_blocks is not None:
            self._shuffle(epoch)
            place = int(self._order[place])
        if self._marks is None:
            start = place * self._block_tokens + (0 if self._num_blocks is None else self._offset)
        else:
            start = int(self._starts[place])
        where = np.arange(start, start + self._block_tokens)
        input_ids = torch.from_numpy(self._tokens.take(where, mode="wrap").astype(np.int64))
        labels = input_ids.clone()
        if self._marks is not None:
            counts = (self._marks.take(where, mode="wrap") & COUNTS > 0) & (where < self._stops[place])
            labels[torch.from_numpy(~counts)] = _IGNORED
        return {"input_ids": input_ids, "labels": labels}

    def _shuffle(self, epoch: int) -> None:
        if epoch != self._epoch:
            rng = np.random.default_rng((self._seed, epoch))
            self._offset = int(rng.integers(len(self._tokens)))
            self._order = rng.permutation(self._blocks_per_epoch)
            self._epoch = epoch


def _whole_documents(marks: np.ndarray, block_tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """Where blocks start, and where what counts in them stops: each takes the documents that are whole in it.

    Raises:
        ValueError: no block has a token to learn.
    """
    starts = np.flatnonzero(marks & BEGINS)
    stops = np.append(starts[1:], len(marks))
    if (is_long := (stops - starts > block_tokens) & (marks[starts] & COUNTS > 0)).any():
        cuts = [np.arange(*ends, block_tokens) for ends in zip(starts[is_long], stops[is_long], strict=True)]
        starts = np.union1d(starts, np.concatenate(cuts))  # plain text: its parts are documents
        stops = np.append(starts[1:], len(marks))
    blocks, first = [], 0
    while first < len(starts):
        stop = starts[first] + block_tokens
        behind = max(first + 1, int(np.searchsorted(stops, stop, side="right")))
        stop = min(stop, stops[behind - 1])
        if (marks[starts[first] + 1 : stop] & COUNTS).any():
            blocks.append((starts[first], stop))
        first = behind
    if not blocks:
        raise ValueError(
            f"no prompt leaves room for its completion in a block of {block_tokens} tokens; "
            "use longer blocks (context_tokens)"
        )
    return np.array([start for start, _ in blocks]), np.array([stop for _, stop in blocks])
