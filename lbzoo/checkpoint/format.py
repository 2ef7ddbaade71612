"""Loading a checkpoint into a model and an optimizer, whatever layout they have now.

Every rank calls these functions: shards are read where they live. Keys are parameter names of the module without
``module.`` or ``_orig_mod.``, so another engine, another number of devices and another layout read the same files.
What does not belong together is named before anything is loaded.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lbzoo.checkpoint.folder import CALLBACKS_FILE, FORMAT, read_state
from lbzoo.checkpoint.quiet import quiet
from lbzoo.checkpoint.transformers_folder import is_transformers_folder, load_transformers_folder
from lbzoo.errors import CheckpointError, did_you_mean

log = logging.getLogger(__name__)

Shapes = Mapping[str, tuple[int, ...]]
_EVERY = ("",)  # how every name begins


def load_checkpoint(
    path: Path,
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    averages: Mapping[str, torch.Tensor] | None = None,
) -> dict[str, Any]:
    """Load model, optimizer and averages in place, whatever layout they have now, and return the checkpoint's state.

    Raises CheckpointError where a file is damaged or where the checkpoint is of another model, naming the parameters.
    """
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    from lbzoo.checkpoint.reading import load_into

    state, stored = _read_supported(path), _stored(path)
    model_state, optimizer_state = get_state_dict(module, optimizer)
    _require_same(path, shapes(model_state), _below("model.", stored))
    target: dict[str, Any] = {"model": model_state, "optimizer": optimizer_state}
    _check_has_optimizer_state(path, target["optimizer"]["state"], stored)
    if averages is not None:
        _require_same(path, shapes(averages), _averages_in(stored, path))
        target["ema"] = dict(averages)
    with quiet():
        load_into(target, path)
    set_state_dict(module, optimizer, model_state_dict=target["model"], optim_state_dict=target["optimizer"])
    return state


def load_optimizer(path: Path, module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Load the optimizer's state alone, in place; its options stay those that it has now.

    Raises CheckpointError where it is of other parameters or of another optimizer.
    """
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

    from lbzoo.checkpoint.reading import load_into

    _read_supported(path)
    target: dict[str, Any] = dict(get_optimizer_state_dict(module, optimizer))
    entries = {f"{name}.{key}": value for name, entry in target["state"].items() for key, value in entry.items()}
    what = "the state of another optimizer or model"
    _require_same(path, shapes(entries), _below("optimizer.state.", _stored(path)), what=what)
    state: dict[str, Any] = {"optimizer": {"state": target["state"]}}
    with quiet():
        load_into(state, path)
    set_optimizer_state_dict(module, optimizer, {**target, "state": state["optimizer"]["state"]})


def load_callbacks(path: Path) -> dict[str, Any]:
    """The states of the callbacks by name; {} where none had any."""
    file = path / CALLBACKS_FILE
    if not file.is_file():
        return {}
    try:
        return dict(torch.load(file, map_location="cpu", weights_only=True))
    except Exception as error:
        raise CheckpointError(f"{file} cannot be read: {error}") from error


def load_weights(path: Path, module: nn.Module, *, averaged: bool = False, shared: Sequence[str] = ()) -> None:
    """Load the model's weights alone: from a checkpoint, or from a ``.pt``/``.pth``/``.safetensors`` state dict.

    Also from a folder of transformers', for a task on one of its models.

    ``averaged`` takes a checkpoint's averages in place of the weights that they are of. ``shared``: how the names of
    those weights begin that must be the same in both, where others may differ; without it all must.
    """
    if path.is_file():
        _load_weights_file(path, module, shared or _EVERY)
        return
    if is_transformers_folder(path):
        _log_differences(str(path), *load_transformers_folder(path, module))
        return
    from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict

    from lbzoo.checkpoint.reading import load_into

    _read_supported(path)
    stored, own = _stored(path), get_model_state_dict(module)
    names = names_in_common(str(path), shapes(own), _below("model.", stored), shared or _EVERY)
    target = {"model": {name: own[name] for name in names}}
    with quiet():
        load_into(target, path)
    set_model_state_dict(module, {**own, **target["model"]})
    if averaged:
        averages = _averages_in(stored, path)
        _load_averages(path, module, [name for name in names if name in averages])


def names_in_common(source: str, own: Shapes, given: Shapes, shared: Sequence[str]) -> list[str]:
    """The weights of ``source`` that a model starts with: those that it has too, in the same shape.

    What is new in the model and what is left out is logged. Raises CheckpointError where the weights whose names begin
    as ``shared`` says are not the same.
    """
    _require_same(source, _beginning(shared, own), _beginning(shared, given))
    names = [name for name, shape in own.items() if given.get(name) == shape]
    _log_differences(source, sorted(own.keys() - names), sorted(given.keys() - names))
    return names


def _beginning(prefixes: Sequence[str], shapes: Shapes) -> Shapes:
    return {name: shape for name, shape in shapes.items() if name.startswith(tuple(prefixes))}


def _log_differences(source: str, new: Sequence[str], left_out: Sequence[str]) -> None:
    for what, names in (("new here", new), ("left out", left_out)):
        if names:
            log.warning("%s: %d weights are %s, the first is %s", source, len(names), what, names[0])


def _load_averages(path: Path, module: nn.Module, names: Iterable[str]) -> None:
    from lbzoo.checkpoint.reading import load_into

    own = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    with quiet():
        load_into({"ema": {name: own[name].detach() for name in names}}, path)


def _averages_in(stored: Shapes, path: Path) -> Shapes:
    averages = _below("ema.", stored)
    if not averages:
        raise CheckpointError(f"{path} holds no averages of the weights: it was saved without trainer.ema")
    return averages


def shapes(values: Mapping[str, Any]) -> Shapes:
    """Of tensors; () for what is not one."""
    return {name: tuple(getattr(value, "shape", ())) for name, value in values.items()}


def _load_weights_file(path: Path, module: nn.Module, shared: Sequence[str]) -> None:
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
    own = module.state_dict()
    names = names_in_common(str(path), shapes(own), shapes(weights), shared)
    module.load_state_dict({**own, **{name: weights[name] for name in names}})


def _read_supported(path: Path) -> dict[str, Any]:
    state = read_state(path)
    if state.get("format") != FORMAT:
        raise CheckpointError(f"{path} has format {state.get('format')!r}; this version of lbzoo reads {FORMAT}")
    return state


def _stored(path: Path) -> Shapes:
    """Everything that the checkpoint's table of contents names."""
    from lbzoo.checkpoint.reading import read_metadata

    entries = read_metadata(path).state_dict_metadata
    return {name: tuple(getattr(entry, "size", ())) for name, entry in entries.items()}


def _below(prefix: str, stored: Shapes) -> Shapes:
    return {name.removeprefix(prefix): shape for name, shape in stored.items() if name.startswith(prefix)}


def _check_has_optimizer_state(path: Path, own: Mapping[str, Mapping[str, Any]], stored: Shapes) -> None:
    names = (f"{name}.{key}" for name, entry in own.items() for key in entry)
    missing = [name for name in names if f"optimizer.state.{name}" not in stored]
    if missing:
        raise CheckpointError(
            f"{path} lacks {len(missing)} values of this run's optimizer state, the first is '{missing[0]}': it was "
            "saved with another optimizer; start from its weights alone with --init-from"
        )


def _require_same(source: str | Path, own: Shapes, stored: Shapes, what: str = "another model") -> None:
    problems = [f"'{n}' is missing{did_you_mean(n, stored, limit=0)}" for n in _first(own.keys() - stored.keys())]
    problems += [f"'{n}' is not in this model" for n in _first(stored.keys() - own.keys())]
    differing = [n for n in own.keys() & stored.keys() if own[n] != stored[n]]
    problems += [f"'{n}' is {list(stored[n])}, this model's is {list(own[n])}" for n in _first(differing)]
    if problems:
        count = len(own.keys() ^ stored.keys()) + len(differing)
        raise CheckpointError(f"{source} is of {what}: {count} entries differ: " + "; ".join(problems))


def _first(names: Iterable[str], count: int = 3) -> list[str]:
    return sorted(names)[:count]
