import gc
import os
import threading
import time
from typing import Any, ClassVar

import pytest
import torch
import torch.distributed as dist
from harness import assert_accurate, run_distributed
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.demos.boring_classes import BoringModel

START_METHODS = ["fork", "spawn"]


def summed_ranks() -> torch.Tensor:
    dist.init_process_group("gloo")
    total = torch.tensor([float(dist.get_rank() + 1)], requires_grad=True)
    (total * 2).backward()
    dist.all_reduce(total.detach())
    return total.detach()


def environment() -> dict[str, str]:
    names = ("RANK", "LOCAL_RANK", "GROUP_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR")
    return {name: os.environ[name] for name in names}


def fail_on_rank_one() -> None:
    if os.environ["RANK"] == "1":
        raise LookupError("nothing here")
    time.sleep(60)


class Unpicklable(Exception):
    def __init__(self, first: int, second: int) -> None:
        super().__init__(f"{first} and {second}")


def fail_unpicklably() -> None:
    raise Unpicklable(1, 2)


def hang() -> None:
    time.sleep(60)


def die() -> None:
    os._exit(3)


def double(value: torch.Tensor) -> torch.Tensor:
    return 2 * value


def fitted_weight(seed: int) -> dict[str, Any]:
    torch.manual_seed(seed)
    model: LightningModule = BoringModel()
    trainer = Trainer(
        accelerator="cpu",
        devices=2,
        strategy="ddp",
        max_steps=2,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model)
    return {"world_size": trainer.world_size, "weight": model.layer.weight.detach()}


@pytest.mark.parametrize("start_method", START_METHODS)
def test_ranks_communicate_after_the_parent_ran_backward(start_method: str) -> None:
    torch.ones(64, 64, requires_grad=True).matmul(torch.ones(64, 64)).sum().backward()
    first, second = run_distributed(summed_ranks, start_method=start_method)
    assert first.item() == second.item() == 3.0


def test_lightning_trains_on_both_ranks() -> None:
    first, second = run_distributed(fitted_weight, args=(1,))
    assert first["world_size"] == second["world_size"] == 2
    assert torch.equal(first["weight"], second["weight"])


def test_ranks_see_the_environment_of_torchrun() -> None:
    expected = {"GROUP_RANK": "0", "WORLD_SIZE": "3", "LOCAL_WORLD_SIZE": "3"}
    for rank, seen in enumerate(run_distributed(environment, 3)):
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1"}
        assert seen == expected | own


def test_the_parent_keeps_its_environment() -> None:
    before = dict(os.environ)
    run_distributed(environment)
    assert dict(os.environ) == before


def test_large_results_arrive() -> None:
    value = torch.arange(1_000_000.0)
    for result in run_distributed(double, args=(value,)):
        assert torch.equal(result, 2 * value)


def test_the_first_failing_rank_is_raised_and_the_others_are_killed() -> None:
    start = time.monotonic()
    with pytest.raises(LookupError, match="nothing here") as caught:
        run_distributed(fail_on_rank_one)
    assert "fail_on_rank_one" in str(caught.value.__cause__)
    assert time.monotonic() - start < 30


def test_an_exception_that_does_not_pickle_becomes_a_runtime_error() -> None:
    with pytest.raises(RuntimeError, match="Unpicklable: 1 and 2"):
        run_distributed(fail_unpicklably)


def test_a_hang_is_a_timeout_that_names_the_ranks() -> None:
    with pytest.raises(TimeoutError, match=r"ranks \[0, 1\] of 2"):
        run_distributed(hang, timeout=1.0)


def test_a_dead_rank_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="exit code 3"):
        run_distributed(die)


def test_a_function_that_could_not_be_spawned_is_refused() -> None:
    with pytest.raises((AttributeError, TypeError), match=r"lambda|local"):
        run_distributed(lambda: None)


@pytest.mark.parametrize(
    ("dtype", "error"),
    [(torch.float64, 1e-12), (torch.float32, 1e-6), (torch.float16, 1e-3), (torch.bfloat16, 8e-3)],
)
def test_each_dtype_has_its_floor(dtype: torch.dtype, error: float) -> None:
    out = torch.ones(1, dtype=dtype)
    assert_accurate(out, torch.tensor([1 + 0.9 * error], dtype=torch.float64))
    with pytest.raises(AssertionError, match="relative error"):
        assert_accurate(out, torch.tensor([1 + 1.1 * error], dtype=torch.float64))


def test_twice_the_error_of_torch_is_accepted() -> None:
    truth = torch.ones(1, dtype=torch.float64)
    torch_out = torch.tensor([1.01])
    assert_accurate(torch.tensor([0.981]), truth, torch_out=torch_out)
    with pytest.raises(AssertionError, match="relative error"):
        assert_accurate(torch.tensor([0.979]), truth, torch_out=torch_out)


@pytest.mark.parametrize("bad", ["out", "truth"])
def test_nan_never_passes(bad: str) -> None:
    tensors = {"out": torch.ones(2), "truth": torch.ones(2, dtype=torch.float64)}
    tensors[bad][0] = float("nan")
    with pytest.raises(AssertionError, match="relative error nan"):
        assert_accurate(tensors["out"], tensors["truth"], torch_out=tensors["out"])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_error_of_torch_that_is_not_finite_excuses_nothing(value: float) -> None:
    truth = torch.ones(1, dtype=torch.float64)
    assert_accurate(torch.ones(1), truth, torch_out=torch.full((1,), value))
    with pytest.raises(AssertionError, match="allowed 1e-06"):
        assert_accurate(torch.full((1,), 1.1), truth, torch_out=torch.full((1,), value))


def test_shapes_must_agree() -> None:
    with pytest.raises(AssertionError, match="shape"):
        assert_accurate(torch.ones(1), torch.ones(2, dtype=torch.float64))


def test_the_truth_must_be_float64() -> None:
    with pytest.raises(TypeError, match="float64"):
        assert_accurate(torch.ones(1), torch.ones(1))


@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning")
def test_compiling_starts_no_threads_whose_locks_a_forked_rank_would_find_taken() -> None:
    before = set(threading.enumerate())
    doubled = torch.compile(lambda x: 2 * x)
    assert doubled(torch.ones(3)).tolist() == [2, 2, 2]
    assert set(threading.enumerate()) <= before


class Left:
    """Garbage that only the collector finds."""

    ended: ClassVar[list[int]] = []

    def __init__(self) -> None:
        self.itself = self

    def __del__(self) -> None:
        self.ended.append(os.getpid())


def garbage_that_ended_here() -> int:
    gc.collect()
    return Left.ended.count(os.getpid())


def test_a_rank_leaves_the_garbage_of_its_parent_alone() -> None:
    gc.disable()
    try:
        Left()  # could wait, at its end, for a thread that a forked rank does not have
        assert run_distributed(garbage_that_ended_here, 1) == [0]
    finally:
        gc.enable()
