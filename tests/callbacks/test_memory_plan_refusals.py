"""What a plan refuses, and what it takes instead."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from lightning_ext.callbacks import memory_plan
from lightning_ext.strategies import FSDP2Strategy, PipelineStrategy


def perceptron() -> nn.Sequential:
    return nn.Sequential(nn.Linear(33, 64), nn.Tanh(), nn.Linear(64, 10))


def test_an_unknown_strategy_lists_those_that_are_known() -> None:
    with pytest.raises(ValueError, match=r"'fsdp3' is unknown.*, zeropp, .*Hint: .*'fsdp2'"):
        memory_plan(perceptron(), micro_batch=1, strategy="fsdp3")


def test_a_number_of_samples_without_an_example_says_what_to_give() -> None:
    with pytest.raises(ValueError, match="Hint: example=batch"):
        memory_plan(perceptron(), optimizer=torch.optim.SGD, micro_batch=4)


def test_no_optimizer_says_what_to_give() -> None:
    with pytest.raises(TypeError, match=r"Hint: optimizer=torch\.optim\.AdamW"):
        memory_plan(perceptron(), micro_batch=torch.zeros(1, 33))


def test_states_that_numbers_decide_are_refused_and_can_be_given() -> None:
    ask = partial(memory_plan, perceptron(), micro_batch=torch.zeros(1, 33))
    with pytest.raises(ValueError, match=r"LBFGS keeps what numbers decide.*state_bytes=8"):
        ask(optimizer=torch.optim.LBFGS)
    assert ask(state_bytes=8).states_bytes == 8 * (34 * 64 + 65 * 10)


def test_a_pass_that_reads_numbers_is_refused_and_can_be_given() -> None:
    class Reading(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) / x.sum().item()

    ask = partial(
        memory_plan, Reading(3, 5), optimizer=torch.optim.SGD, micro_batch=torch.zeros(2, 3)
    )
    with pytest.raises(ValueError, match=r"Reading reads numbers.*activation_bytes"):
        ask()
    assert ask(activation_bytes=12).activations_bytes == 24


@pytest.mark.parametrize(
    ("given", "near"),
    [
        ("fsdp", "fsdp2"),
        ("deepspeed", "(zeropp_deepspeed|deepspeed_stage_.)"),
        ("ddp_spawn", "ddp"),
    ],
)
def test_the_nearest_strategy_is_named(given: str, near: str) -> None:
    with pytest.raises(ValueError, match=f"strategy='{given}' is unknown.*strategy='{near}'"):
        memory_plan(perceptron(), micro_batch=1, strategy=given)


@pytest.mark.parametrize(
    ("given", "near"), [(FSDP2Strategy(), "fsdp2"), (PipelineStrategy(), ".*pipeline.*")]
)
def test_a_strategy_itself_is_refused_and_its_name_is_said(given: Any, near: str) -> None:
    with pytest.raises(TypeError, match=f"is a {type(given).__name__}; .*strategy='{near}'"):
        memory_plan(perceptron(), micro_batch=1, strategy=given)


def test_what_is_no_module_and_what_is_no_optimizer_are_refused() -> None:
    wrong: Any = [1]
    with pytest.raises(TypeError, match=r"module is a list; allowed is an nn\.Module\. Hint"):
        memory_plan(wrong, micro_batch=1)
    name: Any = "AdamW"
    with pytest.raises(TypeError, match=r"optimizer='AdamW' is a str; .*torch\.optim\.AdamW"):
        memory_plan(perceptron(), optimizer=name, micro_batch=1)
    with pytest.raises(TypeError, match=r"no optimizer in what was made, None"):
        memory_plan(perceptron(), optimizer=lambda _: None, micro_batch=torch.zeros(1, 33))


def test_a_target_without_a_loss_says_what_to_give() -> None:
    batch = torch.zeros(2, 33), torch.zeros(2)
    with pytest.raises(TypeError, match=r"micro_batch has 2 entries.*Hint: loss=torch"):
        memory_plan(perceptron(), optimizer=torch.optim.SGD, micro_batch=batch)


def test_optimizers_that_ask_the_trainer_are_to_be_given() -> None:
    class Asking(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = perceptron()

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1 * self.trainer.world_size)

    with pytest.raises(ValueError, match=r"reads self\.trainer.*optimizer=torch"):
        memory_plan(Asking(), micro_batch=torch.zeros(1, 33))


def test_an_optimizer_of_another_module_is_refused_and_of_a_part_counted() -> None:
    module, x = perceptron(), torch.zeros(1, 33)
    with pytest.raises(ValueError, match="none of the parameters of Sequential that are trained"):
        memory_plan(module, optimizer=torch.optim.Adam(perceptron().parameters()), micro_batch=x)
    part = memory_plan(module, optimizer=torch.optim.Adam(module[2].parameters()), micro_batch=x)
    assert part.states_bytes == 8 * 650 + 2 * 4


def test_a_step_that_shards_cannot_take_is_refused() -> None:
    with pytest.raises(ValueError, match=r"Adafactor takes no step on shards.*state_bytes=8"):
        memory_plan(
            nn.Linear(6, 3),
            optimizer=torch.optim.Adafactor,
            micro_batch=torch.zeros(2, 6),
            strategy="fsdp2",
            devices=2,
        )


def test_a_module_with_nothing_to_split_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"Linear cannot be split into stages.*none here\. Hint: put the"
    ):
        memory_plan(
            nn.Linear(6, 3),
            optimizer=torch.optim.SGD,
            micro_batch=torch.zeros(2, 6),
            strategy="gpipe",
            devices=2,
        )


def test_layers_that_are_none_are_refused() -> None:
    ask = partial(memory_plan, optimizer=torch.optim.SGD, micro_batch=torch.zeros(2, 6), devices=2)
    with pytest.raises(ValueError, match="module_name='' has none"):
        ask(nn.Sequential(), strategy="gpipe")
    with pytest.raises(ValueError, match=r"'0' is a Linear without.*Hint: .*name=''"):
        memory_plan(
            perceptron(),
            optimizer=torch.optim.SGD,
            micro_batch=torch.zeros(2, 33),
            strategy="gpipe",
            devices=2,
            module_name="0",
        )
