"""Train a small GPT on the bytes of source code, or of any text, while a rule sets the batch."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from lightning.pytorch.cli import LightningArgumentParser

from examples.cli import ExampleCLI, quiet
from examples.language_model.data import TextFolder
from examples.language_model.module import GPT

HERE = Path(__file__).resolve().parent


class TextCLI(ExampleCLI):
    """The model's vocabulary and context are those of the data."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Ties what both have to agree on."""
        super().add_arguments_to_parser(parser)
        for name in ("vocabulary", "context"):
            parser.link_arguments(f"data.{name}", f"model.{name}")


def main(args: list[str] | None = None) -> TextCLI:
    """Run the command line."""
    quiet()
    return TextCLI(GPT, TextFolder, HERE, args)


if __name__ == "__main__":
    main()
