"""FSDP2 by its name, in scripts as users start them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = """
import sys
from pathlib import Path

from lightning.pytorch import Trainer
from torch.utils.data import DataLoader
from harness import dataset
from harness._fits import Classifier

import lightning_ext

if __name__ == "__main__":
    trainer = Trainer(
        strategy="fsdp2", accelerator="cpu", devices=2, max_epochs=1, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )
    module = Classifier(dropout=0)
    trainer.fit(module, DataLoader(dataset(16), 2))
    trainer.strategy.export(sys.argv[1])
    found = f"{trainer.world_size} ranks, {len(trainer.strategy.units())} unit"
    Path(sys.argv[1]).with_suffix(f".{trainer.global_rank}").write_text(found)
"""
COMMANDS = {
    "by Lightning": [sys.executable],
    "by torchrun": [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    ],
}


# Other tests start ranks in torchrun's environment.
@pytest.mark.parametrize(
    "command", ["by Lightning", pytest.param("by torchrun", marks=pytest.mark.slow)]
)
def test_a_script_trains_on_two_ranks(command: str, tmp_path: Path) -> None:
    script, file = tmp_path / "train.py", tmp_path / "whole.ckpt"
    script.write_text(SCRIPT)
    here = Path(__file__).parents[2]
    paths = os.pathsep.join(map(str, (here, here / "tests")))
    done = subprocess.run(
        [*COMMANDS[command], str(script), str(file)],
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert [file.with_suffix(f".{rank}").read_text() for rank in (0, 1)] == ["2 ranks, 1 unit"] * 2
    weights = torch.load(file, weights_only=True)["state_dict"]
    assert weights["net.0.weight"].shape == (12, 6)
