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
ROOMS = ("callbacks", "data", "functional", "kernels", "losses", "nn", "optim", "scaling")
# Seconds of processor time in our modules, without what they import, and in all others. A busy
# machine slows both: ours are held against the others, 0.3 s where these take 3 s.
MEASURE = """
import sys
from importlib.machinery import SourceFileLoader
from time import thread_time

run, own, inside = SourceFileLoader.exec_module, {}, [0.0]

def exec_module(self, module):
    begin = thread_time()
    inside.append(0.0)
    run(self, module)
    whole = thread_time() - begin
    own[module.__name__] = whole - inside.pop()
    inside[-1] += whole

SourceFileLoader.exec_module = exec_module
for name in sys.argv[1:]:
    __import__(name)
ours = sum(seconds for name, seconds in own.items() if name.startswith("lightning_ext"))
print(ours, sum(own.values()) - ours)
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> ZipFile:
    """Built from a copy, offline, by the setuptools that is there."""
    pytest.importorskip("setuptools")
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


def test_our_modules_are_a_small_part_of_an_import() -> None:
    names = ["lightning_ext", *(f"lightning_ext.{room}" for room in ROOMS)]
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    environ.pop("PYTHONDONTWRITEBYTECODE", None)  # a source is compiled once, not at each import
    found = []
    for _ in range(5):
        line = [sys.executable, "-W", "ignore", "-c", MEASURE, *names]
        done = subprocess.run(line, env=environ, check=True, capture_output=True, text=True)
        ours, others = map(float, done.stdout.split()[-2:])
        found.append((ours, others))
        if ours < max(0.3, others / 10):
            return
    raise AssertionError(f"seconds of ours and of all others: {found}; a tenth is asked")
