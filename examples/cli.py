"""What the example projects share: LightningCLI with callbacks, loggers and a report."""

from __future__ import annotations

import logging
import time
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import CSVLogger, Logger, WandbLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from examples.report import draw_run, publish, show
from lightning_ext.callbacks import EMA, AdaptiveBatchSize, GradientNoiseScale

Wandb = Literal["offline", "online", "off"]


class ProjectCLI(LightningCLI):
    """LightningCLI of a project, with defaults from its ``config.yaml`` and a W&B run.

    Args:
        module: class of the project.
        data: class of the project.
        folder: of the project, with ``config.yaml``.
        args: command line; ``None`` means that of the process.
        run: whether there are subcommands, which run at once.
    """

    def __init__(
        self,
        module: type[LightningModule],
        data: type[LightningDataModule],
        folder: Path,
        args: list[str] | None = None,
        *,
        run: bool = True,
    ) -> None:
        defaults = {"default_config_files": [str(folder / "config.yaml")]}
        self.example = folder.name
        super().__init__(
            module,
            data,
            args=args,
            run=run,
            seed_everything_default=0,
            save_config_kwargs={"overwrite": True},
            parser_kwargs=dict.fromkeys(self.subcommands(), defaults) if run else defaults,
            auto_configure_optimizers=False,
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Adds where runs are logged."""
        project, out = f"lightning_ext-{self.example}", Path("runs") / self.example
        parser.add_argument("--wandb", type=Wandb, default="offline", help="where W&B runs go")
        parser.add_argument("--project", type=str, default=project, help="of W&B")
        parser.add_argument("--group", type=str | None, help="of W&B: runs that belong together")
        parser.add_argument("--name", type=str, default="run", help="of the run and its folder")
        parser.add_argument("--out", type=Path, default=out, help="folder of curves and figures")

    def setting(self, key: str) -> Any:
        """Value of an argument of the subcommand."""
        return self._get(self.config_init, key)

    def wandb_loggers(self) -> list[Logger]:
        """A W&B run where wandb is installed; offline it never asks for an account."""
        mode = self.setting("wandb")
        if mode == "off" or find_spec("wandb") is None or rank_zero_only.rank != 0:
            return []
        import wandb

        self.setting("out").mkdir(parents=True, exist_ok=True)
        run = wandb.init(
            project=self.setting("project"),
            group=self.setting("group"),
            name=self.setting("name"),
            dir=self.setting("out").resolve(),  # the service may be in another folder
            mode=mode,
            settings=wandb.Settings(silent=mode == "offline", console="off"),
        )
        return [WandbLogger(experiment=run)]


class ExampleCLI(ProjectCLI):
    """The command line of a project that trains, by ``fit``, ``validate`` and so on.

    Beside ``--model``, ``--data`` and ``--trainer`` it has ``--batch`` for AdaptiveBatchSize,
    ``--noise`` for GradientNoiseScale and ``--ema`` for EMA, so that a sweep can set
    ``--batch.rule``. Runs are logged to CSV, or what ``--trainer.logger`` says, and to W&B. The
    module has ``evaluate(loader) -> dict[str, float]``, which is reported with the weights as they
    are and with their average.
    """

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Adds the suite's callbacks."""
        super().add_arguments_to_parser(parser)
        parser.add_lightning_class_args(AdaptiveBatchSize, "batch")
        parser.add_lightning_class_args(GradientNoiseScale, "noise")
        parser.add_lightning_class_args(EMA, "ema")

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Makes the Trainer, with a CSV logger unless another is asked for, and W&B's."""
        asked = self.setting("trainer").get("logger")
        if asked is None or asked is True:
            asked = [CSVLogger(self.setting("out"), name=self.setting("name"))]
        loggers = asked if isinstance(asked, list) else [asked] if asked else []
        return super().instantiate_trainer(logger=[*loggers, *self.wandb_loggers()], **kwargs)

    def before_fit(self) -> None:
        """Writes the whole configuration to each logger, and looks at the clock."""
        self._dump_config()
        for logger in self.trainer.loggers:
            logger.log_hyperparams(self.config_dump)
        self.begun = time.perf_counter()

    def after_fit(self) -> None:
        """Prints the row of the run, draws its curves and sends both to W&B."""
        self.row = self._row(time.perf_counter() - self.begun)
        if rank_zero_only.rank != 0:
            return
        show(self.setting("name"), self.row)
        picture = f"{self.example}.png"
        figures = [
            draw_run(Path(logger.log_dir) / "metrics.csv", Path(logger.log_dir) / picture)
            for logger in self.trainer.loggers
            if isinstance(logger, CSVLogger)
        ]
        publish(self.trainer.loggers, self.row, [path for path in figures if path is not None])

    def _row(self, seconds: float) -> dict[str, Any]:
        batch = next(c for c in self.trainer.callbacks if isinstance(c, AdaptiveBatchSize))
        ema = next(c for c in self.trainer.callbacks if isinstance(c, EMA))
        row = {
            "steps": self.trainer.global_step,
            "samples": batch.samples_seen,
            "seconds": seconds,
            "final batch": batch.global_batch,
        }
        with torch.no_grad():
            row |= self.model.evaluate(self.datamodule.val_dataloader())
            with ema.swap(self.model):
                averaged = self.model.evaluate(self.datamodule.val_dataloader())
        return row | {f"{name}, EMA": value for name, value in averaged.items()}


def quiet() -> None:
    """Leaves out Lightning's advice, and takes one thread: these models are small."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", "The '.*dataloader' does not have many workers")
    warnings.filterwarnings("ignore", ".*LeafSpec", FutureWarning)  # Lightning on torch 2.13
    warnings.filterwarnings("ignore", "(?s).*Jsonargparse", DeprecationWarning)
    if not torch.cuda.is_available():
        torch.set_num_threads(1)  # more would only wait for each other
