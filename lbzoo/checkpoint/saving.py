"""Writing a checkpoint, at once or behind the training's back.

Every rank writes what it holds (``torch.distributed.checkpoint``); the first one makes the folder, adds ``state.json``
and gives it its name. Whatever goes wrong on whichever rank, all ranks raise the same CheckpointError, and what was
written is gone: only a whole checkpoint ever has a good name.
"""

from __future__ import annotations

import json
import os
import shutil
import threading
import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import ProcessGroup

from lbzoo.checkpoint.folder import CALLBACKS_FILE, FORMAT, STATE_FILE
from lbzoo.checkpoint.quiet import quiet
from lbzoo.errors import CheckpointError
from lbzoo.ranks import has_other_ranks, is_first_rank


@dataclass(frozen=True)
class Content:
    """What a checkpoint is made of.

    ``tensors``: those of model, optimizer and averages, where they lie. ``state``: what is known of the run, JSON-able.
    ``callbacks``: their states by name, of plain values and tensors.
    """

    tensors: dict[str, Any]
    state: Mapping[str, Any]
    callbacks: Mapping[str, Any] = field(default_factory=dict)


def content_of(
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    state: Mapping[str, Any],
    averages: Mapping[str, torch.Tensor] | None = None,
    callbacks: Mapping[str, Any] | None = None,
) -> Content:
    """Nothing is copied. Collective."""
    from torch.distributed.checkpoint.state_dict import get_state_dict

    model_state, optimizer_state = get_state_dict(module, optimizer)
    tensors = {"model": model_state, "optimizer": optimizer_state, "ema": dict(averages or {})}
    return Content(tensors, state, dict(callbacks or {}))


def save_checkpoint(
    path: Path,
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    state: Mapping[str, Any],
    averages: Mapping[str, torch.Tensor] | None = None,
    callbacks: Mapping[str, Any] | None = None,
) -> None:
    """Write ``path``. ``averages`` are those of the weights, by their names. Collective. Raises CheckpointError."""
    write(path, content_of(module, optimizer, state, averages, callbacks))


def write(
    path: Path, content: Content, *, group: ProcessGroup | None = None, then: Callable[[], None] = lambda: None
) -> None:
    """Write ``path``; on the first rank, call ``then`` when it is there. Collective over ``group``."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.api import CheckpointException

    beside = path.with_suffix(".tmp")

    def finish() -> None:
        _add_state(beside, content)
        _put_in_place(beside, path)
        then()

    try:
        _on_first_rank(lambda: _make_empty(beside), group)
        with quiet():
            dcp.save(content.tensors, checkpoint_id=beside, process_group=group)
        _on_first_rank(finish, group)
    except (CheckpointException, _FirstRankError) as error:
        if is_first_rank():
            shutil.rmtree(beside, ignore_errors=True)  # a full disk needs the room
        raise CheckpointError(f"{path} could not be written: {_cause(error)}") from error


class BackgroundSaver:
    """Saves while the training goes on, one checkpoint at a time.

    The state is copied to the host's memory while the next step's forward and backward passes run, and written from
    there. Those passes change buffers, which are copied at once; weights and optimizer state change in the optimizer's
    step, before which :meth:`wait_until_copied` has to be called. The memory of the copies is kept for the next ones.

    ``group``: of the threads of all ranks, a CPU back-end that nobody else uses; None for a single process.
    """

    def __init__(self, group: ProcessGroup | None = None) -> None:
        from torch.distributed.checkpoint._state_dict_stager import StateDictStager

        # The thread's saves cannot do so for themselves: filters belong to the whole process.
        warnings.filterwarnings("ignore", message=".*torch.distributed.*single process.*")
        self._group = group
        self._thread: threading.Thread | None = None
        self._copied = threading.Event()
        self._error: BaseException | None = None
        on_gpu = torch.cuda.is_available() and torch.cuda.is_initialized()
        self._stream = torch.cuda.Stream() if on_gpu else None
        self._stager = StateDictStager(pin_memory=on_gpu, share_memory=False)

    def save(self, path: Path, module: nn.Module, content: Content, then: Callable[[], None]) -> None:
        """Begin to write ``path``; see :func:`write`. Raises the CheckpointError of the save before, if it failed."""
        self.wait()
        content = Content(_with_buffers_copied(content.tensors, module), dict(content.state), dict(content.callbacks))
        ready = None
        if self._stream is not None:
            ready = torch.cuda.Event()
            ready.record()
        self._copied.clear()
        self._thread = threading.Thread(target=self._run, args=(path, content, then, ready), name="checkpoint")
        self._thread.start()

    def wait_until_copied(self) -> None:
        """Before anything changes weights or optimizer state."""
        if self._thread is not None:
            self._copied.wait()

    def wait(self) -> None:
        """Until the save has ended. Raises its CheckpointError, on every rank, if it has failed."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error

    def close(self) -> None:
        """Wait, whatever became of it, and let go of the memory and the group."""
        with suppress(CheckpointError):
            self.wait()
        self._stager.close()
        if self._group is not None:
            dist.destroy_process_group(self._group)
            self._group = None

    def _run(self, path: Path, content: Content, then: Callable[[], None], ready: torch.cuda.Event | None) -> None:
        try:
            try:
                copied = self._copy(content.tensors, ready)
            finally:
                self._copied.set()
            write(path, Content(copied, content.state, content.callbacks), group=self._group, then=then)
        except BaseException as error:  # raised by wait(), on the thread that trains
            self._error = error

    def _copy(self, tensors: dict[str, Any], ready: torch.cuda.Event | None) -> dict[str, Any]:
        if self._stream is None or ready is None:
            copied: dict[str, Any] = self._stager.stage(tensors)
            return copied
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(ready)  # the optimizer's step that is still running
            copied = self._stager.stage(tensors, non_blocking=True)
            self._stream.synchronize()
        return copied


def _with_buffers_copied(tensors: dict[str, Any], module: nn.Module) -> dict[str, Any]:
    parameters = {name for name, _ in module.named_parameters(remove_duplicate=False)}
    model = {
        name: value.clone() if name not in parameters and isinstance(value, torch.Tensor) else value
        for name, value in tensors["model"].items()
    }
    return {**tensors, "model": model}


def _make_empty(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def _add_state(folder: Path, content: Content) -> None:
    if content.callbacks:
        torch.save(dict(content.callbacks), folder / CALLBACKS_FILE)
    sizes = {file.name: file.stat().st_size for file in sorted(folder.iterdir())}
    document = {"format": FORMAT, **content.state, "files": sizes}
    (folder / STATE_FILE).write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    for entry in folder.iterdir():
        _to_disk(entry)
    _to_disk(folder)


def _put_in_place(beside: Path, path: Path) -> None:
    if path.exists():  # the same step, written before a resume: the new one takes its place whole
        older = path.with_suffix(".old.tmp")
        shutil.rmtree(older, ignore_errors=True)
        path.rename(older)
        beside.rename(path)
        shutil.rmtree(older, ignore_errors=True)
    else:
        beside.rename(path)
    _to_disk(path.parent)


def _to_disk(entry: Path) -> None:
    """Flush a file or a folder: after a power cut a renamed checkpoint must not be empty."""
    descriptor = os.open(entry, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class _FirstRankError(Exception):
    """Something went wrong on the first rank."""


def _on_first_rank(function: Callable[[], None], group: ProcessGroup | None) -> None:
    """Call it there; what it raises is raised on every rank. Nobody goes on before it is done."""
    problem: list[str | None] = [None]
    if is_first_rank():
        try:
            function()
        except Exception as error:
            problem[0] = _cause(error)
    if has_other_ranks():
        dist.broadcast_object_list(problem, src=0, group=group)
    if problem[0] is not None:
        raise _FirstRankError(problem[0])


def _cause(error: BaseException) -> str:
    from torch.distributed.checkpoint.api import CheckpointException

    if isinstance(error, CheckpointException):
        from lbzoo.checkpoint.reading import first_failure

        return _explained(first_failure(error))
    return _explained(str(error) or type(error).__name__)


def _explained(cause: str) -> str:
    """torch's writer of archives gives no reason where it could not write."""
    return f"{cause} (as a rule the disk is full)" if "inline_container" in cause else cause
