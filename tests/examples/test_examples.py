"""The examples, and what docs/custom_optimizer.md shows, from a folder outside the checkout."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from lbzoo.testing import check_optimizer, list_checks

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"
ONE_PROCESS = [check.name for check in list_checks() if check.topic != "sharding"]
PAGE = (ROOT / "docs" / "custom_optimizer.md").read_text(encoding="utf-8")


def python(folder: Path, *words: str) -> str:
    """What ``python *words`` prints when it is run in ``folder``; fails the test if it fails."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)]), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, *words]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def code(language: str, beginning: str) -> str:
    """The code block of the page that begins so."""
    blocks = [text for text in re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL) if text.startswith(beginning)]
    assert len(blocks) == 1, f"{len(blocks)} {language} blocks begin with {beginning!r}"
    return str(blocks[0])


def test_plain_loop(tmp_path):
    output = python(tmp_path, str(EXAMPLES / "plain_loop.py"))
    accuracy = float(re.search(r"accuracy ([\d.]+)", output)[1])
    assert accuracy > 0.95
    assert output.count("trust ratios: 0.weight") == 3


def test_accelerate_loop(tmp_path):
    output = python(tmp_path, str(EXAMPLES / "accelerate_loop.py"))
    losses = [float(loss) for loss in re.findall(r"loss ([\d.]+)", output)]
    assert len(losses) == 5
    assert losses[-1] < 0.5 * losses[0]
    assert "lr 0.00e+00" in output, "the schedule ends where the training ends"


def test_transformers_trainer(tmp_path):
    output = python(tmp_path, str(EXAMPLES / "transformers_trainer.py"))
    logged = [eval(line) for line in output.splitlines() if line.startswith("{'loss'") and "'step'" in line]
    assert [entry["step"] for entry in logged] == [10, 20, 30, 40]
    assert logged[-1]["loss"] < logged[0]["loss"] - 0.1
    assert output.count("'trust_ratio_median'") >= 4
    assert "'trust_ratio/bert.pooler.dense.weight'" in output


def test_custom_optimizer_behaves():
    """In one process; on several below."""
    results = check_optimizer(f"{EXAMPLES / 'custom_optimizer.py'}:CappedLars", only=ONE_PROCESS)
    assert [result for result in results if result.status == "failed"] == []


@pytest.mark.dist
@pytest.mark.xdist_group("processes")
def test_custom_optimizer_behaves_on_several_processes():
    results = check_optimizer(f"{EXAMPLES / 'custom_optimizer.py'}:CappedLars", only="sharding")
    assert [(result.status, result.reason) for result in results] == [("passed", "")] * len(results)


def test_page_shows_the_example_as_it_is():
    assert code("python", '@register_optimizer("capped_lars"') in (EXAMPLES / "custom_optimizer.py").read_text()


def test_example_has_30_lines():
    text = (EXAMPLES / "custom_optimizer.py").read_text()
    lines = [line for line in text.split('"""', 2)[2].splitlines() if line.strip()]
    assert len(lines) <= 30


def test_plugin_of_a_recipe(tmp_path):
    """The page's file and recipe, in a folder of their own."""
    (tmp_path / "mine.py").write_text(code("python", "# mine.py"))
    (tmp_path / "mine.yaml").write_text(code("yaml", "# mine.yaml"))
    output = python(tmp_path, "-m", "lbzoo", "fit", "mine.yaml", "--scale", "smoke")
    assert "at step 2" in output
    resolved = next((tmp_path / "runs").glob("*/*/recipe.yaml")).read_text()
    assert "name: mine" in resolved


def test_entry_point_of_a_package(tmp_path):
    """A package with the page's entry point, as pip would have laid it out."""
    package = tmp_path / "mypackage"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "mine.py").write_text(code("python", "# mine.py"))
    facts = tmp_path / "mypackage-1.0.dist-info"
    facts.mkdir()
    (facts / "METADATA").write_text("Metadata-Version: 2.1\nName: mypackage\nVersion: 1.0\n")
    section, entry = code("toml", "[project.entry-points").strip().splitlines()
    assert section == '[project.entry-points."lbzoo.optimizers"]'
    (facts / "entry_points.txt").write_text("[lbzoo.optimizers]\n" + entry.replace('"', "") + "\n")
    listed = python(
        tmp_path, "-c", "import lbzoo, sys; print('mine' in lbzoo.list_optimizers(), 'torch' in sys.modules)"
    )
    assert listed.split() == ["True", "False"]
    shown = python(tmp_path, "-m", "lbzoo", "ls", "optimizers")
    assert re.search(r"^mine +entry point of mypackage", shown, re.MULTILINE)
    program = "import lbzoo, torch; print(type(lbzoo.create_optimizer(torch.nn.Linear(2, 2), 'mine', lr=0.5)).__name__)"
    assert python(tmp_path, "-c", program).strip() == "Mine"


def test_check_of_a_file_beside_us(tmp_path):
    shutil.copy(EXAMPLES / "custom_optimizer.py", tmp_path)
    output = python(tmp_path, "-m", "lbzoo", "optim", "check", "custom_optimizer.py:CappedLars", "--only", "closure")
    assert "1 passed" in output
