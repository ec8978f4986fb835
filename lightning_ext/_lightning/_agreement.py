"""Whether a run is set up as a callback needs it: alike on all ranks, with whole parameters."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import is_dataclass

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_ext._lightning._view import view

_PLAIN = (bool, int, float, str, tuple, list, dict, type, type(None))


def require_agreement(trainer: Trainer, owner: str, settings: Mapping[str, object]) -> None:
    """Refuses to go on where ranks have other settings, on all of them; one collective.

    Args:
        trainer: The Trainer in ``on_train_start``.
        owner: Whose settings they are.
        settings: Values by name; every rank gives the same names.

    Raises:
        MisconfigurationException: With the names, and what this rank has.
    """
    texts = {name: _text(value) for name, value in settings.items()}
    digests = [zlib.crc32(text.encode()) for text in texts.values()]
    found = view(trainer).gather(torch.tensor(digests, device=trainer.strategy.root_device))
    columns = zip(texts, found.T.tolist(), strict=True)
    differing = [f"{name} (here {texts[name]})" for name, column in columns if len({*column}) > 1]
    if differing:
        raise MisconfigurationException(
            f"Ranks disagree about {', '.join(differing)} of {owner}; it must be the same on all of"
            " them. Hint: build data and callbacks alike on every rank."
        )


def require_whole_parameters(trainer: Trainer, owner: str) -> None:
    """Refuses strategies that split parameters over ranks.

    Args:
        trainer: The Trainer, its strategy set up.
        owner: What needs them whole.

    Raises:
        MisconfigurationException: With the strategy.
    """
    if view(trainer).splits_gradients:
        raise MisconfigurationException(
            f"{owner} needs whole parameters on every rank, and {type(trainer.strategy).__name__}"
            " splits them; allowed are a single device and DDP. Hint: run it there, from a"
            " checkpoint, and take over what it finds."
        )


def _text(value: object) -> str:
    """What a value says of itself, without the address of an object."""
    if isinstance(value, (set, frozenset)):  # in an order of their own in each process
        return f"{{{', '.join(sorted(map(_text, value)))}}}"
    return repr(value) if isinstance(value, _PLAIN) or is_dataclass(value) else type(value).__name__
