"""Settings of the documentation, which ``make docs`` builds from the Markdown and the docstrings.

The source directory is the root of the repository, so that a relative link leads to the same page
on a code host and in the site.
"""

import sys
from importlib.metadata import version as version_of
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "_site"))

project = "lightning_ext"
version = release = version_of("lightning_ext")
extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "mathml",
    "rooms",
]

root_doc = "docs/index"
include_patterns = ["*.md", "docs/**.md", "examples/**/README.md"]
exclude_patterns = [".*", "build", "dist", "lightning_ext", "tests", "benchmarks", "**/__pycache__"]
templates_path = ["_site"]

# Anchors are those of code hosts; a link to one that is missing is a warning, and so an error.
myst_heading_anchors = 4
# Blocks without a language are formulas and text, not Python.
highlight_language = "text"
# Dashes only: a quoted value is to be copied as it stands.
smartquotes_action = "De"

autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_typehints_format = "short"
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 88
napoleon_use_ivar = True
napoleon_use_rtype = False
add_module_names = False
toc_object_entries = False  # the table of a room lists them

html_theme = "furo"
html_title = f"lightning_ext {release}"
html_additional_pages = {"index": "to_first_page.html"}
html_copy_source = False
html_show_copyright = False
html_math_renderer = "mathml"
