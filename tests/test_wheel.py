"""The wheel holds what the two links point at, and works from any folder."""

from __future__ import annotations

import json
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bin folder of a fresh environment with the wheel, and this environment's packages behind it."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard", "-z"], cwd=ROOT, capture_output=True)
    if listed.returncode:
        pytest.skip("not a git checkout: the wheel is built from what git knows")
    names = [name for name in listed.stdout.decode().split("\0") if name and (ROOT / name).exists()]
    archive = subprocess.run(["tar", "-c", "--null", "-T", "-"], cwd=ROOT, input="\0".join(names).encode(),
                             capture_output=True, check=True)  # fmt: skip
    source.mkdir()
    subprocess.run(["tar", "-x", "-C", str(source)], input=archive.stdout, check=True)
    build = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(folder), "."]
    subprocess.run(build, cwd=source, check=True)
    (wheel,) = folder.glob("lbzoo-*.whl")
    venv.create(folder / "venv", with_pip=False, symlinks=True)
    python = folder / "venv" / "bin" / "python"
    site = next((folder / "venv" / "lib").glob("python3.*/site-packages"))
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(site), str(wheel)],
                   check=True)  # fmt: skip
    # A .pth adds the packages but not their own .pth files: the checkout's editable lbzoo stays out.
    (site / "packages.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    return python.parent


def run(installed: Path, folder: Path, *words: str) -> str:
    command = [str(installed / "python"), "-m", "lbzoo", *words]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_recipes_and_callbacks_come_with_the_wheel(installed: Path, tmp_path: Path) -> None:
    origin = subprocess.run([str(installed / "python"), "-c", "import lbzoo; print(lbzoo.__file__)"],
                            cwd=tmp_path, capture_output=True, text=True, check=True).stdout  # fmt: skip
    assert str(ROOT) not in origin, "the wheel's own package must be the one that is imported"
    listed = json.loads(run(installed, tmp_path, "ls", "--json"))
    assert "resnet50_novograd_32k" in json.dumps(listed)
    assert "trust_ratio" in run(installed, tmp_path, "ls", "callbacks")


def test_a_recipe_of_the_wheel_checks_out_from_another_folder(installed: Path, tmp_path: Path) -> None:
    run(installed, tmp_path, "check", "resnet50_novograd_32k")


def test_papers_come_with_the_wheel(installed: Path, tmp_path: Path) -> None:
    code = "from lbzoo.papers import load_paper; print(len(load_paper('lamb')['tables']))"
    out = subprocess.run([str(installed / "python"), "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert out.stdout.strip() == "25", out.stderr
