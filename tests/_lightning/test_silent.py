"""Steps beside the run: nothing is logged, counted or left behind."""

from collections import OrderedDict, deque
from pathlib import Path
from typing import Any

import pytest
import torch
import torchmetrics
from harness import fit
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn

from lightning_ext._lightning import silent_log, untouched


class Logs(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(6, 3)
        self.mean = torchmetrics.MeanMetric()
        self.both = torchmetrics.MetricCollection(
            {"sum": torchmetrics.SumMetric(), "max": torchmetrics.MaxMetric()}
        )

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self.layer(batch[1]).square().mean()
        self.mean(loss)
        self.log("mean", self.mean)
        self.log_dict(self.both(loss))
        self.logger.log_metrics({"direct": 1.0}, step=batch_idx)
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Again(Callback):
    """Runs every step twice more, silently, before and after the Trainer does."""

    def on_train_batch_start(self, run: Any, module: Any, batch: Any, batch_idx: int) -> None:
        loggers = list(run.loggers)
        with silent_log(module):
            assert torch.isnan(module.mean(torch.ones(1)))
            assert torch.isnan(module.both(torch.ones(1))["max"])
            module.training_step((None, 100 + batch[1]), batch_idx)
        assert run.loggers == loggers

    def on_after_backward(self, run: Any, module: Any) -> None:
        with silent_log(module):
            module.training_step((None, 100 + torch.ones(4, 6)), 0)


def logged(folder: Path, *callbacks: Callback) -> tuple[str, Any]:
    logger = CSVLogger(folder)
    _, run = fit(callbacks, module=Logs(), logger=logger, max_steps=6)
    logger.finalize("success")
    return (Path(logger.log_dir) / "metrics.csv").read_text(), run


def test_nothing_is_logged_or_counted(tmp_path: Path) -> None:
    (with_it, run), (without, plain) = logged(tmp_path / "a", Again()), logged(tmp_path / "b")
    assert with_it == without
    assert "direct" in with_it
    assert run.callback_metrics == plain.callback_metrics


def test_methods_are_put_back_after_an_error(tmp_path: Path) -> None:
    class Fails(Callback):
        def on_train_batch_start(self, run: Any, module: Any, *_: Any) -> None:
            before = {name: dict(vars(child)) for name, child in module.named_modules()}
            with pytest.raises(LookupError), silent_log(module):
                raise LookupError
            after = {name: dict(vars(child)) for name, child in module.named_modules()}
            assert before == after

    logged(tmp_path, Fails())


class Holds(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.child = nn.Dropout()
        self.kept: list[int] = [1]
        self.queue = deque([1, 2], maxlen=2)
        self.named = OrderedDict(a=1, b=2)
        self.members = {1}
        self.number = 1
        self.register_buffer("count", torch.zeros(()))


def change(module: Any) -> None:
    module.kept.append(2)
    module.queue.append(3)
    module.named.move_to_end("a")
    module.members.clear()
    module.number = 2
    module.added = 1
    module.count = module.count + 1
    module.child.eval()
    module.other = nn.Linear(1, 1)
    module.register_forward_hook(lambda *_: None)


def test_attributes_are_put_back() -> None:
    module = Holds()
    kept = module.kept
    with untouched(module):
        change(module)
    assert module.kept is kept
    assert kept == [1]
    assert list(module.queue) == [1, 2]
    assert list(module.named) == ["a", "b"]
    assert module.members == {1}
    assert module.number == 1
    assert not hasattr(module, "added")
    assert module.count == 0
    assert module.child.training
    assert [name for name, _ in module.named_modules()] == ["", "child"]
    assert not module._forward_hooks


def test_attributes_are_put_back_after_an_error() -> None:
    module = Holds()

    def change_and_fail() -> None:
        with untouched(module):
            change(module)
            raise LookupError

    with pytest.raises(LookupError):
        change_and_fail()
    assert module.number == 1
