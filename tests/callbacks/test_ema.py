"""What the average is, under every way of cutting the samples into steps."""

from typing import Any

import pytest
import torch
from harness import Classifier, assert_accurate, dataset, fit, loader, run_distributed, same_weights
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn
from torch.utils.data import DataLoader, SequentialSampler

from lightning_ext.callbacks import EMA, AdaptiveBatchSize
from lightning_ext.data import AdaptiveBatchSampler
from lightning_ext.scaling import half_life_to_decay


def flat(module: nn.Module) -> Tensor:
    return nn.utils.parameters_to_vector(module.parameters()).detach().clone()


def averaged(ema: EMA, module: LightningModule) -> Tensor:
    with ema.swap(module):
        return flat(module)


class Trace(Callback):
    """Keeps samples and weights of every optimizer step."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.begin = flat(pl_module).double()
        self.steps: list[tuple[int, Tensor]] = []
        self.samples = 0

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.samples += len(batch[0])
        if trainer.global_step > len(self.steps):
            self.steps.append((self.samples, flat(pl_module).double()))
            self.samples = 0

    def average(self, decay: float, reference_batch: int, every_n_steps: int = 1) -> Tensor:
        average, pending = self.begin, 0
        for step, (samples, weights) in enumerate(self.steps, start=1):
            pending += samples
            if step % every_n_steps == 0:
                rho = decay ** (pending / reference_batch)
                average, pending = rho * average + (1 - rho) * weights, 0
        return average


def constant_net(module: Classifier, value: float) -> None:
    for parameter in module.parameters():
        nn.init.constant_(parameter, value)


class DropToZero(Callback):
    """Sets all weights to 0 once the average has begun."""

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        constant_net(pl_module, 0.0)
        trainer.optimizers[0].param_groups[0]["lr"] = 0.0


def test_training_does_not_notice_it() -> None:
    plain, _ = fit(val=loader(shuffle=False))
    watched, _ = fit([EMA(0.9)], val=loader(shuffle=False))
    assert same_weights(plain, watched)
    assert plain.losses == watched.losses


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("every_n_steps", [1, 2, 3])
def test_it_is_the_average_with_the_decay_of_each_steps_samples(
    every_n_steps: int, accumulate: int
) -> None:
    trace, ema = Trace(), EMA(0.9, every_n_steps=every_n_steps)
    module, _ = fit([trace, ema], train=loader(94), accumulate_grad_batches=accumulate)
    assert {samples for samples, _ in trace.steps} == {4 * accumulate, 4 * accumulate - 2}
    assert_accurate(averaged(ema, module), trace.average(0.9, 4 * accumulate, every_n_steps))


def test_it_follows_a_batch_that_grows() -> None:
    trace, ema = Trace(), EMA(0.9)
    schedule = AdaptiveBatchSize("0:8 40:16")
    module, _ = fit([trace, ema, schedule], train=loader(94))
    assert [samples for samples, _ in trace.steps][:9] == [8] * 6 + [16] * 2 + [14]
    assert_accurate(averaged(ema, module), trace.average(0.9, 8))


def test_a_given_reference_batch_is_what_the_decay_belongs_to() -> None:
    trace, ema = Trace(), EMA(0.9, reference_batch=32)
    module, _ = fit([trace, ema])
    assert_accurate(averaged(ema, module), trace.average(0.9, 32))


@pytest.mark.parametrize(("micro_batch", "accumulate"), [(1, 1), (2, 3), (4, 2), (12, 1), (24, 2)])
@pytest.mark.parametrize("every_n_steps", [1, 2])
def test_a_sample_weighs_half_after_a_half_life(
    micro_batch: int, accumulate: int, every_n_steps: int
) -> None:
    decay = half_life_to_decay(48, 8)
    ema = EMA(decay, reference_batch=8, every_n_steps=every_n_steps)
    module = Classifier("sgd").double()
    constant_net(module, 1.0)
    train = loader(48 * every_n_steps, micro_batch, dtype=torch.float64)
    fit(
        [ema, DropToZero()],
        module=module,
        train=train,
        accumulate_grad_batches=accumulate,
        max_epochs=1,
    )
    left = torch.full_like(flat(module), 0.5**every_n_steps)
    assert_accurate(averaged(ema, module), left)


def test_a_warm_up_holds_the_decay_down_at_first() -> None:
    trace, ema = Trace(), EMA(0.5, warmup=True)
    module, _ = fit([trace, ema], max_steps=12)
    average = trace.begin
    for step, (_, weights) in enumerate(trace.steps, start=1):
        rho = min(0.5, (1 + step) / (10 + step))
        average = rho * average + (1 - rho) * weights
    assert_accurate(averaged(ema, module), average)


def test_float_buffers_are_averaged_and_integer_buffers_copied() -> None:
    means: list[Tensor] = []

    class Record(Callback):
        def on_train_batch_end(
            self, trainer: Trainer, pl_module: LightningModule, *args: Any
        ) -> None:
            means.append(pl_module.get_buffer("net.1.running_mean").double())

    module, ema = Classifier(), EMA(0.9)
    module.net[1] = nn.BatchNorm1d(12)
    fit([Record(), ema], module=module, accumulate_grad_batches=1, max_steps=20)
    average = torch.zeros(12, dtype=torch.float64)
    for mean in means:
        average = 0.9 * average + 0.1 * mean
    with ema.swap(module):
        assert module.get_buffer("net.1.num_batches_tracked") == 20
        assert_accurate(module.get_buffer("net.1.running_mean"), average)


def test_bfloat16_parameters_are_averaged_in_float32() -> None:
    module, trace, ema = Classifier(), Trace(), EMA(0.9999)
    module.bfloat16()
    train = loader(dtype=torch.bfloat16)
    fit([trace, ema], module=module, train=train)
    assert ema._average is not None
    kept = ema._average._tensors
    assert {tensor.dtype for tensor in kept.values()} == {torch.float32}
    assert_accurate(nn.utils.parameters_to_vector(kept.values()), trace.average(0.9999, 8))


def test_complex_parameters_are_averaged() -> None:
    module, ema = Classifier("sgd"), EMA(0.5)
    module.phase = nn.Parameter(torch.ones(1, dtype=torch.complex64))
    fit([ema, DropToZero()], module=module, max_steps=2)
    with ema.swap(module):
        assert module.phase.item() == 0.25


def test_shared_weights_are_averaged_once() -> None:
    module, trace, ema = Classifier(dropout=0), Trace(), EMA(0.9)
    module.net.extend([nn.Linear(3, 12), nn.Linear(12, 3)])
    module.net[5].weight = module.net[3].weight
    fit([trace, ema], module=module)
    assert_accurate(averaged(ema, module), trace.average(0.9, 8))


def test_all_tensors_are_averaged_in_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    lerp = torch._foreach_lerp_

    def counted(averages: list[Tensor], *args: Any) -> None:
        sizes.append(len(averages))
        lerp(averages, *args)

    monkeypatch.setattr(torch, "_foreach_lerp_", counted)
    fit([EMA(0.9)], max_steps=3)
    assert sizes == [4, 4, 4]


def test_the_module_is_never_copied() -> None:
    class Single(Classifier):
        def __deepcopy__(self, memo: Any) -> Any:
            raise AssertionError("the module was copied")

    ema = EMA(0.9)
    fit([ema], module=Single(), val=loader(shuffle=False))
    assert ema.updates == 24


class Overflows(Classifier):
    """The gradient of the fourth batch is infinite."""

    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.fused = fused

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        return loss * float("inf") if len(self.seen) == 4 else loss

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-2, fused=self.fused)


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_that_the_gradient_scaler_skipped_is_not_averaged(fused: bool) -> None:
    trace, ema = Trace(), EMA(0.9)
    amp = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))
    module, _ = fit([trace, ema], module=Overflows(fused), plugins=amp, max_steps=12)
    assert torch.equal(trace.steps[0][1], trace.steps[1][1])
    del trace.steps[1]
    assert ema.updates == 11
    assert_accurate(averaged(ema, module), trace.average(0.9, 8))


class Manual(Classifier):
    """Steps at every third batch by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        self.manual_backward(loss)
        if len(self.seen) % 3 == 0:
            self.optimizers().step()
            self.optimizers().zero_grad()
        return loss


def test_manual_optimization_that_accumulates_counts_all_its_samples() -> None:
    trace, ema = Trace(), EMA(0.9, reference_batch=4)
    module, _ = fit([trace, ema], module=Manual(), accumulate_grad_batches=1)
    assert {samples for samples, _ in trace.steps} == {12}
    assert_accurate(averaged(ema, module), trace.average(0.9, 4))


def average_over(processes: int) -> Tensor:
    data = dataset(94, torch.float64)
    batches = AdaptiveBatchSampler(SequentialSampler(data), 4)
    ema = EMA(0.9)
    module, _ = fit(
        [AdaptiveBatchSize("0:8 40:16"), ema],
        module=Classifier("adamw", dropout=0).double(),
        train=DataLoader(data, batch_sampler=batches),
        strategy="ddp" if processes > 1 else "auto",
        devices=processes,
        accumulate_grad_batches=2 // processes,
    )
    return averaged(ema, module)


def test_two_processes_average_as_one_with_twice_the_accumulation() -> None:
    whole = average_over(1)
    for part in run_distributed(average_over, args=(2,)):
        assert_accurate(part, whole)


@pytest.mark.parametrize("decay", [0.0, 1.0, -0.1, float("nan")])
def test_a_decay_outside_its_range_is_refused(decay: float) -> None:
    with pytest.raises(ValueError, match=r"decay was .*above 0 and below 1"):
        EMA(decay)


@pytest.mark.parametrize("name", ["every_n_steps", "reference_batch"])
def test_a_count_below_one_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} was 0"):
        EMA(**{name: 0})
