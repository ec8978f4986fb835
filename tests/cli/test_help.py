"""Help on the command line: each argument with its text and a type that one can read."""

from __future__ import annotations

import inspect
import re
from typing import Any

import pytest
from harness.cli_parts import (
    CALLBACKS,
    LOSSES,
    OPTIMIZERS,
    PRECONDITIONERS,
    RULES,
    SCHEDULES,
    STRATEGIES,
    WRAPPERS,
    told,
)
from harness.deepspeed_parts import KNOWN_WARNINGS, warm_up

from lightning_ext import callbacks, losses, nn, optim, scaling, strategies

pytestmark = KNOWN_WARNINGS
RULE = ("--trainer.callbacks=lightning_ext.callbacks.AdaptiveBatchSize",)
# By room and name: the options in which the member is asked about, and what it is handed there.
ASKED: dict[str, tuple[Any, tuple[str, ...], set[str]]] = {
    **{f"callbacks.{name}": (callbacks, ("--trainer.callbacks",), set()) for name in CALLBACKS},
    **{f"strategies.{name}": (strategies, ("--trainer.strategy",), set()) for name in STRATEGIES},
    **{f"scaling.{name}": (scaling, (*RULE, "--trainer.callbacks.rule"), set()) for name in RULES},
    **{
        f"optim.{name}": (optim, ("--optimizer", "--model.optimizer"), {"params"})
        for name in OPTIMIZERS
    },
    **{f"optim.{name}": (optim, ("--model.wrap",), {"base"}) for name in WRAPPERS},
    **{
        f"optim.{name}": (optim, ("--model.precondition",), {"base", "module"})
        for name in PRECONDITIONERS
    },
    **{
        f"optim.{name}": (optim, ("--lr_scheduler", "--model.schedule"), {"optimizer"})
        for name in SCHEDULES
    },
    **{f"losses.{name}": (losses, ("--model.loss",), set()) for name in LOSSES},
    "nn.Int8Linear": (nn, ("--model.loss",), set()),
}
# What no reader can make sense of.
JUNK = re.compile(r"<class|Untyped|\bAny\b(?!\])|lambda|object at|Unresolved|default: <")
_ENTRY = re.compile(r"^  --(\S+?)\+?[ ,\n](.*?)(?=^  --|^\S|\Z)", re.MULTILINE | re.DOTALL)
_TYPE = re.compile(r"^(?P<text>.*?) ?\((?:required, )?type: (?P<type>.*)\)$")


@pytest.fixture(scope="module", autouse=True)
def _warm() -> None:
    warm_up()


def entries(text: str) -> dict[str, str]:
    """What is said of each argument, on one line each, by the last part of its name."""
    found = {name: " ".join(rest.split()) for name, rest in _ENTRY.findall(text)}
    return {name.rpartition(".")[2]: rest for name, rest in found.items() if name[-5:] != ".help"}


def own_arguments(kind: type) -> list[str]:
    found = inspect.signature(kind).parameters.values()
    return [p.name for p in found if p.kind is not p.VAR_KEYWORD]


@pytest.mark.parametrize("name", ASKED)
def test_each_argument_is_told(name: str) -> None:
    room, options, handed = ASKED[name]
    kind = getattr(room, name.partition(".")[2])
    before = [option for option in options if "=" in option]
    for option in options[len(before) :]:
        text = told(*before, f"{option}.help=lightning_ext.{name}")
        found = entries(text)
        if found:
            summary = (kind.__doc__ or "").partition("\n")[0].rstrip(".")
            assert summary in " ".join(text.split())
        for argument in own_arguments(kind):
            if argument in handed:
                assert argument not in found
                continue
            if argument == "table":  # its fields stand there, under a heading of their own
                assert {"samples", "factors", "global_batch"} <= set(found)
                continue
            line = _TYPE.match(re.sub(r"^[A-Z_]+ |^\S+ (?=\S)", "", found[argument], count=1))
            assert line is not None, f"{argument}: {found[argument]}"
            assert len(line["text"]) > 1, f"{argument} has no help"
            assert not JUNK.search(line["type"]), f"{argument}: {line['type']}"


def test_an_argument_without_a_text_would_be_seen() -> None:
    text = "Help\n\nWhat it is:\n  --a.rate RATE      (type: <class 'X'>, default: null)\n"
    found = _TYPE.match(entries(text)["rate"].removeprefix("RATE "))
    assert found is not None
    assert not found["text"]
    assert JUNK.search(found["type"])
