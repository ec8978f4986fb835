"""Gradients of single samples, a chunk of a batch at a time.

Source: torch.func, vmap(grad); the variance tests that read single samples are those of Lau et al.
    2024 (AdAdaGrad, arXiv:2402.11215).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.func import grad, vmap
from torch.utils import _pytree as pytree


def per_sample_gradients(
    loss_fn: Callable[[dict[str, Tensor], Any], Tensor],
    params: Mapping[str, Tensor],
    batch: Any,
    *,
    chunk_size: int | None = None,
) -> Iterator[dict[str, Tensor]]:
    """Return ∇ℓ_i for the samples i of a batch, ``chunk_size`` of them at a time.

    Random numbers are drawn anew for each sample. At ``chunk_size=1`` samples come one after
    another without ``vmap``: slower, and for every loss that can be differentiated.

    Args:
        loss_fn: takes the parameters and a batch of one sample, and returns its loss, a scalar.
        params: parameters by name.
        batch: tensors of shape (samples, …) in any nesting of lists, tuples and dicts; leaves that
            are no tensors, or have no dimension, go to every sample as they are.
        chunk_size: samples whose gradients are in memory together; ``None`` means all.

    Returns:
        For each chunk the gradients of its samples by name, shape (samples of it, …) with the
        shape of the parameter behind.

    Raises:
        ValueError: if ``chunk_size`` is below 1, or tensors differ in the number of samples.

    Example:
        >>> squared = lambda params, x: (params["w"] * x).square().mean()
        >>> params, x = {"w": torch.tensor(2.0)}, torch.tensor([1.0, 3.0])
        >>> [found["w"].tolist() for found in per_sample_gradients(squared, params, x)]
        [[4.0, 36.0]]
    """
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(
            f"chunk_size={chunk_size!r} is not allowed; it must be at least 1, or None"
        )
    leaves, structure = pytree.tree_flatten(batch)
    dims = [0 if isinstance(leaf, Tensor) and leaf.ndim > 0 else None for leaf in leaves]
    sizes = {len(leaf) for leaf, dim in zip(leaves, dims, strict=True) if dim == 0}
    if len(sizes) != 1:
        raise ValueError(
            f"the tensors of the batch have {sorted(sizes)} samples; give tensors whose first "
            "dimension is the samples, the same in each"
        )

    def loss_of_one(params: dict[str, Tensor], *sample: Any) -> Tensor:
        ones = [x if dim is None else x[None] for x, dim in zip(sample, dims, strict=True)]
        return loss_fn(params, pytree.tree_unflatten(ones, structure))

    return _in_chunks(loss_of_one, dict(params), leaves, dims, chunk_size or max(*sizes, 1))


def _in_chunks(
    loss_of_one: Callable[..., Tensor],
    params: dict[str, Tensor],
    leaves: Sequence[Any],
    dims: Sequence[int | None],
    chunk: int,
) -> Iterator[dict[str, Tensor]]:
    gradient = grad(loss_of_one)
    mapped = vmap(gradient, (None, *dims), randomness="different")
    samples = next(len(leaf) for leaf, dim in zip(leaves, dims, strict=True) if dim == 0)
    for start in range(0, samples, chunk):
        pairs = list(zip(leaves, dims, strict=True))
        if chunk == 1:
            sample = [x if dim is None else x[start] for x, dim in pairs]
            yield {name: found[None] for name, found in gradient(params, *sample).items()}
        else:
            part = [x if dim is None else x[start : start + chunk] for x, dim in pairs]
            yield mapped(params, *part)
