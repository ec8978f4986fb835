from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lightning_ext.functional import (
    Quantized,
    dequantize,
    dequantize_reduce,
    dequantize_reduce_quantize,
    quantize,
    quantized_bytes,
)

NODES, LOCAL = 2, 3


def exchanged(sent: list[Quantized]) -> list[Quantized]:
    """An all-to-all: what each rank gets of the rows that all have sent."""
    return [
        one._replace(
            codes=torch.stack([x.codes[to] for x in sent]),
            scales=torch.stack([x.scales[to] for x in sent]),
        )
        for to, one in enumerate(sent)
    ]


def two_hops(gradients: Tensor, format: str) -> Tensor:
    """Mean over (node, rank) of gradients, (NODES, LOCAL, NODES, LOCAL, length), by two hops.

    In the first one a rank sends to every rank of its node the chunks of that rank and of those
    with its number on other nodes; in the second one these exchange what was added up.
    """
    added: dict[tuple[int, int], Quantized] = {}
    for node in range(NODES):
        sent = [quantize(gradients[node, rank].transpose(0, 1), format) for rank in range(LOCAL)]
        for rank, got in enumerate(exchanged(sent)):
            added[node, rank] = dequantize_reduce_quantize(got)
    out = torch.empty(NODES, LOCAL, gradients.shape[-1])
    for rank in range(LOCAL):
        for node, got in enumerate(exchanged([added[node, rank] for node in range(NODES)])):
            out[node, rank] = dequantize_reduce(got)
    return out


@pytest.mark.parametrize(("format", "levels"), [("int8", 127), ("int4", 7)])
def test_two_hops_bring_every_rank_the_mean_of_its_chunk(format: str, levels: int) -> None:
    gradients = torch.randn(NODES, LOCAL, NODES, LOCAL, 300)
    found = two_hops(gradients, format)
    step = gradients.abs().max() / levels  # half of one from each hop
    assert (found - gradients.mean((0, 1))).abs().max() <= step


def test_added_up_as_numbers_a_sum_outgrows_the_codes_it_came_in() -> None:
    sent = quantize(torch.full((64, 16), 7.0), "int4")
    assert (dequantize_reduce(sent, reduction="sum") == 64 * 7).all()
    again = dequantize_reduce_quantize(sent, reduction="sum")
    torch.testing.assert_close(dequantize(again), torch.full((16,), 64 * 7.0))


def test_ranks_with_scales_of_their_own_are_added_up_by_value() -> None:
    small, large = torch.randn(1, 64), 1000 * torch.randn(1, 64)
    found = dequantize_reduce(quantize(torch.cat([small, large]), "int8"), reduction="sum")
    assert (found - small - large).abs().max() <= 1000 * 4 / 254


def test_one_that_is_not_finite_shows_in_the_sum() -> None:
    x = torch.randn(3, 1, 600)
    x[1, 0, 300] = torch.inf
    found = dequantize_reduce(quantize(x, "int4"))[0]
    assert found[256:512].isnan().all()
    assert found[:256].isfinite().all()
    assert dequantize(dequantize_reduce_quantize(quantize(x, "int4")))[0, 256:512].isnan().all()


def test_a_quarter_of_the_bytes_of_bfloat16_go_between_nodes_and_scales_besides() -> None:
    length = 2**20
    whole = 2 * length
    assert quantized_bytes(length, "int4", block_size=2048) == whole / 4 + 4 * length / 2048
    assert quantized_bytes(length, "int8", block_size=2048) == whole / 2 + 4 * length / 2048


def test_random_rounding_in_between_is_that_of_its_counter() -> None:
    sent = quantize(torch.randn(4, 1000), "int8")
    options = {"seed": 1, "step": 2, "stream": 3}
    found = dequantize_reduce_quantize(sent, format="int4", **options)
    expected = quantize(dequantize_reduce(sent), "int4", **options)
    assert torch.equal(found.codes, expected.codes)
    assert not torch.equal(found.codes, dequantize_reduce_quantize(sent, format="int4").codes)


def test_the_result_has_the_dtype_that_is_asked_for() -> None:
    sent = quantize(torch.randn(4, 100), "mxfp8_e4m3")
    assert dequantize_reduce(sent).dtype == torch.float32
    assert dequantize_reduce(sent, dtype=torch.bfloat16).dtype == torch.bfloat16


def test_what_is_refused() -> None:
    sent = quantize(torch.randn(4, 100), "int8")
    with pytest.raises(ValueError, match="'mean' or 'sum'"):
        dequantize_reduce(sent, reduction="max")
    with pytest.raises(ValueError, match="first axis"):
        dequantize_reduce(quantize(torch.randn(100), "int8"))
    with pytest.raises(ValueError, match="first axis"):
        dequantize_reduce(sent._replace(codes=sent.codes[:0], scales=sent.scales[:0]))
    with pytest.raises(ValueError, match="'mxint8'; it has 32"):
        dequantize_reduce_quantize(sent, format="mxint8")


def test_it_compiles_whole() -> None:
    def reduced(x: Tensor) -> Tensor:
        return dequantize(dequantize_reduce_quantize(quantize(x, "int4", symmetric=False)))

    x = torch.randn(3, 70)
    compiled = torch.compile(reduced, fullgraph=True, backend="eager")
    assert torch.equal(compiled(x), reduced(x))


# Inductor imports what torch itself calls deprecated.
@pytest.mark.filterwarnings("ignore:.torch.jit.* is deprecated:DeprecationWarning")
def test_compiled_for_a_cpu_a_short_last_block_is_there() -> None:
    def reduced(received: Quantized) -> tuple[Tensor, Tensor]:
        return dequantize_reduce(received), dequantize_reduce_quantize(received).codes

    sent = quantize(torch.randn(3, 4, 100), "int8", block_size=16)
    expected = reduced(sent)
    numbers, codes = torch.compile(reduced, fullgraph=True, dynamic=False)(sent)
    torch.testing.assert_close(numbers, expected[0])
    assert (codes.view(torch.int8) - expected[1].view(torch.int8)).abs().le(1).all()
    assert codes.ne(expected[1]).sum() <= 1


def test_a_dtype_that_does_not_hold_the_numbers_is_refused() -> None:
    with pytest.raises(TypeError, match="must be a real floating dtype"):
        dequantize_reduce(quantize(torch.randn(4, 100), "int8"), dtype=torch.int32)
