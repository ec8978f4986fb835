import importlib
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
from matplotlib.figure import Figure

ROOT = Path(__file__).parent.parent
CARDS = sorted(p for p in (ROOT / "docs" / "methods").glob("*.md") if p.name != "README.md")
TABLE = ROOT / "docs" / "methods" / "README.md"
HEADINGS = [
    "What",
    "When, and when not",
    "Use",
    "Knobs",
    "Cost",
    "Interacts with",
    "Source and differences",
]
COLUMNS = ["method", "room and names", "paper", "cost", "card"]
ROOMS = (
    "callbacks",
    "strategies",
    "optim",
    "losses",
    "nn",
    "data",
    "scaling",
    "functional",
    "kernels",
)
ROW = re.compile(r"^\| (?!method |---)(.+) \|$", re.MULTILINE)
PNG = b"\x89PNG"


def named(text: str) -> set[str]:
    """Words, an operation in place (`…_`) being that of the same name without."""
    return {word.rstrip("_") for word in re.findall(r"\w+", text)}


def code_of(text: str) -> str:
    """Blocks and spans of code: a name in a sentence is not enough."""
    return "\n".join(re.findall(r"```.*?```|^ {4}.*?$|`[^`]+`", text, re.MULTILINE | re.DOTALL))


IN_CARDS = {word for card in CARDS for word in named(code_of(card.read_text(encoding="utf-8")))}


@pytest.mark.parametrize("room", ROOMS)
def test_public_names_are_on_a_card(room: str) -> None:
    module = importlib.import_module(f"lightning_ext.{room}")
    # Constants are listings of names, which errors print.
    names = [name for name in module.__all__ if callable(getattr(module, name))]
    assert names
    assert not [name for name in names if name.rstrip("_") not in IN_CARDS]


def test_all_public_rooms_are_looked_at() -> None:
    rooms = (path.parent.name for path in (ROOT / "lightning_ext").glob("*/__init__.py"))
    assert {room for room in rooms if not room.startswith("_")} == set(ROOMS)


@pytest.mark.parametrize("card", CARDS, ids=lambda card: str(card.stem))
def test_a_card_has_its_headings_in_order(card: Path) -> None:
    lines = card.read_text(encoding="utf-8").splitlines()
    assert lines[0].startswith("# ")
    found = [line.removeprefix("## ") for line in lines if line.startswith("## ")]
    assert [heading for heading in found if heading in HEADINGS] == HEADINGS


@pytest.mark.parametrize("card", CARDS, ids=lambda card: str(card.stem))
def test_a_card_has_one_row_in_the_table(card: Path) -> None:
    rows = ROW.findall(TABLE.read_text(encoding="utf-8"))
    assert sum(f"[card]({card.name})" in row for row in rows) == 1


def test_rows_of_the_table_are_whole() -> None:
    text = TABLE.read_text(encoding="utf-8")
    rows = [row.split(" | ") for row in ROW.findall(text)]
    assert len(rows) == len(CARDS)
    # An empty cell leaves one blank between its bars.
    assert not [row for row in ROW.findall(text) if row.count("|") != len(COLUMNS) - 1]
    assert text.count(f"| {' | '.join(COLUMNS)} |") == text.count("\n## ")


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    return importlib.import_module("figures")


@pytest.mark.parametrize(
    ("name", "width"),
    # Plans of eight optimizers take a while.
    [("architecture", 1100), ("loop", 924), pytest.param("memory", 1155, marks=pytest.mark.slow)],
)
def test_a_figure_can_be_drawn(
    figures: ModuleType, name: str, width: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["figures.py", name, "--out", str(tmp_path)])
    figures.main()
    drawn = (tmp_path / f"{name}.png").read_bytes()
    assert drawn[:4] == PNG
    assert int.from_bytes(drawn[16:20], "big") == width


def test_the_modelled_memory_is_that_of_the_formulas(figures: ModuleType) -> None:
    rows = dict(figures.modelled())
    ddp, fsdp2 = rows["ddp × 16, float32"], rows["fsdp2 × 16, float32"]
    assert fsdp2[:3] == pytest.approx([part / 16 for part in ddp[:3]])
    assert ddp[2] == pytest.approx(2 * ddp[0])  # 8 bytes of states beside 4 of weights
    assert rows["ddp × 16, int8"][2] == pytest.approx(ddp[0] * figures.state_bytes()["int8"] / 4)


def test_bars_are_as_long_as_their_parts(figures: ModuleType, tmp_path: Path) -> None:
    figure = Figure()
    axes = figure.subplots()
    figures.bars(axes, [("a", (1.0, 2.0, 3.0, 4.0, 5.0)), ("b", (1.0,) * 5)], "title", "MB")
    figure.savefig(tmp_path / "bars.png")
    ends = [patch.get_x() + patch.get_width() for patch in axes.patches]
    assert ends[-2:] == [15.0, 5.0]
    assert [text.get_text().strip() for text in axes.texts] == ["15", "5"]


def test_every_figure_is_shown_on_a_page() -> None:
    pages = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md"), *ROOT.glob("examples/*/*.md")]
    text = "\n".join(page.read_text(encoding="utf-8") for page in pages)
    assert not [p.name for p in (ROOT / "docs").glob("*.png") if p.name not in text]
