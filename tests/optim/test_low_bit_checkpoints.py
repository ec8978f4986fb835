"""Checkpoints of moments of few bits by torch: files, and torch.distributed.checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from harness import run_distributed
from harness.low_bit_checkpoints import (
    FORMS,
    SAVED,
    STEPS,
    USED,
    Files,
    Results,
    all_of,
    by_format,
    files,
    go_on,
    read,
    resumed,
    run_of,
    write,
)
from harness.low_bit_sharded import (
    FORMATS,
    OPTIMIZERS,
    Run,
    Weights,
    distance,
    own_rows,
    same,
)
from torch import Tensor

# ‖w − w₁‖/‖w₁ − w₀‖ over all weights, and ‖m − m₁‖/‖m₁‖ of a moment, where blocks begin elsewhere.
WEIGHTS = {"float32": 1e-6, "bfloat16": 0.002, "int8": 0.01, "fp8": 0.01, "int4": 0.1}
MOMENTS = {"float32": 0.0, "bfloat16": 0.0, "int8": 0.01, "fp8": 0.02, "int4": 0.12}
LOW = ("int8", "int4")
ENTRY_BY_ENTRY = ("LowBitAdamW", "Lion")  # whose way other tests tell
# Formats of a class in short; its others are slow.
SHORT = {"LowBitAdamW": FORMATS, "NorMuon": LOW, "LAMB": LOW, "Lion": LOW[:1], "AdamP": LOW[:1]}
RESTS = {name: tuple(x for x in FORMATS if x not in SHORT[name]) for name in OPTIMIZERS}
every_class_and_format = pytest.mark.parametrize(
    ("name", "formats"),
    [
        *SHORT.items(),
        *(pytest.param(*x, marks=pytest.mark.slow) for x in RESTS.items() if x[1]),
    ],
)
every_form = pytest.mark.parametrize("form", FORMS)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return files(lambda: tmp_path_factory.mktemp("written"))


def formats_in(form: str) -> tuple[str, ...]:
    return FORMATS if form == "nested" else LOW


@every_class_and_format
def test_the_same_ranks_go_on_bitwise(name: str, formats: tuple[str, ...], written: Files) -> None:
    folder, before = written(name, formats, "nested", 2)
    after = resumed(folder, name, formats, "nested", 2)
    for format in formats:
        for old, new in zip(before[format], after[format], strict=True):
            assert same(new.numbers, old.numbers), format
            assert same(new.weights, old.weights), format


@pytest.mark.parametrize("form", ["flat", "full", "broadcast"])
def test_the_same_ranks_go_on_bitwise_in_every_form(form: str, written: Files) -> None:
    folder, before = written("LowBitAdamW", LOW, form, 2)
    after = resumed(folder, "LowBitAdamW", LOW, form, 2)
    for format in LOW:
        assert same(after[format][0].weights, before[format][0].weights), format
        assert same(after[format][1].numbers, before[format][1].numbers), format


def check_near(before: Results, after: Results) -> None:
    for format, ranks in after.items():
        truth = before[format][0]
        for found in ranks:
            assert distance(found.weights, truth.weights, truth.start) <= WEIGHTS[format], format


@every_form
def test_two_ranks_go_on_as_one_process(form: str, written: Files) -> None:
    formats = formats_in(form)
    folder, before = written("LowBitAdamW", formats, form, 2)
    after = resumed(folder, "LowBitAdamW", formats, form, 1)
    check_near(before, after)
    for format in formats:
        for key, value in after[format][0].numbers.items():
            truth = torch.cat([x.numbers[key] for x in before[format]])
            moment_is_near(value, truth, format, key)


@every_form
def test_one_process_goes_on_as_two_ranks(form: str, written: Files) -> None:
    formats = formats_in(form)
    folder, before = written("LowBitAdamW", formats, form, 1)
    after = resumed(folder, "LowBitAdamW", formats, form, 2)
    check_near(before, after)
    for format in formats:
        for rank, found in enumerate(after[format]):
            for key, value in found.numbers.items():
                truth = own_rows(before[format][0].numbers[key], rank, 2)
                moment_is_near(value, truth, format, key)


def moment_is_near(found: Tensor, truth: Tensor, format: str, key: str) -> None:
    """Bitwise where blocks begin as they did, or where there are none."""
    exact = key.startswith(("aligned", "one_row", "small", "vector"))
    exact |= format == "int4" and key.endswith("_sq")
    bound = 0.0 if exact else MOMENTS[format]
    assert (found - truth).norm() <= bound * truth.norm(), (format, key)


@pytest.mark.parametrize(
    "name", [pytest.param(x, marks=[pytest.mark.slow] * (x in ENTRY_BY_ENTRY)) for x in OPTIMIZERS]
)
def test_other_numbers_of_ranks_go_on_near(name: str, written: Files) -> None:
    formats = SHORT[name]  # as the same ranks wrote them
    for ranks, others in ((2, 1), (1, 2)):
        folder, before = written(name, formats if ranks == 2 else LOW[:1], "nested", ranks)
        truth = before["int8"][0]
        for found in resumed(folder, name, LOW[:1], "nested", others)["int8"]:
            assert distance(found.weights, truth.weights, truth.start) <= 0.03


@pytest.mark.slow
def test_two_ranks_go_on_as_four(written: Files) -> None:
    folder, before = written("LowBitAdamW", FORMATS, "nested", 2)
    check_near(before, resumed(folder, "LowBitAdamW", LOW, "nested", 4))


@pytest.mark.slow
@pytest.mark.parametrize("form", ["nested", "full"])
def test_replicas_of_shards_go_on_bitwise_as_those_shards(form: str, written: Files) -> None:
    folder, before = written("LowBitAdamW", LOW, form, 4, (2, 2))
    again = resumed(folder, "LowBitAdamW", LOW, form, 4, (2, 2))
    shards = resumed(folder, "LowBitAdamW", LOW, form, 2)
    for format in LOW:
        for found in (*again[format], *shards[format]):
            assert same(found.weights, before[format][0].weights), format


COMPENSATED = {"state_dtype": "int8", "weight_rounding": "compensated", "dtype": torch.bfloat16}


def test_errors_of_weights_go_on_bitwise_in_every_form(tmp_path: Path) -> None:
    forms = ("nested", "flat", "full")
    jobs = [(tmp_path / x, "LowBitAdamW", FORMS[x], (), COMPENSATED) for x in forms]
    before, after = (run_distributed(all_of, args=(x, jobs)) for x in (write, read))
    for one, other in zip(before, after, strict=True):
        for old, new in zip(one, other, strict=True):
            assert sum(n.endswith("weight_error") for n in new.numbers) == len(USED)
            assert any(x.any() for n, x in new.numbers.items() if n.endswith("weight_error"))
            assert same(new.numbers, old.numbers)
            assert same(new.weights, old.weights)


def over_other_steps(path: Path, format: str) -> Weights:
    """Loads into an optimizer that has states of its own."""
    return go_on(run_of("LowBitAdamW", state_dtype=format).run(3), path, {}).weights


def test_what_was_there_before_is_gone(written: Files) -> None:
    folder, before = written("LowBitAdamW", FORMATS, "nested", 2)
    jobs = [(folder / x, x) for x in LOW]
    found = by_format(LOW, run_distributed(all_of, args=(over_other_steps, jobs)))
    for format in LOW:
        assert all(same(x, before[format][0].weights) for x in found[format]), format


def test_files_load_with_weights_only_and_go_on_bitwise(tmp_path: Path) -> None:
    for format in FORMATS:
        run = Run("LowBitAdamW", sharded=False, state_dtype=format).run(SAVED)
        torch.save((run.optimizer.state_dict(), run.module.state_dict()), tmp_path / "x")
        again = Run("LowBitAdamW", sharded=False, state_dtype=format)
        state, weights = torch.load(tmp_path / "x", weights_only=True)
        again.module.load_state_dict(weights)
        again.optimizer.load_state_dict(state)
        again.taken = SAVED
        truth = run.run(STEPS - SAVED).weights()
        assert same(again.run(STEPS - SAVED).weights(), truth)
