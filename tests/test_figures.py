"""Figures of the pages: what is measured names where from, and tables and pictures have scripts."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [
    ROOT / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "docs" / "methods").glob("*.md")),
    *sorted((ROOT / "docs" / "guides").glob("*.md")),
    *sorted((ROOT / "examples").glob("*/README.md")),
]
CARDS = [page for page in PAGES if page.parent.name == "methods"]
TABLE_OF_METHODS = ROOT / "docs" / "methods" / "README.md"
SCRIPTS = [
    *(ROOT / "benchmarks").glob("*.py"),
    *(ROOT / "docs").glob("*.py"),
    *(ROOT / "examples").rglob("*.py"),
]
TABLES = sorted((ROOT / "benchmarks" / "results").glob("*.csv"))
PICTURES = sorted((ROOT / "docs").glob("*.png"))
LABEL = re.compile(r"\bMeasured\b|\(measured\b|\bmeasured\)|, measured[,:]")
SOURCE = re.compile(
    r"(?:\.\./)*benchmarks/results/\w+\.csv|(?:benchmarks|examples|tests)/[\w/]+\.py"
    r"|(?:\.\./)*examples/\w+/README\.md(?:#[\w-]+)?|(?:\.\./)?\w+\.md#[\w-]+"
)
COST = re.compile(r"× (\d[\d.,]*\d|\d)|(\d[\d.,]*) ?(?:×|ms\b)")
CODE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def sections(page: Path) -> list[str]:
    text = CODE.sub("", page.read_text(encoding="utf-8"))
    return re.split(r"^## ", text, flags=re.MULTILINE)


def exists(source: str, page: Path) -> bool:
    """A path is that of a link on the page or of the repository; an anchor is a heading."""
    path, _, anchor = source.partition("#")
    found = [x for x in (page.parent / path, ROOT / path) if x.exists()]
    return bool(found) and (not anchor or anchor in anchors(found[0]))


def anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\s-]", "", x.lower()).strip().replace(" ", "-") for x in headings}


@pytest.mark.parametrize("page", CARDS, ids=name)
def test_what_is_measured_names_where_from(page: Path) -> None:
    for section in sections(page):
        if LABEL.search(section):
            sources = SOURCE.findall(section)
            assert sources, f"no rows, script, test or log is named: {section[:40]!r}"
            assert not [x for x in sources if not exists(x, page)]


def costs() -> list[tuple[str, str]]:
    """Numbers with × or ms in rows of the table of methods, and the cards that these link to."""
    rows = re.findall(r"^\|.+\[card\]\(.+$", TABLE_OF_METHODS.read_text("utf-8"), re.MULTILINE)
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    cards = [(cell[-1].removeprefix("[card](").removesuffix(")"), cell[-2]) for cell in cells]
    return [(a or b, card) for card, cost in cards for a, b in COST.findall(cost)]


@pytest.mark.parametrize(("number", "card"), costs())
def test_a_cost_in_the_table_of_methods_is_on_its_card(number: str, card: str) -> None:
    text = (TABLE_OF_METHODS.parent / card).read_text(encoding="utf-8")
    assert re.search(rf"(?<![\d.,]){re.escape(number)}(?![.,]?\d)", text)


@pytest.mark.parametrize("table", TABLES, ids=name)
def test_rows_are_named_by_a_page_and_written_by_a_script(table: Path) -> None:
    names = {f"{table.stem}.csv"}
    if table.stem.startswith("bench_"):  # one script writes them all, for one page
        names |= {"bench_*.csv", "bench_{name}.csv"}
    for readers in (PAGES, SCRIPTS):
        texts = [x.read_text(encoding="utf-8") for x in readers]
        assert [text for text in texts if any(name in text for name in names)]


@pytest.mark.parametrize("picture", PICTURES, ids=name)
def test_a_picture_is_on_a_page_that_names_what_drew_it(picture: Path) -> None:
    kind = f'{picture.stem.split("_")[0]}_{{name}}.png"'  # one of several that a script draws
    texts = {script: script.read_text(encoding="utf-8") for script in SCRIPTS}
    drew = [x for x, text in texts.items() if picture.name in text or kind in text]
    own = ROOT / "examples" / picture.stem / "main.py"  # ExampleCLI draws the run
    if own.exists() and 'f"{self.example}.png"' in texts[ROOT / "examples" / "cli.py"]:
        drew.append(own)
    pages = [x.read_text(encoding="utf-8") for x in PAGES]
    shown = [text for text in pages if re.search(rf"[(/]{re.escape(picture.name)}\)", text)]
    assert drew
    assert shown
    measured = [x for x in drew if x.parent.name != "docs"]  # the others are drawings
    calls = [name(x) for x in measured] + [f"python -m examples.{x.parent.name}" for x in measured]
    assert not measured or all(any(call in text for call in calls) for text in shown)
