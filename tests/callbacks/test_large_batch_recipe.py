"""When LargeBatchRecipe looks at a run, and how it says what it sees."""

from __future__ import annotations

import logging
import pickle
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import fit, loader
from harness._recipes import RecipeModule, decayed, look, topics
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.utils.data import DataLoader

from lightning_ext.callbacks import AdaptiveBatchSize, LargeBatchRecipe


def test_a_clean_run_needs_no_advice() -> None:
    recipe = look(nn.BatchNorm1d(12), train=loader(64, 16, drop_last=True))
    assert recipe.advice == []
    assert recipe.text == ""


@pytest.mark.parametrize("last", [16, 32])
def test_it_looks_again_when_the_batch_has_grown_fourfold(last: int) -> None:
    growing = AdaptiveBatchSize(f"0:8 16:{last}", max_micro_batch=16)
    recipe = look(beside=[growing], train=loader(80, 4))
    assert recipe._looked_again is (last == 32)


def told(capsys: pytest.CaptureFixture[str], recipe: LargeBatchRecipe, **settings: Any) -> str:
    capsys.readouterr()
    fit([recipe], module=RecipeModule(optimizer=decayed), **{"max_epochs": 1, **settings})
    return capsys.readouterr().out


def test_it_prints_a_table_once(capsys: pytest.CaptureFixture[str]) -> None:
    recipe = LargeBatchRecipe()
    out = told(capsys, recipe, train=loader(97))
    assert out.count("Large-batch recipe") == 1
    assert "weight decay" in out
    assert "Goyal" in out
    assert told(capsys, recipe, train=loader(97)) == out


def test_a_resumed_run_says_nothing_twice(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, again, path = LargeBatchRecipe(), LargeBatchRecipe(), tmp_path / "end.ckpt"
    _, run = fit([recipe], module=RecipeModule(optimizer=decayed), max_epochs=1)
    run.save_checkpoint(path)
    assert told(capsys, again, max_epochs=2, ckpt_path=path) == ""
    assert topics(again) == {"weight decay": "advice"}


@pytest.mark.parametrize("on_problem", ["raise", "print"])
def test_a_resumed_run_is_stopped_all_the_same(tmp_path: Path, on_problem: str) -> None:
    module, path = RecipeModule(nn.MSELoss(reduction="sum")), tmp_path / "end.ckpt"
    _, run = fit([LargeBatchRecipe()], module=module, max_epochs=1)
    run.save_checkpoint(path)
    stops = pytest.raises(MisconfigurationException) if on_problem == "raise" else nullcontext()
    with stops:
        fit([LargeBatchRecipe(on_problem=on_problem)], module=module, ckpt_path=str(path))


def test_without_rich_it_writes_lines(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "rich.table", None)
    logger = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    monkeypatch.setattr(logger, "propagate", True)
    with caplog.at_level("INFO"):
        recipe = look(optimizer=decayed)
    assert recipe.text in caplog.text
    assert recipe.text.startswith("advice, weight decay: weight decay on 2 parameters")


def test_a_problem_warns_or_raises() -> None:
    module = RecipeModule(nn.MSELoss(reduction="sum"))
    with pytest.warns(UserWarning, match=r"warning, loss average: reduction=.sum. in extra.0"):
        fit([LargeBatchRecipe(on_problem="warn")], module=module, max_epochs=1)
    with pytest.raises(MisconfigurationException, match="Recommended: reduction="):
        fit([LargeBatchRecipe(on_problem="raise")], module=module, max_epochs=1)
    fit(
        [LargeBatchRecipe(on_problem="raise")], module=RecipeModule(optimizer=decayed), max_epochs=1
    )


def test_another_module_is_looked_at_anew() -> None:
    recipe = LargeBatchRecipe()
    fit([recipe], module=RecipeModule(optimizer=decayed), max_epochs=1)
    fit([recipe], module=RecipeModule(), max_epochs=1)
    assert recipe.advice == recipe.state_dict()["told"] == []


def test_advice_survives_pickling_and_a_checkpoint() -> None:
    recipe = look(optimizer=decayed)
    assert pickle.loads(pickle.dumps(recipe)).advice == recipe.advice
    copy = LargeBatchRecipe()
    copy.load_state_dict(recipe.state_dict())
    assert copy.state_dict() == recipe.state_dict()


class Words(RecipeModule):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.net(torch.ones(2, 6)).sum()


def test_batches_that_have_no_size_are_let_pass() -> None:
    words = DataLoader(["a", "b"], batch_size=None)
    recipe = LargeBatchRecipe(on_problem="raise")
    fit([recipe], module=Words(), train=words, max_epochs=1)
    assert recipe.advice == []


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("reference_batch", 0),
        ("reference_batch", 1.5),
        ("reference_lr", 0.0),
        ("reference_lr", "0.1"),
        ("on_problem", "mail"),
    ],
)
def test_a_wrong_argument_is_named(name: str, value: Any) -> None:
    with pytest.raises((TypeError, ValueError), match=rf"{name} was .*; allowed (is|are) "):
        LargeBatchRecipe(**{name: value})
