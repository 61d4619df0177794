"""Pictures whose data stops early at a proper end, which decoders fill up without a word."""

import io
import struct
import zlib
from collections.abc import Iterator
from typing import IO

from PIL import Image

_EDGE = 16
"""Pixels of the last row that are looked at in a JPEG."""
_MORE = bytes(range(255)) * 8
"""What a JPEG decoder takes for further blocks, if it needs some."""
_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
"""Of a PNG's colour types."""
_PASSES = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
"""Of an interlaced PNG: the first column and row, and the steps to the next ones."""


def ends_early(image: Image.Image, stream: IO[bytes], draft: tuple[int, int] | None = None) -> bool:
    """Whether a PNG or JPEG that decoded without an error has data for only a part of its pixels.

    What is missing comes out black in a PNG, and in the colour of the last block in a JPEG. So only pictures
    that end like that are looked at again. An early end of a progressive JPEG blurs it, and isn't found.

    Args:
        image: as decoded.
        stream: its file; read to its end.
        draft: the size that a JPEG's decoder was asked for.
    """
    width, height = image.size
    if image.format == "PNG":
        last = image.crop((0, height - 1, width, height)).getbbox(alpha_only=False)
        # The last row of an interlaced picture may be there where others aren't.
        return (last is None or "interlace" in image.info) and _png_ends_early(stream)
    if image.format == "JPEG":
        edge = image.crop((max(0, width - _EDGE), height - 1, width, height))
        return edge.getcolors(1) is not None and _jpeg_ends_early(image, stream, draft)
    return False


def _jpeg_ends_early(image: Image.Image, stream: IO[bytes], draft: tuple[int, int] | None) -> bool:
    """Whether more data before the end of the file would change the picture."""
    stream.seek(0)
    data = stream.read()
    end = data.rfind(b"\xff\xd9")
    with Image.open(io.BytesIO(data[:end] + _MORE + data[end:]), formats=["JPEG"]) as again:
        if draft:
            again.draft(None, draft)
        return again.tobytes() != image.tobytes()


def _png_ends_early(stream: IO[bytes]) -> bool:
    """Whether the inflated data is shorter than the rows need."""
    stream.seek(8)
    needed, inflate = 0, zlib.decompressobj()
    for kind, content in _chunks(stream):
        if kind == b"IHDR":
            width, height, depth, colours, _, _, interlaced = struct.unpack(">IIBBBBB", content)
            for x, y, dx, dy in _PASSES if interlaced else ((0, 0, 1, 1),):
                columns, rows = -(-(width - x) // dx), -(-(height - y) // dy)
                if columns > 0:
                    needed += max(0, rows) * (1 + -(-columns * _CHANNELS[colours] * depth // 8))
        elif kind == b"IDAT":
            while content and needed > 0:
                needed -= len(inflate.decompress(content, 1 << 20))
                content = inflate.unconsumed_tail
    return needed > 0


def _chunks(stream: IO[bytes]) -> Iterator[tuple[bytes, bytes]]:
    while len(head := stream.read(8)) == 8:
        length, kind = struct.unpack(">I4s", head)
        yield kind, stream.read(length)
        stream.seek(4, io.SEEK_CUR)  # the checksum
