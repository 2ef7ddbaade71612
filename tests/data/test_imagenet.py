"""ImageNet's folders: torchvision's labels, every fault named, augmentation that is a function of its key."""

from __future__ import annotations

import logging
import os
import random
import shutil
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from data_factories import IMAGENET_CLASSES, make_imagenet_tree
from PIL import Image
from torchvision import transforms
from torchvision.datasets import ImageFolder

from lbzoo.data.base import SampleKey
from lbzoo.data.imagenet import ImageNet, collate_images
from lbzoo.data.rng import stable_rng
from lbzoo.errors import DataError, UsageError

CLASSES, PER_CLASS, VAL_PER_CLASS = 3, 5, 2


@pytest.fixture(scope="module")
def shared_tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("images") / "imagenet"
    return make_imagenet_tree(root, classes=CLASSES, per_class=PER_CLASS, val_per_class=VAL_PER_CLASS)


@pytest.fixture
def tree(shared_tree: Path, tmp_path: Path) -> Path:
    """A copy that a test may break."""
    return Path(shutil.copytree(shared_tree, tmp_path / "imagenet"))


def complaint(root: Path, **options: object) -> str:
    with pytest.raises(DataError) as caught:
        ImageNet(root=str(root), **options).prepare()
    return str(caught.value)


def test_files_and_labels_are_torchvisions(shared_tree: Path) -> None:
    source = ImageNet(root=str(shared_tree))
    for split, samples in (("train", source.train_dataset()), ("val", source.val_dataset())):
        peer = ImageFolder(str(shared_tree / split))
        ours = [(str(samples.files.path(i)), int(samples.files.labels[i])) for i in range(len(samples))]
        assert ours == peer.samples


def test_validation_pixels_are_torchvisions(shared_tree: Path) -> None:
    samples = ImageNet(root=str(shared_tree), image_size=96, resize_size=110).val_dataset()
    transform = transforms.Compose([transforms.Resize(110), transforms.CenterCrop(96)])
    peer = ImageFolder(str(shared_tree / "val"), transform)
    for index in range(len(samples)):
        pixels, label = samples[index]
        assert np.array_equal(pixels, np.asarray(peer[index][0]))
        assert label == peer[index][1]


def test_facts_are_nominal_until_the_files_are_counted(shared_tree: Path) -> None:
    source = ImageNet(root=str(shared_tree), num_classes=CLASSES)
    assert source.facts().num_train == 1281167
    source.prepare()
    facts = source.facts()
    assert (facts.num_train, facts.num_val) == (CLASSES * PER_CLASS, CLASSES * VAL_PER_CLASS)
    assert facts.num_classes == CLASSES


def test_root_from_the_environment(shared_tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LBZOO_IMAGENET", str(shared_tree))
    source = ImageNet()
    source.prepare()
    assert len(source.train_dataset()) == CLASSES * PER_CLASS


def test_no_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LBZOO_IMAGENET", raising=False)
    source = ImageNet()
    for use in (source.prepare, source.train_dataset):
        with pytest.raises(DataError) as caught:
            use()
        message = str(caught.value)
        assert "neither data.root nor LBZOO_IMAGENET is set" in message
        assert "FOLDER/train/<class>/<image>" in message
        assert "image-net.org" in message


def test_root_that_is_not_there(tmp_path: Path) -> None:
    message = complaint(tmp_path / "nothing")
    assert f"the images in {tmp_path / 'nothing'} cannot be used:\n  no such folder" in message


def test_a_split_is_missing(tree: Path) -> None:
    shutil.rmtree(tree / "val")
    assert "\n  val: no such folder\n" in complaint(tree)
    with pytest.raises(DataError, match=r"val: no such folder"):
        ImageNet(root=str(tree)).val_dataset()


def test_everything_wrong_is_said_at_once(tree: Path) -> None:
    first, second, third = IMAGENET_CLASSES[:3]
    for image in (tree / "train" / first).iterdir():
        image.unlink()
    (tree / "train" / first / "notes.txt").touch()
    (tree / "val" / second).rename(tree / "val" / "n99999999")
    message = complaint(tree)
    assert f"train: 1 of 3 class folders hold no images: {first}" in message
    assert f"val: lacks 1 of the 3 classes of train: {second}" in message
    assert "train: lacks 1 of the 3 classes of val: n99999999" in message
    assert third not in message


def test_many_faulty_classes_are_counted_not_listed(tmp_path: Path) -> None:
    for split in ("train", "val"):
        for number in range(100):
            (tmp_path / split / f"c{number:03d}").mkdir(parents=True)
    message = complaint(tmp_path)
    assert "train: 100 of 100 class folders hold no images: c000, c001, c002, c003, c004, ..." in message
    assert message.count("\n") < 8


def test_validation_images_not_sorted_into_classes(tree: Path) -> None:
    for image in list((tree / "val").rglob("*.JPEG")):
        image.rename(tree / "val" / image.name)
    for name in IMAGENET_CLASSES[:CLASSES]:
        (tree / "val" / name).rmdir()
    assert "val: no class folders, but images (6): sort them into one folder for each class" in complaint(tree)


def test_archives_not_unpacked(tree: Path) -> None:
    shutil.rmtree(tree / "train")
    (tree / "train").mkdir()
    (tree / "train" / "n01440764.tar").touch()
    assert "train: no class folders, but archives (1): unpack each into a folder of its name" in complaint(tree)


def test_more_classes_than_the_model_has(shared_tree: Path) -> None:
    assert "train: 3 classes, but data.num_classes is 2" in complaint(shared_tree, num_classes=2)


def test_hidden_files_are_no_images(tree: Path) -> None:
    (tree / "train" / ".cache").mkdir()
    (tree / "train" / IMAGENET_CLASSES[0] / "._photo.JPEG").touch()  # macOS leaves such beside the real ones
    source = ImageNet(root=str(tree))
    source.prepare()
    assert source.facts().num_train == CLASSES * PER_CLASS


@pytest.mark.parametrize("mode", ["L", "CMYK", "RGBA", "P"])
def test_images_that_are_not_rgb(tree: Path, mode: str) -> None:
    """ImageNet has grey and CMYK files, and a PNG that is named JPEG."""
    path = sorted((tree / "train" / IMAGENET_CLASSES[0]).iterdir())[0]
    with Image.open(path) as image:
        image.convert(mode).save(path, format="PNG" if mode in ("RGBA", "P") else "JPEG")
    pixels, _ = ImageNet(root=str(tree)).train_dataset()[SampleKey(0, 0)]
    assert pixels.shape == (224, 224, 3)
    assert pixels.dtype == np.uint8


def test_grey_values_of_16_bits_are_scaled_and_not_cut_off(tree: Path) -> None:
    path = sorted((tree / "val" / IMAGENET_CLASSES[0]).iterdir())[0]
    grey = np.linspace(0, 255, 300 * 300).astype(np.uint8).reshape(300, 300)
    source = ImageNet(root=str(tree))
    Image.fromarray(grey).save(path, format="PNG")
    expected, _ = source.val_dataset()[0]
    Image.fromarray(grey.astype(np.uint16) * 257).save(path, format="PNG")
    assert np.array_equal(source.val_dataset()[0][0], expected)
    assert 0 < expected.mean() < 250


def test_file_names_are_bytes(tree: Path) -> None:
    """One that is no UTF-8 is read like any other."""
    folder = os.fsencode(tree / "val" / IMAGENET_CLASSES[0])
    name = sorted(os.listdir(folder))[0]
    os.rename(folder + b"/" + name, folder + b"/caf\xe9.JPEG")
    samples = ImageNet(root=str(tree), max_unreadable=0.9).val_dataset()
    places = [index for index in range(len(samples)) if os.fsencode(samples.files.path(index)).endswith(b"\xe9.JPEG")]
    assert len(places) == 1
    samples[places[0]]
    assert len(samples.faults[0]) == 0


@pytest.mark.parametrize("crop", ["random_resized", "random"])
def test_augmentation_is_a_function_of_seed_index_and_epoch(shared_tree: Path, crop: str) -> None:
    def pixels(seed: int, index: int, epoch: int) -> np.ndarray:
        source = ImageNet(root=str(shared_tree), image_size=48, resize_size=64, train_crop=crop)
        return source.train_dataset(seed=seed)[SampleKey(index, epoch)][0]

    once = pixels(1, 2, 3)
    assert once.shape == (48, 48, 3)
    assert np.array_equal(once, pixels(1, 2, 3))
    for other in ((2, 2, 3), (1, 2, 4), (1, 3, 3)):
        assert not np.array_equal(once, pixels(*other))


def test_augmentation_draws_from_a_generator_of_the_key(shared_tree: Path) -> None:
    samples = ImageNet(root=str(shared_tree), image_size=48, resize_size=64).train_dataset(seed=5)
    samples[SampleKey(0, 0)]
    with Image.open(samples.files.path(2)) as image:
        expected = samples.preprocessing.for_training(image.convert("RGB"), stable_rng(5, 2, 3, 1))
    assert np.array_equal(samples[SampleKey(2, 3)][0], expected)


def test_augmentation_leaves_the_global_generators_alone(shared_tree: Path) -> None:
    samples = ImageNet(root=str(shared_tree)).train_dataset()
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    samples[SampleKey(0, 0)]
    after = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    assert torch.equal(before[0], after[0])
    assert before[1:] == after[1:]


def test_random_crop_is_a_part_of_the_resized_image(shared_tree: Path) -> None:
    samples = ImageNet(root=str(shared_tree), image_size=40, resize_size=50, train_crop="random").train_dataset()
    with Image.open(samples.files.path(0)) as image:
        whole = np.asarray(transforms.Resize(50)(image.convert("RGB")))
    seen = set()
    for epoch in range(20):
        pixels, _ = samples[SampleKey(0, epoch)]
        for flipped in (False, True):
            mirror = pixels[:, ::-1] if flipped else pixels
            places = np.lib.stride_tricks.sliding_window_view(whole, (40, 40, 3))[:, :, 0]
            hits = np.argwhere((places == mirror).all(axis=(2, 3, 4)))
            seen |= {(flipped, *hit) for hit in hits.tolist()}
    assert len(seen) == 20  # each epoch another place
    assert {flipped for flipped, _, _ in seen} == {False, True}


def test_a_micro_batch_is_uint8_and_channels_last(shared_tree: Path) -> None:
    samples = ImageNet(root=str(shared_tree), image_size=32, resize_size=40).val_dataset()
    images, labels = collate_images([samples[0], samples[5]])
    assert images.shape == (2, 3, 32, 32)
    assert images.dtype == torch.uint8
    assert images.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(images[1].permute(1, 2, 0), torch.tensor(samples[5][0]))
    assert labels.tolist() == [0, 2]


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:2000])


def claim_to_be_huge(path: Path) -> None:
    """A PNG of one pixel whose head says 30,000 x 30,000, which Pillow takes for an attack."""
    Image.new("L", (1, 1)).save(path, format="PNG")
    content = bytearray(path.read_bytes())
    content[16:24] = struct.pack(">II", 30_000, 30_000)
    content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
    path.write_bytes(content)


def save_without_a_range(path: Path) -> None:
    Image.fromarray(np.linspace(0, 1, 48, dtype=np.float32).reshape(6, 8)).save(path, format="TIFF")


@pytest.mark.parametrize(
    "broken",
    [
        truncate,
        Path.unlink,
        lambda path: path.write_bytes(b"not an image"),
        lambda path: path.write_bytes(b""),
        claim_to_be_huge,
        save_without_a_range,
    ],
)
def test_an_image_that_cannot_be_read(tree: Path, broken) -> None:
    samples = ImageNet(root=str(tree), max_unreadable=0.0).train_dataset()
    path = samples.files.path(4)
    broken(path)
    with pytest.raises(DataError) as caught:
        samples[SampleKey(4, 0)]
    message = str(caught.value)
    assert message.startswith(f"cannot read the image {path}: ")
    assert message.count(str(path)) == 1
    assert "replace the file, or allow some to be replaced by the next image: data.max_unreadable=0.01" in message
    samples[SampleKey(3, 0)]


def test_unreadable_images_are_replaced_by_the_next(tree: Path, caplog: pytest.LogCaptureFixture) -> None:
    samples = ImageNet(root=str(tree), max_unreadable=0.5).train_dataset()
    for index in (4, 5, 14):  # the last of a class, the first of the next; the last of all
        truncate(samples.files.path(index))
    with caplog.at_level(logging.WARNING):
        pixels, label = samples[SampleKey(4, 7)]
    expected, expected_label = samples[SampleKey(6, 7)]
    assert np.array_equal(pixels, expected)
    assert label == expected_label == 1
    assert str(samples.files.path(5)) in caplog.text
    assert np.array_equal(samples[SampleKey(14, 0)][0], samples[SampleKey(0, 0)][0])
    training, validation = samples.faults
    assert training.indices() == [4, 5, 14]
    assert (len(training), len(validation)) == (3, 0)


def test_unaugmented_training_images_are_prepared_as_those_of_validation(tree: Path) -> None:
    source = ImageNet(root=str(tree), image_size=48, resize_size=64, max_unreadable=0.5)
    samples = source.train_dataset()
    plain = samples.unaugmented()
    peer = ImageFolder(str(tree / "train"), transforms.Compose([transforms.Resize(64), transforms.CenterCrop(48)]))
    assert len(plain) == len(samples)
    for index in (0, 7):
        assert np.array_equal(plain[index][0], np.asarray(peer[index][0]))
        assert plain[index][1] == peer[index][1]
    truncate(samples.files.path(3))
    plain[3]
    assert samples.faults[0].indices() == [3]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_size": 300}, "image_size 300 must lie between 1 and resize_size 256"),
        ({"crop_area": (0.5, 0.1)}, "the smaller first"),
        ({"crop_area": (0.0, 1.0)}, "crop_area"),
        ({"max_unreadable": 1.0}, "max_unreadable is a part of the images"),
    ],
)
def test_impossible_options(options: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        ImageNet(**options)
