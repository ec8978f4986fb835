"""What a stage or the loss would take past the stages between: seen in a rehearsal, and refused.

A layer can leave something on an attribute for a later one. On other ranks it is not there, and
beside several micro-batches it is of another one. A loss can read parameters, of which its rank
has those of its own stages alone.

Private: ``Node._sequence_nr`` of torch's autograd, by which what the loss has computed is told from
    what the stages have.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lightning_ext._lightning import untouched

Place = tuple[str, str]  # name of a module, and of its attribute
_MISSING: Any = object()
_OF_TORCH = frozenset(vars(nn.Module()))
_HINT = (
    "Allowed are inputs from the stage before. Hint: hand a skip connection on in a tuple from"
    " layer to layer of pipeline_layers(), or split elsewhere."
)


def common_parameters(root: nn.Module, stages: Mapping[int, nn.Module]) -> list[Tensor]:
    """Parameters of a rank that are of several stages, or that others than layers have.

    Args:
        root: The LightningModule.
        stages: This rank's by index.
    """
    counts = Counter(id(p) for one in stages.values() for p in one.parameters())
    inside = {id(module) for one in stages.values() for module in one.modules()}
    rest = [module for module in root.modules() if id(module) not in inside]
    outside = {id(p) for module in rest for p in module.parameters(recurse=False)}
    return [p for p in root.parameters() if counts[id(p)] != 1 or id(p) in outside]


class Graphs:
    """Of which parameters and inputs the outputs of a rank's stages are made.

    Args:
        common: Parameters that several stages may use.
    """

    def __init__(self, common: Collection[Tensor]) -> None:
        self._common = {id(x) for x in common}
        self._leaves: dict[int, list[Tensor]] = {}  # kept, so that no identity is used again

    def require_apart(self, index: int, outputs: Sequence[Any]) -> None:
        """Refuses outputs that are made of what another stage has made.

        Args:
            index: Of the stage.
            outputs: Its tensors and other things.

        Raises:
            MisconfigurationException: With the other stage.
        """
        found = _leaves(outputs)
        own = {id(x) for x in found} - self._common
        for other, leaves in self._leaves.items():
            if any(id(x) in own for x in leaves):
                raise MisconfigurationException(
                    f"stage {index} takes what stage {other} has made past the stages between"
                    f" them. {_HINT}"
                )
        self._leaves[index] = found


def _leaves(outputs: Sequence[Any], begin: int = 0) -> list[Tensor]:
    """Tensors that gradients of the outputs end in, not past what was recorded before.

    FSDP2's are gathered parameters.
    """
    todo: list[Any] = [x.grad_fn for x in outputs if isinstance(x, Tensor) and x.grad_fn]
    seen, leaves = set(todo), []
    while todo:
        node: Any = todo.pop()
        if isinstance(variable := getattr(node, "variable", None), Tensor):
            leaves.append(variable)
        following = {
            one for one, _ in node.next_functions if one is not None and one._sequence_nr() >= begin
        } - seen
        seen |= following
        todo += following
    return leaves


def begin_of_loss() -> int:
    """A number that what autograd records from now on reaches, and nothing before."""
    with torch.enable_grad():
        marker: Any = torch.ones((), requires_grad=True).clone().grad_fn
    number: int = marker._sequence_nr()
    return number


def require_no_stage_parameters(
    loss: Tensor, begin: int, root: nn.Module, stages: Mapping[int, nn.Module]
) -> None:
    """Refuses a loss that is made of parameters of stages, not only of what stages have made.

    ``parameters()`` and ``named_parameters()`` have those of this rank alone, so that a penalty on
    all of them would be one on some.

    Args:
        loss: Of one micro-batch, on the last rank.
        begin: What :func:`begin_of_loss` returned before it was computed.
        root: The LightningModule.
        stages: This rank's by index.

    Raises:
        MisconfigurationException: With their names.
    """
    read = {id(x) for x in _leaves([loss], begin)}
    common = {id(x) for x in common_parameters(root, stages)}
    inside = {id(x) for one in stages.values() for x in one.parameters()} - common
    names = [name for name, x in root.named_parameters() if id(x) in read & inside]
    if names:
        raise MisconfigurationException(
            f"The loss reads {', '.join(names[:4])}{', …' if len(names) > 4 else ''} of the split"
            " submodule itself, of which its rank has some layers only. Allowed are parameters"
            " outside of it. Hint: weight_decay of the optimizer, or"
            " lightning_ext.callbacks.NormLoss."
        )


class Stashes:
    """Attributes of modules on which layers keep tensors, of which other stages see nothing.

    Args:
        root: The LightningModule.
    """

    def __init__(self, root: nn.Module) -> None:
        self._root = root
        self._tables = {name: vars(one) for name, one in root.named_modules()}
        self._originals: dict[Place, Any] = {}

    @contextmanager
    def of_stage(self, found: list[Place]) -> Iterator[None]:
        """Puts attributes back after a stage has run, in a ``with`` block.

        Args:
            found: Gets those on which it kept something with a gradient.
        """
        before = self._with_gradients()
        with untouched(self._root):
            yield
            after = self._with_gradients()
        found += [place for place, kept in after.items() if kept - before.get(place, set())]

    def forbid(self, places: Sequence[Place], stage: int) -> None:
        """Has an error come where another stage uses such an attribute.

        Args:
            places: Of a stage, on any rank.
            stage: Its index.
        """
        for module, name in places:
            table = self._tables[module]
            self._originals.setdefault((module, name), table.get(name, _MISSING))
            table[name] = _Elsewhere(f"stage {stage} keeps {f'{module}.{name}'.lstrip('.')!r}")

    def allow(self) -> None:
        """Puts these attributes back."""
        for (module, name), value in self._originals.items():
            if value is _MISSING:
                del self._tables[module][name]
            else:
                self._tables[module][name] = value
        self._originals.clear()

    def _with_gradients(self) -> dict[Place, set[Tensor]]:
        return {
            (module, name): {
                x for x in tree_leaves(value) if isinstance(x, Tensor) and x.grad_fn is not None
            }
            for module, table in self._tables.items()
            for name, value in table.items()
            if name not in _OF_TORCH
        }


class _Elsewhere:
    """In the place of what another stage keeps."""

    def __init__(self, what: str) -> None:
        self._what = what

    def _refuse(self, *args: Any, **kwargs: Any) -> Any:
        raise MisconfigurationException(
            f"{self._what}, which another stage or the loss uses and other ranks do not have."
            f" {_HINT}"
        )

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        next(x for x in tree_leaves((args, kwargs or {})) if isinstance(x, cls))._refuse()

    __getattr__ = __getitem__ = __setitem__ = __iter__ = __len__ = __bool__ = __call__ = _refuse
    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __float__ = _refuse
    __truediv__ = __rtruediv__ = __matmul__ = __rmatmul__ = __neg__ = __format__ = _refuse
