"""Modules that a strategy has sharded before, in the same process."""

from __future__ import annotations

from collections.abc import Mapping
from weakref import WeakKeyDictionary

from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn

_EARLIER: WeakKeyDictionary[nn.Module, dict[str, str]] = WeakKeyDictionary()


def require_as_before(module: nn.Module, owner: str, settings: Mapping[str, object]) -> None:
    """Refuses to go on with a module that was sharded with other settings, which would stay.

    Args:
        module: The LightningModule, sharded or not.
        owner: Name of the strategy.
        settings: Its values by name, but for those of the module.

    Raises:
        MisconfigurationException: With what differs.
    """
    own = {"strategy": owner, **{name: _text(value) for name, value in settings.items()}}
    before = _EARLIER.setdefault(module, own)
    names = [name for name in {**before, **own} if before.get(name) != own.get(name)]
    if names:
        found = ", ".join(f"{name}={before.get(name)} (now {own.get(name)})" for name in names)
        raise MisconfigurationException(
            f"{type(module).__name__} was sharded before with {found}, and stays so. Allowed are"
            " the same settings. Hint: a new module, with the weights of an export."
        )


def _text(value: object) -> str:
    """What a value says of itself, without the address of a function or policy."""
    text = repr(value)
    return type(value).__name__ if " at 0x" in text else text
