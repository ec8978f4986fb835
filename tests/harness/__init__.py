"""Helpers that the tests share."""

from harness._accuracy import assert_accurate
from harness._distributed import run_distributed
from harness._fits import (
    Classifier,
    dataset,
    fit,
    identical,
    loader,
    same_weights,
    trainer,
)

__all__ = [
    "Classifier",
    "assert_accurate",
    "dataset",
    "fit",
    "identical",
    "loader",
    "run_distributed",
    "same_weights",
    "trainer",
]
