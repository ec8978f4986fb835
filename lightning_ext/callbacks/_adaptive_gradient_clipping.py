"""Clips gradients unit by unit, to a share of the norm of their weights.

Source: Brock et al. 2021 (NFNet, arXiv:2102.06171), section 4.1.
Differs: norms are not kept above 1e-6 before they divide; units whose gradient is not finite stay.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer

from lightning_ext import functional
from lightning_ext._lightning import Units, logs_now, step_gradient_scale, view
from lightning_ext.callbacks._arguments import require_bool, require_number
from lightning_ext.callbacks._left_out import left_out, require_patterns, with_gradients


class AdaptiveGradientClipping(Callback):
    r"""Keeps the gradient of every unit below a share of its weights' norm.

    .. math:: G_i \leftarrow \lambda \frac{\max(\|W_i\|, \epsilon)}{\|G_i\|} G_i
        \quad\text{where}\quad \|G_i\| > \lambda \max(\|W_i\|, \epsilon)

    Units are the rows of a ``Linear``, the filters of a convolution, and whole vectors, such as
    biases; of a transposed convolution, whose weight has them in dimension 0, they are the input
    channels, not the filters: ``exclude`` it. It works on the gradient of the whole batch,
    accumulated, averaged and unscaled, before the Trainer's own clipping. Under sharding, norms are
    those of whole units.

    Logs ``clipped_units``, the share of units that were clipped, at the steps that the Trainer
    logs.

    Args:
        clipping: :math:`\lambda`, above 0; 0.01 for batches of about 4096, more for smaller ones.
        eps: :math:`\epsilon`, at least 0, so that weights that begin at 0 can move.
        exclude: Patterns of names of parameters or modules that are left alone, ``["head"]``.
        exclude_classifier: Leave the last ``nn.Linear`` that is trained alone, in the order in
            which modules were registered; which one that is, is told at the start of fit.

    Raises:
        TypeError: An argument of the wrong type.
        ValueError: An argument out of range.
        MisconfigurationException: At the start of fit, if a pattern matches no parameter.
    """

    def __init__(
        self,
        clipping: float = 0.01,
        eps: float = 1e-3,
        *,
        exclude: Sequence[str] | None = None,
        exclude_classifier: bool = True,
    ) -> None:
        require_number("clipping", clipping, above=0)
        require_number("eps", eps, least=0)
        require_bool("exclude_classifier", exclude_classifier)
        self.clipping = clipping
        self.eps = eps
        self.exclude = require_patterns("exclude", exclude)
        self.exclude_classifier = exclude_classifier
        self._left_out: frozenset[str] = frozenset()
        self._last: tuple[Units, list[Tensor]] | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Everything but tensors of the last step."""
        return self.__dict__ | {"_last": None}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Finds what is left out, and tells it."""
        self._left_out = left_out(
            trainer, type(self).__name__, self.exclude, classifier=self.exclude_classifier
        )

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        """Clips."""
        self._last = None
        params = with_gradients(trainer, optimizer, self._left_out)
        seen = view(trainer)
        if not (params or seen.cuts_batches):
            return
        units = Units(params, seen)
        clipped = functional.unitwise_clip_(
            units.weights(),
            units.grads(),
            self.clipping * step_gradient_scale(trainer, optimizer),
            eps=self.eps,
            norms=units.norms,
        )
        self._last = units, clipped

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Logs where the Trainer does."""
        if self._last is not None and logs_now(trainer):
            units, clipped = self._last
            total, count = units.total(clipped), units.count
            if count:
                pl_module.log("clipped_units", total / count, on_step=True, on_epoch=False)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Lets go of the last step."""
        self._last = None
