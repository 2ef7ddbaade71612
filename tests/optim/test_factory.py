"""Any optimizer by its name, and errors that say what was meant."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import nn

from lbzoo import registry
from lbzoo.errors import UnknownNameError, UsageError
from lbzoo.optim import create_optimizer, get_optimizer_info, list_optimizers, optimizer_options, register_optimizer
from lbzoo.optim.lamb import Lamb

NATIVE = {
    *("sgd", "momentum", "nesterov", "adagrad", "adam", "adamw", "nadam"),
    *("lars", "lars2020", "lamb", "nlamb", "nnlamb", "lans", "bnadamw", "novograd"),
}


@pytest.fixture
def model() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))


@pytest.fixture
def registered():
    """Names registered by a test, taken out again."""
    before = dict(registry.optimizers._added)
    yield registry.optimizers
    registry.optimizers._added.clear()
    registry.optimizers._added.update(before)


def test_the_names_of_the_design_exist():
    assert set(list_optimizers()) >= NATIVE
    assert set(list_optimizers("larc_*")) == {f"larc_{name}" for name in NATIVE - {"lars"}}


@pytest.mark.parametrize("name", [name for name in list_optimizers() if not name.startswith("vr_")])
def test_every_name_builds_and_steps_with_its_defaults(name, model):
    optimizer = create_optimizer(model, name)
    assert isinstance(optimizer, torch.optim.Optimizer)
    model(torch.randn(5, 3)).square().sum().backward()
    before = [param.detach().clone() for param in model.parameters()]
    optimizer.step()
    assert any(not torch.equal(*pair) for pair in zip(before, model.parameters(), strict=True))
    assert all(param.isfinite().all() for param in model.parameters())


@pytest.mark.parametrize("name", [name for name in list_optimizers() if not name.startswith("vr_")])
def test_info_and_options_agree_with_what_is_built(name, model):
    info = get_optimizer_info(name)
    assert info.name == name
    assert info.description.endswith(".")
    options = optimizer_options(name)
    assert dict(info.defaults) == {key: option.default for key, option in options.items()}
    group = create_optimizer(model, name).param_groups[0]
    for key, default in info.defaults.items():
        assert group[key] == default, key


def test_info_says_where_a_rule_comes_from():
    info = get_optimizer_info("nlamb")
    assert (info.paper, info.equation, info.aliases) == ("arXiv 1904.00962", "algorithm 3", ("n-lamb",))
    assert (info.lr_scaling, info.state_per_param, info.layerwise) == ("sqrt", 2, True)
    larc = get_optimizer_info("larc_adam")
    assert (larc.paper, larc.state_per_param, larc.layerwise) == ("arXiv 1708.03888", 2, True)
    assert "around adam" in larc.description
    assert not get_optimizer_info("adam").layerwise


def test_an_alias_names_the_same_optimizer(model):
    assert create_optimizer(model, "nn-lamb").param_groups[0]["nesterov"] == "both"
    assert get_optimizer_info("n-lamb").name == "nlamb"


def test_names_and_options_are_known_without_torch():
    program = (
        "import sys, lbzoo; from lbzoo.optim import optimizer_options as options;"
        "assert 'larc_lamb' in lbzoo.list_optimizers();"
        "assert {'betas', 'trust_coefficient'} <= set(options('larc_lamb'));"
        "assert options('lamb')['lr'].annotation is float;"
        "assert lbzoo.get_optimizer_info('lans').layerwise;"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("timm:lamb", "timm.optim.lamb.Lamb"),
        ("timm:momentum", "torch.optim.sgd.SGD"),
        ("torch:AdamW", "torch.optim.adamw.AdamW"),
        ("torch.optim:RMSprop", "torch.optim.rmsprop.RMSprop"),
        ("pytorch_optimizer:Lamb", "pytorch_optimizer.optimizer.lamb.Lamb"),
    ],
)
def test_foreign_names(name, kind, model):
    optimizer = create_optimizer(model, name, lr=0.25, param_rules=[{"match": "*.bias", "weight_decay": 0.0}])
    assert f"{type(optimizer).__module__}.{type(optimizer).__qualname__}" == kind
    assert [group["param_names"] for group in optimizer.param_groups] == [
        ["0.weight", "1.weight"],
        ["0.bias", "1.bias"],
    ]
    assert optimizer.param_groups[0]["lr"] == 0.25
    assert get_optimizer_info(name).defaults["weight_decay"] == optimizer_options(name)["weight_decay"].default


def test_timms_own_defaults_are_kept(model):
    assert optimizer_options("timm:sgd")["nesterov"].default is True
    assert create_optimizer(model, "timm:sgd", lr=0.1, momentum=0.9).param_groups[0]["nesterov"] is True


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("lambb", "no optimizer named 'lambb'; did you mean 'lamb'?"),
        ("larc_lambb", "did you mean 'larc_lamb'?"),
        ("larc_lars", "no optimizer named 'larc_lars'"),
        ("timm:lambb", "no timm optimizer named 'lambb'"),
        ("torch:AdamV", "no optimizer in torch.optim named 'AdamV'; did you mean 'Adam"),
        ("torch:lr_scheduler", "no optimizer in torch.optim named 'lr_scheduler'"),
        ("no_such_package.there:Optimizer", "cannot import no_such_package.there"),
    ],
)
def test_an_unknown_name_is_answered_with_the_nearest(name, text, model):
    for call in (
        lambda: create_optimizer(model, name),
        lambda: optimizer_options(name),
        lambda: get_optimizer_info(name),
    ):
        with pytest.raises(UsageError) as raised:
            call()
        assert text in str(raised.value)


@pytest.mark.parametrize("name", ["lamb", "adamw", "larc_lamb", "timm:lamb", "torch:AdamW", "pytorch_optimizer:Lamb"])
def test_an_unknown_option_is_answered_with_the_nearest(name, model):
    with pytest.raises(UsageError, match="takes no option 'weight_decy'; did you mean 'weight_decay'"):
        create_optimizer(model, name, lr=0.1, weight_decy=0.1)


def test_all_wrong_options_are_named_at_once(model):
    with pytest.raises(UsageError) as raised:
        create_optimizer(model, "lamb", weight_decy=0.1, beta=0.9)
    assert "weight_decy" in str(raised.value)
    assert "'beta'" in str(raised.value)


def test_a_value_that_torch_refuses_is_an_error_of_usage(model):
    with pytest.raises(UsageError, match="optimizer 'adamw': Invalid learning rate: -1"):
        create_optimizer(model, "adamw", lr=-1.0)
    with pytest.raises(UsageError, match="empty parameter list"):
        create_optimizer([], "lamb")


@pytest.mark.parametrize("name", ["torch:Parameter", "builtins:print"])
def test_what_is_no_optimizer_is_refused(name, model, monkeypatch):
    monkeypatch.setattr(torch.optim, "Parameter", lambda params: torch.zeros(2), raising=False)
    with pytest.raises(UsageError, match=r"which is no torch\.optim\.Optimizer"):
        create_optimizer(model, name)


def test_registering_ones_own(model, registered):
    @register_optimizer("mine_for_this_test", paper="none", lr_scaling="sqrt", layerwise=True)
    class Mine(Lamb):
        """Mine."""

    @register_optimizer("needs_for_this_test")
    def needs(params, *, gain: float, lr: float = 0.1):
        return torch.optim.SGD(params, lr=gain * lr)

    assert isinstance(create_optimizer(model, "mine_for_this_test", lr=0.1), Mine)
    assert get_optimizer_info("mine_for_this_test").description == "Mine."
    assert "larc_mine_for_this_test" in list_optimizers()
    assert create_optimizer(model, "needs_for_this_test", gain=2.0).param_groups[0]["lr"] == 0.2
    with pytest.raises(UsageError, match="needs the option 'gain'"):
        create_optimizer(model, "needs_for_this_test")


def test_a_taken_name_is_refused(registered):
    with pytest.raises(UsageError, match=r"'lamb' is taken by .*lamb\.py"):

        @register_optimizer("lamb")
        class Mine(torch.optim.SGD):
            pass


def test_a_mistyped_field_of_the_registration_is_an_error():
    with pytest.raises(TypeError, match="lr_scalin"):
        register_optimizer("mine", lr_scalin="sqrt")


def test_a_class_that_passes_keywords_on_takes_its_parents_options(model, registered):
    @register_optimizer("heir_for_this_test")
    class Heir(torch.optim.SGD):
        def __init__(self, params, *, warm: int = 3, **others):
            self.warm = warm
            super().__init__(params, **others)

    assert {"warm", "momentum", "lr"} <= set(optimizer_options("heir_for_this_test"))
    assert create_optimizer(model, "heir_for_this_test", momentum=0.5, warm=2).warm == 2
    with pytest.raises(UsageError, match="did you mean 'momentum'"):
        create_optimizer(model, "heir_for_this_test", momentun=0.5)


def test_one_parameter_is_a_target_too():
    weight = nn.Parameter(torch.ones(3))
    assert create_optimizer(weight, "lamb").param_groups[0]["params"][0] is weight


def test_a_name_that_only_wraps_is_no_optimizer(model):
    with pytest.raises(UnknownNameError):
        create_optimizer(model, "larc_")


def test_a_module_that_lies_in_the_current_folder_is_pointed_out(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own_optimizers.py").write_text("from torch.optim import SGD as Mine\n")
    with pytest.raises(UsageError, match=r"own_optimizers\.py lies here: set PYTHONPATH=\."):
        optimizer_options("own_optimizers:Mine")
