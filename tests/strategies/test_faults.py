import os
import re
import time
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from harness import (
    Classifier,
    Fault,
    dataset,
    fit,
    identical,
    run_distributed,
    run_on_nodes,
)
from harness._faults import FaultKind
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from torch.distributed import DistStoreError
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, DistributedSampler

from lightning_ext.strategies import FSDP2Strategy, ZeroPPStrategy
from lightning_ext.strategies._fsdp2._faults import explain

pytestmark = [
    pytest.mark.nodes,
    pytest.mark.filterwarnings("ignore:ZeroPPStrategy has one node:UserWarning"),  # resumed there
]
GLOBAL_BATCH = 16
STEPS = 8
LAST_SAVED = 4  # the step in which a fault comes follows
# Both layers are units, so that the second also gathers in the backward pass.
STRATEGIES: dict[str, Callable[..., FSDP2Strategy]] = {
    "fsdp2": partial(FSDP2Strategy, "Linear"),
    "replicated": partial(FSDP2Strategy, "Linear", device_mesh=(2, 2)),
    "zeropp": partial(ZeroPPStrategy, "Linear"),
}
LOST = r"(closed|reset) by peer|Timed out waiting \d+ms"


class Ended(NamedTuple):
    """How a rank saw the end of its run."""

    text: str
    notes: str
    seconds: float


def fitted(folder: Path, callbacks: tuple[Callback, ...] = (), **kwargs: Any) -> dict[str, Tensor]:
    """Two steps an epoch, of the same samples on any number of ranks."""
    data = dataset(2 * GLOBAL_BATCH, torch.float64)
    world, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    order = DistributedSampler(data, world, rank, shuffle=False)
    train = DataLoader(data, GLOBAL_BATCH // world, sampler=order)
    save = ModelCheckpoint(folder, "{step}", every_n_train_steps=2, save_top_k=-1)
    how = {"accumulate_grad_batches": 1, "use_distributed_sampler": False, "devices": world}
    how |= {"max_steps": STEPS, "max_epochs": -1, "enable_checkpointing": True}
    module = Classifier("adamw", dropout=0).double()
    fit([save, *callbacks], module=module, train=train, **(how | kwargs))
    weights = module.named_parameters()
    return {n: (p.full_tensor() if isinstance(p, DTensor) else p).detach() for n, p in weights}


def resumed(folder: Path, name: str, max_steps: int) -> dict[str, Tensor]:
    last = folder / f"step={LAST_SAVED}.ckpt"
    strategy = STRATEGIES[name]()
    return fitted(folder, strategy=strategy, ckpt_path=str(last), max_steps=max_steps)


def ended(folder: Path, name: str, fault: Fault, timeout: timedelta) -> Ended:
    strategy = STRATEGIES[name](timeout=timeout)
    with pytest.raises(RuntimeError) as caught:
        fitted(folder, (fault,), strategy=strategy, devices=2, num_nodes=2)
    notes = "\n".join(getattr(caught.value, "__notes__", []))
    return Ended(str(caught.value), notes, time.monotonic() - fault.since)


def survivors(folder: Path, name: str, fault: Fault, seconds: float) -> list[Ended]:
    """How the ranks of two nodes ended, but for that of the fault."""
    args = (folder, name, fault, timedelta(seconds=seconds))
    ends = run_on_nodes(ended, args=args, return_exceptions=True)
    if fault.kind == "die":
        assert "exit code -9" in str(ends[fault.rank])
    assert sorted(os.listdir(folder)) == ["step=2.ckpt", f"step={LAST_SAVED}.ckpt"]
    return [end for rank, end in enumerate(ends) if rank != fault.rank]


@pytest.mark.parametrize("name", ["fsdp2", "zeropp"])
def test_a_killed_rank_ends_all_and_the_last_checkpoint_loads(name: str, tmp_path: Path) -> None:
    for end in survivors(tmp_path, name, Fault("die", rank=3, step=LAST_SAVED), 60.0):
        assert re.search(LOST, end.text)
        assert "killed" in end.notes
        assert end.seconds < 30.0  # not by the timeout
    args = (tmp_path, name, LAST_SAVED)
    two, one = (run_distributed(resumed, ranks, args=args)[0] for ranks in (2, 1))
    assert identical(two, one)
    assert not identical(one, fitted(tmp_path / "start", max_steps=0))


def test_after_a_fault_training_goes_on_as_if_there_had_been_none(tmp_path: Path) -> None:
    survivors(tmp_path / "run", "fsdp2", Fault("die", rank=0, step=LAST_SAVED), 60.0)
    straight = fitted(tmp_path / "straight")
    for ranks in (2, 1):
        found = run_distributed(resumed, ranks, args=(tmp_path / "run", "fsdp2", STEPS))[0]
        for key, weight in straight.items():
            torch.testing.assert_close(found[key], weight, rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    ("name", "kind"),
    [("fsdp2", "hang"), ("fsdp2", "cut"), ("replicated", "hang"), ("zeropp", "hang")],
)
def test_a_rank_that_is_not_heard_of_ends_all_within_the_timeout(
    name: str, kind: FaultKind, tmp_path: Path
) -> None:
    """In whichever group a rank waits for another."""
    fault = Fault(kind, rank=3, step=LAST_SAVED, seconds=6.0)
    ends = survivors(tmp_path, name, fault, 3.0)
    assert any("Timed out" in end.text for end in ends)
    for end in ends:
        assert re.search(LOST, end.text)
        assert ("timeout=0:00:03" in end.notes) == ("Timed out" in end.text)
        assert end.seconds < fault.seconds


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("could not restore the store"),
        RuntimeError("no connection to the database, timeout"),
        NotImplementedError("gloo"),
    ],
)
def test_errors_of_others_have_no_note(error: Exception) -> None:
    explain(error, timedelta(seconds=3))
    assert not hasattr(error, "__notes__")


@pytest.mark.parametrize(
    ("error", "late"),
    [
        (DistStoreError("wait timeout after 3000ms, keys: /a"), True),
        (DistStoreError("Failed to recv, got 0 bytes"), False),
        (RuntimeError("Timed out waiting 3000ms for recv operation to complete"), True),
        (RuntimeError("[gloo/transport/tcp/pair.cc:534] Connection closed by peer"), False),
    ],
)
def test_the_timeout_is_named_where_time_ran_out(error: Exception, late: bool) -> None:
    explain(error, timedelta(seconds=3))
    (note,) = error.__notes__
    assert ("timeout=0:00:03" in note) == late
