"""Image classification with a model of lbzoo's own or any of timm's."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lbzoo.data.extras import extra
from lbzoo.errors import UnknownNameError, UsageError
from lbzoo.precision import at_least_float32
from lbzoo.registry import models, register_task
from lbzoo.tasks.base import Task
from lbzoo.tasks.classification_metrics import ClassificationMetrics

IMAGENET_MEAN = (0.485, 0.456, 0.406)  # of each channel, pixels from 0 to 1
IMAGENET_STD = (0.229, 0.224, 0.225)


@register_task("image_classification")
class ImageClassification(Task):
    """Classify images with a model of ours (``lbzoo.models``) or timm's: cross-entropy, top-1 and top-5 accuracy.

    A batch is (images [N, C, H, W], labels [N]). Floating-point images are taken as they are; uint8 images are
    normalised here, on the device, to (x / 255 - pixel_mean) / pixel_std: ImageNet's for three channels unless given,
    0.5 for others. The model starts from random weights, nothing is downloaded. ``model_args`` go to the model.

    ``label_smoothing`` acts in training only. ``l2_regularization`` adds 0.5 * l2 * |p|^2 to the training loss for all
    parameters but those of normalisation layers. LAMB's tables 13-25 vary it beside weight decay without giving its
    formula; this is the one of the ResNet-50 for TPUs in tensorflow/tpu.
    """

    monitor = "val/top1"
    mode = "max"
    fsdp_layers = ("*Block", "*Bottleneck", "*Residual")  # of timm's families and our own: a residual block is a unit

    pixel_mean: Tensor
    pixel_std: Tensor

    def __init__(
        self,
        *,
        model: str,
        num_classes: int,
        input_shape: tuple[int, int, int],
        label_smoothing: float = 0.0,
        l2_regularization: float = 0.0,
        drop_rate: float = 0.0,
        channels_last: bool = True,
        pixel_mean: list[float] | None = None,
        pixel_std: list[float] | None = None,
        model_args: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if not 0 <= label_smoothing < 1:
            raise UsageError(f"task image_classification: label_smoothing must be in [0, 1), got {label_smoothing}")
        if l2_regularization < 0:
            raise UsageError(f"task image_classification: l2_regularization is below 0: {l2_regularization}")
        self.label_smoothing = label_smoothing
        self.l2_regularization = l2_regularization
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format

        options = {"drop_rate": drop_rate} if drop_rate else {}
        channels = input_shape[0]
        network = _network(model, num_classes=num_classes, in_chans=channels, **options, **(model_args or {}))
        self.model = network.to(memory_format=self.memory_format)  # type: ignore[call-overload]  # missing in the stubs
        self.metrics = ClassificationMetrics(num_classes)
        imagenet = channels == len(IMAGENET_MEAN)
        self._register_pixel("mean", channels, pixel_mean or (IMAGENET_MEAN if imagenet else [0.5] * channels))
        self._register_pixel("std", channels, pixel_std or (IMAGENET_STD if imagenet else [0.5] * channels))

    def forward(self, images: Tensor) -> Tensor:
        """Logits [N, classes]."""
        if images.dtype == torch.uint8:
            images = images.to(self.pixel_mean.dtype).sub_(self.pixel_mean).div_(self.pixel_std)
        logits: Tensor = self.model(images.contiguous(memory_format=self.memory_format))
        return logits

    @property
    def loss_reads_weights(self) -> bool:
        return self.l2_regularization > 0

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        loss = F.cross_entropy(at_least_float32(self(images)), labels, label_smoothing=self.label_smoothing)
        if self.l2_regularization:
            loss = loss + 0.5 * self.l2_regularization * sum(p.square().sum() for p in self._regularized())
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        images, labels = batch
        self.metrics.update(self(images), labels)

    def on_validation_epoch_end(self) -> None:
        self.log_validation({name: value.float() for name, value in self.metrics.compute().items()})
        self.metrics.reset()

    def _register_pixel(self, name: str, channels: int, values: Any) -> None:
        if len(values) != channels:
            raise UsageError(
                f"task image_classification: pixel_{name} has {len(values)} values for {channels} channels"
            )
        # Not persistent: part of the input and not of the weights.
        self.register_buffer(f"pixel_{name}", 255 * torch.tensor(values).view(1, -1, 1, 1), persistent=False)

    def _regularized(self) -> Iterator[nn.Parameter]:
        for layer in self.model.modules():
            if "norm" not in type(layer).__name__.lower():
                yield from layer.parameters(recurse=False)


def _network(name: str, **options: Any) -> nn.Module:
    make = models.get(name) if name in models else _timm_factory(name)
    try:
        network: nn.Module = make(**options)
    except TypeError as error:
        given = ", ".join(f"{key}={value!r}" for key, value in options.items())
        raise UsageError(f"the model {name} cannot be built with {given}: {error}") from error
    return network


def _timm_factory(name: str) -> Callable[..., nn.Module]:
    with extra("vision"):
        import timm
    if not timm.is_model(name):
        raise UnknownNameError("model", name, [*models.names(), *timm.list_models()])
    return partial(timm.create_model, name, pretrained=False)
