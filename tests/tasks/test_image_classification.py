"""Image classification: parameter counts, loss and metrics against plain formulas, a real Trainer on real digits."""

from __future__ import annotations

import ast
import inspect
import pickle
import sys

import lightning.pytorch as pl
import pytest
import timm
import torch
import torch.nn.functional as F
from metric_jobs import metrics_of_uneven_ranks, samples
from torch import Tensor, nn
from torchmetrics.functional.classification import multiclass_accuracy
from torchvision.transforms.functional import normalize

from lbzoo.data.digits import Digits
from lbzoo.data.loader import train_loader, val_loader
from lbzoo.errors import LbzooError, UnknownNameError, UsageError
from lbzoo.schedules import build_schedule
from lbzoo.tasks import base, classification_metrics, image_classification
from lbzoo.tasks.classification_metrics import ClassificationMetrics
from lbzoo.tasks.image_classification import ImageClassification
from lbzoo.testing.processes import shared_processes

# Pre-activation ResNet, one block a stage, narrow: 79,000 parameters.
SMALL = {"layers": [1, 1, 1, 1], "channels": [16, 32, 64, 128], "stem_chs": 16, "stem_type": "fixed"}


def task(**changes: object) -> ImageClassification:
    torch.manual_seed(0)
    settings = {"model": "resnetv2_50", "num_classes": 10, "input_shape": (1, 32, 32), "model_args": SMALL}
    return ImageClassification(**{**settings, **changes})


def batch(classes: int = 10, channels: int = 1, n: int = 6) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(n, channels, 32, 32, generator=generator)
    return images, torch.randint(classes, (n,), generator=generator)


@pytest.mark.parametrize(("name", "parameters"), [("resnet50", 25_557_032), ("resnetv2_50", 25_549_352)])
def test_parameter_counts(name: str, parameters: int) -> None:
    with torch.device("meta"):
        made = ImageClassification(model=name, num_classes=1000, input_shape=(3, 224, 224))
    assert sum(p.numel() for p in made.parameters()) == parameters


def test_resnets_are_those_of_the_papers() -> None:
    with torch.device("meta"):
        v1 = ImageClassification(model="resnet50", num_classes=1000, input_shape=(3, 224, 224)).model
        v2 = ImageClassification(model="resnetv2_50", num_classes=1000, input_shape=(3, 224, 224)).model
    # v1.5: the stride of a stage is on its 3x3 convolution.
    assert v1.layer2[0].conv1.stride == (1, 1)
    assert v1.layer2[0].conv2.stride == (2, 2)
    # Pre-activation: batch normalisation before the first convolution of a block, and after the last block.
    assert isinstance(v2.stages[1].blocks[1].norm1, nn.BatchNorm2d)
    assert isinstance(v2.norm, nn.BatchNorm2d)
    assert isinstance(v2.head.fc, nn.Conv2d)
    assert v2.head.fc.kernel_size == (1, 1)


def test_the_model_fits_the_data() -> None:
    made = task(input_shape=(2, 40, 40), num_classes=7)
    assert made(torch.zeros(3, 2, 40, 40)).shape == (3, 7)


def test_training_loss_is_cross_entropy() -> None:
    images, labels = batch()
    made = task()
    logits = made(images)
    expected = -logits.log_softmax(1)[torch.arange(len(labels)), labels].mean()
    torch.testing.assert_close(made.training_step((images, labels), 0), expected)


def test_label_smoothing_acts_in_training_only() -> None:
    images, labels = batch()
    made = task(label_smoothing=0.1).eval()
    log_probabilities = made(images).log_softmax(1)
    plain = -log_probabilities[torch.arange(len(labels)), labels].mean()
    expected = 0.9 * plain - 0.1 * log_probabilities.mean()
    torch.testing.assert_close(made.training_step((images, labels), 0), expected)
    made.validation_step((images, labels), 0)
    torch.testing.assert_close(made.metrics.compute()["loss"].float(), plain)


def test_l2_adds_its_gradient_to_all_but_normalisation() -> None:
    images, labels = batch()
    gradients = []
    for strength in (0.0, 0.01):
        made = task(l2_regularization=strength)
        made.training_step((images, labels), 0).backward()
        gradients.append({name: p.grad for name, p in made.named_parameters()})
    values = dict(task().named_parameters())
    outside = {name for name in values if ".norm" in name}
    assert 0 < len(outside) < len(values)
    for name, plain in gradients[0].items():
        expected = plain if name in outside else plain + 0.01 * values[name]
        torch.testing.assert_close(gradients[1][name], expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("channels", "mean", "std"),
    [
        (3, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
        (1, [0.5], [0.5]),
    ],
)
def test_uint8_images_are_normalised_as_torchvision_does(channels: int, mean: list[float], std: list[float]) -> None:
    made = task(input_shape=(channels, 32, 32)).eval()
    pixels = torch.randint(256, (4, channels, 32, 32), dtype=torch.uint8)
    before = pixels.clone()
    expected = made(normalize(pixels.float() / 255, mean, std))
    torch.testing.assert_close(made(pixels), expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(pixels, before)


def test_pixel_statistics_of_ones_own() -> None:
    made = task(pixel_mean=[0.25], pixel_std=[2.0]).eval()
    pixels = torch.full((1, 1, 32, 32), 255, dtype=torch.uint8)
    torch.testing.assert_close(made(pixels), made(torch.full((1, 1, 32, 32), 0.375)))
    assert not [name for name in made.state_dict() if "pixel" in name]


@pytest.mark.parametrize("channels_last", [True, False])
def test_memory_format(channels_last: bool) -> None:
    made = task(channels_last=channels_last, input_shape=(3, 32, 32))
    weight = made.model.stages[0].blocks[0].conv2.weight
    assert weight.is_contiguous(memory_format=torch.channels_last) == channels_last
    seen = []
    made.model.stages[0].register_forward_hook(lambda module, inputs, output: seen.append(output))
    for images in (torch.zeros(2, 3, 32, 32), torch.zeros(2, 3, 32, 32, dtype=torch.uint8)):
        made(images)
        assert seen[-1].is_contiguous(memory_format=torch.channels_last) == channels_last


def test_memory_format_does_not_change_the_result() -> None:
    images, _ = batch()
    torch.testing.assert_close(task()(images), task(channels_last=False)(images), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_precisions(dtype: torch.dtype) -> None:
    made = task().to(dtype)
    images, labels = batch()
    loss = made.training_step((images.to(dtype), labels), 0)
    assert loss.dtype == (torch.float32 if dtype == torch.bfloat16 else torch.float64)
    assert made((images * 50 + 128).clamp(0, 255).to(torch.uint8)).dtype == dtype


def test_metrics_are_micro_averages() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(200, 10, generator=generator)
    labels = torch.randint(3, (200,), generator=generator)  # a macro average would count the seven others too
    metrics = ClassificationMetrics(10)
    for part in (slice(0, 7), slice(7, 150), slice(150, 200)):
        metrics.update(logits[part], labels[part])
    values = metrics.compute()
    assert set(values) == {"loss", "top1", "top5"}
    assert values["loss"].item() == pytest.approx(F.cross_entropy(logits.double(), labels).item(), rel=1e-12)
    for name, k in (("top1", 1), ("top5", 5)):
        expected = multiclass_accuracy(logits, labels, num_classes=10, average="micro", top_k=k)
        assert values[name].item() == pytest.approx(expected.item())
    assert values["top1"] < values["top5"]


@pytest.mark.parametrize(("classes", "names"), [(5, {"loss", "top1"}), (6, {"loss", "top1", "top5"})])
def test_top_5_needs_more_than_five_classes(classes: int, names: set[str]) -> None:
    metrics = ClassificationMetrics(classes)
    metrics.update(torch.randn(4, classes), torch.zeros(4, dtype=torch.long))
    assert set(metrics.compute()) == names


@pytest.mark.dist
def test_metrics_over_ranks_with_parts_of_different_size() -> None:
    expected = ClassificationMetrics(10)
    expected.update(*samples())
    for values in shared_processes().run(2, metrics_of_uneven_ranks):
        assert values == {name: pytest.approx(value.item(), rel=1e-12) for name, value in expected.compute().items()}


def test_a_step_does_not_depend_on_the_split_into_micro_batches() -> None:
    """Equal micro-batches: the mean of their losses is the loss of the whole (without batch normalisation)."""
    made = task().eval()
    images, labels = batch(n=8)
    whole = made.training_step((images, labels), 0)
    parts = [made.training_step((images[i : i + 2], labels[i : i + 2]), 0) for i in range(0, 8, 2)]
    torch.testing.assert_close(torch.stack(parts).mean(), whole)


@pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore:GPU available")
def test_learns_digits_in_a_trainer() -> None:
    """The whole chain with accumulation: data, sampler, loader, task, schedule, Lightning; about 5 seconds."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    digits, steps = Digits(image_size=16), 70
    made = task(input_shape=digits.facts().input_shape, label_smoothing=0.1)
    schedule = build_schedule("cosine", steps=steps, steps_per_epoch=1437 / 128, warmup_steps=5)
    made.bind(lambda module: torch.optim.AdamW(module.parameters(), lr=3e-3), schedule)
    trainer = pl.Trainer(
        max_steps=steps,
        max_epochs=-1,
        accumulate_grad_batches=2,
        val_check_interval=steps * 2,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    train = train_loader(digits, global_batch_size=128, micro_batch_size=64, steps=steps, seed=0)
    try:
        trainer.fit(made, train, val_loader(digits, micro_batch_size=64))
    finally:
        torch.set_num_threads(threads)
    assert trainer.global_step == steps
    assert set(trainer.callback_metrics) == {"val/loss", "val/top1", "val/top5"}
    assert trainer.callback_metrics["val/top1"] > 0.93
    assert trainer.callback_metrics["val/loss"] < 0.5

    made.eval()
    correct = sum(
        (made(images).argmax(1) == labels).sum().item() for images, labels in val_loader(digits, micro_batch_size=99)
    )
    assert trainer.callback_metrics["val/top1"].item() == pytest.approx(correct / 360)
    assert made.metrics.count == 0  # ready for the next validation


def test_state_is_weights_only() -> None:
    made = task()
    made.validation_step(batch(), 0)
    state = made.state_dict()
    assert set(state) == {f"model.{name}" for name in made.model.state_dict()}
    pickle.dumps(made)


def test_tasks_do_not_know_the_trainer() -> None:
    for module in (base, classification_metrics, image_classification):
        names = {
            node.attr for node in ast.walk(ast.parse(inspect.getsource(module))) if isinstance(node, ast.Attribute)
        }
        assert "trainer" not in names, module.__name__


@pytest.mark.parametrize("name", ["resnet5", "resnet_50"])
def test_unknown_model(name: str) -> None:
    with pytest.raises(UnknownNameError, match=f"no model named '{name}'; did you mean 'resnet"):
        task(model=name)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": "resnet18", "model_args": {"layerz": [1]}}, r"the model resnet18 cannot be built .*layerz"),
        ({"label_smoothing": 1.0}, r"label_smoothing must be in \[0, 1\)"),
        ({"l2_regularization": -1.0}, "l2_regularization is below 0"),
        ({"pixel_mean": [0.1, 0.2]}, "pixel_mean has 2 values for 1 channels"),
    ],
)
def test_impossible_options(options: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        task(**options)


def test_a_package_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(LbzooError, match=r"timm is not installed: pip install 'lbzoo\[vision\]'"):
        task()


def test_dropout_reaches_the_model() -> None:
    layers = [layer.p for layer in task(drop_rate=0.3).modules() if isinstance(layer, nn.Dropout)]
    assert layers == [0.3]
    assert not [layer for layer in task().modules() if isinstance(layer, nn.Dropout) and layer.p]


def test_nothing_is_downloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("a download was tried")

    monkeypatch.setattr("socket.socket.connect", refuse)
    made = task(model="resnet18.a1_in1k", model_args=None)
    assert isinstance(made.model, timm.models.ResNet)
    with pytest.raises(UnknownNameError, match="no model named 'hf-hub:timm/"):
        task(model="hf-hub:timm/resnet18.a1_in1k")
