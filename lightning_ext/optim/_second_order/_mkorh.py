"""MKOR-H: MKOR that ends as its base.

Source: Mozaffari et al. 2023 (MKOR-H, arXiv:2306.01685).
Differs: see ``_loss_trend``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_ext.optim._second_order._loss_trend import LossTrend
from lightning_ext.optim._second_order._mkor import MKOR
from lightning_ext.optim._second_order._mkor_checks import check_trend
from lightning_ext.optim._second_order._rank_sums import Groups, ranks_of, totals_over
from lightning_ext.optim._second_order._rehearsal import is_rehearsal
from lightning_ext.optim._step._closure import Closure
from lightning_ext.optim._wrappers._wrapper import Wrapper


class MKORH(MKOR):
    """MKOR-H: MKOR until the loss falls slower than a share of its best rate, then its base alone.

    The loss of a step is what :meth:`add_loss` was given, else what the closure returns; where that
    is ``None``, or not finite, the step has none. In Lightning ``callbacks.PolyakLoss`` adds it,
    which a gradient scaler needs, as it hands no closure on.

    Args:
        base: as in ``MKOR``, as is all that follows but the last two.
        module: its layers are looked at.
        every_n_steps: from one update of the factors, and one mean of losses, to the next.
        gamma: what a factor keeps of itself.
        form: ``"damped"`` or ``"average"``.
        threshold: entries of an inverse above it are blended with the identity.
        blend: share of the identity then.
        clip: largest absolute entry of the vectors.
        layers: names or patterns.
        exclude: likewise, of layers that are left to the base.
        factor_dtype: of the inverses.
        loss_scale: by which losses are multiplied before ``backward``.
        unit_gradients: take g/‖g‖ for g.
        average_over_ranks: whether all ranks see different samples.
        hybrid_threshold: the share of the best rate, in (0, 1).
        hybrid_decay: of the moving average of rates, in [0, 1).

    Raises:
        TypeError: as ``MKOR``.
        ValueError: as ``MKOR``.

    Example:
        >>> net = torch.nn.Linear(2, 1)
        >>> optimizer = MKORH(torch.optim.SGD(net.parameters(), lr=0.1), net, hybrid_threshold=0.2)
        >>> optimizer.is_first_order
        False
    """

    def __init__(
        self,
        base: Optimizer,
        module: nn.Module,
        *,
        every_n_steps: int = 10,
        gamma: float = 0.95,
        form: Literal["damped", "average"] = "damped",
        threshold: float = 2.0,
        blend: float = 0.1,
        clip: float = 100.0,
        layers: Sequence[str] | None = None,
        exclude: Sequence[str] = (),
        factor_dtype: torch.dtype | None = None,
        loss_scale: float | Tensor | None = None,
        unit_gradients: bool = False,
        average_over_ranks: bool = True,
        hybrid_threshold: float = 0.1,
        hybrid_decay: float = 0.9,
    ) -> None:
        check_trend(hybrid_threshold, hybrid_decay)
        self._trend_settings = (hybrid_threshold, hybrid_decay)
        self._trend = LossTrend()
        self._added: Tensor | float | None = None
        self._returned: Tensor | float | None = None
        super().__init__(
            base,
            module,
            every_n_steps=every_n_steps,
            gamma=gamma,
            form=form,
            threshold=threshold,
            blend=blend,
            clip=clip,
            layers=layers,
            exclude=exclude,
            factor_dtype=factor_dtype,
            loss_scale=loss_scale,
            unit_gradients=unit_gradients,
            average_over_ranks=average_over_ranks,
        )

    @property
    def is_first_order(self) -> bool:
        """Whether it has gone over to the base alone."""
        return bool(self._trend.over)

    def add_loss(self, loss: Tensor | float) -> None:
        """Add a loss to that of the next step: each one that ``backward`` was called on.

        A base that has such a method gets it too.

        Args:
            loss: a number or a tensor of one entry, on its own scale; with k micro-batches it is
                the k-th part of each one's, as its gradient is. ``zero_grad`` and ``step`` begin
                again at none.
        """
        value = loss.detach().clone() if isinstance(loss, Tensor) else loss
        self._added = value if self._added is None else self._added + value
        to_base = getattr(self.base, "add_loss", None)
        if to_base is not None:
            to_base(loss)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset gradients, and what the passes of a step that was skipped have left.

        Args:
            set_to_none: as in ``torch.optim.Optimizer``.
        """
        self._added = None
        super().zero_grad(set_to_none)

    @torch.no_grad()
    def step(self, closure: Closure | None = None) -> float | None:
        """Take a step.

        Args:
            closure: computes the loss and its gradients; called first.

        Returns:
            What the closure returns.

        Raises:
            RuntimeError: if there has been no finite loss for ``every_n_steps``.
        """
        # MKOR's would run the hooks of a step a second time: torch puts them around each class's.
        return Wrapper.step(self, None if closure is None else partial(self._kept, closure))

    def around_step(self) -> AbstractContextManager[None]:
        """As that of MKOR, with the loss of the step."""
        loss = self._returned if self._added is None else self._added
        self._added = self._returned = None
        if not (self.is_first_order or is_rehearsal(self.param_groups, self._layers)):
            own = math.nan if loss is None else float(loss)
            known = math.isfinite(own)
            self._trend.add(*totals_over(self._ranks(), own if known else 0.0, float(known)))
        return super().around_step()

    def _kept(self, closure: Closure) -> float:
        self._returned = loss = closure()
        return loss

    def _progress(self) -> Tensor:
        return torch.cat([super()._progress(), self._trend.save()])

    def _resume(self, progress: Tensor) -> None:
        super()._resume(progress)
        self._trend = LossTrend.load(progress[1:])

    def _preconditions(self) -> bool:
        return not self.is_first_order

    def _update(self) -> None:
        super()._update()
        never = not self._trend.count and math.isnan(self._trend.last)
        if never and self._steps and any(layer.params() for layer in self._layers):
            raise RuntimeError(
                f"MKOR-H saw no loss that is finite over {self.every_n_steps} steps. Hint: step("
                "closure) with a closure that returns the loss, or optimizer.add_loss(loss) beside"
                " each loss.backward(), which the callback lightning_ext.callbacks.PolyakLoss()"
                " does in Lightning"
            )
        self._trend.close_window(*self._trend_settings)

    def _ranks(self) -> Groups:
        return ranks_of(self._layers[0].weight, self._average)
