"""CIFAR-10 from the folders that are published, pickled or binary.

Source: Krizhevsky 2009, "Learning Multiple Layers of Features from Tiny Images"; the files of
    https://www.cs.toronto.edu/~kriz/cifar.html.
Differs: a pickle that asks for more than arrays and plain types is refused, not run.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

RECORD = 1 + 3 * 32 * 32  # a label, and an image by channel and row
PICKLED, BINARY = "cifar-10-batches-py", "cifar-10-batches-bin"
_ARRAYS = {
    (module, name)
    for package in ("numpy.core", "numpy._core")
    for module, name in (
        (f"{package}.multiarray", "_reconstruct"),
        (f"{package}.multiarray", "scalar"),
        (f"{package}.numeric", "_frombuffer"),
    )
} | {("numpy", "ndarray"), ("numpy", "dtype"), ("_codecs", "encode")}


class Split(NamedTuple):
    """Images (n, 3, 32, 32) as uint8, and labels (n,) as int64."""

    images: Tensor
    labels: Tensor


class _ArrayUnpickler(pickle.Unpickler):
    """Makes arrays and plain types, and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ARRAYS:
            raise pickle.UnpicklingError(
                f"it asks for {module}.{name}; a batch of CIFAR-10 has arrays and plain types alone"
            )
        return super().find_class(module, name)


def read_cifar10(folder: Path) -> tuple[Split, Split]:
    """Reads the 50,000 images to train on and the 10,000 to test, or as many as there are.

    Args:
        folder: That of the files, or the one that has it, of the pickled or the binary version.

    Returns:
        What to train on, and what to validate on.

    Raises:
        FileNotFoundError: A file is missing, with all that were looked for.
        ValueError: A file is not of this form.
    """
    tried = [folder, folder / PICKLED, folder / BINARY]
    for place in tried:
        for ending, read in (("", _unpickled), (".bin", _records)):
            names = [f"data_batch_{k}{ending}" for k in range(1, 6)]
            files = [place / name for name in (*names, f"test_batch{ending}")]
            if any(file.is_file() for file in files):
                _check_complete(files)
                *train, test = [_split(file, *read(file)) for file in files]
                return Split(*(torch.cat(part) for part in zip(*train, strict=True))), test
    raise FileNotFoundError(
        f"No batch of CIFAR-10 in {', '.join(map(str, tried))}: looked for data_batch_1 to"
        " data_batch_5 and test_batch, with .bin or without. Hint: unpack"
        f" cifar-10-python.tar.gz or cifar-10-binary.tar.gz into {folder}."
    )


def _check_complete(files: list[Path]) -> None:
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise FileNotFoundError(
            f"{files[0].parent} has some batches of CIFAR-10, not {', '.join(missing)}."
            " Hint: unpack the archive again."
        )


def _unpickled(file: Path) -> tuple[NDArray[Any], NDArray[Any]]:
    """Rows of bytes and labels of a pickled batch."""
    with file.open("rb") as opened:
        try:
            found = _ArrayUnpickler(opened, encoding="bytes").load()
        except pickle.UnpicklingError as error:
            raise ValueError(f"{file} is no batch of CIFAR-10: {error}") from error
    if not (isinstance(found, dict) and {b"data", b"labels"} <= found.keys()):
        raise ValueError(f"{file} is no batch of CIFAR-10: it has no data and labels.")
    return np.asarray(found[b"data"]), np.asarray(found[b"labels"])


def _records(file: Path) -> tuple[NDArray[Any], NDArray[Any]]:
    """Rows of bytes and labels of a binary batch."""
    raw = np.fromfile(file, np.uint8)
    if not len(raw) or len(raw) % RECORD:
        raise ValueError(
            f"{file} has {len(raw):,} bytes; a batch of CIFAR-10 has {RECORD:,} an image."
        )
    rows = raw.reshape(-1, RECORD)
    return rows[:, 1:], rows[:, 0]


def _split(file: Path, rows: NDArray[Any], labels: NDArray[Any]) -> Split:
    if rows.dtype != np.uint8 or rows.shape != (len(labels), RECORD - 1):
        raise ValueError(
            f"{file} has data of {rows.dtype} {rows.shape} for {len(labels)} labels; allowed is"
            f" uint8 (n, {RECORD - 1})."
        )
    if not np.isin(labels, range(10)).all():
        raise ValueError(f"{file} has labels other than 0 to 9.")
    images = torch.from_numpy(rows.copy()).view(-1, 3, 32, 32)
    return Split(images, torch.from_numpy(labels.astype(np.int64)))
