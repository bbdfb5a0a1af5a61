"""The devices that a plan can be made for, out of a YAML file, and how long an operator takes on one by its roofline."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Protocol

from pkmem.experiments.family import config_folder
from pkmem.layer.config import require
from pkmem.planning.trace import Operation
from pkmem.planning.wire import Wire
from pkmem.training.reading import check_known, read_yaml

_DTYPES = {"fp32", "bf16"}


class Device(Protocol):
    """How long a device takes for its part of a step."""

    @property
    def name(self) -> str:
        """As it is called."""

    @property
    def memory_bytes(self) -> float:
        """Bytes of its memory."""

    def compute_seconds(self, operation: Operation) -> float:
        """Seconds of an operator's products alone."""

    def memory_seconds(self, operation: Operation) -> float:
        """Seconds of an operator's bytes alone."""

    def wait_seconds(self, operation: Operation) -> float:
        """Seconds until an operator starts."""

    def new_seconds(self, num_bytes: float) -> float:
        """Seconds for memory that a step takes anew from the system."""

    def wire_seconds(self, wire: Wire) -> float:
        """Seconds until so many bytes have arrived."""


@dataclass(frozen=True)
class Roofline:
    """A device by what it does in a second at most; see configs/devices.yaml.

    Args:
        name: of the device.
        memory_gb: its memory, 10^9 bytes, > 0.
        memory_gb_per_s: bandwidth of its memory, > 0.
        row_share: of that bandwidth, what rows read at random reach, in (0, 1].
        tflops: products, 10^12 a second, > 0 for fp32 and bf16.
        link_gb_per_s: one way, from other devices of its host, > 0.
        network_gb_per_s: one way, from other hosts, > 0.

    Raises:
        ValueError: a figure is missing or outside its range.
    """

    name: str
    memory_gb: float
    memory_gb_per_s: float
    row_share: float
    tflops: dict[str, float]
    link_gb_per_s: float
    network_gb_per_s: float

    def __post_init__(self) -> None:
        for name in ("memory_gb", "memory_gb_per_s", "link_gb_per_s", "network_gb_per_s"):
            require(_is_positive(getattr(self, name)), f"{self.name}.{name}", getattr(self, name), "a number > 0")
        require(_is_positive(self.row_share) and self.row_share <= 1, "row_share", self.row_share, "in (0, 1]")
        is_whole = isinstance(self.tflops, dict) and set(self.tflops) == set(_DTYPES)
        is_whole = is_whole and all(map(_is_positive, self.tflops.values()))
        require(is_whole, f"{self.name}.tflops", self.tflops, "numbers > 0 for fp32 and bf16")

    @property
    def memory_bytes(self) -> float:
        """Bytes of its memory."""
        return self.memory_gb * 1e9

    def compute_seconds(self, operation: Operation) -> float:
        """See `Device.compute_seconds`; numbers of two bytes are multiplied at the rate of bf16, all others of fp32."""
        kind = "bf16" if operation.dtype.itemsize == 2 else "fp32"
        return operation.flops / (self.tflops[kind] * 1e12)

    def memory_seconds(self, operation: Operation) -> float:
        """See `Device.memory_seconds`."""
        rows = operation.row_bytes / self.row_share
        return (operation.num_bytes + rows) / (self.memory_gb_per_s * 1e9)

    def wait_seconds(self, operation: Operation) -> float:
        """None: a GPU is told of an operator while it still does others."""
        return 0.0

    def new_seconds(self, num_bytes: float) -> float:
        """None: torch keeps a GPU's memory from step to step."""
        return 0.0

    def wire_seconds(self, wire: Wire) -> float:
        """See `Device.wire_seconds`; bytes of the host and of the network come at the same time."""
        return max(wire.inside / (self.link_gb_per_s * 1e9), wire.between / (self.network_gb_per_s * 1e9))


def read_devices(*files: Path) -> dict[str, Roofline]:
    """The devices of configs/devices.yaml, and of further files, of which the last to name one counts.

    Raises:
        ValueError: a file is not as that one; the message says what is wrong with it.
    """
    devices: dict[str, Roofline] = {}
    for file in (config_folder() / "devices.yaml", *files):
        document = read_yaml(file)
        require(isinstance(document, dict), str(file), document, "a mapping of names to devices")
        devices |= {str(name): _device(str(name), given) for name, given in document.items()}
    return devices


def _device(name: str, given: Any) -> Roofline:
    keys = [field.name for field in fields(Roofline) if field.name != "name"]
    require(isinstance(given, dict), name, given, "a mapping of " + ", ".join(keys))
    for key in given:
        check_known(key, keys, f"figure of {name}")
    for key in keys:
        require(key in given, f"{name}.{key}", None, "there")
    return Roofline(name, **given)


def _is_positive(number: Any) -> bool:
    return isinstance(number, int | float) and not isinstance(number, bool) and number > 0
