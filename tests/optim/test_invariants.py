"""What every optimizer of ours holds to, whatever its rule."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from torch import nn

from lbzoo import registry
from lbzoo.errors import UsageError
from lbzoo.optim import create_optimizer, get_optimizer_info, list_optimizers
from lbzoo.optim.torch_native import __name__ as torch_native

RULES = [name for name in list_optimizers("[!v]*") if registry.optimizers.entry(name).module != torch_native]
# The wrapper around one of ours, one of torch's, and one that makes its state in the constructor is enough.
OWN_STATE = [name for name in RULES if not name.startswith("larc_")] + ["larc_lamb"]
OURS = [*OWN_STATE, "larc_adamw", "larc_adagrad"]


def make_params(dtype: torch.dtype = torch.float32, shapes=((6, 4), (5,), (), (1,))) -> list[nn.Parameter]:
    torch.manual_seed(0)
    return [nn.Parameter(torch.randn(shape).to(dtype)) for shape in shapes]


def set_gradients(params, seed: int = 1) -> None:
    generator = torch.Generator().manual_seed(seed)
    for param in params:
        param.grad = torch.randn(param.shape, generator=generator).to(param.dtype)


def steps(optimizer, params, count: int, first_seed: int = 1) -> list[torch.Tensor]:
    for seed in range(first_seed, first_seed + count):
        set_gradients(params, seed)
        optimizer.step()
    return [param.detach().clone() for param in params]


def test_the_list_of_ours_is_the_designs():
    expected = {"bnadamw", "lamb", "lans", "lars", "lars2020", "nlamb", "nnlamb", "novograd"}
    assert expected <= set(OURS)


@pytest.mark.parametrize("name", OURS)
def test_gradients_are_left_as_they_are(name):
    params = make_params()
    optimizer = create_optimizer(params, name, lr=0.1)
    for track in (False, True):
        optimizer.track_layer_stats = track
        set_gradients(params)
        before = [(param.grad, param.grad.clone()) for param in params]
        optimizer.step()
        for param, (object_before, values) in zip(params, before, strict=True):
            assert param.grad is object_before
            assert torch.equal(param.grad, values)


@pytest.mark.parametrize("name", OURS)
def test_the_closure_runs_first_with_gradients_enabled(name):
    with_closure, without = make_params(), make_params()
    x = torch.ones(4)

    def loss_of(params):
        return (params[0] @ x).square().sum() + sum(param.square().sum() for param in params[1:])

    optimizer = create_optimizer(with_closure, name, lr=0.1)

    def closure():
        optimizer.zero_grad()
        loss = loss_of(with_closure)
        loss.backward()
        return loss

    other = create_optimizer(without, name, lr=0.1)
    for _ in range(3):
        expected = loss_of(without)
        other.zero_grad()
        expected.backward()
        other.step()
        assert torch.equal(optimizer.step(closure), expected)
    assert all(torch.equal(*pair) for pair in zip(with_closure, without, strict=True))


@pytest.mark.parametrize("name", OWN_STATE)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_state_of_low_precision_parameters_is_float32_also_after_loading(name, dtype):
    params = make_params(dtype)
    optimizer = create_optimizer(params, name, lr=0.1)
    steps(optimizer, params, 2)
    loaded = create_optimizer([param.detach().clone().requires_grad_() for param in params], name, lr=0.1)
    loaded.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for one, other in zip(params, loaded.param_groups[0]["params"], strict=True):
        for key, value in optimizer.state[one].items():
            assert value.dtype == torch.float32, key
            assert loaded.state[other][key].dtype == torch.float32, key
            assert torch.equal(value, loaded.state[other][key]), key
    expected = steps(optimizer, params, 2, first_seed=7)
    assert all(map(torch.equal, expected, steps(loaded, loaded.param_groups[0]["params"], 2, first_seed=7)))


@pytest.mark.parametrize("name", OWN_STATE)
def test_a_bfloat16_step_is_the_float32_step_rounded_once(name):
    low = make_params(torch.bfloat16)
    full = [nn.Parameter(param.detach().float()) for param in low]
    optimizers = [create_optimizer(params, name, lr=0.1) for params in (low, full)]
    set_gradients(low)
    for one, other in zip(low, full, strict=True):
        other.grad = one.grad.float()
    for optimizer in optimizers:
        optimizer.step()
    assert all(torch.equal(one, other.bfloat16()) for one, other in zip(low, full, strict=True))


@pytest.mark.parametrize("name", OURS)
def test_all_state_is_made_at_the_first_step(name):
    params = make_params()
    optimizer = create_optimizer(params, name, lr=0.1)
    steps(optimizer, params, 1)
    keys = [set(optimizer.state[param]) for param in params]
    steps(optimizer, params, 3)
    assert [set(optimizer.state[param]) for param in params] == keys
    assert all(keys)


@pytest.mark.parametrize("name", OURS)
def test_zero_and_missing_gradients(name):
    """A step with gradients of zero is how checkpoints are loaded; a parameter without gradient is left alone."""
    params = make_params()
    optimizer = create_optimizer(params, name, lr=0.1)
    optimizer.step()
    assert not any(optimizer.state[param].get("exp_avg") is not None for param in params)
    for param in params:
        param.grad = torch.zeros_like(param)
    params[1].grad = None
    kept = params[1].detach().clone()
    optimizer.step()
    assert all(param.isfinite().all() for param in params)
    assert torch.equal(params[1], kept)
    assert all(value.isfinite().all() for param in params for value in optimizer.state[param].values())
    steps(optimizer, params, 2)
    assert all(param.isfinite().all() for param in params)


def test_novograd_without_eps_survives_gradients_of_zero():
    params = make_params()
    optimizer = create_optimizer(params, "novograd", lr=0.1, eps=0.0)
    for param in params:
        param.grad = torch.zeros_like(param)
    optimizer.step()
    assert all(param.isfinite().all() for param in params)


@pytest.mark.parametrize("name", OURS)
def test_nan_stays_in_its_layer(name):
    clean, spoilt = make_params(), make_params()
    optimizers = [create_optimizer(params, name, lr=0.1, weight_decay=0.01) for params in (clean, spoilt)]
    for params, optimizer in zip((clean, spoilt), optimizers, strict=True):
        set_gradients(params)
        if params is spoilt:
            params[0].grad[0, 0] = math.nan
        optimizer.step()
    assert spoilt[0].isnan().any()
    assert all(torch.equal(one, other) for one, other in zip(clean[1:], spoilt[1:], strict=True))


@pytest.mark.parametrize("name", OURS)
def test_resuming_gives_the_same_steps(name):
    params = make_params()
    optimizer = create_optimizer(params, name, lr=0.1)
    steps(optimizer, params, 3)
    copies = {
        "state_dict": create_optimizer([param.detach().clone().requires_grad_() for param in params], name, lr=0.5),
        "deepcopy": copy.deepcopy(optimizer),
        "pickle": pickle.loads(pickle.dumps(optimizer)),
    }
    copies["state_dict"].load_state_dict(copy.deepcopy(optimizer.state_dict()))
    expected = steps(optimizer, params, 3, first_seed=10)
    for way, other in copies.items():
        got = steps(other, other.param_groups[0]["params"], 3, first_seed=10)
        assert all(map(torch.equal, expected, got)), way


@pytest.mark.parametrize("name", OURS)
def test_the_learning_rate_may_be_a_tensor_and_a_scheduler_moves_it(name):
    number, tensor = make_params(), make_params()
    optimizers = [create_optimizer(number, name, lr=0.1), create_optimizer(tensor, name, lr=torch.tensor(0.1))]
    schedulers = [torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step) for optimizer in optimizers]
    for seed in range(3):
        for params, optimizer, scheduler in zip((number, tensor), optimizers, schedulers, strict=True):
            steps(optimizer, params, 1, first_seed=seed)
            scheduler.step()
    for one, other in zip(number, tensor, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)
    assert isinstance(optimizers[1].param_groups[0]["lr"], torch.Tensor)


@pytest.mark.parametrize("name", [*OWN_STATE, "larc_adamw"])
def test_parameters_may_be_swapped_after_construction(name):
    """As accelerate does when it shards: the optimizer must not hold what it was built with."""
    first, second = make_params(), make_params()
    swapped, direct = create_optimizer(first, name, lr=0.1), create_optimizer(second, name, lr=0.1)
    third = make_params()
    swapped.param_groups[0]["params"] = third
    assert all(map(torch.equal, steps(swapped, third, 2), steps(direct, second, 2)))


@pytest.mark.parametrize("name", OURS)
def test_meta_parameters_step(name):
    params = [nn.Parameter(torch.empty(shape, device="meta")) for shape in ((6, 4), (5,))]
    for param in params:
        param.grad = torch.empty_like(param)
    optimizer = create_optimizer(params, name, lr=0.1)
    for track in (False, True):
        optimizer.track_layer_stats = track
        optimizer.step()
    floats = sum(value.numel() for param in params for value in optimizer.state[param].values() if value.ndim)
    per_param = get_optimizer_info(name).state_per_param
    assert floats == per_param * sum(param.numel() for param in params)


@pytest.mark.parametrize("name", OWN_STATE)
def test_bytes_of_state_are_those_the_papers_claim(name):
    params = make_params(shapes=((100, 100), (1000,)))
    optimizer = create_optimizer(params, name, lr=0.1)
    steps(optimizer, params, 1)
    held = sum(value.numel() * value.element_size() for state in optimizer.state.values() for value in state.values())
    elements = sum(param.numel() for param in params)
    expected = {"novograd": 1, "lars": 1, "lars2020": 1}.get(name, 2)
    assert get_optimizer_info(name).state_per_param == expected
    assert 4 * expected * elements <= held <= 4 * expected * elements + 8 * len(params)


@pytest.mark.parametrize("name", OWN_STATE)
def test_a_compiled_step_equals_the_eager_one(name):
    eager, compiled = make_params(), make_params()
    optimizers = [create_optimizer(params, name, lr=torch.tensor(0.1)) for params in (eager, compiled)]
    step = torch.compile(optimizers[1].step, backend="eager")
    for seed in range(3):
        for params, take in ((eager, optimizers[0].step), (compiled, step)):
            set_gradients(params, seed)
            take()
    for one, other in zip(eager, compiled, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", OURS)
def test_a_gradient_scaler_changes_nothing_but_skips_overflow(name):
    plain, scaled = make_params(), make_params()
    one, other = create_optimizer(plain, name, lr=0.1), create_optimizer(scaled, name, lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for seed in range(3):
        steps(one, plain, 1, first_seed=seed)
        set_gradients(scaled, seed)
        scaler.scale(torch.ones(1))  # sets the scaler up
        for param in scaled:
            param.grad.mul_(scaler.get_scale())
        scaler.step(other)
        scaler.update()
    for a, b in zip(plain, scaled, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
    kept = [param.detach().clone() for param in scaled]
    state = copy.deepcopy(other.state_dict()["state"])
    set_gradients(scaled)
    scaled[2].grad.fill_(math.inf)
    scaler.step(other)
    scaler.update()
    assert all(map(torch.equal, kept, scaled))
    assert str(other.state_dict()["state"]) == str(state)


@pytest.mark.parametrize("name", OURS)
def test_scale_and_overflow_set_on_the_optimizer_are_honoured(name):
    plain, scaled = make_params(), make_params()
    one, other = create_optimizer(plain, name, lr=0.1), create_optimizer(scaled, name, lr=0.1)
    steps(one, plain, 1)
    set_gradients(scaled)
    for param in scaled:
        param.grad.mul_(64)
    other.grad_scale, other.found_inf = torch.tensor(64.0), torch.tensor(0.0)
    other.step()
    for a, b in zip(plain, scaled, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
    kept = [param.detach().clone() for param in scaled]
    other.found_inf = torch.tensor(1.0)
    other.step()
    assert all(map(torch.equal, kept, scaled))


@pytest.mark.parametrize("name", OURS)
def test_sparse_gradients_are_refused_by_name(name):
    embedding = nn.Embedding(5, 3, sparse=True)
    embedding(torch.tensor([1, 2])).sum().backward()
    optimizer = create_optimizer(embedding, name, lr=0.1)
    with pytest.raises(UsageError, match=r"weight has a sparse gradient.*SparseAdam"):
        optimizer.step()


@pytest.mark.parametrize("name", [*OURS, "vr_sgd", "vr_lamb"])
def test_complex_parameters_are_refused_by_name(name):
    module = nn.Module()
    module.register_parameter("phase", nn.Parameter(torch.ones(3, dtype=torch.complex64)))
    with pytest.raises(UsageError, match="phase is complex"):
        create_optimizer(module, name, lr=0.1)


BAD = {
    "lr": [-0.1, math.nan, math.inf, "fast", torch.ones(2), None],
    "betas": [(1.0, 0.9), (0.9, -0.1), (0.9, math.nan), 0.9, (0.9,)],
    "momentum": [1.0, -0.5, math.nan],
    "eps": [-1e-8, math.nan],
    "norm_eps": [-1.0],
    "weight_decay": [-0.1, math.nan, math.inf],
    "trust_coefficient": [0.0, -1.0, math.nan],
    "norm_order": [3, 0, "inf"],
    "weight_norm_range": [(2.0, 1.0), (-1.0, 1.0), 3.0],
    "nesterov": ["third", 2],
    "adapt": [1, "yes"],
    "bias_correction": [None],
    "normalize_grad": [0],
    "amsgrad": ["no"],
    "ema": [2],
    "decoupled": [1.0],
    "eps_in_root": [None],
    "lr_in_momentum": ["in"],
    "clip": [0.5],
    "compile": [1],
}


@pytest.mark.parametrize(
    ("name", "option"),
    [(name, option) for name in RULES if not name.startswith("larc_") for option in registry.optimizers.options(name)],
)
def test_options_out_of_range_are_refused_by_name(name, option):
    for value in BAD[option]:
        with pytest.raises(UsageError, match=option):
            create_optimizer(make_params(), name, **{option: value})
        first, *rest = make_params()
        groups = [{"params": first}, {"params": rest, option: value}]
        with pytest.raises(UsageError, match=rf"group 1: {option} must be"):
            create_optimizer(groups, name)


@pytest.mark.parametrize("name", list_optimizers("larc_*"))
def test_nan_is_refused_by_torchs_optimizers_too(name):
    name = name.removeprefix("larc_")
    for option in {"lr", "eps", "weight_decay", "momentum", "betas"} & registry.optimizers.options(name).keys():
        value = (0.9, math.nan) if option == "betas" else math.nan
        with pytest.raises(
            UsageError, match="[Bb]eta" if option == "betas" else option.replace("lr", "lr|learning rate")
        ):
            create_optimizer(make_params(), name, **{option: value})


def test_the_coefficient_of_larc_is_checked():
    for value in BAD["trust_coefficient"]:
        with pytest.raises(UsageError, match="trust_coefficient must be"):
            create_optimizer(make_params(), "larc_adam", trust_coefficient=value)


def test_a_refused_group_leaves_the_optimizer_as_it_was():
    first, *rest = make_params()
    optimizer = create_optimizer([first], "lamb")
    with pytest.raises(UsageError):
        optimizer.add_param_group({"params": rest, "lr": -1.0})
    with pytest.raises(UsageError):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2, dtype=torch.complex64))]})
    assert len(optimizer.param_groups) == 1
    optimizer.add_param_group({"params": rest, "lr": 0.2})
    assert [group["lr"] for group in optimizer.param_groups] == [1e-3, 0.2]


@pytest.mark.parametrize("name", ["lamb", "larc_sgd", "vr_sgd"])
def test_a_parameter_that_zero_has_partitioned_is_refused_by_name(name):
    model = nn.Linear(3, 2)
    model.weight.ds_id = 0
    with pytest.raises(UsageError, match=r"weight is partitioned by DeepSpeed ZeRO: .*borders are lost.*fully_shard"):
        create_optimizer(model, name)


@pytest.mark.parametrize("name", ["lamb", "larc_sgd"])
def test_flat_buffers_in_the_place_of_named_parameters_are_refused(name):
    model = nn.Linear(3, 2)
    optimizer = create_optimizer(model, name)
    flat = nn.Parameter(torch.zeros(8))
    flat.grad = torch.ones(8)
    optimizer.param_groups[0]["params"] = [flat]
    with pytest.raises(UsageError, match="2 names for 1 parameters"):
        optimizer.step()
