"""Values of a step, of which one stands on the progress bar."""

from __future__ import annotations

from collections.abc import Mapping

from lightning.pytorch import LightningModule


def log_step(module: LightningModule, values: Mapping[str, float], *, bar: str) -> None:
    """Log values at this step.

    Args:
        module: that logs.
        values: by name.
        bar: the one that the progress bar shows, too.
    """
    module.log_dict({k: v for k, v in values.items() if k != bar}, on_step=True, on_epoch=False)
    if bar in values:
        module.log(bar, values[bar], on_step=True, on_epoch=False, prog_bar=True)
