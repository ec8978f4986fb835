"""What a rank will hold under strategies that share a module out, against what one holds."""

from __future__ import annotations

import copy
import os
from dataclasses import replace
from functools import cache, partial
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from harness import fit, run_distributed
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from examples.language_model.module import GPT
from lightning_ext import optim
from lightning_ext.callbacks import memory_held, memory_plan
from lightning_ext.callbacks._memory._layouts import SCHEDULES
from lightning_ext.callbacks._memory._parts import repeated_layers
from lightning_ext.functional import saved_bytes
from lightning_ext.scaling import padded_parameters
from lightning_ext.strategies import FSDP2Strategy, PipelineStrategy, ZeroPPStrategy
from lightning_ext.strategies._fsdp2._units import TRANSFORMER_LAYERS, find_units

pytestmark = pytest.mark.filterwarnings("ignore:.*one node.*")


def by_shape(params: list[Tensor]) -> list[dict[str, Any]]:
    return [
        {"params": [p for p in params if p.ndim > 1]},
        {"params": [p for p in params if p.ndim < 2], "algorithm": "adamw"},
    ]


OPTIMIZERS: dict[str, Any] = {
    "adamw": torch.optim.AdamW,
    "sgd": partial(torch.optim.SGD, lr=0.1, momentum=0.9),
    "came": optim.CAME,
    "int8": partial(optim.LowBitAdamW, state_dtype="int8", min_quantized_numel=1),
    "large in int8": partial(optim.LowBitAdamW, state_dtype="int8"),
    "large in int4": partial(optim.LowBitAdamW, state_dtype="int4"),
    "galore": lambda params: optim.GaLore(by_shape(params), rank=8),
    "gradnormlorp": lambda params: optim.GradNormLoRP(by_shape(params), rank=8),
    "normuon": lambda params: optim.NorMuon(by_shape(params)),
}


class Layers(LightningModule):
    """Layers in a row between two others, of sizes that two ranks do not divide."""

    def __init__(self, optimizer: str, width: int = 10, hidden: int = 33) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.chosen = optimizer
        self.first, self.head = nn.Linear(6, width), nn.Linear(width, 3)
        ends = nn.Linear(width, hidden), nn.Tanh(), nn.Linear(hidden, width)
        self.net = nn.Sequential(*(nn.Sequential(*copy.deepcopy(ends)) for _ in range(4)))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        return F.cross_entropy(self.head(self.net(self.first(x))), y)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return OPTIMIZERS[self.chosen](list(self.parameters()))


class Held(Callback):
    """Counts what stands after the last step, when gradients are still there."""

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self.found = memory_held(pl_module, trainer.optimizers)


class Case(NamedTuple):
    """A fit; layers are small and uneven, or large for a rank's share alone to be small."""

    strategy: str
    optimizer: str
    width: int = 10
    hidden: int = 33

    def module(self) -> Layers:
        return Layers(self.optimizer, self.width, self.hidden)


STRATEGIES: dict[str, Any] = {
    "ddp": lambda: "ddp",
    "fsdp2": FSDP2Strategy,
    "zeropp": ZeroPPStrategy,
    "gpipe": partial(PipelineStrategy, schedule="gpipe"),
    "pipeline_1f1b": partial(PipelineStrategy, schedule="1f1b"),
    "breadth_first_pipeline": PipelineStrategy,
}
# Of a matrix of 80 × 80 less than 4096 numbers are on a rank.
LARGE = Case("fsdp2", "large in int8", 80, 80)
CASES = [
    *(Case(name, "adamw") for name in STRATEGIES),
    Case("fsdp2", "came"),
    *(LARGE._replace(optimizer=name) for name in ("large in int8", "large in int4", "galore")),
    Case("gpipe", "came"),
]
MORE = [
    *(Case("fsdp2", name) for name in ("sgd", "int8")),
    *(Case("fsdp2", name, 96, 96) for name in OPTIMIZERS),
    *(Case("fsdp2", name, 33, 90) for name in OPTIMIZERS),
    Case("zeropp", "galore", 80, 96),
]


def batch(samples: int) -> tuple[Tensor, Tensor]:
    return torch.randn(samples, 6), torch.arange(samples) % 3


class Gathered(Callback):
    """Finds the most bytes of gathered weights while layers go backward."""

    def __init__(self) -> None:
        self.most = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.units = [one for one in pl_module.modules() if isinstance(one, FSDPModule)]
        for layer in pl_module.modules():
            if isinstance(layer, nn.Linear):
                layer.register_forward_hook(lambda *got: got[-1].register_hook(self._look) and None)

    def _look(self, _: Tensor) -> None:
        groups = [unit._get_fsdp_state()._fsdp_param_group for unit in self.units]
        outputs = [x for g in groups for p in g.fsdp_params for x in p.all_gather_outputs]
        ahead = [g._all_gather_result for g in groups if g._all_gather_result is not None]
        outputs += [one.all_gather_output for one in ahead]
        self.most = max(self.most, sum(x.untyped_storage().nbytes() for x in outputs))


def after_a_step(case: Case, *others: Callback) -> dict[str, int]:
    held = Held()
    fit(
        [held, *others],
        module=case.module(),
        train=DataLoader(TensorDataset(*batch(64)), batch_size=8),
        strategy=STRATEGIES[case.strategy](),
        devices=int(os.environ["WORLD_SIZE"]),
        max_steps=1,
        max_epochs=1,
    )
    return held.found


@cache
def planned(case: Case, devices: int) -> dict[str, float]:
    samples = 16 if case.strategy in SCHEDULES else 8
    plan = memory_plan(
        case.module(), micro_batch=batch(samples), strategy=case.strategy, devices=devices
    )
    names = ("weights_bytes", "buffers_bytes", "gradients_bytes", "states_bytes")
    return {name: getattr(plan, name) for name in names}


def of_all(cases: list[Case]) -> tuple[list[dict[str, int]], dict[str, float], int]:
    """What fits hold one after the other, a plan made before them, and what FSDP2 gathered."""
    gathered = Gathered()
    after_a_step(Case("fsdp2", "sgd"), gathered)
    plan = planned(LARGE, 2)
    return [after_a_step(case) for case in cases], plan, gathered.most


def most_of(ranks: list[dict[str, int]]) -> dict[str, int]:
    return max(ranks, key=lambda held: sum(held.values()))


@pytest.fixture(scope="module")
def two_ranks() -> list[Any]:
    """Of each rank, what ``of_all`` found; one pair of processes for all."""
    return run_distributed(of_all, args=(CASES,))


@pytest.mark.parametrize("index", range(len(CASES)), ids=["-".join(x[:2]) for x in CASES])
def test_the_rank_that_holds_most_holds_what_was_planned(index: int, two_ranks: Any) -> None:
    most = most_of([held[index] for held, _, _ in two_ranks])
    assert planned(CASES[index], 2) == most


def test_a_plan_beside_a_process_group_is_that_of_one_process(two_ranks: Any) -> None:
    assert [plan for _, plan, _ in two_ranks] == [planned(LARGE, 2)] * 2


@pytest.mark.slow
def test_four_ranks_hold_what_was_planned() -> None:
    ranks = run_distributed(of_all, 4, args=(MORE,), timeout=600)
    most = {case: most_of([held[i] for held, _, _ in ranks]) for i, case in enumerate(MORE)}
    assert {case: planned(case, 4) for case in MORE} == most


def test_two_units_and_what_is_outside_are_gathered_in_the_backward_pass(two_ranks: Any) -> None:
    module = Layers("sgd")
    plan = memory_plan(module, micro_batch=batch(16), strategy="fsdp2", devices=2)
    unit = 4 * padded_parameters([p.shape for p in module.net[0].parameters()], 2)
    root = [*module.first.parameters(), *module.head.parameters()]
    found = [most for _, _, most in two_ranks]
    assert found == [2 * unit + 4 * padded_parameters([p.shape for p in root], 2)] * 2
    assert plan.gathered_bytes == found[0] + unit  # and the gradients of the unit


def test_a_plan_leaves_no_process_group_behind() -> None:
    planned(LARGE, 2)
    assert not dist.is_initialized()
    assert not dist.distributed_c10d._world.pg_map


@pytest.mark.parametrize("optimizer", ["adamw", "large in int8", "galore"])
def test_an_optimizer_that_has_stepped_whole_is_counted_on_shards(optimizer: str) -> None:
    module, x = nn.Sequential(nn.Linear(80, 81)), torch.randn(5, 80)
    real = OPTIMIZERS[optimizer](list(module.parameters()))
    module(x).sum().backward()
    real.step()
    ask = partial(memory_plan, module, micro_batch=x, strategy="fsdp2", devices=2)
    assert ask(optimizer=real) == ask(optimizer=OPTIMIZERS[optimizer])


def test_owners_in_a_pipeline_of_shards_are_refused() -> None:
    ask = partial(
        memory_plan, Case("", "galore", 80, 80).module(), micro_batch=batch(16), devices=4
    )
    ask(strategy="gpipe")
    with pytest.raises(ValueError, match=r"GaLore has states of whole matrices.*state_bytes=8"):
        ask(strategy="gpipe", data_parallel_size=2)


@pytest.mark.parametrize("module", [GPT(), Layers("sgd"), nn.Sequential(GPT(layers=1), GPT())])
def test_units_are_those_of_the_strategy(module: nn.Module) -> None:
    found = {id(one) for one in repeated_layers(module)}
    assert found == {id(one) for one in find_units(module, TRANSFORMER_LAYERS)}


def test_accumulation_keeps_gradients_whole_under_fsdp2_alone() -> None:
    ask = partial(memory_plan, Layers("sgd"), micro_batch=batch(16), devices=2, accumulate=2)
    whole = ask(strategy="ddp").gradients_bytes
    assert ask(strategy="fsdp2").gradients_bytes == whole
    assert ask(strategy="deepspeed_stage_2").gradients_bytes == whole / 2


def test_zeropp_has_a_secondary_partition_and_errors_besides() -> None:
    ask = partial(memory_plan, Layers("sgd"), micro_batch=batch(16), devices=8)
    plain, weights = ask(strategy="fsdp2"), ask(strategy="ddp").weights_bytes
    halves = ask(strategy="zeropp", ranks_per_node=4)
    assert halves.copies_bytes == weights / 4
    assert halves.total_bytes == plain.total_bytes + weights / 4
    assert ask(strategy="zeropp", ranks_per_node=4, hpz=False) == replace(plain, strategy="zeropp")
    errors = ask(strategy="zeropp", ranks_per_node=4, hpz=False, error_bytes=4)
    assert errors.copies_bytes == weights * (1 + 1 / 4)


def test_activations_of_a_pipeline_are_those_of_micro_batches_in_flight() -> None:
    module, x = Layers("sgd"), batch(16)
    ask = partial(memory_plan, module, micro_batch=x, devices=2, num_microbatches=8)
    halves = [module.net[:2], module.net[2:]]
    hidden = [torch.zeros(16, 10), module.net[:2](torch.zeros(16, 10))]
    first, last = (saved_bytes(*pair) for pair in zip(halves, hidden, strict=True))
    before = saved_bytes(module.first, x[0])
    after = saved_bytes(lambda h: F.cross_entropy(module.head(h), x[1]), torch.zeros(16, 10))
    assert ask(strategy="gpipe").activations_bytes == 8 * (last + after + before)
    assert ask(strategy="pipeline_1f1b").activations_bytes == 2 * (first + before)


def test_replicas_share_the_stages_of_a_pipeline() -> None:
    ask = partial(memory_plan, Layers("adamw"), micro_batch=batch(16), num_microbatches=4)
    two = ask(strategy="breadth_first_pipeline", devices=2)
    shared = ask(strategy="breadth_first_pipeline", devices=4, data_parallel_size=2)
    assert shared.states_bytes < two.states_bytes
    assert shared.gathered_bytes > 0
    assert shared.activations_bytes == two.activations_bytes


def test_replicas_that_do_not_divide_the_ranks_are_refused() -> None:
    with pytest.raises(ValueError, match="data_parallel_size=3 does not divide devices=4"):
        memory_plan(
            Layers("sgd"),
            micro_batch=batch(4),
            strategy="gpipe",
            devices=4,
            data_parallel_size=3,
        )
