"""The Python standard library's sources, or any folder of text, as windows of bytes or tokens."""

from __future__ import annotations

import sysconfig
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Literal

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from examples.language_model.tokens import BytePairs, Bytes

NOT_SOURCES = {"site-packages", "__pycache__", "test", "tests", "idle_test"}
PIECE_BYTES = 2**24


class Windows(Dataset[Tensor]):
    """Rows of bytes or tokens as a map-style data set.

    Args:
        rows: uint8 or int32, (windows, context + 1).
        bytes_per_token: mean over the tokens that are predicted.
    """

    def __init__(self, rows: Tensor, bytes_per_token: float = 1.0) -> None:
        self.rows = rows
        self.bytes_per_token = bytes_per_token

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Tensor:
        return self.rows[index]

    def __getitems__(self, indices: list[int]) -> list[Tensor]:
        return list(self.rows[indices])


class TextFolder(LightningDataModule):
    """Cuts the files of a folder into windows that do not overlap.

    Each file is on one side only, by a hash of its path: one in ten is for validation. The same
    hash orders the files, so that ``max_bytes`` takes a sample of the folder. Shuffling follows
    the seed of the process.

    Args:
        folder: ``None`` means the standard library's ``*.py`` without its tests.
        pattern: Of the names of files; ``None`` means ``*.py`` in the standard library and every
            file in another folder.
        context: Bytes, or tokens, that are predicted in a window; it has one more.
        micro_batch: Windows of a training batch.
        max_bytes: At most as many are read.
        validation_windows: At most as many, spread evenly over the validation files.
        tokenizer: ``"bytes"``; ``"bpe"`` learns pairs of bytes on the training files first.
        vocabulary: Tokens under ``"bpe"``; there are 256 bytes.

    Raises:
        ValueError: The folder has no text for both sides, or a vocabulary that is too small for
            the bytes, or is not theirs.

    Example:
        >>> data = TextFolder(max_bytes=1_000_000)
        >>> data.train.rows.shape[1]
        65
    """

    def __init__(
        self,
        folder: Path | None = None,
        *,
        pattern: str | None = None,
        context: int = 64,
        micro_batch: int = 16,
        max_bytes: int = 4_000_000,
        validation_windows: int = 512,
        tokenizer: Literal["bytes", "bpe"] = "bytes",
        vocabulary: int = 256,
    ) -> None:
        super().__init__()
        if micro_batch < 1:
            raise ValueError(f"micro_batch was {micro_batch}; it must be at least 1.")
        self.micro_batch = micro_batch
        root = Path(sysconfig.get_paths()["stdlib"]) if folder is None else Path(folder)
        skipped = NOT_SOURCES if folder is None else set()
        found = text_files(root, pattern or ("*" if folder else "*.py"), skipped)
        sides = split(root, found, max_bytes)
        self.train_files, self.validation_files = map(list, sides)
        self.tokenizer: Bytes | BytePairs = (
            BytePairs(texts(root, sides[0]), vocabulary)
            if tokenizer == "bpe"
            else Bytes(vocabulary)
        )
        train, validation = (
            cut(self.tokenizer.encode(texts(root, side)), context) for side in sides
        )
        if not (len(train) and len(validation)):
            raise ValueError(
                f"{root} has {len(found)} files: {len(train)} windows to train on and"
                f" {len(validation)} to validate, in the first {max_bytes} bytes. Hint: more files,"
                " one in ten is for validation; or a larger max_bytes."
            )
        even = torch.linspace(0, len(validation) - 1, min(validation_windows, len(validation)))
        self.train, self.validation = map(self._windows, (train, validation[even.long()]))

    def train_dataloader(self) -> DataLoader[Tensor]:
        """Shuffled micro-batches, (micro_batch, context + 1)."""
        return DataLoader(self.train, batch_size=self.micro_batch, shuffle=True)

    def val_dataloader(self) -> DataLoader[Tensor]:
        """The validation windows, in order."""
        return DataLoader(self.validation, batch_size=128)

    def _windows(self, rows: Tensor) -> Windows:
        return Windows(rows, self.tokenizer.bytes_per_token(rows[:, 1:]))


def text_files(root: Path, pattern: str, skipped: set[str]) -> list[str]:
    """Paths below the root, in the order of their hashes; hidden ones are left out."""
    paths = (path.relative_to(root) for path in root.rglob(pattern) if path.is_file())
    kept = (p for p in paths if not skipped & set(p.parts) and all(x[0] != "." for x in p.parts))
    return sorted((path.as_posix() for path in kept), key=_hash)


def split(root: Path, files: list[str], max_bytes: int) -> tuple[dict[str, int], dict[str, int]]:
    """The files of both sides, with as many of their bytes as are read."""
    sides: tuple[dict[str, int], dict[str, int]] = ({}, {})
    left = max_bytes
    for name in files:
        if left <= 0:
            break
        size = min((root / name).stat().st_size, left)
        sides[int(_hash(name)[-1] % 10 == 0)][name] = size
        left -= size
    return sides


def texts(root: Path, side: dict[str, int]) -> Iterator[bytes]:
    """What is read of each file, one after another, large files in pieces."""
    for name, size in side.items():
        with (root / name).open("rb") as file:
            for start in range(0, size, PIECE_BYTES):
                yield file.read(min(PIECE_BYTES, size - start))


def cut(tokens: Tensor, context: int) -> Tensor:
    """Rows of context + 1 tokens that do not overlap; the rest is dropped."""
    rows = len(tokens) // (context + 1)
    return tokens[: rows * (context + 1)].view(rows, context + 1)


def _hash(name: str) -> bytes:
    return sha256(name.encode()).digest()
