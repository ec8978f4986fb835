"""Packages that the benchmarks put beside ours: whether they are there, and how they are read."""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from types import ModuleType
from typing import Any

# Those whose `__init__` needs torchvision, and which of their packages are read without it.
WITHOUT_INIT = {"timm": ("timm", "timm.optim", "timm.utils"), "open_clip": ("open_clip",)}
DISTRIBUTIONS = {"open_clip": "open_clip_torch"}  # where its name is not that of the package


def found_module(name: str) -> ModuleType:
    """Import a module; of some packages without their `__init__`, which needs torchvision."""
    for package in WITHOUT_INIT.get(name.partition(".")[0], ()):
        if package not in sys.modules:
            bare_package(package)
    return import_module(name)


def found_member(path: str) -> Any:
    """Import a member of a module by `package.module.member`."""
    module, _, name = path.rpartition(".")
    return getattr(found_module(module), name)


def bare_package(name: str) -> None:
    """Put a package in place whose modules can be imported, without running it."""
    spec = find_spec(name)
    if spec is None or spec.submodule_search_locations is None:
        raise ModuleNotFoundError(f"{name} is not installed")
    module = ModuleType(name)
    module.__path__ = list(spec.submodule_search_locations)
    module.__spec__ = spec
    sys.modules[name] = module


def present(package: str) -> bool:
    """Return whether a peer is installed."""
    return package in sys.modules or find_spec(package) is not None


def versions_of(*packages: str) -> dict[str, str]:
    """Return the versions of peers, `absent` of those that are not there."""
    return {x: version(DISTRIBUTIONS.get(x, x)) if present(x) else "absent" for x in packages}
