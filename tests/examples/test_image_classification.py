"""Image classification: network, module, command lines and study."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from torch import nn

from examples.image_classification import study
from examples.image_classification.main import main
from examples.image_classification.module import ImageClassifier
from examples.image_classification.network import ResNet

ROOT = Path(__file__).parent.parent.parent
FOLDER = ROOT / "examples" / "image_classification"
RECIPES = sorted((FOLDER / "recipes").glob("*.yaml"))
WHOLE = [*RECIPES, FOLDER / "config.yaml", FOLDER / "cifar10.yaml", FOLDER / "imagenet.yaml"]
QUIET = ["--trainer.enable_progress_bar=false", "--trainer.enable_checkpointing=false"]
OFF = [*QUIET, "--wandb=off"]
SHORT = ["--batch.max_samples=256", "--model.schedule.init_args.total_samples=256"]
SHORT += ["--model.schedule.init_args.warmup_samples=64", "--trainer.limit_val_batches=0"]


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No account, no options of pytest, and nothing written elsewhere."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["main.py"])
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    for name in [name for name in os.environ if name.startswith("WANDB")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("COLUMNS", "200")  # wide enough for the table of a run


def fit(*options: str, recipe: str = "linear") -> Any:
    config = FOLDER / "recipes" / f"{recipe}.yaml"
    return main(["fit", f"--config={config}", "--out=runs", *SHORT, *options])


def steps(name: str = "run", version: int = 0) -> list[dict[str, float]]:
    """The optimizer steps in a run's CSV file."""
    with (Path("runs") / name / f"version_{version}" / "metrics.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["samples_seen"]]
    return [{key: float(value) for key, value in row.items() if value} for row in rows]


def test_resnet_18_has_the_parameters_of_the_paper() -> None:
    net = ResNet(channels=3, classes=1000, width=64, depth=(2, 2, 2, 2), stem="large")
    assert sum(p.numel() for p in net.parameters()) == 11_689_512
    assert net(torch.zeros(1, 3, 64, 64)).shape == (1, 1000)


def test_a_group_norm_sees_one_image_and_a_batch_norm_all() -> None:
    images = torch.randn(4, 1, 8, 8)
    for norm, same in (("group", True), ("batch", False)):
        torch.manual_seed(0)
        net = ResNet(norm=norm, zero_init=False)
        assert torch.allclose(net(images)[:2], net(images[:2]), atol=1e-5) is same


def test_residual_branches_begin_at_nothing() -> None:
    net = ResNet(width=8, depth=(1,))
    x = torch.rand(2, 8, 4, 4)
    assert torch.equal(net.stages(x), x)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"depth": ()}, "there must be a stage"),
        ({"width": 0}, "width=0"),
        ({"norm": "layer"}, "choose one of group, batch"),
        ({"stem": "tiny"}, "choose one of small, large"),
    ],
)
def test_a_wrong_size_of_the_network_is_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ResNet(**wrong)


def test_norms_and_biases_have_neither_decay_nor_ratio() -> None:
    cli = fit("--wandb=off", *QUIET, "--batch.max_samples=64", recipe="lars")
    matrices, others = cli.trainer.optimizers[0].param_groups
    assert (matrices["weight_decay"], matrices["trust_ratio"]) == (1e-4, True)
    assert (others["weight_decay"], others["trust_ratio"]) == (0.0, False)
    assert all(name.endswith("weight") for name in matrices["param_names"])
    assert {"network.head.bias", "network.stem.1.weight"} <= set(others["param_names"])


def test_evaluation_is_over_all_images_and_leaves_the_mode() -> None:
    class Known(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            assert not self.training
            return x.flatten(1)

    module = ImageClassifier(Known(), torch.optim.SGD)
    images = torch.eye(3).view(3, 3, 1, 1) * 50
    loader = [[images[:2], torch.tensor([0, 1])], [images[2:], torch.tensor([0])]]
    found = module.evaluate(loader)
    assert found == pytest.approx({"accuracy": 2 / 3, "validation loss": 50 / 3})
    assert module.training


def test_label_smoothing_is_of_training_alone() -> None:
    module = ImageClassifier(nn.Flatten(), torch.optim.SGD, label_smoothing=0.2)
    batch = [torch.eye(3).view(3, 3, 1, 1) * 50, torch.arange(3)]
    module.log = lambda *_, **__: None  # type: ignore[method-assign]
    assert module.training_step(batch, 0).item() == pytest.approx(0.2 * 50 * 2 / 3)
    assert module.evaluate([batch])["validation loss"] == pytest.approx(0, abs=1e-12)
    with pytest.raises(ValueError, match=r"label_smoothing=1.0; it must be in \[0, 1\)"):
        ImageClassifier(nn.Flatten(), torch.optim.SGD, label_smoothing=1.0)


@pytest.mark.parametrize("config", WHOLE, ids=lambda path: path.stem)
def test_each_config_parses_and_prints_what_parses_again(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    printed = []
    for path in (config, Path("printed.yaml")):
        with pytest.raises(SystemExit) as ended:
            main(["fit", f"--config={path}", "--print_config"])
        assert ended.value.code == 0
        printed.append(capsys.readouterr().out)
        Path("printed.yaml").write_text(printed[-1])
    assert printed[0] == printed[1]
    whole = yaml.safe_load(printed[0])
    schedule = whole["model"]["schedule"]["init_args"]
    assert schedule["total_samples"] == whole["batch"]["max_samples"]
    if config in RECIPES:
        assert whole["batch"]["reference_batch"] == 64


def test_a_fit_leaves_curves_a_figure_and_a_run_of_wandb() -> None:
    cli = fit(*QUIET, "--batch.rule=0:128", "--group=one")
    assert [x["global_batch"] for x in steps()] == [128, 128]
    assert cli.row["samples"] == 256
    assert {"accuracy", "accuracy, EMA", "validation loss", "seconds"} <= cli.row.keys()
    # Twice the batch is twice the rate, which begins at 0.03 of it.
    rates = [step["lr_scaled"] for step in steps()]
    assert rates[0] == pytest.approx(2 * 0.02 * 0.03)
    assert (Path("runs/run/version_0/image_classification.png")).read_bytes().startswith(b"\x89PNG")
    offline = list(Path("runs/wandb").glob("offline-run-*/run-*.wandb"))
    assert len(offline) == (1 if find_spec("wandb") else 0)


def test_the_adaptive_recipe_measures_and_grows() -> None:
    fit(*OFF, "--batch.max_samples=1536", "--batch.dwell_samples=64", recipe="adaptive")
    taken = steps()
    assert taken[0]["global_batch"] == 64
    assert all("noise_scale" in step for step in taken[1:])
    assert taken[-1]["samples_seen"] >= 1536


def test_clipping_counts_units() -> None:
    fit(*OFF, recipe="clipping")
    assert all(0 <= step["clipped_units"] <= 1 for step in steps())


# A resumed run has a folder of its own, and Lightning says that it begins a new list of the best.
@pytest.mark.filterwarnings("ignore:The dirpath has changed:UserWarning")
def test_a_run_goes_on_from_a_checkpoint() -> None:
    keep = "--trainer.callbacks+=lightning.pytorch.callbacks.ModelCheckpoint"
    some = [f"--trainer.callbacks.{x}" for x in ("every_n_train_steps=2", "save_top_k=-1")]
    whole = fit("--wandb=off", QUIET[0], "--name=whole", keep, *some)
    (saved,) = Path("runs/whole").glob("version_0/checkpoints/*step=2.ckpt")
    resumed = fit("--wandb=off", QUIET[0], "--name=go_on", keep, *some, f"--ckpt_path={saved}")
    assert resumed.row["samples"] == 256
    assert resumed.row["accuracy, EMA"] == whole.row["accuracy, EMA"]
    assert steps("go_on") == steps("whole")[2:]
    pairs = zip(whole.model.parameters(), resumed.model.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_the_bar_shows_batch_noise_and_accuracy(capsys: pytest.CaptureFixture[str]) -> None:
    fit("--wandb=off", QUIET[1], "--trainer.limit_val_batches=1", "--trainer.limit_train_batches=4")
    shown = capsys.readouterr().out
    assert all(name in shown for name in ("global_batch", "noise_scale", "val_accuracy"))


def test_cifar10_trains_from_files(tmp_path: Path) -> None:
    for name in [*(f"data_batch_{k}" for k in range(1, 6)), "test_batch"]:
        record = bytes([3]) + bytes(np.random.default_rng(0).integers(256, size=3072).tolist())
        (tmp_path / f"{name}.bin").write_bytes(3 * record)
    network = "--model.network.init_args"
    options = [f"--data.folder={tmp_path}", "--data.name=cifar10", f"{network}.channels=3"]
    options += ["--data.micro_batch=4", "--batch.rule=0:8", "--batch.max_samples=14"]
    assert fit(*OFF, *options).row["samples"] == 15


def test_a_combination_of_the_sweep_runs() -> None:
    sweep = yaml.safe_load((FOLDER / "sweep.yaml").read_text())
    assert (ROOT / sweep["program"]).is_file()
    chosen = {name: found["values"][-1] for name, found in sweep["parameters"].items()}
    assert all((ROOT / path).is_file() for path in sweep["parameters"]["config"]["values"])
    chosen["config"] = str(ROOT / chosen["config"])
    command = [word for word in sweep["command"] if not word.startswith("${")]
    given = [f"--{name}={value}" for name, value in chosen.items()]
    # As wandb's agent would, but offline and short.
    cli = main([*command, *given, "--wandb=off", "--out=runs", *OFF, *SHORT])
    assert cli.row["final batch"] == 2048


def test_the_study_makes_each_run_once(capsys: pytest.CaptureFixture[str]) -> None:
    tiny = ["--recipes", "sgd", "--batches", "128", "--seeds", "1", "--out", "study"]
    tiny += ["--wandb", "off", *SHORT]
    (row,) = study.main(tiny)
    assert (row["recipe"], row["batch"], row["seed"], row["samples"]) == ("sgd", 128, 0, 256)
    first = Path("study/study.csv").read_text()
    (again,) = study.main(tiny)
    assert again.pop("recipe") == row.pop("recipe")
    assert again == pytest.approx(row, rel=1e-5)
    assert Path("study/study.csv").read_text() == first
    assert Path("study/image_classification.png").read_bytes().startswith(b"\x89PNG")
    assert "SGD, constant rate" in capsys.readouterr().out


def test_a_table_is_of_means_over_seeds() -> None:
    rows = [
        dict.fromkeys(("accuracy", "accuracy_EMA", "validation_loss_EMA"), value)
        | {"recipe": "lars", "batch": 64, "seed": seed, "steps": 10, "final_batch": 64}
        for seed, value in enumerate((0.5, 0.7))
    ]
    (line,) = study.table(rows)
    assert line == [study.RECIPES["lars"], "64", "10", "60.0 ± 10.0", "60.0 ± 10.0", "0.600"]


@pytest.mark.slow
def test_it_starts_as_a_user_would_start_it(tmp_path: Path) -> None:
    environ = {k: v for k, v in os.environ.items() if not k.startswith(("WANDB", "TRITON"))}
    main_file = FOLDER / "main.py"
    command = [sys.executable, str(main_file), "fit", *OFF, *SHORT[:2], "--batch.rule=0:128"]
    done = subprocess.run(command, cwd=tmp_path, env=environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr == "Seed set to 0\n"  # no warning
    assert (tmp_path / "runs/image_classification/run/version_0/metrics.csv").is_file()
