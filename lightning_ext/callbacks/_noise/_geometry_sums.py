"""Sums over the parts of a batch for one parameter, and the norms that they come to."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from lightning_ext import functional, scaling

_LEAST = 0.1  # of a batch's variance, which a second moment has that has seen the coordinate


class Norms(NamedTuple):
    """What one step tells of one set of parameters.

    Args:
        signal: ‖G‖; |G|² of the preconditioned gradient under ``"adam"``.
        noise: The norm of one sample's noise; S under ``"adam"``.
        low: At most ‖G‖ on average; nan under ``"adam"``.
        high: At least ‖G‖ on average: the norm as it came out; nan under ``"adam"``.
    """

    signal: float
    noise: float
    low: float = math.nan
    high: float = math.nan


class Counts(NamedTuple):
    """Folds that have parts, and their samples and parts over all ranks."""

    folds: list[int]
    samples: list[float]
    parts: list[int]

    @property
    def half(self) -> list[int]:
        """Place of the fold with most parts, if it has a covariance of its own."""
        most = max(range(len(self.parts)), key=lambda place: self.parts[place])
        return [most] if 1 < self.parts[most] < sum(self.parts) else []


class AbsoluteSums:
    """One parameter under ``"l1"``: Σ n_j g_j of each fold, and Σ n_j g_j².

    Args:
        parameter: Whose gradients are added up.
        optimizer: Its optimizer.
        group: Its group of parameters.
    """

    count = 4

    def __init__(self, parameter: Parameter, optimizer: Optimizer, group: dict[str, Any]) -> None:
        wide = torch.promote_types(parameter.dtype, torch.float32)
        self.folds = [
            torch.zeros(parameter.shape, dtype=wide, device=parameter.device)
            for _ in range(self.count)
        ]
        self.squares = [self.folds[0].new_zeros(shape) for shape in self.square_shapes()]
        self.ready = True

    def square_shapes(self) -> Sequence[Sequence[int]]:
        """Shapes of the sums of squares."""
        return [self.folds[0].shape]

    def add(self, fold: int, gradient: Tensor, samples: float, factor: float) -> None:
        """Takes in one part."""
        self.folds[fold].add_(gradient, alpha=samples * factor)
        wide = gradient.to(self.squares[0].dtype)
        self.squares[0].addcmul_(wide, wide, value=samples * factor**2)

    def means(self, counts: Counts) -> list[Tensor]:
        """Mean gradients of the folds that have parts."""
        return [self.folds[i] / n for i, n in zip(counts.folds, counts.samples, strict=True)]

    def mean(self, counts: Counts) -> Tensor:
        """Mean gradient of the whole."""
        total = self.folds[0]
        for fold in self.folds[1:]:
            total = total + fold
        return total / sum(counts.samples)

    def numbers(self, counts: Counts) -> Tensor:
        """What adds up over parameters: norms of the folds, then the sum of deviations."""
        norms = functional.fold_norms(self.means(counts), counts.samples, torch.sign)
        (variance,) = functional.coordinate_variance(
            self.squares, [self.mean(counts)], sum(counts.samples), sum(counts.parts)
        )
        return torch.cat([norms, functional.deviation_sum(variance)[None]])

    @classmethod
    def table(cls, found: Sequence[AbsoluteSums], counts: Counts) -> Tensor:
        """The numbers of all parameters, shape (numbers, parameters)."""
        return torch.stack([sums.numbers(counts).double() for sums in found], dim=1)

    @classmethod
    def norms(cls, row: list[float], counts: Counts) -> Norms:
        """From numbers that were added up."""
        noise = row[-1] / scaling.deviation_factor(sum(counts.parts))
        return _norms(row, noise, counts.samples)


class MatrixSums(AbsoluteSums):
    """One matrix under ``"nuclear"``: Σ n_j G_j and Σ n_j G_j G_jᵀ of each half."""

    count = 2

    def square_shapes(self) -> Sequence[Sequence[int]]:
        """A square of the smaller side for each half."""
        side = min(self.folds[0].shape)
        return [(side, side)] * self.count

    def add(self, fold: int, gradient: Tensor, samples: float, factor: float) -> None:
        """Takes in one part."""
        self.folds[fold].add_(gradient, alpha=samples * factor)
        self.squares[fold].add_(functional.small_gram(gradient), alpha=samples * factor**2)

    @classmethod
    def table(cls, found: Sequence[AbsoluteSums], counts: Counts) -> Tensor:
        """Norms of the folds, then traces of roots; matrices of one shape are taken together."""
        alike: dict[Any, list[int]] = defaultdict(list)
        for index, sums in enumerate(found):
            alike[sums.folds[0].shape, sums.folds[0].dtype].append(index)
        columns = torch.cat(
            [_of_matrices([found[i] for i in members], counts) for members in alike.values()], dim=1
        )
        order = torch.tensor([i for members in alike.values() for i in members])
        return columns[:, order.argsort()]

    @classmethod
    def norms(cls, row: list[float], counts: Counts) -> Norms:
        """From numbers that were added up."""
        whole, *half = row[1 + 2 * len(counts.folds) :]
        few = [counts.parts[place] for place in counts.half]
        noise = scaling.norm_noise(whole, sum(counts.parts), half, few)
        return _norms(row, noise, counts.samples)


class PreconditionedSums(AbsoluteSums):
    """One parameter under ``"adam"``: Σ n_j g_j and Σ n_j g_j²; one without state is left out.

    Adam's second moment from before the step, which on average is that of a batch's gradient, is
    taken as at least a tenth of the variance of this batch's: alone, it would divide by nearly 0
    where a coordinate had no gradient before, as of a rare token.
    """

    count = 1

    def __init__(self, parameter: Parameter, optimizer: Optimizer, group: dict[str, Any]) -> None:
        super().__init__(parameter, optimizer, group)
        state = optimizer.state.get(parameter, {})
        self.ready = "exp_avg_sq" in state and float(state["step"]) > 0
        self._state, self._group = state, group

    def numbers(self, counts: Counts) -> Tensor:
        """What adds up over parameters: |ū|² and the sum of the variances of u."""
        samples, mean = sum(counts.samples), self.mean(counts)
        (variance,) = functional.coordinate_variance(
            self.squares, [mean], samples, sum(counts.parts)
        )
        beta2, step = float(self._group["betas"][1]), float(self._state["step"])
        kept = self._state.get("max_exp_avg_sq", self._state["exp_avg_sq"])
        second = functional.decode_state(kept)
        factor = functional.adam_preconditioned(
            torch.ones_like(mean),
            torch.maximum(second.to(variance), variance * (_LEAST * (1 - beta2**step) / samples)),
            beta2=beta2,
            step=step,
            eps=float(self._group["eps"]),
        )
        return torch.stack([functional.sq_norms([mean * factor]), (variance * factor**2).sum()])

    @classmethod
    def norms(cls, row: list[float], counts: Counts) -> Norms:
        """From numbers that were added up."""
        return Norms(row[0] - row[1] / sum(counts.samples), row[1])


KINDS: dict[str, type[AbsoluteSums]] = {
    "l1": AbsoluteSums,
    "nuclear": MatrixSums,
    "adam": PreconditionedSums,
}


def _of_matrices(found: Sequence[AbsoluteSums], counts: Counts) -> Tensor:
    """Norms of the folds, then traces of roots: of the whole, and of a half if one has it."""
    pairs = list(zip(counts.folds, counts.samples, strict=True))
    means = [torch.stack([sums.folds[fold] for sums in found]) / size for fold, size in pairs]
    norms = functional.fold_norms(means, counts.samples, functional.orthogonalize, (-2, -1))
    grams = [torch.stack([sums.squares[fold] for sums in found]) for fold in counts.folds]
    whole = torch.stack([sums.mean(counts) for sums in found])
    wanted = [(torch.stack(grams).sum(0), whole, sum(counts.samples), sum(counts.parts))]
    wanted += [(grams[i], means[i], counts.samples[i], counts.parts[i]) for i in counts.half]
    covariances = torch.stack([functional.matrix_covariance(*each) for each in wanted])
    return torch.cat([norms, functional.trace_sqrt(covariances)]).double()


def _norms(row: list[float], noise: float, samples: list[float]) -> Norms:
    count = len(samples)
    whole, left_out, crossed = row[0], row[1 : 1 + count], row[1 + count : 1 + 2 * count]
    signal = scaling.norm_signal(whole, left_out, crossed, samples)
    return Norms(signal, noise, sum(crossed) / count, whole)
