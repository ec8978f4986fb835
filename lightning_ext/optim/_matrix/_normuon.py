"""NorMuon for matrices and AdamW for all else, as one optimizer.

Source: Li et al. 2025 (NorMuon, arXiv:2510.05491), Algorithm 1 and its authors' code; Jordan et al.
    2024 (Muon: kellerjordan.github.io/posts/muon), for what goes to AdamW.
Differs: see ``functional.normuon_update``. Under sharding it is the update of one process: norms
    are those of whole matrices. A parameter without a gradient stays as it is.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from lightning_ext import functional, kernels
from lightning_ext.optim._groups._parameter_roles import is_in_or_out
from lightning_ext.optim._low_bit._moments import StateDtype, first_moment, second_moment
from lightning_ext.optim._low_bit._saved import saves_moments
from lightning_ext.optim._matrix._owners import by_owners, refuse_other_splits
from lightning_ext.optim._step._checks import SHARE, Range, check_group, checks_groups
from lightning_ext.optim._step._closure import Closure, closure_loss
from lightning_ext.optim._step._rows import Init, Rows, rows
from lightning_ext.optim._step._shards import reduction, zeros_like_rows
from lightning_ext.optim._step._update import STREAMS, shard_seed, update

_MATRIX_STATES: dict[str, Init] = {"momentum_buffer": first_moment, "row_sq": zeros_like_rows}
_OTHER_STATES = {"exp_avg": first_moment, "exp_avg_sq": second_moment}
_RANGES = {
    "beta2": SHARE,
    "ns_steps": Range(lambda x: x >= 1 and x == int(x), "be a whole number of at least 1"),
}
_DTYPES = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
    "float64": torch.float64,
    None: None,
}
_CHOICES: dict[str, tuple[str | None, ...]] = {
    "algorithm": ("muon", "adamw"),
    "adjust_lr_fn": ("original", "match_rms_adamw", "paper"),
    "ns_dtype": tuple(_DTYPES),
}
_SETTINGS = ("lr", "momentum", "beta2", "weight_decay", "nesterov", "eps", "adjust_lr_fn")
_ADAMW_SETTINGS = ("lr", "betas", "eps", "weight_decay", "maximize")
_Make = Callable[[list[Tensor]], list[Tensor]]


@saves_moments(_MATRIX_STATES | _OTHER_STATES)
@checks_groups(_RANGES)
class NorMuon(Optimizer):
    r"""Orthogonal steps for matrices, their rows about equally long, and AdamW for all else.

    .. math::
        O = \mathrm{NewtonSchulz}(\mu M + (1 - \mu) G), \qquad
        v \leftarrow \beta_2 v + (1 - \beta_2)\, \mathrm{mean}_{\mathrm{row}}(O^2), \qquad
        W \leftarrow (1 - \mathrm{lr}\,\lambda) W - \mathrm{lr}\, s\, \frac{O}{\sqrt{v} + \epsilon}

    with s such that the norm of O stays, times √max(1, rows/columns). A group says by
    ``algorithm="muon"`` or ``"adamw"`` what is done with its parameters; one that does not has to
    consist of matrices. ``param_groups_for`` makes such groups of a module: embeddings and output
    layers are matrices too, and for AdamW, which no shape tells. Convolutions are matrices with a
    row for each output channel.

    Under FSDP2 (``fully_shard``) each matrix is made orthogonal by one rank, to which the others
    send their rows of its momentum; there are two all-to-alls and one small all-reduce a group and
    step, and states stay split as the parameters are. Without sharding all ranks do the same.

    Args:
        params: parameters or groups.
        lr: rate of matrices, a number or a tensor of one entry.
        momentum: μ in [0, 1), of matrices.
        beta2: β₂ in [0, 1), of the rows of matrices; ``None`` leaves them as they are, which is
            Muon.
        weight_decay: λ, decoupled, of both.
        betas: of AdamW, each in [0, 1).
        adamw_lr: rate of the groups for AdamW that have no other.
        eps: ε, of both.
        nesterov: whether matrices look ahead.
        ns_steps: how often Newton–Schulz iterates.
        ns_coefficients: its a, b and c.
        ns_dtype: of its products, "bfloat16", "float16", "float32" or "float64"; ``None``:
            bfloat16, float32 on a CPU without AMX, and float64 where the parameters are.
        adjust_lr_fn: s, "original" as above; "match_rms_adamw", times 0.2·√max(rows, columns)
            instead; "paper", a root mean square of 0.2. The latter two take AdamW's rates.
        state_dtype: format of the moments; that of the parameter where ``None``. Vectors and
            tensors of at most 4096 entries stay in float32.
        maximize: climb instead of descend.
        foreach: False updates one parameter after the other by the plain formula, anything else
            all at once.
        fused: as in ``torch.optim``: ``None``, kernels on CUDA; ``True``, kernels or an error.

    Raises:
        ValueError: if a setting is out of range, or a group for matrices holds anything else.
        TypeError: if a parameter is complex.

    Example:
        >>> from lightning_ext.optim import param_groups_for
        >>> model = torch.nn.Sequential(
        ...     torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 2)
        ... )
        >>> groups = param_groups_for(model, NorMuon, weight_decay=0.01, head="2")
        >>> optimizer = NorMuon(groups, lr=0.02)
        >>> [(x["algorithm"], x["lr"], x["param_names"]) for x in optimizer.param_groups[:2]]
        [('muon', 0.02, ['0.weight']), ('adamw', 0.0003, ['2.weight'])]
    """

    batch_rule = "sqrt"

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 0.02,
        momentum: float = 0.95,
        beta2: float | None = 0.95,
        weight_decay: float = 0.0,
        *,
        betas: tuple[float, float] = (0.9, 0.95),
        adamw_lr: float | Tensor = 3e-4,
        eps: float = 1e-10,
        nesterov: bool = True,
        ns_steps: int = 5,
        ns_coefficients: tuple[float, float, float] = (3.4445, -4.7750, 2.0315),
        ns_dtype: Literal["bfloat16", "float16", "float32", "float64"] | None = None,
        adjust_lr_fn: Literal["original", "match_rms_adamw", "paper"] = "original",
        state_dtype: StateDtype | None = None,
        maximize: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
    ) -> None:
        defaults: dict[str, Any] = {
            "lr": lr,
            "momentum": momentum,
            "beta2": beta2,
            "weight_decay": weight_decay,
            "betas": betas,
            "adamw_lr": adamw_lr,
            "eps": eps,
            "nesterov": nesterov,
            "ns_steps": ns_steps,
            "ns_coefficients": ns_coefficients,
            "ns_dtype": ns_dtype,
            "adjust_lr_fn": adjust_lr_fn,
            "algorithm": "muon",
            "state_dtype": state_dtype,
            "maximize": maximize,
            "foreach": foreach,
            "fused": fused,
            "decoupled_weight_decay": True,
        }
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group.

        Args:
            param_group: as in ``torch.optim.Optimizer``; ``algorithm`` is "muon" or "adamw", and
                ``adamw_lr`` another word for ``lr`` in the latter.

        Raises:
            ValueError: if a setting is out of range, or a group for matrices holds anything else.
        """
        if isinstance(param_group, dict):
            _take_rate(param_group, self.defaults["adamw_lr"])
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        group.pop("adamw_lr", None)  # a second rate, which no schedule knows
        check_group(self, len(self.param_groups) - 1, group, _RANGES)
        _check_choices(group)
        if group["algorithm"] == "muon":
            _check_matrices(group, len(self.param_groups) - 1)
            _warn_of_names(group)

    @torch.no_grad()
    def step(self, closure: Closure | None = None) -> float | None:
        """Take a step.

        Args:
            closure: computes the loss and its gradients; called first.

        Returns:
            What the closure returns.
        """
        loss = closure_loss(closure)
        for group in self.param_groups:
            if group["algorithm"] == "muon":
                _step_matrices(rows(self, group, _MATRIX_STATES, _RANGES), group)
                continue
            settings = {name: group[name] for name in _ADAMW_SETTINGS}
            found = rows(self, group, _OTHER_STATES, _RANGES)
            update(kernels.adamw_update_, functional.adamw_update, found, settings, group)
        return loss


def _step_matrices(found: Rows, group: dict[str, Any]) -> None:
    settings = {name: group[name] for name in (*_SETTINGS, "maximize")}
    how = {"steps": group["ns_steps"], "coefficients": group["ns_coefficients"]}
    solve = partial(kernels.newton_schulz, fused=group["fused"], **how)
    dtype = _DTYPES[group["ns_dtype"]]
    make = partial(functional.stacked_newton_schulz, solve=solve, dtype=dtype)
    low_bit = group["state_dtype"] not in (None, "float32")
    if group["foreach"] is False and not group["fused"] and not low_bit:
        for i in range(len(found.whole)):
            _step_one(found, i, make, settings)
        return
    reduce, heights = reduction(found.whole), [len(x) for x in found.whole]
    settings["orthogonalize"] = partial(_by_owners, make, found.whole) if reduce else make
    columns = found.params, found.grads, *found.states
    if low_bit:
        seed = shard_seed(0, found.whole[0]) if found.whole else 0
        settings |= {"steps": found.steps, "seed": seed, "stream": STREAMS * found.place}
    functional.normuon_update_(*columns, rows=heights, reduce=reduce, **settings)


def _step_one(found: Rows, i: int, make: _Make, settings: dict[str, Any]) -> None:
    """The step of one matrix by the plain formula."""
    param, old = found.whole[i], [found.params[i], *(x[i] for x in found.states)]
    new = functional.normuon_update(
        old[0],
        found.grads[i],
        *old[1:],
        rows=len(param),
        orthogonalize=lambda x: _by_owners(make, [param], [x])[0],
        reduce=reduction([param]),
        **settings,
    )
    for tensor, value in zip(old, new, strict=True):
        tensor.copy_(value)


def _by_owners(make: _Make, params: list[Tensor], parts: list[Tensor]) -> list[Tensor]:
    return by_owners(lambda _, matrices: make(list(matrices)), params, parts)


def _take_rate(group: dict[str, Any], adamw_lr: Any) -> None:
    """Take the rate for AdamW as that of a group for it."""
    if "adamw_lr" not in group:
        if group.get("algorithm") == "adamw":
            group.setdefault("lr", adamw_lr)
        return
    if group.get("algorithm") != "adamw" or "lr" in group:
        raise ValueError(
            f"NorMuon got adamw_lr={group['adamw_lr']} in a group for matrices or beside lr, where"
            " it would not be read. Hint: lr"
        )
    group["lr"] = group.pop("adamw_lr")


def _check_choices(group: dict[str, Any]) -> None:
    for name, allowed in _CHOICES.items():
        if group[name] not in allowed:
            choices = ", ".join(map(repr, allowed))
            raise ValueError(f"NorMuon got {name}={group[name]!r}; choose one of {choices}")
    if len(group["ns_coefficients"]) != 3:
        raise ValueError(
            f"NorMuon got ns_coefficients={group['ns_coefficients']}; give a, b and c of"
            " a s + b s³ + c s⁵"
        )


def _check_matrices(group: dict[str, Any], index: int) -> None:
    """Refuse what is no matrix."""
    names = group.get("param_names")
    for i, param in enumerate(group["params"]):
        where = repr(names[i]) if names else f"parameter {i} of group {index}"
        refuse_other_splits("NorMuon", param, where)
        if param.dim() < 2:
            raise ValueError(
                f"NorMuon got {where}, of shape {tuple(param.shape)}, in a group for matrices and"
                " convolutions. Hint: NorMuon(optim.param_groups_for(module, NorMuon)), or a group"
                ' with algorithm="adamw" for it'
            )


def _warn_of_names(group: dict[str, Any]) -> None:
    """Warn of matrices that are called as embeddings and output layers are."""
    names = group.get("param_names", ())
    found = [x for x in names if is_in_or_out(x)]
    if found:
        shown = ", ".join(map(repr, found[:3])) + (" and others" if len(found) > 3 else "")
        warnings.warn(
            f"NorMuon makes orthogonal {shown}, by the name an embedding or an output layer. Hint:"
            " NorMuon(optim.param_groups_for(module, NorMuon)) gives those to AdamW; it takes"
            " head= and adamw= where names do not tell",
            stacklevel=5,
        )
