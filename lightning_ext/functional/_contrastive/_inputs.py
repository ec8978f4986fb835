"""What the contrastive losses ask of their arguments."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_ext.functional._plain import check_plain


def check_pair(x: Tensor, y: Tensor, names: tuple[str, str]) -> None:
    """Refuse what is no pair of matrices with rows of the same kind."""
    check_plain(**dict(zip(names, (x, y), strict=True)))
    (a, b), shapes = names, f"{tuple(x.shape)} and {tuple(y.shape)}"
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1]:
        raise ValueError(f"{a} and {b} have shapes {shapes}; give matrices of the same width")
    if x.dtype != y.dtype or not x.is_floating_point():
        raise TypeError(f"{a} is {x.dtype}, {b} {y.dtype}; give one floating-point dtype")
    if x.device != y.device:
        raise TypeError(f"{a} is on {x.device}, {b} on {y.device}; they must be on one device")


def check_reduction(reduction: str) -> None:
    """Refuse what is no reduction."""
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction={reduction!r} is not allowed; use 'mean', 'sum' or 'none'")


def check_device(found: Tensor, name: str, like: Tensor) -> None:
    """Refuse what is elsewhere than the inputs; operators by tiles would not notice."""
    if found.device != like.device:
        raise TypeError(
            f"{name} is on {found.device}, the inputs on {like.device}; they must be on one device"
        )


def check_vector(vector: Tensor, name: str, like: Tensor) -> None:
    """Refuse what does not have one number for each row of a matrix, on its device."""
    check_plain(**{name: vector})
    size = len(like)
    if vector.shape != (size,):
        raise ValueError(f"{name} has shape {tuple(vector.shape)}; give one of shape {(size,)}")
    check_device(vector, name, like)


def check_vectors(
    x: Tensor,
    y: Tensor,
    rows: Tensor,
    columns: Tensor | None,
    grad_rows: Tensor,
    grad_columns: Tensor | None,
    grad_positives: Tensor,
) -> None:
    """Refuse sums and gradients that do not belong to the rows of x and of y."""
    if (columns is None) != (grad_columns is None):
        raise ValueError("columns and grad_columns belong together; give both or None for both")
    vectors = {"rows": rows, "grad_rows": grad_rows, "grad_positives": grad_positives}
    for name, vector in vectors.items():
        check_vector(vector, name, x)
    if columns is not None and grad_columns is not None:
        check_vector(columns, "columns", y)
        check_vector(grad_columns, "grad_columns", y)


def check_excluded(excluded: Tensor | None, x: Tensor, y: Tensor) -> None:
    """Refuse what is no mask of the pairs of rows of x and of y."""
    if excluded is None:
        return
    check_plain(excluded=excluded)
    shape = len(x), len(y)
    if excluded.dtype != torch.bool:
        raise TypeError(f"excluded is {excluded.dtype}; give booleans, True where left out")
    sizes = zip(reversed(excluded.shape), reversed(shape), strict=False)
    if excluded.ndim > 2 or any(size not in (1, whole) for size, whole in sizes):
        raise ValueError(
            f"excluded has shape {tuple(excluded.shape)}, which does not broadcast to {shape}"
        )
    check_device(excluded, "excluded", x)


def as_index(index: Tensor, name: str, x: Tensor) -> Tensor:
    """Return one int64 column for each row of x."""
    check_vector(index, name, x)
    if index.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{name} is {index.dtype}; give int64 or int32")
    return index.long()


def as_labels(labels: Tensor | None, x: Tensor) -> Tensor:
    """Return the positives' columns, i for row i by default."""
    if labels is None:
        return torch.arange(len(x), device=x.device)
    return as_index(labels, "labels", x)


def as_scalar(value: Tensor | float, name: str, like: Tensor) -> Tensor:
    """Return a tensor of shape () on the device of another one; one of a CPU is copied there."""
    if not isinstance(value, Tensor):
        return torch.tensor(value, dtype=torch.float64, device=like.device)
    check_plain(**{name: value})
    if value.ndim or not value.is_floating_point():
        raise ValueError(
            f"{name} has shape {tuple(value.shape)} and is {value.dtype}; give a number or a "
            "floating-point tensor of shape ()"
        )
    if value.device.type != "cpu":
        check_device(value, name, like)
    return value.to(like.device)
