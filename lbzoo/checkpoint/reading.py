"""Reading a checkpoint without running anything that is in it.

torch.distributed.checkpoint reads tensors with ``weights_only=True``, but its table of contents (``.metadata``) and
every other value as pickles, which can call any function. Here the first may name nothing but the classes that such a
table is made of, and the others nothing but what ``weights_only=True`` allows.
"""

from __future__ import annotations

import io
import pathlib
import pickle
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemReader, LoadPlan, LoadPlanner, metadata
from torch.distributed.checkpoint._traverse import set_element
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import ReadItem
from torch.distributed.checkpoint.state_dict_loader import load as load_state
from torch.futures import Future

from lbzoo.errors import CheckpointError

_CLASSES = {
    (kind.__module__, kind.__qualname__): kind
    for kind in (
        metadata.BytesStorageMetadata,
        metadata.ChunkStorageMetadata,
        metadata.Metadata,
        metadata.MetadataIndex,
        metadata.StorageMeta,
        metadata.TensorProperties,
        metadata.TensorStorageMetadata,
        metadata._MEM_FORMAT_ENCODING,
        _StorageInfo,
        torch.Size,
    )
}
_PATHS = ("Path", "PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath")


class _TableOfContents(pickle.Unpickler):
    """Reads ``.metadata``. The types of tensors are constants; a path is a name, which opens nothing."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _CLASSES:
            return _CLASSES[module, name]
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if (module, name) == ("torch.serialization", "_get_layout"):
            return torch.serialization._get_layout  # looks a name up among the layouts
        if module.partition(".")[0] == "pathlib" and name in _PATHS:
            return pathlib.PurePosixPath
        raise pickle.UnpicklingError(f"it names {module}.{name}, which no checkpoint needs")


class _Reader(FileSystemReader):
    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        found = read_metadata(Path(self.path))
        found.storage_meta = found.storage_meta or StorageMeta()
        found.storage_meta.load_id = self.load_id
        return found

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        for info in self.storage_data.values():
            if Path(info.relative_path).name != info.relative_path:
                raise CheckpointError(f"{self.path}: .metadata names a file outside of it, {info.relative_path}")
        done: Future[None] = super().read_data(plan, planner)
        return done


class _Planner(DefaultLoadPlanner):
    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        loaded = torch.load(value, map_location="cpu", weights_only=True)
        set_element(self.original_state_dict, self.mappings[read_item.dest_index.fqn], loaded)


def read_metadata(path: Path) -> Metadata:
    """A checkpoint's table of contents. Raises CheckpointError where it is damaged, or names what it should not."""
    try:
        with (path / ".metadata").open("rb") as file:
            found = _TableOfContents(file).load()
    except Exception as error:
        raise CheckpointError(f"{path} is damaged: its .metadata cannot be read ({error})") from error
    if not isinstance(found, Metadata):
        raise CheckpointError(f"{path} is damaged: its .metadata is no table of contents")
    return found


def load_into(state: dict[str, Any], path: Path) -> None:
    """Fill the tensors of ``state``, and replace its other values, by what the checkpoint has. Collective."""
    try:
        load_state(state, storage_reader=_Reader(path), planner=_Planner())
    except CheckpointException as error:
        raise CheckpointError(f"{path} cannot be read: {first_failure(error)}") from error


def first_failure(error: CheckpointException) -> str:
    """What went wrong on the first rank on which something did."""
    rank, (cause, _) = next(iter(error.failures.items()))
    return f"{cause}" if len(error.failures) == 1 and rank == 0 else f"{cause} (rank {rank})"
