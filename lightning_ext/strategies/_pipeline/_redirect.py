"""Calls of the split submodule in a user's step: their arguments, and what they return.

Source: derived; the first rank runs a step up to the call, the last one runs it with what the
    stages have made of the arguments.
"""

from __future__ import annotations

import inspect
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn


class Call(NamedTuple):
    """Arguments of a call."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class _Called(BaseException):
    """Ends a step at the call; no ``except Exception`` of a user's stops it."""

    def __init__(self, call: Call) -> None:
        super().__init__("the split submodule was called")
        self.call = call


@contextmanager
def replaced_forward(owner: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Another ``forward`` of a module, in a ``with`` block.

    Args:
        owner: The module.
        forward: Takes its arguments.
    """
    before = vars(owner).get("forward")
    vars(owner)["forward"] = forward
    try:
        yield
    finally:
        del vars(owner)["forward"]
        if before is not None:
            vars(owner)["forward"] = before


def captured(
    owner: nn.Module, name: str, step: Callable[[], Any], what: str = "training_step"
) -> Call:
    """Runs a step up to its call of the split submodule.

    Args:
        owner: The submodule.
        name: Of it, for errors.
        step: Without arguments.
        what: The name of the step, for errors.

    Raises:
        MisconfigurationException: The step does not call it.
    """

    def capture(*args: Any, **kwargs: Any) -> Any:
        raise _Called(Call(args, kwargs))

    with replaced_forward(owner, capture):
        try:
            step()
        except _Called as found:
            return found.call
        except Exception as error:  # raised again, or as the cause of what explains it
            if not _ran_layers(owner, error):
                raise
            raise MisconfigurationException(
                f"{what} runs layers of {name!r} one by one, and this rank has some of them only."
                f" Allowed is one call of the whole, self.{name}(x). Hint: with pipeline_layers()"
                " their owner may have a forward of its own."
            ) from error
    raise MisconfigurationException(
        f"{what} did not call {name!r}, which is split into stages. Allowed is one call in"
        " each step. Hint: define pipeline_inputs(batch) and pipeline_loss(output, batch)."
    )


def _ran_layers(owner: nn.Module, error: Exception) -> bool:
    """Whether an error came through a layer."""
    layers = {id(one) for one in owner.modules() if one is not owner}
    frames = (frame for frame, _ in traceback.walk_tb(error.__traceback__))
    return any(id(frame.f_locals.get("self")) in layers for frame in frames)


def require_taken(call: Call, layer: nn.Module, name: str) -> None:
    """Refuses keyword arguments that only a forward of the whole submodule could take.

    Args:
        call: Of the submodule.
        layer: Its first one.
        name: Of the submodule.

    Raises:
        MisconfigurationException: The first layer does not take one.
    """
    taken = inspect.signature(layer.forward).parameters.values()
    if any(one.kind is inspect.Parameter.VAR_KEYWORD for one in taken):
        return
    unknown = call.kwargs.keys() - {one.name for one in taken}
    if unknown:
        raise MisconfigurationException(
            f"{name!r} is called with {', '.join(sorted(unknown))}=, which its first layer,"
            f" {type(layer).__name__}, does not take. Allowed are the arguments of the first layer;"
            " each other one gets what the one before returns. Hint: hand it on in a tuple from"
            " layer to layer of pipeline_layers(), or define pipeline_inputs(batch)."
        )


def redirected(owner: nn.Module, name: str, output: Any, step: Callable[[], Any]) -> Any:
    """Runs a step in which the split submodule returns what the stages have made.

    Args:
        owner: The submodule.
        name: Of it, for errors.
        output: Of the last stage.
        step: Without arguments.

    Raises:
        MisconfigurationException: The step calls it again.
    """
    calls = 0

    def answer(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls > 1:
            raise MisconfigurationException(
                f"training_step calls {name!r}, which is split into stages, more than once."
                " Allowed is one call in each step. Hint: define pipeline_inputs(batch), which"
                " joins the arguments, and pipeline_loss(output, batch)."
            )
        return output

    with replaced_forward(owner, answer):
        return step()
