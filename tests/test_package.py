"""What is released: the wheel, its version, and what importing it costs."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from zipfile import ZipFile

import pytest

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> ZipFile:
    """Built from a copy, offline, by the setuptools that is there."""
    folder = tmp_path_factory.mktemp("wheel")
    copy = [ROOT / name for name in ("pyproject.toml", "README.md", "LICENSE", "lightning_ext")]
    for path in copy:
        (folder / path.name).symlink_to(path)
    make = "from setuptools.build_meta import build_wheel; build_wheel('dist')"
    (folder / "dist").mkdir()
    subprocess.run([sys.executable, "-c", make], cwd=folder, check=True, capture_output=True)
    return ZipFile(next((folder / "dist").glob("*.whl")))


def test_the_wheel_has_the_package_alone(wheel: ZipFile) -> None:
    names = wheel.namelist()
    info = f"lightning_ext-{PROJECT['version']}.dist-info/"
    assert all(name.startswith(("lightning_ext/", info)) for name in names)
    sources = {str(path.relative_to(ROOT)) for path in (ROOT / "lightning_ext").rglob("*.py")}
    assert sources == {name for name in names if name.endswith(".py")}
    assert {"lightning_ext/py.typed", f"{info}licenses/LICENSE"} <= set(names)


def test_the_metadata_is_whole(wheel: ZipFile) -> None:
    name = f"lightning_ext-{PROJECT['version']}.dist-info/METADATA"
    text = wheel.read(name).decode()
    for line in ("License-Expression: Apache-2.0", "Description-Content-Type: text/markdown"):
        assert line in text
    assert text.count("Classifier: ") == len(PROJECT["classifiers"])
    assert re.findall(r"^Provides-Extra: (.*)$", text, re.MULTILINE) == list(
        PROJECT["optional-dependencies"]
    )


def test_all_say_the_same_version() -> None:
    changelog = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text("utf-8"), re.MULTILINE)
    citation = re.search(r"^version: (\S+)$", (ROOT / "CITATION.cff").read_text("utf-8"), re.M)
    assert changelog is not None
    assert citation is not None
    assert changelog[1] == citation[1] == PROJECT["version"]


def self_seconds(module: str, cache: Path) -> float:
    """Seconds that modules of ours take by themselves when this one is imported."""
    environ = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONPYCACHEPREFIX": str(cache)}
    environ.pop("PYTHONDONTWRITEBYTECODE", None)  # a source is compiled once, not at each import
    line = [sys.executable, "-W", "ignore", "-X", "importtime", "-c", f"import {module}"]
    done = subprocess.run(line, env=environ, check=True, capture_output=True, text=True)
    rows = re.findall(r"^import time: +(\d+) \| +\d+ \| +lightning_ext", done.stderr, re.MULTILINE)
    assert rows
    return sum(map(int, rows)) / 1e6


def test_our_modules_are_a_small_part_of_an_import(tmp_path: Path) -> None:
    found: list[float] = []
    while len(found) < 5 and min(found, default=1.0) >= 0.3:
        found.append(self_seconds("lightning_ext", tmp_path))
    assert min(found) < 0.3
