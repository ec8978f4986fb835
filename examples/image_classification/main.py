"""Train a network on digits, CIFAR-10 or a folder of images, while a rule sets the batch."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from examples.cli import ExampleCLI, quiet
from examples.image_classification.data import Images
from examples.image_classification.module import ImageClassifier


def main(args: list[str] | None = None) -> ExampleCLI:
    """Run the command line."""
    quiet()
    return ExampleCLI(ImageClassifier, Images, Path(__file__).resolve().parent, args)


if __name__ == "__main__":
    main()
