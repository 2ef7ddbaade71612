"""Parameter groups from rules, and the errors of rules that mean nothing."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lbzoo.errors import UsageError
from lbzoo.optim import create_optimizer
from lbzoo.param_groups import build_param_groups, check_rules


@pytest.fixture
def model() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2))


def group_of(optimizer: torch.optim.Optimizer, name: str) -> dict:
    return next(group for group in optimizer.param_groups if name in group["param_names"])


def test_rules_select_by_glob_and_ndim_and_the_later_wins_key_by_key(model):
    optimizer = create_optimizer(
        model,
        "adamw",
        weight_decay=0.1,
        param_rules=[
            {"ndim": 1, "weight_decay": 0.0, "eps": 1e-3},
            {"match": ["0.*", "2.bias"], "eps": 1e-4},
            {"match": "2.*", "ndim": [0, 2], "betas": (0.5, 0.6)},
        ],
    )
    settings = {
        name: (group["weight_decay"], group["eps"], group["betas"])
        for group in optimizer.param_groups
        for name in group["param_names"]
    }
    usual = (0.9, 0.999)
    assert settings == {
        "0.weight": (0.1, 1e-4, usual),
        "0.bias": (0.0, 1e-4, usual),
        "1.weight": (0.0, 1e-3, usual),
        "1.bias": (0.0, 1e-3, usual),
        "2.weight": (0.1, 1e-8, (0.5, 0.6)),
        "2.bias": (0.0, 1e-4, usual),
    }
    assert len(optimizer.param_groups) == 4  # equal settings share a group


def test_names_follow_the_parameters_into_their_groups(model):
    optimizer = create_optimizer(model, "sgd", param_rules=[{"match": "*.bias", "weight_decay": 0.0}])
    named = dict(model.named_parameters())
    for group in optimizer.param_groups:
        assert all(named[name] is tensor for name, tensor in zip(group["param_names"], group["params"], strict=True))


def test_lr_scale_multiplies_the_learning_rate_once_and_stays(model):
    optimizer = create_optimizer(model, "adam", lr=0.2, param_rules=[{"match": "0.*", "lr_scale": 0.25}])
    assert group_of(optimizer, "0.weight")["lr"] == pytest.approx(0.05)
    assert group_of(optimizer, "0.weight")["lr_scale"] == 0.25
    assert group_of(optimizer, "2.weight")["lr"] == 0.2
    assert group_of(optimizer, "2.weight")["lr_scale"] == 1.0


def test_lr_scale_of_a_tensor_learning_rate(model):
    optimizer = create_optimizer(
        model, "adam", lr=torch.tensor(0.2), param_rules=[{"match": "0.*", "lr_scale": 0.25, "lr": torch.tensor(0.4)}]
    )
    assert float(group_of(optimizer, "0.weight")["lr"]) == pytest.approx(0.1)
    assert float(group_of(optimizer, "2.weight")["lr"]) == pytest.approx(0.2)


def test_a_rule_that_matches_nothing_is_a_warning_that_names_it(model):
    with pytest.warns(UserWarning, match=r"no parameter matches match='\*\.gamma', ndim=1"):
        create_optimizer(model, "sgd", param_rules=[{"match": "*.gamma", "ndim": 1, "weight_decay": 0.0}])


@pytest.mark.parametrize("form", ["module", "named", "pairs in groups", "names in groups"])
def test_every_form_with_names_gives_the_same_groups(model, form):
    named = list(model.named_parameters())
    target = {
        "module": model,
        "named": model.named_parameters(),
        "pairs in groups": [{"params": named}],
        "names in groups": [{"params": [tensor for _, tensor in named], "param_names": [name for name, _ in named]}],
    }[form]
    optimizer = create_optimizer(target, "sgd", param_rules=[{"match": "*.bias", "weight_decay": 0.5}])
    assert [group["param_names"] for group in optimizer.param_groups] == [
        ["0.weight", "1.weight", "2.weight"],
        ["0.bias", "1.bias", "2.bias"],
    ]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.0, 0.5]


def test_parameters_and_groups_without_names(model):
    first, *rest = model.parameters()
    optimizer = create_optimizer([{"params": first, "lr": 0.5}, {"params": rest}], "sgd", lr=0.1)
    assert [group["lr"] for group in optimizer.param_groups] == [0.5, 0.1]
    assert "param_names" not in optimizer.param_groups[0]
    assert len(create_optimizer(model.parameters(), "sgd").param_groups[0]["params"]) == 6
    by_ndim = create_optimizer(model.parameters(), "sgd", param_rules=[{"ndim": 1, "lr": 0.3}])
    assert [group["lr"] for group in by_ndim.param_groups] == [1e-3, 0.3]


def test_a_rule_overrides_the_option_of_the_group_it_reaches_into(model):
    groups = [{"params": list(model.named_parameters()), "weight_decay": 0.1}]
    optimizer = create_optimizer(groups, "sgd", param_rules=[{"match": "2.*", "weight_decay": 0.3}])
    assert group_of(optimizer, "0.weight")["weight_decay"] == 0.1
    assert group_of(optimizer, "2.weight")["weight_decay"] == 0.3


def test_names_are_needed_for_a_rule_by_name(model):
    with pytest.raises(UsageError, match=r"param_rules\[0\].match needs the parameters' names"):
        create_optimizer(model.parameters(), "sgd", param_rules=[{"match": "*", "lr": 0.1}])


def test_a_parameter_given_twice_is_refused_by_its_names(model):
    weight = model[0].weight
    with pytest.raises(UsageError, match=r"parameter head\.weight is given twice, first as 0\.weight"):
        create_optimizer([("0.weight", weight), ("head.weight", weight)], "sgd")
    with pytest.raises(UsageError, match="parameter number 1 is given twice, first as number 0"):
        create_optimizer([{"params": [weight]}, {"params": [weight]}], "sgd")


def test_tied_weights_of_a_module_are_one_parameter(model):
    model[2] = model[0]
    assert len(create_optimizer(model, "sgd").param_groups[0]["params"]) == 4


@pytest.mark.parametrize("name", ["adamw", "timm:adamw", "torch:AdamW", "pytorch_optimizer:Lamb"])
def test_a_mistyped_group_key_is_refused_also_where_the_class_would_swallow_it(model, name):
    rule = [{"match": "*.bias", "weight_decay": 0.0}, {"match": "*.bias", "weight_decy": 0.0}]
    with pytest.raises(UsageError, match=r"param_rules\[1\]: no option 'weight_decy'; did you mean 'weight_decay'"):
        create_optimizer(model, name, param_rules=rule)
    with pytest.raises(UsageError, match="parameter group 0: no option 'weight_decy'; did you mean 'weight_decay'"):
        create_optimizer([{"params": model.parameters(), "weight_decy": 0.0}], name)


def test_an_option_of_the_constructor_that_is_no_group_option_is_refused():
    class Fixed(torch.optim.SGD):
        def __init__(self, params, lr: float = 0.1, warm: int = 3):
            self.warm = warm
            super().__init__(params, lr=lr)

    from lbzoo import registry
    from lbzoo.optim import register_optimizer

    register_optimizer("fixed_for_this_test")(Fixed)
    try:
        with pytest.raises(UsageError, match="cannot have a 'warm' of its own"):
            create_optimizer(nn.Linear(2, 2), "fixed_for_this_test", param_rules=[{"ndim": 1, "warm": 2}])
    finally:
        del registry.optimizers._added["fixed_for_this_test"]


def test_every_mistake_in_the_rules_is_listed_at_once():
    rules = [
        {"match": "*"},
        {"weight_decay": 0.0},
        {"match": 3, "lr": 0.1},
        {"ndim": "1", "lr": 0.1},
        {"ndim": 1, "lrscale": 0.1},
        {"ndim": 1, "lr_scale": -1},
        "no mapping",
    ]
    with pytest.raises(UsageError) as raised:
        check_rules(rules, ["lr", "weight_decay"])
    lines = str(raised.value).splitlines()
    assert [line.split(":")[0] for line in lines] == [
        "param_rules[0]",
        "param_rules[1]",
        "param_rules[2].match",
        "param_rules[3].ndim",
        "param_rules[4]",
        "param_rules[5].lr_scale",
        "param_rules[6]",
    ]
    assert "did you mean 'lr_scale'" in lines[4]


def test_what_is_no_parameter_is_refused():
    with pytest.raises(UsageError, match="not a str"):
        build_param_groups(["weight"])
