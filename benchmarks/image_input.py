"""Images a second: lbzoo's loader against timm's on the same JPEGs, and against what ResNet-50 takes.

    python benchmarks/image_input.py
    python benchmarks/image_input.py --images 256 --samples 3 --dry-run

The images are generated: 500 x 375 pixels of noise with the spectrum of photographs, about 110 kB each, as ImageNet has
them on average. Both loaders do the same to them: decode, crop a random rectangle and scale it to 224 x 224 (bilinear),
mirror at random, collate to bytes. On a GPU a batch is also pinned, copied without blocking and normalised there.

Three questions, each a table: what one core does (processor time, which others on the machine do not disturb), and in
which part of the work; what all loader processes do together (wall time); and what the model takes on this machine's
device. The result is a dated file in ``results/``.
"""

from __future__ import annotations

import argparse
import io
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from timing import Timing, compare, device_name, machine, save_result

from lbzoo.data import image_transforms
from lbzoo.data.imagenet import ImageNet, collate_images
from lbzoo.data.loader import train_loader
from lbzoo.data.rng import stable_rng
from lbzoo.engines.run_folder import environment
from lbzoo.tasks.image_classification import ImageClassification

WIDTH, HEIGHT = 500, 375
QUALITY = 92
SIZE = 224
OURS, TIMMS = "lbzoo", "timm"
# ResNet-50 on one A100, mixed precision (NVIDIA DeepLearningExamples: 16,621 images a second on eight).
PUBLISHED_NEED = 2078


@dataclass(frozen=True)
class Loading:
    """What both loaders are asked for."""

    root: Path
    images: int
    batch_size: int
    workers: int
    device: torch.device

    @property
    def batches(self) -> int:
        return self.images // self.batch_size


def write_images(root: Path, count: int, distinct: int = 32) -> float:
    """Write ``count`` JPEGs in ImageNet's layout, of ``distinct`` different ones; returns their mean size in bytes."""
    contents = [jpeg(number) for number in range(min(distinct, count))]
    for split in ("train", "val"):
        for label in range(4):
            (root / split / f"n{label:08d}").mkdir(parents=True)
    for number in range(count):
        path = root / "train" / f"n{number % 4:08d}" / f"{number}.JPEG"
        path.write_bytes(contents[number % len(contents)])
    for label in range(4):
        (root / "val" / f"n{label:08d}" / "0.JPEG").write_bytes(contents[0])
    return sum(map(len, contents)) / len(contents)


def jpeg(seed: int) -> bytes:
    """Noise whose amplitude falls with the frequency, as in photographs: no smoother and no rougher to decode."""
    rng = np.random.RandomState(seed)
    frequency = np.hypot(np.fft.fftfreq(HEIGHT)[:, None], np.fft.rfftfreq(WIDTH)[None])
    frequency[0, 0] = 1 / WIDTH
    channels = []
    for _ in range(3):
        phases = np.exp(2j * np.pi * rng.random_sample(frequency.shape))
        waves = np.fft.irfft2(phases / frequency**1.1, s=(HEIGHT, WIDTH))
        channels.append(waves / waves.std())
    grey = channels[0]
    colour = np.stack([128 + 55 * (0.85 * grey + 0.3 * channel) for channel in channels], axis=2)
    out = io.BytesIO()
    Image.fromarray(colour.clip(0, 255).astype(np.uint8)).save(out, format="JPEG", quality=QUALITY)
    return out.getvalue()


def ours(loading: Loading) -> Iterable[Any]:
    source = ImageNet(root=str(loading.root), num_classes=4)
    return train_loader(
        source,
        global_batch_size=loading.batch_size,
        micro_batch_size=loading.batch_size,
        steps=loading.batches,
        seed=0,
        num_workers=loading.workers,
        pin_memory=loading.device.type == "cuda",
    )


def timms(loading: Loading) -> Iterable[Any]:
    """timm's own loader for training, as its scripts make it, with the same augmentation."""
    from timm.data import create_loader  # type: ignore[attr-defined]  # exported without __all__
    from timm.data.dataset import ImageDataset

    cuda = loading.device.type == "cuda"
    loader = create_loader(
        ImageDataset(str(loading.root / "train")),
        input_size=(3, SIZE, SIZE),
        batch_size=loading.batch_size,
        is_training=True,
        color_jitter=0.0,
        interpolation="bilinear",
        num_workers=loading.workers,
        persistent_workers=loading.workers > 0,
        pin_memory=cuda,
        device=loading.device,
    )
    return loader if cuda else loader.loader  # without a GPU, up to the batch of bytes that both make


def consume(batches: Iterable[Any], loading: Loading, normalise: Callable[[torch.Tensor], torch.Tensor] | None) -> None:
    """Take all batches, on a GPU as a training would: copied without blocking, and normalised there."""
    for number, (images, labels) in enumerate(batches, start=1):
        assert len(images) == len(labels) == loading.batch_size
        if normalise is not None:
            normalise(images.to(loading.device, non_blocking=True))
        if number == loading.batches:
            break


def rates(loading: Loading, *, samples: int, time_limit: float, cpu_time: bool) -> dict[str, Timing]:
    """Seconds for ``loading.images``, the loaders in turn."""
    normalise = None
    if loading.device.type == "cuda":
        task = ImageClassification(model="cifar_resnet20", num_classes=4, input_shape=(3, SIZE, SIZE))
        mean, std = task.pixel_mean.to(loading.device), task.pixel_std.to(loading.device)
        normalise = lambda images: images.to(mean.dtype).sub_(mean).div_(std)  # noqa: E731
    return compare(
        {
            OURS: lambda: consume(ours(loading), loading, normalise),
            TIMMS: lambda: consume(timms(loading), loading, None),
        },
        samples=samples,
        warmup=1,
        time_limit=time_limit,
        synchronize=torch.cuda.synchronize if loading.device.type == "cuda" else lambda: None,
        cpu_time=cpu_time,
    )


def parts(loading: Loading) -> dict[str, float]:
    """Microseconds of processor time an image in each part of our pipeline, in one process."""
    samples = ImageNet(root=str(loading.root), num_classes=4).train_dataset()
    spent: dict[str, float] = {}

    def timed(what: str, work: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        begin = time.process_time()
        result = work(*arguments, **options)
        spent[what] = spent.get(what, 0.0) + time.process_time() - begin
        return result

    count = min(loading.images, 4 * loading.batch_size)
    rng, batch = stable_rng(0), []
    for index in range(count):
        path = samples.files.path(index)
        file = timed("read", path.read_bytes)
        image = timed("decode", lambda content=file: Image.open(io.BytesIO(content)).convert("RGB"))
        timed("random numbers", rng.seed, [0, index, 0, 1])
        image = timed("crop and scale", image_transforms.random_resized_crop, image, SIZE, rng, area=(0.08, 1.0),
                      resample=Image.Resampling.BILINEAR)  # fmt: skip
        image = timed("mirror", image_transforms.random_flip, image, rng)
        batch.append((timed("to an array", np.asarray, image), 0))
        if len(batch) == loading.batch_size:
            timed("collate", collate_images, batch)
            batch = []
    return {what: 1e6 * seconds / count for what, seconds in spent.items()}


def models_need(device: torch.device, seconds: float) -> tuple[int, float]:
    """(micro-batch, images a second) of training ResNet-50 on the device, from images that are there already."""
    batch_size = 128 if device.type == "cuda" else 8
    task = ImageClassification(model="resnet50", num_classes=1000, input_shape=(3, SIZE, SIZE)).to(device)
    optimizer = torch.optim.SGD(task.parameters(), lr=0.1, momentum=0.9)
    images = torch.randint(256, (batch_size, SIZE, SIZE, 3), dtype=torch.uint8, device=device).permute(0, 3, 1, 2)
    labels = torch.randint(1000, (batch_size,), device=device)

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss = task.training_step((images, labels), 0)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    synchronize = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    for _ in range(5 if device.type == "cuda" else 1):
        step()
    synchronize()
    begin, steps = time.perf_counter(), 0
    while time.perf_counter() - begin < seconds:
        step()
        synchronize()
        steps += 1
    return batch_size, steps * batch_size / (time.perf_counter() - begin)


def table(title: str, timings: dict[str, Timing], images: int) -> Iterator[str]:
    yield f"## {title}"
    yield ""
    if not all(timing.seconds for timing in timings.values()):
        yield "Not measured: the cores were never idle long enough."
        yield ""
        return
    yield "| loader | images/s | spread | n | against timm |"
    yield "| --- | ---: | ---: | ---: | ---: |"
    for name, timing in timings.items():
        speed, against = images / timing.median, timings[TIMMS].median / timing.median
        yield f"| {name} | {speed:,.0f} | {timing.spread:.1%} | {len(timing.seconds)} | {against:.2f} |"
    yield ""


def report(arguments: argparse.Namespace, device: torch.device) -> str:
    here = environment()
    versions = ", ".join(f"{name} {here['packages'][name]}" for name in ("torch", "timm", "lbzoo"))
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        size = write_images(root, arguments.images)
        limit = {"samples": arguments.samples, "time_limit": arguments.time_limit}
        alone = Loading(root, arguments.images, arguments.batch_size, 0, torch.device("cpu"))
        one_core = rates(alone, **limit, cpu_time=True)
        together = Loading(root, arguments.images, arguments.batch_size, arguments.workers, device)
        processes = rates(together, **limit, cpu_time=False)
        spent = parts(alone)
    micro_batch, need = models_need(device, arguments.model_seconds)
    of_core = arguments.images / one_core[OURS].median
    on = device_name(device.type)
    lines = [
        f"# Image input on {machine()}",
        "",
        f"{date.today().isoformat()}, commit {here['commit']}, Python {here['python']}, {versions}, Pillow "
        f"{Image.__version__}. Made by:",
        "",
        f"    python {' '.join(sys.argv)}",
        "",
        f"{arguments.images} generated JPEGs of {WIDTH} x {HEIGHT}, {size / 1000:.0f} kB on average, in batches of "
        f"{arguments.batch_size}; medians, spread is half the distance of the quartiles.",
        "",
        *table("One core, processor time", one_core, arguments.images),
        *table(
            f"{arguments.workers} loader processes, wall time, batches on {device.type}", processes, arguments.images
        ),
        "## Where one core's time goes",
        "",
        "| part of lbzoo's loader | us an image |",
        "| --- | ---: |",
        *(f"| {what} | {microseconds:,.0f} |" for what, microseconds in spent.items()),
        "",
        "## What the model takes",
        "",
        f"- ResNet-50, training, micro-batches of {micro_batch} on {on}: {need:,.0f} images/s, which "
        f"{need / of_core:.1f} such cores feed.",
        f"- ResNet-50 on an A100, as published: {PUBLISHED_NEED:,} images/s, which {PUBLISHED_NEED / of_core:.1f} such "
        "cores would feed. (Not measured here.)",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=1024)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--workers", type=int, default=torch.multiprocessing.cpu_count())
    parser.add_argument("--samples", type=int, default=7)
    parser.add_argument("--time-limit", type=float, default=300.0, help="seconds for each of the two comparisons")
    parser.add_argument("--model-seconds", type=float, default=20.0, help="seconds of training the model")
    parser.add_argument("--dry-run", action="store_true", help="print, and write no file")
    arguments = parser.parse_args()
    if arguments.images < arguments.batch_size:
        parser.error("--images: fewer than one batch")
    torch.set_num_threads(1)  # as in a loader process
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    text = report(arguments, device)
    print(text)
    if not arguments.dry_run:
        save_result("image_input", text, device.type)


if __name__ == "__main__":
    main()
