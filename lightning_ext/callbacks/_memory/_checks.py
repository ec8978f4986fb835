"""What a plan refuses before anything is run."""

from __future__ import annotations

from difflib import get_close_matches
from typing import Any

from torch import nn

from lightning_ext.callbacks._memory._layouts import STRATEGIES


def check_module(module: Any) -> None:
    """Refuses what is no module.

    Args:
        module: What was given for one.

    Raises:
        TypeError: It is none.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(
            f"module is a {type(module).__name__}; allowed is an nn.Module. Hint: what is trained"
            " itself, such as the LightningModule that trainer.fit takes"
        )


def check_optimizer(optimizer: Any) -> None:
    """Refuses what makes no optimizer.

    Args:
        optimizer: What was given; ``None`` and one that stands already are allowed.

    Raises:
        TypeError: It cannot be called.
    """
    if optimizer is not None and not callable(optimizer) and not hasattr(optimizer, "param_groups"):
        raise TypeError(
            f"optimizer={optimizer!r} is a {type(optimizer).__name__}; allowed are a class, a"
            " function of a list of parameters, an optimizer, or None for what"
            " configure_optimizers returns. Hint: optimizer=torch.optim.AdamW"
        )


def named(strategy: Any, devices: int) -> str:
    """Returns the name of a strategy, "auto" resolved.

    Args:
        strategy: What was given for one.
        devices: All ranks.

    Raises:
        TypeError: It is no name.
        ValueError: It is unknown, or does not fit the devices.
    """
    allowed = f"allowed is one of {', '.join(STRATEGIES)}"
    if not isinstance(strategy, str):
        kind = type(strategy).__name__
        near = _nearest(kind.removesuffix("Strategy"))
        raise TypeError(f"strategy is a {kind}; {allowed}. Hint: strategy={near!r}")
    if strategy not in STRATEGIES:
        near = _nearest(strategy)
        raise ValueError(f"strategy={strategy!r} is unknown; {allowed}. Hint: strategy={near!r}")
    if strategy == "single" and devices != 1:
        raise ValueError(
            f"strategy='single' with devices={devices}; allowed is one device. Hint: strategy='ddp'"
        )
    if strategy != "auto":
        return strategy
    return "single" if devices == 1 else "ddp"


def require_counts(**counts: Any) -> None:
    """Refuses what counts nothing.

    Args:
        counts: By the names of arguments.

    Raises:
        ValueError: One is no integer of 1 or more.
    """
    for name, value in counts.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}={value!r} is not allowed; it must be an integer of 1 or more")


def _nearest(name: str) -> str:
    return (get_close_matches(name.lower(), STRATEGIES, 1, 0.3) or ["auto"])[0]
