"""What goes wrong in a step under a pipeline is an error on all ranks, and never a hang."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import pytest
from harness import run_distributed
from harness.pipeline_faults import SIZE, Batches, Own, batches, fail, fitting, loader, rank
from harness.pipeline_parts import Chain
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.nn import functional as F
from torchmetrics import MeanMetric


class Stepping(Chain):
    """A chain with another training step, of the batch and the module."""

    def __init__(self, step: Callable[[Any, Any], Any]) -> None:
        super().__init__()
        self.step = step
        self.mean = MeanMetric()

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.step(self, batch)


class Stashing(Chain):
    """The third layer adds what another one has kept for it."""

    def __init__(self, keeper: int, *, detached: bool = False) -> None:
        super().__init__()
        self.kept: Any = None
        inner = self.net[keeper]

        def keep(x: Tensor) -> Tensor:
            found = inner(x)
            self.kept = found.detach() if detached else found
            return found

        self.net[keeper] = Own(keep, inner)
        self.net[4] = Own(lambda x: x + self.kept)


def changed(layer: int, function: Callable[..., Any], *, after: bool = False) -> Chain:
    """A chain of which one layer is a function, or gives what a function makes of it."""
    module = Chain()
    inner = module.net[layer]
    module.net[layer] = Own(lambda x: function(inner(x)), inner) if after else Own(function)
    return module


def loss_of(module: Any, batch: Any) -> Tensor:
    return F.cross_entropy(module(batch[0]), batch[1])


def failing_before(module: Any, batch: Any) -> Tensor:
    fail(0)
    return loss_of(module, batch)


def failing_after(module: Any, batch: Any) -> Tensor:
    loss = loss_of(module, batch)
    fail()
    return loss


def failing_in_a_layer(x: Tensor) -> Tensor:
    fail()
    return x


def ragged(module: Any, batch: Any) -> Tensor:
    x, y = batch
    kept = x[:, 0] > 0
    return F.cross_entropy(module(x[kept]), y[kept])


def twice(module: Any, batch: Any) -> Tensor:
    return loss_of(module, batch) + loss_of(module, batch)


def updating_after(module: Any, batch: Any) -> Tensor:
    loss = loss_of(module, batch)
    module.mean.update(loss.detach())
    return loss


def updating_before(module: Any, batch: Any) -> Tensor:
    module.mean.update(batch[0])
    return loss_of(module, batch)


def logging_a_metric(module: Any, batch: Any) -> Tensor:
    loss = loss_of(module, batch)
    module.log("mean", module.mean)
    return loss


class Case(NamedTuple):
    """Something that goes wrong."""

    told: str
    module: Callable[[], Chain] = Chain
    batches: Callable[[], Batches] = lambda: batches(SIZE)
    options: Mapping[str, Any] = MappingProxyType({})


def stepping(step: Callable[[Any, Any], Any]) -> Callable[[], Chain]:
    return lambda: Stepping(step)


CASES = {
    "another size of batch": Case(
        r"10 samples cannot be cut into micro-batches of 4, as the first was.*multiples of 4",
        batches=lambda: batches(SIZE, 10, SIZE),
    ),
    "an uneven last batch": Case(
        r"15 samples cannot be cut.*drop_last=True", batches=lambda: batches(SIZE, SIZE, 15)
    ),
    "a first batch that cannot be cut": Case(
        "15 samples cannot be cut into 4 equal micro-batches", batches=lambda: batches(15)
    ),
    "fewer samples than micro-batches": Case("A batch of 3 samples", batches=lambda: batches(3)),
    "micro-batches of other shapes": Case(
        "Micro-batches of one batch differ in what 'net' is called with", stepping(ragged)
    ),
    "other samples on a rank": Case(
        "ranks of a pipeline have different batches",
        batches=lambda: [[x + rank(), y] for x, y in batches(SIZE)],
    ),
    "another order on a rank": Case(
        "ranks of a pipeline have different batches",
        batches=lambda: [[x.roll(rank(), 0), y.roll(rank())] for x, y in batches(SIZE)],
    ),
    "other texts on a rank": Case(
        "ranks of a pipeline have different batches",
        stepping(lambda m, b: loss_of(m, b[:2])),
        lambda: [[x, y, [str(rank())] * SIZE] for x, y in batches(SIZE)],
    ),
    "another size of batch on a rank": Case(
        "ranks of a pipeline have different batches",
        batches=lambda: batches(SIZE * (1 + rank())),
    ),
    "an odd size of batch on a rank": Case(
        "15 samples cannot be cut", batches=lambda: batches(SIZE - rank())
    ),
    "fewer batches on a rank": Case(
        "different numbers of them", batches=lambda: batches(*[SIZE] * (1 + rank()))
    ),
    "an error of a layer": Case(
        r"KeyError: 'of a user' \(.*pipeline_faults.py:\d+ in fail; stage 3 on pipeline rank",
        lambda: changed(3, failing_in_a_layer),
    ),
    "an error before the call": Case(
        r"KeyError: 'of a user' \(.*pipeline_faults.py:\d+ in fail; rank 0",
        stepping(failing_before),
    ),
    "an error in the loss": Case(
        "KeyError: 'of a user'.* in fail; stage 3", stepping(failing_after)
    ),
    "fewer layers than stages": Case(
        "6 stages cannot be made of 5 layer", options={"stages_per_rank": 3}
    ),
    "a submodule that is called twice": Case("'net'.* more than once", stepping(twice)),
    "a submodule that is not called": Case(
        "did not call 'net'", stepping(lambda m, b: m.head(m.first(b[0])).sum())
    ),
    "a skip on the same rank": Case("stage 1 keeps 'kept'.*uses", lambda: Stashing(1)),
    "a skip to another rank": Case("stage 0 keeps 'kept'.*uses", lambda: Stashing(0)),
    "a skip without a gradient": Case("TypeError", lambda: Stashing(1, detached=True)),
    "a dict between stages": Case(
        "stage 1 gives dict to the next one", lambda: changed(1, lambda x: {"x": x}, after=True)
    ),
    "nothing between stages": Case(
        "stage 1 gives NoneType to the next one", lambda: changed(1, lambda x: None)
    ),
    "a number between stages": Case(
        "stage 2 gives int to the next one", lambda: changed(2, lambda x: (x, 3))
    ),
    "a dict for the loss": Case(
        "stage 3 gives dict to the loss", lambda: changed(4, lambda x: {"x": x}, after=True)
    ),
    "no loss": Case(
        "training_step returned NoneType", stepping(lambda m, b: loss_of(m, b) and None)
    ),
    "a vector as loss": Case(
        "training_step returned Tensor", stepping(lambda m, b: m(b[0]).sum(0))
    ),
    "a metric that is logged": Case("logs 'mean' as a MeanMetric", stepping(logging_a_metric)),
    "a metric that is updated": Case("updates 'mean', a MeanMetric", stepping(updating_after)),
    "a metric that is updated before": Case("updates 'mean'", stepping(updating_before)),
}


class Ended(NamedTuple):
    """How a rank saw the end of its run."""

    kind: type[BaseException]
    text: str
    cause: str
    seconds: float
    steps: int


def ended(case: Case) -> Ended:
    run = fitting(**case.options)
    start = time.monotonic()
    with pytest.raises(Exception) as caught:  # noqa: PT011 - the test looks at it
        run.fit(case.module(), loader(case.batches()))
    error = caught.value
    cause = type(error.__cause__).__name__
    return Ended(type(error), str(error), cause, time.monotonic() - start, run.global_step)


def all_ended() -> dict[str, Ended]:
    return {name: ended(case) for name, case in CASES.items()}


@pytest.fixture(scope="module")
def ends() -> list[dict[str, Ended]]:
    return run_distributed(all_ended, 2, timeout=120)


@pytest.mark.parametrize("name", CASES)
def test_a_fault_is_an_error_on_all_ranks(name: str, ends: list[dict[str, Ended]]) -> None:
    for end in (one[name] for one in ends):
        assert end.kind is MisconfigurationException, end.text
        assert end.seconds < 10.0
        assert re.search(CASES[name].told, end.text, re.DOTALL), end.text


@pytest.mark.parametrize(
    ("name", "failing"),
    [("an error of a layer", 1), ("an error before the call", 0), ("an error in the loss", 1)],
)
def test_the_error_itself_is_the_cause_where_it_was_raised(
    name: str, failing: int, ends: list[dict[str, Ended]]
) -> None:
    causes = [one[name].cause for one in ends]
    assert causes[failing] == "KeyError"
    assert causes[1 - failing] == "NoneType"


def test_batches_before_the_fault_are_trained(ends: list[dict[str, Ended]]) -> None:
    assert [one["an uneven last batch"].steps for one in ends] == [2, 2]
