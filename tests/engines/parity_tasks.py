"""Small tasks with layers for FSDP, and their data; importable by name, from worker processes too."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lbzoo.data.base import DataFacts, DataSource
from lbzoo.data.in_memory import TensorSamples, as_batch
from lbzoo.tasks.base import Task

FEATURES, CLASSES, VOCABULARY, LENGTH = 10, 3, 13, 7


class Vectors(DataSource):
    """x [N, 10] and labels [N] that follow from them."""

    in_memory = True
    preshuffled = True
    collate = staticmethod(as_batch)

    def __init__(self, *, num_train: int = 64, num_val: int = 11) -> None:
        self.sizes = num_train, num_val

    def facts(self) -> DataFacts:
        return DataFacts(*self.sizes, unit="vectors", num_classes=CLASSES)

    def prepare(self) -> None:
        """Nothing can be missing."""

    def train_dataset(self, *, seed: int = 0) -> TensorSamples:
        return self._draw(self.sizes[0], 1)

    def val_dataset(self) -> TensorSamples:
        return self._draw(self.sizes[1], 2)

    def _draw(self, size: int, seed: int) -> TensorSamples:
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(size, FEATURES, generator=generator)
        return TensorSamples(x, x[:, :CLASSES].argmax(dim=1))


class Tokens(Vectors):
    """Tokens [N, 7] in which some are followed by their double."""

    def facts(self) -> DataFacts:
        return DataFacts(*self.sizes, unit="sequences")

    def _draw(self, size: int, seed: int) -> TensorSamples:
        tokens = torch.randint(VOCABULARY, (size, LENGTH), generator=torch.Generator().manual_seed(seed))
        tokens[:, 1::2] = 2 * tokens[:, :-1:2] % VOCABULARY
        return TensorSamples(tokens)


class Measured(Task):
    """A task whose validation loss is the mean over the ranks' samples."""

    def __init__(self) -> None:
        super().__init__()
        self.sums = torch.zeros(2, dtype=torch.float64)

    def loss(self, batch: tuple[Tensor, ...]) -> Tensor:
        """The mean over the samples."""
        raise NotImplementedError

    def training_step(self, batch: tuple[Tensor, ...], batch_idx: int) -> Tensor:
        return self.loss(batch)

    def validation_step(self, batch: tuple[Tensor, ...], batch_idx: int) -> None:
        size = len(batch[0])
        self.sums += torch.tensor([float(self.loss(batch)) * size, size], dtype=torch.float64)

    def on_validation_epoch_end(self) -> None:
        if torch.distributed.is_initialized():
            torch.distributed.all_reduce(self.sums)
        self.log("val/loss", (self.sums[0] / self.sums[1]).float(), sync_dist=True)
        self.sums.zero_()


class Block(nn.Module):
    """x + W2 gelu(W1 norm(x)), with dropout; its widths do not divide by the number of ranks."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 3 * width + 1), nn.Linear(3 * width + 1, width)
        self.dropout = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.dropout(self.down(F.gelu(self.up(self.norm(x)))))
        return out


class LayerNormNet(Measured):
    """Two residual blocks between two linear layers; the last bias has fewer elements than four ranks."""

    fsdp_layers = ("Block",)

    def __init__(self, *, num_classes: int, width: int = 9) -> None:
        super().__init__()
        blocks = [Block(width), Block(width)]
        self.model = nn.Sequential(nn.Linear(FEATURES, width), *blocks, nn.Linear(width, num_classes))

    def loss(self, batch: tuple[Tensor, ...]) -> Tensor:
        x, labels = batch
        return F.cross_entropy(self.model(x.to(self.model[0].weight.dtype)), labels)


class SmallTransformer(Measured):
    """A causal language model of two layers, whose embedding is also its last layer's weight."""

    fsdp_layers = ("TransformerEncoderLayer",)

    def __init__(self, *, width: int = 8, dropout: float = 0.1) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, width)
        self.position = nn.Parameter(0.1 * torch.randn(LENGTH, width))
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(width, 2, 2 * width + 1, dropout, batch_first=True, norm_first=True)
            for _ in range(2)
        )
        self.head = nn.Linear(width, VOCABULARY, bias=False)
        self.head.weight = self.embedding.weight

    def loss(self, batch: tuple[Tensor, ...]) -> Tensor:
        (tokens,) = batch
        hidden = self.embedding(tokens) + self.position
        mask = torch.full((LENGTH, LENGTH), float("-inf"), dtype=hidden.dtype).triu(1)
        for layer in self.layers:
            hidden = layer(hidden, src_mask=mask, is_causal=True)
        logits = self.head(hidden[:, :-1])
        return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
