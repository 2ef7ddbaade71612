"""Every layer-wise optimizer of the zoo, and the options that send it another way, against the whole kit."""

from __future__ import annotations

from typing import Any

import pytest

from lbzoo import registry
from lbzoo.testing import check_optimizer, list_checks

# The wrappers exist around every optimizer, and share the faults of torch's own (bf16 state).
OURS = [
    name
    for name in registry.optimizers.names()
    if registry.optimizers.entry(name).meta.get("layerwise") and not name.startswith(("larc_", "vr_"))
]
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    ("lamb", {"adapt": False, "bias_correction": False}),
    ("lamb", {"nesterov": "both", "norm_order": 1.0, "weight_decay": 0.0}),
    ("lamb", {"norm_order": float("inf"), "weight_norm_range": (0.1, 2.0)}),
    ("novograd", {"amsgrad": True, "ema": True}),
    ("novograd", {"decoupled": True, "eps_in_root": True, "weight_decay": 0.1}),
    ("lars", {"nesterov": True, "lr_in_momentum": False, "weight_decay": 0.1}),
    ("lars", {"clip": True, "momentum": 0.0}),
    ("lars2020", {"adapt": False}),
    ("lans", {"normalize_grad": False, "weight_decay": 0.0}),
    ("lans", {"adapt": False, "weight_norm_range": (0.1, 2.0)}),
    ("larc_lamb", {"trust_coefficient": 0.02}),
    ("larc_novograd", {}),
    ("vr_lamb", {}),
    ("vr_lars", {"gamma": 0.3, "beta3": 0.9}),
    ("vr_novograd", {"gsnr_cap": 1.0}),
]
ONE_PROCESS = [check.name for check in list_checks() if check.topic != "sharding"]


def faults(optimizer: str, options: dict[str, Any] | None = None, **selection: Any) -> list[str]:
    """What fails, with the reason."""
    results = check_optimizer(optimizer, options=options, **selection)
    return [f"{result.name}: {result.reason}" for result in results if result.status == "failed"]


def test_the_zoo_is_found():
    assert {"lamb", "nlamb", "nnlamb", "lans", "lars", "lars2020", "novograd", "bnadamw"} <= set(OURS)


@pytest.mark.parametrize("name", OURS)
def test_in_one_process(name):
    assert faults(name, only=ONE_PROCESS) == []


@pytest.mark.parametrize(
    ("name", "options"), VARIANTS, ids=lambda value: value if isinstance(value, str) else "-".join(value)
)
def test_variants_in_one_process(name, options):
    assert faults(name, options, only=ONE_PROCESS) == []


@pytest.mark.dist
@pytest.mark.xdist_group("processes")
@pytest.mark.parametrize("name", OURS)
def test_on_several_processes(name):
    assert faults(name, only="sharding") == []


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.xdist_group("processes")
@pytest.mark.parametrize(
    ("name", "options"), VARIANTS, ids=lambda value: value if isinstance(value, str) else "-".join(value)
)
def test_variants_on_several_processes(name, options):
    assert faults(name, options, only="sharding") == []


@pytest.mark.slow
@pytest.mark.parametrize(("name", "options"), [*((name, {}) for name in OURS), *VARIANTS])
def test_compiled(name, options):
    assert faults(name, options, only="torch_compile", slow=True) == []
