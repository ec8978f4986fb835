"""Checkpoints of moments of few bits in other formats: what is converted, and what is refused."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import run_distributed
from harness.low_bit_checkpoints import (
    FORMS,
    SAVED,
    Files,
    all_of,
    by_format,
    files,
    refusal,
    run_of,
)
from harness.low_bit_sharded import (
    EMPTY_ON_THE_LAST_OF_FOUR,
    FORMATS,
    Parameters,
    Run,
    Weights,
    own_rows,
)

from lightning_ext.optim import LowBitAdamW


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return files(lambda: tmp_path_factory.mktemp("written"))


def refusals(folder: Path, form: str, pairs: list[tuple[str, str]]) -> list[list[str]]:
    """What every rank says of checkpoints of formats that others are wanted of."""
    how = [(folder / x, "LowBitAdamW", FORMS[form], (), {"state_dtype": y}) for x, y in pairs]
    return run_distributed(all_of, args=(refusal, how))


@pytest.mark.parametrize("form", ["nested", "flat"])
def test_another_format_is_missed_by_its_name(form: str, written: Files) -> None:
    wanted = {
        ("float32", "int8"): ".exp_avg.int8",
        ("int8", "int4"): ".exp_avg.int4",
        ("fp8", "float32"): ".exp_avg.\n",
    }
    folder, _ = written("LowBitAdamW", ("float32", "int8", "fp8"), form, 2)
    for texts in refusals(folder, form, list(wanted)):
        for text, missing in zip(texts, wanted.values(), strict=True):
            assert "Missing key in checkpoint state_dict: optimizer" in text
            assert missing in f"{text}\n"


@pytest.mark.parametrize("form", ["full", "broadcast"])
def test_another_format_that_torch_adds_to_the_present_one_is_refused(
    form: str, written: Files
) -> None:
    folder, _ = written("LowBitAdamW", ("float32", "int8"), form, 2)
    pairs = [("float32", "int8"), ("int8", "int4"), ("int8", "float32")]
    told = r"ValueError.*has exp_avg as .*of which one is of the checkpoint"
    for texts in refusals(folder, form, pairs):
        assert all(re.search(told, text) for text in texts)


def of_a_file(path: Path, format: str) -> Weights:
    """Gives every rank the whole state of one process."""
    run = run_of("LowBitAdamW", state_dtype=format)
    run.optimizer.load_state_dict(torch.load(path, weights_only=True))
    run.taken, numbers = SAVED, run.numbers()
    run.run(1)
    return numbers


@pytest.mark.parametrize("saved", ["torch", "int8"])
def test_whole_states_of_a_file_are_converted(saved: str, tmp_path: Path) -> None:
    one = run_of("LowBitAdamW", sharded=False, state_dtype="int8")
    if saved == "torch":
        one.optimizer = torch.optim.AdamW(one.module.parameters(), lr=0.01)
    one.run(SAVED)
    torch.save(one.optimizer.state_dict(), tmp_path / "x")
    truth = one.numbers()
    jobs = [(tmp_path / "x", x) for x in FORMATS]
    found = by_format(FORMATS, run_distributed(all_of, args=(of_a_file, jobs)))
    for format in FORMATS:
        limit = {"float32": 0.0, "bfloat16": 0.005, "int4": 0.25}.get(format, 0.03)
        if saved == "int8":  # its blocks begin anew on a rank before it is converted
            limit += 0.01
        for rank, numbers in enumerate(found[format]):
            for key in ("cut.exp_avg", "conv.exp_avg_sq", "vector.exp_avg"):
                own = own_rows(truth[key], rank, 2)
                assert (numbers[key] - own).norm() <= limit * own.norm(), (format, key)


def into_int4(path: Path) -> Weights:
    run = Run("LowBitAdamW", shapes=EMPTY_ON_THE_LAST_OF_FOUR, state_dtype="int4")
    run.optimizer.load_state_dict(torch.load(path, weights_only=True))
    return run.numbers()


@pytest.mark.slow
def test_ranks_without_rows_take_part_where_a_state_is_converted(tmp_path: Path) -> None:
    shapes = EMPTY_ON_THE_LAST_OF_FOUR
    runs = [Run("LowBitAdamW", sharded=False, shapes=shapes, state_dtype="float32").run(2)]
    torch.save(runs[0].optimizer.state_dict(), tmp_path / "x")
    runs += [Run("LowBitAdamW", sharded=False, shapes=shapes, state_dtype="int4")]
    runs[1].optimizer.load_state_dict(runs[0].optimizer.state_dict())
    truth = runs[1].numbers()
    for rank, found in enumerate(run_distributed(into_int4, 4, args=(tmp_path / "x",))):
        for key in ("few_rows.exp_avg_sq", "matrix.exp_avg_sq"):
            assert torch.equal(found[key], own_rows(truth[key], rank, 4))


def test_a_parameter_of_which_a_flat_state_has_nothing_has_none() -> None:
    module = Parameters({"cut": (131, 96)})
    optimizer = LowBitAdamW(module.parameters())
    saved: dict[str, Any] = optimizer.state_dict()
    optimizer.load_state_dict({**saved, "state": {0: {"step": {}, "exp_avg": {}}}})
    for param in module.parameters():
        assert not optimizer.state[param]
