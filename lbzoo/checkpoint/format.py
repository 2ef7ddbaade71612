"""Writing and reading a checkpoint with torch.distributed.checkpoint.

Every rank calls these functions: shards are written and read where they live, replicated tensors once. Keys are
parameter names of the module without ``module.`` or ``_orig_mod.``, so another engine, another number of devices and
another layout read the same files.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from lbzoo.checkpoint.folder import STATE_FILE, read_state
from lbzoo.errors import CheckpointError, did_you_mean

FORMAT = 1


def save_checkpoint(
    path: Path,
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    state: Mapping[str, Any],
    averages: Mapping[str, torch.Tensor] | None = None,
) -> None:
    """Write ``path`` (which must not exist under this name yet): tensors, then ``state.json``, then the rename.

    ``state`` is JSON-able; ``averages`` are those of the weights, by their names. Collective: every rank calls it; rank
    0 renames, and all wait for that.
    """
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict

    beside = path.with_suffix(".tmp")
    if _rank() == 0:
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir(parents=True)
    _barrier()
    model_state, optimizer_state = get_state_dict(module, optimizer)
    with _quiet():
        content = {"model": model_state, "optimizer": optimizer_state, "ema": dict(averages or {})}
        dcp.save(content, checkpoint_id=beside)
    _barrier()
    if _rank() == 0:
        sizes = {file.name: file.stat().st_size for file in sorted(beside.iterdir())}
        document = {"format": FORMAT, **state, "files": sizes}
        (beside / STATE_FILE).write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
        _to_disk(beside)
        if path.exists():  # the same step, written before a resume: the new one takes its place whole
            shutil.rmtree(path)
        beside.rename(path)
    _barrier()


def load_checkpoint(
    path: Path,
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    averages: Mapping[str, torch.Tensor] | None = None,
) -> dict[str, Any]:
    """Load model, optimizer and averages in place, whatever layout they have now, and return the checkpoint's state.

    Raises CheckpointError where a file is damaged or where the checkpoint is of another model, naming the parameters.
    """
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    state = _read_supported(path)
    _check_same_model(path, module)
    model_state, optimizer_state = get_state_dict(module, optimizer)
    target: dict[str, Any] = {"model": model_state, "optimizer": optimizer_state}
    _check_same_keys(path, target["optimizer"]["state"], "optimizer.state.", "optimizer state")
    if averages is not None:
        _require_same(path, _shapes(averages), _stored_averages(path))
        target["ema"] = dict(averages)
    with _quiet():
        dcp.load(target, checkpoint_id=path)
    set_state_dict(module, optimizer, model_state_dict=target["model"], optim_state_dict=target["optimizer"])
    return state


def load_weights(path: Path, module: nn.Module, *, averaged: bool = False) -> None:
    """Load the model's weights alone: from a checkpoint, or from a ``.pt``/``.pth``/``.safetensors`` state dict.

    ``averaged`` takes a checkpoint's averages in place of the weights that they are of.
    """
    if path.is_file():
        _load_weights_file(path, module)
        return
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict

    _read_supported(path)
    _check_same_model(path, module)
    target = {"model": get_model_state_dict(module)}
    with _quiet():
        dcp.load(target, checkpoint_id=path)
    set_model_state_dict(module, target["model"])
    if averaged:
        _load_averages(path, module)


def _load_averages(path: Path, module: nn.Module) -> None:
    import torch.distributed.checkpoint as dcp

    own = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    with _quiet():
        dcp.load({"ema": {name: own[name].detach() for name in _stored_averages(path)}}, checkpoint_id=path)


def _stored_averages(path: Path) -> dict[str, tuple[int, ...]]:
    stored = _stored(path, "ema.")
    if not stored:
        raise CheckpointError(f"{path} holds no averages of the weights: it was saved without trainer.ema")
    return stored


def _shapes(tensors: Mapping[str, torch.Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def _load_weights_file(path: Path, module: nn.Module) -> None:
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            weights = load_file(path)
        else:
            weights = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise CheckpointError(f"{path} cannot be read as weights: {error}") from error
    if not isinstance(weights, Mapping):
        raise CheckpointError(f"{path} holds a {type(weights).__name__}, not a state dict of tensors by name")
    _require_same(path, _shapes(module.state_dict()), _shapes(weights))
    module.load_state_dict(weights)


def _read_supported(path: Path) -> dict[str, Any]:
    state = read_state(path)
    if state.get("format") != FORMAT:
        raise CheckpointError(f"{path} has format {state.get('format')!r}; this version of lbzoo reads {FORMAT}")
    return state


def _stored(path: Path, prefix: str) -> dict[str, tuple[int, ...]]:
    """Names below ``prefix`` with their shapes (() for what is not a tensor), from the checkpoint's metadata."""
    from torch.distributed.checkpoint import FileSystemReader

    try:
        entries = FileSystemReader(path).read_metadata().state_dict_metadata
    except Exception as error:
        raise CheckpointError(f"{path} is damaged: its .metadata cannot be read ({error})") from error
    return {n[len(prefix) :]: tuple(getattr(e, "size", ())) for n, e in entries.items() if n.startswith(prefix)}


def _check_same_model(path: Path, module: nn.Module) -> None:
    from torch.distributed.checkpoint.state_dict import get_model_state_dict

    own = {name: tuple(getattr(value, "shape", ())) for name, value in get_model_state_dict(module).items()}
    _require_same(path, own, _stored(path, "model."))


def _check_same_keys(path: Path, own: Mapping[str, Mapping[str, Any]], prefix: str, what: str) -> None:
    stored = _stored(path, prefix)
    missing = [f"{name}.{key}" for name, entry in own.items() for key in entry if f"{name}.{key}" not in stored]
    if missing:
        raise CheckpointError(
            f"{path} lacks {len(missing)} values of this run's {what}, the first is '{missing[0]}': it was saved with "
            "another optimizer; start from its weights alone with --init-from"
        )


def _require_same(path: Path, own: Mapping[str, tuple[int, ...]], stored: Mapping[str, tuple[int, ...]]) -> None:
    problems = [f"'{n}' is missing{did_you_mean(n, stored, limit=0)}" for n in _first(own.keys() - stored.keys())]
    problems += [f"'{n}' is not in this model" for n in _first(stored.keys() - own.keys())]
    differing = [n for n in own.keys() & stored.keys() if own[n] != stored[n]]
    problems += [f"'{n}' is {list(stored[n])}, this model's is {list(own[n])}" for n in _first(differing)]
    if problems:
        count = len(own.keys() ^ stored.keys()) + len(differing)
        raise CheckpointError(f"{path} is of another model: {count} entries differ: " + "; ".join(problems))


def _first(names: Iterable[str], count: int = 3) -> list[str]:
    return sorted(names)[:count]


def _to_disk(folder: Path) -> None:
    """Flush files and their directory: after a power cut a renamed checkpoint must not be empty."""
    for entry in [*folder.iterdir(), folder]:
        descriptor = os.open(entry, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without torch.distributed.checkpoint's remarks about running in one process."""
    logger = logging.getLogger("torch.distributed.checkpoint")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*torch.distributed.*single process.*")
            warnings.filterwarnings("ignore", category=FutureWarning)
            yield
    finally:
        logger.setLevel(level)


def _rank() -> int:
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def _barrier() -> None:
    if dist.is_available() and dist.is_initialized():
        dist.barrier()
