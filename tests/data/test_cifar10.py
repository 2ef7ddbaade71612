"""CIFAR-10's pickles: torchvision's images and labels, every fault named, and nothing in a file is ever called."""

from __future__ import annotations

import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from data_factories import make_cifar10, write_python2_pickle
from torchvision import datasets

from lbzoo.data.base import SampleKey
from lbzoo.data.cifar10 import Cifar10
from lbzoo.data.loader import train_loader
from lbzoo.errors import DataError, UsageError

PER_FILE = 20


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_cifar10(tmp_path_factory.mktemp("cifar") / "data", per_file=PER_FILE)


@pytest.fixture
def root(shared: Path, tmp_path: Path) -> Path:
    """A copy that a test may break."""
    return Path(shutil.copytree(shared, tmp_path / "data"))


def complaint(root: Path) -> str:
    with pytest.raises(DataError) as caught:
        Cifar10(root=str(root)).prepare()
    return str(caught.value)


def test_the_generated_files_are_pickles_of_python_2(shared: Path) -> None:
    content = (shared / "cifar-10-batches-py" / "data_batch_1").read_bytes()
    assert content.startswith(b"\x80\x02}")
    assert b"U\x06labels" in content  # a byte string of Python 2
    assert b"cnumpy.core.multiarray\n_reconstruct\n" in content
    with pytest.raises(UnicodeDecodeError):
        pickle.loads(content)  # as Python 3 does with the real ones


def test_images_and_labels_are_torchvisions(shared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.CIFAR10, "_check_integrity", lambda self: True)  # checksums of the real files
    monkeypatch.setattr(datasets.cifar, "check_integrity", lambda *args: True)
    source = Cifar10(root=str(shared), pad=0, flip=False)
    train, val = source.train_dataset(), source.val_dataset()
    for ours, is_train in ((train.unaugmented(), True), (val, False)):
        peer = datasets.CIFAR10(str(shared), train=is_train, download=False)
        images, labels = ours.__getitems__(list(range(len(ours))))
        assert np.array_equal(images.permute(0, 2, 3, 1), peer.data)
        assert labels.tolist() == peer.targets
    images, labels = train.__getitems__([SampleKey(index, 7) for index in range(len(train))])
    assert torch.equal(images, train.unaugmented().__getitems__(list(range(len(train))))[0])


def test_facts(shared: Path) -> None:
    source = Cifar10(root=str(shared))
    facts = source.facts()
    assert (facts.num_train, facts.num_val, facts.num_classes, facts.input_shape) == (50000, 10000, 10, (3, 32, 32))
    source.prepare()
    assert (source.facts().num_train, source.facts().num_val) == (5 * PER_FILE, PER_FILE)


def test_the_folder_itself_and_the_environment(shared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Cifar10(root=str(shared / "cifar-10-batches-py")).prepare()
    monkeypatch.setenv("LBZOO_CIFAR10", str(shared))
    Cifar10().prepare()
    monkeypatch.delenv("LBZOO_CIFAR10")
    with pytest.raises(DataError, match=r"neither data\.root nor LBZOO_CIFAR10 is set") as caught:
        Cifar10().prepare()
    assert "cifar-10-python.tar.gz from www.cs.toronto.edu" in str(caught.value)


def test_no_folder(tmp_path: Path) -> None:
    assert "cifar-10-batches-py: no such folder\n" in complaint(tmp_path)
    (tmp_path / "cifar-100-python").mkdir()
    assert "but cifar-100-python, which is another data set" in complaint(tmp_path)
    (tmp_path / "cifar-10-batches-bin").mkdir()
    assert "but cifar-10-batches-bin, the version for C programs" in complaint(tmp_path)
    (tmp_path / "cifar-10-python.tar.gz").touch()
    assert "but its archive: unpack cifar-10-python.tar.gz" in complaint(tmp_path)


def test_everything_wrong_is_said_at_once(root: Path) -> None:
    folder = root / "cifar-10-batches-py"
    (folder / "data_batch_2").unlink()
    whole = (folder / "data_batch_3").read_bytes()
    (folder / "data_batch_3").write_bytes(whole[: len(whole) // 2])
    write_python2_pickle(folder / "data_batch_4", {"data": np.zeros((2, 3072), np.uint8), "labels": [1]})
    write_python2_pickle(folder / "data_batch_5", {"data": np.zeros((2, 3072), np.uint8), "labels": [1, 10]})
    write_python2_pickle(folder / "test_batch", {"data": np.zeros((2, 1024), np.uint8), "labels": [1, 2]})
    message = complaint(root)
    assert f"CIFAR-10 in {folder} cannot be used:" in message
    assert "data_batch_1" not in message.partition("\nSet data.root")[0]
    assert "\n  data_batch_2: No such file or directory\n" in message
    assert "\n  data_batch_3: cannot be unpickled: " in message
    assert "\n  data_batch_4: 2 images, but 1 labels\n" in message
    assert "\n  data_batch_5: labels from 1 to 10, not from 0 to 9\n" in message
    assert "\n  test_batch: b'data' is uint8 of shape [2, 1024], not uint8 of [N, 3072]\n" in message


@pytest.mark.parametrize("content", [["a list"], {"data": 1}, 7, np.zeros(3, np.uint8)])
def test_a_pickle_of_something_else(root: Path, content: object) -> None:
    write_python2_pickle(root / "cifar-10-batches-py" / "test_batch", content)
    assert "test_batch: holds no b'data' and b'labels'" in complaint(root)


class Attack:
    def __init__(self, target: object, *arguments: object) -> None:
        self.call = (target, arguments)

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return self.call


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_nothing_in_a_file_is_called(root: Path, tmp_path: Path, protocol: int) -> None:
    trace = tmp_path / "trace"
    builtins = "builtins" if protocol > 2 else "__builtin__"
    attacks = {
        "posix.mkdir": Attack(os.mkdir, str(trace)),
        f"{builtins}.eval": Attack(eval, f"open({str(trace)!r}, 'w')"),
        f"{builtins}.getattr": Attack(getattr, "text", "upper"),
    }
    for name, attack in attacks.items():
        content = pickle.dumps({b"data": attack, b"labels": [0]}, protocol=protocol)
        (root / "cifar-10-batches-py" / "test_batch").write_bytes(content)
        assert f"test_batch: cannot be unpickled: it wants to call {name}, which" in complaint(root)
    assert not trace.exists()


def test_an_array_of_objects_brings_nothing_in(root: Path) -> None:
    content = pickle.dumps({b"data": np.array([Attack(os.getcwd)], dtype=object), b"labels": [0]}, protocol=2)
    (root / "cifar-10-batches-py" / "test_batch").write_bytes(content)
    assert "it wants to call posix.getcwd" in complaint(root)


def test_a_file_of_python_3_is_read_too(root: Path) -> None:
    """What people write who convert or cut the set."""
    folder = root / "cifar-10-batches-py"
    for protocol in (2, 5):
        content = {b"data": np.full((3, 3072), 7, np.uint8), b"labels": [1, 2, 3]}
        (folder / "test_batch").write_bytes(pickle.dumps(content, protocol=protocol))
        images, labels = Cifar10(root=str(root)).val_dataset().__getitems__([0, 1, 2])
        assert labels.tolist() == [1, 2, 3]
        assert bool((images == 7).all())


def test_micro_batches_of_a_loader(shared: Path) -> None:
    loader = train_loader(Cifar10(root=str(shared)), global_batch_size=16, micro_batch_size=8, steps=9, seed=1)
    batches = list(loader)
    assert len(batches) == 18
    images, labels = batches[0]
    assert images.shape == (8, 3, 32, 32)
    assert (images.dtype, labels.dtype) == (torch.uint8, torch.int64)
    assert images.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(("options", "message"), [({"pad": 32}, "pad is a number"), ({"cutout": -1}, "cutout is")])
def test_impossible_options(options: dict[str, int], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Cifar10(**options)
