"""What holds for every registered data set, without its files."""

from __future__ import annotations

import subprocess
import sys

import pytest

from lbzoo.data.base import DataFacts
from lbzoo.errors import DataError
from lbzoo.registry import data
from lbzoo.signatures import REQUIRED

NAMES = data.names()


@pytest.mark.parametrize("name", NAMES)
def test_options_are_keywords_with_defaults(name: str) -> None:
    entry = data.entry(name)
    assert entry.first_line
    assert not [option for option in (entry.options or {}).values() if option.default is REQUIRED]


@pytest.mark.parametrize("name", NAMES)
def test_nominal_facts_without_files(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LBZOO_IMAGENET", "/nowhere")
    facts = data.get(name)().facts()
    assert isinstance(facts, DataFacts)
    assert facts.num_train > 0
    assert facts.num_val > 0


@pytest.mark.parametrize("name", ["imagenet", "cifar10", "mnist"])
def test_a_folder_that_the_system_refuses(name: str) -> None:
    """As one without permission, which an administrator would not be refused."""
    with pytest.raises(DataError, match=r"cannot be used:\n  .*: File name too long\nSet data.root="):
        data.get(name)(root="/" + 300 * "x").prepare()
    with pytest.raises(DataError, match="no such folder"):
        data.get(name)(root="~nobody-of-this-name/data").prepare()


def test_facts_need_no_heavy_library() -> None:
    """`lbzoo check` asks every data set of a recipe for its facts, and should be done in a second."""
    code = (
        "import sys; from lbzoo.registry import data\n"
        "for name in data.names(): data.get(name)().facts()\n"
        "print(*{'torch', 'torchvision', 'sklearn', 'timm', 'PIL', 'lightning'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.split() == []


def test_imagenet_is_nominal() -> None:
    assert data.get("imagenet")().facts() == DataFacts(1281167, 50000, 1000, (3, 224, 224), "images")
