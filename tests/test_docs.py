import re
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# Those of the site: whatever Sphinx is given is read here, too.
PAGES = [
    *sorted(ROOT.glob("*.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
    *sorted((ROOT / "examples").rglob("README.md")),
]
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
ARXIV = re.compile(r"arxiv\.org/(\S*?)(?=[\s)>\]]|$)", re.MULTILINE)
ARXIV_PAPER = re.compile(r"abs/\d{4}\.\d{4,5}(v\d+)?")
LINK = re.compile(r"\]\((?!https?://|#)([^)#\s]+)")


def blocks(page: Path) -> list[tuple[str, int, str]]:
    text = page.read_text(encoding="utf-8")
    found = [(text.count("\n", 0, m.start()) + 1, m.group(1)) for m in BLOCK.finditer(text)]
    return [(str(page.relative_to(ROOT)), line, code) for line, code in found]


BLOCKS = [block for page in PAGES for block in blocks(page)]


@pytest.mark.parametrize(("name", "line", "code"), BLOCKS, ids=[f"{n}:{k}" for n, k, _ in BLOCKS])
def test_a_block_runs(
    name: str, line: int, code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    # Blank lines in front make the line numbers of a traceback those of the page.
    exec(compile("\n" * line + code, name, "exec"), {"__name__": "__main__"})


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    links = LINK.findall(page.read_text(encoding="utf-8"))
    assert not [link for link in links if not (page.parent / link).exists()]


def test_identifiers_of_papers_are_well_formed() -> None:
    """Other addresses cannot be asked for without a network; anchors are left to Sphinx."""
    links = [(page, x) for page in PAGES for x in ARXIV.findall(page.read_text(encoding="utf-8"))]
    assert links
    assert not [(page, link) for page, link in links if not ARXIV_PAPER.fullmatch(link)]


def test_every_room_has_a_page_of_the_reference() -> None:
    packages = {path.parent.name for path in (ROOT / "lightning_ext").glob("[a-z]*/__init__.py")}
    rooms = {name for name in packages if import_module(f"lightning_ext.{name}").__all__}
    pages = {path.stem for path in (ROOT / "docs" / "api").glob("[a-z]*.md")}
    assert pages == rooms
    table = (ROOT / "docs" / "api" / "README.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^\| \[`(\w+)`\]\(\1\.md\)", table, re.MULTILINE)) == rooms
