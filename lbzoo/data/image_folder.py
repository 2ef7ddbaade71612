"""Images on disk in ImageNet's layout, ``{train,val}/<class>/<image>``: what is there, and what is wrong with it.

Classes and images come in the order of torchvision's ``ImageFolder``.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from lbzoo.errors import DataError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

IMAGE_SUFFIXES = (".jpeg", ".jpg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
SPLITS = ("train", "val")


@dataclass(frozen=True)
class ImageFiles:
    """The images of one split.

    File names are one array and not a list of strings: a loader process would copy a list page by page as it touches
    the reference counts, 200 bytes an image.
    """

    folder: Path
    classes: tuple[str, ...]
    names: NDArray[np.bytes_]
    labels: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.labels)

    def path(self, index: int) -> Path:
        return self.folder / self.classes[int(self.labels[index])] / os.fsdecode(bytes(self.names[index]))


class ImageTree:
    """The two splits under ``root``; each is listed once, when it is first asked for."""

    def __init__(self, root: Path) -> None:
        self.root = root

    @cached_property
    def train(self) -> ImageFiles:
        return list_images(self.root / "train")

    @cached_property
    def val(self) -> ImageFiles:
        return list_images(self.root / "val")

    def problems(self) -> list[str]:
        """What keeps the tree from being trained on, one line each; empty where it is whole."""
        if not self.root.is_dir():
            return ["no such folder"]
        missing = [split for split in SPLITS if not (self.root / split).is_dir()]
        found = [f"{split}: no such folder" for split in missing]
        for split in SPLITS:
            if split not in missing:
                found += _problems_of_split(split, getattr(self, split))
        if not missing and self.train.classes and self.val.classes:
            found += _difference(self.train.classes, self.val.classes)
        return found


def list_images(folder: Path) -> ImageFiles:
    """The images in the class folders of a split, sorted by class and name. Raises DataError where it is not there."""
    import numpy as np

    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder")
    classes = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith("."))
    names: list[bytes] = []
    counts: list[int] = []
    for name in classes:
        images = sorted(entry.name for entry in os.scandir(folder / name) if _is_image(entry.name))
        names += map(os.fsencode, images)
        counts.append(len(images))
    labels = np.repeat(np.arange(len(classes), dtype=np.int64), counts)
    return ImageFiles(folder, tuple(classes), np.array(names, dtype=np.bytes_), labels)


def _problems_of_split(split: str, files: ImageFiles) -> list[str]:
    if not files.classes:
        return [f"{split}: no class folders{_what_is_there_instead(files.folder)}"]
    filled = set(files.labels.tolist())
    empty = [name for label, name in enumerate(files.classes) if label not in filled]
    if not empty:
        return []
    return [f"{split}: {len(empty)} of {len(files.classes)} class folders hold no images: {_some(empty)}"]


def _what_is_there_instead(folder: Path) -> str:
    """The two ways in which the original archives are left half unpacked."""
    names = os.listdir(folder)
    images, archives = sum(map(_is_image, names)), sum(name.endswith(".tar") for name in names)
    if images:
        return f", but images ({images}): sort them into one folder for each class"
    if archives:
        return f", but archives ({archives}): unpack each into a folder of its name"
    return ""


def _difference(train: Sequence[str], val: Sequence[str]) -> list[str]:
    """Classes are numbered in each split by its own folders, so one that is missing shifts all labels after it."""
    found = []
    for lacking, there, other, wanted in (("val", val, "train", train), ("train", train, "val", val)):
        missing = sorted(set(wanted) - set(there))
        if missing:
            found.append(f"{lacking}: lacks {len(missing)} of the {len(wanted)} classes of {other}: {_some(missing)}")
    return found


def _some(names: list[str], limit: int = 5) -> str:
    return ", ".join(names[:limit]) + (", ..." if len(names) > limit else "")


def _is_image(name: str) -> bool:
    return name.lower().endswith(IMAGE_SUFFIXES) and not name.startswith(".")
