"""Modules and Trainers as users have them, under FSDP2."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from harness import run_distributed, trainer
from harness.fsdp2_parts import by_fsdp2, by_one
from harness.mixed_module import Mixed, batches
from harness.strategy_cases import distance, whole
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.utils.checkpoint import checkpoint

from lightning_ext.strategies import FSDP2Strategy

WORDS = torch.tensor([[0, 1, 2, 3]])


class Double(Mixed):
    """In float64 from the start."""

    def __init__(self) -> None:
        super().__init__()
        self.double()


class Returns(Double):
    """Returns more than the loss."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        return {"loss": loss, "kept": {"detached": loss.detach(), "number": 1, "nothing": None}}


class Method(Double):
    """Calls a method of a part, not its forward pass."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        words, following = batch
        return nn.functional.cross_entropy(self.scores(words), following)

    def scores(self, words: Tensor) -> Tensor:
        return self.forward(words)


class Direct(Double):
    """Uses weights themselves, not modules."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        words, following = batch
        x = self.embedding.weight[words].mean(1)
        x = nn.functional.linear(x, self.head.weight) * self.scale
        return nn.functional.cross_entropy(x, following)


class Outside(Double):
    """Calls its parts in hooks, where nobody has gathered anything."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []

    def look(self, x: Tensor) -> None:
        with torch.no_grad():
            self.seen.append(self.head(self.layers[0](x)).clone())

    def on_fit_start(self) -> None:
        self.ones = torch.ones(1, 10, dtype=torch.float64)

    def on_train_start(self) -> None:
        self.look(self.ones)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.look(self.ones)

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.look(self.ones)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.look(self.ones)
        self.seen.append(self(WORDS).detach().clone())

    def on_train_epoch_end(self) -> None:
        self.look(self.ones)


class Recomputed(Double):
    """Layers run again in the backward pass."""

    def forward(self, words: Tensor) -> Tensor:
        x = self.embedding(words).mean(1)
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=False)
        return self.head(x * self.frozen + self.shift) * self.scale


class Wrapped(Double):
    """The same by torch's wrapper."""

    def configure_model(self) -> None:
        from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
            apply_activation_checkpointing,
        )

        kind = type(self.layers[0])
        apply_activation_checkpointing(self, check_fn=lambda one: isinstance(one, kind))


class Sharded(Double):
    """Has sharded a part of it by itself."""

    def configure_model(self) -> None:
        mesh = self.device_mesh
        if mesh is not None and not hasattr(self.layers[0], "unshard"):
            fully_shard(
                self.layers[0], mesh=mesh["data_parallel"], ignored_params={self.layers[0].gain}
            )


class Compiled(Double):
    """One layer is compiled in place, without a backend's work."""

    def configure_model(self) -> None:
        self.layers[0].compile(backend="eager")


def ends(kind: type[Mixed]) -> Any:
    module = kind()
    weights = by_fsdp2(module, 3).weights
    return weights, getattr(module, "seen", [])


KINDS = [
    *(Returns, Method, Direct, Recomputed, Wrapped, Sharded),
    pytest.param(
        Compiled,
        # Dynamo, which looks at each attribute of a parameter.
        marks=pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning"),
    ),
]


@pytest.mark.parametrize("kind", KINDS)
def test_it_trains_as_in_one_process(kind: type[Mixed]) -> None:
    plain = kind if kind in (Method, Direct) else Double
    truth = by_one(plain(), 3).weights
    for found, _ in run_distributed(ends, args=(kind,)):
        named = {name.replace("_checkpoint_wrapped_module.", ""): x for name, x in found.items()}
        assert distance(named, truth) <= 1e-12


def test_parts_called_in_hooks_have_the_weights_of_that_time() -> None:
    module = Outside()
    truth = by_one(module, 3).weights
    for found, seen in run_distributed(ends, args=(Outside,)):
        assert distance(found, truth) <= 1e-12
        pairs = zip(seen, module.seen, strict=True)
        assert all(torch.allclose(x, y, rtol=0, atol=1e-12) for x, y in pairs)


class Looks(Double):
    """Evaluates in each way."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", super().training_step(batch, batch_idx), sync_dist=True)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("test_loss", super().training_step(batch, batch_idx), sync_dist=True)

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self(batch[0])


def one_after_the_other(strategy: Any, world: int) -> Any:
    module, found = Looks(), []
    options: dict[str, Any] = {"devices": world, "use_distributed_sampler": False}
    options |= {"max_epochs": 1, "limit_train_batches": 4, "limit_val_batches": 2}
    for _ in range(2):
        run = trainer(strategy=strategy() if strategy else "auto", **options)
        run.fit(module, batches(), batches())
        found.append(run.callback_metrics["val_loss"].item())
    found += [run.validate(module, batches(), verbose=False)[0]["val_loss"]]
    found += [run.test(module, batches(), verbose=False)[0]["test_loss"]]
    run.predict(module, batches())
    run.fit_loop.max_epochs = 2
    run.fit(module, batches(), batches())
    found.append(run.callback_metrics["val_loss"].item())
    return found, {name: whole(p).detach() for name, p in module.named_parameters()}


def test_a_module_is_fitted_evaluated_and_fitted_again() -> None:
    values, truth = one_after_the_other(None, 1)
    for found, weights in run_distributed(one_after_the_other, args=(FSDP2Strategy, 2)):
        assert found == pytest.approx(values, abs=1e-12)
        assert distance(weights, truth) <= 1e-12


class Logs(Double):
    """Logs on steps and epochs, for the progress bar too."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        self.log("loss", loss, on_step=True, on_epoch=True, prog_bar=True, sync_dist=True)
        return loss


def with_trimmings(folder: Path) -> Any:
    run = trainer(
        strategy="fsdp2",
        devices=2,
        max_epochs=1,
        limit_train_batches=4,
        logger=CSVLogger(folder),
        enable_model_summary=True,
        enable_progress_bar=True,
        enable_checkpointing=True,
    )
    run.fit(Logs(), batches())
    return run.callback_metrics["loss_epoch"].item()


def test_summary_progress_bar_logger_and_checkpoints_work(tmp_path: Path) -> None:
    one, other = run_distributed(with_trimmings, args=(tmp_path,))
    assert one == other
    assert list(tmp_path.glob("**/metrics.csv"))
    assert list(tmp_path.glob("**/*.ckpt"))


class Normalized(Double):
    """Its statistics are of a batch."""

    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm1d(10, dtype=torch.float64)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.bn(self.embedding(batch[0]).mean(1)).sum(), sync_dist=True)


def normalized(sync_batchnorm: bool) -> Any:
    module = Normalized()
    options: dict[str, Any] = {"limit_val_batches": 1, "use_distributed_sampler": False}
    run = trainer(strategy="fsdp2", devices=2, sync_batchnorm=sync_batchnorm, **options)
    run.validate(module, batches(), verbose=False)
    run.validate(module, batches(), verbose=False)
    return isinstance(module.bn, nn.SyncBatchNorm)


@pytest.mark.parametrize("sync_batchnorm", [False, True])
def test_statistics_are_of_all_ranks_if_asked(sync_batchnorm: bool) -> None:
    assert run_distributed(normalized, args=(sync_batchnorm,)) == [sync_batchnorm] * 2


class Stop(Callback):
    """Raises on every rank, in a step."""

    def on_before_backward(self, trainer: Trainer, module: LightningModule, loss: Tensor) -> None:
        if trainer.global_step == 1:
            raise KeyError("of the user")


def after_an_error() -> Any:
    module = Double()
    with pytest.raises(KeyError, match="of the user"):
        by_fsdp2(module, 2, callbacks=[Stop()])
    return by_fsdp2(module, 2).weights


def test_a_module_can_be_fitted_after_an_error_in_a_step() -> None:
    one, other = run_distributed(after_an_error)
    assert distance(one, other) == 0
