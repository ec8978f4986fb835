"""A folder of images by class, as ImageNet is laid out: ``train/<class>/*``, ``val/<class>/*``.

Source: Szegedy et al. 2015, "Going Deeper with Convolutions" (random crops of 8 to 100 % of the
    area, at 3:4 to 4:3); He et al. 2016 (shorter side 256, centre crop 224).
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

ENDINGS = (".jpeg", ".jpg", ".png")
Box = tuple[int, int, int, int]  # left, upper, right, lower


class ImageFolder(Dataset[tuple[Tensor, int]]):
    """The images below one folder a class; classes are numbered by name.

    Args:
        root: With a folder for each class.
        size: Pixels of the square that is cut out.
        augment: Random resized crops and flips; else the centre.

    Raises:
        FileNotFoundError: There is no such folder, no class in it, or a class without images.
    """

    def __init__(self, root: Path, size: int, *, augment: bool) -> None:
        self.size, self.augment = size, augment
        self.classes = class_names(root)
        self.files = [
            (path, number)
            for number, name in enumerate(self.classes)
            for path in images_of(root / name)
        ]

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """Image (3, size, size) as uint8, and its class."""
        from PIL import Image

        path, label = self.files[index]
        with Image.open(path) as opened:
            image = opened.convert("RGB")
        if self.augment:
            image = random_crop(image, self.size)
            if torch.rand(()) < 0.5:
                image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        else:
            image = centre_crop(image, self.size)
        return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous(), label


def class_names(root: Path) -> list[str]:
    """Names of the folders in a folder, in order."""
    found = sorted(x.name for x in root.iterdir() if x.is_dir()) if root.is_dir() else []
    if not found:
        raise FileNotFoundError(
            f"{root} has no folder for each class: looked for {root}/<class>/*, with endings"
            f" {', '.join(ENDINGS)}. Hint: --data.folder is the one that has train and val."
        )
    return found


def images_of(folder: Path) -> list[Path]:
    """Images of a class, in order."""
    found = sorted(x for x in folder.iterdir() if x.suffix.lower() in ENDINGS)
    if not found:
        raise FileNotFoundError(
            f"{folder} has no image: looked for the endings {', '.join(ENDINGS)}."
        )
    return found


def random_box(width: int, height: int) -> Box:
    """A box of 8 to 100 % of the area at 3:4 to 4:3; where ten do not fit, the centre."""
    for _ in range(10):
        area = width * height * torch.empty(()).uniform_(0.08, 1.0).item()
        ratio = math.exp(torch.empty(()).uniform_(math.log(3 / 4), math.log(4 / 3)).item())
        wide, high = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < wide <= width and 0 < high <= height:
            left = int(torch.randint(width - wide + 1, ()))
            upper = int(torch.randint(height - high + 1, ()))
            return left, upper, left + wide, upper + high
    side = min(width, height)
    left, upper = (width - side) // 2, (height - side) // 2
    return left, upper, left + side, upper + side


def random_crop(image: Any, size: int) -> Any:
    """A random box, resized to a square."""
    from PIL import Image

    return image.resize((size, size), Image.Resampling.BILINEAR, box=random_box(*image.size))


def centre_crop(image: Any, size: int) -> Any:
    """The shorter side resized to 8/7 of the size, and the centre of that."""
    from PIL import Image

    scale = size * 8 / 7 / min(image.size)
    wide, high = (max(size, round(side * scale)) for side in image.size)
    resized = image.resize((wide, high), Image.Resampling.BILINEAR)
    left, upper = (wide - size) // 2, (high - size) // 2
    return resized.crop((left, upper, left + size, upper + size))
