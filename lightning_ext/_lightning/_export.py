"""Lets weights-only checkpoints hold other weights than the module's present ones.

Private: ``trainer._checkpoint_connector.dump_checkpoint``; Lightning runs no callback hook for a
    weights-only file.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Protocol

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException


class Swaps(Protocol):
    """Whatever can put other weights into a module for a while."""

    def swap(self, module: LightningModule) -> AbstractContextManager[None]:
        """Puts them in, and back at the end of the ``with`` block."""


class _ExportingDump:
    """Stands in for ``dump_checkpoint``; a class, so that a Trainer can still be pickled."""

    def __init__(
        self, original: Callable[..., dict[str, Any]], trainer: Trainer, weights: Swaps
    ) -> None:
        self.original = original
        self.trainer = trainer
        self.weights = weights

    def __call__(self, weights_only: bool | None = None) -> dict[str, Any]:
        if not weights_only:
            return self.original(weights_only)
        with self.weights.swap(self.trainer.lightning_module):
            checkpoint = self.original(weights_only)
            # The entries share memory with the module, which gets its raw weights back.
            state = checkpoint["state_dict"]
            checkpoint["state_dict"] = {name: t.detach().clone() for name, t in state.items()}
        return checkpoint


def export_with(trainer: Trainer, weights: Swaps) -> None:
    """Makes this Trainer's weights-only checkpoints hold the weights that ``swap`` puts in.

    Raises:
        MisconfigurationException: Another callback does so already.
    """
    connector = trainer._checkpoint_connector
    present = vars(connector).get("dump_checkpoint")
    if present is None:
        vars(connector)["dump_checkpoint"] = _ExportingDump(
            connector.dump_checkpoint, trainer, weights
        )
    elif present.weights is not weights:
        raise MisconfigurationException(
            "Two EMA callbacks have export=True; a weights-only file holds one set of weights."
            " Hint: set it for one, and use ema.export(path) for the other."
        )
