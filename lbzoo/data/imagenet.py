"""ImageNet-1k from its JPEG files, and any other images in the same layout."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from lbzoo.data.base import DataFacts, DataSource, SampleKey
from lbzoo.data.image_folder import ImageFiles, ImageTree
from lbzoo.data.locations import data_folder, looking_at, unusable
from lbzoo.data.rng import stable_rng
from lbzoo.data.unreadable import Unreadable
from lbzoo.errors import UsageError
from lbzoo.registry import register_data

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from PIL import Image
    from torch import Tensor

    Pixels = NDArray[np.uint8]

NUM_TRAIN, NUM_VAL = 1_281_167, 50_000
ROOT_VARIABLE = "LBZOO_IMAGENET"
# Sets these random numbers apart from the sampler's, whose keys are shorter.
_AUGMENTATION = 1


def collate_images(samples: Sequence[tuple[Pixels, int]]) -> tuple[Tensor, Tensor]:
    """(images [N, 3, H, W] uint8, labels [N]): the pixels stay as they lie, which is channels-last memory format."""
    import numpy as np
    import torch

    pixels, labels = zip(*samples, strict=True)
    return torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2), torch.tensor(labels)


@register_data("imagenet")
class ImageNet(DataSource):
    """ImageNet-1k, or other images in its layout: ``{train,val}/<class>/<image>`` under ``root`` or $LBZOO_IMAGENET.

    A micro-batch is (images [N, 3, H, W] uint8, channels-last; labels [N] int64); tasks normalise it on the device.

    Training images are flipped at random and cropped to a square of ``image_size`` pixels. ``train_crop`` says how:
    ``random_resized`` takes a random rectangle that covers ``crop_area`` of the image and scales it; ``random`` scales
    the shorter side to ``resize_size`` and takes a random square (resize, then random crop, in the NovoGrad paper's
    words). Validation does the latter with the square in the middle.

    The next image takes the place of one that cannot be read, with a warning; the callback ``unreadable_images`` names
    them in a file. More than the part ``max_unreadable`` of the images of a split is an error, and with 0 each one is.
    """

    collate = staticmethod(collate_images)

    def __init__(
        self,
        *,
        root: str | None = None,
        image_size: int = 224,
        resize_size: int = 256,
        train_crop: Literal["random_resized", "random"] = "random_resized",
        crop_area: tuple[float, float] = (0.08, 1.0),
        interpolation: Literal["bilinear", "bicubic"] = "bilinear",
        num_classes: int = 1000,
        max_unreadable: float = 0.01,
    ) -> None:
        if not 1 <= image_size <= resize_size:
            raise UsageError(f"data imagenet: image_size {image_size} must lie between 1 and resize_size {resize_size}")
        smallest, largest = crop_area
        if not 0 < smallest <= largest <= 1:
            raise UsageError(f"data imagenet: crop_area is two parts of the image, the smaller first, got {crop_area}")
        if not 0 <= max_unreadable < 1:
            raise UsageError(f"data imagenet: max_unreadable is a part of the images, in [0, 1), got {max_unreadable}")
        self.root = root
        self.num_classes = num_classes
        self.max_unreadable = max_unreadable
        self.preprocessing = Preprocessing(image_size, resize_size, train_crop, (smallest, largest), interpolation)
        self._counts: tuple[int, int] = (NUM_TRAIN, NUM_VAL)

    def facts(self) -> DataFacts:
        size = self.preprocessing.image_size
        return DataFacts(*self._counts, self.num_classes, (3, size, size), "images")

    def prepare(self) -> None:
        tree = self._tree
        with looking_at(f"the images in {tree.root}", _HOW_TO_GET_IT):
            problems = tree.problems()
        if not problems and len(tree.train.classes) > self.num_classes:
            problems = [f"train: {len(tree.train.classes)} classes, but data.num_classes is {self.num_classes}"]
        if problems:
            raise unusable(f"the images in {tree.root}", problems, _HOW_TO_GET_IT)
        self._counts = len(tree.train), len(tree.val)

    def train_dataset(self, *, seed: int = 0) -> TrainImages:
        return TrainImages(self._tree.train, self.preprocessing, self._faults, seed=seed)

    def val_dataset(self) -> ValImages:
        return ValImages(self._tree.val, self.preprocessing, self._faults[1])

    @cached_property
    def _tree(self) -> ImageTree:
        return ImageTree(data_folder(self.root, ROOT_VARIABLE, _HOW_TO_GET_IT))

    @cached_property
    def _faults(self) -> tuple[Unreadable, Unreadable]:
        """Of training and validation."""
        tree = self._tree
        train, val = (Unreadable(len(files), self.max_unreadable, files.path) for files in (tree.train, tree.val))
        return train, val


_HOW_TO_GET_IT = f"""\
Set data.root=FOLDER, or {ROOT_VARIABLE}=FOLDER in the environment, to a folder with the images in
  FOLDER/train/<class>/<image>   FOLDER/val/<class>/<image>
(the layout of torchvision's ImageFolder; ImageNet-1k has 1000 classes named like n01440764). Both archives,
ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar, are to be had from image-net.org after a registration."""


@dataclass(frozen=True)
class Preprocessing:
    """From an image to the pixels that a model sees, [H, W, 3] uint8. Sizes in pixels, ``crop_area`` in parts of it."""

    image_size: int
    resize_size: int
    train_crop: Literal["random_resized", "random"]
    crop_area: tuple[float, float]
    interpolation: Literal["bilinear", "bicubic"]

    def for_training(self, image: Image.Image, rng: np.random.RandomState) -> Pixels:
        from lbzoo.data import image_transforms as transforms

        if self.train_crop == "random_resized":
            image = transforms.random_resized_crop(
                image, self.image_size, rng, area=self.crop_area, resample=self._resample
            )
        else:
            image = transforms.resize_shorter_side(image, self.resize_size, self._resample)
            image = transforms.random_crop(image, self.image_size, rng)
        return _pixels(transforms.random_flip(image, rng))

    def for_validation(self, image: Image.Image) -> Pixels:
        from lbzoo.data import image_transforms as transforms

        image = transforms.resize_shorter_side(image, self.resize_size, self._resample)
        return _pixels(transforms.center_crop(image, self.image_size))

    @property
    def _resample(self) -> Image.Resampling:
        from PIL import Image

        return Image.Resampling[self.interpolation.upper()]


class TrainImages:
    """Training images by SampleKey; what is random in them is a function of (seed, index, epoch).

    ``faults``: the unreadable images of all splits, training first.
    """

    def __init__(
        self, files: ImageFiles, preprocessing: Preprocessing, faults: tuple[Unreadable, ...], *, seed: int
    ) -> None:
        self.files, self.preprocessing, self.seed = files, preprocessing, seed
        self.faults = faults
        self._rng = stable_rng(seed)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, key: SampleKey) -> tuple[Pixels, int]:
        image, index = self.faults[0].read(key.index, _decode)
        self._rng.seed([self.seed, index, key.epoch, _AUGMENTATION])  # a tenth of the time that a new one takes
        return self.preprocessing.for_training(image, self._rng), int(self.files.labels[index])

    def unaugmented(self) -> ValImages:
        """The same images by int, prepared as those of validation."""
        return ValImages(self.files, self.preprocessing, self.faults[0])


class ValImages:
    """Images by index, without augmentation."""

    def __init__(self, files: ImageFiles, preprocessing: Preprocessing, unreadable: Unreadable) -> None:
        self.files, self.preprocessing = files, preprocessing
        self.faults = (unreadable,)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Pixels, int]:
        image, index = self.faults[0].read(index, _decode)
        return self.preprocessing.for_validation(image), int(self.files.labels[index])


def _decode(path: Path) -> Image.Image:
    """The image in RGB; ImageNet has some in grey and in CMYK. Raises OSError for whatever is wrong with the file."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            return _in_rgb(image)
    except (OSError, MemoryError):
        raise
    except Exception as error:  # a damaged or a huge file may fail in any way: struct.error, DecompressionBombError
        raise OSError(str(error) or type(error).__name__) from error


def _in_rgb(image: Image.Image) -> Image.Image:
    """In eight bits a channel. Pillow would cut wider grey values off at 255, which leaves a white image."""
    import numpy as np
    from PIL import Image

    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise OSError(f"grey values of 32 bits (Pillow's mode {image.mode}), whose range the file does not say")
    return image.convert("RGB")


def _pixels(image: Image.Image) -> Pixels:
    import numpy as np

    return np.asarray(image)
