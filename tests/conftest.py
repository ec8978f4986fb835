import os
import random
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch.utils.data import BatchSampler, DataLoader
from tqdm import tqdm

HAS_CUDA = torch.cuda.is_available()
if HAS_CUDA:
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # or matmul is not deterministic
else:
    # Read once, when triton is first imported: none of the imports above does, lightning does.
    os.environ["TRITON_INTERPRET"] = "1"

# Threads of a compiler and of its progress bars, whose locks a forked rank would find taken.
os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"
tqdm.monitor_interval = 0


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not HAS_CUDA:
        _deselect("gpu", config, items)
    if any(item.get_closest_marker("nodes") for item in items):
        from harness import can_make_nodes  # not above: it imports lightning, and that triton

        if not can_make_nodes():
            _deselect("nodes", config, items)


def _deselect(marker: str, config: pytest.Config, items: list[pytest.Item]) -> None:
    marked = [item for item in items if item.get_closest_marker(marker)]
    if marked:
        config.hook.pytest_deselected(items=marked)
        items[:] = [item for item in items if not item.get_closest_marker(marker)]


@pytest.fixture(autouse=True)
def _reproducible() -> Iterator[None]:
    """Same seed, one thread, and fresh memory full of NaN, so that unwritten outputs show."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
    torch.set_default_dtype(torch.float32)


@pytest.fixture(autouse=True)
def _nothing_left_behind() -> Iterator[None]:
    """Put the environment back and leave no process group to the next test."""
    environ = dict(os.environ)
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    os.environ.clear()
    os.environ.update(environ)
    for base in (DataLoader, BatchSampler):
        _unpatch(base)


def _unpatch(cls: type) -> None:
    """Take back what Lightning leaves of its patches where a `train_dataloader` hook raises."""
    for name in ("__setattr__", "__delattr__", "__init__"):
        if f"__old{name}" in cls.__dict__:
            setattr(cls, name, cls.__dict__[f"__old{name}"])
            delattr(cls, f"__old{name}")
    for child in cls.__subclasses__():
        _unpatch(child)
