"""The critical batch of the language model, by sweep, noise scales and branches, on one figure."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.loggers import WandbLogger

from examples.cli import ProjectCLI, quiet
from examples.critical_batch import tables
from examples.critical_batch.data import SharedText
from examples.critical_batch.figure import draw
from examples.critical_batch.measure import Point, branched, noise_scales
from examples.critical_batch.module import FreshGPT
from examples.critical_batch.sweep import Setting, sweep
from lightning_ext.scaling import (
    StepsToTarget,
    SweepRow,
    best_of_sweep,
    fit_critical_batch,
)

BRANCHES = (1, 2, 4, 8, 16)
SHARED = ("accelerator", "precision")  # of the Trainers of all parts


@dataclass
class Study:
    """What is asked of the study.

    Args:
        batches: Global batches of the sweep, in windows.
        target: Validation loss that ends a run, in nats per byte.
        lr: Learning rate at 16 windows a step; by the square-root rule at other batches.
        max_samples: Windows of a run at most.
        evaluate_every_samples: Windows between evaluations.
        noise_batch: Global batch of the run that measures noise scales, in 8 micro-batches.
        branch_batch: Global batch of the run that is branched, the least of its branches.
        branch_samples: Windows of each branch.
        parts: ``"noise"`` and ``"branches"`` need a sweep of at least four batches.
    """

    batches: tuple[int, ...] = (2, 4, 8, 16, 32, 64, 128)
    target: float = 2.5
    lr: float = 7e-4
    max_samples: int = 60_000
    evaluate_every_samples: int = 512
    noise_batch: int = 64
    branch_batch: int = 2
    branch_samples: int = 2048
    parts: tuple[Literal["sweep", "noise", "branches"], ...] = ("sweep", "noise", "branches")


class StudyCLI(ProjectCLI):
    """The command line of the study: ``--study``, ``--model``, ``--data`` and ``--trainer``."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Adds the study; the model's context is that of the windows."""
        super().add_arguments_to_parser(parser)
        parser.add_class_arguments(Study, "study")
        parser.link_arguments("data.context", "model.context")

    def run(self) -> None:
        """Sweep, fit, measure, draw; a sweep that was broken off goes on."""
        study, out = self.setting("study"), self.setting("out")
        trainer = {key: self.setting("trainer")[key] for key in SHARED}
        seed = self.setting("seed_everything")
        setting = Setting(self.model, self.datamodule, study.lr, seed, trainer)
        rows = sweep(
            setting,
            study.batches,
            target=study.target,
            max_samples=study.max_samples,
            evaluate_every_samples=study.evaluate_every_samples,
            results=out / "sweep.csv",
        )
        table = best_of_sweep(rows)
        tables.report_sweep(table)
        loggers = self.wandb_loggers()
        self._dump_config()
        for logger in loggers:
            logger.log_hyperparams(self.config_dump)
            logger.log_table("sweep", columns=list(SweepRow._fields), data=[list(r) for r in rows])
            for entry in table:
                logger.log_metrics({"global_batch": entry.global_batch, "steps": entry.steps})
        if {"noise", "branches"} & set(study.parts):
            self.compare(setting, rows, table, loggers)
        for logger in loggers:
            logger.experiment.finish()

    def compare(
        self,
        setting: Setting,
        rows: list[SweepRow],
        table: list[StepsToTarget],
        loggers: list[WandbLogger],
    ) -> None:
        """Measures runs, and lays what they say beside the sweep."""
        study, out = self.setting("study"), self.setting("out")
        fit = fit_critical_batch(table)
        points = measure(setting, study, table, out / "run.csv")
        knees = tables.foretold(points, study.noise_batch)
        found = tables.lines(fit, points, knees)
        tables.report(fit, found)
        draw(out / "critical_batch.png", rows, table, fit, points, knees)
        print(f"figure: {out / 'critical_batch.png'}")
        for logger in loggers:
            logger.experiment.summary.update({e.definition: e.value for e in fit.estimates} | knees)
            logger.log_table(
                "critical_batch", columns=list(tables.COLUMNS), data=[*map(list, found)]
            )
            logger.log_image("critical_batch", [str(out / "critical_batch.png")])


def measure(setting: Setting, study: Study, table: list[StepsToTarget], path: Path) -> list[Point]:
    """Measures one run at the batch for noise scales, and one at that for branches."""
    every, points = study.evaluate_every_samples, []
    if "noise" in study.parts:
        limits = {"target": study.target, "most": study.max_samples}
        points += noise_scales(setting, study.noise_batch, every=every, **limits)
        tables.save(points, path)
    if "branches" in study.parts:
        batch, fewest = study.branch_batch, min(e.steps * e.global_batch for e in table)
        at = [int(fewest * k / tables.ROUNDS) // batch * batch for k in range(tables.ROUNDS)]
        samples = study.branch_samples
        points += branched(setting, batch, BRANCHES, samples=samples, at=at, every=every)
        tables.save(points, path)
    return points


def main(args: list[str] | None = None) -> None:
    """Run the command line."""
    quiet()
    cli = StudyCLI(FreshGPT, SharedText, Path(__file__).parent, args, run=False)
    cli.run()


if __name__ == "__main__":
    main()
