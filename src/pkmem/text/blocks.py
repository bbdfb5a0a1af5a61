"""Token blocks for training and evaluation, resumable at any block."""

from __future__ import annotations

import numpy as np
import torch

from pkmem.text.tokens import TokenFile


class TokenBlocks(torch.utils.data.Dataset):
    """Blocks of consecutive tokens, read from disk one at a time.

    For evaluation (`num_blocks` is None) they are all blocks, once, in order. For training they are `num_blocks`
    blocks, epoch after epoch: an epoch takes the tokens as a ring, cuts it from a start of its own into blocks that
    do not overlap, and shuffles them. Block i depends on the seed and i alone, so a run that is resumed at block i
    reads on exactly as if it had never stopped. The tokens left over, less than a block, are dropped.

    Args:
        tokens: what `tokenize` returns.
        block_tokens: tokens per block.
        num_blocks: blocks of a whole training run; None for all blocks once.
        seed: of the starts and the shuffles.

    Raises:
        ValueError: a number is below 1, the seed below 0, or the file holds less than one block.
    """

    def __init__(self, tokens: TokenFile, block_tokens: int, num_blocks: int | None = None, seed: int = 0) -> None:
        if block_tokens < 1 or (num_blocks is not None and num_blocks < 1) or seed < 0:
            raise ValueError(
                f"block_tokens {block_tokens} and num_blocks {num_blocks} must be at least 1, seed {seed} at least 0"
            )
        if tokens.num_tokens < block_tokens:
            raise ValueError(
                f"the text has {tokens.num_tokens} tokens and a block needs {block_tokens}; "
                "use shorter blocks (context_tokens) or give more data"
            )
        self._arguments = (tokens, block_tokens, num_blocks, seed)
        self._tokens = tokens.tokens()
        self._block_tokens = block_tokens
        self._blocks_per_epoch = tokens.num_tokens // block_tokens
        self._num_blocks = num_blocks
        self._seed = seed
        self._epoch = -1  # whose order is held; the order is a function of it, so this changes no block

    def __reduce__(self) -> tuple:
        # A pickled memmap would carry all tokens to each worker of a DataLoader.
        return type(self), self._arguments

    def __len__(self) -> int:
        return self._blocks_per_epoch if self._num_blocks is None else self._num_blocks

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """Block `index`: its `input_ids`, (block_tokens,) int64, and `labels` equal to them.

        Raises:
            IndexError: `index` is outside [0, len(self)).
        """
        if not 0 <= index < len(self):
            raise IndexError(f"block {index} is outside [0, {len(self)})")
        start = index * self._block_tokens if self._num_blocks is None else self._shuffled_start(index)
        block = self._tokens.take(np.arange(start, start + self._block_tokens), mode="wrap")
        input_ids = torch.from_numpy(block.astype(np.int64))
        return {"input_ids": input_ids, "labels": input_ids.clone()}

    def _shuffled_start(self, index: int) -> int:
        epoch, place = divmod(index, self._blocks_per_epoch)
        if epoch != self._epoch:
            rng = np.random.default_rng((self._seed, epoch))
            self._offset = int(rng.integers(len(self._tokens)))
            self._order = rng.permutation(self._blocks_per_epoch)
            self._epoch = epoch
        return self._offset + int(self._order[place]) * self._block_tokens
