"""Optimizers that `benchmarks/optimizers.py` times, and who else has them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch.nn import Parameter
from torch.optim import Optimizer

from benchmarks._peers import found_member

Groups = list[dict[str, Any]]
Grouping = Callable[[list[Parameter], list[Parameter]], Groups]
OURS, ANCHOR = "lightning_ext", "torch AdamW fused"
NOTHING: dict[str, Any] = {}
ONE_FORM: dict[str, dict[str, Any]] = {"": NOTHING}
FORMS: dict[str, dict[str, Any]] = {"foreach": {"foreach": True}, "for-loop": {"foreach": False}}


def plain(matrices: list[Parameter], vectors: list[Parameter]) -> Groups:
    """Decay for matrices alone."""
    return filled({"params": matrices}, {"params": vectors, "weight_decay": 0.0})


def trusting(matrices: list[Parameter], vectors: list[Parameter]) -> Groups:
    """Decay and trust ratio for matrices alone."""
    others = {"params": vectors, "weight_decay": 0.0, "trust_ratio": False}
    return filled({"params": matrices, "trust_ratio": True}, others)


def bare(matrices: list[Parameter], vectors: list[Parameter]) -> Groups:
    """All alike, of an optimizer without decay."""
    return [{"params": [*matrices, *vectors]}]


def muon(matrices: list[Parameter], vectors: list[Parameter]) -> Groups:
    """Vectors to AdamW."""
    others = {"params": vectors, "algorithm": "adamw"}
    return filled({"params": matrices, "algorithm": "muon"}, others)


def use_muon(matrices: list[Parameter], vectors: list[Parameter]) -> Groups:
    """The same in pytorch_optimizer's words."""
    others = {"params": vectors, "use_muon": False}
    return filled({"params": matrices, "use_muon": True}, others)


def filled(*groups: dict[str, Any]) -> Groups:
    """Groups that have parameters."""
    return [group for group in groups if group["params"]]


class Maker(NamedTuple):
    """An optimizer of some package.

    Attributes:
        path: module and class.
        settings: besides those of the thing.
        grouping: of its parameters.
        forms: settings of which the fastest are timed, by name.
        differs: in what its definition is not ours, so that steps are not compared.
    """

    path: str
    settings: dict[str, Any] = NOTHING
    grouping: Grouping = plain
    forms: dict[str, dict[str, Any]] = ONE_FORM
    differs: str = ""

    @property
    def package(self) -> str:
        """Where it is from."""
        return self.path.partition(".")[0]

    def __call__(
        self, matrices: list[Parameter], vectors: list[Parameter], **settings: Any
    ) -> Optimizer:
        """Make it, of parameters."""
        kind = found_member(self.path)
        made: Optimizer = kind(self.grouping(matrices, vectors), **settings | self.settings)
        return made


class Thing(NamedTuple):
    """An optimizer of ours and its peers.

    Attributes:
        ours: ours.
        settings: that all of them take.
        peers: theirs.
        tolerance: of steps, which are about a thousandth of weights that are rounded to 6e-8.
        shapes: where they are timed; all by default.
    """

    ours: Maker
    settings: dict[str, Any]
    peers: tuple[Maker, ...]
    tolerance: float = 1e-3
    shapes: tuple[str, ...] | None = None


def kozistr(name: str, differs: str = "", **settings: Any) -> Maker:
    """An optimizer of pytorch_optimizer."""
    return Maker(f"pytorch_optimizer.{name}", settings, forms=FORMS, differs=differs)


def timm(path: str, *, foreach: bool = True, **settings: Any) -> Maker:
    """An optimizer of timm."""
    return Maker(f"timm.optim.{path}", settings, forms=FORMS if foreach else ONE_FORM)


def own(name: str, grouping: Grouping = plain, **settings: Any) -> Maker:
    """An optimizer of ours."""
    return Maker(f"lightning_ext.optim.{name}", settings, grouping)


ADAM: dict[str, Any] = {"lr": 1e-3, "weight_decay": 0.01, "betas": (0.9, 0.999)}
SGD: dict[str, Any] = {"lr": 1e-3, "weight_decay": 0.01, "momentum": 0.9}
MUON: dict[str, Any] = {"lr": 1e-3, "weight_decay": 0.01}
FUSED_ADAMW = Maker("torch.optim.AdamW", {"fused": True})

THINGS: dict[str, Thing] = {
    "LAMB": Thing(
        own("LAMB", trusting),
        ADAM | {"eps": 1e-6},
        (
            kozistr("Lamb", "v without bias correction, eps in the ratio, norm of weights <= 10"),
            timm("lamb.Lamb", max_grad_norm=None),
        ),
    ),
    "LARS": Thing(own("LARS", trusting), SGD | {"lr": 1.0}, (kozistr("LARS"), timm("lars.Lars"))),
    "Lion": Thing(
        own("Lion"),
        {"lr": 1e-4, "weight_decay": 0.1, "betas": (0.9, 0.99)},
        (kozistr("Lion"), timm("lion.Lion")),
    ),
    "AdamP": Thing(own("AdamP"), ADAM, (kozistr("AdamP"), timm("adamp.AdamP", foreach=False))),
    "SGDP": Thing(own("SGDP"), SGD, (kozistr("SGDP"), timm("sgdp.SGDP", foreach=False))),
    "DiffGrad": Thing(
        own("DiffGrad", decoupled_weight_decay=True),
        ADAM,
        (kozistr("DiffGrad"),),
    ),
    "Gravity": Thing(
        own("Gravity", bare),
        {"lr": 0.1, "alpha": 0.01, "beta": 0.9},
        (kozistr("Gravity", "its first velocity is another draw")._replace(grouping=bare),),
    ),
    "NorMuon": Thing(
        own("NorMuon", muon, ns_dtype="bfloat16"),
        MUON,
        (kozistr("NorMuon")._replace(grouping=use_muon),),
        tolerance=0.03,  # of products in bfloat16
    ),
    "NorMuon in float32": Thing(
        own("NorMuon", muon, ns_dtype="float32"),
        MUON,
        (kozistr("NorMuon", "products in bfloat16")._replace(grouping=use_muon),),
        shapes=("16 x (256 x 256 + 256)", "800 x 25 x 83"),
    ),
}
