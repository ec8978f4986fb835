"""Draws every weight vector to norm 1, in the place of weight decay.

Source: Georgiou et al. 2021 (Norm Loss, arXiv:2103.06583), section 3.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from lightning_ext import functional
from lightning_ext._lightning import Units, logs_now, step_gradient_scale, view
from lightning_ext.callbacks._arguments import require_bool, require_number
from lightning_ext.callbacks._left_out import left_out, require_patterns, with_gradients


class NormLoss(Callback):
    r"""Adds the gradient of a penalty on norms to that of the loss.

    .. math:: \lambda \sum_c (1 - \|w_c\|)^2, \qquad
        g_c \leftarrow g_c + 2 \lambda \left(1 - \frac{1}{\|w_c\|}\right) w_c

    over the rows c of every weight of at least two dimensions, flattened: one for each output
    channel. Once per optimizer step, to the gradient of the whole batch and before the Trainer's
    clipping, which so sees the sum. Rows of zeros stay. Under sharding, norms are those of whole
    rows.

    Logs ``norm_loss``, the penalty before the step, at the steps that the Trainer logs.

    Args:
        strength: :math:`\lambda`, at least 0; it takes the place of weight decay.
        exclude_classifier: Leave the last ``nn.Linear`` that is trained alone, in the order in
            which modules were registered; which one that is, is told at the start of fit.
        exclude: Patterns of parameter names that are left alone, such as ``["embedding.*"]``.

    Raises:
        TypeError: An argument of the wrong type.
        ValueError: An argument out of range.
        MisconfigurationException: At the start of fit, if a pattern matches no parameter.
    """

    def __init__(
        self,
        strength: float = 1e-3,
        *,
        exclude_classifier: bool = False,
        exclude: Sequence[str] | None = None,
    ) -> None:
        require_number("strength", strength, least=0)
        require_bool("exclude_classifier", exclude_classifier)
        self.strength = strength
        self.exclude_classifier = exclude_classifier
        self.exclude = require_patterns("exclude", exclude)
        self._left_out: frozenset[str] = frozenset()
        self._last: tuple[Units, list[Tensor]] | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Everything but tensors of the last step."""
        return self.__dict__ | {"_last": None}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Finds what is left out, and looks for weight decay."""
        self._left_out = left_out(
            trainer, type(self).__name__, self.exclude, classifier=self.exclude_classifier
        )
        groups = [group for one in trainer.optimizers for group in one.param_groups]
        decays = sorted({float(group.get("weight_decay") or 0) for group in groups} - {0.0})
        if decays and self.strength:
            rank_zero_warn(
                f"NormLoss takes the place of weight decay, and the optimizer has weight_decay="
                f"{' and '.join(map(str, decays))}: one draws weights to norm 1, the other to 0."
                " Hint: weight_decay=0 for the groups that hold weights."
            )

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        """Adds the gradient."""
        self._last = None
        params = with_gradients(trainer, optimizer, self._left_out, takes=_has_rows)
        seen = view(trainer)
        if not (params or seen.cuts_batches):
            return
        units, scale = Units(params, seen), step_gradient_scale(trainer, optimizer)
        penalties = functional.norm_loss_grad_(
            units.weights(), units.grads(), self.strength * scale, norms=units.norms
        )
        self._last = units, [x / scale for x in penalties] if scale != 1 else penalties

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Logs where the Trainer does."""
        if self._last is not None and logs_now(trainer):
            units, penalties = self._last
            loss = units.total(penalties)
            pl_module.log("norm_loss", loss, on_step=True, on_epoch=False)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Lets go of the last step."""
        self._last = None


def _has_rows(parameter: Parameter) -> bool:
    return parameter.ndim > 1
