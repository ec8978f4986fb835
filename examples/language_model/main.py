"""Train a small GPT on the bytes of source code, or of any text, while a rule sets the batch."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from examples.cli import ExampleCLI, quiet
from examples.language_model.data import TextFolder
from examples.language_model.module import GPT


def main(args: list[str] | None = None) -> ExampleCLI:
    """Run the command line."""
    quiet()
    return ExampleCLI(GPT, TextFolder, Path(__file__).parent, args)


if __name__ == "__main__":
    main()
