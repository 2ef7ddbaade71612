"""The code in docs/monitoring.md runs, and the page names every option and tag."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from plain_trainer import Plain, adamw, data, fit, scalars, tensorboard

from lbzoo.registry import callbacks

PAGE = (Path(__file__).parents[2] / "docs" / "monitoring.md").read_text(encoding="utf-8")


def test_the_examples_run(tmp_path: Path, monkeypatch: Any) -> None:
    in_a_trainer, own_callback = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
    monkeypatch.chdir(tmp_path)  # the Trainer of the first example logs into the working folder
    names: dict[str, Any] = {"__name__": "examples"}
    exec(in_a_trainer, names)
    names["trainer"].fit_loop.epoch_loop.max_steps = 2
    names["trainer"].fit(Plain(adamw), data())
    exec(own_callback, names)
    fit(Plain(adamw), names["WeightNorm"](every=4), logger=tensorboard(tmp_path / "own"), accumulate_grad_batches=2)
    assert set(scalars(tmp_path / "own")["weight_norm/model.0.bias"]) == {1, 4, 8, 12}
    callbacks._added.pop("weight_norm")


def test_every_option_is_named() -> None:
    for name in ("progress", "train_metrics", "trust_ratio"):
        options = callbacks.entry(name).options
        assert options is not None
        for option in options:
            assert f"`{option}`" in PAGE


def test_every_tag_is_named(tmp_path: Path) -> None:
    from lbzoo.callbacks.train_metrics import TrainMetrics
    from lbzoo.callbacks.trust_ratio import TrustRatio

    fit(Plain(adamw), TrustRatio(every=2), TrainMetrics(every=2), logger=tensorboard(tmp_path))
    for tag in scalars(tmp_path):
        prefix, _, name = tag.partition("/")
        quantile = re.fullmatch(r"(trust_ratio|update_ratio)_(min|p10|p50|p90|max)", name)
        if prefix == "summary" and quantile:
            assert re.search(rf"`summary/{quantile[1]}_\{{[^}}]*\b{quantile[2]}\b", PAGE), tag
        elif prefix in ("summary", "train"):
            assert f"`{tag}`" in PAGE
        else:
            assert f"`{prefix}/<layer>`" in PAGE
