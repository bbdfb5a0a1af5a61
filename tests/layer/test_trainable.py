"""Which tables RowAdam refuses, at once and with the way out."""

import pytest
import torch
from torch import nn

from pkmem import RowAdam
from pkmem.layer.values import ValueTable


class OnApplesGpu(nn.Parameter):
    """A weight on the CPU that says it is on a device which no other machine has."""

    @property
    def device(self) -> torch.device:
        """Apple's GPU."""
        return torch.device("mps")


def test_a_table_on_a_device_without_float64_is_refused() -> None:
    table = ValueTable(9, 4)
    table.weight = OnApplesGpu(table.weight.detach())
    with pytest.raises(ValueError, match=r"on Apple's GPU \(mps\), .* no float64.* model\.to\('cpu'\)"):
        RowAdam(table)
    assert table.log is None
