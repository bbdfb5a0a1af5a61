"""Groups of numbers: the strongest and the sums are those of loops."""

import torch

from pkmem.inspecting import sums
from pkmem.inspecting.sums import SumsByKey, strongest, summed


def test_the_strongest_of_each_group_are_kept_and_of_equal_ones_the_first() -> None:
    groups = torch.randint(0, 7, (200,))
    weights = torch.randint(0, 10, (200,)).float()  # many are equal
    which, ranks = strongest(groups, weights, 3)
    found: dict[int, list[int]] = {}
    for place, rank in zip(which.tolist(), ranks.tolist(), strict=True):
        found.setdefault(int(groups[place]), []).append(place)
        assert len(found[int(groups[place])]) == rank + 1
    assert found == {
        group: sorted((i for i in range(200) if groups[i] == group), key=lambda i: (-weights[i], i))[:3]
        for group in sorted(set(groups.tolist()))
    }


def test_nothing_has_no_strongest_and_no_sums() -> None:
    nothing = torch.zeros(0, dtype=torch.int64)
    assert [part.tolist() for part in strongest(nothing, torch.zeros(0), 3)] == [[], []]
    assert [part.tolist() for part in summed(nothing, torch.zeros(0))] == [[], []]
    assert [part.tolist() for part in SumsByKey().totals()] == [[], [], []]


def test_sums_by_key_are_those_of_a_loop_however_often_they_are_merged(monkeypatch) -> None:
    monkeypatch.setattr(sums, "_MERGED_AT", 50)
    made, weights_of, counts_of = SumsByKey(), {}, {}
    for _ in range(40):
        keys, weights = torch.randint(0, 1 << 40, (8,)) % 61, torch.rand(8)
        made.add(keys, weights)
        for key, weight in zip(keys.tolist(), weights.tolist(), strict=True):
            weights_of[key] = weights_of.get(key, 0.0) + weight
            counts_of[key] = counts_of.get(key, 0) + 1
    keys, weights, counts = made.totals()
    assert keys.tolist() == sorted(counts_of)
    assert counts.tolist() == [counts_of[key] for key in sorted(counts_of)]
    torch.testing.assert_close(weights.double(), torch.tensor([weights_of[key] for key in sorted(counts_of)]).double())
