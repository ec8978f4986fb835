"""What an optimizer keeps, found by one step on fake tensors.

Private: ``torch._subclasses.fake_tensor``; the hooks and ``step`` in an optimizer's ``__dict__``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from copy import deepcopy
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
)
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_ext.callbacks._memory._count import storage_bytes, tensors_in
from lightning_ext.callbacks._memory._fake import Part, fake_like, faked
from lightning_ext.callbacks._memory._ranks import Split, one_of

OptimizerLike = Optimizer | Callable[[list[Tensor]], Optimizer]


class Answers(NamedTuple):
    """What a number that nobody knows is taken for, by its kind."""

    decision: bool
    whole: int
    real: float


# States are what they are where both lead to the same bytes.
_ANSWERS = (Answers(False, 1, 0.5), Answers(True, 2, 0.25))
_CPU = torch.device("cpu")  # states have the same shapes on all devices, and no kernel is launched


class Found(NamedTuple):
    """States after a step.

    Attributes:
        names: Of the optimizers.
        sizes: Bytes by identity of the parameter.
        counts: How many tensors there are, likewise; fewer where another rank keeps the rest.
        asked: Which optimizer asked for a number; empty if none did.
    """

    names: str
    sizes: dict[int, int]
    counts: dict[int, int]
    asked: str


def state_bytes_of(
    module: nn.Module,
    optimizer: OptimizerLike | None,
    split: Split | None = None,
    dtype: torch.dtype | None = None,
) -> dict[int, int]:
    """Finds the bytes of an optimizer's states after its first step, by parameter.

    Where parameters are shared out, those of the rank that keeps most: it is the first one, unless
    ranks own states of whole matrices; then all are tried.

    Args:
        module: Whose parameters it steps; nothing of it changes.
        optimizer: One, which stays as it is; what makes one of parameters; or ``None`` for what
            ``configure_optimizers`` returns.
        split: How parameters are shared out.
        dtype: In which parameters are stepped; ``None``: their own.

    Returns:
        Bytes by identity of the parameter.

    Raises:
        ValueError: The step depends on numbers, which fake tensors do not have; the optimizer has
            none of the parameters; or owners would have to be told for a part of a pipeline.
        TypeError: There is no optimizer.
    """
    if split is None or split.ranks == 1:
        return _checked(module, optimizer, Part(dtype)).sizes
    first = _on_rank(module, optimizer, split, 0)
    second = _on_rank(module, optimizer, split, 1)
    if first.counts == second.counts:
        return first.sizes
    if split.chosen is not None:
        what = "has states of whole matrices with owners, of which each part of a pipeline has its"
        raise ValueError(_refusal(first.names, f"{what} own"))
    others = (_on_rank(module, optimizer, split, rank) for rank in range(2, split.ranks))
    return max((first, second, *others), key=lambda found: sum(found.sizes.values())).sizes


def _on_rank(module: nn.Module, optimizer: OptimizerLike | None, split: Split, rank: int) -> Found:
    with one_of(split.ranks, rank) as mesh:
        return _checked(module, optimizer, Part(None, split, mesh))


def _checked(module: nn.Module, optimizer: OptimizerLike | None, part: Part) -> Found:
    """States that no unknown number decides."""
    found = _after_step(module, optimizer, part, _ANSWERS[0])
    if found.asked:
        again = _after_step(module, optimizer, part, _ANSWERS[1])
        if again.sizes != found.sizes:
            raise ValueError(_refusal(found.asked, "keeps what numbers decide in its step"))
    trained = {id(p) for p in module.parameters() if p.requires_grad}
    if trained and trained.isdisjoint(found.sizes):
        raise ValueError(
            f"the optimizer has none of the parameters of {type(module).__name__} that are trained;"
            " allowed is one of some or all of them. Hint: optimizer=torch.optim.AdamW, the class,"
            " takes those of the module"
        )
    return found


def _after_step(
    module: nn.Module, optimizer: OptimizerLike | None, part: Part, answers: Answers
) -> Found:
    asked = ""
    with faked(module, _CPU, part) as fakes:
        made = list(_made(module, optimizer, fakes, part))
        for one in made:
            asked = _step(one, answers) or asked
        stepped = {id(p) for one in made for p in _parameters(one)}
        kept = {key: _kept(p, made) for key, p in fakes.items() if id(p) in stepped}
        sizes = {key: storage_bytes(kept[key], without=[fakes[key]]) for key in kept}
        names = ", ".join(type(one).__name__ for one in made)
        return Found(names, sizes, {key: len(some) for key, some in kept.items()}, asked)


def _made(
    module: nn.Module,
    optimizer: OptimizerLike | None,
    fakes: dict[int, Tensor],
    part: Part,
) -> Iterator[Optimizer]:
    """The optimizers on fake parameters."""
    if isinstance(optimizer, Optimizer):
        yield _copy(optimizer, fakes, part)
        return
    make: Any = optimizer
    found = _configured(module) if make is None else make(list(module.parameters()))
    several = list(_optimizers_in(found))
    if not several:
        raise TypeError(
            f"there is no optimizer in what was made, {found!r}; allowed is what"
            " configure_optimizers may return. Hint: optimizer=torch.optim.AdamW"
        )
    yield from several


def _configured(module: Any) -> Any:
    name = type(module).__name__
    if not hasattr(module, "configure_optimizers"):
        raise TypeError(
            f"memory_plan got no optimizer, and {name} has no configure_optimizers. Hint:"
            " optimizer=torch.optim.AdamW"
        )
    try:
        return module.configure_optimizers()
    except RuntimeError as error:
        if "attached to a" not in str(error):
            raise
        raise ValueError(
            f"{name}.configure_optimizers reads self.trainer, and a plan has no Trainer; allowed is"
            " one without. Hint: memory_plan(..., optimizer=torch.optim.AdamW)"
        ) from error


def _optimizers_in(value: Any) -> Iterator[Optimizer]:
    """What ``configure_optimizers`` may return, without schedulers."""
    if isinstance(value, Optimizer):
        yield value
    elif isinstance(value, dict):
        yield from _optimizers_in(value.get("optimizer"))
    elif isinstance(value, (list, tuple)):
        for each in value:
            yield from _optimizers_in(each)


def _copy(optimizer: Optimizer, fakes: dict[int, Tensor], part: Part) -> Optimizer:
    """The same settings, hooks left out, on fake parameters; none of its tensors is copied."""
    copied: Optimizer = object.__new__(type(optimizer))
    memo: dict[int, Any] = {id(optimizer): copied, **fakes}
    for parameter in _parameters(optimizer):
        memo.setdefault(id(parameter), fake_like(parameter, _CPU, part))
        for kept in tensors_in(optimizer.state.get(parameter, {})):
            memo[id(kept)] = (
                torch.empty_like(memo[id(parameter)], dtype=kept.dtype, requires_grad=False)
                if kept.shape == parameter.shape
                else torch.empty(kept.shape, dtype=kept.dtype)
            )
    own = {name: value for name, value in vars(optimizer).items() if name != "step"}
    own |= {name: type(own[name])() for name in own if name.endswith("_hooks")}
    with _FakeCopies():
        vars(copied).update(deepcopy(own, memo))
    for parameter in _parameters(optimizer) if part.split is not None else []:
        old = tensors_in(optimizer.state.get(parameter, {}))
        if any(x.ndim and x.shape != parameter.shape for x in old):
            copied.state.pop(memo[id(parameter)], None)  # made anew, for the rows of this rank
    return copied


def _step(optimizer: Optimizer, answers: Answers) -> str:
    for parameter in _parameters(optimizer):
        if parameter.requires_grad:
            parameter.grad = torch.empty_like(parameter)
    step: Any = optimizer.step
    name = type(optimizer).__name__
    try:
        with _Numbers(optimizer, answers) as numbers:
            step(lambda: torch.ones(()))
    except (DataDependentOutputException, DynamicOutputShapeException) as error:
        raise ValueError(_refusal(name, f"reads shapes by {error.func} in its step")) from error
    except RuntimeError as error:
        if not any(isinstance(parameter, DTensor) for parameter in _parameters(optimizer)):
            raise
        why = str(error).partition("\n")[0]
        raise ValueError(_refusal(name, f"takes no step on shards ({why})")) from error
    return name if numbers.asked else ""


def _refusal(optimizer: str, what: str) -> str:
    return (
        f"{optimizer} {what}; allowed is what shapes alone decide."
        " Hint: memory_plan(..., state_bytes=8), bytes of its states for each trained parameter"
    )


class _FakeCopies(TorchFunctionMode):
    """Copies tensors, deeply, without their memory."""

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        """Stands in for copies alone."""
        if func is not Tensor.__deepcopy__:
            return func(*args, **(kwargs or {}))
        tensor, memo = args
        return memo.setdefault(id(tensor), fake_like(tensor, _CPU))


class _Numbers(TorchDispatchMode):
    """Has a step go on where it reads a number of a fake tensor.

    A count of steps is 1, as after the first one; what else is unknown is as given.

    Args:
        optimizer: Whose step it is.
        answers: What is read, if it is unknown.
    """

    def __init__(self, optimizer: Optimizer, answers: Answers) -> None:
        super().__init__()
        self._optimizer, self._answers, self.asked = optimizer, answers, False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        """Answers where a number is read."""
        is_read = func is torch.ops.aten._local_scalar_dense.default
        if not is_read and any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # it comes again with the tensors of this rank
        if not is_read or getattr(args[0], "constant", None) is not None:
            return func(*args, **(kwargs or {}))
        if self._is_count(args[0]):
            return 1.0 if args[0].is_floating_point() else 1
        self.asked = True
        if args[0].dtype is torch.bool:
            return self._answers.decision
        return self._answers.real if args[0].is_floating_point() else self._answers.whole

    def _is_count(self, tensor: Tensor) -> bool:
        states = self._optimizer.state.values()
        return any(isinstance(each, dict) and each.get("step") is tensor for each in states)


def _kept(parameter: Tensor, optimizers: Iterable[Optimizer]) -> list[Tensor]:
    return list(tensors_in([x.state[parameter] for x in optimizers if parameter in x.state]))


def _parameters(optimizer: Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]
