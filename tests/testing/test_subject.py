"""Naming an optimizer: by registered name, class, factory or file, and what is said of names that lead nowhere."""

from __future__ import annotations

import functools

import pytest
import torch

from lbzoo.errors import UnknownNameError, UsageError
from lbzoo.testing import check_optimizer, list_checks
from lbzoo.testing.example import Example
from lbzoo.testing.subject import LEARNING_RATE, Subject

MINE = '''
import torch
from lbzoo import register_optimizer

@register_optimizer("{name}")
class {name}(torch.optim.SGD):
    """Mine."""
    def __init__(self, params, *, lr: float = 0.1, momentum: float = 0.5):
        super().__init__(params, lr=lr, momentum=momentum)
'''


def write(tmp_path, name):
    """A plugin file; registered names are global, so every test takes another one."""
    path = tmp_path / "mine.py"
    path.write_text(MINE.format(name=name))
    return path


@pytest.mark.parametrize("name", ["adamw", "torch:AdamW", "torch.optim:AdamW", torch.optim.AdamW])
def test_names_and_classes(name):
    subject = Subject.resolve(name)
    optimizer = subject.build(Example())
    assert isinstance(optimizer, torch.optim.AdamW)
    assert optimizer.param_groups[0]["lr"] == LEARNING_RATE
    assert optimizer.param_groups[0]["param_names"][0] == "layers.embedding0.weight"
    assert subject.takes("betas")
    assert not subject.takes("momentum")


def test_given_options_win():
    subject = Subject.resolve("adamw", {"lr": 0.5, "eps": 1e-3})
    assert {"lr": 0.5, "eps": 1e-3}.items() <= subject.build(Example()).param_groups[0].items()
    assert subject.build(Example(), lr=0.25).param_groups[0]["lr"] == 0.25


@pytest.mark.parametrize(
    "make", [lambda: functools.partial(torch.optim.SGD, momentum=0.5), lambda: lambda p: torch.optim.SGD(p)]
)
def test_factories_that_only_this_process_has(make):
    subject = Subject.resolve(make())
    assert subject.reference is None
    assert isinstance(subject.build(Example()), torch.optim.SGD)
    (result,) = check_optimizer(make(), only="fsdp2_equals_one_process")
    assert result.status == "skipped"
    assert "cannot import it" in result.reason


def test_class_in_a_file(tmp_path):
    path = write(tmp_path, "MineInFile")
    subject = Subject.resolve(f"{path}:MineInFile")
    assert type(subject.build(Example())).__name__ == "MineInFile"
    assert subject.takes("momentum")


def test_file_may_be_relative(tmp_path, monkeypatch):
    write(tmp_path, "MineRelative")
    monkeypatch.chdir(tmp_path)
    assert Subject.resolve("./mine.py:MineRelative").takes("momentum")


def test_registered_name_in_a_file(tmp_path):
    path = write(tmp_path, "mine_registered")
    text = path.read_text().replace("class mine_registered", "class Other")
    path.write_text(text)
    assert type(Subject.resolve(f"{path}:mine_registered").build(Example())).__name__ == "Other"


@pytest.mark.dist
@pytest.mark.xdist_group("processes")
def test_class_in_a_file_is_checked_on_several_processes(tmp_path):
    path = write(tmp_path, "MineEverywhere")
    results = check_optimizer(f"{path}:MineEverywhere", only=["fsdp2*", "checkpoint*"])
    assert [(result.status, result.reason) for result in results] == [("passed", "")] * 4


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("adamww", "did you mean 'adamw'"),
        ("torch:AdamWW", "did you mean 'AdamW'"),
        ("./nowhere.py:Mine", "no file .*nowhere.py"),
        ("./nowhere.py", "add the optimizer in it"),
    ],
)
def test_names_that_lead_nowhere(name, message):
    with pytest.raises(UsageError, match=message):
        check_optimizer(name)


def test_file_without_the_name(tmp_path):
    path = write(tmp_path, "MineNamed")
    with pytest.raises(UsageError, match="did you mean 'MineNamed'"):
        check_optimizer(f"{path}:MinedName")


def test_file_that_fails(tmp_path):
    path = tmp_path / "broken.py"
    path.write_text("import torch\n1 / 0\n")
    with pytest.raises(UsageError, match="ZeroDivisionError"):
        check_optimizer(f"{path}:Mine")


def test_module_that_fails(tmp_path, monkeypatch):
    (tmp_path / "failing_optimizer.py").write_text("import torch\nclass Mine(\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(UsageError, match="importing 'failing_optimizer:Mine' failed: SyntaxError"):
        check_optimizer("failing_optimizer:Mine")
    with pytest.raises(UsageError, match=r"':Mine' is no class of a module; write package.module:Class"):
        check_optimizer(":Mine")


def test_a_file_is_called_as_the_user_called_it(tmp_path):
    path = write(tmp_path, "MineMistaken")
    with pytest.raises(UsageError, match=rf"^optimizer '{path}:MineMistaken' takes no option 'lrr'"):
        check_optimizer(f"{path}:MineMistaken", options={"lrr": 1})


def test_options_that_do_not_fit():
    with pytest.raises(UsageError, match="did you mean 'weight_decay'"):
        check_optimizer("adamw", options={"weigth_decay": 0.1})
    with pytest.raises(UsageError, match="beta"):
        check_optimizer("adamw", options={"betas": (2.0, 0.9)})


def test_selection_by_name_and_topic():
    assert [check.name for check in list_checks("closure")] == ["closure"]
    assert {check.topic for check in list_checks("state")} == {"state"}
    assert [check.name for check in list_checks(["*_shape", "closure"])] == ["closure", "layer_stats_shape"]
    with pytest.raises(UnknownNameError, match="did you mean 'closure'"):
        list_checks(["closure", "closur"])


def test_checks_leave_the_process_as_it_was():
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    with torch.no_grad():
        check_optimizer("adamw", only=["basic", "training"])
        assert not torch.is_grad_enabled()
    assert torch.equal(torch.rand(2), expected)
