"""One launch over lists of tensors: every entry once, nothing built twice, far offsets."""

from __future__ import annotations

from weakref import ref

import pytest
import torch
import triton
import triton.language as tl
from harness import Cast, launches
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from lightning_ext import functional
from lightning_ext.kernels._triton import _kept
from lightning_ext.kernels._triton import _multi_tensor as engine
from lightning_ext.kernels._triton._multi_tensor import flat, tables

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SHAPES = [(1,), (50, 100), (3,), (0,), (4, 6), (), (1024,), (1025,)]
BLOCK = 1024


@triton.jit
def add_kernel(table, chunks, count, X: tl.constexpr, BLOCK: tl.constexpr, ALIGNED: tl.constexpr):
    """Adds one to every entry."""
    tensor, start, size = engine.locate(table, chunks, count, BLOCK)
    where = engine.address(table, count, 0, tensor)
    code = engine.dtype_code(table, count, 1, 0, tensor, X)
    offsets = start + tl.arange(0, BLOCK)
    if start + BLOCK <= size:
        x = engine.load(where, code, offsets, size, X, ALIGNED, False)
        engine.store(where, code, offsets, size, x + 1, X, ALIGNED, False)
    else:
        x = engine.load(where, code, offsets, size, X, ALIGNED, True)
        engine.store(where, code, offsets, size, x + 1, X, ALIGNED, True)


def add_one(tensors: list[Tensor]) -> None:
    with flat([tensors], written=[0]) as columns:
        t = tables(columns, BLOCK)
        add_kernel[(t.programs,)](
            t.table, t.chunks, t.count, X=t.dtypes[0], BLOCK=BLOCK, ALIGNED=t.aligned
        )


@pytest.mark.parametrize("layout", ["contiguous", "misaligned", "strided"])
def test_one_launch_takes_every_entry_once(layout: str) -> None:
    cast = Cast(torch.float32, DEVICE, layout=layout, guarded=True)
    tensors = [cast(torch.randn(shape)) for shape in SHAPES]
    expected = [x + 1 for x in tensors]
    with launches() as found:
        add_one(tensors)
    assert found == ["add_kernel"]
    assert all(torch.equal(x, y) for x, y in zip(tensors, expected, strict=True))
    cast.assert_untouched()


def test_dtypes_may_differ_in_one_launch() -> None:
    dtypes = [torch.float32, torch.bfloat16, torch.float16]
    tensors = [torch.arange(2000).remainder(64).to(DEVICE, dtype) for dtype in dtypes]
    expected = [x + 1 for x in tensors]
    with launches() as found:
        add_one(tensors)
    assert found == ["add_kernel"]
    assert all(torch.equal(x, y) for x, y in zip(tensors, expected, strict=True))


def test_a_transposed_tensor_is_changed_in_place() -> None:
    x = torch.randn(7, 300, device=DEVICE)
    expected = x + 1
    with flat([[x.T]], written=[0]) as columns:
        assert columns[0][0].data_ptr() == x.data_ptr()
    add_one([x.T])
    assert torch.equal(x, expected)


def test_unlike_strides_are_brought_to_one_order() -> None:
    x, y = torch.zeros(7, 300), torch.randn(300, 7).T
    with flat([[x], [y]], written=[0]) as columns:
        columns[0][0].view(-1).copy_(columns[1][0].view(-1))
    assert torch.equal(x, y)


def test_row_major_order_is_kept_where_it_is_asked_for() -> None:
    x = torch.randn(300, 7).T
    with flat([[x]], written=[0], row_major=True) as columns:
        assert torch.equal(columns[0][0].view(-1), x.reshape(-1))
        columns[0][0].zero_()
    assert not x.any()


def test_autograd_sees_the_change() -> None:
    x = torch.randn(5, device=DEVICE)
    before = x._version
    add_one([x])
    assert x._version > before


def test_tables_are_kept_while_storages_stay() -> None:
    tensors = [torch.randn(shape, device=DEVICE) for shape in SHAPES]
    first = tables([tensors], BLOCK)
    assert tables([tensors], BLOCK) is first
    moved = [x.clone() for x in tensors]
    second = tables([moved], BLOCK)
    assert second is not first
    assert second.chunks is first.chunks  # the sizes are the same
    assert second.table.ne(first.table).any()


def test_tables_that_nobody_uses_are_forgotten() -> None:
    x = torch.randn(7, device=DEVICE)
    first = ref(tables([[x]], BLOCK))
    assert first() is not None
    others = [torch.randn(n + 8, device=DEVICE) for n in range(200)]
    for other in others:
        tables([[other]], BLOCK)
    assert first() is None


def test_tables_are_kept_by_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(9, device=DEVICE)
    monkeypatch.setattr(_kept, "_stream", lambda device: (1, False))
    first = tables([[x]], BLOCK)
    monkeypatch.setattr(_kept, "_stream", lambda device: (2, False))
    assert tables([[x]], BLOCK) is not first  # the copy of the first one may still be on its way


def test_a_graph_takes_tables_that_are_there_and_makes_none(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    x = torch.randn(10, device=DEVICE)
    monkeypatch.setattr(_kept, "_stream", lambda device: (3, True))
    with pytest.raises(RuntimeError, match="call the operation once"):
        tables([[x]], BLOCK)
    monkeypatch.setattr(_kept, "_stream", lambda device: (4, False))
    first = tables([[x]], BLOCK)
    monkeypatch.setattr(_kept, "_stream", lambda device: (3, True))
    assert tables([[x]], BLOCK) is first


def test_fake_tensors_leave_no_tables_behind() -> None:
    state = functional.zero_state((300,), "int8", signed=True, device=DEVICE)
    with FakeTensorMode(allow_non_fake_inputs=True):
        functional.encode_state(torch.ones(300), "int8")
    found = functional.encode_state(torch.ones(300), "int8")
    assert type(found.codes) is Tensor
    assert type(functional.decode_state(state)) is Tensor


def test_single_entries_do_not_count_for_alignment() -> None:
    x, counts = torch.randn(2, 64, device=DEVICE), torch.zeros(2, device=DEVICE)
    assert tables([x.unbind(), counts.unbind()], BLOCK).aligned
    assert not tables([[torch.randn(9, device=DEVICE)[1:]]], BLOCK).aligned


def test_partial_results_have_places_of_their_own() -> None:
    tensors = [torch.randn(shape) for shape in SHAPES]
    t = tables([tensors], BLOCK)
    counts = [-(-x.numel() // BLOCK) for x in tensors]
    firsts = [sum(counts[:i]) for i in range(len(counts))]
    assert t.table[1].tolist() == firsts
    assert t.chunks.tolist() == [[i, k] for i, n in enumerate(counts) for k in range(n)]
    assert t.programs == sum(counts)


@pytest.mark.usefixtures("lazy_memory")
def test_offsets_beyond_two_to_the_31(monkeypatch: pytest.MonkeyPatch) -> None:
    size = 2**31 + 2 * BLOCK + 5  # 4 GiB of addresses, of which two pages are touched
    x = torch.empty(size, dtype=torch.float16, device=DEVICE)
    x[-BLOCK:] = 2.0
    last = torch.tensor([[0, size // BLOCK]], dtype=torch.int32, device=DEVICE)
    monkeypatch.setattr(engine, "_chunk_table", lambda *_: (last, [0]))
    add_one([x])
    assert (x[-5:] == 3.0).all()
    assert (x[-BLOCK:-5] == 2.0).all()
