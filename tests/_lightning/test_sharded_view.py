"""The view of parameters that are split over ranks, by FSDP2 and along other dimensions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from harness import Classifier, fit, fsdp2, fsdp2_strategy, run_distributed, shard
from lightning.pytorch import Callback
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import (
    DTensor,
    Partial,
    Replicate,
    Shard,
    distribute_tensor,
    init_device_mesh,
)
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

from lightning_ext._lightning import FullyShardedView, ShardedView, local_part, view

SIZES = [(5, 3), (3,), (2, 8), (1,)]


class Split(Classifier):
    """Sharded for `ModelParallelStrategy`, for tensor parallelism too where the mesh is for it."""

    def configure_model(self) -> None:
        if self.device_mesh["tensor_parallel"].size() > 1:
            plan = {"0": ColwiseParallel(), "3": RowwiseParallel()}
            parallelize_module(self.net, self.device_mesh["tensor_parallel"], plan)
        shard(self.net, self.device_mesh)


class WithNumber(Classifier):
    """For `FSDP2Strategy`; a number cannot be split."""

    def __init__(self) -> None:
        super().__init__(dropout=0)
        self.factor = nn.Parameter(torch.tensor(2.0))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.factor * super().training_step(batch, batch_idx)


class Look(Callback):
    def __init__(self, look: Any, batch_idx: int = 2) -> None:
        self.look = look
        self.batch_idx = batch_idx
        self.found: Any = None

    def on_train_batch_end(self, run: Any, module: Any, outputs: Any, batch: Any, i: int) -> None:
        if i == self.batch_idx:
            self.found = self.look(view(run))


def seen(look: Any, processes: int, tensor_parallel_size: int = 1) -> Any:
    looker = Look(look)
    fit([looker], module=Split(dropout=0), max_epochs=1, **fsdp2(processes, tensor_parallel_size))
    return looker.found


def seen_by_strategy(look: Any, processes: int, batch_idx: int = 2, **options: Any) -> Any:
    looker, module = Look(look, batch_idx), options.pop("module", None) or WithNumber()
    fit([looker], module=module, max_epochs=1, **fsdp2_strategy(processes, **options))
    return looker.found


def facts(seen_by: Any) -> Any:
    rank = seen_by.data_parallel_rank
    return {
        "kind": type(seen_by).__name__,
        "size": seen_by.data_parallel_size,
        "rank": rank,
        "ranks_per_node": seen_by.ranks_per_node,
        "data": dist.get_process_group_ranks(seen_by.data_parallel_group),
        "split": [dist.get_process_group_ranks(g) for g in seen_by.model_parallel_groups],
        "sharded": [isinstance(p, DTensor) for _, p in seen_by.local_parameters()],
        "reduced": [seen_by.reduces(p) for _, p in seen_by.local_parameters()],
        "accumulate": (seen_by.accumulate, seen_by.can_set_accumulate, seen_by.splits_gradients),
        "gathered": seen_by.gather(torch.tensor([rank, 7])).tolist(),
        "largest": seen_by.largest(rank, -rank, 5),
        "plain": seen_by.sq_norm([torch.tensor([3.0]), torch.tensor([4.0])]).item(),
    }


def look_on(processes: int, tensor_parallel_size: int) -> Any:
    return seen(facts, processes, tensor_parallel_size)


def test_fsdp2() -> None:
    for rank, found in enumerate(run_distributed(look_on, args=(2, 1))):
        assert found == {
            "kind": ShardedView.__name__,
            "size": 2,
            "rank": rank,
            "ranks_per_node": 2,
            "data": [0, 1],
            "split": [[0, 1]],
            "sharded": [True] * 4,
            "reduced": [True] * 4,
            "accumulate": (2, True, True),
            "gathered": [[0, 7], [1, 7]],
            "largest": [1, 0, 5],
            "plain": 25.0,
        }


def look_by_strategy() -> Any:
    return seen_by_strategy(facts, 4, device_mesh=(2, 2), ranks_per_node=2)


def test_fsdp2_strategy_with_replicas() -> None:
    for rank, found in enumerate(run_distributed(look_by_strategy, 4)):
        assert found == {
            "kind": FullyShardedView.__name__,
            "size": 4,
            "rank": rank,
            "ranks_per_node": 2,
            "data": [0, 1, 2, 3],
            "split": [[0, 1] if rank < 2 else [2, 3]],
            "sharded": [False, *[True] * 4],
            "reduced": [True] * 5,
            "accumulate": (2, True, True),
            "gathered": [[i, 7] for i in range(4)],
            "largest": [3, 0, 5],
            "plain": 25.0,
        }


def gradients_of_whole_parameters(seen_by: Any) -> Any:
    return [p.grad.item() for _, p in seen_by.local_parameters() if not isinstance(p, DTensor)]


def whole_after(batches: int) -> Any:
    return seen_by_strategy(gradients_of_whole_parameters, 2, batches - 1)


def test_what_the_strategy_says_it_reduces_is_reduced_at_the_end_of_a_window() -> None:
    one, other = run_distributed(whole_after, args=(1,))
    assert one != other
    one, other = run_distributed(whole_after, args=(2,))
    assert one == other


def set_accumulate(seen_by: Any) -> str:
    try:
        seen_by.set_accumulate(4)
    except MisconfigurationException as error:
        return str(error)
    return "set"


def change_after(batches: int) -> Any:
    return seen_by_strategy(set_accumulate, 2, batches - 1, module=Classifier(dropout=0))


def test_accumulation_changes_between_windows_alone() -> None:
    # Within one, gradients are held back where nobody sees them: `grad` is None.
    assert run_distributed(change_after, args=(4,)) == ["set"] * 2
    for text in run_distributed(change_after, args=(3,)):
        assert "a gradient would be cut" in text


@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module .* returned a view:UserWarning")
def test_tensor_parallel_ranks_see_the_same_data() -> None:
    found = run_distributed(look_on, 4, args=(4, 2))
    assert [(one["size"], one["rank"], one["data"]) for one in found] == [
        (2, 0, [0, 2]),
        (2, 0, [1, 3]),
        (2, 1, [0, 2]),
        (2, 1, [1, 3]),
    ]
    assert [one["split"] for one in found] == [
        [[0, 2], [0, 1]],
        [[1, 3], [0, 1]],
        [[0, 2], [2, 3]],
        [[1, 3], [2, 3]],
    ]


class OfRanks:
    """A Trainer that only knows its module."""

    def __init__(self, module: nn.Module) -> None:
        self.lightning_module = module


def tensors() -> list[Tensor]:
    generator = torch.Generator().manual_seed(2)
    return [torch.randn(size, generator=generator, dtype=torch.float64) for size in SIZES]


def laid_out(whole: list[Tensor], layout: str) -> list[Tensor]:
    """Sharded along the first dimension, where they are long enough for some ranks only."""
    world = dist.get_world_size()
    if layout == "sharded":
        mesh, placements = init_device_mesh("cpu", (world,)), [Shard(0)]
    elif layout == "replicated":
        mesh, placements = init_device_mesh("cpu", (world,)), [Replicate()]
    else:
        mesh = init_device_mesh("cpu", (2, world // 2))
        placements = [Replicate() if layout == "hybrid" else Shard(0), Shard(0)]
    return [distribute_tensor(x, mesh, placements) for x in whole]


def of_tensors() -> tuple[ShardedView, list[Tensor]]:
    dist.init_process_group("gloo")
    trainer: Any = OfRanks(nn.Linear(1, 1))
    return ShardedView(trainer, dist.group.WORLD), tensors()


def norms_of(layout: str) -> Any:
    seen_by, whole = of_tensors()
    mixed = [*laid_out(whole, layout), None, *whole]
    columns = [0, 1, 0, 1, 0, 2, 2, 2, 2]
    sums = [local_part(x).square().sum() if x is not None else torch.tensor(0.0) for x in mixed]
    return (
        seen_by.sq_norms(mixed, columns).tolist(),
        seen_by.sq_norm([x for x in mixed if x is not None]).item(),
        seen_by.reduce_columns(torch.stack(sums), mixed).tolist(),
    )


@pytest.mark.parametrize("layout", ["sharded", "replicated", "hybrid", "grid"])
def test_every_element_counts_once(layout: str) -> None:
    each = [x.square().sum().item() for x in tensors()]
    columns = [each[0] + each[2], each[1] + each[3], sum(each)]
    for by_column, total, reduced in run_distributed(norms_of, 4, args=(layout,)):
        assert by_column == pytest.approx(columns, rel=1e-14)
        assert total == pytest.approx(2 * sum(each), rel=1e-14)
        assert reduced == pytest.approx([*each, 0, *each], rel=1e-14)


def norm_of_summands() -> float:
    seen_by, _ = of_tensors()
    mesh = init_device_mesh("cpu", (2,))
    own = torch.full((2,), float(dist.get_rank() + 1), dtype=torch.float64)
    return seen_by.sq_norm([DTensor.from_local(own, mesh, [Partial()])]).item()


def test_what_ranks_have_yet_to_add_up_is_added_first() -> None:
    assert run_distributed(norm_of_summands) == pytest.approx([18.0, 18.0], rel=1e-14)


def through_a_checkpoint(layout: str) -> Any:
    seen_by, whole = of_tensors()
    live = {str(i): x for i, x in enumerate([*laid_out(whole, layout), torch.ones(2)])}
    saved = seen_by.save_tensors(live)
    half = {name: x.to(torch.float16) for name, x in live.items()}
    loaded = seen_by.load_tensors(saved, half)
    assert all(type(loaded[name]) is type(half[name]) for name in live)
    assert all(torch.equal(local_part(loaded[n]), local_part(half[n])) for n in live)
    return [saved[name] for name in live]


@pytest.mark.parametrize("layout", ["sharded", "hybrid", "grid"])
def test_tensors_go_through_a_checkpoint_as_a_whole(layout: str) -> None:
    for saved in run_distributed(through_a_checkpoint, 4, args=(layout,)):
        pairs = zip(saved, [*tensors(), torch.ones(2)], strict=True)
        assert all(type(x) is Tensor and torch.equal(x, y) for x, y in pairs)


def both_dimensions() -> Any:
    def look(seen_by: Any) -> Any:
        live = {name: p.detach() for name, p in seen_by.local_parameters()}
        loaded = seen_by.load_tensors(seen_by.save_tensors(live), live)
        same = [torch.equal(local_part(loaded[name]), local_part(live[name])) for name in live]
        sums = sum(x.full_tensor().double().square().sum() for x in live.values())
        return same, seen_by.sq_norm([x.double() for x in live.values()]).item(), float(sums)

    return seen(look, 4, 2)


@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module .* returned a view:UserWarning")
def test_parameters_may_be_split_along_two_dimensions() -> None:
    for same, found, whole in run_distributed(both_dimensions, 4):
        assert all(same)
        assert found == pytest.approx(whole, rel=1e-14)


def kinds_of_parameters() -> Any:
    dist.init_process_group("gloo")
    grid = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data_parallel", "tensor_parallel"))
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    parallelize_module(
        net, grid["tensor_parallel"], {"0": ColwiseParallel(), "1": ColwiseParallel()}
    )
    fully_shard(net[0], mesh=grid["data_parallel"])
    trainer: Any = OfRanks(net)
    seen_by = ShardedView(trainer, grid.get_group("data_parallel"))
    return [seen_by.reduces(layer.weight) for layer in net]


def test_only_what_spans_the_data_parallel_ranks_is_reduced() -> None:
    assert run_distributed(kinds_of_parameters, 4) == [[True, False, False]] * 4
