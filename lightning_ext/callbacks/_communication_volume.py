"""Measures what this rank sends in an optimizer step, per collective, inside its node and beyond.

Source: the convention of ``scaling.collective_traffic``, in which ``scaling.communication_bytes``
    predicts the same numbers.
"""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lightning_ext._lightning import logs_now, steps_now, view
from lightning_ext.callbacks._arguments import require_bool, require_count
from lightning_ext.callbacks._reuse import begins_anew
from lightning_ext.callbacks._wire._count import WireCount
from lightning_ext.callbacks._wire._meter import WireMeter


class CommunicationVolume(Callback):
    """Counts bytes and messages of every n-th optimizer step, on every rank its own.

    A step is counted from the start to the end of each of its batches, without what happens
    between them: validation, checkpoints, and the flag of 8 bytes by which Lightning's rank 0 says
    before each batch whether to stop. See :class:`WireMeter` for what is seen, and how it counts.

    Logs ``communication_bytes``, ``communication_intra_bytes``, ``communication_inter_bytes`` and
    ``communication_messages`` of the last step that was measured, as rank 0 sent them, and
    ``communication_bytes/<collective>``. The first whole step of a fit is measured too, and the
    third, as strategies may check and arrange themselves in the first two.

    Args:
        every_n_steps: Measure every n-th optimizer step; such a step takes longer.
        ranks_per_node: Ranks that share a node; ``None`` takes what the strategy says.
        per_collective: Log the bytes of each collective as well.

    Raises:
        TypeError: An argument of the wrong type.
        ValueError: An argument out of range.
    """

    def __init__(
        self,
        every_n_steps: int = 100,
        *,
        ranks_per_node: int | None = None,
        per_collective: bool = True,
    ) -> None:
        require_count("every_n_steps", every_n_steps)
        require_count("ranks_per_node", ranks_per_node, optional=True)
        require_bool("per_collective", per_collective)
        self.every_n_steps = every_n_steps
        self.ranks_per_node = ranks_per_node
        self.per_collective = per_collective
        #: What this rank sent in the last step that was measured in this fit.
        self.last: WireCount | None = None
        self._node = 1  # its ranks
        self._steps = 0  # that are over
        self._measured = -1  # index of the last one that was measured
        self._steps_of_fit = 0
        self._left = 0  # batches of the running step that are to come
        self._meter: WireMeter | None = None
        self._is_on = False

    def __getstate__(self) -> dict[str, Any]:
        """Everything but the meter of a running step."""
        return self.__dict__ | {"_meter": None, "_is_on": False}

    def values(self) -> dict[str, int]:
        """Returns what there is to log."""
        if self.last is None:
            return {}
        total = self.last.total
        found = {
            "communication_bytes": total.total_bytes,
            "communication_intra_bytes": total.intra_bytes,
            "communication_inter_bytes": total.inter_bytes,
            "communication_messages": total.total_messages,
        }
        for kind, traffic in self.last.by("kind").items() if self.per_collective else ():
            found[f"communication_bytes/{kind}"] = traffic.total_bytes
        return found

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forgets what another fit has sent."""
        if stage == "fit":
            self.last, self._steps_of_fit = None, 0
            if begins_anew(self, pl_module):
                self._steps, self._measured = 0, -1

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Asks which ranks share a node."""
        self._node = self.ranks_per_node or view(trainer).ranks_per_node

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Switches the meter on, at the start of steps that are measured."""
        self._switch_off()
        if batch_idx % trainer.accumulate_grad_batches == 0:
            self._left = trainer.accumulate_grad_batches
            self._meter = WireMeter(self._node) if self._is_due() else None
        self._left -= 1
        if self._meter is not None:
            self._meter.phase = "forward"
            self._meter.__enter__()
            self._is_on = True

    def on_before_backward(
        self, trainer: Trainer, pl_module: LightningModule, loss: Tensor
    ) -> None:
        """Engines that reduce once autograd is through belong to the backward pass as well."""
        if self._meter is not None:
            self._meter.phase = "backward"

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """What follows is the optimizer's."""
        if self._meter is not None:
            self._meter.phase = "other"

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Switches it off, reads it at the end of the step, and logs where the Trainer does."""
        self._switch_off()
        if steps_now(trainer):
            self._end_step(whole=self._left == 0)
        if self.last is not None and logs_now(trainer):
            wide = {n: torch.tensor(x, dtype=torch.float64) for n, x in self.values().items()}
            pl_module.log_dict(wide, on_step=True, on_epoch=False)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Lets go of a step that was broken off."""
        self._let_go()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Lets go of the running step."""
        self._let_go()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Lets go of the running step."""
        self._let_go()

    def state_dict(self) -> dict[str, Any]:
        """Steps, and which of them was measured last."""
        return {"steps": self._steps, "measured": self._measured}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on counting."""
        self._steps, self._measured = state_dict["steps"], state_dict["measured"]

    def _is_due(self) -> bool:
        is_nth = self._steps % self.every_n_steps == 0
        return is_nth or self.last is None or self._steps_of_fit == 2

    def _end_step(self, *, whole: bool) -> None:
        meter, self._meter = self._meter, None
        if meter is not None and whole:
            self.last, self._measured = meter.count, self._steps
            if meter.unknown:
                rank_zero_warn(
                    f"CommunicationVolume does not know {', '.join(sorted(meter.unknown))}, and"
                    " does not count what they send."
                )
        self._steps += 1
        self._steps_of_fit += 1

    def _switch_off(self) -> None:
        if self._is_on and self._meter is not None:
            self._is_on = False
            self._meter.__exit__(None, None, None)

    def _let_go(self) -> None:
        self._switch_off()
        self._meter = None
