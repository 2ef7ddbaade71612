"""What a data set is to the rest: facts that are known without its files, a check of the files, and indexed samples."""

from __future__ import annotations

import abc
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Protocol


class SampleKey(NamedTuple):
    """One use of a training sample: its index in the data set, and the epoch of the shard that it belongs to.

    Augmentation is a function of the run's seed and of these two, so that a sample looks the same on any number of
    devices and after a resume.
    """

    index: int  # type: ignore[assignment]  # hides tuple.index, of which a key has no use
    epoch: int


@dataclass(frozen=True)
class DataFacts:
    """Sizes of a data set: nominal ones, with which a run is planned where the files are not, or those of the files.

    ``num_classes``, ``input_shape`` (without the batch dimension), ``pixel_mean`` and ``pixel_std`` (of each channel,
    pixels from 0 to 1) and ``vocab_size`` (tokens) fill a task's parameters of these names.
    """

    num_train: int
    num_val: int
    num_classes: int | None = None
    input_shape: tuple[int, ...] | None = None
    unit: str = "samples"
    pixel_mean: tuple[float, ...] | None = None
    pixel_std: tuple[float, ...] | None = None
    vocab_size: int | None = None


class Samples(Protocol):
    """An indexed data set as torch's DataLoader wants it. Training samples are indexed by SampleKey, others by int.

    One that has ``__getitems__(keys)`` is given a whole micro-batch of keys at once, and what it returns goes to
    ``DataSource.collate``.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, key: Any, /) -> Any: ...


class DataSource(abc.ABC):
    """A data set by name. Constructors take keyword-only options, are cheap and touch no file.

    ``collate`` makes a micro-batch of what the samples are (default: torch's own). ``in_memory`` says that fetching
    costs nothing, so that loader processes would only add to it. ``preshuffled`` says that neighbours on disk are no
    more alike than strangers; shards are then contiguous on disk (see ``sampling.StreamSampler``).
    """

    in_memory: ClassVar[bool] = False
    preshuffled: ClassVar[bool] = False
    collate: Callable[[Any], Any] | None = None

    @abc.abstractmethod
    def facts(self) -> DataFacts:
        """Nominal sizes, without heavy imports; after ``prepare()`` the numbers of samples that the files hold."""

    @abc.abstractmethod
    def prepare(self) -> None:
        """Check that the files are there and whole.

        Raises DataError that lists all that is missing, where it was looked for and how to get it.
        """

    @abc.abstractmethod
    def train_dataset(self, *, seed: int = 0) -> Samples:
        """Training samples by SampleKey; augmentation draws from (seed, index, epoch)."""

    @abc.abstractmethod
    def val_dataset(self) -> Samples:
        """Validation samples by int."""
