import struct
import zlib

import pytest
from conftest import PHOTOGRAPHS
from PIL import Image
from test_damage import picture, png_chunk, square

from vggenc import ImageError
from vggenc.images import read


def closed_after(content: bytes, rows: float) -> bytes:
    """A PNG file whose data ends properly after some of its rows, with checksums that fit."""
    out, at, data = content[:8], 8, b""
    while at < len(content):
        length, name = struct.unpack(">I4s", content[at : at + 8])
        if name == b"IDAT":
            data += content[at + 8 : at + 8 + length]
        elif name == b"IEND":
            rest = zlib.decompress(data)
            # In one block, as a cut that lands on a block's end, which Pillow's decoder takes for the end.
            out += png_chunk(b"IDAT", zlib.compress(rest[: int(len(rest) * rows)])) + png_chunk(name, b"")
        else:
            out += content[at : at + 12 + length]
        at += 12 + length
    return out


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "I;16"])
def test_png_files_that_end_properly_after_some_rows_are_failures(tmp_path, mode):
    grey = picture().convert("L")
    image = {"P": picture().quantize(8), "I;16": grey.convert("I;16")}.get(mode) or picture().convert(mode)
    for size in ((40, 48), (8, 9)):  # the smaller one decodes without a word
        image.resize(size).save(tmp_path / "whole.png")
        whole = (tmp_path / "whole.png").read_bytes()
        for rows in (0.1, 0.6, 0.95, 1):
            (tmp_path / "cut.png").write_bytes(closed_after(whole, rows))
            pixels = square(tmp_path / "cut.png")
            assert (pixels is None) == (rows < 1), (size, rows)


def test_a_black_picture_is_no_failure(tmp_path):
    for suffix in ("png", "jpg"):
        Image.new("RGB", (40, 48)).save(tmp_path / f"black.{suffix}")
        assert not square(tmp_path / f"black.{suffix}").any()


@pytest.mark.parametrize("options", [{}, {"subsampling": 0}, {"restart_marker_rows": 1}], ids=str)
@pytest.mark.parametrize("full", [True, False])
def test_jpeg_files_that_were_cut_and_closed_again_are_failures(tmp_path, options, full):
    with Image.open(PHOTOGRAPHS / "cat.jpg") as image:
        image.convert("RGB").resize((600, 500)).save(tmp_path / "whole.jpg", **options)
    whole = (tmp_path / "whole.jpg").read_bytes()
    enough = None if full else 64
    read(tmp_path / "whole.jpg", enough=enough)
    for share in (0.2, 0.5, 0.9):
        (tmp_path / "cut.jpg").write_bytes(whole[: int(len(whole) * share)] + b"\xff\xd9")
        with pytest.raises(ImageError, match="the picture data ends early"):
            read(tmp_path / "cut.jpg", enough=enough)
