"""Runs the command line: ``python -m examples.image_classification fit``."""

from __future__ import annotations

from examples.image_classification.main import main

if __name__ == "__main__":
    main()
