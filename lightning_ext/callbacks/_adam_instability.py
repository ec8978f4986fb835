"""Watches Adam's update, layer by layer, for the state that comes before a divergence.

Source: Molybog et al. 2023 (arXiv:2304.09871).
Differs: the paper looks at histograms; here four numbers of each layer stand for them, and the
    thresholds are ours.
"""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.optim import Adam, Optimizer

from lightning_ext import _lightning
from lightning_ext._lightning import View, view
from lightning_ext.callbacks._adam_layers import Settings, adam_layers
from lightning_ext.callbacks._arguments import require_bool, require_count, require_number
from lightning_ext.callbacks._reuse import begins_anew
from lightning_ext.optim import LowBitAdamW, base_optimizer
from lightning_ext.scaling import AdamInstability


class AdamInstabilityMonitor(Callback):
    r"""Logs, for the worst layer, how near Adam's update is to divergence.

    Of :math:`u = \hat m / (\sqrt{\hat v} + \epsilon)`, as the optimizer has just used it:
    ``adam_extreme`` (share of entries with :math:`|u| > 0.9`, the largest of the layers),
    ``adam_update_rms`` (:math:`\|u\| / \sqrt n`, the largest), ``adam_alignment`` (cosine of u and
    the gradient, the smallest) and ``adam_eps_ratio`` (:math:`\sqrt{mean\ \hat v} / \epsilon`, the
    smallest). It warns once for each of two signs, with the layer's name: many extreme entries
    while the update has lost the gradient's direction, and a second moment as small as eps.

    Args:
        every_n_steps: Look at every n-th step that the optimizer took.
        max_extreme: Share of extreme entries that is too much.
        min_alignment: Cosine below which the update has lost the gradient's direction.
        min_eps_ratio: Ratio below which eps sets the step.
        warmup_steps: Steps of the optimizer without a warning; at the first, u is a sign.
        per_layer: Also log every value for every layer, as ``adam_extreme/<layer>``.

    Raises:
        ValueError: An argument out of range.
        MisconfigurationException: At the start of fit, if the optimizer is not Adam or AdamW.
    """

    def __init__(
        self,
        every_n_steps: int = 100,
        *,
        max_extreme: float = 0.5,
        min_alignment: float = 0.1,
        min_eps_ratio: float = 1.0,
        warmup_steps: int = 100,
        per_layer: bool = False,
    ) -> None:
        require_count("every_n_steps", every_n_steps)
        require_number("max_extreme", max_extreme, above=0, most=1)
        require_number("min_alignment", min_alignment, least=-1, most=1)
        require_number("min_eps_ratio", min_eps_ratio, least=0)
        require_count("warmup_steps", warmup_steps, least=0)
        require_bool("per_layer", per_layer)
        self.every_n_steps = every_n_steps
        self.max_extreme = max_extreme
        self.min_alignment = min_alignment
        self.min_eps_ratio = min_eps_ratio
        self.warmup_steps = warmup_steps
        self.per_layer = per_layer
        self._key = self._generate_state_key(every_n_steps=every_n_steps, per_layer=per_layer)
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        self._reset()

    def _reset(self) -> None:
        """Forgets everything that a run has brought."""
        self._steps = 0
        self._layers: dict[str, AdamInstability] = {}
        self._warned: list[str] = []
        self._used: list[Settings] = []

    def __getstate__(self) -> dict[str, Any]:
        """Everything but the optimizer's hooks; a fit makes them again."""
        return self.__dict__ | {"_handles": []}

    @property
    def state_key(self) -> str:
        """Tells several of these callbacks in one Trainer apart."""
        return self._key

    def layers(self) -> dict[str, AdamInstability]:
        """Returns the last numbers of every layer by its name."""
        return dict(self._layers)

    def values(self) -> dict[str, float]:
        """Returns what there is to log."""
        if not self._layers:
            return {}
        layers = self._layers.values()
        found = {
            "adam_extreme": max(layer.extreme for layer in layers),
            "adam_update_rms": max(layer.update_rms for layer in layers),
            "adam_alignment": min(layer.alignment for layer in layers),
            "adam_eps_ratio": min(layer.eps_ratio for layer in layers),
        }
        for layer, numbers in self._layers.items() if self.per_layer else ():
            found |= {f"adam_{name}/{layer}": x for name, x in numbers._asdict().items()}
        return found

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forgets what was seen of another module."""
        if stage == "fit" and begins_anew(self, pl_module):
            self._reset()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Checks the optimizer."""
        optimizer = base_optimizer(trainer.optimizers[0])
        if not isinstance(optimizer, (Adam, LowBitAdamW)):
            raise MisconfigurationException(
                "AdamInstabilityMonitor reads the averages of Adam, AdamW and LowBitAdamW, and the"
                f" optimizer is {type(optimizer).__name__}. Hint: leave the callback out."
            )

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Watches the optimizer, behind those that change its settings for a step."""
        if self._handles:
            return
        optimizer, seen = trainer.optimizers[0], view(trainer)

        def look(optimizer: Optimizer, *_: Any) -> None:
            self._look(optimizer, seen)

        self._handles = [
            optimizer.register_step_pre_hook(self._note_settings),
            optimizer.register_step_post_hook(look),
        ]

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Logs the last numbers."""
        if self._layers and _lightning.logs_now(trainer):
            pl_module.log_dict(self.values(), on_step=True, on_epoch=False)

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Stops watching."""
        self._unwatch()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Stops watching."""
        self._unwatch()

    def state_dict(self) -> dict[str, Any]:
        """Counts, what was warned of, and the last numbers."""
        history = torch.tensor(list(self._layers.values()), dtype=torch.float64).reshape(-1, 4)
        names = list(self._layers)
        return {"steps": self._steps, "warned": self._warned, "layers": names, "history": history}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on from them."""
        self._steps, self._warned = state_dict["steps"], list(state_dict["warned"])
        rows = zip(state_dict["layers"], state_dict["history"].tolist(), strict=True)
        self._layers = {layer: AdamInstability(*row) for layer, row in rows}

    def _note_settings(self, optimizer: Optimizer, *_: Any) -> None:
        groups = optimizer.param_groups
        self._used = [
            Settings((float(g["betas"][0]), float(g["betas"][1])), float(g["eps"])) for g in groups
        ]

    def _look(self, optimizer: Optimizer, seen: View) -> None:
        found_inf = getattr(optimizer, "found_inf", None)
        if isinstance(found_inf, Tensor) and bool(found_inf):
            return  # a gradient scaler skips this step
        self._steps += 1
        if self._steps % self.every_n_steps == 0:
            self._layers = adam_layers(optimizer, seen, self._used)
            if self._steps > self.warmup_steps:
                self._warn()

    def _warn(self) -> None:
        for layer, (extreme, rms, alignment, ratio) in self._layers.items():
            if extreme > self.max_extreme and alignment < self.min_alignment:
                self._warn_once(
                    "extreme",
                    f"{extreme:.0%} of the entries of Adam's update of {layer!r} are beyond 0.9"
                    f" (rms {rms:.2f}), and its cosine with the gradient is {alignment:.2f}: the"
                    " state before a divergence. Hint: a lower learning rate, a smaller batch, or"
                    " go back to a checkpoint and skip some batches.",
                )
            if ratio < self.min_eps_ratio:
                self._warn_once(
                    "eps",
                    f"The root of Adam's second moment of {layer!r} is {ratio:.2g} times eps: eps,"
                    " not the gradient, sets the step. Hint: a smaller eps.",
                )

    def _warn_once(self, sign: str, message: str) -> None:
        if sign not in self._warned:
            self._warned.append(sign)
            rank_zero_warn(f"After {self._steps} steps: {message}")

    def _unwatch(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []
