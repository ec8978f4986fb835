"""Helpers that the tests share."""

from harness._accuracy import assert_accurate
from harness._distributed import run_distributed

__all__ = ["assert_accurate", "run_distributed"]
