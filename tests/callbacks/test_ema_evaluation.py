"""Which weights validation and test see, and what is left in the module."""

from pathlib import Path
from typing import Any

import pytest
import torch
from harness import Classifier, dataset, fit, loader, same_weights, trainer
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import OnExceptionCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_ext.callbacks import EMA


def flat(module: nn.Module) -> Tensor:
    return nn.utils.parameters_to_vector(module.parameters()).detach().clone()


class Watched(Classifier):
    """Notes the weights that every validation and test step sees."""

    def __init__(self, fail: bool = False) -> None:
        super().__init__()
        self.fail = fail
        self.evaluated: list[Tensor] = []

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        super().validation_step(batch, batch_idx)
        self.evaluated.append(flat(self))
        if self.fail:
            raise LookupError("in validation")

    test_step = validation_step


class Raw(Callback):
    """Notes the raw weights after the last training batch of an epoch, and after validation."""

    def __init__(self) -> None:
        self.before: list[Tensor] = []
        self.after: list[Tensor] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self.last = flat(pl_module)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.before.append(self.last)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.after.append(flat(pl_module))


def one_batch() -> DataLoader[Any]:
    return DataLoader(dataset(4), batch_size=4)


def averaged(ema: EMA, module: LightningModule) -> Tensor:
    with ema.swap(module):
        return flat(module)


def test_validation_sees_the_average_and_training_gets_its_weights_back() -> None:
    ema, raw = EMA(0.9), Raw()
    module, _ = fit([raw, ema], module=Watched(), val=one_batch())
    assert torch.equal(module.evaluated[-1], averaged(ema, module))
    assert not torch.equal(module.evaluated[-1], raw.before[-1])
    assert all(map(torch.equal, raw.before, raw.after))
    assert torch.equal(flat(module), raw.after[-1])


def test_test_sees_the_average() -> None:
    ema = EMA(0.9)
    module, run = fit([ema], module=Watched())
    end = flat(module)
    run.test(module, one_batch(), verbose=False)
    assert torch.equal(module.evaluated[0], averaged(ema, module))
    assert torch.equal(flat(module), end)


def test_validation_in_the_middle_of_a_window_changes_nothing() -> None:
    plain, _ = fit(val=one_batch(), val_check_interval=3)
    watched, _ = fit([EMA(0.9)], val=one_batch(), val_check_interval=3)
    assert same_weights(plain, watched)


def test_the_sanity_check_sees_the_raw_weights() -> None:
    module = Watched()
    begin = flat(module)
    fit([EMA(0.9)], module=module, val=one_batch(), num_sanity_val_steps=1, max_steps=4)
    assert torch.equal(module.evaluated[0], begin)


def test_nothing_is_swapped_before_the_first_update() -> None:
    module, raw = Watched(), Raw()
    fit([raw, EMA(0.9, every_n_steps=100)], module=module, val=one_batch())
    assert all(map(torch.equal, module.evaluated, raw.before))
    assert len(module.evaluated) == 2


def test_an_exception_in_validation_leaves_the_raw_weights() -> None:
    module, raw = Watched(fail=True), Raw()
    with pytest.raises(LookupError):
        fit([raw, EMA(0.9)], module=module, val=one_batch())
    assert not torch.equal(module.evaluated[0], raw.last)
    assert torch.equal(flat(module), raw.last)


# Lightning's advice to whoever has an OnExceptionCheckpoint, at each of its fits.
@pytest.mark.filterwarnings(
    "ignore:.*fit.ckpt_path=.*checkpoint:UserWarning", "ignore:`.fit.ckpt_path=None:UserWarning"
)
def test_a_checkpoint_on_exception_holds_the_raw_weights(tmp_path: Path) -> None:
    module, raw, saver = Watched(fail=True), Raw(), OnExceptionCheckpoint(tmp_path)
    with pytest.raises(LookupError):
        fit([saver, raw, EMA(0.9)], module=module, val=one_batch(), enable_checkpointing=True)
    saved = torch.load(saver.ckpt_path)["state_dict"]
    module.load_state_dict(saved)
    assert torch.equal(flat(module), raw.last)


def test_the_metrics_of_validation_are_those_of_the_average(tmp_path: Path) -> None:
    ema = EMA(0.9)
    logger = CSVLogger(tmp_path)
    module, run = fit([ema], module=Watched(), val=one_batch(), logger=logger)
    logged = run.callback_metrics["val_loss"].item()
    _, x, y = next(iter(one_batch()))
    with ema.swap(module), torch.no_grad():
        module.eval()
        assert logged == nn.functional.cross_entropy(module.net(x), y).item()


def test_of_several_averages_validation_sees_the_first() -> None:
    slow, fast, raw = EMA(0.99), EMA(0.5), Raw()
    module, _ = fit([slow, fast, raw], module=Watched(), val=one_batch())
    assert torch.equal(module.evaluated[-1], averaged(slow, module))
    assert torch.equal(flat(module), raw.last)


def test_of_several_averages_validation_prefers_the_exported_one() -> None:
    slow, fast = EMA(0.99), EMA(0.5, export=True)
    module, _ = fit([slow, fast], module=Watched(), val=one_batch())
    assert torch.equal(module.evaluated[-1], averaged(fast, module))


def test_several_averages_differ_by_their_decay_alone() -> None:
    together = EMA(0.99), EMA(0.5)
    module, _ = fit(together)
    for ema in (EMA(0.99), EMA(0.5)):
        alone, _ = fit([ema])
        twin = next(other for other in together if other.decay == ema.decay)
        assert torch.equal(averaged(twin, module), averaged(ema, alone))


def test_swaps_may_be_nested() -> None:
    ema = EMA(0.9)
    module, _ = fit([ema])
    end, average = flat(module), averaged(ema, module)
    with ema.swap(module):
        with ema.swap(module):
            assert torch.equal(flat(module), average)
        assert torch.equal(flat(module), average)
    assert torch.equal(flat(module), end)


def test_swaps_of_two_averages_may_be_nested() -> None:
    slow, fast = EMA(0.99), EMA(0.5)
    module, _ = fit([slow, fast])
    end, average = flat(module), averaged(slow, module)
    with slow.swap(module):
        with fast.swap(module):
            assert not torch.equal(flat(module), average)
        assert torch.equal(flat(module), average)
    assert torch.equal(flat(module), end)


def fail_while_swapped(ema: EMA, module: LightningModule) -> None:
    with ema.swap(module):
        raise LookupError


def test_a_swap_ends_with_an_exception() -> None:
    ema = EMA(0.9)
    module, _ = fit([ema])
    end = flat(module)
    with pytest.raises(LookupError):
        fail_while_swapped(ema, module)
    assert torch.equal(flat(module), end)


def test_validation_inside_a_swap_leaves_the_swap_to_its_block() -> None:
    ema = EMA(0.9)
    module, run = fit([ema], module=Watched(), val=one_batch())
    end, average = flat(module), averaged(ema, module)
    with ema.swap(module):
        assert run.validate(module, one_batch(), verbose=False)
        assert torch.equal(flat(module), average)
    assert torch.equal(flat(module), end)


def test_a_swap_before_training_does_nothing() -> None:
    module = Classifier()
    begin = flat(module)
    with EMA(0.9).swap(module):
        assert torch.equal(flat(module), begin)


def test_a_file_without_the_average_is_tested_as_it_is(tmp_path: Path) -> None:
    module, run = fit([EMA(0.9)], module=Watched(), max_epochs=1)
    path = tmp_path / "raw.ckpt"
    run.save_checkpoint(path, weights_only=True)
    saved = flat(module)
    run.fit_loop.max_epochs = 2
    run.fit(module, loader())
    run.test(module, one_batch(), ckpt_path=str(path), verbose=False)
    assert torch.equal(module.evaluated[-1], saved)


def test_a_new_process_tests_the_average_of_a_checkpoint(tmp_path: Path) -> None:
    module, run = fit([ema := EMA(0.9)], module=Watched())
    run.save_checkpoint(tmp_path / "whole.ckpt")
    fresh = Watched()
    again = trainer([EMA(0.9)])
    again.test(fresh, one_batch(), ckpt_path=str(tmp_path / "whole.ckpt"), verbose=False)
    assert torch.equal(fresh.evaluated[0], averaged(ema, module))
    assert torch.equal(flat(fresh), flat(module))
