"""Which engine has a module: DeepSpeed leaves its hooks there, and two engines undo each other.

Private: ``module_forward_pre_hook`` and ``module_forward_post_hook`` of an engine, where it has
    them, and ``deepspeed.utils.groups._get_zero_param_intra_parallel_group``.
"""

from __future__ import annotations

import argparse
import copy
import weakref
from collections.abc import Mapping
from typing import Any

import torch.distributed as dist
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.nn import Parameter
from torch.optim import Optimizer

_HOOKS = ("module_forward_pre_hook", "module_forward_post_hook")
_engines: weakref.WeakKeyDictionary[nn.Module, weakref.ref[Any]] = weakref.WeakKeyDictionary()


def make_engine(
    module: nn.Module,
    config: Mapping[str, Any],
    local_rank: int,
    parameters: list[Parameter],
    optimizer: Optimizer | None = None,
    lr_scheduler: Any = None,
) -> tuple[Any, Any]:
    """Returns an engine around a module, and DeepSpeed's optimizer around an optimizer.

    Args:
        module: A module that no other engine has; see :func:`release`.
        config: DeepSpeed's, left as it is.
        local_rank: Of this process on its node.
        parameters: Those that are trained.
        optimizer: Of them; ``None`` where the config says it, and for inference.
        lr_scheduler: Of the optimizer.
    """
    import deepspeed

    _check_partition_group(config)
    engine, optimizer, _, _ = deepspeed.initialize(
        args=argparse.Namespace(device_rank=local_rank),
        config=copy.deepcopy(dict(config)),
        model=module,
        model_parameters=parameters,
        optimizer=optimizer,
        lr_scheduler=lr_scheduler,
        dist_init_required=False,
    )
    _engines[module] = weakref.ref(engine)
    return engine, optimizer


def partitioned(config: Mapping[str, Any], remote_device: str | None) -> Any:
    """A context in which modules are made in parts, for the first time or again.

    Args:
        config: DeepSpeed's.
        remote_device: Where parts rest, ``None`` where they are used.
    """
    import deepspeed
    from deepspeed.utils import groups

    _check_partition_group(config)
    return deepspeed.zero.Init(
        remote_device=remote_device,
        config_dict_or_path=copy.deepcopy(dict(config)),
        zero_param_parallel_group=groups._get_zero_param_intra_parallel_group(),
    )


def release(module: nn.Module) -> None:
    """Takes the hooks of an earlier engine off a module, so that another one can be made."""
    reference = _engines.pop(module, None)
    engine = None if reference is None else reference()
    if engine is None:
        return
    engine.destroy()
    for name in _HOOKS:
        hook = getattr(engine, name, None)
        if hook is not None:
            hook.remove()


def _check_partition_group(config: Mapping[str, Any]) -> None:
    """Refuses another secondary partition than that of an earlier run, which DeepSpeed would take.

    Raises:
        MisconfigurationException: With both sizes.
    """
    from deepspeed.utils import groups

    group = groups._get_zero_param_intra_parallel_group()
    wanted = config["zero_optimization"].get("zero_hpz_partition_size", 1)
    if group is not None and dist.get_world_size(group) != wanted:
        raise MisconfigurationException(
            f"The secondary partition is of {wanted} ranks, and an earlier run of this process has"
            f" made one of {dist.get_world_size(group)}, which DeepSpeed keeps. Hint: the same"
            " hpz_partition_size, or another process."
        )
