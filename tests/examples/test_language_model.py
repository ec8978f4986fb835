"""The language model: its size, its data and short runs, as a user would start them."""

from __future__ import annotations

import csv
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from harness import run_distributed
from lightning.pytorch import seed_everything
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from examples.language_model import tokens
from examples.language_model.data import TextFolder
from examples.language_model.main import HERE, TextCLI, main
from examples.language_model.module import GPT
from examples.language_model.tokens import BytePairs, Bytes
from lightning_ext.callbacks import AdaptiveBatchSize

TINY = (
    *("--data.validation_windows", "32", "--model.width", "16", "--model.heads", "2"),
    *("--batch.max_samples", "64", "--batch.max_global_batch", "32"),
)
COUNTS = "steps", "samples", "final batch"
LOSS = "validation loss"
FIXED = *TINY, "--batch.rule", "0:16", "--wandb", "off"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Forty files of text in two folders, one of them hidden from a pattern."""
    for number in range(40):
        path = tmp_path / "texts" / str(number % 2) / f"{number}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"file {number} says {number**3}. " * 40)
    return tmp_path / "texts"


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, folder: Path) -> Callable[..., TextCLI]:
    """Runs a command line on those texts, in a folder of its own."""
    monkeypatch.chdir(tmp_path)

    def fit(*options: str, command: str = "fit") -> TextCLI:
        return start(command, "--data.folder", str(folder), *options)

    return fit


def start(*options: str) -> TextCLI:
    """Runs a command line as that of this process."""
    sys.argv = ["main.py", *options]
    return main()


def steps(cli: TextCLI) -> list[dict[str, float]]:
    """The optimizer steps in a run's CSV file."""
    with (Path(cli.trainer.loggers[0].log_dir) / "metrics.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["samples_seen"]]
    return [{key: float(value) for key, value in row.items() if value} for row in rows]


def weights(cli: TextCLI) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in cli.model.parameters()])


def test_it_has_half_a_million_parameters() -> None:
    assert 450_000 <= sum(p.numel() for p in GPT().parameters()) <= 550_000


def test_it_knows_nothing_at_first() -> None:
    seed_everything(0, verbose=False)
    windows = torch.randint(256, (8, 65), dtype=torch.uint8)
    assert GPT().loss(windows).item() == pytest.approx(math.log(256), abs=0.05)


def test_a_prediction_sees_only_what_is_before_it() -> None:
    windows = torch.randint(256, (1, 64), dtype=torch.uint8)
    model, changed = GPT(), windows.clone()
    changed[0, 40] += 1
    same = (model(windows) == model(changed)).all(-1)[0]
    assert same[:40].all()
    assert not same[40:].any()


def test_biases_norms_and_embeddings_do_not_decay() -> None:
    model = GPT()
    decayed, kept = model.configure_optimizers().param_groups
    assert (decayed["weight_decay"], kept["weight_decay"]) == (0.1, 0.0)
    names = {id(p): name for name, p in model.named_parameters()}
    plain = {names[id(p)] for p in kept["params"]}
    assert plain == {name for name in names.values() if "norm" in name or name.endswith("bias")} | {
        "bytes.weight",
        "positions.weight",
    }
    assert len(decayed["params"]) + len(plain) == len(names)


@pytest.mark.parametrize("optimizer", ["normuon", "lion", "sgd"])
def test_other_optimizers_decay_the_same_matrices(optimizer: Any) -> None:
    model, other = GPT(), GPT(optimizer=optimizer, weight_decay=0.1)
    decayed, _ = model.configure_optimizers().param_groups
    groups = other.configure_optimizers().param_groups
    assert sum(len(g["params"]) for g in groups) == len(list(other.parameters()))
    shapes = [p.shape for g in groups if g["weight_decay"] for p in g["params"]]
    assert sorted(shapes) == sorted(p.shape for p in decayed["params"])
    if optimizer == "normuon":  # all but the head
        hidden = [p for g in groups if g["algorithm"] == "muon" for p in g["params"]]
        assert {id(p) for p in hidden} == {id(p) for p in other.blocks.parameters() if p.ndim == 2}


def test_an_unknown_optimizer_is_refused() -> None:
    with pytest.raises(ValueError, match="choose one of adamw, sgd, normuon, lion"):
        GPT(optimizer="adam")


def test_the_standard_library_is_cut_the_same_way_each_time() -> None:
    first, second = (TextFolder(max_bytes=1_000_000) for _ in range(2))
    assert first.train_files == second.train_files
    assert torch.equal(first.train.rows, second.train.rows)
    assert torch.equal(first.validation.rows, second.validation.rows)


def test_no_file_is_on_both_sides() -> None:
    data = TextFolder(max_bytes=1_000_000)
    assert data.train_files
    assert data.validation_files
    assert not set(data.train_files) & set(data.validation_files)
    assert not [f for f in data.train_files if "site-packages" in f or "/test/" in f]


def test_more_bytes_leave_files_on_their_side() -> None:
    small, large = TextFolder(max_bytes=1_000_000), TextFolder(max_bytes=2_000_000)
    assert set(small.train_files) <= set(large.train_files)
    assert set(small.validation_files) <= set(large.validation_files)


def test_another_folder_works(folder: Path) -> None:
    data = TextFolder(folder, context=32)
    assert len(data.train_files) + len(data.validation_files) == 40
    text = b"".join((folder / name).read_bytes() for name in data.train_files)
    assert bytes(data.train.rows.flatten().tolist()) == text[: data.train.rows.numel()]
    assert data.train.rows.shape == (len(text) // 33, 33)


def test_a_file_keeps_its_side_when_others_go(folder: Path) -> None:
    before = TextFolder(folder)
    for name in before.train_files[:10]:
        (folder / name).unlink()
    after = TextFolder(folder)
    assert after.train_files == before.train_files[10:]
    assert after.validation_files == before.validation_files


def test_a_pattern_chooses_files(folder: Path) -> None:
    assert all(name[:2] == "1/" for name in TextFolder(folder, pattern="1/*").train_files)


def test_a_folder_without_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has 0 files.*one in ten is for validation"):
        TextFolder(tmp_path)


def test_large_files_are_read_in_pieces(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = TextFolder(folder)
    monkeypatch.setattr("examples.language_model.data.PIECE_BYTES", 100)
    assert torch.equal(TextFolder(folder).train.rows, whole.train.rows)


def test_byte_pairs_are_shorter_and_can_be_read_back() -> None:
    text = "def être(x):\n    return [x] * 100  # naïve\n".encode() * 50
    pairs = BytePairs([text], 400)
    found = pairs.encode([text, b"never seen: \xe2\x82\xac\t"])
    assert pairs.decode(found) == text + b"never seen: \xe2\x82\xac\t"
    assert found.max() < 400
    assert pairs.bytes_per_token(found) == pytest.approx((len(text) + 16) / len(found))
    assert len(found) < len(text) / 2


def test_byte_pairs_are_learnt_on_training_files_alone(folder: Path) -> None:
    options: dict[str, Any] = {"tokenizer": "bpe", "vocabulary": 300}
    before = TextFolder(folder, **options)
    assert before.train.rows.dtype == torch.int32
    for name in before.validation_files:
        (folder / name).write_text("something else entirely " * 60)
    after = TextFolder(folder, **options)
    assert torch.equal(before.train.rows, after.train.rows)
    assert not torch.equal(before.validation.rows, after.validation.rows)


def test_vocabularies_that_do_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="there are 256 bytes"):
        Bytes(1024)
    with pytest.raises(ValueError, match="at least 256"):
        BytePairs([], 100)
    monkeypatch.setattr(tokens, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="the extra 'examples'"):
        BytePairs([], 300)


# One test, because each part needs the same run; a second one shows that the seed decides.
def test_a_run_ends_with_a_table_and_logs_and_the_seed_decides(
    run: Callable[..., TextCLI], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = *TINY, "--batch.rule", "0:16 32:32"
    done = run(*options)
    assert f"{done.row['validation loss']:.3f}" in capsys.readouterr().out
    assert (done.row["steps"], done.row["samples"], done.row["final batch"]) == (3, 64, 32)
    first = steps(done)
    assert [step["global_batch"] for step in first] == [16, 16, 32]
    assert [step["lr_scaled"] for step in first] == pytest.approx([1e-3, 1e-3, 2**0.5 * 1e-3])
    assert first[-1]["loss"] < first[0]["loss"]
    assert 0 < done.row["validation loss"] < math.log(256)
    folder = Path(done.trainer.loggers[0].log_dir)
    assert (folder / "language_model.png").stat().st_size > 10_000
    assert (folder / "config.yaml").exists()
    (logged,) = (tmp_path / "runs" / "language_model" / "wandb").glob("offline-run-*/*.wandb")
    written = logged.read_bytes()
    assert all(key in written for key in (b"validation loss", b"noise_scale", b"max_global_batch"))
    again = run(*options, "--wandb", "off")
    assert steps(again) == first
    assert again.row["validation loss"] == done.row["validation loss"]


def test_what_is_printed_as_configuration_is_read_as_such(
    run: Callable[..., TextCLI], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = *FIXED, "--model.optimizer", "lion"
    with pytest.raises(SystemExit):
        run(*options, "--print_config")
    printed = capsys.readouterr().out
    (tmp_path / "printed.yaml").write_text(printed)
    with pytest.raises(SystemExit):
        start("fit", "--config", str(tmp_path / "printed.yaml"), "--print_config")
    assert capsys.readouterr().out == printed
    found = yaml.safe_load(printed)
    assert (found["model"]["optimizer"], found["batch"]["rule"]) == ("lion", "0:16")


@pytest.mark.parametrize("name", sorted({p.stem for p in HERE.glob("*.yaml")} - {"sweep"}))
def test_each_file_sets_what_it_says(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = HERE / f"{name}.yaml"
    asked = yaml.safe_load(path.read_text())
    with pytest.raises(SystemExit):
        start("fit", "--config", str(path), "--print_config")
    found = yaml.safe_load(capsys.readouterr().out)
    callbacks = asked.get("trainer", {}).get("callbacks", ())
    for wanted, made in zip(callbacks, found["trainer"]["callbacks"] or (), strict=True):
        assert wanted["class_path"] == made["class_path"]
        assert wanted["init_args"].items() <= made["init_args"].items()
    for part, values in asked.items():
        for key in set(values) - {"callbacks"}:
            assert found[part][key] == values[key], (part, key)


def test_a_command_of_the_sweep_runs(run: Callable[..., TextCLI]) -> None:
    sweep = yaml.safe_load((HERE / "sweep.yaml").read_text())
    chosen = {name: setting["values"][0] for name, setting in sweep["parameters"].items()}
    options = [f"--{name}={value}" for name, value in chosen.items()]
    env, python, program, *command = sweep["command"]
    assert (env, python, program, command[-1]) == ("${env}", "python", "${program}", "${args}")
    assert (HERE.parents[1] / sweep["program"]).samefile(HERE / "main.py")
    done = run(*command[1:-1], *options, *TINY, "--wandb", "off", command=command[0])
    assert sweep["metric"]["name"] in done.row
    assert done.row["final batch"] == 16


@pytest.mark.filterwarnings("ignore:The dirpath has changed:UserWarning")  # another version_<n>
def test_a_run_goes_on_from_the_middle(run: Callable[..., TextCLI]) -> None:
    saved = "--trainer.callbacks+=ModelCheckpoint", "--trainer.callbacks.every_n_train_steps=2"
    options = *FIXED, *saved, "--trainer.callbacks.save_top_k=-1", "--batch.rule", "0:16 32:32"
    whole = run(*options)
    path = next(Path(whole.trainer.loggers[0].log_dir).glob("checkpoints/*step=2.ckpt"))
    resumed = run(*options, "--ckpt_path", str(path))
    assert steps(resumed) == steps(whole)[2:]
    assert torch.equal(weights(resumed), weights(whole))
    assert resumed.row["validation loss, EMA"] == whole.row["validation loss, EMA"]


def test_tokens_are_compared_by_the_byte(run: Callable[..., TextCLI]) -> None:
    done = run("--config", str(HERE / "bpe.yaml"), "--data.vocabulary", "300", *FIXED)
    assert done.model.head.out_features == 300
    length = done.datamodule.validation.bytes_per_token
    assert length > 1.5
    assert done.row["nats per byte"] == pytest.approx(done.row["validation loss"] / length)


def test_the_batch_follows_one_of_three_noise_scales(run: Callable[..., TextCLI]) -> None:
    done = run("--config", str(HERE / "geometry.yaml"), *TINY, "--wandb", "off")
    batch = next(c for c in done.trainer.callbacks if isinstance(c, AdaptiveBatchSize))
    assert batch.source.used == ("micro_batches", "l1")
    assert {"l1_noise_scale", "l2_noise_scale", "nuclear_noise_scale"} <= set(steps(done)[0])


def _fitted(options: tuple[str, ...], runs: tuple[tuple[str, ...], ...]) -> list[dict[str, Any]]:
    rank_zero_only.rank = int(os.environ["RANK"])  # as it is where a process begins so
    return [start(*options, *more).row for more in runs]


# One start of two processes for all: the rest of the command line is the same for each. Under
# Lightning's sampler for several processes the windows come in another order than in one.
@pytest.mark.filterwarnings("ignore:ZeroPPStrategy has one node:UserWarning")
def test_strategies_train_the_same_model(
    run: Callable[..., TextCLI], folder: Path, tmp_path: Path
) -> None:
    common = *TINY, "--wandb", "off"
    alone, twice = run(*common).row, run(*common, "--trainer.accumulate_grad_batches", "4").row
    assert (alone["final batch"], twice["final batch"]) == (16, 32)
    names = "ddp", "fsdp2", "zeropp", "breadth_first_pipeline"
    options = "fit", "--data.folder", str(folder), *common, "--trainer.devices", "2"
    runs = tuple(("--trainer.strategy", name, "--name", name) for name in names)
    first, second = run_distributed(_fitted, 2, timeout=300, args=(options, runs))
    for row, other, name in zip(first, second, names, strict=True):
        same = alone if name == "breadth_first_pipeline" else twice
        assert [row[key] for key in COUNTS] == [same[key] for key in COUNTS]
        assert row[LOSS] == pytest.approx(other[LOSS], abs=1e-6)  # both ranks evaluate all
        assert row[LOSS] == pytest.approx(same[LOSS], abs=0.02)
        assert row[f"{LOSS}, EMA"] == pytest.approx(same[f"{LOSS}, EMA"], abs=0.02)
    assert first[1][LOSS] == pytest.approx(first[0][LOSS], abs=1e-4)  # fsdp2 and ddp
    folder = tmp_path / "runs" / "language_model" / "fsdp2" / "version_0"
    assert (folder / "language_model.png").exists()
