"""Digits, CIFAR-10 or a folder of images, as one LightningDataModule."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, default_collate

from examples.image_classification.cifar import Split, read_cifar10
from examples.image_classification.image_folder import ImageFolder, class_names

MEANS = {"cifar10": (0.4914, 0.4822, 0.4465), "imagenet": (0.485, 0.456, 0.406)}
STDS = {"cifar10": (0.2470, 0.2435, 0.2616), "imagenet": (0.229, 0.224, 0.225)}
PADDING = 4  # pixels of black round an image of CIFAR-10, before it is cropped


class Tensors(Dataset[tuple[Tensor, Tensor]]):
    """Images in memory.

    Args:
        images: (n, channels, height, width).
        labels: (n,).
        change: Of a batch of images, what is random.
    """

    def __init__(
        self, images: Tensor, labels: Tensor, change: Callable[[Tensor], Tensor] | None = None
    ) -> None:
        self.images, self.labels, self.change = images, labels, change

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]) -> list[tuple[Tensor, Tensor]]:
        images = self.images[indices]
        if self.change is not None:
            images = self.change(images)
        return list(zip(images, self.labels[indices], strict=True))


class Normalized:
    """Collates images of bytes to numbers of mean 0 and standard deviation 1.

    Args:
        mean: Of each channel, of 1.
        std: The same.
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        self.mean, self.std = (torch.tensor(x).view(-1, 1, 1) for x in (mean, std))

    def __call__(self, samples: list[Any]) -> list[Tensor]:
        """Images (n, channels, height, width) as float32, and labels."""
        images, labels = default_collate(samples)
        return [(images / 255 - self.mean) / self.std, labels]


class Images(LightningDataModule):
    """Images and labels, in micro-batches.

    Args:
        name: ``"digits"`` of scikit-learn, 8 × 8; ``"cifar10"``, 32 × 32, with random crops and
            flips; ``"imagenet"``, any folder laid out like it, with random resized crops and
            flips.
        folder: Of the files of the last two.
        micro_batch: Images of a training batch.
        num_workers: Processes that read images.
        shifts: Pixels by which digits are shifted each way: each is there (2 · shifts + 1)²
            times. With 1 an epoch has 11,520 images, so that a batch of 2,048 is a part of it.
        image_size: Pixels of images of a folder.

    Raises:
        ValueError: An unknown name, or no folder where one is needed.
        FileNotFoundError: Files are missing, with what was looked for.

    Example:
        >>> data = Images()
        >>> len(data.train), len(data.validation), data.classes
        (11520, 517, 10)
    """

    def __init__(
        self,
        name: Literal["digits", "cifar10", "imagenet"] = "digits",
        folder: Path | None = None,
        *,
        micro_batch: int = 32,
        num_workers: int = 0,
        shifts: int = 1,
        image_size: int = 224,
    ) -> None:
        super().__init__()
        if name not in ("digits", *MEANS):
            raise ValueError(f"name={name!r}; choose one of digits, cifar10, imagenet")
        if folder is None and name != "digits":
            raise ValueError(f"name={name!r} needs the folder of its files. Hint: --data.folder")
        if micro_batch < 1:
            raise ValueError(f"micro_batch was {micro_batch}; it must be at least 1.")
        self.micro_batch, self.num_workers = micro_batch, num_workers
        self.collate = Normalized(MEANS[name], STDS[name]) if name in MEANS else default_collate
        self.train: Dataset[Any]
        self.validation: Dataset[Any]
        self.classes = 10
        if name == "digits":
            train, validation = digits(shifts)
            self.train, self.validation = Tensors(*train), Tensors(*validation)
        elif name == "cifar10":
            train, validation = read_cifar10(Path(folder or ""))
            self.train, self.validation = Tensors(*train, cropped_or_flipped), Tensors(*validation)
        else:
            self.train, self.validation = folders(Path(folder or ""), image_size)
            self.classes = len(self.train.classes)

    def train_dataloader(self) -> DataLoader[Any]:
        """Shuffled micro-batches."""
        return self._loader(self.train, self.micro_batch, shuffle=True)

    def val_dataloader(self) -> DataLoader[Any]:
        """The validation images, in order."""
        return self._loader(self.validation, 256)

    def _loader(self, images: Dataset[Any], micro_batch: int, **order: bool) -> DataLoader[Any]:
        return DataLoader(
            images,
            batch_size=micro_batch,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            pin_memory=torch.cuda.is_available(),
            collate_fn=self.collate,
            **order,
        )


def digits(shifts: int) -> tuple[Split, Split]:
    """1,280 digits in [0, 1], each shifted every way, and 517 as they are; always the same."""
    x, y = load_digits(return_X_y=True)
    images = torch.tensor(x / 16, dtype=torch.float32).view(-1, 1, 8, 8)
    sides = train_test_split(np.arange(len(y)), train_size=1280, random_state=0, stratify=y)
    train, validation = (Split(images[side], torch.tensor(y[side])) for side in sides)
    ways = range(2 * shifts + 1)
    padded = F.pad(train.images, (shifts,) * 4)
    shifted = [padded[:, :, i : i + 8, j : j + 8] for i in ways for j in ways]
    return Split(torch.cat(shifted), train.labels.repeat(len(shifted))), validation


def folders(root: Path, size: int) -> tuple[ImageFolder, ImageFolder]:
    """What is in ``train`` and in ``val``, which have the same classes."""
    known, tested = class_names(root / "train"), class_names(root / "val")
    if known != tested:
        differ = sorted(set(known) ^ set(tested))
        raise FileNotFoundError(
            f"{root}/train and {root}/val have other classes: {', '.join(differ[:5])} in one alone."
        )
    return tuple(ImageFolder(root / x, size, augment=x == "train") for x in ("train", "val"))


def cropped_or_flipped(images: Tensor) -> Tensor:
    """Cuts images (n, channels, side, side) out of their padded selves, and mirrors half."""
    count, _, high, wide = images.shape
    padded = F.pad(images, (PADDING,) * 4)
    top, left = torch.randint(2 * PADDING + 1, (2, count, 1))
    rows, columns = top + torch.arange(high), left + torch.arange(wide)
    mirrored = torch.rand(count, 1) < 0.5
    columns = torch.where(mirrored, columns.flip(1), columns)
    each = torch.arange(count)[:, None, None]
    return padded[each, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
