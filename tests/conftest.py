"""What every test shares: no network, a fixed seed, one thread per worker, and every backend."""

import os
import signal
import sys
from collections.abc import Iterator

os.environ["HF_HUB_OFFLINE"] = "1"  # read when Hugging Face libraries are imported

import pytest
import torch

from pkmem.ops import BACKENDS

ON_CPU = [backend for backend in BACKENDS if backend != "triton"]  # its interpreter has processes to itself


def pytest_configure(config: pytest.Config) -> None:
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # started by a shell with `&`: no test of Ctrl-C would hold
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if hasattr(config, "workerinput"):  # a pytest-xdist worker
        torch.set_num_threads(1)
        os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the processes that tests start


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    """Compiled code of one test does not count towards another's limit of recompilations."""
    yield
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()


@pytest.fixture(scope="session", params=ON_CPU)  # session: Hypothesis may not rerun a narrower fixture
def backend(request: pytest.FixtureRequest) -> str:
    return request.param
