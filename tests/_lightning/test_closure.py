"""A batch that does not fit into memory is run again in parts, and training goes on as without."""

from __future__ import annotations

import gc
import os
import weakref
from collections.abc import Callable, Iterator
from contextlib import nullcontext, suppress
from typing import Any

import pytest
import torch
from harness import Classifier, assert_accurate, fit, loader, run_distributed, same_weights
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_ext._lightning import is_out_of_memory, recover_from_oom, runs_in_parts

pytestmark = pytest.mark.filterwarnings("ignore:A micro-batch of .* ran out of memory:UserWarning")


def no_memory() -> BaseException:
    return torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB.")


class FailingBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, error: Callable[[], BaseException]) -> Tensor:
        ctx.error = error
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        raise ctx.error()


class Limited(Classifier):
    """Has room for so many samples, from a batch of the run on."""

    def __init__(
        self,
        limit: int = 10**9,
        where: str = "forward",
        since: int = 0,
        optimizer: str = "sgd",
        error: Callable[[], BaseException] = no_memory,
    ) -> None:
        super().__init__(optimizer, dropout=0.0)
        self.double()
        self.limit, self.where, self.since = limit, where, since
        self.error = error
        self.failures = 0
        self.sizes: list[int] = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        _, x, y = batch
        self.sizes.append(len(x))
        full = len(x) > self.limit and self.trainer.fit_loop.total_batch_idx >= self.since
        hidden = self.net[:3](x)
        if full:
            self.failures += 1
            if self.where == "forward":
                raise self.error()
            hidden = FailingBackward.apply(hidden, self.error)  # the last layer has its gradient
        loss = nn.functional.cross_entropy(self.net[3](hidden), y)
        self.log("train_loss", loss, on_step=True, on_epoch=True)
        return loss


class Recover(Callback):
    """Recovers, and notes what it was told."""

    def __init__(self, ceiling: int | None = None) -> None:
        self.known = ceiling
        self.ceilings: list[int] = []
        self.reruns: list[int] = []
        self.in_parts: list[bool] = []

    def on_train_start(self, run: Trainer, module: LightningModule) -> None:
        self.handle = recover_from_oom(
            run,
            on_split=self.ceilings.append,
            on_rerun=lambda batch, batch_idx: self.reruns.append(batch_idx),
            ceiling=self.known,
        )

    def on_train_batch_end(self, run: Trainer, *args: Any) -> None:
        self.in_parts.append(runs_in_parts(run))

    def teardown(self, run: Trainer, module: LightningModule, stage: str) -> None:
        self.handle.detach()


def data(num_samples: int = 48, batch_size: int = 8) -> DataLoader[Any]:
    return loader(num_samples, batch_size, dtype=torch.float64)


def train(module: Any, *callbacks: Callback, **kwargs: Any) -> Any:
    settings = {"train": data(), "accumulate_grad_batches": 3} | kwargs
    return fit(callbacks, module=module, **settings)


def recovered(*callbacks: Callback, accumulate: int = 3, **kwargs: Any) -> tuple[Limited, Recover]:
    module, recover = Limited(**kwargs), Recover()
    train(module, recover, *callbacks, accumulate_grad_batches=accumulate)
    return module, recover


def assert_same_weights(module: nn.Module, other: nn.Module) -> None:
    for found, expected in zip(module.parameters(), other.parameters(), strict=True):
        assert_accurate(found, expected.detach())


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("since", [0, 4, 5])
@pytest.mark.parametrize("where", ["forward", "backward"])
def test_training_ends_where_it_ends_with_room_for_all(
    where: str, since: int, accumulate: int, optimizer: str
) -> None:
    roomy, one = train(Limited(optimizer=optimizer), accumulate_grad_batches=accumulate)
    tight = Limited(4, where, since, optimizer)
    _, other = train(tight, Recover(), accumulate_grad_batches=accumulate)
    assert tight.failures == 1
    assert other.global_step == one.global_step
    assert_same_weights(tight, roomy)


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_it_is_halved_until_it_fits(where: str) -> None:
    roomy, _ = train(Limited())
    tight, recover = recovered(limit=3, where=where, since=4)
    assert recover.ceilings == [2]
    assert tight.failures == 2
    assert_same_weights(tight, roomy)


class PerSample(LightningModule):
    """One weight per sample, which falls by its share of every step that the sample is in."""

    def __init__(self, limit: int, where: str) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.zeros(42, dtype=torch.float64))
        self.limit, self.where = limit, where

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        (index,) = batch
        picked = self.weights[index]
        if len(index) > self.limit and batch_idx >= 2:
            if self.where == "forward":
                raise MemoryError
            picked = picked + FailingBackward.apply(picked, MemoryError)
        return picked.mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=1.0)


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_every_sample_counts_exactly_once(where: str) -> None:
    module = PerSample(2, where)
    indices = DataLoader(TensorDataset(torch.arange(42)), batch_size=7, shuffle=True)
    train(module, Recover(), train=indices, max_epochs=1)
    torch.testing.assert_close(module.weights * 21, -torch.ones(42).double())


def test_a_failure_in_forward_repeats_that_batch_alone() -> None:
    module, recover = recovered(limit=4, where="forward", since=4)
    assert recover.reruns == [4]
    assert module.sizes[:8] == [8, 8, 8, 8, 8, 4, 4, 4]


def test_a_failure_in_backward_repeats_the_window() -> None:
    module, recover = recovered(limit=4, where="backward", since=4)
    assert recover.reruns == [3, 4]
    assert module.sizes[:9] == [8, 8, 8, 8, 8, 4, 4, 4, 4]


def test_a_chunk_that_fails_after_another_repeats_the_window() -> None:
    class Later(Limited):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.limit = 1 if len(self.sizes) == 6 else 4  # the second chunk, of 4 samples
            return super().training_step(batch, batch_idx)

    roomy, _ = train(Limited())
    module, recover = Later(since=4), Recover()
    train(module, recover)
    assert recover.reruns == [4, 3, 4]
    assert recover.ceilings == [2]
    assert_same_weights(module, roomy)


def test_later_batches_run_in_chunks_at_once() -> None:
    module, recover = recovered(limit=5, since=4)
    assert module.failures == 1
    assert set(module.sizes[5:]) == {4}
    assert recover.in_parts == [False] * 4 + [True] * 8


def test_a_ceiling_may_be_known_beforehand() -> None:
    module = Limited(limit=4)
    train(module, Recover(ceiling=3))
    assert module.failures == 0
    assert module.sizes[:3] == [3, 3, 2]


def test_a_later_failure_lowers_the_ceiling_again() -> None:
    class Shrinking(Limited):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.limit = 4 if self.trainer.current_epoch == 0 else 2
            return super().training_step(batch, batch_idx)

    recover = Recover()
    train(Shrinking(), recover)
    assert recover.ceilings == [4, 2]


def test_the_user_is_warned_with_numbers() -> None:
    message = "A micro-batch of 8 samples ran out of memory; .* at most 4"
    with pytest.warns(UserWarning, match=message):
        train(Limited(4), Recover())


def test_without_a_failure_it_is_bitwise_the_run_without_it() -> None:
    one, _ = train(Limited())
    other, _ = train(Limited(), Recover())
    assert same_weights(one, other)


def test_after_detach_the_loop_makes_its_own_closures() -> None:
    recover = Recover()
    _, run = train(Limited(), recover)
    assert "_make_closure" not in vars(run.fit_loop.epoch_loop.automatic_optimization)
    assert not runs_in_parts(run)


def test_a_second_recovery_replaces_the_first() -> None:
    first, second = Recover(), Recover()
    module = Limited(4)
    train(module, first, second)
    assert first.ceilings == []
    assert second.ceilings == [4]


class Keeping(torch.autograd.Function):
    """Keeps its input as long as the graph lives, as functions of one's own may."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.kept = x
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


class Watched(Limited):
    """Looks, before each pass, whether activations of the ones before are still there."""

    def __init__(self, limit: int = 100, where: str = "forward") -> None:
        super().__init__(limit, where)
        self.held: list[weakref.ref[Tensor]] = []
        self.alive: list[bool] = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.alive.extend(ref() is not None for ref in self.held)
        activations = self.net[0](batch[1])
        self.held.append(weakref.ref(activations))
        cycle: list[Any] = [activations]
        cycle.append(cycle)
        kept = Keeping.apply(activations)
        loss = super().training_step(batch, batch_idx) + 0 * kept.sum()
        cycle.clear()
        return {"loss": loss, "kept": kept}


@pytest.fixture
def _no_garbage_collection() -> Iterator[None]:
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("_no_garbage_collection")
@pytest.mark.parametrize("where", ["forward", "backward"])
def test_what_the_failed_pass_held_is_free_before_it_runs_again(where: str) -> None:
    module = Watched(4, where)
    train(module, Recover(), limit_train_batches=1, max_epochs=1)
    assert module.alive == [False, False, False]


@pytest.mark.usefixtures("_no_garbage_collection")
def test_what_a_chunk_held_is_free_before_the_next_one() -> None:
    module = Watched()
    train(module, Recover(ceiling=3), limit_train_batches=1, max_epochs=1)
    assert module.alive == [False, False, False]


def test_batches_are_kept_until_the_step_and_no_longer() -> None:
    class Look(Callback):
        def on_train_batch_end(self, *args: Any) -> None:
            kept.append(len(recover.handle.window))

    kept: list[int] = []
    recover = Recover()
    train(Limited(), recover, Look(), max_epochs=1, train=data(40))
    assert kept == [1, 2, 0, 1, 0]


# What is no lack of memory, or cannot be helped, surfaces as it is.


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_another_error_surfaces_unchanged(where: str) -> None:
    error = RuntimeError("mat1 and mat2 shapes cannot be multiplied")
    with pytest.raises(RuntimeError) as caught:
        train(Limited(4, where, error=lambda: error), Recover())
    assert caught.value is error
    assert not hasattr(error, "__notes__")


def test_one_sample_that_does_not_fit_says_so() -> None:
    message = "A micro-batch of 8 samples was run in parts down to 1, and 1 sample does not fit"
    with pytest.raises(torch.OutOfMemoryError, match=message):
        train(Limited(0), Recover())


def test_an_optimizer_that_repeats_the_closure_is_refused() -> None:
    class Twice(Limited):
        def configure_optimizers(self) -> Any:
            return torch.optim.LBFGS(self.parameters())

    with pytest.raises(torch.OutOfMemoryError, match="LBFGS calls the closure more than once"):
        train(Twice(4), Recover(), accumulate_grad_batches=1)


def test_a_second_call_of_the_closure_is_not_recovered() -> None:
    class Again(Limited):
        def optimizer_step(self, epoch: Any, i: Any, optimizer: Any, closure: Any) -> None:
            closure()
            self.limit = 4
            optimizer.step(closure)

    with pytest.raises(torch.OutOfMemoryError, match="SGD calls the closure more than once"):
        train(Again(), Recover(), accumulate_grad_batches=1)


def test_a_batch_without_one_number_of_samples_is_not_cut() -> None:
    class Padded(Limited):
        def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            return [*batch, torch.zeros(5)]

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return super().training_step(batch[:3], batch_idx)

    with pytest.raises(torch.OutOfMemoryError, match=r"lengths \[5, 8\] in dimension 0"):
        train(Padded(4), Recover())


@pytest.mark.filterwarnings("ignore:.*`dataloader_iter`:UserWarning")
def test_a_step_that_draws_its_batches_is_not_recovered() -> None:
    class Draws(Limited):
        def training_step(self, dataloader_iter: Any) -> Any:
            batch, batch_idx, _ = next(dataloader_iter)
            return super().training_step(batch, batch_idx)

    with pytest.raises(torch.OutOfMemoryError, match="draws its batches from an iterator"):
        train(Draws(4), Recover())


def one_rank_fails(where: str) -> None:
    fails = os.environ["RANK"] == "1"
    # The other rank waits in a reduction until this one is gone; that is not what is tested.
    with nullcontext() if fails else suppress(RuntimeError):
        train(Limited(4 if fails else 100, where), Recover(), strategy="ddp", devices=2)


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_one_rank_of_two_raises_and_names_the_finder(where: str) -> None:
    with pytest.raises(torch.OutOfMemoryError, match=r"a rank of 2 cannot .*MicroBatchFinder"):
        run_distributed(one_rank_fails, args=(where,), timeout=60)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory."), True),
        (MemoryError(), True),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you"), True),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: not enough memory: you tried"), True),
        (RuntimeError("CUDA error: device-side assert triggered"), False),
        (RuntimeError("can't allocate memory"), False),
        (ValueError("DefaultCPUAllocator: can't allocate memory"), False),
    ],
)
def test_which_errors_are_lack_of_memory(error: BaseException, expected: bool) -> None:
    assert is_out_of_memory(error) is expected


# What others see of it.


class Outputs(Callback):
    def __init__(self) -> None:
        self.seen: list[Any] = []

    def on_train_batch_end(self, run: Any, module: Any, outputs: Any, *args: Any) -> None:
        self.seen.append(outputs)


class Rich(Limited):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        index, x, _ = batch
        extra = {"index": index, "names": [str(i) for i in index.tolist()]}
        return {"loss": loss, "scores": self.net(x), "mean": x.mean(), "extra": extra}


def test_outputs_are_those_of_the_whole_batch() -> None:
    whole, parts = Outputs(), Outputs()
    train(Rich(), whole)
    train(Rich(3), parts, Recover())
    for one, other in zip(whole.seen, parts.seen, strict=True):
        torch.testing.assert_close(one["loss"], other["loss"])
        torch.testing.assert_close(one["scores"].detach(), other["scores"])
        torch.testing.assert_close(one["mean"], other["mean"])
        assert one["extra"]["names"] == other["extra"]["names"]
        assert not other["scores"].requires_grad


def test_a_chunk_may_skip_its_loss() -> None:
    class Skips(PerSample):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = super().training_step(batch, batch_idx)
            return None if (batch[0] < 21).all() else loss

    module = Skips(21, "forward")
    indices = DataLoader(TensorDataset(torch.arange(42)), batch_size=42)
    with pytest.warns(UserWarning, match="returned `None`"):
        train(module, Recover(ceiling=21), train=indices, max_epochs=1, accumulate_grad_batches=1)
    assert module.weights.tolist() == [0.0] * 21 + [-1 / 42] * 21


def test_epoch_means_weigh_chunks_by_their_samples() -> None:
    class Indexed(Limited):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.log("index", batch[0].double().mean(), on_epoch=True)
            return super().training_step(batch, batch_idx)

    _, run = train(Indexed(), Recover(ceiling=3), max_epochs=1)
    assert run.callback_metrics["index_epoch"].item() == pytest.approx(23.5)


def test_what_is_logged_after_the_batch_counts_as_the_batch() -> None:
    class Indexed(Limited):
        def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
            self.log("index", batch[0].double().mean(), on_step=False, on_epoch=True)

    _, run = train(Indexed(), Recover(ceiling=3), max_epochs=1, train=data(44))
    assert run.callback_metrics["index"].item() == pytest.approx(21.5)


def test_a_batch_that_was_logged_is_not_logged_again() -> None:
    class Counts(Limited):
        def on_after_backward(self) -> None:
            self.log("backwards", 1.0, on_step=False, on_epoch=True, reduce_fx="sum")

    _, run = train(Counts(4, "backward", since=2), Recover(), max_epochs=1)
    # Two whole batches, then four in two chunks each; the repeated two count once.
    assert run.callback_metrics["backwards"] == 2 + 4 * 2


class Hooks(Callback):
    def __init__(self) -> None:
        self.calls: list[str] = []

    def on_train_batch_start(self, *args: Any) -> None:
        self.calls.append("start")

    def on_before_zero_grad(self, *args: Any) -> None:
        self.calls.append("zero")

    def on_after_backward(self, *args: Any) -> None:
        self.calls.append("backward")

    def on_before_optimizer_step(self, *args: Any) -> None:
        self.calls.append("step")


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_hooks_of_batch_and_step_run_once_those_of_backward_per_chunk(where: str) -> None:
    hooks = Hooks()
    train(Limited(4, where), hooks, Recover(), max_epochs=1, limit_train_batches=1)
    assert hooks.calls == ["start", "zero", "backward", "backward", "step"]


def test_the_hook_that_is_running_is_known_again_afterwards() -> None:
    class Logs(Limited):
        def optimizer_step(self, epoch: Any, i: Any, optimizer: Any, closure: Any) -> None:
            optimizer.step(closure)
            found.append(self._current_fx_name)

    found: list[Any] = []
    train(Logs(4), Recover(), accumulate_grad_batches=1)
    assert set(found) == {"optimizer_step"}


class ScaledFloat64(MixedPrecision):
    """A gradient scaler without the rounding of half precision."""

    def __init__(self) -> None:
        super().__init__("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**10))

    def autocast_context_manager(self) -> torch.autocast:
        return torch.autocast("cpu", enabled=False)


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_a_gradient_scaler_and_clipping_see_the_same_gradient(where: str) -> None:
    roomy, tight = Limited(), Limited(4, where, since=1)
    train(roomy, plugins=[ScaledFloat64()], gradient_clip_val=0.3)
    train(tight, Recover(), plugins=[ScaledFloat64()], gradient_clip_val=0.3)
    assert_same_weights(tight, roomy)
