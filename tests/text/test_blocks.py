"""text/blocks.py: every token in its place, at whatever block a run goes on."""

import pickle
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import skip_first_batches
from accelerate.data_loader import BatchSamplerShard
from torch.utils.data import BatchSampler, DataLoader, SequentialSampler

from pkmem.text import TokenBlocks, TokenFile
from pkmem.text.encoder import BEGINS, COUNTS


def counting_tokens(tmp_path: Path, num_tokens: int) -> TokenFile:
    """Every token its own position."""
    path = tmp_path / f"{num_tokens}.uint32"
    np.arange(num_tokens, dtype=np.uint32).tofile(path)
    return TokenFile(path, num_tokens, num_bytes=num_tokens, num_documents=1, num_skipped=0)


def blocks_of(blocks: TokenBlocks, indices) -> list[list[int]]:
    return [blocks[index]["input_ids"].tolist() for index in indices]


def test_evaluation_blocks_cover_the_text_in_order(tmp_path):
    blocks = TokenBlocks(counting_tokens(tmp_path, 107), 10)
    assert len(blocks) == 10
    assert list(chain(*blocks_of(blocks, range(10)))) == list(range(100))
    assert len(list(blocks)) == 10
    item = blocks[3]
    assert item.keys() == {"input_ids", "labels"}
    assert item["input_ids"].dtype == item["labels"].dtype == torch.int64
    assert torch.equal(item["input_ids"], item["labels"])
    item["labels"][0] = -100
    assert item["input_ids"][0] == 30


@pytest.mark.parametrize("num_tokens", [10, 19, 100, 107])
def test_an_epoch_reads_no_token_twice_and_drops_less_than_a_block(tmp_path, num_tokens):
    per_epoch = num_tokens // 10
    blocks = TokenBlocks(counting_tokens(tmp_path, num_tokens), 10, num_blocks=3 * per_epoch)
    for epoch in range(3):
        read_blocks = blocks_of(blocks, range(epoch * per_epoch, (epoch + 1) * per_epoch))
        assert all(block == [(block[0] + n) % num_tokens for n in range(10)] for block in read_blocks)
        tokens = list(chain(*read_blocks))
        assert len(set(tokens)) == len(tokens) == 10 * per_epoch


def test_epochs_differ_in_cuts_and_order(tmp_path):
    blocks = TokenBlocks(counting_tokens(tmp_path, 1000), 10, num_blocks=400)
    starts = [block[0] for block in blocks_of(blocks, range(400))]
    epochs = [starts[first : first + 100] for first in range(0, 400, 100)]
    assert len({start % 10 for epoch in epochs for start in epoch}) > 1
    assert all(epoch != sorted(epoch) for epoch in epochs)
    orders = [[(start - min(epoch)) // 10 for start in epoch] for epoch in epochs]
    assert len({tuple(order) for order in orders}) == 4


def test_a_block_depends_on_seed_and_index_alone(tmp_path):
    tokens = counting_tokens(tmp_path, 500)
    straight = blocks_of(TokenBlocks(tokens, 10, num_blocks=170), range(170))
    assert blocks_of(TokenBlocks(tokens, 10, num_blocks=170), range(120, 170)) == straight[120:]
    assert blocks_of(TokenBlocks(tokens, 10, num_blocks=170), reversed(range(170))) == straight[::-1]
    assert blocks_of(TokenBlocks(tokens, 10, num_blocks=900), range(170)) == straight
    assert blocks_of(TokenBlocks(tokens, 10, num_blocks=170, seed=1), range(170)) != straight


def test_blocks_travel_to_workers_without_their_tokens(tmp_path):
    blocks = TokenBlocks(counting_tokens(tmp_path, 100_000), 10, num_blocks=50)
    before = blocks_of(blocks, range(50))
    pickled = pickle.dumps(blocks)
    assert len(pickled) < 2000
    assert blocks_of(pickle.loads(pickled), range(50)) == before


def test_too_short_a_text_is_refused_with_its_fixes(tmp_path):
    message = "a block needs 10; use shorter blocks .context_tokens. or give more data"
    with pytest.raises(ValueError, match=message):
        TokenBlocks(counting_tokens(tmp_path, 9), 10)
    assert blocks_of(TokenBlocks(counting_tokens(tmp_path, 9), 9), [0]) == [list(range(9))]


@pytest.mark.parametrize("arguments", [{"block_tokens": 0}, {"num_blocks": 0}, {"seed": -1}])
def test_numbers_out_of_range_are_refused(tmp_path, arguments):
    with pytest.raises(ValueError, match="at least"):
        TokenBlocks(counting_tokens(tmp_path, 100), **{"block_tokens": 10, **arguments})


@pytest.mark.parametrize("index", [-1, 10])
def test_an_index_out_of_range_is_refused(tmp_path, index):
    with pytest.raises(IndexError, match=rf"block {index} is outside \[0, 10\)"):
        TokenBlocks(counting_tokens(tmp_path, 100), 10)[index]


def seen_by(num_processes: int, blocks: TokenBlocks, first: int, last: int) -> list[list[list[int]]]:
    """The blocks of each update from `first` on, as accelerate deals them out to processes, two micro-batches each."""
    updates: list[list[list[int]]] = [[] for _ in range(first, last)]
    for rank in range(num_processes):
        batches = BatchSampler(SequentialSampler(blocks), 4 // num_processes, drop_last=False)
        shard = BatchSamplerShard(batches, num_processes, rank)
        loader = iter(skip_first_batches(DataLoader(blocks, batch_sampler=shard), 2 * first))
        for update in updates:
            update += [row for _ in range(2) for row in next(loader)["input_ids"].tolist()]
    return [sorted(update) for update in updates]


@pytest.mark.parametrize(("before", "after"), [(1, 4), (4, 2), (2, 1)])
def test_a_run_that_goes_on_with_another_number_of_processes_reads_the_same(
    before: int, after: int, tmp_path: Path
) -> None:
    tokens = counting_tokens(tmp_path, 107)
    run, straight = (TokenBlocks(tokens, 10, 64, seed=3) for _ in range(2))
    resumed = TokenBlocks(tokens, 10, 64, seed=3)
    alone = seen_by(1, straight, 0, 8)
    assert [len(update) for update in alone] == [8] * 8
    assert seen_by(before, run, 0, 5) + seen_by(after, resumed, 5, 8) == alone


# Blocks of which not everything counts -----------------------------------------------------------------------


def marked_tokens(tmp_path: Path, *examples: tuple[int, int]) -> TokenFile:
    """Examples of so many tokens that do not count and so many that do; every token its own position."""
    marks = [mark for prompt, rest in examples for mark in [0] * prompt + [COUNTS] * rest]
    for start in np.cumsum([0, *(sum(example) for example in examples[:-1])]):
        marks[start] |= BEGINS
    path = tmp_path / "marked.uint32"
    np.arange(len(marks), dtype=np.uint32).tofile(path)
    np.array(marks, dtype=np.uint8).tofile(path.with_suffix(".marks"))
    return TokenFile(path, len(marks), len(marks), len(examples), 0, sum(rest for _, rest in examples))


def counted(block: dict[str, torch.Tensor]) -> list[int]:
    assert ((block["labels"] == -100) | (block["labels"] == block["input_ids"])).all()
    return block["labels"][block["labels"] != -100].tolist()


def test_a_block_has_whole_examples_and_counts_their_completions(tmp_path):
    blocks = TokenBlocks(marked_tokens(tmp_path, (2, 2), (3, 1), (1, 3), (4, 1)), 10)
    assert blocks_of(blocks, range(2)) == [list(range(10)), [*range(8, 17), 0]]
    assert [counted(block) for block in blocks] == [[2, 3, 7], [9, 10, 11, 16]]


def test_of_long_examples_the_beginning_counts_and_long_text_is_cut(tmp_path):
    blocks = TokenBlocks(marked_tokens(tmp_path, (3, 9), (12, 2), (0, 12), (1, 1)), 5)
    assert [block["input_ids"][0].item() for block in blocks] == [0, 26, 31, 36]  # nothing of the second is left
    assert [counted(block) for block in blocks] == [[3, 4], [*range(26, 31)], [*range(31, 36)], [36, 37, 39]]


def test_an_epoch_has_every_block_once_in_an_order_of_its_own(tmp_path):
    file = marked_tokens(tmp_path, *[(2, 3)] * 40)
    once = TokenBlocks(file, 10)
    blocks = TokenBlocks(file, 10, 60, seed=3)
    epochs = [[counted(blocks[index]) for index in range(first, first + 20)] for first in (0, 20, 40)]
    assert all(sorted(epoch) == [counted(block) for block in once] for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert [counted(block) for block in TokenBlocks(file, 10, 60, seed=3)] == list(chain(*epochs))


def test_few_examples_fill_a_long_block_and_no_completion_is_refused(tmp_path):
    blocks = TokenBlocks(marked_tokens(tmp_path, (1, 1), (1, 1)), 50, 3)
    assert [counted(block) for block in blocks] == [[1, 3]] * 3
    with pytest.raises(ValueError, match=r"no prompt leaves room for its completion in a block of 8 tokens"):
        TokenBlocks(marked_tokens(tmp_path, (8, 2), (9, 1)), 8)
