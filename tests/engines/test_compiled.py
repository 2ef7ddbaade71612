"""trainer.compile: the numbers of eager mode, names in checkpoints, no recompilation, a clear word where it fails."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from distributed import on_ranks
from fit_jobs import fit_here, saved_weights
from lightning.pytorch import LightningModule
from torch import nn
from torch._dynamo.utils import counters

from lbzoo.engines.compiled import CompileModel
from lbzoo.errors import UsageError
from lbzoo.recipe import load_recipe

STEPS = 4
RECIPE = f"""\
version: 1
seed: 5
task: {{name: "token_task:TwoMeans", width: 16, drop_rate: 0.2}}
data: {{name: "token_task:UnevenTokens", num_val: 10, global_batch_size: 16, micro_batch_size: 4}}
optimizer: {{name: vr_lamb, lr: 0.02}}
steps: {STEPS}
trainer: {{accelerator: cpu, validate_every: {{steps: 2}}}}
logging: {{every: 1, loggers: []}}
"""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recipes") / "compiled.yaml"
    path.write_text(RECIPE)
    return path


def assert_same_numbers(eager: Path, compiled: Path) -> None:
    """Of two runs: dropout, gradient statistics and layer-wise steps included."""
    expected, actual = saved_weights(eager), saved_weights(compiled)
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.allclose(actual[name], tensor, rtol=1e-5, atol=2e-6), name


def test_the_numbers_of_eager_mode_with_one_compilation(recipe: Path, tmp_path: Path) -> None:
    """Validation batches of 4, 3 and 3 samples would each be a recompilation, which is an error here."""
    eager = fit_here(recipe, ["trainer.devices=1"], tmp_path)
    torch._dynamo.reset()
    counters.clear()
    with torch._dynamo.config.patch(error_on_recompile=True):
        compiled = fit_here(recipe, ["trainer.devices=1", "trainer.compile=true"], tmp_path)
    assert_same_numbers(eager.run_dir, compiled.run_dir)
    assert counters["stats"]["unique_graphs"] == 2  # the trial's, and the whole network's
    assert not torch._dynamo.eval_frame._stance.stance.startswith("force")


UNITS = ["trainer.fsdp={layers: [Linear, Embedding]}", "trainer.activation_checkpointing=true"]


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.parametrize("engine", ["lightning", "accelerate"])
@pytest.mark.parametrize(("strategy", "changes"), [("ddp", []), ("fsdp", []), ("fsdp", UNITS)])
def test_the_numbers_of_eager_mode_on_two_ranks(
    recipe: Path, tmp_path: Path, engine: str, strategy: str, changes: list[str]
) -> None:
    """With units of FSDP2, and with activations computed anew, a graph ends at each unit."""
    overrides = ["trainer.devices=2", f"trainer.engine={engine}", f"trainer.strategy={strategy}", *changes]
    eager = on_ranks(2, fit_here, recipe, overrides, tmp_path)[0]
    compiled = on_ranks(2, fit_here, recipe, [*overrides, "trainer.compile=true"], tmp_path)[0]
    assert_same_numbers(eager.run_dir, compiled.run_dir)


class Parts(LightningModule):
    """Calls the parts of its model."""

    def __init__(self, model: nn.Module | None) -> None:
        super().__init__()
        self.model = model


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (None, "Parts has no module 'model'"),
        (nn.ModuleDict({"a": nn.Linear(1, 1)}), "Parts calls parts of its 'model'"),
    ],
)
def test_a_task_in_which_nothing_would_be_compiled(model: nn.Module | None, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        CompileModel(True).on_fit_start(None, Parts(model))  # type: ignore[arg-type]  # no trainer is needed


def test_no_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Named before the first step, with what is missing."""
    import torch._inductor.config as inductor
    from torch._inductor.utils import fresh_cache

    torch._dynamo.reset()
    monkeypatch.setattr(inductor.cpp, "cxx", ("no-such-compiler",))
    with (
        fresh_cache(dir=str(tmp_path)),
        pytest.raises(UsageError, match=r"trainer\.compile does not work here: .*C\+\+"),
    ):
        CompileModel(True).on_fit_start(None, Parts(nn.Linear(2, 2)))  # type: ignore[arg-type]  # no trainer is needed


def test_the_hash_does_not_know_of_it(recipe: Path) -> None:
    assert load_recipe(recipe).hash == load_recipe(recipe, ["trainer.compile=true"]).hash
