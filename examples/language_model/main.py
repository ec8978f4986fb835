"""Train a small GPT on the bytes of source code, or of any text, while a rule sets the batch."""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

from examples.cli import ExampleCLI, quiet
from examples.language_model.data import TextFolder
from examples.language_model.module import GPT


def main(args: list[str] | None = None) -> ExampleCLI:
    """Run the command line."""
    quiet()
    return ExampleCLI(GPT, TextFolder, HERE, args)


if __name__ == "__main__":
    main()
