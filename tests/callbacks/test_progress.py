"""What a person sees: lines in a file, a bar on a terminal, on the first rank only."""

from __future__ import annotations

import io
import itertools
import re
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from plain_trainer import Plain, adamw, data, fit
from rich.console import Console

from lbzoo.callbacks import progress, terminal
from lbzoo.callbacks.progress import Progress
from lbzoo.callbacks.terminal import Bar, Lines, Status, duration_text, rate_text


class Timed(Plain):
    """Every micro-batch takes ``seconds`` of a clock that stands for time.monotonic, a validation batch 1 s."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, seconds: float, *, before: float = 0.0) -> None:
        super().__init__(adamw)
        self.now, self.seconds, self.before = 0.0, seconds, before
        monkeypatch.setattr(time, "monotonic", lambda: self.now)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        self.now += self.seconds + (self.before if self.trainer.global_step == 0 else 0.0)
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.now += 1.0
        super().validation_step(batch, batch_idx)


def test_lines(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Steps of 2 s (two micro-batches of 4 samples), the first of 100 s more; a line every 5 s at first."""
    module = Timed(monkeypatch, 1.0, before=50.0)
    fit(module, Progress(line_seconds=5.0), accumulate_grad_batches=2, max_steps=7)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" · ")[0] for line in lines[:-1]] == ["step 1/7", "step 4/7", "step 7/7"]
    assert re.fullmatch(r"step 1/7 · loss \d\.\d+ · lr 0\.02", lines[0])
    assert re.fullmatch(r"step 4/7 · 4 samples/s · 6\.0 s left · loss \d\.\d+ · lr 0\.02", lines[1])
    assert re.fullmatch(r"step 7/7 · 4 samples/s · loss \d\.\d+ · lr 0\.02", lines[2])
    assert lines[3] == "trained 7 steps in 0:01:54, 4 samples/s"


def test_the_loss_is_that_of_the_last_step(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    class Counting(Timed):
        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            return 0.0 * super().training_step(batch, batch_idx) + float(batch_idx)

    fit(Counting(monkeypatch, 1.0), Progress(line_seconds=2.0), accumulate_grad_batches=2, max_steps=3)
    losses = re.findall(r"loss ([\d.]+)", capsys.readouterr().out)
    assert losses == ["0.5", "2.5", "4.5"]


def test_validation(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A validation of 12 s does not lower the rate, but the time that is left knows of it."""
    module = Timed(monkeypatch, 1.0)
    fit(
        module,
        Progress(line_seconds=5.0),
        max_steps=12,
        validate=True,
        val_check_interval=6,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
    )
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].startswith("step 6/12")
    assert lines[2:4] == ["validating: 5/12 batches", "validating: 10/12 batches"]
    assert re.fullmatch(r"step 6: val/loss \d\.\d{4}, val/top1 \d\.\d{4} \(12 s\)", lines[4])
    top1 = lines[4].split("val/top1 ")[1].split()[0]
    assert re.fullmatch(rf"step 9/12 · 4 samples/s · 7\.5 s left · loss .* · val/top1 {top1}", lines[5])
    assert lines[-1] == "trained 12 steps in 36 s, 4 samples/s"


def test_a_validation_alone(capsys: pytest.CaptureFixture[str]) -> None:
    trainer = fit(Plain(adamw), max_steps=1)
    trainer.callbacks.append(Progress())
    trainer.validate(trainer.lightning_module, data(), verbose=False)
    (line,) = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"val/loss \d\.\d{4}, val/top1 \d\.\d{4} \(\d\.\d s\)", line)


def test_sanity_check_is_not_shown(capsys: pytest.CaptureFixture[str]) -> None:
    fit(Plain(adamw), Progress(line_seconds=1000.0), validate=True, num_sanity_val_steps=2, max_steps=1)
    assert "val" not in capsys.readouterr().out.split("step 1/")[0]


def test_a_resumed_run_shows_its_own_rate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fit(Plain(adamw), max_steps=40).save_checkpoint(tmp_path / "a.ckpt")
    module = Timed(monkeypatch, 1.0)
    fit(module, Progress(line_seconds=4.0), max_steps=50, ckpt_path=tmp_path / "a.ckpt")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("step 41/50 · loss")
    assert lines[1].startswith("step 45/50 · 4 samples/s · 5.0 s left")
    assert lines[-1] == "trained 10 steps in 10 s, 4 samples/s"


def test_other_ranks_are_silent(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    import lightning.pytorch as pl

    monkeypatch.setattr(pl.Trainer, "is_global_zero", property(lambda self: False))
    fit(Plain(adamw), Progress(line_seconds=0.0), validate=True)
    assert capsys.readouterr().out == ""


def on_terminal(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=160, color_system=None)
    monkeypatch.setattr(progress, "open_display", lambda seconds: Bar(console))
    return screen


def test_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = on_terminal(monkeypatch)
    fit(
        Timed(monkeypatch, 1.0),
        Progress(),
        max_steps=12,
        accumulate_grad_batches=2,
        validate=True,
        val_check_interval=12,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
    )
    shown = screen.getvalue()
    assert re.search(r"step 4/12, micro-batch 1/2 ━+.* 4 samples/s · \d+ s left · loss \d\.\d+ · lr 0\.02", shown)
    assert "validating" in shown
    assert "7/12 batches" in shown
    assert re.search(r"step 6: val/loss \d\.\d{4}, val/top1 \d\.\d{4} \(12 s\)", shown)
    assert re.search(r"step 12/12 ━+ .*val/top1 \d\.\d{4}", shown)
    assert shown.endswith("\x1b[?25h")  # the cursor is shown again


def test_the_bar_is_closed_when_training_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    class Failing(Plain):
        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            if batch_idx == 3:
                raise RuntimeError("out of coffee")
            return super().training_step(batch, batch_idx)

    screen = on_terminal(monkeypatch)
    with pytest.raises(RuntimeError, match="out of coffee"):
        fit(Failing(adamw), Progress())
    assert screen.getvalue().endswith("\x1b[?25h")


def test_a_terminal_gets_a_bar_and_a_file_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(terminal, "Console", lambda: Console(file=io.StringIO(), force_terminal=True))
    bar = terminal.open_display()
    assert isinstance(bar, Bar)
    bar.close()
    monkeypatch.setattr(terminal, "Console", lambda: Console(file=io.StringIO()))
    assert isinstance(terminal.open_display(), Lines)


def test_lines_grow_rarer_with_the_age_of_the_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    lines, shown = Lines(None), []
    for second in range(7200):
        now[0] = float(second)
        if lines.is_due():
            lines.show(Status(step=second, total=None))
            shown.append(second)
    gaps = [later - earlier for earlier, later in itertools.pairwise(shown)]
    assert gaps == sorted(gaps)
    assert (gaps[0], gaps[-1]) == (5, 60)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.04, "0.0 s"), (9.94, "9.9 s"), (42.4, "42 s"), (3723, "1:02:03"), (90000, "1 day, 1:00:00")],
)
def test_duration_text(seconds: float, text: str) -> None:
    assert duration_text(seconds) == text


@pytest.mark.parametrize(("rate", "text"), [(0.25, "0.25"), (31.27, "31.3"), (12345.6, "12,346")])
def test_rate_text(rate: float, text: str) -> None:
    assert rate_text(rate) == f"{text} samples/s"
