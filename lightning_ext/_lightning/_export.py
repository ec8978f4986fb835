"""Lets weights-only checkpoints hold other weights than the module's present ones.

Private: ``trainer._checkpoint_connector.dump_checkpoint``, which asks
    ``strategy.lightning_module_state_dict`` for the weights; Lightning runs no callback hook for a
    weights-only file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

from lightning.pytorch import LightningModule, Trainer

# Puts the weights for a file into the module, and says whether that changed it.
FileWeights = Callable[[LightningModule], AbstractContextManager[bool]]


class _ExportingDump:
    """Stands in for ``dump_checkpoint``; a class, so that a Trainer can still be pickled."""

    def __init__(self, trainer: Trainer, weights: list[FileWeights]) -> None:
        self.trainer = trainer
        self.weights = weights

    def __call__(self, weights_only: bool | None = None) -> dict[str, Any]:
        connector = self.trainer._checkpoint_connector
        dump = type(connector).dump_checkpoint
        if not weights_only:
            return dump(connector, weights_only)
        with ExitStack() as stack:
            module = self.trainer.lightning_module
            changed = [stack.enter_context(enter(module)) for enter in self.weights]
            checkpoint = dump(connector, weights_only)
            if any(changed):
                # The entries share memory with the module, which gets its own weights back.
                state = checkpoint["state_dict"]
                checkpoint["state_dict"] = {n: t.detach().clone() for n, t in state.items()}
        return checkpoint


def weights_only_checkpoint(
    trainer: Trainer, weights: Callable[[], dict[str, Any]]
) -> dict[str, Any]:
    """What ``trainer.save_checkpoint(weights_only=True)`` would write; all ranks must call.

    Args:
        trainer: The Trainer.
        weights: Gives those of the module as it then is, in place of the strategy's own way.
    """
    own = vars(trainer.strategy)
    own["lightning_module_state_dict"] = weights
    try:
        return trainer._checkpoint_connector.dump_checkpoint(weights_only=True)
    finally:
        del own["lightning_module_state_dict"]


def export_with(trainer: Trainer, weights: FileWeights) -> None:
    """Makes this Trainer's weights-only checkpoints hold what ``weights`` puts in, from now on.

    Args:
        trainer: The Trainer; several may be added, and are entered in that order.
        weights: Given the module, a context with other weights in it.
    """
    own = vars(trainer._checkpoint_connector)
    dump = own.setdefault("dump_checkpoint", _ExportingDump(trainer, []))
    if weights not in dump.weights:
        dump.weights.append(weights)


@contextmanager
def exporting(trainer: Trainer, weights: FileWeights) -> Iterator[None]:
    """Like :func:`export_with`, for the length of a ``with`` block and with no others."""
    own = vars(trainer._checkpoint_connector)
    before = own.get("dump_checkpoint")
    own["dump_checkpoint"] = _ExportingDump(trainer, [weights])
    try:
        yield
    finally:
        del own["dump_checkpoint"]
        if before is not None:
            own["dump_checkpoint"] = before
