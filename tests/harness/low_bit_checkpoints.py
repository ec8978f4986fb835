"""Runs of optimizers with moments of few bits, written and read by torch's own checkpoints."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.distributed.checkpoint import CheckpointException, load, save
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_state_dict,
)

from harness._distributed import run_distributed
from harness.low_bit_sharded import SHAPES, Run, Weights

SAVED, STEPS = 5, 9
# A parameter without a gradient has no state, and a template of torch's has one for it.
USED = {name: shape for name, shape in SHAPES.items() if name != "unused"}
FLAT = {"flatten_optimizer_state_dict": True}
FULL = {"full_state_dict": True, "cpu_offload": True}
Options = dict[str, Any]
FORMS: dict[str, Options] = {
    "nested": {},
    "flat": FLAT,
    "full": FULL,
    "broadcast": {**FULL, "broadcast_from_rank0": True},
}


class Written(NamedTuple):
    """What a rank came to.

    Args:
        weights: whole, after all steps.
        start: whole, before any.
        numbers: of this rank's moments, after ``SAVED`` steps.
    """

    weights: Weights
    start: Weights
    numbers: Weights


def run_of(name: str, mesh: tuple[int, ...] = (), *, sharded: bool = True, **how: Any) -> Run:
    """A run of parameters that all have gradients."""
    return Run(name, sharded=sharded, mesh=mesh, shapes=USED, **how)


def write(
    path: Path, name: str, options: Options, mesh: tuple[int, ...], how: dict[str, Any]
) -> Written:
    """Take steps, save, and go on.

    Args:
        path: a folder, or with "full_state_dict" a file.
        name: of the optimizer.
        options: ``StateDictOptions``.
        mesh: of fully_shard.
        how: settings of the optimizer.
    """
    run = run_of(name, mesh, **how).run(SAVED)
    model, state = get_state_dict(run.module, run.optimizer, options=StateDictOptions(**options))
    saved = {"model": model, "optimizer": state}
    if not options.get("full_state_dict"):
        save(saved, checkpoint_id=path)
    elif dist.get_rank() == 0:
        torch.save(saved, path)
    dist.barrier()
    numbers = run.numbers()
    return Written(run.run(STEPS - SAVED).weights(), run.start, numbers)


def read(
    path: Path, name: str, options: Options, mesh: tuple[int, ...], how: dict[str, Any]
) -> Written:
    """Go on where ``write`` has saved; see there."""
    return go_on(run_of(name, mesh, **how), path, options)


def go_on(run: Run, path: Path, options: Options) -> Written:
    """Load and go on.

    Args:
        run: perhaps with steps of its own.
        path: of ``write``.
        options: as they were.
    """
    chosen = StateDictOptions(**options)
    if options.get("full_state_dict"):
        saved = torch.load(path, weights_only=True)
    else:
        model, state = get_state_dict(run.module, run.optimizer, options=chosen)
        saved = {"model": model, "optimizer": state}
        load(saved, checkpoint_id=path)
    set_state_dict(
        run.module,
        run.optimizer,
        model_state_dict=saved["model"],
        optim_state_dict=saved["optimizer"],
        options=chosen,
    )
    run.taken, numbers = SAVED, run.numbers()
    return Written(run.run(STEPS - SAVED).weights(), run.start, numbers)


def all_of(call: Callable[..., Any], jobs: list[tuple[Any, ...]]) -> list[Any]:
    """What a call comes to with one list of arguments after another."""
    return [call(*job) for job in jobs]


def refusal(
    path: Path, name: str, options: Options, mesh: tuple[int, ...], how: dict[str, Any]
) -> str:
    """What ``read`` says of a checkpoint that it does not take."""
    try:
        read(path, name, options, mesh, how)
    except (CheckpointException, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return "taken"


Results = dict[str, list[Written]]  # by format, of every rank
Files = Callable[..., tuple[Path, Results]]


def by_format(formats: Sequence[str], found: list[list[Any]]) -> dict[str, list[Any]]:
    """What every rank found in each format, of what each rank found in all."""
    return {x: [own[i] for own in found] for i, x in enumerate(formats)}


def _on_ranks(
    call: Callable[..., Any],
    folder: Path,
    name: str,
    formats: Sequence[str],
    options: Options,
    ranks: int,
    mesh: tuple[int, ...],
) -> Results:
    jobs = [(folder / x, name, options, mesh, {"state_dtype": x}) for x in formats]
    return by_format(formats, run_distributed(all_of, ranks, args=(call, jobs)))


def resumed(
    folder: Path,
    name: str,
    formats: Sequence[str],
    form: str,
    ranks: int,
    mesh: tuple[int, ...] = (),
) -> Results:
    """Go on in all these formats on so many ranks; see ``files``."""
    return _on_ranks(read, folder, name, formats, FORMS[form], ranks, mesh)


def files(make_folder: Callable[[], Path]) -> Files:
    """What writes checkpoints of all these formats in a folder, once.

    Args:
        make_folder: a new one.
    """

    @functools.cache
    def make(
        name: str, formats: tuple[str, ...], form: str, ranks: int, mesh: tuple[int, ...] = ()
    ) -> tuple[Path, Results]:
        folder = make_folder()
        options = {k: v for k, v in FORMS[form].items() if k != "broadcast_from_rank0"}
        return folder, _on_ranks(write, folder, name, formats, options, ranks, mesh)

    return make
