"""Each private attribute of Lightning that we touch exists and means what we take it to mean."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from harness import Classifier, fit, loader, trainer
from lightning.fabric.plugins.precision.amp import _optimizer_handles_unscaling
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import RichProgressBar, TQDMProgressBar
from lightning.pytorch.loops.evaluation_loop import RestartStage as EvaluationStage
from lightning.pytorch.loops.fit_loop import RestartStage as FitStage
from lightning.pytorch.loops.optimization.automatic import ClosureResult
from lightning.pytorch.loops.training_epoch_loop import RestartStage as EpochStage
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.trainer.connectors.data_connector import _parse_num_batches
from lightning.pytorch.trainer.states import RunningStage
from lightning.pytorch.utilities import CombinedLoader
from torch.amp.grad_scaler import OptState
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import init_device_mesh


class During(Callback):
    """Calls a function once, in the middle of the first epoch."""

    def __init__(self, call: Callable[[Any], None], batch_idx: int = 2) -> None:
        self.call = call
        self.batch_idx = batch_idx
        self.epochs: list[int] = []

    def on_train_batch_end(self, run: Any, module: Any, outputs: Any, batch: Any, i: int) -> None:
        if i == self.batch_idx and run.current_epoch == 0:
            self.call(run)

    def on_train_epoch_end(self, run: Any, module: Any) -> None:
        self.epochs.append(run.fit_loop.batch_idx + 1)


def batches_after(call: Callable[[Any], None]) -> int:
    """Batches of an epoch of 24 in which `call` ran after the third."""
    during = During(call)
    fit([during], max_epochs=1)
    return during.epochs[0]


def test_the_data_source_is_asked_for_the_loader() -> None:
    run = trainer()
    module = Classifier()
    module.train_dataloader = lambda: loader(8)
    source = run.fit_loop._data_source
    source.instance, module.trainer = module, run
    assert source.name == "train_dataloader"
    assert len(source.dataloader()) == 2


def test_the_combined_loader_holds_the_loaders_and_their_limits() -> None:
    def look(run: Any) -> None:
        combined = run.fit_loop._combined_loader
        assert isinstance(combined, CombinedLoader)
        assert combined.flattened == [run.train_dataloader]
        assert combined.limits == combined._iterator.limits == [24]

    assert batches_after(look) == 24


def set_everywhere(run: Any, but: str = "") -> None:
    loop = run.fit_loop
    if but != "limits":
        loop._combined_loader.limits = loop._combined_loader._iterator.limits = [6]
    if but != "length":
        loop._data_fetcher.length = 6
    if but != "max_batches":
        loop.max_batches = 6


def test_the_fetcher_length_and_max_batches_end_the_epoch() -> None:
    assert batches_after(set_everywhere) == 6
    # The one that decides is the fetcher's; without it the loop goes by `max_batches`.
    assert batches_after(lambda run: setattr(run.fit_loop._data_fetcher, "length", 6)) == 6
    assert batches_after(lambda run: setattr(run.fit_loop, "max_batches", 6)) == 6


def test_the_fetcher_reads_the_limits_when_it_begins() -> None:
    def restart(run: Any) -> None:
        run.fit_loop._combined_loader.limits = [5]
        iter(run.fit_loop._data_fetcher)
        assert run.fit_loop._data_fetcher.length == 5
        assert run.fit_loop._data_fetcher.fetched == 0

    batches_after(restart)


def test_val_check_batch_decides_when_validation_runs() -> None:
    validated: list[int] = []

    class Note(Callback):
        def on_validation_start(self, run: Any, module: Any) -> None:
            validated.append(run.fit_loop.batch_idx + 1)

    during = During(lambda run: setattr(run, "val_check_batch", 5))
    fit([during, Note()], val=loader(4, shuffle=False), max_epochs=1)
    assert validated == [5, 10, 15, 20]


def test_the_time_interval_of_validation_is_where_we_look() -> None:
    assert trainer(val_check_interval="00:01:00:00")._val_check_time_interval == 3600.0
    assert trainer()._val_check_time_interval is None


def test_should_accumulate_is_false_exactly_at_steps() -> None:
    found: list[bool] = []

    class Note(Callback):
        def on_train_batch_end(self, run: Any, *args: Any) -> None:
            found.append(run.fit_loop._should_accumulate())

    fit([Note()], train=loader(20), accumulate_grad_batches=3, max_epochs=1)
    assert found == [True, True, False, True, False]


def test_progress_counts_tell_an_open_epoch_from_a_closed_one() -> None:
    seen: dict[str, tuple[int, int, int, int]] = {}

    class Note(Callback):
        def note(self, name: str, run: Any) -> None:
            c = run.fit_loop.epoch_progress.current
            seen[name] = (c.ready, c.started, c.processed, c.completed)

        def on_train_start(self, run: Any, module: Any) -> None:
            self.note("start", run)

        def on_train_epoch_start(self, run: Any, module: Any) -> None:
            self.note("epoch start", run)

        def on_train_batch_end(self, run: Any, *args: Any) -> None:
            self.note("batch", run)

        def on_train_epoch_end(self, run: Any, module: Any) -> None:
            self.note("epoch end", run)

    fit([Note()], max_epochs=1)
    assert seen == {
        "start": (0, 0, 0, 0),
        "epoch start": (1, 0, 0, 0),
        "batch": (1, 1, 0, 0),
        "epoch end": (1, 1, 1, 0),
    }


def test_batch_progress_counts_batches_and_knows_the_last() -> None:
    found: list[tuple[int, bool]] = []

    class Note(Callback):
        def on_train_batch_end(self, run: Any, *args: Any) -> None:
            progress = run.fit_loop.epoch_loop.batch_progress
            found.append((progress.current.ready, progress.is_last_batch))

    fit([Note()], train=loader(12), max_epochs=1)
    assert found == [(1, False), (2, False), (3, True)]


def test_a_loop_forgets_a_restart_when_an_iteration_is_done() -> None:
    loop = trainer().fit_loop
    loop._restarting = loop._resuming_from_checkpoint = True
    loop._restart_stage = FitStage.RESTARTED_MID_EPOCH
    loop.on_iteration_done()
    assert not loop._restarting
    assert not loop.is_resuming
    assert loop._restart_stage == FitStage.NONE


def test_stages_of_a_restart_are_known_by_name() -> None:
    loop = trainer().fit_loop
    loop.epoch_loop._restart_stage = EpochStage.RESTARTED_ON_TRAIN_BATCH_END
    assert loop.epoch_loop.restarted_on_train_batch_end
    loop.epoch_loop.val_loop._restart_stage = EvaluationStage.RESTARTED_MID_EVALUATION
    assert loop.epoch_loop.val_loop.restarted_mid_evaluation


def test_batches_that_stepped_is_the_step_of_the_loggers() -> None:
    _, run = fit(max_epochs=1)
    assert run.fit_loop.epoch_loop._batches_that_stepped == run.global_step == 12


def test_the_loop_knows_its_last_batch_and_the_steps_that_are_logged() -> None:
    found: list[tuple[bool, bool]] = []

    class Note(Callback):
        def on_train_batch_end(self, run: Any, *args: Any) -> None:
            loop = run.fit_loop.epoch_loop
            found.append((loop._is_training_done, run._logger_connector.should_update_logs))

    fit([Note()], max_epochs=-1, max_steps=4, accumulate_grad_batches=1, log_every_n_steps=2)
    assert found == [(False, False), (False, True), (False, False), (True, True)]


def test_callback_metrics_may_be_put_back() -> None:
    _, run = fit(max_epochs=1)
    run._logger_connector._callback_metrics["val_loss"] = torch.tensor(3.0)
    assert run.callback_metrics["val_loss"] == 3.0


def test_on_advance_end_validates_where_it_is_due() -> None:
    due: list[bool] = []

    class Note(Callback):
        def on_train_batch_end(self, run: Any, *args: Any) -> None:
            due.append(run.fit_loop.epoch_loop._should_check_val_fx(run.fit_loop._data_fetcher))

    fit([Note()], train=loader(12), val=loader(4, shuffle=False), max_epochs=1)
    assert due == [False, False, True]


def test_the_distributed_sampler_can_be_switched_off_and_resolved() -> None:
    run = trainer(use_distributed_sampler=False)
    assert run._accelerator_connector.use_distributed_sampler is False
    data = loader(8)
    found = run._data_connector._resolve_sampler(data, shuffle=True, mode=RunningStage.TRAINING)
    assert found is data.sampler  # one process needs none of its own


def test_dump_checkpoint_may_be_overlaid_on_the_connector() -> None:
    _, run = fit(max_epochs=1)
    connector = run._checkpoint_connector
    original = connector.dump_checkpoint
    connector.dump_checkpoint = lambda weights_only=None: original(weights_only) | {"ours": 1}
    saved: list[dict[str, Any]] = []
    run.strategy.save_checkpoint = lambda checkpoint, *args, **kwargs: saved.append(checkpoint)
    run.save_checkpoint("anywhere", weights_only=True)
    assert saved[0]["ours"] == 1


def test_callbacks_and_overfit_batches_are_plain_attributes() -> None:
    callback = Callback()
    run = trainer([callback], overfit_batches=3)
    assert callback in vars(run)["callbacks"]
    assert vars(run)["overfit_batches"] == 3


def test_the_precision_plugin_has_a_scaler_under_16_mixed() -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    plugin = MixedPrecision("16-mixed", "cpu", scaler=scaler)
    assert plugin.scaler is scaler
    assert not hasattr(trainer().precision_plugin, "scaler")


def test_a_ddp_strategy_keeps_the_state_of_its_communication_hook() -> None:
    assert DDPStrategy()._ddp_comm_state is None
    state = object()
    assert DDPStrategy(ddp_comm_state=state)._ddp_comm_state is state


def test_a_ddp_strategy_holds_its_communication_hook() -> None:
    assert DDPStrategy()._ddp_comm_hook is None

    def hook(state: Any, bucket: Any) -> Any:
        return None

    assert DDPStrategy(ddp_comm_hook=hook)._ddp_comm_hook is hook


def test_fused_optimizers_are_those_that_unscale_by_themselves() -> None:
    weights = [torch.nn.Parameter(torch.ones(1))]
    assert not _optimizer_handles_unscaling(torch.optim.Adam(weights))
    assert _optimizer_handles_unscaling(torch.optim.Adam(weights, fused=True))


@pytest.mark.parametrize(("limit", "batches"), [(1.0, 10), (4, 4), (99, 10), (0.55, 5)])
def test_limits_are_parsed_as_the_trainer_does(limit: float, batches: int) -> None:
    assert _parse_num_batches(RunningStage.TRAINING, 10, limit) == batches


def test_the_total_of_the_tqdm_bar() -> None:
    bar = TQDMProgressBar(leave=True)

    def change(run: Any) -> None:
        set_everywhere(run)
        bar._train_progress_bar.total = 6

    during = During(change)
    fit([during, bar], max_epochs=1, enable_progress_bar=True)
    assert bar.train_progress_bar.n == bar.train_progress_bar.total == 6


def test_the_total_of_the_rich_bar() -> None:
    bar = RichProgressBar(leave=True)
    totals: list[float] = []

    def change(run: Any) -> None:
        set_everywhere(run)
        bar.progress.update(bar.train_progress_bar_id, total=6)
        totals.append(bar.train_progress_bar.total)

    fit([During(change), bar], max_epochs=1, enable_progress_bar=True)
    assert totals == [6]


def test_the_loop_takes_its_closures_from_an_attribute() -> None:
    made: list[tuple[list[str], bool, int]] = []

    class Overlay(Callback):
        def on_train_start(self, run: Any, module: Any) -> None:
            loop = run.fit_loop.epoch_loop.automatic_optimization
            make = loop._make_closure

            def note(kwargs: Any, optimizer: Any, batch_idx: int) -> Any:
                made.append((list(kwargs), optimizer is run.optimizers[0], batch_idx))
                return make(kwargs, optimizer, batch_idx)

            loop._make_closure = note

    fit([Overlay()], train=loader(12), max_epochs=1)
    assert made == [(["batch", "batch_idx"], True, i) for i in range(3)]


def test_a_closure_is_made_of_step_backward_and_zero_grad() -> None:
    found: list[tuple[bool, bool]] = []

    class Look(Callback):
        def on_train_batch_start(self, run: Any, module: Any, batch: Any, i: int) -> None:
            loop, optimizer = run.fit_loop.epoch_loop.automatic_optimization, run.optimizers[0]
            result = loop._make_step_fn(OrderedDict(batch=batch, batch_idx=i))()
            assert isinstance(result, ClosureResult)
            loop._make_backward_fn(optimizer)(result.closure_loss)
            zero_grad = loop._make_zero_grad_fn(i, optimizer)
            if zero_grad is not None:
                zero_grad()
            found.append((zero_grad is None, module.net[0].weight.grad is None))

    fit([Look()], train=loader(8), max_epochs=1)
    assert found == [(False, True), (True, False)]


def test_the_loop_takes_its_forward_pass_and_the_plugin_its_hooks_from_attributes() -> None:
    called: list[tuple[str, int, int]] = []

    class Overlay(Callback):
        def on_train_start(self, run: Any, module: Any) -> None:
            for owner, name in (
                (run.fit_loop.epoch_loop.automatic_optimization, "_training_step"),
                (run.precision_plugin, "_after_closure"),
            ):
                self.note(run, owner, name)

        def note(self, run: Any, owner: Any, name: str) -> None:
            original = getattr(owner, name)

            def noted(*args: Any) -> Any:
                loop = run.fit_loop.epoch_loop
                called.append((name, run.fit_loop.batch_idx, loop.total_batch_idx))
                return original(*args)

            setattr(owner, name, noted)

    fit([Overlay()], train=loader(8), max_epochs=2)
    names = ["_training_step", "_training_step", "_after_closure"] * 2
    assert called == list(zip(names, [0, 1, 1] * 2, [0, 1, 1, 2, 3, 3], strict=True))


def test_a_gradient_scaler_may_be_told_to_look_at_gradients_again() -> None:
    weight = torch.nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    scaler.scale(weight.sum()).backward()
    scaler.unscale_(optimizer)
    weight.grad = torch.tensor([float("inf")])
    scaler._per_optimizer_states[id(optimizer)]["stage"] = OptState.READY
    scaler.unscale_(optimizer)
    scaler.step(optimizer)
    assert weight == 1


def test_a_tensor_counts_how_often_it_was_written_to() -> None:
    tensor = torch.zeros(2)
    before = tensor._version
    tensor[:1].mul_(2)
    assert tensor._version == before + 1


def test_the_name_of_the_running_hook_is_set_and_put_back() -> None:
    found: list[Any] = []

    class Look(Callback):
        def on_before_backward(self, run: Any, module: Any, loss: Any) -> None:
            found.append(module._current_fx_name)

    module, _ = fit([Look()], train=loader(4), max_epochs=1)
    assert found == ["on_before_backward"]
    assert module._current_fx_name is None


def test_what_is_logged_counts_as_the_batch_in_the_results() -> None:
    class Log(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.trainer._results.batch, self.trainer._results.batch_size = torch.zeros(7), None
            self.log("seven", 1.0, on_step=False, on_epoch=True)
            sizes.append(self.trainer._results.batch_size)
            return super().training_step(batch, batch_idx)

    sizes: list[Any] = []
    fit(module=Log(), train=loader(4), max_epochs=1)
    assert sizes == [7]


def fsdp2_layer(**policy: torch.dtype) -> tuple[Any, Any]:
    """A layer, and the group of its parameters."""
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    mesh = init_device_mesh("cpu", (1,))
    linear = torch.nn.Linear(2, 2, bias=False)
    layer: Any = fully_shard(linear, mesh=mesh, mp_policy=MixedPrecisionPolicy(**policy))
    (group,) = layer._get_fsdp_state()._fsdp_param_groups
    return layer, group


def test_fsdp2_keeps_its_divide_factor_in_the_groups_of_its_state() -> None:
    layer, group = fsdp2_layer()
    assert group.gradient_divide_factor is None
    layer.set_gradient_divide_factor(3.0)
    assert group.gradient_divide_factor == 3.0


def backward(layer: Any, reduces: bool) -> None:
    layer.set_requires_gradient_sync(reduces)
    layer(torch.ones(1, 2)).float().sum().backward()


def test_fsdp2_has_one_unsharded_parameter_for_each_from_its_first_gathering_on() -> None:
    layer, group = fsdp2_layer()
    (one,) = group.fsdp_params
    assert one.sharded_param is layer.weight
    assert not hasattr(one, "_unsharded_param")
    backward(layer, reduces=True)
    unsharded = one._unsharded_param
    backward(layer, reduces=True)
    assert one._unsharded_param is unsharded
    assert one.sharded_param is layer.weight


def test_fsdp2_keeps_gradients_that_wait_at_the_unsharded_parameter() -> None:
    layer, group = fsdp2_layer()
    (one,) = group.fsdp_params
    backward(layer, reduces=False)
    assert torch.equal(one._unsharded_param.grad, torch.ones(2, 2))
    assert one.unsharded_accumulated_grad is None
    assert layer.weight.grad is None
    backward(layer, reduces=True)
    assert one._unsharded_param.grad is None
    assert torch.equal(layer.weight.grad.full_tensor(), torch.full((2, 2), 2.0))


def test_fsdp2_keeps_them_aside_where_they_are_reduced_in_another_dtype() -> None:
    layer, group = fsdp2_layer(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    (one,) = group.fsdp_params
    backward(layer, reduces=False)
    assert one._unsharded_param.grad is None
    assert one.unsharded_accumulated_grad.dtype == torch.float32


def test_fsdp2_gathers_in_a_forward_pass_by_two_hooks_that_come_off() -> None:
    layer, _ = fsdp2_layer()
    state, seen = layer._get_fsdp_state(), []
    layer.register_forward_hook(lambda *_: seen.append(type(layer.weight)))
    x = torch.ones(1, 2)
    layer(x)
    layer.reshard()
    state._pre_forward_hook_handle.remove()
    state._post_forward_hook_handle.remove()
    layer(torch.distributed.tensor.DTensor.from_local(x, layer.weight.device_mesh))
    (args, _), again = state._pre_forward(layer, (x,), {}), layer(x)
    assert state._post_forward(layer, args, again) is not None
    kinds = [one is torch.distributed.tensor.DTensor for one in seen]
    assert kinds == [False, True, False]


def test_fsdp2_casts_what_goes_into_a_forward_pass_and_comes_out() -> None:
    layer, _ = fsdp2_layer(param_dtype=torch.bfloat16, output_dtype=torch.float64)
    state = layer._get_fsdp_state()
    args, kwargs = state._cast_forward_inputs((torch.ones(1),), {"x": torch.ones(1)})
    assert args[0].dtype == kwargs["x"].dtype == torch.bfloat16
    assert state._cast_output_dtype(torch.ones(1)).dtype == torch.float64
