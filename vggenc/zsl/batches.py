"""Batches to train on: a few images of each of some classes, from files or from cached maps."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pytorch_metric_learning.samplers import MPerClassSampler
from pytorch_metric_learning.utils import common_functions
from safetensors import safe_open
from torch import Tensor
from torch.utils.data import Dataset, Sampler
from torchvision.transforms import functional as F

from vggenc.encoder import VGG19Encoder
from vggenc.errors import DataError, ImageError, UsageError
from vggenc.images import Preprocess, read
from vggenc.inputs import ImageList
from vggenc.options import Options
from vggenc.parts import map_files
from vggenc.pipeline import extract
from vggenc.stages import GRID, STAGE_NAMES, STAGES
from vggenc.zsl.recipes import PER_CLASS

Batch = tuple[Tensor | list[Tensor], Tensor, list[str]]
"""Pixels (uint8, `(N, 3, H, W)`) or maps of the four stages, rows of the classes, and what went wrong."""


class ClassBalanced(Sampler[list[tuple[int, int]]]):
    """Batches of `(row, epoch)`, four images of each class in them; each epoch is drawn by its number alone.

    Args:
        labels: `(images,)`.
        batch_size: images in a batch over all processes; fewer where four of each class are fewer.
        seed: of the draw.
        rank: of this process.
        world: number of processes; each takes its share of every batch.

    Raises:
        UsageError: a batch that can't be shared evenly.
    """

    def __init__(
        self, labels: NDArray[np.int64], batch_size: int, *, seed: int, rank: int = 0, world: int = 1
    ) -> None:
        self.batch_size = min(batch_size, PER_CLASS * len(np.unique(labels)))
        if self.batch_size % world:
            raise UsageError(f"{self.batch_size} images in a batch can't be shared by {world} processes")
        self._labels, self._seed, self._rank, self._world = labels, seed, rank, world
        self._count = max(len(labels), self.batch_size)
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Draw for another epoch; Lightning calls it."""
        self._epoch = epoch

    def __len__(self) -> int:
        return self._count // self.batch_size

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        # The sampler of pytorch-metric-learning draws from this global, whose state no checkpoint holds.
        before = common_functions.NUMPY_RANDOM
        common_functions.NUMPY_RANDOM = np.random.RandomState([self._seed, self._epoch])
        try:
            rows = list(MPerClassSampler(self._labels, PER_CLASS, self.batch_size, self._count))
        finally:
            common_functions.NUMPY_RANDOM = before
        share = self.batch_size // self._world
        for start in range(self._rank * share, len(rows), self.batch_size):
            yield [(int(row), self._epoch) for row in rows[start : start + share]]


class ImageBatches(Dataset[Batch]):
    """Batches of randomly cropped and mirrored photographs, the same ones for the same seed and epoch.

    Args:
        images: the files.
        labels: `(images,)`, rows of the seen classes.
        preprocess: what the encoder expects; its crop is drawn at random.
        seed: of the crops.
        augment: False: the middle of each image, not mirrored.
    """

    def __init__(
        self,
        images: ImageList,
        labels: NDArray[np.int64],
        preprocess: Preprocess,
        *,
        seed: int,
        augment: bool = True,
    ) -> None:
        self._images, self._labels, self._preprocess = images, labels, preprocess
        self._seed, self._augment = seed, augment

    def __getitem__(self, chosen: Sequence[tuple[int, int]]) -> Batch:
        squares, failures = [], []
        for row, epoch in chosen:
            try:
                image = read(self._images.file(row), enough=2 * self._preprocess.resize).image
            except ImageError as error:
                failures.append(f"{self._images.file(row)}: {error}")
                continue
            if not self._augment:
                squares.append(self._preprocess.square(image))
                continue
            rng = np.random.default_rng([self._seed, epoch, row])
            image = F.resize(image, [self._preprocess.resize], antialias=True)
            crop = self._preprocess.crop
            top, left = (int(rng.integers(0, side - crop + 1)) for side in (image.height, image.width))
            image = image.crop((left, top, left + crop, top + crop))
            square = torch.from_numpy(np.array(image)).permute(2, 0, 1)
            squares.append(square.flip(2) if rng.random() < 0.5 else square)
        labels = torch.from_numpy(self._labels[[row for row, _ in chosen]])
        return (torch.empty(0) if failures else torch.stack(squares)), labels, failures


def check_grid(options: Options) -> None:
    """See that the heads' grid is all that they see of maps at an image size.

    Raises:
        UsageError: a larger one.
    """
    if (options.image_size or 224) // STAGES[-1].reduction > GRID:
        raise UsageError(f"cached maps work for an image_size below 240; got {options.image_size}")


def cache_grids(
    encoder: VGG19Encoder, images: ImageList, folder: Path, options: Options, *, overwrite: bool = False
) -> None:
    """Compute what the heads see of some images, as a features folder.

    Args:
        encoder: whose stages.
        images: the files.
        folder: where; what an earlier call left there is gone on with.
        options: `image_size`, `engine` and `num_workers` are used.
        overwrite: replace what is there.

    Raises:
        UsageError: as of `check_grid`, or a folder with maps of other images or settings.
        DataError: an image that can't be read.
    """
    check_grid(options)
    given = replace(options, pool="grid", allow_untrained=True)
    summary = extract(images, encoder, STAGE_NAMES, folder, options=given, overwrite=overwrite, progress=True)
    if summary.failed:
        path, reason = summary.failures[0]
        raise DataError(f"{images.root}/{path} can't be used: {reason}")


class Grids:
    """The maps of a features folder that `cache_grids` wrote, by row."""

    def __init__(self, folder: Path) -> None:
        self._places = [(file, row) for file, rows in map_files(folder) for row in range(rows)]
        self._open: dict[Path, Any] = {}

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, rows: Sequence[int]) -> list[Tensor]:
        """A float32 tensor `(len(rows), C, H, W)` for each stage."""
        found: list[list[Tensor]] = [[] for _ in STAGE_NAMES]
        for row in rows:
            file, at = self._places[row]
            if file not in self._open:
                self._open[file] = safe_open(file, framework="pt")
            for name, values in zip(STAGE_NAMES, found, strict=True):
                values.append(self._open[file].get_slice(name)[at : at + 1])
        return [torch.cat(values).float() for values in found]


class GridBatches(Dataset[Batch]):
    """Batches of cached maps.

    Args:
        grids: those of all images.
        rows: `(images,)`, where each training image is among them.
        labels: `(images,)`, rows of the seen classes.
    """

    def __init__(self, grids: Grids, rows: NDArray[np.int64], labels: NDArray[np.int64]) -> None:
        self._grids, self._rows, self._labels = grids, rows, labels

    def __getitem__(self, chosen: Sequence[tuple[int, int]]) -> Batch:
        rows = [row for row, _ in chosen]
        return self._grids[[int(self._rows[row]) for row in rows]], torch.from_numpy(self._labels[rows]), []
