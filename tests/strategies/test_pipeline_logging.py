"""What steps of a pipeline log, against one process."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import run_distributed
from harness.pipeline_parts import (
    COUNT,
    Chain,
    by_one,
    by_pipeline,
)
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor
from torch.nn import functional as F


class Logs(Chain):
    """Logs in all ways that there are."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        loss = F.cross_entropy(self(x), y)
        ways = {"on_step": True, "on_epoch": True, "sync_dist": True}
        self.log("loss", loss, prog_bar=True, **ways)
        self.log_dict({"double": 2 * loss, "half": loss / 2}, **ways)
        for how in ("mean", "sum", "min", "max"):
            self.log(f"as_{how}", loss, reduce_fx=how, **ways)
        self.log("as_function", loss, reduce_fx=torch.max, **ways)
        self.log("whole", int(y.sum()), **ways)
        self.log("flag", bool(y[0]), **ways)
        self.log("weighted", loss, batch_size=1 + int((y == 0).sum()), **ways)
        if y[0] == 0:
            self.log("in_some", loss, **ways)
        if batch_idx % 8 == 0:
            self.log("in_the_first", loss, on_step=False, on_epoch=True, sync_dist=True)
        for index in range(70):
            self.log(
                f"many_{index}", index * loss.detach(), on_step=False, on_epoch=True, sync_dist=True
            )
        return loss


class Steps(Callback):
    """Keeps what each batch has logged."""

    def __init__(self) -> None:
        self.found: list[float] = []

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        self.found.append(float(trainer.callback_metrics["loss_step"]))


def _logs_by_pipeline(folder: str) -> tuple[Any, ...]:
    logger, steps = CSVLogger(folder), Steps()
    kwargs: dict[str, Any] = {"logger": logger, "log_every_n_steps": 1, "callbacks": [steps]}
    fit = by_pipeline(Logs(), max_epochs=1, **kwargs)
    return fit.metrics, steps.found, _rows(logger)


def _rows(logger: CSVLogger) -> list[dict[str, str]]:
    """What was written; only the first rank writes."""
    file = Path(logger.log_dir) / "metrics.csv"
    return list(csv.DictReader(file.open())) if rank_zero_only.rank == 0 else []


@pytest.fixture(scope="module")
def logs(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    return run_distributed(_logs_by_pipeline, args=(str(tmp_path_factory.mktemp("logs")),))


@pytest.fixture(scope="module")
def one_log() -> tuple[dict[str, float], list[float]]:
    steps = Steps()
    return by_one(Logs(), max_epochs=1, callbacks=[steps]).metrics, steps.found


def test_epochs_log_what_one_process_logs(logs: list[Any], one_log: Any) -> None:
    expected = {k: v for k, v in one_log[0].items() if "many" in k or k.endswith("_epoch")}
    assert len(expected) > 75
    assert {k: logs[0][0][k] for k in expected} == pytest.approx(expected, rel=1e-12)


def test_all_ranks_have_the_same_metrics_under_the_same_names(
    logs: list[Any], one_log: Any
) -> None:
    assert logs[0][0] == logs[1][0]
    assert set(logs[0][0]) == set(one_log[0])


def test_a_step_logs_the_mean_over_micro_batches(logs: list[Any], one_log: Any) -> None:
    micro = torch.tensor(one_log[1], dtype=torch.float64).view(-1, COUNT)
    assert logs[1][1] == pytest.approx(micro.mean(1).tolist(), rel=1e-12)


def test_the_logger_of_the_first_rank_has_the_metrics_of_the_last(logs: list[Any]) -> None:
    written = [float(row["loss_step"]) for row in logs[0][2] if row["loss_step"]]
    assert written == pytest.approx(logs[1][1], rel=1e-12)


def _replicas() -> dict[str, float]:
    return by_pipeline(options={"data_parallel_size": 2}, max_epochs=1).metrics


def test_replicas_log_their_mean() -> None:
    expected = by_one(max_epochs=1).metrics["loss"]
    found = [one["loss"] for one in run_distributed(_replicas, 4)]
    assert found == pytest.approx([expected] * 4, rel=1e-12)
