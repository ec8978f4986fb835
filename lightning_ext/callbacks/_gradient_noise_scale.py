"""Measures the gradient noise scale from the parts that a global batch has anyway.

Source: McCandlish et al. 2018, arXiv:1812.06162, section 2.2 and appendix A.1; what the tests of
    Bollapragada et al. 2018 (arXiv:1710.11258) and Lau et al. 2024 (arXiv:2402.11215) need.
Differs: every micro-batch of every rank, or every sample, is a part, parts may differ in size,
    averages are taken before the ratio, and the estimate has a confidence interval.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any, Literal

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from lightning_ext import _lightning, scaling
from lightning_ext.callbacks._arguments import require_choice
from lightning_ext.callbacks._logging import log_step
from lightning_ext.callbacks._noise._history import NoiseHistory
from lightning_ext.callbacks._noise._measurement import Parts
from lightning_ext.callbacks._noise._settings import (
    TESTS,
    AskedGeometry,
    AskedSource,
    NoiseSettings,
    check_run,
    names_of,
    what_identifies,
)
from lightning_ext.callbacks._noise._sharded_parts import ShardedParts
from lightning_ext.callbacks._noise._windows import Lasting, Windows
from lightning_ext.callbacks._reuse import begins_anew


class GradientNoiseScale(Callback):
    r"""Estimates :math:`B_{noise} = tr(\Sigma) / |G|^2` while training runs.

    The gradients of the micro-batches that are accumulated, and of the data-parallel ranks, are
    parts of the global batch; their squared norms and that of the whole give :math:`|G|^2` and
    :math:`tr(\Sigma)` without bias. Gradients are taken as they are before clipping, freed of the
    gradient scaler's and the accumulation's factors. For optimizers that do not step along the
    gradient, ``geometry`` takes the norm that belongs to them in both places.

    At the steps that the Trainer logs, it logs ``noise_scale``, ``noise_scale_low``,
    ``noise_scale_high``, ``grad_sq_norm``, ``grad_trace``, ``steps_over_min`` and
    ``samples_over_min``: what training at the present batch costs, in steps and in samples,
    relative to the least possible. In another geometry also ``noise_scale_euclidean``, and for
    norms ``grad_norm_low`` and ``grad_norm_high``, between which the gradient's is on average.

    Args:
        every_n_steps: Measure every n-th optimizer step; ``None`` goes by what it costs: 4 for
            micro-batches and norm layers, 20 for single samples and in the geometries ``"l1"`` and
            ``"adam"``, 100 for ``"nuclear"``.
        smoothing: Weight of a measurement relative to the next one, in (0, 1]; 1 weighs all alike.
        source: ``"micro_batches"`` of every rank; ``"norm_layers"``, what these see of single
            samples, times a factor learnt from ``"per_sample"``; ``"per_sample"``, for which
            ``training_step`` runs again, mapped over samples; ``"consecutive_steps"``, biased by
            the motion of the weights. ``"auto"`` takes the first that is there, and says so.
        geometry: ``"euclidean"``; ``"l1"`` for optimizers that step by the sign or nearly so;
            ``"nuclear"`` for those that orthogonalize matrices; ``"adam"``, squares of what Adam
            makes of the gradient. ``"auto"`` goes by the optimizer.
        per_group: Also log every value for each parameter group of the optimizer, as
            ``noise_scale_group_0`` and so on.
        per_module: Also log every value for each of these submodules, by name, as
            ``noise_scale_module_encoder``; ``True``: the first below the module that are several.
        prefix: What logged names begin with, to tell several of these callbacks apart.
        tests: What is measured beside: ``"inner_products"`` (micro-batches: the gradients of all
            parts are kept until the step), ``"coordinates"`` and ``"gradient_snr"`` (one copy of
            the parameters, and under several ranks its reduction), on measured steps only.
        chunk_size: Samples whose gradients are in memory together, ``None`` means those of a
            micro-batch; 1 takes one after another without ``torch.vmap``. For single samples.
        norm_factor: What the :attr:`norm_factor` of another run has learnt about the norm layers
            of the same network; then nothing is measured in full.

    Raises:
        ValueError: An argument out of range.
        MisconfigurationException: Arguments that do not fit together; at the start of fit, if the
            source has nothing to measure, or under manual optimization; at the first step that is
            measured sample by sample, if batch normalization or the loss couples samples.
    """

    def __init__(
        self,
        every_n_steps: int | None = None,
        smoothing: float = 0.99,
        *,
        source: AskedSource = "auto",
        geometry: AskedGeometry = "auto",
        per_group: bool = False,
        per_module: bool | Sequence[str] = False,
        prefix: str = "",
        tests: Iterable[str] = (),
        chunk_size: int | None = None,
        norm_factor: Mapping[str, Any] | None = None,
    ) -> None:
        names = names_of(per_module)
        self.settings = NoiseSettings(
            every_n_steps, smoothing, source, geometry, per_group, names, prefix, chunk_size
        )
        self.tests: tuple[str, ...] = ()
        self.add_tests(tests)
        self._key = self._generate_state_key(**what_identifies(self.settings))
        self.measured = False
        self._history = NoiseHistory(smoothing)
        self._lasting = Lasting(norm_factor)
        self._count = 0  # of windows
        self._parts: Parts | None = None
        self._ratios: dict[Parameter, Tensor] | None = None
        self._windows: Windows | None = None

    @property
    def state_key(self) -> str:
        """Tells several of these callbacks in one Trainer apart."""
        return self._key

    def add_tests(self, tests: Iterable[str]) -> None:
        """Has more measured, from the next window on.

        Args:
            tests: As the argument of the same name.

        Raises:
            ValueError: An unknown one.
        """
        wanted = [tests] if isinstance(tests, str) else list(tests)
        for name in wanted:
            require_choice("tests", name, TESTS)
        self.tests = tuple(name for name in TESTS if name in {*self.tests, *wanted})

    def estimate(
        self,
        group: int | None = None,
        *,
        module: str | None = None,
        geometry: Literal["euclidean"] | None = None,
    ) -> scaling.NoiseScale:
        """Returns the present estimate, of all parameters or of a subset.

        In the geometries ``"l1"`` and ``"nuclear"`` its ``grad_sq_norm`` and ``grad_trace`` are the
        squares of the norms of gradient and noise.

        Args:
            group: A parameter group of the optimizer (needs ``per_group=True``).
            module: The name of a submodule (one of ``per_module``).
            geometry: ``"euclidean"``, which is always measured; ``None`` means that of the
                callback.

        Raises:
            ValueError: Nothing was measured yet, or no such subset.
        """
        return self._history.estimate(self._history.find(group, module), geometry)

    @property
    def used(self) -> tuple[str, str] | None:
        """Source and geometry of the present or last fit, after ``"auto"`` was decided."""
        choice = self._lasting.choice
        return None if choice is None else (choice.source, choice.geometry)

    @property
    def norm_factor(self) -> dict[str, Any]:
        """What ``"norm_layers"`` has learnt, for the argument of another run's callback."""
        return self._lasting.factor.state_dict()

    def inner_products(self) -> scaling.InnerProducts | None:
        """Returns averages of what inner-product tests need, with the weights of ``smoothing``.

        ``None`` if nothing was measured yet, or ``"inner_products"`` is not among ``tests``.
        """
        return self._history.inner_products() if "inner_products" in self.tests else None

    def coordinates(self) -> dict[float, float] | None:
        """Returns var_c/ḡ_c² of the last measurement by fraction of the coordinates c.

        That fraction of the coordinates is at most there; those whose gradient was 0 in every part
        do not count. ``None`` if nothing was measured yet, or ``"coordinates"`` is not among
        ``tests``.
        """
        found = self._history.coordinates if "coordinates" in self.tests else None
        return None if found is None else dict(found)

    def gradient_snr(self) -> dict[Parameter, Tensor] | None:
        """Returns ḡ_c²/σ_c² of every coordinate c over the parts of the running step.

        For optimizers, from ``on_before_optimizer_step`` on, by parameter, as
        ``functional.gradient_snr`` gives it; ``None`` if the step was not measured, or
        ``"gradient_snr"`` is not among ``tests``.
        """
        return self._ratios

    def skip_window(self) -> None:
        """Leaves the running optimizer step out, as if it were not one to be measured."""
        self.measured = False
        self._ratios = None
        if self._parts is not None:
            self._parts.detach()
        self._parts = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forgets what was measured on another module; a checkpoint is loaded after this."""
        if stage == "fit":
            self._lasting.choice = None
        if stage == "fit" and begins_anew(self, pl_module):
            self._history.clear()
            self._lasting.clear()
            self._count = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Checks that there will be something to measure, the same on every rank."""
        settings = {**asdict(self.settings), "tests": self.tests}
        _lightning.require_agreement(trainer, "GradientNoiseScale", settings)
        check_run(trainer, pl_module)
        self._windows = Windows(trainer, pl_module, self.settings, self.tests, self._lasting)
        self._history.follow(self._windows)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Begins a window, every n-th of them to be measured."""
        if batch_idx % trainer.accumulate_grad_batches == 0:
            self._begin_window()
        if self._parts is None:
            return
        share = _lightning.batch_share(trainer, batch, batch_idx)
        if share.whole:
            self._parts.begin(_lightning.view(trainer), batch, batch_idx, share)
        else:  # other ranks × accumulation would cut it into other parts
            self.skip_window()

    def on_before_backward(
        self, trainer: Trainer, pl_module: LightningModule, loss: Tensor
    ) -> None:
        """Watches what FSDP2 has gathered."""
        if isinstance(self._parts, ShardedParts):
            self._parts.look()

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Closes one part."""
        if self._parts is not None:
            self._parts.end()

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        """Measures, on the gradient of the whole."""
        if _lightning.runs_in_parts(trainer):
            self.skip_window()
        parts, self._parts = self._parts, None
        if parts is None:
            return
        parts.detach()
        found = self._windows.measure(parts, optimizer) if self._windows else None
        if found is not None and self._windows is not None:
            self.measured = self._history.add(found, self._windows.subsets)
            self._ratios = found.snr.ratios if found.snr else None

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Logs the present estimate."""
        if len(self._history) and _lightning.logs_now(trainer):
            values = self._history.values(self.settings.prefix, self.tests)
            log_step(pl_module, values, bar=f"{self.settings.prefix}noise_scale")

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Lets go of the module."""
        self._release()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Lets go of the module."""
        self._release()

    def state_dict(self) -> dict[str, Any]:
        """The measurements that still count."""
        state = {**self._history.state_dict(), "windows": self._count}
        return state | self._lasting.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on from the measurements of the checkpoint."""
        self._history.load_state_dict(state_dict)
        self._lasting.load_state_dict(state_dict)
        self._count = state_dict["windows"]

    def _begin_window(self) -> None:
        self.skip_window()
        if self._windows is None:
            return
        self._windows.update(self.tests)
        self._history.follow(self._windows)
        self._parts = self._windows.parts(self._count, self.tests)
        self._count += 1

    def _release(self) -> None:
        self.skip_window()
        self._windows = None
