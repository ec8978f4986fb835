"""Batches are cut along their samples, and what chunks returned is joined again."""

from __future__ import annotations

from collections import OrderedDict, UserDict, defaultdict
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_ext._lightning._chunks import count_samples, cut, even_sizes, join

X = torch.arange(10.0).reshape(5, 2)


class Pair(NamedTuple):
    x: Tensor
    y: Any


@dataclass(frozen=True)
class Record:
    x: Tensor
    label: str


def chunks(batch: Any) -> list[Any]:
    return list(cut(batch, [3, 2]))


@pytest.mark.parametrize(
    ("samples", "limit", "sizes"),
    [(8, 4, [4, 4]), (7, 3, [3, 2, 2]), (5, 1, [1] * 5), (4, 9, [4]), (9, 8, [5, 4])],
)
def test_chunks_are_few_and_even(samples: int, limit: int, sizes: list[int]) -> None:
    assert even_sizes(samples, limit) == sizes


@pytest.mark.parametrize(
    "batch",
    [
        X,
        [X, X[:, 0]],
        (X, {"deep": [X]}),
        Pair(X, X),
        Record(X, "five"),
        {"x": X, "n": X.numpy(), "scale": torch.tensor(2.0), "name": "x", "none": None},
    ],
    ids=lambda batch: type(batch).__name__,
)
def test_samples_are_counted_in_any_structure(batch: Any) -> None:
    assert count_samples(batch) == 5


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ([X, X[:4]], r"lengths \[4, 5\] in dimension 0"),
        (["a", "b"], "no tensor with a dimension"),
        (torch.tensor(1.0), "no tensor with a dimension"),
        ([X, object()], "holds a object, which cannot be cut"),
    ],
)
def test_a_batch_that_cannot_be_cut_is_refused(batch: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        count_samples(batch)


def test_chunks_are_views_of_the_batch() -> None:
    first, second = chunks(X)
    assert first.data_ptr() == X.data_ptr()
    assert torch.equal(second, X[3:])


@pytest.mark.parametrize("kind", [dict, OrderedDict, UserDict])
def test_a_mapping_stays_of_its_kind(kind: Any) -> None:
    first, second = chunks(kind({"x": X, "scale": torch.tensor(2.0)}))
    assert type(first) is kind
    assert torch.equal(second["x"], X[3:])
    assert second["scale"] == 2.0


def test_a_default_dictionary_keeps_its_default() -> None:
    first, _ = chunks(defaultdict(list, {"x": X}))
    assert first["new"] == []


def test_named_tuples_and_frozen_records_stay_what_they_are() -> None:
    pair, record = chunks(Pair(X, np.arange(5)))[1], chunks(Record(X, "five"))[1]
    assert isinstance(pair, Pair)
    assert pair.y.tolist() == [3, 4]
    assert record.label == "five"
    assert torch.equal(record.x, X[3:])


def test_a_list_as_long_as_the_batch_is_cut_and_another_is_not() -> None:
    first, second = chunks([X, list("abcde"), ("de", "en")])
    assert first[1:] == [["a", "b", "c"], ("de", "en")]
    assert second[1:] == [["d", "e"], ("de", "en")]


def test_a_list_of_objects_as_long_as_the_batch_is_cut() -> None:
    objects = [object() for _ in range(5)]
    assert chunks([X, objects])[1][1] == objects[3:]


def test_the_batch_itself_stays_whole() -> None:
    batch = {"x": X, "deep": [X]}
    chunks(batch)
    assert batch["x"] is X
    assert batch["deep"][0] is X


@pytest.mark.parametrize(
    "batch",
    [X, [X, X + 1], {"x": X, "names": list("abcde")}, Pair(X, list("abcde"))],
    ids=lambda batch: type(batch).__name__,
)
def test_joined_chunks_are_the_batch(batch: Any) -> None:
    joined = join(chunks(batch), [3, 2])
    assert type(joined) is type(batch)
    assert str(joined) == str(batch)


def test_numbers_in_tensors_are_averaged_over_samples() -> None:
    assert join([torch.tensor(1.0), torch.tensor(6.0)], [3, 2]) == 3.0


@pytest.mark.parametrize(
    ("outputs", "last"),
    [
        ([torch.tensor(3), torch.tensor(4)], 4),
        ([1.0, 2.0], 2.0),
        ([{"a": 1}, {"b": 2}], {"b": 2}),
        ([[X], [X, X]], [X, X]),
        ([None, None], None),
    ],
)
def test_of_anything_else_the_last_counts(outputs: Any, last: Any) -> None:
    assert str(join(outputs, [3, 2])) == str(torch.tensor(4) if last == 4 else last)


def test_joined_tensors_hold_no_graph() -> None:
    x = torch.ones(3, requires_grad=True)
    joined = join([{"out": x * 2, "loss": x.sum()}] * 2, [3, 3])
    assert not joined["out"].requires_grad
    assert not joined["loss"].requires_grad
