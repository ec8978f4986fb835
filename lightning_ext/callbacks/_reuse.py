"""Tells a callback that goes on with its module from one that begins with another."""

from __future__ import annotations

from weakref import WeakKeyDictionary, ref

from lightning.pytorch import Callback, LightningModule

_trained: WeakKeyDictionary[Callback, ref[LightningModule]] = WeakKeyDictionary()


def begins_anew(callback: Callback, module: LightningModule) -> bool:
    """Whether a fit with another module came before this one; to be asked once per fit."""
    previous = _trained.get(callback)
    _trained[callback] = ref(module)
    return previous is not None and previous() is not module
