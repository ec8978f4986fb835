"""The Python standard library's sources, or any folder of text, as windows of bytes."""

from __future__ import annotations

import sysconfig
from hashlib import sha256
from pathlib import Path

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

NOT_SOURCES = {"site-packages", "__pycache__", "test", "tests", "idle_test"}


class Windows(Dataset[Tensor]):
    """Rows of bytes as a map-style data set.

    Args:
        rows: uint8, (windows, context + 1).
    """

    def __init__(self, rows: Tensor) -> None:
        self.rows = rows

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
        context: Bytes that are predicted in a window; it has one more.
        micro_batch: Windows of a training batch.
        max_bytes: At most as many are read.
        validation_windows: At most as many, spread evenly over the validation files.

    Raises:
        ValueError: The folder has no text for both sides.

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
    ) -> None:
        super().__init__()
        self.micro_batch = micro_batch
        root = Path(sysconfig.get_paths()["stdlib"]) if folder is None else Path(folder)
        skipped = NOT_SOURCES if folder is None else set()
        found = text_files(root, pattern or ("*" if folder else "*.py"), skipped)
        self.train_files, self.validation_files, sides = read(root, found, max_bytes)
        train, validation = (cut(side, context) for side in sides)
        if not (len(train) and len(validation)):
            raise ValueError(
                f"{root} has {len(found)} files: {len(train)} windows to train on and"
                f" {len(validation)} to validate, in the first {max_bytes} bytes. Hint: more files,"
                " one in ten is for validation; or a larger max_bytes."
            )
        even = torch.linspace(0, len(validation) - 1, min(validation_windows, len(validation)))
        self.train, self.validation = Windows(train), Windows(validation[even.long()])

    def train_dataloader(self) -> DataLoader[Tensor]:
        """Shuffled micro-batches, (micro_batch, context + 1)."""
        return DataLoader(self.train, batch_size=self.micro_batch, shuffle=True)

    def val_dataloader(self) -> DataLoader[Tensor]:
        """The validation windows, in order."""
        return DataLoader(self.validation, batch_size=128)


def text_files(root: Path, pattern: str, skipped: set[str]) -> list[str]:
    """Paths below the root, in the order of their hashes; hidden ones are left out."""
    paths = (path.relative_to(root) for path in root.rglob(pattern) if path.is_file())
    kept = (p for p in paths if not skipped & set(p.parts) and all(x[0] != "." for x in p.parts))
    return sorted((path.as_posix() for path in kept), key=_hash)


def read(root: Path, files: list[str], max_bytes: int) -> tuple[list[str], list[str], list[bytes]]:
    """Names of the files of both sides, and the bytes of each side."""
    names: tuple[list[str], list[str]] = ([], [])
    texts = [bytearray(), bytearray()]
    for name in files:
        left = max_bytes - sum(map(len, texts))
        if left <= 0:
            break
        side = int(_hash(name)[-1] % 10 == 0)
        names[side].append(name)
        texts[side] += (root / name).read_bytes()[:left]
    return *names, [bytes(text) for text in texts]


def cut(text: bytes, context: int) -> Tensor:
    """Rows of context + 1 bytes that do not overlap; the rest is dropped."""
    rows = len(text) // (context + 1)
    used = torch.tensor(list(text[: rows * (context + 1)]), dtype=torch.uint8)
    return used.view(rows, context + 1)


def _hash(name: str) -> bytes:
    return sha256(name.encode()).digest()
