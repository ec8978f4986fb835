"""Callbacks under a pipeline: the numbers of one process, or a reason."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import run_distributed, trainer
from harness.pipeline_parts import (
    COUNT,
    MICRO,
    SAMPLES,
    Chain,
    by_pipeline,
    data,
    distance,
    loaders,
    pipeline_trainer,
    whole,
)
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_ext import callbacks
from lightning_ext._lightning import view

Make = Callable[[], list[Callback]]
HOW: dict[str, tuple[int, dict[str, Any]]] = {
    "breadth-first": (2, {}),
    "interleaved": (2, {"schedule": "interleaved_1f1b"}),
    "fsdp2": (4, {"schedule": "1f1b", "data_parallel_size": 2}),
    "ddp": (4, {"schedule": "gpipe", "data_parallel_size": 2, "data_parallel": "ddp"}),
}
SEEN = (
    *("noise_scale", "grad_sq_norm", "grad_trace", "noise_scale_group_0", "noise_scale_group_1"),
    *("noise_scale_module_net", "weight_distance", "clipped_units", "norm_loss"),
    *("adam_extreme", "adam_update_rms", "adam_alignment", "adam_eps_ratio"),
    *("adam_update_rms/net.1.0", "adam_update_rms/head"),
    *("agvm_multiplier_group_0", "agvm_multiplier_group_1"),
)


class Tied(Chain):
    """Two layers on different ranks have one weight, and one outside is used on both ends."""

    def __init__(self, optimizer: str = "adamw") -> None:
        super().__init__(optimizer)
        layers: Any = self.net
        layers[4][0].weight = layers[0][0].weight
        self.scale = nn.Parameter(torch.tensor(0.9, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        """Scores of three classes; the last rank uses ``first`` and ``scale``, too."""
        inner = self.net(self.first(x) * self.scale)
        return self.head(inner + self.scale * self.first(x))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Two groups, of which one rank has more of the first than of the second."""
        late = [*self.net[3:].parameters(), *self.head.parameters()]
        chosen = {id(p) for p in late}
        early = [p for p in self.parameters() if id(p) not in chosen]
        return torch.optim.AdamW([{"params": early}, {"params": late}], lr=1e-2, weight_decay=0.0)


def in_parts(replicas: int) -> TensorDataset:
    """All samples, those of one micro-batch of one replica beside each other."""
    order = torch.arange(SAMPLES).view(-1, MICRO // replicas, replicas).transpose(1, 2).flatten()
    return TensorDataset(*(x[order] for x in data().tensors))


def measured(by: str, options: dict[str, Any], make: Make, names: tuple[str, ...]) -> Any:
    """Weights, and what was logged in the last step."""
    seen: dict[str, list[float]] = {name: [] for name in names}

    class Recorder(Callback):
        def on_train_batch_end(self, run: Any, *args: Any) -> None:
            if not run.fit_loop._should_accumulate():
                for name, values in seen.items():
                    values.append(float(run.callback_metrics.get(name, torch.nan)))

    own = make()
    noise: Any = own[0]
    extra = {"callbacks": [*own, Recorder()], "log_every_n_steps": 1}
    if by == "pipeline":
        weights = by_pipeline(Tied(), options, 2, **extra).weights
        return weights, seen, noise.estimate(), noise.estimate(1)
    module, replicas = Tied(), options.get("data_parallel_size", 1)
    run = trainer(max_epochs=2, accumulate_grad_batches=2 * COUNT * replicas, **extra)
    run.fit(module, DataLoader(in_parts(replicas), MICRO // replicas))
    return whole(module), seen, noise.estimate(), noise.estimate(1)


def everything() -> list[Callback]:
    """Those that watch or change the gradient of a whole step."""
    return [
        callbacks.GradientNoiseScale(1, geometry="euclidean", per_group=True, per_module=["net"]),
        callbacks.WeightDistance(1),
        callbacks.AdaptiveGradientClipping(0.05),
        callbacks.NormLoss(0.01, exclude=["net.3.*"]),
        callbacks.AdamInstabilityMonitor(every_n_steps=1, per_layer=True),
        callbacks.AGVM(every_n_steps=1, warmup_steps=0),
    ]


@pytest.mark.parametrize(
    "how", [pytest.param(x, marks=[pytest.mark.slow] * (x == "ddp")) for x in HOW]
)
def test_every_number_is_that_of_one_process(how: str) -> None:
    ranks, options = HOW[how]
    weights, expected, *noise = measured("one", options, everything, SEEN)
    for own, seen, *estimates in run_distributed(
        measured, ranks, args=("pipeline", options, everything, SEEN), timeout=120
    ):
        assert distance(own, weights) < 1e-11
        for found, estimate in zip(estimates, noise, strict=True):
            assert found.grad_sq_norm == pytest.approx(estimate.grad_sq_norm, rel=1e-10)
            assert found.grad_trace == pytest.approx(estimate.grad_trace, rel=1e-10)
        for name in SEEN:
            torch.testing.assert_close(
                torch.tensor(seen[name][1:]), torch.tensor(expected[name][1:]), rtol=1e-6, atol=1e-9
            )


def averaged(folder: str, by: str, options: dict[str, Any], path: str | None) -> Any:
    """Weights, the loss of validation on the average, and the average of a fit with checkpoints."""

    class Saves(Callback):
        def on_validation_epoch_end(self, run: Any, *args: Any) -> None:
            run.save_checkpoint(Path(folder) / "validating.ckpt")

    average = callbacks.EMA(0.8)
    saver = ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
    extra = {"callbacks": [average, Saves(), saver], "enable_checkpointing": True}
    replicas = options.get("data_parallel_size", 1)
    if by == "pipeline":
        run, (train, val) = (
            pipeline_trainer(options, accumulate_grad_batches=1, **extra),
            loaders(replicas),
        )
    else:
        run = trainer(max_epochs=2, accumulate_grad_batches=COUNT * replicas, **extra)
        train = DataLoader(in_parts(replicas), MICRO // replicas)
        val = DataLoader(data(), MICRO * COUNT)
    module = Tied()
    run.fit(module, train, val, ckpt_path=path)
    average.export(str(Path(folder) / "average.ckpt"))
    with average.swap(module):
        swapped = whole(module)
    return whole(module), swapped, float(run.callback_metrics["val_loss"])


@pytest.mark.parametrize("how", ["breadth-first", "fsdp2"])
def test_the_average_is_that_of_one_process_in_the_run_and_in_files(
    how: str, tmp_path: Path
) -> None:
    ranks, options = HOW[how]
    one, many = tmp_path / "one", tmp_path / "many"
    weights, swapped, loss = averaged(str(one), "one", options, None)
    for own, average, validated in run_distributed(
        averaged, ranks, args=(str(many), "pipeline", options, None), timeout=120
    ):
        assert distance(own, weights) < 1e-12
        assert distance(average, swapped) < 1e-12
        assert validated == pytest.approx(loss, abs=1e-6)
    for name in ("epoch=0.ckpt", "epoch=1.ckpt", "validating.ckpt", "average.ckpt"):
        expected, found = (torch.load(x / name, weights_only=True) for x in (one, many))
        assert found["state_dict"].keys() == expected["state_dict"].keys()
        assert distance(found["state_dict"], expected["state_dict"]) < 1e-12
    (expected_average,) = expected_values(one)
    (found_average,) = expected_values(many)
    assert found_average.keys() == expected_average.keys()
    assert distance(found_average, expected_average) < 1e-12


def expected_values(folder: Path) -> list[Mapping[str, Tensor]]:
    """The averages of the first epoch's checkpoint."""
    saved = torch.load(folder / "epoch=0.ckpt", weights_only=True)
    return list(saved["lightning_ext.ema"].values())


def test_a_run_with_an_average_goes_on_from_a_checkpoint_of_one_process(tmp_path: Path) -> None:
    options = HOW["breadth-first"][1]
    weights, swapped, loss = averaged(str(tmp_path / "one"), "one", options, None)
    path = str(tmp_path / "one" / "epoch=0.ckpt")
    args = str(tmp_path / "one"), "pipeline", options, path
    for own, average, validated in run_distributed(averaged, args=args, timeout=120):
        assert distance(own, weights) < 1e-12
        assert distance(average, swapped) < 1e-12
        assert validated == pytest.approx(loss, abs=1e-6)


REFUSED: dict[str, tuple[Make, str]] = {
    "sharpness": (lambda: [callbacks.SharpnessAware()], "twice"),
    "finder": (lambda: [callbacks.MicroBatchFinder()], "whole parameters"),
    "branches": (lambda: [callbacks.CriticalBatchSize(every_samples=64)], "whole parameters"),
    "curvature": (lambda: [callbacks.Curvature(every_n_steps=2)], "whole parameters"),
    "local": (lambda: [callbacks.LocalGradients()], "DDP alone"),
    "samples": (lambda: [callbacks.GradientNoiseScale(1, source="per_sample")], "whole ones"),
    "tests": (lambda: [callbacks.GradientNoiseScale(1, tests="gradient_snr")], "whole gradients"),
    "geometry": (lambda: [callbacks.GradientNoiseScale(1, geometry="l1")], "whole gradients"),
    "modules": (lambda: [callbacks.GradientNoiseScale(1, per_module=True)], "Allowed are names"),
}


def errors() -> list[str]:
    """What fits with callbacks say on this rank."""
    made = [make() for make, _ in REFUSED.values()]
    return [error(partial(by_pipeline, Chain("sgd"), {}, callbacks=one)) for one in made]


def error(run: Callable[[], object]) -> str:
    """The text of a refusal."""
    with pytest.raises(MisconfigurationException) as caught:
        run()
    return str(caught.value)


def test_what_does_passes_of_its_own_or_needs_whole_gradients_is_refused_on_all_ranks() -> None:
    for texts in run_distributed(errors, timeout=120):
        for text, (_, reason) in zip(texts, REFUSED.values(), strict=True):
            assert reason in text


def traffic() -> list[Any]:
    """Bytes of a measured step on this rank."""
    volume = callbacks.CommunicationVolume(every_n_steps=1, per_collective=True)
    by_pipeline(Chain("sgd"), {}, callbacks=[volume])
    assert volume.last is not None
    return [volume.last.by("kind")["send"].total_bytes, volume.last.total.total_bytes]


def test_traffic_between_stages_is_counted() -> None:
    # Of 4 stages on 2 ranks, each batch crosses from rank 0 twice and from rank 1 once, and back.
    activations = MICRO * COUNT * 10 * 8
    for sent, total in run_distributed(traffic, timeout=60):
        assert sent == 3 * activations
        assert total > sent


def norms() -> list[float]:
    """Squares of all parameters by the view on this rank, and of those of replicas gathered."""
    module, found = Tied(), []

    class Look(Callback):
        def on_train_start(self, run: Any, *args: Any) -> None:
            seen = view(run)
            own = [p for _, p in seen.local_parameters()]
            ranks = seen.gather(torch.tensor([seen.data_parallel_rank]))
            found.extend([float(seen.sq_norm(own)), *ranks.flatten().tolist(), seen.accumulate])

    by_pipeline(module, HOW["fsdp2"][1], 2, callbacks=[Look()], max_steps=1)
    return found


def test_a_norm_counts_each_parameter_once() -> None:
    expected = float(sum(p.detach().square().sum() for p in Tied().parameters()))
    for square, *rest in run_distributed(norms, 4, timeout=60):
        assert square == pytest.approx(expected, rel=1e-12)
        assert rest == [0, 1, 2 * COUNT]
