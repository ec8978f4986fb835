"""Whole weights out of, and into, a module that DeepSpeed's ZeRO-3 has split."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack, redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.fabric.strategies.deepspeed import _validate_checkpoint_directory
from lightning.fabric.utilities.load import _METADATA_FILENAME
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.nn import Parameter

from lightning_ext.strategies._export import write_weights

_TAG = "checkpoint"  # as Lightning calls it


def whole_weights(module: nn.Module, *, keep: bool) -> dict[str, Any]:
    """The state of a module with whole parameters, in host memory; one is gathered at a time.

    Trained weights are the float32 ones that the optimizer keeps, where there is one.

    Args:
        module: All ranks must call.
        keep: Whether this rank wants them.

    Returns:
        As ``state_dict``, empty on the ranks that do not.
    """
    found: dict[str, Any] = {}
    for name, value in module.state_dict(keep_vars=True).items():
        whole = _whole(value) if isinstance(value, Parameter) else value
        if keep:
            found[name] = whole.detach().cpu().clone() if isinstance(whole, Tensor) else whole
    return found


def export_weights(module: LightningModule, path: Path) -> None:
    """Writes what ``LightningModule.load_from_checkpoint`` reads; all ranks must call.

    Args:
        module: That of the running Trainer.
        path: Of the file, on rank 0.
    """
    first = dist.get_rank() == 0
    write_weights(module.trainer, path, lambda: whole_weights(module, keep=first))


def load_weights(module: LightningModule, weights: Mapping[str, Any], *, strict: bool) -> None:
    """Puts whole weights into the parts, those of the optimizer included; all ranks must call.

    Args:
        module: That of the running Trainer.
        weights: The same on all ranks.
        strict: Whether every name must be there, and no other.

    Raises:
        RuntimeError: A name or a shape does not fit.
    """
    import deepspeed

    missing: list[str] = []
    unexpected: list[str] = []
    errors: list[str] = []

    def load(child: nn.Module, prefix: str) -> None:
        state = dict(weights)
        with ExitStack() as gathered:
            for parameter in child.parameters(recurse=False):
                # Together, DeepSpeed before 0.19 would wait for the last of them alone.
                whole = deepspeed.zero.GatheredParameters([parameter], modifier_rank=0)
                gathered.enter_context(whole)
            child._load_from_state_dict(state, prefix, {}, strict, missing, unexpected, errors)
        for name, below in child.named_children():
            load(below, f"{prefix}{name}.")

    load(module, "")
    if strict:
        errors += [f"missing {missing}"] * bool(missing)
        errors += [f"unexpected {unexpected}"] * bool(unexpected)
    if errors:
        raise RuntimeError(f"The file does not fit {type(module).__name__}: {'; '.join(errors)}.")
    _refresh(module, weights)


def read_whole(path: Path) -> dict[str, Any]:
    """Reads a folder of any number of ranks as one checkpoint with whole float32 weights.

    The folder must be trusted: DeepSpeed unpickles what is in it.
    """
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    quiet = StringIO()  # every rank would report to the terminal
    with redirect_stdout(quiet), redirect_stderr(quiet):
        weights = get_fp32_state_dict_from_zero_checkpoint(path, _TAG)
    file = path / _TAG / "zero_pp_rank_0_mp_rank_00_model_states.pt"
    rest = torch.load(file, map_location="cpu", weights_only=False)
    return {**rest, "state_dict": weights}


def check_folder(path: Path) -> None:
    """Refuses folders that are not DeepSpeed's.

    Raises:
        MisconfigurationException: It is one of ``fsdp2`` or ``zeropp``.
        FileNotFoundError: It is none at all.
    """
    if (path / _METADATA_FILENAME).is_file():
        raise MisconfigurationException(
            f"{path} is a folder of 'fsdp2' or 'zeropp', and DeepSpeed reads its own and one file."
            " Hint: `strategy.export(path)` there, or save_distributed_checkpoint=False, and that"
            " file here, for the weights alone."
        )
    _validate_checkpoint_directory(path)


def check_world(path: Path, world: int) -> None:
    """Refuses to train on from a folder that another number of ranks has written.

    Raises:
        MisconfigurationException: With both numbers.
    """
    writers = len(list(path.glob(f"{_TAG}/*zero_pp_rank_*_optim_states.pt")))
    if writers != world:
        raise MisconfigurationException(
            f"{path} was written by {writers} ranks and there are {world}: DeepSpeed does not move"
            " optimizer states between worlds. Allowed are as many ranks, and validate, test and"
            " predict on any number. Hint: `strategy.export(path)` there, and that file here, for"
            " the weights alone."
        )


def _whole(parameter: Parameter) -> Tensor:
    import deepspeed
    from deepspeed.utils import safe_get_full_fp32_param

    if _has_master(parameter):
        return safe_get_full_fp32_param(parameter)
    with deepspeed.zero.GatheredParameters([parameter]):
        return parameter.detach().clone()


def _refresh(module: LightningModule, weights: Mapping[str, Any]) -> None:
    """Sets the float32 weights of the optimizer, which would else undo what was loaded."""
    from deepspeed.utils import safe_get_local_fp32_param, safe_set_local_fp32_param

    for name, parameter in module.named_parameters():
        if name in weights and _has_master(parameter):
            part = safe_get_local_fp32_param(parameter)
            safe_set_local_fp32_param(parameter, _part(weights[name], part))


def _part(whole: Tensor, like: Tensor) -> Tensor:
    """This rank's part of a tensor; the last ranks fill theirs up with zeros."""
    begin = dist.get_rank() * like.numel()
    found = whole.flatten()[begin : begin + like.numel()].to(like)
    return nn.functional.pad(found, (0, like.numel() - found.numel()))


def _has_master(parameter: Parameter) -> bool:
    """Whether an optimizer keeps float32 weights for it."""
    return parameter.requires_grad and getattr(parameter, "_z3_optimizer", None) is not None
