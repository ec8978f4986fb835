"""Helpers that the tests share."""

from harness._accuracy import assert_accurate
from harness._branches import branches
from harness._distributed import run_distributed
from harness._faults import Fault
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
from harness._nodes import can_make_nodes, run_on_nodes, sent_by_node
from harness._noise_parts import Follows
from harness._sharded import fsdp2, fsdp2_strategy, shard

__all__ = [
    "Cast",
    "Classifier",
    "Fault",
    "Follows",
    "KernelCase",
    "Part",
    "Still",
    "assert_accurate",
    "branches",
    "can_make_nodes",
    "dataset",
    "fit",
    "fsdp2",
    "fsdp2_strategy",
    "identical",
    "launches",
    "loader",
    "run_distributed",
    "run_on_nodes",
    "same_weights",
    "sent_by_node",
    "shard",
    "trainer",
    "variants",
]
