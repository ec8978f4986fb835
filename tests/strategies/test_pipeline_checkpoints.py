"""Checkpoints of pipelines: one process's and FSDP2's, whoever writes and reads them."""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from harness import run_distributed, trainer
from harness.pipeline_parts import COUNT, MICRO, Chain, data, loaders, pipeline_trainer, whole
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from lightning_ext.optim import LAMB
from lightning_ext.strategies import FSDP2Strategy

# A reader has no use for the settings of the callback that wrote.
pytestmark = pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks")
SAVED, STEPS = 2, 3
Weights = dict[str, Tensor]


class Counting(torch.optim.SGD):
    """Has a number in each state that is no tensor."""

    def step(self, closure: Any = None) -> Any:
        """Steps more and more slowly."""
        loss = super().step(closure)
        for group in self.param_groups:
            for one in group["params"]:
                if one.grad is not None:
                    seen = self.state[one].get("seen", 0)
                    self.state[one]["seen"] = seen + 1
                    one.data.add_(one.grad, alpha=-0.01 / (1 + seen))
        return loss


KINDS: dict[str, Callable[[Any], Optimizer]] = {
    "adamw": lambda groups: torch.optim.AdamW(groups, lr=1e-2, amsgrad=True),
    "sgd": lambda groups: torch.optim.SGD(groups, lr=1e-2),  # without a state
    "counting": lambda groups: Counting(groups, lr=1e-2),
    "adagrad": lambda groups: torch.optim.Adagrad(groups, lr=1e-2),  # with one before any step
    "adafactor": lambda groups: torch.optim.Adafactor(groups, lr=1e-2),  # of rows and columns
    "lamb": lambda groups: LAMB(groups, lr=1e-2),
}


class Grouped(Chain):
    """Groups that do not follow the module's order; a weight of the first and the last layer."""

    def __init__(self, kind: str = "adamw") -> None:
        super().__init__()
        self.kind = kind
        self.net[4][0].weight = self.net[0][0].weight
        self.net[1][0].bias.requires_grad_(False)
        self.register_buffer("offset", torch.zeros(3).double())
        self.net[3].register_buffer("scale", torch.zeros(2).double())

    def configure_optimizers(self) -> Any:
        """Matrices of layers from the last to the first, and then the others; a scheduler."""
        layers = list(dict.fromkeys(self.net[i][0].weight for i in range(4, -1, -1)))
        others = [p for p in self.parameters() if p not in set(layers) and p.requires_grad]
        groups = [{"params": layers}, {"params": others, "weight_decay": 0.0}]
        optimizer = KINDS[self.kind](groups)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]


class How(NamedTuple):
    """A strategy on so many ranks; of none, one process."""

    world: int
    options: dict[str, Any] | None = None
    in_parts: bool = False


RUNS = {
    "one process": How(1),
    "2 x 2": How(2, {}),
    "2 x 2 in a folder": How(2, {}, in_parts=True),
    "gpipe": How(2, {"schedule": "gpipe"}),
    "fsdp2 stages": How(4, {"data_parallel_size": 2}),
    "fsdp2 stages in a folder": How(4, {"data_parallel_size": 2}, in_parts=True),
    "ddp stages in a folder": How(4, {"data_parallel_size": 2, "data_parallel": "ddp"}, True),
    "fsdp2": How(2, {"fsdp2": True}),
    "fsdp2 in a folder": How(2, {"fsdp2": True}, in_parts=True),
}


QUICK = ("one process", "2 x 2", "fsdp2 stages")  # readers; the others are slow
SLOW = ("gpipe", "fsdp2 stages in a folder", "ddp stages in a folder")


class Start(Callback):
    """Keeps the weights that a fit goes on with."""

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        self.weights = whole(module)


def fitted(run: str, module: LightningModule, steps: int, *more: Callback, **kwargs: Any) -> Any:
    """Fits by a run, and returns the Trainer."""
    how, path = RUNS[run], kwargs.pop("ckpt_path", None)
    saves = any(isinstance(one, ModelCheckpoint) for one in more)
    options: dict[str, Any] = {"max_steps": steps, "max_epochs": -1, "gradient_clip_val": 0.5}
    options |= {"callbacks": list(more), "enable_checkpointing": saves}
    options |= {"limit_train_batches": SAVED, "accumulate_grad_batches": 1, **kwargs}
    if how.options is not None and "fsdp2" not in how.options:
        asked = {**how.options, "save_distributed_checkpoint": how.in_parts}
        made = pipeline_trainer(asked, **options)
        made.fit(module, *loaders(how.options.get("data_parallel_size", 1)), ckpt_path=path)
        return made
    if how.options is not None:
        strategy = FSDP2Strategy(save_distributed_checkpoint=how.in_parts)
        options |= {"strategy": strategy, "devices": how.world, "use_distributed_sampler": False}
    made = trainer(**options)
    own = data(how.world, int(os.environ.get("RANK", "0")))
    train = DataLoader(own, MICRO * COUNT // how.world)
    made.fit(module, train, DataLoader(data(), MICRO * COUNT), ckpt_path=path)
    return made


def write(run: str, kind: str, folder: Path) -> Weights:
    module = Grouped(kind)
    save = ModelCheckpoint(folder, "saved", every_n_train_steps=SAVED)
    fitted(run, module, SAVED, save)
    return whole(module)


def read(run: str, kind: str, paths: list[Path]) -> list[tuple[Weights, Weights]]:
    found = []
    for path in paths:
        module, start = Grouped(kind), Start()
        fitted(run, module, STEPS, start, ckpt_path=str(path))
        found.append((whole(module), start.weights))
    return found


@functools.cache
def straight(kind: str) -> Weights:
    """What one process comes to without a stop."""
    module = Grouped(kind)
    fitted("one process", module, STEPS)
    return whole(module)


Written = Callable[[str, str], tuple[Path, Weights]]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Written:
    """Has a run write a checkpoint, once; and what weights there were, of all ranks."""

    @functools.cache
    def make(run: str, kind: str) -> tuple[Path, Weights]:
        folder = tmp_path_factory.mktemp("written")
        weights: Weights = {}
        for own in run_distributed(write, RUNS[run].world, args=(run, kind, folder)):
            weights |= own
        return folder / "saved.ckpt", weights

    return make


def furthest(own: Weights, other: Weights) -> float:
    assert own.keys() <= other.keys()
    return max(float((value - other[name]).abs().max()) for name, value in own.items())


def require_goes_on(reader: str, kind: str, sources: list[tuple[Path, Weights]]) -> None:
    paths = [path for path, _ in sources]
    for ends in run_distributed(read, RUNS[reader].world, args=(reader, kind, paths)):
        for (after, before), (_, saved) in zip(ends, sources, strict=True):
            assert furthest(before, saved) == 0
            assert furthest(after, straight(kind)) <= 1e-12


# How a run writes is nothing to what it reads.
@pytest.mark.parametrize(
    "reader", [*QUICK, *(pytest.param(r, marks=pytest.mark.slow) for r in SLOW)]
)
def test_whoever_wrote_it_weights_are_the_same_and_states_go_on(
    reader: str, written: Written
) -> None:
    own = "fsdp2" in (RUNS[reader].options or {"fsdp2": True})
    writers = [run for run in RUNS if reader != "one process" or not RUNS[run].in_parts]
    # What FSDP2 and one process read of each other is told elsewhere.
    writers = [run for run in writers if not own or run not in ("one process", "fsdp2")]
    require_goes_on(reader, "adamw", [written(run, "adamw") for run in writers])


@pytest.mark.filterwarnings("ignore:LAMB")
@pytest.mark.parametrize("kind", ["sgd", "counting", "adagrad", "adafactor", "lamb"])
def test_states_of_other_optimizers_go_on(kind: str, written: Written) -> None:
    require_goes_on("one process", kind, [written("2 x 2", kind)])
    sources = ["one process", "2 x 2 in a folder", "gpipe"]
    require_goes_on("2 x 2", kind, [written(run, kind) for run in sources])


class Other(Grouped):
    """Its names or shapes differ from those of a checkpoint."""

    def __init__(self, change: str) -> None:
        super().__init__()
        if change == "lacks":
            self.net[4].append(nn.Linear(10, 10).double())
        elif change.startswith("has besides"):
            self.net[3][0].bias = None
        else:
            self.head = nn.Linear(10, 2).double()
        self.strict_loading = change != "has besides, allowed"


def read_other(change: str, path: Path) -> None:
    run = pipeline_trainer()
    run.validate(Other(change), loaders()[1], ckpt_path=str(path), verbose=False)


@pytest.mark.parametrize("writer", ["2 x 2 in a folder", "one process"])
@pytest.mark.parametrize(
    ("change", "told"),
    [
        ("lacks", r"it lacks net\.4\.3\.bias, net\.4\.3\.weight"),
        ("has besides", r"it has besides net\.3\.0\.bias"),
        ("has in other shapes", r"in other shapes head\.bias \(3,\) and not \(2,\)"),
    ],
)
def test_what_does_not_fit_is_told_by_name(
    change: str, told: str, writer: str, written: Written
) -> None:
    args = (change, written(writer, "adamw")[0])
    ends = run_distributed(read_other, args=args, return_exceptions=True)
    assert [type(end) for end in ends] == [MisconfigurationException] * 2, ends
    assert all(re.search(told, str(end)) for end in ends)


@pytest.mark.parametrize("writer", ["2 x 2 in a folder", "one process"])
def test_without_strict_loading_names_may_differ(writer: str, written: Written) -> None:
    path, _ = written(writer, "adamw")
    run_distributed(read_other, args=("has besides, allowed", path))


def resumed_from_weights(folder: Path) -> None:
    save = ModelCheckpoint(folder, "saved", every_n_train_steps=SAVED, save_weights_only=True)
    fitted("2 x 2", Grouped(), SAVED, save)
    fitted("2 x 2", Grouped(), STEPS, ckpt_path=str(folder / "saved.ckpt"))


def test_weights_alone_do_not_resume_a_fit(tmp_path: Path) -> None:
    with pytest.raises(KeyError, match=r"states of 0 optimizers.*save_weights_only"):
        run_distributed(resumed_from_weights, args=(tmp_path,))


class AddGroup(Callback):
    """Adds a group after ``configure_optimizers``, and saves."""

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        trainer.optimizers[0].add_param_group({"params": [nn.Parameter(torch.zeros(1))]})
        trainer.save_checkpoint("never.ckpt")


def saved_with_another_group() -> None:
    fitted("2 x 2", Grouped(), 1, AddGroup())


def test_a_group_that_was_added_later_is_refused_when_saved() -> None:
    with pytest.raises(MisconfigurationException, match=r"has 3 groups .* made 2; allowed"):
        run_distributed(saved_with_another_group)


class Fewer(Grouped):
    """Its optimizer has one parameter."""

    def configure_optimizers(self) -> Any:
        """Of the first layer."""
        return torch.optim.AdamW([self.net[1][0].weight])


def from_states_of_more(path: Path) -> None:
    fitted("2 x 2", Fewer(), STEPS, ckpt_path=str(path))


@pytest.mark.parametrize(
    ("writer", "told"),
    [
        ("2 x 2 in a folder", r"other parameters.*only there \['first\.bias'"),
        ("one process", r"groups of \[4, 8\] parameters and \[1\]"),
    ],
)
def test_states_of_other_parameters_are_refused_in_words(
    writer: str, told: str, written: Written
) -> None:
    with pytest.raises(MisconfigurationException, match=told):
        run_distributed(from_states_of_more, args=(written(writer, "adamw")[0],))
