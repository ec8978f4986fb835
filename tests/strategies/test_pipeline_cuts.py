"""What of a batch is cut into micro-batches, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from harness import run_distributed
from harness.pipeline_faults import SIZE, batches, weights
from harness.pipeline_parts import COUNT, MICRO, Chain, distance, pipeline_trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.utils.data import default_collate

from lightning_ext.strategies._pipeline._micro_batches import Cutter, cut, samples_of

X = torch.arange(16.0)[:, None]


def boxes(count: int) -> list[dict[str, Tensor]]:
    """One more in each image; those of an image have its index."""
    return [{"boxes": torch.full((1 + i, 4), i)} for i in range(count)]


def test_texts_that_collate_makes_a_tuple_of_are_cut() -> None:
    batch = default_collate([(x, i, str(i)) for i, x in enumerate(X)])
    for index, (x, y, texts) in enumerate(cut(batch, 16, 4)):
        assert x.flatten().tolist() == y.tolist() == [float(text) for text in texts]
        assert texts == tuple(str(4 * index + i) for i in range(4))


@pytest.mark.parametrize("reverse", [False, True])
def test_targets_of_a_detector_are_cut_wherever_they_are(reverse: bool) -> None:
    batch: dict[str, Any] = {"x": X, "targets": boxes(16)}
    batch = dict(reversed(batch.items())) if reverse else batch
    assert samples_of(batch) == 16
    for part in cut(batch, 16, 4):
        assert [float(one["boxes"][0, 0]) for one in part["targets"]] == part["x"][:, 0].tolist()


@pytest.mark.parametrize("make", [list, tuple])
def test_elements_of_the_batch_itself_are_no_samples(make: Any) -> None:
    parts = cut(make((X[:2], X[:2])), 2, 2)
    assert all(type(one) is make and len(one) == 2 and len(one[0]) == 1 for one in parts)


def test_lists_of_other_lengths_are_structures() -> None:
    assert [len(v) for part in cut((X, {"of": [X, X, X]}), 16, 2) for v in part[1]["of"]] == [8] * 6


def test_a_list_that_may_be_read_in_two_ways_is_refused() -> None:
    """Four tensors of four rows: a view of all samples each, or four rows of each sample."""
    with pytest.raises(MisconfigurationException, match=r"batch\['of'\] .*pipeline_micro_batches"):
        cut({"x": X[:4], "of": (X[:4],) * 4}, 4, 2)


@pytest.mark.parametrize(("earlier", "rows"), [([X] * 4, 2), (boxes(16), 4)])
def test_a_list_is_read_as_in_earlier_batches(earlier: list[Any], rows: int) -> None:
    cutter = Cutter(None)
    cutter.parts((X, earlier), 8)
    later = [X[:4]] * 4 if rows == 2 else [{"boxes": X[:4]} for _ in range(4)]
    first = cutter.parts((X[:4], later), 8)[0][1]
    assert len(first) == (4 if rows == 2 else 2)
    assert len(torch.as_tensor(first[0] if rows == 2 else first[0]["boxes"])) == rows


def test_a_first_tensor_without_samples_is_refused() -> None:
    with pytest.raises(MisconfigurationException, match="has 3 rows, but 2 others have 16"):
        samples_of({"weights": X[:3], "x": X, "y": X})


def test_a_tensor_of_other_rows_is_given_whole() -> None:
    batch = {"x": X, "y": X, "weights": X[:3]}
    assert [len(part["weights"]) for part in cut(batch, samples_of(batch), 2)] == [3, 3]


@pytest.mark.parametrize("lengths", [(16, 8), (8, 16)])
def test_rows_that_do_not_follow_the_samples_are_refused(lengths: tuple[int, int]) -> None:
    cutter = Cutter(None)
    first, second = ((X[:n], {"classes": X[:16]}) for n in lengths)
    cutter.parts(first, lengths[0] // 4)
    with pytest.raises(MisconfigurationException, match=r"batch\[1\]\['classes'\] has 16 rows"):
        cutter.parts(second, lengths[0] // 4)


@pytest.mark.parametrize("found", [[X], X, None])
def test_an_own_method_makes_as_many_parts_as_asked_for(found: Any) -> None:
    with pytest.raises(MisconfigurationException, match="a list of 2 micro-batches"):
        Cutter(lambda batch, count: found).parts(X, 2)


class Transposed(Chain):
    """Its samples are in the second dimension."""

    def pipeline_micro_batches(self, batch: Any, count: int) -> list[Any]:
        return [
            (x.T, y) for x, y in zip(batch[0].chunk(count, 1), batch[1].chunk(count), strict=True)
        ]


class Queries(nn.Module):
    """Adds the means of all queries."""

    def forward(self, few: Tensor, many: Tensor, x: Tensor) -> Tensor:
        return x + few.mean(0) + many.mean(0)


class Queried(Chain):
    """Gives its layers a buffer first, and a parameter with as many rows as there are samples."""

    def __init__(self) -> None:
        super().__init__()
        rows = torch.arange(SIZE * 10.0).view(SIZE, 10).double()
        self.queries = nn.Parameter(rows)
        self.register_buffer("few", rows[:3].clone())
        self.net.insert(0, Queries())

    def forward(self, x: Tensor) -> Tensor:
        return self.net(self.few, self.queries, self.first(x))


def cuts() -> tuple[float, list[Tensor]]:
    own = [(x.T, y) for x, y in batches(SIZE, SIZE)]
    found = distance(weights(Transposed(), own), weights(Chain(), batches(SIZE, SIZE)))
    samples = [x for x, _ in batches(SIZE)]
    outputs = []
    for parts in (1, COUNT):
        run = pipeline_trainer({"num_eval_microbatches": parts})
        outputs += run.predict(Queried(), torch.utils.data.DataLoader(samples, batch_size=None))
    return found, outputs


def test_own_methods_cut_and_parameters_are_not_cut() -> None:
    for found, (whole, joined) in run_distributed(cuts):
        assert found == 0
        assert len(joined) == SIZE == MICRO * COUNT
        torch.testing.assert_close(joined, whole, rtol=1e-12, atol=1e-12)
