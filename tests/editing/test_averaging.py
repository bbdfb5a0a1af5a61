import pytest
import torch

from pkmem.editing.averaging import RunningMean


@pytest.mark.parametrize("kept", [0.0, 0.9])
def test_it_is_the_mean_of_the_first_updates_and_then_of_the_latest(kept):
    weight = torch.zeros(3, requires_grad=True)
    mean = RunningMean([weight], kept)
    seen, expected = [], torch.zeros(3)
    for number in range(1, 31):
        weight.data = torch.tensor([1.0, number, number**2])
        mean.count()
        seen.append(weight.detach().double())
        expected = torch.stack(seen).mean(0) if number <= 10 and kept else kept * expected + (1 - kept) * seen[-1]
        mean.enter()
        assert torch.allclose(weight.detach().double(), expected, rtol=1e-5)
        mean.leave()
        assert torch.equal(weight.detach().double(), seen[-1])


def test_what_is_done_to_the_mean_in_their_place_is_left_behind():
    weight = torch.ones(2)
    mean = RunningMean([weight], 0.5)
    mean.count()
    mean.enter()
    weight.mul_(7)
    mean.leave()
    mean.leave()  # nothing more
    assert weight.tolist() == [1, 1]
    mean.enter()
    assert weight.tolist() == [1, 1]
