import dataclasses
import json

import numpy as np
import pytest
import torch

from pkmem import MemoryConfig


def test_the_defaults_are_the_papers_memory() -> None:
    config = MemoryConfig(dim=1024)
    assert (config.num_sub_keys, config.heads, config.knn, config.query_norm) == (512, 4, 32, "batch")
    assert config.num_slots == 512**2


@pytest.mark.parametrize(
    ("options", "value_width", "output_dim"),
    [({}, 8, 8), ({"value_dim": 5}, 5, 5), ({"gate": True}, 8, 8), ({"gate": True, "value_dim": 5}, 5, 8)],
)
def test_the_output_is_as_wide_as_a_value_or_as_the_model_behind_a_gate(options, value_width, output_dim) -> None:
    config = MemoryConfig(dim=8, **options)
    assert (config.value_width, config.output_dim) == (value_width, output_dim)


@pytest.mark.case(
    "Gradual surprises",
    "A config with a float, NaN, a quoted number or 'false' out of YAML, None",
    "refused: ValueError with the value and the range",
    "",
)
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"knn": 0}, "knn is 0 but must be an integer >= 1"),
        ({"heads": 2.0}, "heads is 2.0 but must be an integer >= 1"),
        ({"heads": True}, "heads is True but must be an integer >= 1"),
        ({"num_sub_keys": -1}, "num_sub_keys is -1 but must be an integer >= 1"),
        ({"query_dim": None}, "query_dim is None but must be an integer >= 1"),
        ({"query_dim": 7}, "query_dim is 7 but must be even"),
        ({"dim": 0}, "dim is 0 but must be an integer >= 1"),
        ({"value_dim": 0}, "value_dim is 0 but must be an integer >= 1"),
        ({"query_hidden_dim": 0}, "query_hidden_dim is 0 but must be an integer >= 1"),
        ({"num_sub_keys": 8, "knn": 9}, r"knn is 9 but must be in \[1, num_sub_keys = 8\]: lower knn or raise"),
        ({"query_norm": "group"}, "query_norm is 'group' but must be one of 'batch', 'layer', 'rms', 'none'"),
        ({"keys": "cube"}, "keys is 'cube' but must be one of 'product', 'flat'"),
        ({"dropout": 1.0}, r"dropout is 1.0 but must be in \[0, 1\)"),
        ({"query_dropout": -0.1}, r"query_dropout is -0.1 but must be in \[0, 1\)"),
        ({"dropout": float("nan")}, r"dropout is nan but must be in \[0, 1\)"),
        ({"dropout": "1e-1"}, r"dropout is '1e-1' but must be in \[0, 1\)"),
        ({"query_dropout": None}, r"query_dropout is None but must be in \[0, 1\)"),
        ({"dropout": 1 + 0j}, r"dropout is \(1\+0j\) but must be in \[0, 1\)"),
        ({"knn": float("nan")}, "knn is nan but must be an integer >= 1"),
        ({"num_sub_keys": "512"}, "num_sub_keys is '512' but must be an integer >= 1"),
        ({"dim": np.float64(64)}, "dim is 64.0 but must be an integer >= 1"),
        ({"gate": "false"}, "gate is 'false' but must be True or False"),
        ({"experts": 1}, "experts is 1 but must be True or False"),
        ({"query_norm": None}, "query_norm is None but must be one of 'batch', 'layer', 'rms', 'none'"),
    ],
)
def test_a_field_outside_its_range_is_named_with_its_value_and_the_range(options, message) -> None:
    with pytest.raises(ValueError, match=message) as error:
        MemoryConfig(**options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("options", [{"knn": 1, "num_sub_keys": 1}, {"query_dim": 2}, {"dropout": 0.99}])
def test_the_ends_of_the_ranges_are_allowed(options) -> None:
    assert MemoryConfig(**{"knn": 1} | options)


def test_binding_gives_the_width_and_keeps_the_rest() -> None:
    config = MemoryConfig(heads=2, gate=True)
    assert config.bound_to(64) == MemoryConfig(dim=64, heads=2, gate=True)
    assert config.bound_to(64).bound_to(64).bound_dim == 64
    with pytest.raises(ValueError, match="dim=64 but the model is 32 wide"):
        config.bound_to(64).bound_to(32)


@pytest.mark.parametrize("width", ["bound_dim", "value_width", "output_dim"])
def test_a_width_asked_before_binding_is_an_error(width) -> None:
    with pytest.raises(ValueError, match="dim is None: give MemoryConfig the width"):
        getattr(MemoryConfig(), width)


def test_a_config_survives_json() -> None:
    config = MemoryConfig(dim=8, num_sub_keys=9, knn=3, query_hidden_dim=5, query_norm="rms", gate=True, keys="flat")
    assert MemoryConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.case("Gradual surprises", "A config with numbers of NumPy or torch, saved as JSON", "works", "")
def test_numbers_of_numpy_and_torch_become_pythons() -> None:
    config = MemoryConfig(
        dim=np.int64(8), num_sub_keys=torch.tensor(9), knn=np.uint8(3), dropout=np.float32(0.5), gate=np.bool_(True)
    )
    assert config == MemoryConfig(dim=8, num_sub_keys=9, knn=3, dropout=0.5, gate=True)
    assert MemoryConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_an_unknown_option_is_named_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"unknown memory option 'nun_heads': the options are dim, num_sub_keys"):
        MemoryConfig.from_dict({"nun_heads": 4})


def test_a_config_does_not_change() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        MemoryConfig().heads = 2  # type: ignore[misc]
