import ast
import importlib
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "lightning_ext"
SOURCES = sorted(PACKAGE.rglob("*.py"))
ROOMS = sorted(path.parent.name for path in PACKAGE.glob("*/__init__.py"))
PUBLIC_ROOMS = [room for room in ROOMS if not room.startswith("_")]
TEST_FILES = sorted((ROOT / "tests").rglob("test_*.py"))
# Private by name, shared by design.
OPEN_TO_TESTS = (
    "lightning_ext._lightning",
    "lightning_ext._require",
    "lightning_ext._strategy_names",
    "lightning_ext.kernels._triton",
    # Orders of actions, which are compared with torch's own.
    "lightning_ext.scaling._pipeline",
    # Parts that work together over ranks, devices or another package, each seen by itself.
    "lightning_ext.callbacks._memory",
    "lightning_ext.functional._updates",
    "lightning_ext.optim._low_bit",
    "lightning_ext.optim._low_rank",
    "lightning_ext.optim._offload",
    # Parts of strategies: a Trainer in several processes is too much for them.
    "lightning_ext.strategies._deepspeed",
    "lightning_ext.strategies._fsdp2",
    "lightning_ext.strategies._pipeline",
)


def loaded_modules(*modules: str) -> set[str]:
    code = f"import sys, {', '.join(modules)}; print(*sys.modules)"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    return set(done.stdout.split())


def imports(path: Path) -> set[str]:
    """Return the dotted names that a file imports from, at any depth of nesting."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return names


def is_private(name: str) -> bool:
    package, *parts = name.split(".")
    opened = any(name == prefix or name.startswith(f"{prefix}.") for prefix in OPEN_TO_TESTS)
    return package == "lightning_ext" and not opened and any(p.startswith("_") for p in parts[:-1])


def test_importing_every_room_loads_nothing_heavy() -> None:
    rooms = [f"lightning_ext.{room}" for room in ROOMS]
    extra = loaded_modules("lightning_ext", *rooms) - loaded_modules("lightning.pytorch")
    heavy = ("bitsandbytes", "deepspeed", "wandb", "triton", "lightning_ext.kernels._triton")
    assert extra.issuperset(["lightning_ext", *rooms])
    assert not [name for name in extra for h in heavy if name == h or name.startswith(f"{h}.")]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_only_the_kernels_folder_imports_triton(path: Path) -> None:
    assert "_triton" in path.parts or not any(
        name.split(".")[0] == "triton" for name in imports(path)
    )


@pytest.mark.parametrize("room", PUBLIC_ROOMS)
def test_a_room_lists_its_contents(room: str) -> None:
    module = importlib.import_module(f"lightning_ext.{room}")
    assert len(set(module.__all__)) == len(module.__all__)  # ruff sorts them
    assert all(hasattr(module, name) for name in module.__all__)
    assert module.__doc__ is not None
    assert len(module.__doc__.splitlines()) == 1


@pytest.mark.parametrize("room", PUBLIC_ROOMS)
def test_a_room_has_a_contract(room: str) -> None:
    assert (ROOT / "tests" / room / "test_all.py").exists()


@pytest.mark.parametrize("room", PUBLIC_ROOMS)
def test_files_of_a_room_are_private(room: str) -> None:
    assert not [p.name for p in (PACKAGE / room).glob("*") if p.name[0] != "_"]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_file_is_short(path: Path) -> None:
    limit = 400 if "_triton" in path.parts else 300
    assert len(path.read_text(encoding="utf-8").splitlines()) <= limit


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_rooms_import_rooms_and_not_their_files(path: Path) -> None:
    own = f"lightning_ext.{path.relative_to(PACKAGE).parts[0]}."
    shared = ("lightning_ext.functional.",) if "kernels" in path.parts else ()
    names = [name for name in imports(path) if is_private(name)]
    assert not [name for name in names if not name.startswith((own, *shared))]


@pytest.mark.parametrize("path", TEST_FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_tests_import_rooms_and_not_their_files(path: Path) -> None:
    assert not [name for name in imports(path) if is_private(name)]


@pytest.mark.parametrize(
    ("name", "private"),
    [
        ("lightning_ext.optim.BatchScaling", False),
        ("lightning_ext.optim._sgd.SGD", True),
        ("lightning_ext._lightning.view", False),
        ("lightning_ext._require.require", False),
        ("lightning_ext.strategies._fsdp2._units.find_units", False),
        ("lightning_ext.strategies._fsdp2_strategy.FSDP2Strategy", True),
        ("torch._utils.x", False),
    ],
)
def test_a_private_import_is_recognized(name: str, private: bool) -> None:
    assert is_private(name) is private


def test_the_import_contracts_name_every_room() -> None:
    config = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    contracts = {c["name"]: c for c in config["tool"]["importlinter"]["contracts"]}
    free_of_lightning = contracts["Lightning is unknown below _lightning"]["source_modules"]
    free_of_triton = contracts["Only kernels._triton imports triton"]["source_modules"]
    rooms = {f"lightning_ext.{room}" for room in ROOMS}
    above = {f"lightning_ext.{room}" for room in ("callbacks", "strategies", "_lightning")}
    assert rooms - above <= set(free_of_lightning)
    assert rooms - {"lightning_ext.kernels"} <= set(free_of_triton)
