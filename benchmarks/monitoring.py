"""What a logged step costs: 161 layers' trust ratios (ResNet-50), written by lbzoo and by Lightning's own means.

    python benchmarks/monitoring.py
    python benchmarks/monitoring.py --layers 320 --rounds 20 --dry-run

A real Trainer trains a module of one-element layers whose optimizer publishes statistics at no cost. Every epoch logs
in one of the ways, all of them in turn; a sample is the time from the end of a step to the start of the next, so that
what Lightning does with ``self.log_dict`` after the hook is in it, and what a step without logging takes there is
subtracted. So is the time during which the training's thread waited for a core, since none of the ways waits for
anything else. The result is a dated file in ``results/``.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from timing import Timing, machine, save_result
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lbzoo.callbacks.heatmap import History, draw
from lbzoo.callbacks.log_values import log_image, log_layers
from lbzoo.callbacks.trust_ratio import TrustRatio
from lbzoo.engines.run_folder import environment
from lbzoo.optim.layer_stats import LayerStats

NOTHING = "nothing"
STEPS = 8  # an epoch; the first sample of each is not counted


class Publishing(torch.optim.SGD):
    """Its statistics cost nothing, so that only their logging is timed."""

    track_layer_stats = False

    def __init__(self, named: list[tuple[str, nn.Parameter]]) -> None:
        super().__init__(named, lr=1e-3)
        names = [name for name, _ in named]
        quantities = ("trust_ratio", "param_norm", "grad_norm", "update_ratio")
        self._stats = LayerStats(names, {quantity: torch.rand(len(names)) + 0.1 for quantity in quantities})

    def layer_stats(self) -> LayerStats:
        return self._stats


class Layers(pl.LightningModule):
    """``layers`` parameter tensors in four parts, as a ResNet has."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.model = nn.ModuleDict({f"layer{part}": nn.ParameterDict() for part in range(1, 5)})
        for index in range(layers):
            self.model[f"layer{1 + index * 4 // layers}"][f"conv{index}_weight"] = nn.Parameter(torch.ones(1))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return torch.cat(list(self.parameters())).sum() * batch[0].mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return Publishing(list(self.named_parameters()))


class InTurn(pl.Callback):
    """Logs one way an epoch, and times it."""

    def __init__(self) -> None:
        self.callbacks = {
            "TrustRatio: 3 quantities, quantiles": TrustRatio(every=1, histogram=False, heatmap=False),
            "TrustRatio: 3 quantities, quantiles, histogram": TrustRatio(every=1, heatmap=False),
        }
        self.ways: dict[str, Callable[[], Any]] = {}
        self.timings: dict[str, Timing] = {}
        self._begun: float | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        stats = trainer.optimizers[0].layer_stats()
        trust_ratios = stats.values["trust_ratio"]
        flat = {f"trust_ratio/{name}": value for name, value in zip(stats.names, trust_ratios, strict=True)}
        logger = trainer.logger
        assert logger is not None
        history = History(stats.names)
        for step in range(320):
            history.add(step, dict(zip(stats.names, (trust_ratios * (1 + step % 7)).tolist(), strict=True)))
        self.ways = {
            NOTHING: lambda: None,
            "log_layers: trust ratios": lambda: log_layers(
                trainer, {"trust_ratio": (stats.names, trust_ratios)}, trainer.global_step
            ),
            **{name: self._callback(callback, trainer, pl_module) for name, callback in self.callbacks.items()},
            "a heatmap of 320 columns": lambda: log_image(
                trainer, "heatmap/trust_ratio", draw(history), trainer.global_step
            ),
            "TensorBoardLogger.log_metrics: trust ratios": lambda: logger.log_metrics(flat, trainer.global_step),
            "self.log_dict: trust ratios": lambda: pl_module.log_dict(flat),
        }
        self.timings = {name: Timing() for name in self.ways}
        for callback in self.callbacks.values():
            callback.on_train_start(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._begun = seconds_on_core() if batch_idx > 0 else None
        list(self.ways.values())[trainer.current_epoch % len(self.ways)]()

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self._begun is not None and batch_idx > 0:
            timing = list(self.timings.values())[trainer.current_epoch % len(self.ways)]
            timing.seconds.append(seconds_on_core() - self._begun)

    def _callback(self, callback: TrustRatio, trainer: pl.Trainer, module: pl.LightningModule) -> Callable[[], None]:
        def log() -> None:
            callback.on_before_optimizer_step(trainer, module, trainer.optimizers[0])
            callback.on_train_batch_end(trainer, module, None, None, 0)

        return log


def seconds_on_core() -> float:
    """The clock, less the time that this thread stood in the kernel's run queue (0 where the system does not say)."""
    try:
        waited = int(Path("/proc/thread-self/schedstat").read_text().split()[1]) / 1e9
    except OSError:
        waited = 0.0
    return time.perf_counter() - waited


def measure(layers: int, rounds: int) -> dict[str, Timing]:
    """``rounds`` epochs of each way, in turn."""
    in_turn = InTurn()
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ways = 5 + len(in_turn.callbacks)
        trainer = pl.Trainer(
            max_epochs=rounds * ways,
            accelerator="cpu",
            devices=1,
            logger=TensorBoardLogger(folder),
            callbacks=[in_turn],
            log_every_n_steps=1,
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
        )
        trainer.fit(Layers(layers), DataLoader(TensorDataset(torch.ones(STEPS, 1))))
    return in_turn.timings


def report(timings: dict[str, Timing], arguments: argparse.Namespace) -> str:
    here = environment()
    versions = ", ".join(f"{name} {here['packages'][name]}" for name in ("torch", "lightning", "tensorboard", "lbzoo"))
    nothing = timings[NOTHING].median
    lines = [
        f"# Logging {arguments.layers} layers on {machine()}",
        "",
        f"{date.today().isoformat()}, commit {here['commit']}, Python {here['python']}, {versions};",
        f"{torch.get_num_threads()} threads. Made by:",
        "",
        f"    python benchmarks/monitoring.py {' '.join(sys.argv[1:])}".rstrip(),
        "",
        f"`ms`: median of a logged step, less the {1e3 * nothing:.2f} ms that Lightning takes between two steps",
        "without logging. `spread`: half the distance of the quartiles. `n`: samples. The heatmap is drawn anew when",
        "it has grown by half: about fifteen times in a thousand logged steps.",
        "",
        "| way | ms | spread | n |",
        "|---|---:|---:|---:|",
    ]
    for name, timing in timings.items():
        if name != NOTHING:
            spread = f"{1e3 * timing.spread * timing.median:.2f}"
            row = (name, f"{1e3 * (timing.median - nothing):.2f}", spread, len(timing.seconds))
            lines.append("| " + " | ".join(map(str, row)) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=161)
    parser.add_argument("--rounds", type=int, default=12, help=f"epochs of {STEPS} steps for each way")
    parser.add_argument("--dry-run", action="store_true", help="print, write no file")
    arguments = parser.parse_args()
    text = report(measure(arguments.layers, arguments.rounds), arguments)
    print(text)
    if not arguments.dry_run:
        save_result("monitoring", text)


if __name__ == "__main__":
    main()
