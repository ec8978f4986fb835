"""Image classification by any network, with the groups and the schedule of the suite."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

from lightning_ext.optim import SampleSchedule, param_groups_for

Batch = list[Tensor]  # images and labels
ScheduleCallable = Callable[[Optimizer], SampleSchedule]


class ImageClassifier(LightningModule):
    """Cross-entropy of a network's logits.

    Args:
        network: Maps images (n, channels, height, width) to logits (n, classes).
        optimizer: Makes the optimizer of groups. Its weight decay, and its trust ratio if it has
            one, leave out biases and the parameters of norm layers.
        schedule: Makes a schedule by samples of the optimizer; ``None`` for a constant rate.
        label_smoothing: Share of a label that goes to all classes alike, in [0, 1).

    Raises:
        ValueError: A label smoothing out of range.

    Example:
        >>> from examples.image_classification.network import ResNet
        >>> ImageClassifier(ResNet(), torch.optim.SGD)(torch.zeros(2, 1, 8, 8)).shape
        torch.Size([2, 10])
    """

    def __init__(
        self,
        network: nn.Module,
        optimizer: OptimizerCallable,
        schedule: ScheduleCallable | None = None,
        *,
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__()
        if not 0 <= label_smoothing < 1:
            raise ValueError(f"label_smoothing={label_smoothing}; it must be in [0, 1)")
        self.network = network
        self.optimizer, self.schedule = optimizer, schedule
        self.label_smoothing = label_smoothing

    def forward(self, images: Tensor) -> Tensor:
        """Logits (n, classes)."""
        return self.network(images)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Loss of one micro-batch, with label smoothing."""
        images, labels = batch
        loss = F.cross_entropy(self(images), labels, label_smoothing=self.label_smoothing)
        self.log("loss", loss)
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Logs loss and accuracy, of the average where there is an ``EMA``."""
        hits, loss = self._scores(batch)
        size = len(batch[1])
        self.log("val_loss", loss / size, batch_size=size, prog_bar=True)
        self.log("val_accuracy", hits / size, batch_size=size, prog_bar=True)

    @torch.no_grad()
    def evaluate(self, loader: Iterable[Batch]) -> dict[str, float]:
        """Share of images recognized and cross-entropy in nats, the means over all images."""
        was_training, total = self.training, 0
        sums = torch.zeros(2, dtype=torch.float64)
        self.eval()
        for batch in loader:
            sums += torch.stack(self._scores([part.to(self.device) for part in batch])).cpu()
            total += len(batch[1])
        self.train(was_training)
        return dict(zip(("accuracy", "validation loss"), (sums / total).tolist(), strict=True))

    def _scores(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Hits and summed loss of a batch."""
        images, labels = batch
        logits = self(images).double()
        loss = F.cross_entropy(logits, labels, reduction="sum")
        return (logits.argmax(1) == labels).double().sum(), loss

    def configure_optimizers(self) -> dict[str, object]:
        """The optimizer of groups by role, and its schedule at every step."""
        optimizer = self.optimizer(param_groups_for(self, self.optimizer))
        if self.schedule is None:
            return {"optimizer": optimizer}
        schedule = {"scheduler": self.schedule(optimizer), "interval": "step"}
        return {"optimizer": optimizer, "lr_scheduler": schedule}
