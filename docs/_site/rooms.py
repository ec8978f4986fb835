"""The reference of a room, from its ``__all__``: a table of names, then a section for each file.

A page ``docs/api/<room>.md`` has the words that stand above; the rest is added as it is read.
"""

import re
import sys
from collections.abc import Iterable, Set
from importlib import import_module
from types import FunctionType, ModuleType
from typing import Any

from docutils import nodes
from docutils.parsers.rst.states import Inliner
from sphinx.application import Sphinx

_PACKAGE = "lightning_ext"
_ARXIV = re.compile(r"arXiv:(\d{4}\.\d{4,5})")
_FIELD = re.compile(r"^(Source|Differs):", re.MULTILINE)
_CONSTANTS = "~Constants"  # behind all files


def _add_reference(app: Sphinx, docname: str, content: list[str]) -> None:
    """Append the reference to the page of a room."""
    folder, _, name = docname.rpartition("/")
    if folder == "docs/api" and name != "README":
        content[0] += _reference(import_module(f"{_PACKAGE}.{name}"))


def _reference(room: ModuleType) -> str:
    """Return the reference of a room as Markdown."""
    table = "\n".join([".. autosummary::", "   :nosignatures:", "", *_indented(room.__all__)])
    sections = sorted(_by_file(room).items())
    return "\n".join([_rst(room, table), *(_section(room, *section) for section in sections)])


def _by_file(room: ModuleType) -> dict[str, list[str]]:
    """Return the public names of a room by the module that has them."""
    files: dict[str, list[str]] = {}
    for name in room.__all__:
        file = getattr(getattr(room, name), "__module__", _CONSTANTS)
        files.setdefault(file, []).append(name)
    return files


def _section(room: ModuleType, file: str, names: list[str]) -> str:
    """Return what one file has, below the words of its docstring."""
    first, _, body = (getattr(sys.modules.get(file), "__doc__", None) or file).partition("\n")
    words = _with_blocks(_linked(_FIELD.sub(r":\1:", body.strip())).split("\n"))
    heading = f"`{names[0]}`" if len(names) == 1 else first.strip(".~")
    entries = [_entry(name, getattr(room, name)) for name in names]
    return f"\n## {heading}\n" + _rst(room, "\n\n".join(["\n".join(words), *entries]))


def _entry(name: str, member: object) -> str:
    """Return the directive that documents a member."""
    if isinstance(member, type):
        methods = _methods(member)
        return f".. autoclass:: {name}\n" + (f"   :members: {', '.join(methods)}" * bool(methods))
    if callable(member):
        return f".. autofunction:: {name}"
    return f".. autodata:: {name}\n   :no-value:"


def _methods(member: type) -> list[str]:
    """Return what a class adds to its parents: what torch or Lightning call is documented there."""
    parents = {name for parent in member.__mro__[1:] for name in vars(parent)}
    kinds = (FunctionType, property, classmethod, staticmethod)
    own = {name for name, value in vars(member).items() if isinstance(value, kinds)}
    return [name for name in vars(member) if name in own - parents and not name.startswith("_")]


def _rst(room: ModuleType, text: str) -> str:
    """Return a block of reStructuredText about names of a room."""
    return f"\n```{{eval-rst}}\n.. currentmodule:: {room.__name__}\n\n{text}\n```\n"


def _indented(lines: list[str]) -> list[str]:
    return [f"   {line}" for line in lines]


def _linked(text: str) -> str:
    """Make links of the identifiers of papers."""
    return _ARXIV.sub(r"`arXiv:\1 <https://arxiv.org/abs/\1>`__", text)


def _prepare_docstring(
    app: Sphinx, what: str, name: str, member: Any, options: object, lines: list[str]
) -> None:
    """Link papers and keep the lines of formulas; a constant gets its values for a docstring."""
    lines[:] = [_values(member)] if what == "data" else _with_blocks(map(_linked, lines))


def _with_blocks(lines: Iterable[str]) -> list[str]:
    """Mark indented blocks below a paragraph, which are formulas, as literal."""
    marked: list[str] = []
    above = ""
    for line in lines:
        below_text = above[:1].strip() and not above.startswith("..") and not above.endswith("::")
        if line.startswith("    ") and not marked[-1] and below_text:
            marked += ["::", ""]
        marked.append(line)
        above = line or above
    return marked


def _values(member: Iterable[object]) -> str:
    """Return what is in a constant: names as they are, objects by their class."""
    names = [x if isinstance(x, str) else type(x).__name__ for x in member]
    names = sorted(names) if isinstance(member, Set) else names
    return ", ".join(f"``{name}``" for name in names)


def _as_it_is(
    inliner: Inliner, match: re.Match[str], line: int
) -> tuple[str, list[nodes.Node], str, list[nodes.system_message]]:
    """Take what looks like the start of markup for text."""
    end = match.end()
    return match.string[:end], [], match.string[end:], []


def setup(app: Sphinx) -> dict[str, Any]:
    """Connect to Sphinx."""
    app.connect("source-read", _add_reference)
    app.connect("autodoc-process-docstring", _prepare_docstring, priority=400)  # before napoleon
    # In docstrings |x| is an absolute value and x_ an index or a name: nothing is substituted, and
    # nothing is referred to by such a name.
    for start in ("|", "_", "__"):
        Inliner.dispatch[start] = _as_it_is
    return {"parallel_read_safe": True, "parallel_write_safe": True}
