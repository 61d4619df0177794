"""From an image file to upright RGB pixels: decode, preprocess, the dataset."""

import io
import os
import stat
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO, Any, NamedTuple

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms import functional as F

from vggenc.endings import ends_early
from vggenc.errors import ImageError, VggencError
from vggenc.inputs import FORMATS, ImageList
from vggenc.options import MAX_PIXELS, Options
from vggenc.places import MOST_BYTES, fetch, is_url

Image.init()  # so that Image.OPEN holds every format that this Pillow reads

# EXIF orientation -> the transposition that makes the picture upright (EXIF 2.32, tag 0x0112).
_ORIENTATION_TAG = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_TURNS = tuple(_UPRIGHT[i] for i in (5, 6, 7, 8))  # these swap width and height
# A picture longer than this many times its width is cut to its middle before it is resized: the centre
# crop sees nothing beyond, and a strip of 1 x 20,000 pixels would become 256 x 5,120,000.
_LONGEST = 16
Source = str | os.PathLike[str] | bytes | OSError
"""A file by path or URL, what is in it, or why that isn't to be had."""
# Times the shorter side after resizing: the size to which a JPEG's own scaling may take it beforehand.
_ENOUGH = 2


class Decoded(NamedTuple):
    """An upright RGB picture, and the size that its file states for it."""

    image: Image.Image
    width: int
    height: int


def decode(file: Source, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Read an image file as an upright RGB picture of 8 bits a channel, at its full size; see `read`."""
    return read(file, max_pixels=max_pixels).image


def read(file: Source, *, max_pixels: int = MAX_PIXELS, enough: int | None = None) -> Decoded:
    """Read an image file as an upright RGB picture of 8 bits a channel.

    EXIF orientation is applied, the first frame of an animation taken, transparency laid onto white, 16-bit
    grey reduced to its upper 8 bits (as Pillow does for 16-bit colour).

    Args:
        file: its path or URL, or what `sources` gave for it.
        max_pixels: width times height that is not refused.
        enough: a JPEG may be decoded at a half, a quarter or an eighth of its size, which is quicker, as long
            as its shorter side keeps this many pixels; None: at its full size.

    Raises:
        ImageError: whatever keeps the file from becoming such a picture; the message says what.
        UsageError, StoreError: a URL that can't be meant, or an object store that doesn't answer.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's remarks on odd metadata
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with _stream(file) as stream, _pixel_limit(max_pixels):
                length = stream.seek(0, os.SEEK_END)
                if not length:
                    raise ImageError("empty file")
                stream.seek(0)
                with _open(stream) as image:
                    size = image.size
                    # A Huffman code takes a bit at least for each block of 8x8 pixels; a decoder that runs
                    # out of them goes on in grey, and doesn't say so.
                    least = size[0] * size[1] // 64 // 8
                    if image.format in ("JPEG", "MPO") and length < least:
                        raise ImageError(f"too few bytes for {size[0]}x{size[1]} pixels")
                    draft = None if enough is None else (enough, enough)
                    if draft:
                        image.draft(None, draft)
                    image.load()
                    if ends_early(image, stream, draft):
                        raise ImageError("the picture data ends early")
                    turn = _UPRIGHT.get(image.getexif().get(_ORIENTATION_TAG, 1))
                    pixels = to_rgb(image)
                    if turn is None:
                        return Decoded(pixels, *size)
                    return Decoded(pixels.transpose(turn), *(reversed(size) if turn in _TURNS else size))
    except VggencError:
        raise
    except FileNotFoundError as error:
        link = isinstance(file, str | os.PathLike) and os.path.islink(file)
        raise ImageError("link to a missing file" if link else "no such file") from error
    except UnidentifiedImageError as error:
        raise ImageError("not an image in a format that is read") from error
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise ImageError(f"more than {max_pixels} pixels") from error
    except Exception as error:  # damaged files make Pillow raise nearly anything
        text = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise ImageError(f"{type(error).__name__}: {text}"[:200]) from error


def sources(files: Sequence[str]) -> Sequence[Source]:
    """What `read` takes for some files: contents where they lie in an object store, read at the same time."""
    return fetch(files) if files and is_url(files[0]) else files


def _stream(file: Source) -> IO[bytes]:
    if is_url(file):
        [file] = fetch([file])
    if isinstance(file, OSError):
        raise file
    if isinstance(file, bytes):
        if len(file) == MOST_BYTES:
            raise ImageError(f"{MOST_BYTES >> 20} MiB or more in an object store")
        return io.BytesIO(file)
    mode = os.stat(file).st_mode
    if stat.S_ISDIR(mode):
        raise ImageError("a folder that can't be listed" if not os.access(file, os.R_OK) else "a folder")
    if not stat.S_ISREG(mode):
        raise ImageError("not a regular file")
    return open(file, "rb")


def _open(stream: IO[bytes]) -> Image.Image:
    image = Image.open(stream, formats=[name for name in FORMATS if name in Image.OPEN])
    if image.format != "PNG":
        return image
    image.verify()  # the checksums, which Pillow only compares when it is asked, and then can't go on
    stream.seek(0)
    return Image.open(stream, formats=["PNG"])


@contextmanager
def _pixel_limit(pixels: int) -> Iterator[None]:
    """Pillow's limit is a global; it is checked while a file is opened, before memory is taken."""
    before, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, pixels
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS = before


def to_rgb(image: Image.Image) -> Image.Image:
    """Turn a picture of any of Pillow's modes into 8-bit RGB.

    Raises:
        ImageError: a mode whose range of brightness isn't defined (floating point, wide integers).
    """
    if image.mode == "F":
        raise ImageError("floating-point pixels have no defined range")
    if image.mode.startswith("I"):  # 16 bits, which older Pillows and some formats hand out as 32
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 0xFFFF:
            raise ImageError("integer pixels beyond 16 bits have no defined range")
        grey = (values >> 8).astype(np.uint8)
        if (clear := image.info.get("transparency")) is not None:
            grey[values == clear] = 255
        return Image.fromarray(grey).convert("RGB")
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        white.alpha_composite(image.convert("RGBA"))
        return white.convert("RGB")
    return image.convert("RGB")


@dataclass(frozen=True)
class Preprocess:
    """The transform that fits some weights: resize, centre crop, scale to [0, 1], normalise.

    Equals torchvision's `ImageClassification` preset of the same numbers, bit for bit.
    """

    mean: tuple[float, float, float]
    """Subtracted, for R, G and B in [0, 1]."""
    std: tuple[float, float, float]
    """Divided by."""
    resize: int = 256
    """Pixels of the shorter side (bilinear, antialiased)."""
    crop: int = 224
    """Side of the square cut from the middle, in pixels."""

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> "Preprocess":
        """The transform whose fields were written as JSON."""
        (r, g, b), (rs, gs, bs) = fields["mean"], fields["std"]
        mean, std = (float(r), float(g), float(b)), (float(rs), float(gs), float(bs))
        return cls(mean, std, int(fields["resize"]), int(fields["crop"]))

    @property
    def largest(self) -> tuple[float, ...]:
        """The largest magnitude that each channel can have."""
        return tuple(max(mean, 1 - mean) / std for mean, std in zip(self.mean, self.std, strict=True))

    def at(self, image_size: int | None) -> "Preprocess":
        """The same transform for another crop, `resize` in proportion; None: this one."""
        if image_size is None:
            return self
        return Preprocess(self.mean, self.std, round(image_size * self.resize / self.crop), image_size)

    def __call__(self, image: Image.Image) -> Tensor:
        """From a picture of any size and mode to a normalised float32 tensor `(3, crop, crop)`."""
        return self.normalize(self.square(image))

    def square(self, image: Image.Image) -> Tensor:
        """The geometric half: a uint8 RGB tensor `(3, crop, crop)`, its memory in pixel order."""
        image = to_rgb(image)
        width, height = image.size
        longest = _LONGEST * min(width, height)
        if max(width, height) > longest:
            image = F.center_crop(image, [min(height, longest), min(width, longest)])
        image = F.center_crop(F.resize(image, [self.resize], antialias=True), [self.crop])
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)

    def normalize(self, pixels: Tensor) -> Tensor:
        """The arithmetic half: uint8 `(..., 3, H, W)` to normalised float32, on the tensor's device."""
        scaled = pixels.float().div_(255)
        normalized: Tensor = F.normalize(scaled, list(self.mean), list(self.std), inplace=True)
        return normalized


class Row(NamedTuple):
    """What is known of one input file besides its features."""

    path: str
    """Relative to the root of the inputs; bytes that are not UTF-8 stand as `\\xNN`."""
    status: str
    """`ok` or `failed`."""
    error: str | None
    """Why it failed."""
    width: int | None
    """Of the upright picture, in pixels."""
    height: int | None


class ImageDataset(Dataset[tuple[Row, Tensor | None]]):
    """Rows and pixels of a list of files: `(Row, uint8 (3, crop, crop))`, or `(Row, None)` for a failed file.

    A file that can't be read never raises and never becomes another picture.
    """

    def __init__(self, images: ImageList, preprocess: Preprocess, options: Options) -> None:
        self.images = images
        self.preprocess = preprocess
        self.max_pixels = options.max_pixels
        self.enough = None if options.full_decode else _ENOUGH * preprocess.resize

    def __len__(self) -> int:
        return len(self.images.paths)

    def __getitem__(self, index: int) -> tuple[Row, Tensor | None]:
        return self.item(index, self.images.file(index))

    def sources(self, indices: Sequence[int]) -> Sequence[Source]:
        """What `item` takes for some rows."""
        return sources([self.images.file(index) for index in indices])

    def item(self, index: int, source: Source) -> tuple[Row, Tensor | None]:
        """A row and its pixels."""
        try:
            image, *size = read(source, max_pixels=self.max_pixels, enough=self.enough)
        except ImageError as error:
            return self.failed(index, str(error)), None
        return Row(self._path(index), "ok", None, *size), self.preprocess.square(image)

    def failed(self, index: int, error: str) -> Row:
        """The row of a file that yields no picture."""
        return Row(self._path(index), "failed", error, None, None)

    def _path(self, index: int) -> str:
        return os.fsencode(self.images.paths[index]).decode("utf-8", "backslashreplace")
