"""Steps of a LightningModule of which one submodule is split over ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from lightning.pytorch import LightningModule
from torch import Tensor

from lightning_ext.strategies._pipeline._engine import Engine
from lightning_ext.strategies._pipeline._evaluation import Evaluation
from lightning_ext.strategies._pipeline._layers import Layers
from lightning_ext.strategies._pipeline._passes import Passes
from lightning_ext.strategies._pipeline._random import align_generators
from lightning_ext.strategies._pipeline._stage import Context, Stage
from lightning_ext.strategies._pipeline._training import Training, Window


class Run:
    """What happens in a step on every rank of a pipeline.

    Args:
        module: The LightningModule.
        layers: What of it is split.
        engine: The local stages.
        members: The same without what data parallelism put around them.
        precision: The context of a forward pass.
        seed: Of the run, the same on all ranks.
        replica: Index of the data-parallel rank.
        num_eval_microbatches: Into how many a call in evaluation is cut at most.
    """

    def __init__(
        self,
        module: LightningModule,
        layers: Layers,
        engine: Engine,
        members: Sequence[Stage],
        precision: Context,
        seed: int,
        replica: int,
        num_eval_microbatches: int = 1,
    ) -> None:
        self._passes = Passes(module, layers, engine, members, precision, seed, replica)
        self._training = Training(self._passes)
        self._evaluation = Evaluation(self._passes, num_eval_microbatches)

    def install(self) -> None:
        """Has the submodule run on all ranks when it is called, from now on."""
        vars(self._passes.layers.owner)["forward"] = self._evaluation.forward

    def begin_fit(self) -> None:
        """Lets the first batch of a fit say how large micro-batches are."""
        self._training.begin_fit()

    def align(self) -> None:
        """Gives all ranks of a pipeline the same generators and outer buffers; all must call."""
        engine = self._passes.engine
        align_generators(engine.group, engine.device)
        self.share_buffers()

    def share_buffers(self) -> None:
        """Gives all ranks of a pipeline what one has changed outside of the stages."""
        self._passes.outside.share()

    def train(
        self,
        step: Callable[[Any], Any],
        batch: Any,
        position: int,
        count: int,
        parts: float,
        *,
        reduces: bool,
    ) -> tuple[Tensor, dict[str, Any]]:
        """Forward and backward pass of a batch; all ranks must call.

        Args:
            step: The user's ``training_step`` of a micro-batch.
            batch: The same on all ranks of a pipeline.
            position: Batches of the fit before this one.
            count: Micro-batches of the first batch, which the size of all of them follows.
            parts: Batches of an optimizer step; more or less where the batch weighs less or more.
            reduces: Whether this batch is the last of them.

        Returns:
            The mean of the losses, and what was logged: (value, options of ``log``) by name.

        Raises:
            MisconfigurationException: On all ranks, before anything is computed.
        """
        found = self._training.step(step, batch, count, Window(position, parts, reduces))
        self.share_buffers()  # what is before the call may read what is changed after it
        return found
