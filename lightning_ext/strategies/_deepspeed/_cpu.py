"""DeepSpeed where there is no CUDA device: which accelerator it takes, and what it compiles.

Private: ``deepspeed.ops.__compatible_ops__``. Without it DeepSpeed compiles a C++ module for
    all-reduce in shared memory in every new environment, about 46 s, although gloo does as well; a
    rank that ends meanwhile leaves a lock at which the next run waits for ever.
"""

from __future__ import annotations

import os
from types import ModuleType

import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_ext._require import require

_SHARED_MEMORY = "deepspeed_shm_comm"


def import_deepspeed() -> ModuleType:
    """Imports DeepSpeed, told that this is a CPU where there is no CUDA device.

    Raises:
        ModuleNotFoundError: It is not installed; with the extra to install.
    """
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # read once, by the import
    return require("deepspeed", "deepspeed")


def prepare_cpu(ranks_per_node: int) -> None:
    """Makes DeepSpeed ready for ranks on CPUs, before it builds its process groups.

    Args:
        ranks_per_node: What DeepSpeed is to take for the devices of a node.

    Raises:
        MisconfigurationException: DeepSpeed was imported for another accelerator.
    """
    import deepspeed.ops
    from deepspeed.accelerator import get_accelerator

    name = get_accelerator().device_name()
    if name != "cpu":
        raise MisconfigurationException(
            f"DeepSpeed was imported for {name!r} and the Trainer has accelerator='cpu'. Hint: set"
            " the environment variable DS_ACCELERATOR=cpu before Python starts."
        )
    os.environ["LOCAL_SIZE"] = str(ranks_per_node)
    deepspeed.ops.__compatible_ops__[_SHARED_MEMORY] = False
