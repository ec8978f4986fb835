"""Lion of many workers, who exchange signs instead of gradients.

Source: Liu et al. 2024 (Distributed Lion, arXiv:2404.00438), Algorithm 1.
Differs: a direction of 0, for which there is no bit, goes out as +1 from every second rank and as
    −1 from the others, the other way round at the next step, so that entries without a gradient
    stay where they are: exactly among an even number of ranks, else on average. A tie is 0.
"""

from __future__ import annotations

import copy
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from lightning_ext import functional, kernels
from lightning_ext.optim._distributed._agreement import Agreement
from lightning_ext.optim._distributed._exchange import cast, count
from lightning_ext.optim._distributed._lion_votes import directions, follow, voters
from lightning_ext.optim._distributed._ranks import gather_states, rank_and_size, take_states
from lightning_ext.optim._step._checks import check_groups, checks_groups
from lightning_ext.optim._step._closure import Closure, closure_loss
from lightning_ext.optim._step._rows import rows, zeros
from lightning_ext.optim._step._update import update

_STATES = {"exp_avg": zeros}
_SETTINGS = ("lr", "betas", "weight_decay", "maximize")
_VOTES = ("majority", "average")


@checks_groups()
class DistributedLion(Optimizer):
    r"""Lion of W ranks that send one bit per parameter: which way they would go.

    .. math::
        d_i = \mathrm{sign}(\beta_1 m_i + (1 - \beta_1) g_i), \qquad
        m_i \leftarrow \beta_2 m_i + (1 - \beta_2) g_i, \qquad
        x \leftarrow x - \mathrm{lr}\,(\Delta + \lambda x)

    on rank i, with :math:`\Delta = \mathrm{sign}(\sum_i d_i)`, 0 where it is a tie, or
    :math:`\frac{1}{W} \sum_i d_i`. Parameters stay the same to the bit on all ranks, moments are
    each rank's own. One rank, or no process group, is ``Lion``.

    Gradients must be those of the rank: give the module to no DistributedDataParallel, or to one
    with ``keep_local_gradients``; with Lightning add ``callbacks.LocalGradients``. The first step
    compares the ranks: parameters that differ are refused, and gradients that are the same are
    warned of. All ranks need gradients of the same parameters.

    ``step`` and ``state_dict`` communicate: all ranks must call them, also where one alone writes
    the file.

    Args:
        params: parameters or groups, on one device; no DTensors.
        lr: rate, a number or a tensor of one entry; as of ``Lion``.
        betas: β₁ and β₂, each in [0, 1).
        weight_decay: λ, decoupled.
        vote: Δ is the ``"majority"`` or the ``"average"``, for all groups.
        process_group: the ranks; all by default. Copies keep it, pickles cannot hold one.
        maximize: climb instead of descend.
        foreach: False updates one parameter after the other by the plain formula, anything else
            all at once.
        fused: as in ``torch.optim``: ``None``, kernels on CUDA; ``True``, kernels or an error.

    Raises:
        ValueError: if a setting is out of range.
        TypeError: if a parameter is complex or a DTensor.

    Example:
        >>> x = torch.nn.Parameter(torch.ones(3))
        >>> optimizer = DistributedLion([x], lr=0.25)
        >>> x.grad = torch.tensor([4.0, 0.0, -1.0])
        >>> optimizer.step()  # of one rank
        >>> x.data
        tensor([0.7500, 1.0000, 1.2500])
    """

    batch_rule = "sqrt"
    takes_local_gradients = True
    process_group: dist.ProcessGroup | None = None
    _agreement: Agreement | None = None
    _sent = 0

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        *,
        vote: Literal["majority", "average"] = "majority",
        process_group: dist.ProcessGroup | None = None,
        maximize: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
    ) -> None:
        if vote not in _VOTES:
            raise ValueError(f"DistributedLion got vote={vote!r}; choose 'majority' or 'average'")
        defaults: dict[str, Any] = {
            "lr": lr,
            "betas": betas,
            "weight_decay": weight_decay,
            "vote": vote,
            "zero_sign": 1,
            "maximize": maximize,
            "foreach": foreach,
            "fused": fused,
            "decoupled_weight_decay": True,
        }
        super().__init__(params, defaults)
        self.process_group = process_group
        check_groups(self)

    @property
    def bytes_per_step(self) -> int:
        """Bytes that this rank sent to others in the last step; 0 where it is alone."""
        return self._sent

    @torch.no_grad()
    def step(self, closure: Closure | None = None) -> float | None:
        """Take a step; all ranks must.

        Args:
            closure: computes the loss and its gradients; called first.

        Returns:
            What the closure returns, of this rank.

        Raises:
            RuntimeError: if the ranks do not fit together.
        """
        loss = closure_loss(closure)
        rank, size = rank_and_size(self.process_group)
        if size > 1:
            self._step_together(rank, size)
            return loss
        for group in self.param_groups:
            update(
                kernels.lion_update_,
                functional.lion_update,
                rows(self, group, _STATES),
                {name: group[name] for name in _SETTINGS},
                group,
                counted=False,
            )
        return loss

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group.

        Args:
            param_group: as in ``torch.optim.Optimizer``.

        Raises:
            TypeError: if a parameter is a DTensor.
        """
        super().add_param_group(param_group)
        if any(isinstance(x, DTensor) for x in self.param_groups[-1]["params"]):
            raise TypeError(
                "DistributedLion got a DTensor, and takes plain parameters, whole on every rank:"
                " FSDP2 averages gradients itself, and leaves nothing to vote on. Hint: DDP with"
                " optim.keep_local_gradients, or optim.Lion under FSDP2"
            )

    def state_dict(self) -> dict[str, Any]:
        """Return a state for all ranks; all of them must call.

        Returns:
            As of any optimizer. ``exp_avg`` of several ranks has shape (ranks, …) and is in host
            memory, the same on every rank.
        """
        saved: dict[str, Any] = super().state_dict()
        _, size = rank_and_size(self.process_group)
        if size == 1:
            return saved
        return gather_states(saved, "exp_avg", self.process_group)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over this rank's part of what ``state_dict`` returned, or a state of ``Lion``.

        Where another number of ranks has saved it, every rank takes the mean of their moments, with
        a warning.

        Args:
            state_dict: of an optimizer of the same groups.
        """
        rank, size = rank_and_size(self.process_group)
        super().load_state_dict(take_states(self, state_dict, "exp_avg", rank, size))
        self._agreement = None

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "process_group": self.process_group}

    def __deepcopy__(self, memo: dict[int, Any]) -> DistributedLion:
        memo[id(self.process_group)] = self.process_group
        copied = type(self).__new__(type(self))
        memo[id(self)] = copied
        copied.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        return copied

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:  # of Lion, say, which has no votes
            for name, value in self.defaults.items():
                group.setdefault(name, value)

    def _step_together(self, rank: int, size: int) -> None:
        params = voters(self.param_groups)
        if not params:
            return
        first, among = self.param_groups[0], self.process_group
        self._agreement = self._agreement or Agreement("DistributedLion")
        header = self._agreement.header(self._vote(), params)
        found = [rows(self, group, _STATES) for group in self.param_groups]
        flat = directions(self.param_groups, found, size)
        zero_sign = first["zero_sign"] * (1 - 2 * (rank % 2))
        ballots = cast(flat, header, zero_sign=zero_sign, group=among, fused=first["fused"])
        self._agreement.check(header, ballots.headers)
        votes, sent = count(
            ballots.bits, self._vote(), dtype=flat.dtype, group=among, fused=first["fused"]
        )
        self._sent = ballots.sent + sent
        follow(self.param_groups, found, votes)
        sign = -first["zero_sign"]
        for group in self.param_groups:
            group["zero_sign"] = sign

    def _vote(self) -> str:
        votes = {group["vote"] for group in self.param_groups}
        if len(votes) > 1 or not votes <= set(_VOTES):
            raise ValueError(
                f"DistributedLion got vote={' and '.join(map(repr, sorted(votes)))}; all groups"
                " count alike, 'majority' or 'average'"
            )
        return str(votes.pop())
