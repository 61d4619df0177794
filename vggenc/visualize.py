"""What the network sees in a picture: its strongest channels, its stages in colours, its attributes."""

import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from vggenc import sheets
from vggenc.encoder import VGG19Encoder
from vggenc.engines import Engine
from vggenc.errors import ImageError, UsageError
from vggenc.images import decode
from vggenc.inputs import Inputs, find_images
from vggenc.options import Options
from vggenc.pipeline import iter_features
from vggenc.progress import progress_bar
from vggenc.sheets import Panel
from vggenc.stages import GRID, OUTPUTS, STAGE_NAMES

CHANNELS = 3
"""Heat maps of each stage."""
ATTRIBUTES = 5
"""Attributes shown, those with the largest predictions."""
_HEADS = ("attention", "attributes", "latent")
_LONGEST_NAME = 200
"""Bytes."""
_SPREAD = 2.5
"""Standard deviations of a principal component from the middle of a colour to its end."""

Arrays = dict[str, NDArray[Any]]


class Sheet(NamedTuple):
    """What came of an input file: where its sheet lies, or why there is none."""

    path: str
    file: Path | None
    error: str | None


def show(
    inputs: Inputs,
    encoder: VGG19Encoder,
    output: str | Path,
    *,
    names: Sequence[str] | None = None,
    options: Options | None = None,
    progress: bool = False,
) -> Iterator[Sheet]:
    """Draw a sheet for each image, as `<path>.png` in a folder.

    It holds the picture; each stage's map in colours, its first three principal components over all images
    given as red, green and blue; the channels of each stage with the largest values as heat maps; and for
    an encoder with trained heads what `attention_sheet` shows.

    Args:
        inputs: as for `extract`.
        encoder: as for `extract`.
        output: the folder; sheets that are there are replaced.
        names: of the attributes, k of them.
        options: `image_size`, `num_workers`, `engine` and the like; maps are always whole.
        progress: show a bar on standard error where that is a terminal.

    Yields:
        A `Sheet` for each image, in order, as soon as it is written.

    Raises:
        UsageError: inputs that don't exist, a wrong number of names, or a file in the place of the folder.
        StoreError: a sheet that can't be written.
    """
    _check_names(names, encoder.k)
    if Path(output).exists() and not Path(output).is_dir():
        raise UsageError(f"{output} is a file, not a folder")
    images = find_images(inputs)
    options = replace(options or Options(), pool="none", batch_size=4)
    trained = _has_heads(encoder)
    components = {name: _Components() for name in STAGE_NAMES}
    with progress_bar(2 * len(images.paths), shown=progress) as bar:
        failed = 0
        for batch in iter_features(images, encoder, options=options):
            failed += sum(row.status != "ok" for row in batch.rows)
            bar.set_postfix(failed=failed, refresh=False)
            for i, row in enumerate(batch.rows):
                bar.update()
                for name in STAGE_NAMES if row.status == "ok" else ():
                    components[name].add(batch.features[name][i])
        outputs = (*STAGE_NAMES, *_HEADS) if trained else STAGE_NAMES
        done = 0
        for batch in iter_features(images, encoder, outputs, options=options):
            for i, row in enumerate(batch.rows):
                bar.update()
                file = Path(output) / _sheet_name(images.paths[done + i])
                if row.status != "ok":
                    yield Sheet(row.path, None, row.error)
                    continue
                try:
                    picture = decode(images.file(done + i), max_pixels=options.max_pixels)
                except ImageError as error:  # it has changed meanwhile
                    yield Sheet(row.path, None, str(error))
                    continue
                features = {name: values[i] for name, values in batch.features.items()}
                square = _square(encoder, picture, options.image_size)
                first = _picture(picture, row.path.rpartition("/")[2], encoder)
                rows = _stage_rows(first, square, features, components)
                if trained:
                    rows += _attribute_rows(square, features, encoder, names)
                sheets.save(sheets.draw(rows), file)
                yield Sheet(row.path, file, None)
            done += len(batch.rows)


def attention_sheet(
    picture: Image.Image,
    encoder: VGG19Encoder,
    names: Sequence[str] | None = None,
    *,
    image_size: int | None = None,
) -> Image.Image:
    """The attributes with the largest predictions, and where in the 14x14 grid of each stage they come from.

    A stage's attention for an attribute is a softmax, over the attributes, of a weighted sum over the cells
    of the grid. A map shows each cell's part of that sum, less its mean over all attributes; where that
    is positive, the cell speaks for this attribute.

    Args:
        picture: of any size.
        encoder: with trained heads, on any device.
        names: of the attributes, k of them.
        image_size: side of the square seen; None: what the weights expect.

    Raises:
        UsageError: a wrong number of names, or heads that were never trained.
    """
    _check_names(names, encoder.k)
    encoder.check_trained(_HEADS)
    engine = Engine(encoder, (*STAGE_NAMES, *_HEADS), Options(pool="none", image_size=image_size))
    square = _square(encoder, picture, image_size)
    found = engine(torch.from_numpy(square).permute(2, 0, 1)[None])
    features = {name: values[0] for name, values in found.items()}
    rows = _attribute_rows(square, features, encoder, names)
    first = Panel(_picture(picture, "", encoder).image, rows[0][0].lines)
    return sheets.draw([[first, *rows[0][1:]], *rows[1:]])


def read_names(file: Path, k: int) -> list[str]:
    """Names of `k` attributes from a file with one a line, such as AwA2's `predicates.txt` ('1 black').

    Raises:
        UsageError: it can't be read, or has another number of names.
    """
    try:
        lines = file.read_text("utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{file} can't be read: {error}") from error
    names = [line.split(maxsplit=1)[-1].strip() for line in lines if line.strip()]
    _check_names(names, k)
    return names


def _check_names(names: Sequence[str] | None, k: int) -> None:
    if names is not None and len(names) != k:
        raise UsageError(f"the encoder has {k} attributes; got {len(names)} names")


class _Components:
    """Principal components of the vectors of a stage's maps, over all images that were added."""

    def __init__(self) -> None:
        self._count = 0
        self._sum: Any = 0.0
        self._products: Any = 0.0
        self._found: tuple[NDArray[np.float64], NDArray[np.float64]] | None = None

    def add(self, maps: NDArray[Any]) -> None:
        """Count in a map `(C, H, W)`."""
        vectors = maps.reshape(len(maps), -1).astype(np.float64)
        self._count += vectors.shape[1]
        self._sum += vectors.sum(1)
        self._products += vectors @ vectors.T

    def colours(self, maps: NDArray[Any]) -> Image.Image:
        """A map `(C, H, W)` as RGB, one pixel a cell; grey is the mean of all images."""
        if self._found is None:
            mean = self._sum / self._count
            values, vectors = np.linalg.eigh(self._products / self._count - np.outer(mean, mean))
            least = 1e-6 * values[-1] + 1e-9  # so that rounding doesn't become colours
            axes = vectors[:, -1:-4:-1] / np.sqrt(np.maximum(values[-1:-4:-1], least))
            axes *= np.sign(axes[np.abs(axes).argmax(0), np.arange(3)])  # either sign would do, so fix one
            self._found = mean, axes
        mean, axes = self._found
        projected = np.einsum("chw,cp->hwp", maps - mean[:, None, None], axes)
        return Image.fromarray((255 * np.clip(0.5 + projected / (2 * _SPREAD), 0, 1)).astype(np.uint8))


def _sheet_name(path: str) -> str:
    """The image's own name and `.png`; a hash in the place of the end of one that is too long for it."""
    folder, name = os.path.split(path)
    if len(os.fsencode(name)) > _LONGEST_NAME:
        name = name[: _LONGEST_NAME // 4] + hashlib.sha256(os.fsencode(name)).hexdigest()[:16]
    return os.path.join(folder, f"{name}.png")


def _has_heads(encoder: VGG19Encoder) -> bool:
    return all(module in encoder.trained for name in _HEADS for module in OUTPUTS[name])


def _square(encoder: VGG19Encoder, picture: Image.Image, image_size: int | None) -> NDArray[np.uint8]:
    return encoder.preprocess.at(image_size).square(picture).permute(1, 2, 0).numpy()


def _picture(picture: Image.Image, name: str, encoder: VGG19Encoder) -> Panel:
    """The whole picture, with a frame around about what is seen of it."""
    small = sheets.fit(picture, sheets.SIDE)
    side = min(small.size) * encoder.preprocess.crop / encoder.preprocess.resize
    left, top = (small.width - side) / 2, (small.height - side) / 2
    pen = ImageDraw.Draw(small)
    for inset, colour in enumerate(("black", "white", "black")):
        near, far = inset - 1, side - inset
        pen.rectangle([left + near, top + near, left + far, top + far], outline=colour)
    return Panel(small, (name, f"{picture.width} x {picture.height}, framed: seen"))


def _stage_rows(
    picture: Panel, square: NDArray[np.uint8], features: Arrays, components: dict[str, _Components]
) -> list[list[Panel]]:
    colours, strongest = [picture], []
    for name in STAGE_NAMES:
        maps = features[name]
        sides = f"{maps.shape[1]} x {maps.shape[2]}"
        colours.append(Panel(components[name].colours(maps), (name, f"{sides}, PCA as RGB")))
        channels = np.argsort(-maps.max((1, 2)), kind="stable")[:CHANNELS]
        strongest.append(
            [
                Panel(sheets.heat(maps[i], square), (f"{name}, channel {i}", f"0 to {maps[i].max():.3g}"))
                for i in channels
            ]
        )
    text = ("0 to the largest of a map",)
    first = [sheets.scale(text), *[Panel(None, ())] * (CHANNELS - 1)]
    return [colours, *([panel, *column] for panel, *column in zip(first, *strongest, strict=True))]


@torch.no_grad()
def _attribute_rows(
    square: NDArray[np.uint8], features: Arrays, encoder: VGG19Encoder, names: Sequence[str] | None
) -> list[list[Panel]]:
    device = next(encoder.parameters()).device
    latent = torch.from_numpy(features["latent"]).to(device)
    parts = []
    for i, name in enumerate(STAGE_NAMES):
        maps = torch.from_numpy(features[name]).to(device)[None]
        weights = getattr(encoder, f"fc{i}").weight[0]
        part = (encoder.evidence(i, maps)[0] + latent[:, None]) * weights
        parts.append((part - part.mean(0)).reshape(-1, GRID, GRID).float().cpu().numpy())
    values, attention = features["attributes"], features["attention"]
    rows = []
    for place, a in enumerate(np.argsort(-values, kind="stable")[:ATTRIBUTES].tolist(), 1):
        title = names[a] if names else f"attribute {a}"
        about = Panel(None, (title, f"{place} of {len(values)}: {values[a]:.3g}"))
        maps_of_it = [
            Panel(sheets.heat(part[a], square), (name, f"attention {attention[i, a]:.2g}"))
            for i, (name, part) in enumerate(zip(STAGE_NAMES, parts, strict=True))
        ]
        rows.append([about, *maps_of_it])
    return rows
