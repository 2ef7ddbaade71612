"""Small data sets on disk in the formats of the real ones."""

from __future__ import annotations

import functools
import gzip
import pickle
import struct
import types
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from PIL import Image

# Real names of ImageNet's classes (WordNet 3.0): tench, goldfish, great white shark, ...
IMAGENET_CLASSES = (
    "n01440764",
    "n01443537",
    "n01484850",
    "n01491361",
    "n01494475",
    "n01496331",
    "n01498041",
    "n01514668",
)
SIZES = [(500, 375), (375, 500), (500, 333), (400, 400)]  # width, height: what most of ImageNet's photographs have


def make_imagenet_tree(root: Path, *, classes: int = 4, per_class: int = 16, val_per_class: int = 4) -> Path:
    """Write JPEG images in ImageNet's layout, ``{train,val}/nXXXXXXXX/*.JPEG``, and return ``root``.

    Every class has a colour of its own under smooth random blobs, so that a small network tells them apart in a few
    steps. An image takes about 2 ms and 12 kB. The same arguments give the same files.
    """
    if not 1 <= classes <= len(IMAGENET_CLASSES):
        raise ValueError(f"1 to {len(IMAGENET_CLASSES)} classes, got {classes}")
    for split, count in (("train", per_class), ("val", val_per_class)):
        for label, name in enumerate(IMAGENET_CLASSES[:classes]):
            folder = root / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                stem = f"{name}_{number}" if split == "train" else f"ILSVRC2012_val_{label * count + number + 1:08d}"
                _photograph(label, number, seed=int(split == "val")).save(folder / f"{stem}.JPEG", quality=80)
    return root


def _photograph(label: int, number: int, *, seed: int) -> Image.Image:
    rng = np.random.RandomState([seed, label, number])
    blobs = 0.5 * rng.uniform(0, 255, (9, 12, 3)) + 0.5 * _colour(label)
    return Image.fromarray(blobs.astype(np.uint8)).resize(SIZES[number % len(SIZES)], Image.Resampling.BICUBIC)


@functools.cache
def _colour(label: int) -> np.ndarray:
    return np.random.RandomState(label).uniform(0, 255, 3)


# --- CIFAR-10 ---------------------------------------------------------------------------------------------------------


def make_cifar10(root: Path, *, per_file: int = 20, seed: int = 0) -> Path:
    """Write ``cifar-10-batches-py`` as the original archive has it: five training files, a test file, the names of the
    classes, each a pickle of Python 2. Every class has a colour of its own under noise. Returns ``root``.
    """
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    rng = np.random.RandomState(seed)
    for name in (*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"):
        labels = rng.permutation(np.arange(per_file) % 10)
        colours = np.stack([_colour(label) for label in labels])[:, :, None]
        pixels = (0.5 * colours + 0.5 * rng.uniform(0, 255, (per_file, 3, 1024))).astype(np.uint8)
        write_python2_pickle(
            folder / name,
            {
                "batch_label": f"training batch {name[-1]} of 5" if name != "test_batch" else "testing batch 1 of 1",
                "labels": labels.tolist(),
                "data": pixels.reshape(per_file, 3072),
                "filenames": [f"image_s_{number:06d}.png" for number in range(per_file)],
            },
        )
    names = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
    meta = {"num_cases_per_batch": per_file, "label_names": names, "num_vis": 3072}
    write_python2_pickle(folder / "batches.meta", meta)
    return root


def write_python2_pickle(path: Path, content: object) -> None:
    """As Python 2's ``cPickle.dump(content, file, protocol=2)``: all text is byte strings."""
    with path.open("wb") as file:
        _Python2Pickler(file, protocol=2).dump(content)


class _Python2Pickler(pickle._Pickler):  # type: ignore[name-defined]  # the one in Python, whose parts can be changed
    dispatch: ClassVar[dict[type, Any]] = dict(pickle._Pickler.dispatch)  # type: ignore[attr-defined]

    def save_byte_string(self, text: str | bytes) -> None:
        content = text.encode() if isinstance(text, str) else text
        if len(content) < 256:
            self.write(pickle.SHORT_BINSTRING + bytes([len(content)]) + content)
        else:
            self.write(pickle.BINSTRING + struct.pack("<i", len(content)) + content)
        self.memoize(text)

    dispatch[str] = dispatch[bytes] = save_byte_string

    def save_global(self, found: Any, name: str | None = None) -> None:
        module = found.__module__.replace("numpy._core", "numpy.core")  # its name before numpy 2
        self.write(pickle.GLOBAL + f"{module}\n{name or found.__qualname__}\n".encode())
        self.memoize(found)

    dispatch[type] = dispatch[types.FunctionType] = save_global


# --- MNIST ------------------------------------------------------------------------------------------------------------


def make_mnist(root: Path, *, train: int = 60, test: int = 20, packed: bool = False, seed: int = 0) -> Path:
    """Write the four IDX files into ``MNIST/raw``, packed by gzip or not. Returns ``root``."""
    folder = root / "MNIST" / "raw"
    folder.mkdir(parents=True)
    rng = np.random.RandomState(seed)
    for split, count in (("train", train), ("t10k", test)):
        labels = (np.arange(count) % 10).astype(np.uint8)
        images = rng.randint(0, 256, (count, 28, 28)).astype(np.uint8) // 2 + 12 * labels[:, None, None]
        for name, array in (("images-idx3", images), ("labels-idx1", labels)):
            head = struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape)
            content = head + array.tobytes()
            path = folder / f"{split}-{name}-ubyte{'.gz' if packed else ''}"
            path.write_bytes(gzip.compress(content) if packed else content)
    return root
