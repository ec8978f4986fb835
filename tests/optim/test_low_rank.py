"""The low-rank family: the papers' steps by hand, their ideas one by one, and a second opinion."""

from __future__ import annotations

import copy
import itertools
from functools import partial
from typing import Any

import pytest
import pytorch_optimizer
import torch
from harness import assert_accurate
from harness.low_rank_steps import (
    BETAS,
    EVERY,
    GAP,
    LR,
    RANK,
    SHAPES,
    by_paper,
    gradients,
    parameters,
    run,
)
from torch import Tensor, nn
from torch.nn import Parameter

from lightning_ext import functional, optim
from lightning_ext.optim import (
    APOLLO,
    APOLLOMini,
    Fira,
    GaLore,
    GradNormLoRP,
    QGaLore,
    param_groups_for,
)

WITH_BASIS = EVERY[:4]
every = pytest.mark.parametrize("name", EVERY)


@every
def test_twenty_steps_are_those_of_the_paper(name: str) -> None:
    params, grads = parameters(), gradients(20)
    how: dict[str, Any] = {"lr": LR, "betas": BETAS, "eps": 1e-6, "weight_decay": 0.1}
    how |= {"update_proj_gap": GAP}
    if name != "APOLLOMini":
        how["rank"] = RANK
    if name in WITH_BASIS:
        how |= {"subspace": "svd", "spread_refresh": False}
    if name == "QGaLore":
        how |= {"projection_dtype": "float32", "state_dtype": None, "update_proj_gap": GAP}
    before = [x.detach().clone() for x in params]
    found = run(getattr(optim, name)(params, **how), params, grads)
    for i, (x, w) in enumerate(zip(found, before, strict=True)):
        matrices = [g[i].flatten(1).numpy() for g in grads]
        truth = torch.tensor(by_paper(name, w.flatten(1).numpy(), matrices, i))
        assert (x.flatten(1) - truth).abs().max() <= 1e-10


def in_float32(shapes: Any = SHAPES[:2]) -> tuple[list[Parameter], list[list[Tensor]]]:
    return parameters(shapes, torch.float32), gradients(20, shapes, torch.float32)


@pytest.mark.parametrize(
    ("ours", "theirs", "how"),
    [
        (GaLore, pytorch_optimizer.GaLore, {"scale": 0.25}),
        (Fira, pytorch_optimizer.Fira, {"scale": 0.25, "alpha_in_residual": True}),
    ],
)
def test_pytorch_optimizer_agrees_in_a_subspace(
    ours: Any, theirs: Any, how: dict[str, Any]
) -> None:
    steps = GAP - 1  # the signs of the next subspace are another convention
    params, grads = in_float32()
    shared = {"rank": RANK, "update_proj_gap": GAP, "scale": 0.25}
    group = {"params": params, "projection_type": "std", **shared}
    made = theirs([group], lr=LR, betas=BETAS, eps=1e-6, foreach=False)
    truth = run(made, params, grads[:steps])
    params, grads = in_float32()
    grads = grads[:steps]
    mine = ours(params, LR, BETAS, subspace="svd", spread_refresh=False, **shared | how)
    for x, y in zip(run(mine, params, grads), truth, strict=True):
        assert_accurate(x, y.double())


@pytest.mark.parametrize("method", ["svd", "randomized", "iteration"])
def test_a_refresh_does_not_turn_the_momentum_round(method: str) -> None:
    goal = torch.randn(40, 24, dtype=torch.float64) * 0.9 ** torch.arange(24)
    weight = Parameter(torch.zeros(40, 24, dtype=torch.float64))
    optimizer = GaLore([weight], 1.0, rank=8, update_proj_gap=10, subspace=method)
    along = []
    for _ in range(41):
        before = weight.detach().clone()
        weight.grad = goal + 0.1 * torch.randn_like(goal)
        optimizer.step()
        step = before - weight.detach()
        along.append(float((step * goal).sum() / (step.norm() * goal.norm())))
    assert min(along[at] / along[at - 1] for at in (10, 20, 30, 40)) > 0.75


def test_a_subspace_does_not_depend_on_the_size_of_gradients() -> None:
    grad = torch.randn(20, 12)
    bases = [functional.gradient_subspace(grad * x, 4, method="randomized") for x in (1e-25, 1e25)]
    truth = functional.gradient_subspace(grad, 4, method="randomized")
    for found in bases:
        assert (truth @ found.T).abs().trace() > 3.999


def test_a_gradient_of_zeros_does_not_lift_the_limit() -> None:
    first = functional.limit_norm_growth(torch.ones(4), torch.tensor(1.0))[1]
    after = functional.limit_norm_growth(torch.zeros(4), first)[1]
    assert functional.limit_norm_growth(torch.full((4,), 50.0), after)[1] < 1.1


def inside(**how: Any) -> float:
    """How long Fira's residual is inside the subspace, at a first step."""
    basis = torch.linalg.qr(torch.randn(6, RANK).double())[0].T
    grad, zero = torch.randn(9, 6).double(), torch.zeros(9, RANK).double()
    step = partial(functional.low_rank_update, grad, basis, zero, zero, 1, scale=0.25)
    residual = step(form="fira", **how)[0] - step(form="galore")[0]
    return float((residual @ basis.T).norm() / residual.norm())


def test_firas_residual_has_nothing_of_the_subspace_unless_asked_for() -> None:
    assert inside() < 1e-12
    assert inside(alpha_in_residual=True) > 0.1


def lengths(optimizer: torch.optim.Optimizer, params: list[Parameter], steps: int) -> list[float]:
    """How far each step goes, of a gradient that grows tenfold at each of them."""
    found = []
    for step in range(steps):
        before = params[0].detach().clone()
        run(optimizer, params, [[g * 10.0**step for g in gradients(1, SHAPES[:1])[0]]])
        found.append(float((params[0].detach() - before).norm()))
    return found


@pytest.mark.parametrize("kind", [APOLLO, Fira])
@pytest.mark.parametrize(("growth", "ratio"), [(1.01, 1.01), (None, 10.0)])
def test_the_limiter_keeps_a_growing_update_short(
    kind: Any, growth: float | None, ratio: float
) -> None:
    # With so large an ε N is as long as the gradient. Of Fira all but the residual is taken away.
    params = parameters(SHAPES[:1])
    how = {"lr": 1.0, "betas": (0.0, 0.0), "eps": 1e6, "rank": RANK, "norm_growth": growth}
    how |= {"scale": 1e-30} if kind is Fira else {}
    found = lengths(kind(params, **how), params, 4)
    for before, after in itertools.pairwise(found):
        assert abs(after / before / ratio - 1) < 1e-2


def test_lengths_of_rows_follow_adam_and_are_not_lost() -> None:
    params = parameters(SHAPES[:1])
    optimizer = GradNormLoRP(params, LR, BETAS, rank=RANK)
    before = params[0].detach().norm(dim=1)
    for step in range(1, 6):
        params[0].grad = params[0].detach().clone()  # purely along the rows
        optimizer.step()
        expected = before - LR * step  # constant signs, so every step of Adam is about 1
        assert torch.allclose(params[0].detach().norm(dim=1), expected, atol=0.02)
    assert sum(x.numel() for x in optimizer.state[params[0]].values()) < 3 * params[0].numel()


def test_a_row_of_zeros_leaves_zero() -> None:
    param = Parameter(torch.zeros(6, 5).double())
    run(GradNormLoRP([param], rank=RANK), [param], gradients(1, [(6, 5)]))
    assert (param.norm(dim=1) > 0).all()


def resting(cos_threshold: float | None, same: bool) -> int:
    params, grads = parameters(SHAPES[:1]), gradients(40, SHAPES[:1])
    optimizer = QGaLore(params, rank=RANK, update_proj_gap=2, cos_threshold=cos_threshold)
    strong = torch.ones(9, 1).double() @ torch.ones(1, 6).double()
    run(optimizer, params, [[g[0] + 9 * strong if same else g[0]] for g in grads])
    return int(optimizer.state[params[0]]["gap"])


def test_a_subspace_that_stays_is_looked_for_less_often() -> None:
    assert resting(0.4, same=True) > 2
    assert resting(None, same=True) == 2
    assert resting(0.95, same=False) == 2


def refreshes(optimizer: torch.optim.Optimizer) -> list[int]:
    return [int(x["refreshes"]) for x in optimizer.state.values()]


@pytest.mark.parametrize("spread", [True, False])
def test_matrices_take_turns(spread: bool) -> None:
    shapes = [(6, 5)] * 4
    params, grads = parameters(shapes), gradients(25, shapes)
    optimizer = GaLore(params, rank=RANK, update_proj_gap=8, spread_refresh=spread)
    seen = []
    for step in grads:
        before = refreshes(optimizer) or [0] * 4
        run(optimizer, params, [step])
        seen.append(sum(y - x for x, y in zip(before, refreshes(optimizer), strict=True)))
    assert seen[0] == 4
    assert max(seen[1:]) == (1 if spread else 4)
    assert sum(seen) == (16 if not spread else 4 + 12)


def test_projections_of_apollo_are_not_kept() -> None:
    params = parameters()
    optimizer = APOLLO(params, rank=RANK)
    run(optimizer, params, gradients(2))
    kept = {name for x in optimizer.state.values() for name in x}
    counts = {"step", "gap", "refresh_in", "refreshes", "updates"}
    assert kept == counts | {"exp_avg", "exp_avg_sq", "update_norm"}


def test_apollo_draws_another_projection_every_gap_and_matrix() -> None:
    params, grads = parameters([(9, 6)] * 2), gradients(1, [(9, 6)])
    optimizer = APOLLO(params, 0.0, (0.0, 0.0), rank=RANK, update_proj_gap=2)
    seen = []
    for _ in range(3):
        run(optimizer, params, [grads[0] * 2])
        seen += [x["exp_avg"].clone() for x in optimizer.state.values()]
    assert not torch.equal(seen[0], seen[1])
    assert torch.equal(seen[0], seen[2])
    assert not torch.equal(seen[0], seen[4])


@pytest.mark.parametrize("name", WITH_BASIS)
def test_a_subspace_is_not_made_of_zeros(name: str) -> None:
    params, grads = parameters(), gradients(3)
    zeros = [[torch.zeros_like(x) for x in grads[0]]]
    optimizer = getattr(optim, name)(params, rank=RANK)
    before = [x.detach().clone() for x in params]
    after = run(optimizer, params, zeros * 2)
    assert all(torch.equal(*pair) for pair in zip(before, after, strict=True))
    assert refreshes(optimizer) == [0] * 3
    after = run(optimizer, params, grads)
    assert refreshes(optimizer) == [1] * 3
    assert not any(torch.equal(*pair) for pair in zip(before, after, strict=True))


def test_what_has_no_subspace_is_adamw() -> None:
    shapes = [(7,), (4, 3), (9, 2), (), (5, 6)]
    params, truth, grads = parameters(shapes), parameters(shapes), gradients(5, shapes)
    how: dict[str, Any] = {"lr": LR, "betas": BETAS, "eps": 1e-6, "weight_decay": 0.1}
    groups = [{"params": params[:4]}, {"params": params[4:], "algorithm": "adamw"}]
    with pytest.warns(UserWarning, match="Fira has no matrix with a subspace"):
        found = run(Fira(groups, rank=4, **how), params, grads)
    expected = run(torch.optim.AdamW(truth, **how), truth, grads)
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("how", "hint"),
    [
        ({"rank": 0}, r"rank=0; it must be a whole number above 0.*0\.25"),
        ({"rank": 1.0}, r"rank=1\.0.*Hint: 1 is a rank, 1\.0 is neither"),
        ({"rank": 2.5}, r"rank=2\.5"),
        ({"update_proj_gap": 0}, "update_proj_gap=0"),
        ({"scale": 0.0}, r"scale=0\.0"),
        ({"subspace": "qr"}, "subspace='qr'.*'svd'"),
        ({"state_dtype": "int2"}, "state_dtype='int2'"),
        ({"projection_dtype": "int8"}, "projection_dtype='int8'"),
        ({"algorithm": "muon"}, "algorithm='muon'.*'low_rank'"),
    ],
)
def test_wrong_settings_are_refused(how: dict[str, Any], hint: str) -> None:
    with pytest.raises(ValueError, match=hint):
        GaLore([{"params": parameters(), **how}])


def test_groups_of_a_module_send_embeddings_and_outputs_to_adamw() -> None:
    model = nn.ModuleDict(
        {
            "embedding": nn.Embedding(20, 8),
            "hidden": nn.Linear(8, 8),
            "norm": nn.LayerNorm(8),
            "head": nn.Linear(8, 20),
        }
    )
    groups = param_groups_for(model, GaLore, weight_decay=0.1)
    found = {
        name: (group["algorithm"], group["weight_decay"])
        for group in groups
        for name, _ in group["params"]
    }
    assert found["hidden.weight"] == ("low_rank", 0.1)
    assert found["embedding.weight"] == found["head.weight"] == ("adamw", 0.1)
    assert found["norm.weight"] == found["hidden.bias"] == ("adamw", 0.0)
    assert APOLLOMini(groups).param_groups[0]["rank"] == 1
    assert copy.deepcopy(GaLore(groups)).param_groups[1]["algorithm"] == "adamw"
