"""Optimizers for small memory that `benchmarks/low_bit.py` times, and who else has them."""

from __future__ import annotations

from importlib import import_module
from typing import Any, NamedTuple

from torch.nn import Parameter
from torch.optim import Optimizer

from benchmarks._optimizer_peers import ANCHOR, NOTHING, OURS

Settings = dict[str, Any]

BACKEND = "lightning_ext by bitsandbytes"
CYCLE = 20  # steps after which a subspace is looked for again
ADAMW: Settings = {"lr": 1e-3, "weight_decay": 0.01, "betas": (0.9, 0.999), "eps": 1e-8}
CAME: Settings = {"lr": 1e-3, "weight_decay": 0.01}
ADAM: Settings = {"lr": 1e-3, "eps": 1e-6}
SUBSPACE: Settings = {"rank": 64, "update_proj_gap": CYCLE, "scale": 0.25}


class Variant(NamedTuple):
    """An optimizer of some package.

    Attributes:
        path: module and class.
        settings: of it.
        package: that has to be there.
        differs: in what its steps are not ours, so that they are not compared.
        of_matrices: settings of their groups alone.
    """

    path: str
    settings: Settings
    package: str = "torch"
    differs: str = ""
    of_matrices: Settings = NOTHING

    def __call__(self, params: list[Parameter], **settings: Any) -> Optimizer:
        """Make it, of parameters."""
        module, _, name = self.path.rpartition(".")
        kind = getattr(import_module(module), name)
        made: Optimizer = kind(self.groups(params), **self.settings | settings)
        return made

    def groups(self, params: list[Parameter]) -> Any:
        """Parameters, or the matrices and the rest where a peer wants them apart."""
        if not self.of_matrices:
            return params
        matrices = {"params": [p for p in params if p.dim() > 1], **self.of_matrices}
        others = {"params": [p for p in params if p.dim() < 2]}
        return [group for group in (matrices, others) if group["params"]]


class Thing(NamedTuple):
    """An optimizer of ours and its peers.

    Attributes:
        variants: by name, ours first.
        truth: whose steps theirs are to be, in float64.
        tolerance: of the distance from it, as a share of its way.
        steps: in a row, that are timed as one.
        shapes: where they are timed; all by default.
    """

    variants: dict[str, Variant]
    truth: Variant
    tolerance: float
    steps: int = 1
    shapes: tuple[str, ...] | None = None


def own(format: str, **settings: Any) -> Variant:
    """Our AdamW with states in a format."""
    return Variant("lightning_ext.optim.LowBitAdamW", ADAMW | {"state_dtype": format} | settings)


def torchao(name: str) -> Variant:
    """An AdamW of torchao."""
    return Variant(f"torchao.optim.{name}", ADAMW, "torchao")


def low_rank(name: str, **settings: Any) -> Variant:
    """One of ours."""
    matrices = SUBSPACE | {"algorithm": "low_rank"}
    return Variant(f"lightning_ext.optim.{name}", ADAM | settings, of_matrices=matrices)


def kozistr(name: str, differs: str, projection: str = "", **settings: Any) -> Variant:
    """One of pytorch_optimizer; of low rank where it has a projection."""
    of_matrices = SUBSPACE | {"projection_type": projection} if projection else NOTHING
    return Variant(f"pytorch_optimizer.{name}", settings, "pytorch_optimizer", differs, of_matrices)


TRUTH = Variant("torch.optim.AdamW", ADAMW | {"foreach": False})
FUSED = Variant("torch.optim.AdamW", ADAMW | {"fused": True})
BITSANDBYTES = Variant("bitsandbytes.optim.AdamW8bit", ADAMW, "bitsandbytes")
BY_BITSANDBYTES = own("int8", backend="bitsandbytes")._replace(package="bitsandbytes")
OUR_CAME = Variant("lightning_ext.optim.CAME", CAME)
EXACT: Settings = {"subspace": "svd", "spread_refresh": False}
SMALL = ("16 x (256 x 256 + 256)",)


def of_rank(name: str, peer: Variant, exact: Settings, **settings: Any) -> Thing:
    """An optimizer of low rank; its truth looks for subspaces exactly, all at once."""
    ours = low_rank(name, **settings)
    truth = low_rank(name, **settings, **exact)
    variants = {OURS: ours, peer.package: peer, ANCHOR: FUSED}
    if exact:
        variants[OURS] = ours._replace(differs="subspaces by a random sketch, in turn")
        variants[f"{OURS}, svd"] = truth
    truth = truth._replace(settings=truth.settings | {"foreach": False})
    return Thing(variants, truth, 0.02, CYCLE, SMALL)


THINGS: dict[str, Thing] = {
    "AdamW float32": Thing({OURS: own("float32"), ANCHOR: FUSED}, TRUTH, 1e-3),
    "AdamW bfloat16": Thing({OURS: own("bfloat16"), ANCHOR: FUSED}, TRUTH, 0.02),
    "AdamW int8": Thing(
        {
            OURS: own("int8"),
            BACKEND: BY_BITSANDBYTES,
            "bitsandbytes": BITSANDBYTES,
            "torchao": torchao("AdamW8bit"),
            ANCHOR: FUSED,
        },
        TRUTH,
        0.05,
    ),
    "AdamW int4": Thing(
        {OURS: own("int4"), "torchao": torchao("AdamW4bit"), ANCHOR: FUSED}, TRUTH, 0.6
    ),
    "AdamW fp8": Thing(
        {OURS: own("fp8"), "torchao": torchao("AdamWFp8"), ANCHOR: FUSED}, TRUTH, 0.1
    ),
    "CAME": Thing(
        {
            OURS: OUR_CAME,
            f"{OURS}, int8": OUR_CAME._replace(settings=CAME | {"state_dtype": "int8"}),
            "pytorch_optimizer": kozistr("CAME", "", **CAME),
            ANCHOR: FUSED,
        },
        OUR_CAME._replace(settings=CAME | {"foreach": False}),
        0.03,
    ),
    "GaLore": of_rank("GaLore", kozistr("GaLore", "", "std", **ADAM), EXACT),
    "Fira": of_rank("Fira", kozistr("Fira", "", "std", **ADAM), EXACT, alpha_in_residual=True),
    "APOLLO": of_rank(
        "APOLLO",
        kozistr("APOLLO", "another random projection", "random", scale_type="channel", **ADAM),
        NOTHING,
    ),
}
