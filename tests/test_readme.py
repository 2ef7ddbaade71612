"""What the README shows works as it stands there."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def block(language: str, beginning: str) -> str:
    """The code block of a language that begins with the given text."""
    found = [text for text in re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL) if text.startswith(beginning)]
    assert len(found) == 1, f"{len(found)} {language} blocks begin with {beginning!r}"
    return str(found[0])


def lbzoo(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "lbzoo", *words]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=250)


@pytest.fixture
def example(tmp_path: Path) -> Path:
    (tmp_path / "mine.py").write_text(block("python", "# mine.py"))
    (tmp_path / "mine.yaml").write_text(block("yaml", "# mine.yaml"))
    return tmp_path


def test_an_optimizer_of_one_s_own(example: Path) -> None:
    done = lbzoo(example, "fit", "mine.yaml", "--scale", "mini", "steps=8", "epochs=null", "data.image_size=16",
                 "task.model_args.width_factor=0.25")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "finished at step 8" in done.stdout
    assert (example / "runs" / "mine" / "1" / "tensorboard").is_dir()


def test_an_optimizer_that_ignores_the_closure_is_told(example: Path) -> None:
    """The mistake that this kind of class makes first."""
    text = (example / "mine.py").read_text()
    assert "closure() if closure else None" in text
    (example / "mine.py").write_text(text.replace("closure() if closure else None", "None"))
    done = lbzoo(example, "fit", "mine.yaml", "--scale", "smoke")
    assert done.returncode == 2
    assert "optimizer 'mine' did not run the closure" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_plain_loop() -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.LayerNorm(8), torch.nn.Linear(8, 2))
    batches = [(torch.randn(16, 4), torch.randint(2, (16,))) for _ in range(3)]
    names = {"model": model, "batches": batches, "loss_fn": torch.nn.functional.cross_entropy}
    before = model[0].weight.detach().clone()
    exec(block("python", "import lbzoo\n\nopt ="), names)
    assert not torch.equal(model[0].weight, before)
    stats = names["stats"]
    assert len(stats.names) == 6
    assert set(stats.values) >= {"trust_ratio", "param_norm", "grad_norm", "update_ratio"}


@pytest.mark.parametrize("line", [
    line.partition("#")[0].strip()
    for text in re.findall(r"```\n(.*?)```", README, re.DOTALL)
    for line in text.splitlines()
    if line.startswith(("lbzoo ls", "lbzoo plan"))
])  # fmt: skip
def test_commands_that_only_print(line: str, tmp_path: Path) -> None:
    done = lbzoo(tmp_path, *shlex.split(line)[1:])
    assert done.returncode == 0, done.stderr
    assert done.stdout


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for document in ("README.md", "CONTRIBUTING.md"):
        for target in re.findall(r"make ([a-z-]+)", (ROOT / document).read_text(encoding="utf-8")):
            assert re.search(rf"^{target}:", makefile, re.MULTILINE), f"{document}: make {target}"


@pytest.mark.parametrize(
    "document", ["README.md", "CONTRIBUTING.md", *(f"docs/{p.name}" for p in ROOT.glob("docs/*.md"))]
)
def test_links_lead_somewhere(document: str) -> None:
    path = ROOT / document
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", path.read_text(encoding="utf-8")):
        if not target.startswith("http"):
            assert (path.parent / target).exists(), f"{document}: {target}"
