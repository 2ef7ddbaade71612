"""Sharded steps: the same weights as one process, within the budget of collectives."""

from __future__ import annotations

import pytest
import sharding_jobs as jobs
import torch
from distributed import on_ranks

pytestmark = pytest.mark.dist

OPTIMIZERS = {
    "lamb": {"lr": 0.02},
    "nnlamb": {"lr": 0.02, "norm_order": float("inf")},
    "lans": {"lr": 0.02},
    "bnadamw": {"lr": 0.01},
    "lars": {"lr": 1.0, "trust_coefficient": 0.02, "weight_decay": 0.01},
    "lars2020": {"lr": 0.02},
    "novograd": {"lr": 0.01, "weight_decay": 0.01},
    "larc_novograd": {"lr": 0.01, "trust_coefficient": 0.02},
    "larc_adamw": {"lr": 0.01, "trust_coefficient": 0.02},
}
# all_reduces of a step: one exchange of norms, a second one where the gradient is normalised first.
BUDGET = {"lans": 2, "larc_novograd": 2}


@pytest.fixture(scope="module")
def alone():
    """One process on all the data: {(name, groups): result}, computed when asked for."""
    results = {}

    def result(name, groups=False):
        if (name, groups) not in results:
            results[name, groups] = jobs.train(None, name, OPTIMIZERS[name], groups)
        return results[name, groups]

    return result


def assert_same(result, expected):
    torch.testing.assert_close(result["params"], expected["params"], rtol=1e-6, atol=1e-6)
    names, values = result["stats"]
    expected_names, expected_values = expected["stats"]
    assert names == expected_names
    torch.testing.assert_close(values, expected_values, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_fsdp2_equals_one_process(name, world_size, alone):
    for result in on_ranks(world_size, jobs.train, "fsdp", name, OPTIMIZERS[name]):
        assert_same(result, alone(name))
        assert result["collectives"] == (BUDGET.get(name, 1) if world_size > 1 else 0)


@pytest.mark.parametrize("layout", ["hsdp", "mixed"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_replicas_count_once(name, layout, alone):
    for result in on_ranks(4 if layout == "hsdp" else 2, jobs.train, layout, name, OPTIMIZERS[name]):
        assert_same(result, alone(name))
        assert result["collectives"] == BUDGET.get(name, 1)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_several_groups_share_the_collective(name, alone):
    for result in on_ranks(2, jobs.train, "mixed", name, OPTIMIZERS[name], True):
        assert_same(result, alone(name, True))
        assert result["collectives"] == BUDGET.get(name, 1)
        assert result["collectives_with_stats"] <= BUDGET.get(name, 1) + 3


@pytest.mark.parametrize("name", ["lamb", "lans", "novograd"])
def test_a_rank_without_gradients_still_takes_part(name):
    """The exchange has the same length everywhere; where only rank 0 has a gradient, its shard alone makes the norm."""
    first, second = on_ranks(2, jobs.missing_gradients, name, {"lr": 0.1})
    untouched = dict(jobs.make_model().named_parameters())
    half = slice(8, 16)
    torch.testing.assert_close(second["norm.weight"], untouched["norm.weight"].detach()[half])
    assert not torch.equal(first["norm.weight"], untouched["norm.weight"].detach()[:8])
    assert not torch.equal(second["first.weight"], untouched["first.weight"].detach()[half])


@pytest.mark.parametrize("name", ["lamb", "novograd", "larc_adamw"])
def test_a_checkpoint_of_two_ranks_continues_on_any_number(name, tmp_path):
    folder = str(tmp_path / "checkpoint")
    saved, _ = on_ranks(2, jobs.save, folder, name, OPTIMIZERS[name])
    for world_size, sharded in ((1, False), (1, True), (2, True), (3, True)):
        for params, kinds in on_ranks(world_size, jobs.load, folder, name, OPTIMIZERS[name], sharded):
            assert ("exp_avg:DTensor" in kinds) == sharded
            assert "exp_avg_sq:Tensor" in kinds or name != "novograd"
            torch.testing.assert_close(params, saved, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("layout", ["fsdp", "mixed", "hsdp"])
def test_clipping_is_right_on_any_mixture(layout):
    norm, clipped, gradients, _ = jobs.clip(None, 0.5)
    assert norm > 0.5
    model = jobs.make_model()
    jobs.backward(model, *jobs.make_data())
    torch.testing.assert_close(torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5), norm)
    for result in on_ranks(4 if layout == "hsdp" else 2, jobs.clip, layout, 0.5):
        torch.testing.assert_close(result[0], norm)
        torch.testing.assert_close(result[1], clipped)
        assert result[3] == 1
        for name, gradient in gradients.items():
            torch.testing.assert_close(result[2][name], gradient, rtol=1e-5, atol=1e-7)
            torch.testing.assert_close(model.get_parameter(name).grad, gradient)


@pytest.mark.parametrize("use_orig_params", [True, False])
@pytest.mark.parametrize("name", ["lamb", "larc_sgd", "vr_adam"])
def test_flat_parameters_of_fsdp1_are_refused(name, use_orig_params):
    for message in on_ranks(2, jobs.flat_parameters, name, use_orig_params):
        assert "flat parameter of FSDP1" in message
        assert "fully_shard" in message
