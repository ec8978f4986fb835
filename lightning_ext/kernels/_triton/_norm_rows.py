"""Layer and RMS normalization: forward, and backward with the gradient norms of single samples.

A program of the backward pass takes a run of positions of one sample and leaves their share of the
gradients of γ and β, in float32. A second launch adds up the runs of a sample, which gives its
norm, and the samples, which gives the gradients. Everything is added in an order that shapes alone
decide, so results are deterministic.

Source: Ba et al. 2016 (arXiv:1607.06450); Gray et al. 2024 (arXiv:2411.00999).
Differs: runs end where samples end. Without norms to leave, all positions count as one sample's.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _tile(x, start, rows, known, columns, features, stride):
    """Rows `start` (int64) + `rows` (int32) in float32, 0 outside."""
    inside = known[:, None] & (columns < features)
    offsets = rows[:, None] * stride + columns
    return tl.load(x + start * stride + offsets, mask=inside, other=0).to(tl.float32)


@triton.jit
def _put_tile(y, value, start, rows, known, columns, features):
    inside = known[:, None] & (columns < features)
    offsets = rows[:, None] * features + columns
    tl.store(y + start * features + offsets, value.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _affine(
    value, weight, bias, columns, features, HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr
):
    """γ ∘ value + β."""
    if HAS_WEIGHT:
        value *= tl.load(weight + columns, mask=columns < features, other=0).to(tl.float32)
    if HAS_BIAS:
        value += tl.load(bias + columns, mask=columns < features, other=0).to(tl.float32)
    return value


@triton.jit
def norm_forward_kernel(
    x,
    weight,
    bias,
    y,
    mean,
    rstd,
    count,
    features,
    stride,
    eps,
    CENTERED: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    IN_ONE: tl.constexpr,
):
    """ROWS rows. IN_ONE: whether a block is as wide as a row; if not, it is read again."""
    start, rows = tl.program_id(0).to(tl.int64) * ROWS, tl.arange(0, ROWS)
    known = rows < count - start
    shift = tl.zeros((ROWS,), tl.float32)
    squares = tl.zeros((ROWS,), tl.float32)
    if IN_ONE:
        columns = tl.arange(0, BLOCK)[None, :]
        value = _tile(x, start, rows, known, columns, features, stride)
        if CENTERED:
            shift = tl.sum(value, 1) / features
            value = tl.where(columns < features, value - shift[:, None], 0.0)
        scale = tl.rsqrt(tl.sum(value * value, 1) / features + eps)
        value = _affine(
            value * scale[:, None], weight, bias, columns, features, HAS_WEIGHT, HAS_BIAS
        )
        _put_tile(y, value, start, rows, known, columns, features)
    else:
        if CENTERED:
            for column in range(0, features, BLOCK):
                columns = column + tl.arange(0, BLOCK)[None, :]
                shift += tl.sum(_tile(x, start, rows, known, columns, features, stride), 1)
            shift /= features
        for column in range(0, features, BLOCK):
            columns = column + tl.arange(0, BLOCK)[None, :]
            value = _tile(x, start, rows, known, columns, features, stride)
            value = tl.where(columns < features, value - shift[:, None], 0.0)
            squares += tl.sum(value * value, 1)
        scale = tl.rsqrt(squares / features + eps)
        for column in range(0, features, BLOCK):
            columns = column + tl.arange(0, BLOCK)[None, :]
            value = _tile(x, start, rows, known, columns, features, stride) - shift[:, None]
            value = _affine(
                value * scale[:, None], weight, bias, columns, features, HAS_WEIGHT, HAS_BIAS
            )
            _put_tile(y, value, start, rows, known, columns, features)
    if CENTERED:
        tl.store(mean + start + rows, shift, mask=known)
    tl.store(rstd + start + rows, scale, mask=known)


@triton.jit
def _run_of(program, positions, runs, length):
    """First row of a program, and how many it has, all of one sample."""
    before = (program // runs).to(tl.int64) * positions
    first = (program % runs) * length
    return before + first, tl.minimum(length, positions - first)


@triton.jit
def _factors(
    d,
    x,
    weight,
    mean,
    rstd,
    start,
    rows,
    known,
    columns,
    features,
    stride_d,
    stride_x,
    CENTERED: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
):
    """d, x̂ and γ ∘ d of a tile; d is 0 outside."""
    gradient = _tile(d, start, rows, known, columns, features, stride_d)
    value = _tile(x, start, rows, known, columns, features, stride_x)
    if CENTERED:
        value -= tl.load(mean + start + rows, mask=known, other=0)[:, None]
    deviation = tl.load(rstd + start + rows, mask=known, other=0)[:, None]
    value *= deviation
    weighted = _affine(gradient, weight, d, columns, features, HAS_WEIGHT, False)
    return gradient, value, deviation, weighted


@triton.jit
def _input_gradient(weighted, value, deviation, along, across, CENTERED: tl.constexpr):
    """(γ ∘ d − mean(γ ∘ d) − x̂ mean(x̂ ∘ γ ∘ d))/σ from the two means."""
    found = weighted - value * along[:, None]
    if CENTERED:
        found -= across[:, None]
    return found * deviation


@triton.jit
def norm_backward_kernel(
    d,
    x,
    weight,
    mean,
    rstd,
    dx,
    partials,
    squares,
    positions,
    features,
    stride_d,
    stride_x,
    runs,
    length,
    CENTERED: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    SUMS: tl.constexpr,
    BY_ROW: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A run of rows that are no wider than a block.

    SUMS: of which gradients a share is left: none, γ, γ and β. BY_ROW: leave the squares of each
    row, which is all of its sample.
    """
    first, count = _run_of(tl.program_id(0), positions, runs, length)
    columns = tl.arange(0, BLOCK)[None, :]
    scale = tl.zeros((ROWS, BLOCK), tl.float32)
    shift = tl.zeros((ROWS, BLOCK), tl.float32)
    across = tl.zeros((ROWS,), tl.float32)
    rows = tl.arange(0, ROWS)
    for done in range(0, count, ROWS):
        start, known = first + done, rows < count - done
        gradient, value, deviation, weighted = _factors(
            d, x, weight, mean, rstd, start, rows, known, columns, features,
            stride_d, stride_x, CENTERED, HAS_WEIGHT,
        )  # fmt: skip
        along = tl.sum(weighted * value, 1) / features
        if CENTERED:
            across = tl.sum(weighted, 1) / features
        found = _input_gradient(weighted, value, deviation, along, across, CENTERED)
        _put_tile(dx, found, start, rows, known, columns, features)
        if SUMS > 0:
            product = gradient * value
            scale += product
            if BY_ROW:
                tl.store(squares + start + rows, tl.sum(product * product, 1), mask=known)
        if SUMS > 1:
            shift += gradient
            if BY_ROW:
                tl.store(
                    squares + positions + start + rows, tl.sum(gradient * gradient, 1), mask=known
                )
    columns = tl.arange(0, BLOCK)
    target = partials + tl.program_id(0).to(tl.int64) * features + columns
    if SUMS > 0:
        tl.store(target, tl.sum(scale, 0), mask=columns < features)
    if SUMS > 1:
        target += tl.num_programs(0).to(tl.int64) * features
        tl.store(target, tl.sum(shift, 0), mask=columns < features)


@triton.jit
def _add(target, value, columns, features, later):
    """Add rows to a sum in memory that is this program's own; later: not for the first time."""
    inside = columns < features
    before = tl.load(target + columns, mask=inside & later, other=0)
    tl.store(target + columns, before + tl.sum(value, 0)[None, :], mask=inside)


@triton.jit
def wide_norm_backward_kernel(
    d,
    x,
    weight,
    mean,
    rstd,
    dx,
    partials,
    squares,
    positions,
    features,
    stride_d,
    stride_x,
    runs,
    length,
    CENTERED: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    SUMS: tl.constexpr,
    BY_ROW: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The same for rows of any width: they are read again, and sums kept, in a cache."""
    first, count = _run_of(tl.program_id(0), positions, runs, length)
    scales = partials + tl.program_id(0).to(tl.int64) * features
    shifts = scales + tl.num_programs(0).to(tl.int64) * features
    rows = tl.arange(0, ROWS)
    for done in range(0, count, ROWS):
        start, known = first + done, rows < count - done
        along = tl.zeros((ROWS,), tl.float32)
        across = tl.zeros((ROWS,), tl.float32)
        scale_squares = tl.zeros((ROWS,), tl.float32)
        shift_squares = tl.zeros((ROWS,), tl.float32)
        for column in range(0, features, BLOCK):
            columns = column + tl.arange(0, BLOCK)[None, :]
            gradient, value, deviation, weighted = _factors(
                d, x, weight, mean, rstd, start, rows, known, columns, features,
                stride_d, stride_x, CENTERED, HAS_WEIGHT,
            )  # fmt: skip
            along += tl.sum(weighted * value, 1) / features
            if CENTERED:
                across += tl.sum(weighted, 1) / features
        for column in range(0, features, BLOCK):
            columns = column + tl.arange(0, BLOCK)[None, :]
            gradient, value, deviation, weighted = _factors(
                d, x, weight, mean, rstd, start, rows, known, columns, features,
                stride_d, stride_x, CENTERED, HAS_WEIGHT,
            )  # fmt: skip
            found = _input_gradient(weighted, value, deviation, along, across, CENTERED)
            _put_tile(dx, found, start, rows, known, columns, features)
            if SUMS > 0:
                product = gradient * value
                _add(scales, product, columns, features, done > 0)
                scale_squares += tl.sum(product * product, 1)
            if SUMS > 1:
                _add(shifts, gradient, columns, features, done > 0)
                shift_squares += tl.sum(gradient * gradient, 1)
        # The next rows' sums may be read by other threads than have written these.
        tl.debug_barrier()
        if BY_ROW and SUMS > 0:
            tl.store(squares + start + rows, scale_squares, mask=known)
        if BY_ROW and SUMS > 1:
            tl.store(squares + positions + start + rows, shift_squares, mask=known)


@triton.jit
def norm_sums_kernel(
    partials,
    totals,
    squares,
    count,
    samples,
    runs,
    features,
    length,
    BY_SAMPLE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Add the runs of `length` samples up, in a block of columns, for one of γ and β.

    count: runs of all samples. BY_SAMPLE: leave the square of each sample's sum.
    """
    block, part, kind = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    columns = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < features
    partials += kind * count * features
    total = tl.zeros((BLOCK,), tl.float32)
    first = part * length
    for sample in range(first, tl.minimum(first + length, samples)):
        found = tl.zeros((ROWS, BLOCK), tl.float32)
        for run in range(0, runs, ROWS):
            within = run + tl.arange(0, ROWS)
            rows = (sample * runs + within).to(tl.int64)
            known = ((within < runs) & (rows < count))[:, None] & inside[None, :]
            found += tl.load(partials + rows[:, None] * features + columns, mask=known, other=0)
        gradient = tl.sum(found, 0)
        if BY_SAMPLE:
            where = (kind * tl.num_programs(0) + block) * samples + sample
            tl.store(squares + where, tl.sum(gradient * gradient, 0))
        total += gradient
    target = totals + (kind * tl.num_programs(1) + part) * features + columns
    tl.store(target, total, mask=inside)
