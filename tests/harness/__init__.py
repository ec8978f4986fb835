"""Helpers that the tests share."""

from harness._accuracy import assert_accurate
from harness._branches import branches
from harness._distributed import run_distributed
from harness._fits import (
    Classifier,
    Part,
    Still,
    dataset,
    fit,
    identical,
    loader,
    same_weights,
    trainer,
)
from harness._kernel_case import Cast, KernelCase, variants
from harness._launches import launches
from harness._noise_parts import Follows
from harness._sharded import fsdp2, shard

__all__ = [
    "Cast",
    "Classifier",
    "Follows",
    "KernelCase",
    "Part",
    "Still",
    "assert_accurate",
    "branches",
    "dataset",
    "fit",
    "fsdp2",
    "identical",
    "launches",
    "loader",
    "run_distributed",
    "same_weights",
    "shard",
    "trainer",
    "variants",
]
