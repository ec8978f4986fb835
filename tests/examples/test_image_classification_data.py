"""The images of the example: digits, and readers on small files of their formats."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from examples.image_classification.cifar import Split, read_cifar10
from examples.image_classification.data import Images, cropped_or_flipped, digits
from examples.image_classification.image_folder import ImageFolder, random_box


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is written without a path is seen there."""
    monkeypatch.chdir(tmp_path)


def test_digits_are_the_same_each_time_and_shifted_every_way() -> None:
    (train, validation), (again, _) = digits(1), digits(1)
    plain, plain_validation = digits(0)
    assert torch.equal(train.images, again.images)
    assert torch.equal(validation.images, plain_validation.images)
    assert len(train.labels) == 9 * 1280
    middle = slice(4 * 1280, 5 * 1280)
    assert torch.equal(train.images[middle], plain.images)
    assert torch.equal(train.images[:1280, :, 1:, 1:], plain.images[:, :, :-1, :-1])
    assert not train.images[:1280, :, 0].any()


def cifar(folder: Path, *, binary: bool) -> list[Split]:
    """Six batches of three random images in that folder."""
    random, splits = np.random.default_rng(0), []
    folder.mkdir(parents=True)
    for name in [*(f"data_batch_{k}" for k in range(1, 6)), "test_batch"]:
        rows = random.integers(256, size=(3, 3072), dtype=np.uint8)
        labels = random.integers(10, size=3)
        images = torch.from_numpy(rows).view(3, 3, 32, 32)
        splits.append(Split(images, torch.from_numpy(labels)))
        if binary:
            records = np.concatenate([labels[:, None].astype(np.uint8), rows], 1)
            (folder / f"{name}.bin").write_bytes(records.tobytes())
        else:
            found = {b"data": rows, b"labels": labels.tolist(), b"batch_label": b"1 of 5"}
            (folder / name).write_bytes(pickle.dumps(found, protocol=2))
    return splits


@pytest.mark.parametrize("binary", [False, True])
def test_cifar10_is_read_from_both_versions(tmp_path: Path, binary: bool) -> None:
    name = "cifar-10-batches-bin" if binary else "cifar-10-batches-py"
    splits = cifar(tmp_path / name, binary=binary)
    for folder in (tmp_path, tmp_path / name):
        train, test = read_cifar10(folder)
        assert torch.equal(train.images, torch.cat([x.images for x in splits[:5]]))
        assert torch.equal(train.labels, torch.cat([x.labels for x in splits[:5]]))
        assert torch.equal(test.images, splits[5].images)
        assert test.labels.dtype == torch.int64
    data = Images("cifar10", tmp_path, micro_batch=8)
    images, labels = next(iter(data.train_dataloader()))
    assert (images.shape, images.dtype, len(labels)) == ((8, 3, 32, 32), torch.float32, 8)
    images, _ = next(iter(data.val_dataloader()))
    expected = (splits[5].images[0, 2, 3, 4] / 255 - 0.4465) / 0.2616
    assert images[0, 2, 3, 4].item() == pytest.approx(expected.item(), abs=1e-5)


def test_missing_batches_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"looked for data_batch_1 to.*Hint: unpack"):
        read_cifar10(tmp_path)
    cifar(tmp_path / "some", binary=False)
    (tmp_path / "some" / "data_batch_4").unlink()
    with pytest.raises(FileNotFoundError, match=r"not data_batch_4\. Hint"):
        read_cifar10(tmp_path / "some")


class Evil:
    """Would write a file when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("written"),)


@pytest.mark.parametrize(
    ("found", "message"),
    [
        ({b"data": Evil(), b"labels": []}, "asks for .*arrays and plain types alone"),
        ([1], "no data and labels"),
        ({b"data": np.zeros((2, 9), np.uint8), b"labels": [0, 1]}, r"allowed is uint8 \(n, 3072\)"),
        ({b"data": np.zeros((1, 3072), np.uint8), b"labels": [10]}, "labels other than 0 to 9"),
    ],
)
def test_a_batch_of_another_form_is_refused(tmp_path: Path, found: Any, message: str) -> None:
    cifar(tmp_path / "batches", binary=False)
    (tmp_path / "batches" / "data_batch_1").write_bytes(pickle.dumps(found))
    with pytest.raises(ValueError, match=message):
        read_cifar10(tmp_path / "batches")
    assert not Path("written").exists()


def test_a_cut_binary_batch_is_refused(tmp_path: Path) -> None:
    cifar(tmp_path / "batches", binary=True)
    (tmp_path / "batches" / "data_batch_1.bin").write_bytes(bytes(100))
    with pytest.raises(ValueError, match="has 100 bytes; a batch of CIFAR-10 has 3,073 an image"):
        read_cifar10(tmp_path / "batches")


def test_crops_are_parts_of_the_padded_image_and_half_are_mirrored() -> None:
    image = torch.arange(1, 3 * 8 * 8 + 1, dtype=torch.uint8).view(1, 3, 8, 8)
    padded = nn.functional.pad(image, (4,) * 4)[0]
    parts = [padded[:, i : i + 8, j : j + 8] for i in range(9) for j in range(9)]
    straight = {part.numpy().tobytes() for part in parts}
    mirrored = {part.flip(2).numpy().tobytes() for part in parts}
    found = [x.numpy().tobytes() for x in cropped_or_flipped(image.repeat(200, 1, 1, 1))]
    assert set(found) <= straight | mirrored
    assert 60 < sum(x in straight for x in found) < 140
    assert len(set(found)) > 50


def imagenet(folder: Path) -> Path:
    """Four images of two classes to train on and two to validate, of several forms and sizes."""
    random = np.random.default_rng(0)
    for side, count in (("train", 2), ("val", 1)):
        for number, name in enumerate(("n01", "n02")):
            place = folder / side / name
            place.mkdir(parents=True)
            for k in range(count):
                shape = (40, 60) if number else (60, 40, 3)  # grey, and colours
                pixels = random.integers(256, size=shape, dtype=np.uint8)
                Image.fromarray(pixels).save(place / f"{k}.JPEG")
    return folder


def test_a_folder_is_read_as_imagenet_is(tmp_path: Path) -> None:
    data = Images("imagenet", imagenet(tmp_path), micro_batch=4, image_size=16)
    assert (len(data.train), len(data.validation), data.classes) == (4, 2, 2)
    images, labels = next(iter(data.train_dataloader()))
    assert images.shape == (4, 3, 16, 16)
    assert sorted(labels.tolist()) == [0, 0, 1, 1]
    first, again = (next(iter(data.val_dataloader())) for _ in range(2))
    assert torch.equal(first[0], again[0])
    grey = first[0][1] * torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    grey += torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
    assert torch.allclose(grey[0], grey[2], atol=1e-6)  # in [0, 1] again, all channels alike
    assert 0 <= grey.min() < grey.max() <= 1


def test_validation_cuts_the_centre(tmp_path: Path) -> None:
    place = tmp_path / "n01"
    place.mkdir()
    pixels = np.zeros((70, 140, 3), np.uint8)
    pixels[:, 42:98] = 200  # the middle 56 of 140 columns
    Image.fromarray(pixels).save(place / "a.png")
    image, label = ImageFolder(tmp_path, 56, augment=False)[0]
    assert label == 0
    assert image.shape == (3, 56, 56)
    assert (image[:, :, 4:52] == 200).all()  # of 128 columns 36 to 92; white is 38.4 to 89.6
    assert not image[:, :, [0, -1]].any()


def test_random_boxes_are_inside_and_vary() -> None:
    boxes = [random_box(60, 40) for _ in range(100)]
    assert all(0 <= a < c <= 60 and 0 <= b < d <= 40 for a, b, c, d in boxes)
    assert all(0.07 <= (c - a) * (d - b) / 2400 <= 1 for a, b, c, d in boxes)
    assert len(set(boxes)) > 80
    assert random_box(1000, 10) == (495, 0, 505, 10)


def test_what_a_folder_lacks_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"train has no folder for each class: looked for"):
        Images("imagenet", tmp_path)
    imagenet(tmp_path / "other")
    (tmp_path / "other" / "val" / "n03").mkdir()
    with pytest.raises(FileNotFoundError, match="other classes: n03 in one alone"):
        Images("imagenet", tmp_path / "other")
    (tmp_path / "other" / "train" / "n03").mkdir()
    with pytest.raises(FileNotFoundError, match="n03 has no image: looked for the endings"):
        Images("imagenet", tmp_path / "other")


def test_a_folder_is_asked_for() -> None:
    with pytest.raises(ValueError, match=r"needs the folder of its files\. Hint: --data\.folder"):
        Images("cifar10")
    with pytest.raises(ValueError, match="choose one of digits, cifar10, imagenet"):
        Images("mnist")  # type: ignore[arg-type]
