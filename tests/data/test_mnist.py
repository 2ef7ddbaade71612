"""MNIST's IDX files: torchvision's images and labels, packed or not, every fault named."""

from __future__ import annotations

import gzip
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from data_factories import make_mnist
from torchvision import datasets

from lbzoo.data.base import SampleKey
from lbzoo.data.mnist import Mnist
from lbzoo.errors import DataError


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_mnist(tmp_path_factory.mktemp("mnist") / "data")


@pytest.fixture
def root(shared: Path, tmp_path: Path) -> Path:
    """A copy that a test may break."""
    return Path(shutil.copytree(shared, tmp_path / "data"))


def complaint(root: Path) -> str:
    with pytest.raises(DataError) as caught:
        Mnist(root=str(root)).prepare()
    return str(caught.value)


def test_images_and_labels_are_torchvisions(shared: Path) -> None:
    source = Mnist(root=str(shared))
    for ours, is_train in ((source.train_dataset(), True), (source.val_dataset(), False)):
        peer = datasets.MNIST(str(shared), train=is_train, download=False)
        images, labels = ours.__getitems__(list(range(len(ours))))
        assert torch.equal(images.squeeze(1), peer.data)
        assert torch.equal(labels, peer.targets)
        assert images.dtype == torch.uint8
    assert torch.equal(source.train_dataset()[SampleKey(5, 3)][0], source.train_dataset()[5][0])


def test_packed_files(shared: Path, tmp_path: Path) -> None:
    packed = make_mnist(tmp_path / "packed", packed=True)
    assert not list(packed.rglob("*-ubyte"))
    for name in ("train_dataset", "val_dataset"):
        ours, theirs = (getattr(Mnist(root=str(root)), name)().tensors for root in (packed, shared))
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_facts(shared: Path) -> None:
    source = Mnist(root=str(shared))
    facts = source.facts()
    assert (facts.num_train, facts.num_val, facts.num_classes, facts.input_shape) == (60000, 10000, 10, (1, 28, 28))
    source.prepare()
    assert (source.facts().num_train, source.facts().num_val) == (60, 20)


def test_the_folder_itself_and_the_environment(shared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Mnist(root=str(shared / "MNIST" / "raw")).prepare()
    monkeypatch.setenv("LBZOO_MNIST", str(shared))
    Mnist().prepare()
    monkeypatch.delenv("LBZOO_MNIST")
    with pytest.raises(DataError, match=r"neither data\.root nor LBZOO_MNIST is set"):
        Mnist().prepare()


def test_no_folder(tmp_path: Path) -> None:
    message = complaint(tmp_path)
    assert f"MNIST in {tmp_path} cannot be used:\n  MNIST/raw: no such folder\nSet data.root=FOLDER" in message
    assert "FOLDER/MNIST/raw/t10k-labels-idx1-ubyte" in message


def test_everything_wrong_is_said_at_once(root: Path) -> None:
    folder = root / "MNIST" / "raw"
    (folder / "train-labels-idx1-ubyte").unlink()
    images = folder / "train-images-idx3-ubyte"
    images.write_bytes(images.read_bytes()[:-1])
    labels = folder / "t10k-labels-idx1-ubyte"
    labels.write_bytes(struct.pack(">BBBBI", 0, 0, 8, 1, 3) + bytes(3))
    message = complaint(root)
    whole = 16 + 60 * 28 * 28
    assert f"\n  train-images-idx3-ubyte: has {whole - 1:,} bytes, not the {whole:,} that its head announces" in message
    assert "\n  train-labels-idx1-ubyte: no such file, nor train-labels-idx1-ubyte.gz" in message
    assert "\n  t10k: 20 images, but 3 labels" in message


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"<html>404</html>", "is no IDX file: it does not begin with two zero bytes"),
        (b"", "is no IDX file"),
        (struct.pack(">BBBBI", 0, 0, 13, 1, 1) + bytes(4), "holds values of type 0x0d, not unsigned bytes"),
        (b"\0\0\x08\x03\0\0", "has 6 bytes"),
        (struct.pack(">BBBBIII", 0, 0, 8, 3, 20, 4, 4) + bytes(320), r"shape \[20, 4, 4\], not \[N, 28, 28\]"),
    ],
)
def test_damaged_images(root: Path, content: bytes, reason: str) -> None:
    (root / "MNIST" / "raw" / "t10k-images-idx3-ubyte").write_bytes(content)
    with pytest.raises(DataError, match=f"t10k-images-idx3-ubyte: {reason}"):
        Mnist(root=str(root)).prepare()


def test_damaged_archive(tmp_path: Path) -> None:
    root = make_mnist(tmp_path, packed=True)
    path = root / "MNIST" / "raw" / "train-images-idx3-ubyte.gz"
    path.write_bytes(path.read_bytes()[:5000])
    assert "train-images-idx3-ubyte.gz: cannot be read: " in complaint(root)
    path.write_bytes(b"not packed")
    assert "train-images-idx3-ubyte.gz: cannot be read: " in complaint(root)


def test_labels_beyond_the_classes(root: Path) -> None:
    path = root / "MNIST" / "raw" / "train-labels-idx1-ubyte"
    labels = np.frombuffer(path.read_bytes()[8:], np.uint8).copy()
    labels[3] = 10
    path.write_bytes(path.read_bytes()[:8] + labels.tobytes())
    assert "train-labels-idx1-ubyte: a label of 10, not from 0 to 9" in complaint(root)


def test_gzip_is_not_taken_for_granted(root: Path) -> None:
    """A file that was packed but is named as if it were not."""
    path = root / "MNIST" / "raw" / "train-images-idx3-ubyte"
    path.write_bytes(gzip.compress(path.read_bytes()))
    assert "train-images-idx3-ubyte: is no IDX file" in complaint(root)
