import math
import sys
from pathlib import Path

import pytest

from lightning_ext._require import require


def test_an_installed_module_is_returned() -> None:
    assert require("math", "none") is math


@pytest.mark.parametrize("module", ["no_such_package", "no_such_package.part"])
def test_a_missing_package_names_the_extra(module: str) -> None:
    with pytest.raises(ImportError, match=r'pip install "lightning_ext\[bnb\]"') as caught:
        require(module, "bnb")
    assert caught.value.name == "no_such_package"


def test_an_installed_package_that_lacks_a_module_raises_its_own_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken_package.py").write_text("import no_such_dependency")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="no_such_dependency") as caught:
        require("broken_package", "bnb")
    assert "lightning_ext" not in str(caught.value)
    assert "broken_package" not in sys.modules
