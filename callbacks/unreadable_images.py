"""The names of the images that a run could not read, in a file of its folder."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from lightning.pytorch import Callback, LightningModule

from lbzoo.callbacks.trainer_view import TrainerView
from lbzoo.registry import register_callback

log = logging.getLogger(__name__)


class Faults(Protocol):
    """What could not be read of a part of the data, over all loader processes of this rank."""

    def __len__(self) -> int: ...

    def indices(self) -> list[int]: ...

    def path_of(self, index: int, /) -> Path: ...


@register_callback("unreadable_images")
class UnreadableImages(Callback):
    """Writes the path of every image that was replaced because it cannot be read, a line each, as soon as it is met.

    The training data set says which (``faults``). Each rank adds to the same file; a resumed run goes on with it.

    Args:
        file: its name, in the folder of the run.
    """

    def __init__(self, *, file: str = "unreadable_images.txt") -> None:
        self.file = file
        self._seen = 0
        self._written: set[str] = set()

    def on_train_start(self, trainer: TrainerView, pl_module: LightningModule) -> None:
        self._seen = 0
        path = self._path(trainer)
        self._written = (
            set(path.read_text(encoding="utf-8", errors="surrogateescape").splitlines()) if path.is_file() else set()
        )

    def on_train_batch_end(
        self, trainer: TrainerView, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._write_new(trainer)

    def on_validation_end(self, trainer: TrainerView, pl_module: LightningModule) -> None:
        self._write_new(trainer)

    def on_train_end(self, trainer: TrainerView, pl_module: LightningModule) -> None:
        self._write_new(trainer)
        if self._seen:
            log.warning("%d images could not be read and were replaced; they are named in %s", self._seen,
                        self._path(trainer))  # fmt: skip

    def on_exception(self, trainer: TrainerView, pl_module: LightningModule, exception: BaseException) -> None:
        self._write_new(trainer)

    def _write_new(self, trainer: TrainerView) -> None:
        found = list(_faults(trainer))
        count = sum(map(len, found))
        if count == self._seen:
            return
        self._seen = count
        paths = [str(faults.path_of(index)) for faults in found for index in faults.indices()]
        new = [path for path in paths if path not in self._written]
        self._written.update(new)
        path = self._path(trainer)
        path.parent.mkdir(parents=True, exist_ok=True)
        # A name is bytes, which need be no UTF-8: they are written as they are, in one write to the end of the file.
        with path.open("a", encoding="utf-8", errors="surrogateescape") as file:
            file.write("".join(f"{line}\n" for line in new))

    def _path(self, trainer: TrainerView) -> Path:
        return Path(getattr(trainer, "default_root_dir", "."), self.file)


def _faults(trainer: TrainerView) -> Iterator[Faults]:
    dataset = getattr(trainer.train_dataloader, "dataset", None)
    yield from getattr(dataset, "faults", ())
