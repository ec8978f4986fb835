from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lightning_ext.functional import (
    majority_vote,
    pack_signs,
    sum_signs,
    unpack_signs,
    unpack_votes,
)


def lion(gradients: Tensor, parts: int, *, average: bool) -> Tensor:
    """What every rank moves along, from (ranks, parameters), one slice of them for each owner."""
    ranks, parameters = gradients.shape
    length = -(-parameters // parts)
    padded = torch.nn.functional.pad(gradients, (0, parts * length - parameters))
    sent = pack_signs(padded.view(ranks, parts, length))
    if average:
        owned = torch.stack([sum_signs(sent[:, part], length) for part in range(parts)])
        return (owned.float() / ranks).flatten()[:parameters]
    owned = torch.stack([majority_vote(sent[:, part]) for part in range(parts)])
    return unpack_votes(owned, length).flatten()[:parameters]


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("parts", [1, 4])
def test_slices_that_owners_vote_on_are_the_vote(ranks: int, parts: int) -> None:
    gradients = torch.randn(ranks, 101)
    assert torch.equal(lion(gradients, parts, average=False), gradients.sign().sum(0).sign())


def test_slices_that_owners_average_are_the_average() -> None:
    gradients = torch.randn(5, 101)
    torch.testing.assert_close(lion(gradients, 4, average=True), gradients.sign().mean(0))


def test_a_parameter_costs_a_bit_up_and_one_or_two_down() -> None:
    x = torch.randn(4, 8000)
    packed = pack_signs(x)
    assert packed[0].nbytes == 1000
    assert majority_vote(packed).nbytes == 2000
    assert majority_vote(packed[:3]).nbytes == 1000


def test_votes_of_an_even_number_can_be_a_tie_and_others_cannot() -> None:
    packed = pack_signs(torch.tensor([[1.0], [-1.0], [1.0]]))
    assert unpack_votes(majority_vote(packed[:2]), 1).item() == 0
    assert unpack_votes(majority_vote(packed), 1).item() == 1


def test_zero_and_nan_are_sent_as_positive() -> None:
    x = torch.tensor([0.0, -0.0, torch.nan, -1e-45])
    assert unpack_signs(pack_signs(x), 4).tolist() == [1, 1, 1, -1]


@pytest.mark.parametrize("length", [0, 1, 7, 8, 9, 100])
def test_any_length_comes_back(length: int) -> None:
    signs = torch.randn(2, length).sign()
    packed = pack_signs(signs)
    assert packed.shape == (2, (length + 7) // 8)
    assert torch.equal(unpack_signs(packed, length), signs)


@pytest.mark.parametrize("dtype", [torch.int8, torch.bfloat16, torch.float64])
def test_the_result_has_the_dtype_that_is_asked_for(dtype: torch.dtype) -> None:
    packed = pack_signs(torch.randn(2, 9))
    assert unpack_signs(packed, 9, dtype=dtype).dtype == dtype
    assert unpack_votes(majority_vote(packed), 9, dtype=dtype)[0].dtype == dtype


@pytest.mark.parametrize(("ranks", "dtype"), [(127, torch.int8), (128, torch.int16)])
def test_sums_are_as_wide_as_they_must_be(ranks: int, dtype: torch.dtype) -> None:
    sums = sum_signs(pack_signs(-torch.ones(ranks, 3)), 3)
    assert sums.dtype == dtype
    assert sums.tolist() == [-ranks] * 3


def test_memory_order_does_not_matter() -> None:
    x = torch.randn(37, 16).T
    assert torch.equal(pack_signs(x), pack_signs(x.contiguous()))
    packed = pack_signs(x)
    turned = packed.T.contiguous().T
    assert torch.equal(majority_vote(turned), majority_vote(packed))
    assert torch.equal(unpack_signs(turned, 37), unpack_signs(packed, 37))


def test_what_is_refused() -> None:
    packed = pack_signs(torch.randn(2, 9))
    with pytest.raises(ValueError, match="no axis"):
        pack_signs(torch.tensor(1.0))
    with pytest.raises(TypeError, match="complex"):
        pack_signs(torch.ones(3, dtype=torch.complex64))
    with pytest.raises(ValueError, match="length=17"):
        unpack_signs(packed, 17)
    with pytest.raises(ValueError, match="length=17"):
        sum_signs(packed, 17)
    with pytest.raises(ValueError, match="1 to 32,767 ranks"):
        majority_vote(packed[:0])
    with pytest.raises(ValueError, match="1 to 32,767 ranks"):
        majority_vote(packed.long())
    with pytest.raises(ValueError, match="1 or 2"):
        unpack_votes(packed.expand(3, 2, 2).transpose(0, 1), 9)


def test_it_compiles_whole() -> None:
    def voted(x: Tensor) -> Tensor:
        return unpack_votes(majority_vote(pack_signs(x)), x.shape[-1])

    x = torch.randn(4, 37)
    compiled = torch.compile(voted, fullgraph=True, backend="eager")
    assert torch.equal(compiled(x), voted(x))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bool], ids=str)
def test_a_dtype_without_minus_one_is_refused(dtype: torch.dtype) -> None:
    packed = pack_signs(torch.randn(2, 9))
    with pytest.raises(TypeError, match="give a signed dtype"):
        unpack_signs(packed, 9, dtype=dtype)
    with pytest.raises(TypeError, match="give a signed dtype"):
        unpack_votes(majority_vote(packed), 9, dtype=dtype)
