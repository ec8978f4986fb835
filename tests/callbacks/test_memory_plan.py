"""What a step will hold, against what one holds, in one process."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint
from torchmetrics import MeanMetric

from examples.language_model.module import GPT
from lightning_ext import optim
from lightning_ext.callbacks import memory_held, memory_plan
from lightning_ext.functional import saved_bytes

WINDOWS = torch.zeros(3, 65, dtype=torch.uint8)
Make = Callable[[list[Tensor]], Optimizer]
OPTIMIZERS: dict[str, Make] = {
    "AdamW": torch.optim.AdamW,
    "AdamW, amsgrad": partial(torch.optim.AdamW, amsgrad=True),
    "SGD": partial(torch.optim.SGD, lr=0.1),
    "SGD, momentum": partial(torch.optim.SGD, lr=0.1, momentum=0.9),
    "Adagrad": torch.optim.Adagrad,
    "Adafactor": torch.optim.Adafactor,
    "NAdam": torch.optim.NAdam,
    "LAMB": lambda params: optim.LAMB([{"params": params, "trust_ratio": True}]),
    "LAMB, int8": lambda params: optim.LAMB(
        [{"params": params, "trust_ratio": True, "min_quantized_numel": 1}], state_dtype="int8"
    ),
    "AdamP": optim.AdamP,
    "MTAdamW": optim.MTAdamW,
    "CAME": optim.CAME,
    "LowBitAdamW, int8": partial(optim.LowBitAdamW, state_dtype="int8", min_quantized_numel=1),
    "LowBitAdamW, int4": partial(optim.LowBitAdamW, state_dtype="int4", min_quantized_numel=1),
    "GaLore": lambda params: optim.GaLore([{"params": params, "algorithm": "low_rank"}], rank=8),
    "APOLLO": lambda params: optim.APOLLO([{"params": params, "algorithm": "low_rank"}], rank=8),
    "LAWN": lambda params: optim.LAWN(torch.optim.AdamW(params), free_steps=1),
}
every_optimizer = pytest.mark.parametrize("name", OPTIMIZERS)
# One of each kind of state; the others by `make slow`.
KINDS = {"AdamW", "SGD, momentum", "Adagrad", "CAME", "LowBitAdamW, int8", "GaLore", "LAWN"}
KINDS_FIRST = [
    pytest.param(name, marks=[] if name in KINDS else pytest.mark.slow) for name in OPTIMIZERS
]


def perceptron() -> nn.Sequential:
    return nn.Sequential(nn.Linear(33, 64), nn.Tanh(), nn.Linear(64, 10))


class Logging(LightningModule):
    """Logs, counts and draws in its step, and divides by what a buffer has."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 12), nn.BatchNorm1d(12), nn.Dropout(), nn.ReLU())
        self.mean, self.seen, self.losses = MeanMetric(), 0, []
        self.example_input_array = torch.zeros(2, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        loss = F.mse_loss(self(x), y)
        self.seen += len(x)
        self.losses.append(loss.detach())
        self.mean(loss.detach())
        self.log("loss", loss)
        self.log_dict({"seen": self.seen, "mean": self.mean.compute()})
        return loss

    def configure_optimizers(self) -> Any:
        adamw = torch.optim.AdamW(self.parameters())
        schedule = torch.optim.lr_scheduler.StepLR(adamw, 10)
        return {"optimizer": adamw, "lr_scheduler": schedule}


def state_of(module: nn.Module) -> list[Any]:
    children = [dict(vars(child)) for child in module.modules()]
    tensors = [x for child in module.modules() for x in vars(child)["_parameters"].values()]
    return [children, [id(x) for x in tensors], copy.deepcopy(module.state_dict())]


@every_optimizer
def test_states_and_the_rest_are_those_of_a_real_step(name: str) -> None:
    module, x = perceptron(), torch.randn(5, 33)
    plan = memory_plan(module, optimizer=OPTIMIZERS[name], micro_batch=x)
    real = OPTIMIZERS[name](list(module.parameters()))
    module(x).sum().backward()
    real.step()
    held = memory_held(module, real)
    assert {key: getattr(plan, key) for key in held} == held
    assert plan.activations_bytes == saved_bytes(module, x)


@pytest.mark.parametrize("name", KINDS_FIRST)
def test_an_optimizer_at_hand_is_counted_before_and_after_steps_and_stays(name: str) -> None:
    module, x = perceptron(), torch.randn(5, 33)
    real = OPTIMIZERS[name](list(module.parameters()))
    expected = memory_plan(module, optimizer=OPTIMIZERS[name], micro_batch=x).states_bytes
    assert memory_plan(module, optimizer=real, micro_batch=x).states_bytes == expected
    module(x).sum().backward()
    real.step()
    before, grads = copy.deepcopy(real.state_dict()), [p.grad for p in module.parameters()]
    assert memory_plan(module, optimizer=real, micro_batch=x).states_bytes == expected
    after = real.state_dict()
    assert str(after) == str(before)
    assert all(p.grad is g for p, g in zip(module.parameters(), grads, strict=True))


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_the_language_model_holds_what_was_planned(optimizer: Any) -> None:
    module = GPT(optimizer=optimizer)
    plan = memory_plan(module, micro_batch=WINDOWS)
    real = module.configure_optimizers()
    assert plan.activations_bytes == saved_bytes(module.loss, WINDOWS)
    module.loss(WINDOWS).backward()
    real.step()
    held = memory_held(module, real)
    assert {key: getattr(plan, key) for key in held} == held


def test_normuon_of_groups_for_the_module_is_counted() -> None:
    module = perceptron()

    def make(_: list[Tensor]) -> Optimizer:
        return optim.NorMuon(optim.param_groups_for(module, optim.NorMuon, head=()))

    plan = memory_plan(module, optimizer=make, micro_batch=torch.zeros(5, 33))
    real = make([])
    module(torch.randn(5, 33)).sum().backward()
    real.step()
    assert plan.states_bytes == memory_held(module, real)["states_bytes"]


def test_a_module_on_meta_of_seven_billion_parameters_meets_the_figures_of_zero() -> None:
    with torch.device("meta"):
        module = nn.Linear(75_000, 100_000, bias=False, dtype=torch.bfloat16)
        batch = torch.empty(1, 75_000, dtype=torch.bfloat16)
    ask = partial(memory_plan, module, optimizer=torch.optim.Adam, micro_batch=batch, devices=64)
    plans = [ask(strategy=f"deepspeed_stage_{stage}") for stage in (1, 2, 3)]
    found = [plan.total_bytes - plan.activations_bytes for plan in plans]
    assert [x / 1e9 for x in found] == pytest.approx([31.4, 16.6, 1.9], abs=0.05)


def test_nothing_is_allocated() -> None:
    module = nn.Sequential(nn.Linear(1000, 1000), nn.ReLU(), nn.Linear(1000, 1000))
    ask = partial(
        memory_plan, module, optimizer=torch.optim.AdamW, micro_batch=torch.zeros(9, 1000)
    )
    expected = ask()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        assert ask() == expected
    most = max(event.self_cpu_memory_usage for event in found.events())
    assert most < 10_000  # a generator's state, and numbers
    assert expected.total_bytes > 32e6


def test_checkpointed_layers_keep_their_input_alone() -> None:
    class Recomputed(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(super().forward, x, use_reentrant=False)

    layers = perceptron()
    ask = partial(memory_plan, optimizer=torch.optim.SGD, micro_batch=torch.zeros(5, 33))
    plain, recomputed = ask(layers), ask(Recomputed(*layers))
    assert recomputed.activations_bytes < plain.activations_bytes
    assert recomputed.activations_bytes == saved_bytes(Recomputed(*layers), torch.zeros(5, 33))


def test_a_step_leaves_nothing_behind() -> None:
    module = Logging()
    batch = torch.randn(4, 6), torch.randn(4, 12)
    before, generator = state_of(module), torch.get_rng_state()
    plan = memory_plan(module, micro_batch=batch)
    assert str(state_of(module)) == str(before)
    assert torch.equal(torch.get_rng_state(), generator)
    assert (module.seen, module.losses, module.mean.update_count) == (0, [], 0)
    assert plan.buffers_bytes == 2 * 12 * 4 + 8


def test_a_failing_step_leaves_nothing_behind() -> None:
    module = Logging()
    before = state_of(module)
    with pytest.raises(RuntimeError, match="reduction dim"):
        memory_plan(module, micro_batch=(torch.randn(4, 5), torch.randn(4, 12)))
    assert str(state_of(module)) == str(before)


def test_a_number_of_samples_takes_the_shapes_of_an_example() -> None:
    example = torch.zeros(2, 6), torch.zeros(2, 12)
    batch = torch.zeros(7, 6), torch.zeros(7, 12)
    given = memory_plan(Logging(), micro_batch=batch)
    assert memory_plan(Logging(), micro_batch=7, example=example) == given
    assert given.micro_batch == 7


def test_an_example_input_array_is_the_input_of_the_forward_pass() -> None:
    module = Logging()
    plan = memory_plan(module, micro_batch=7)
    assert plan.activations_bytes == saved_bytes(module, torch.zeros(7, 6))


def test_a_loss_counts_beside_a_plain_module() -> None:
    module, batch = perceptron(), (torch.randn(5, 33), torch.randint(10, (5,)))
    plan = memory_plan(
        module, optimizer=torch.optim.SGD, micro_batch=batch, loss=nn.CrossEntropyLoss()
    )
    real = saved_bytes(lambda: F.cross_entropy(module(batch[0]), batch[1]))
    assert plan.activations_bytes == real


def test_a_dict_is_the_arguments_of_a_plain_module() -> None:
    module = perceptron()
    ask = partial(memory_plan, module, optimizer=torch.optim.SGD)
    by_name = ask(micro_batch={"input": torch.zeros(5, 33)})
    assert by_name == ask(micro_batch=torch.zeros(5, 33))


def test_frozen_parameters_have_neither_gradients_nor_states() -> None:
    module = perceptron()
    module[0].requires_grad_(False)
    plan = memory_plan(module, optimizer=torch.optim.Adam, micro_batch=torch.zeros(5, 33))
    assert plan.gradients_bytes == 4 * 650
    assert plan.states_bytes == 8 * 650 + 2 * 4


def test_autocast_around_the_call_counts() -> None:
    module, x = perceptron(), torch.randn(5, 33)
    with torch.autocast("cpu", torch.bfloat16):
        plan = memory_plan(module, optimizer=torch.optim.SGD, micro_batch=x)
        real = saved_bytes(module, x)
    assert plan.activations_bytes == real
    assert plan != memory_plan(module, optimizer=torch.optim.SGD, micro_batch=x)


def test_ddp_has_its_buckets_besides_and_auto_is_ddp_for_several_devices() -> None:
    ask = partial(
        memory_plan, perceptron(), optimizer=torch.optim.SGD, micro_batch=torch.zeros(5, 33)
    )
    assert ask(strategy="auto") == ask(strategy="single")
    assert ask(devices=4) == ask(devices=4, strategy="ddp")
    assert ask(devices=4).copies_bytes == ask().gradients_bytes


def test_the_part_that_binds_follows_batch_and_formats() -> None:
    ask = partial(memory_plan, perceptron())
    small, large = torch.zeros(1, 33), torch.zeros(1000, 33)
    assert ask(optimizer=torch.optim.AdamW, micro_batch=small).binds == "states"
    assert ask(optimizer=torch.optim.AdamW, micro_batch=large).binds == "activations"
    low = partial(optim.LowBitAdamW, state_dtype="int8", min_quantized_numel=1)
    assert ask(optimizer=low, micro_batch=small).binds == "weights"


class Projecting(torch.optim.SGD):
    """Counts its steps in a tensor, and keeps something from the first one on."""

    def step(self, closure: Any = None) -> None:
        for p in self.param_groups[0]["params"]:
            state = self.state[p]
            state.setdefault("step", torch.zeros(()))
            state["step"] += 1
            if state["step"].item() == 1:
                state["projection"] = torch.zeros(7)


def test_the_step_that_is_counted_is_the_first() -> None:
    plan = memory_plan(perceptron(), optimizer=Projecting, micro_batch=torch.zeros(1, 33))
    assert plan.states_bytes == 4 * (4 + 28)
