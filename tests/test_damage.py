"""Damaged and hostile image files: each costs its own row and nothing else."""

import os
import resource
import struct
import time
import warnings
import zlib
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import PHOTOGRAPHS
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, features
from torchvision.io import decode_image

from vggenc import ImageError, Options, extract, loading, read_features
from vggenc.images import ImageDataset, decode, read
from vggenc.inputs import FORMATS, ImageList, find_images
from vggenc.loading import load_batches
from vggenc.weights import REGISTRY

PREPROCESS = REGISTRY[0].preprocess.at(32)
SECONDS = 5  # for one file of the corpus; the slowest takes milliseconds
KINDS: dict[str, tuple[str, dict[str, object]]] = {
    "jpeg": (".jpg", {"quality": 90}),
    "progressive": (".jpg", {"progressive": True}),
    "mpo": (".mpo", {"save_all": True, "append_images": [Image.new("RGB", (40, 48))]}),
    "png": (".png", {}),
    "apng": (".png", {"save_all": True, "append_images": [Image.new("RGB", (40, 48))]}),
    "webp": (".webp", {"lossless": True}),
    "lossy-webp": (".webp", {}),
    "gif": (".gif", {}),
    "tiff": (".tif", {}),
    "lzw-tiff": (".tif", {"compression": "tiff_lzw"}),
    "deflate-tiff": (".tif", {"compression": "tiff_adobe_deflate"}),
    "jpeg-tiff": (".tif", {"compression": "jpeg"}),
    "bmp": (".bmp", {}),
    "dib": (".dib", {}),
    "ppm": (".ppm", {}),
    "ico": (".ico", {"sizes": [(32, 32)]}),
    "bmp-ico": (".ico", {"sizes": [(32, 32)], "bitmap_format": "bmp"}),
    "tga": (".tga", {}),
    "packed-tga": (".tga", {"compression": "tga_rle"}),
    "jpeg2000": (".jp2", {"irreversible": False}),
    **({"avif": (".avif", {})} if features.check("avif") else {}),
}


def picture() -> Image.Image:
    """A photograph's middle, so that compressed formats have something to compress."""
    with Image.open(PHOTOGRAPHS / "cat.jpg") as image:
        return image.convert("RGB").resize((40, 48))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> dict[str, list[Path]]:
    """For each kind of file: the whole one, then damaged ones, in one folder."""
    folder = tmp_path_factory.mktemp("corpus")
    rng = np.random.default_rng(0)
    made = {}
    for kind, (suffix, options) in KINDS.items():
        whole = folder / f"{kind}-whole{suffix}"
        picture().save(whole, **options)
        content = whole.read_bytes()
        made[kind] = [whole]

        def add(what: str, damaged: bytes, kind: str = kind, suffix: str = suffix) -> None:
            file = folder / f"{kind}-{what}{suffix}"
            file.write_bytes(damaged)
            made[kind].append(file)

        cuts = {1, 4, 12, 30, len(content) - 1, *np.linspace(50, len(content) - 2, 15).astype(int).tolist()}
        for cut in sorted(cuts):
            add(f"cut-{cut:05}", content[:cut])
        headed = rng.integers(0, min(200, len(content)), 10).tolist()
        for at in [*headed, *rng.integers(0, len(content), 14).tolist()]:
            flipped = bytearray(content)
            flipped[at] ^= int(rng.integers(1, 256))
            add(f"flip-{at:05}-{flipped[at]:03}", bytes(flipped))
        add("twice", content + content)
        add("other", whole.read_bytes()[::-1])
        other = folder / f"{kind}-renamed.{'png' if suffix != '.png' else 'jpg'}"
        other.write_bytes(content)
        made[kind].append(other)
    assert sum(map(len, made.values())) >= 500 + len(made)
    return made


def square(file: Path) -> torch.Tensor | None:
    """What a run sees of a file; None for a failed one."""
    dataset = ImageDataset(find_images(file), PREPROCESS, Options())
    row, pixels = dataset[0]
    assert (pixels is None) == (row.status == "failed") == bool(row.error)
    return pixels


def test_every_damaged_file_is_a_row_in_its_place_and_none_takes_long(corpus):
    images = find_images(corpus["png"][0].parent)
    assert len(images.paths) == sum(map(len, corpus.values()))
    dataset = ImageDataset(images, PREPROCESS, Options())
    for i, path in enumerate(images.paths):
        begun = time.monotonic()
        row, pixels = dataset[i]
        assert time.monotonic() - begun < SECONDS, path
        assert row.path == path
        assert (row.status == "ok") == (pixels is not None) == (row.error is None)
    chunks = [range(i, min(i + 50, len(images.paths))) for i in range(0, len(images.paths), 50)]
    rows = [row for found, _ in load_batches(dataset, chunks, 1) for row in found]
    assert [row.path for row in rows] == images.paths


def test_whole_files_under_any_suffix_are_ok(corpus):
    for files in corpus.values():
        for file in files:
            if "whole" in file.name or "renamed" in file.name:
                assert torch.equal(square(file), PREPROCESS.square(decode(files[0]))), file.name


def test_truncated_files_are_ok_only_where_no_pixel_is_missing(corpus):
    failed = 0
    for files in corpus.values():
        expected = square(files[0])
        for file in files:
            if "-cut-" in file.name:
                pixels = square(file)
                failed += pixels is None
                assert pixels is None or torch.equal(pixels, expected), file.name
    assert failed > 10 * len(corpus)


def test_checksums_of_png_files_are_compared(corpus):
    for kind in ("png", "apng"):
        expected = square(corpus[kind][0])
        for file in corpus[kind]:
            if "-flip-" in file.name:
                pixels = square(file)
                assert pixels is None or torch.equal(pixels, expected), file.name


@pytest.mark.filterwarnings("ignore:The image decoding:DeprecationWarning")  # in favour of torchcodec
def test_flipped_files_that_are_ok_have_the_pixels_that_another_decoder_reads(corpus):
    compared = 0
    for kind in ("jpeg", "progressive", "webp", "lossy-webp", "gif"):
        for file in corpus[kind]:
            if "-flip-" not in file.name or square(file) is None:
                continue
            try:
                theirs = decode_image(str(file), mode="RGB")
            except RuntimeError:
                continue
            theirs = theirs if theirs.ndim == 3 else theirs[0]
            ours = np.asarray(decode(file)).transpose(2, 0, 1).astype(int)
            assert abs(ours - theirs.numpy()).max() <= 4, file.name
            compared += 1
    assert compared > 30


def png_chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


# Headers that lie


def png(width: int, height: int) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    rows = zlib.compress(b"\0" * 1000)
    chunks = ((b"IHDR", header), (b"IDAT", rows), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(png_chunk(*chunk) for chunk in chunks)


def bmp(width: int, height: int) -> bytes:
    header = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 24, 0, 0, 0, 0, 0, 0)
    return b"BM" + struct.pack("<IHHI", 54 + 300, 0, 0, 54) + header + b"\0" * 300


def gif(width: int, height: int) -> bytes:
    screen = b"GIF89a" + struct.pack("<HHBBB", width, height, 0x80, 0, 0) + b"\0" * 6
    return screen + b"," + struct.pack("<HHHHB", 0, 0, width, height, 0) + b"\x02\x02\x44\x01\x00;"


def jpeg(width: int, height: int) -> bytes:
    with Image.open(PHOTOGRAPHS / "cat.jpg") as image:
        true = struct.pack(">HH", image.height, image.width)
    return (PHOTOGRAPHS / "cat.jpg").read_bytes().replace(true, struct.pack(">HH", height, width), 1)


def tiff(width: int, height: int) -> bytes:
    tags = [(256, 4, width), (257, 4, height), (258, 3, 8), (259, 3, 1), (262, 3, 1), (273, 4, 8)]
    tags += [(277, 3, 1), (278, 4, height), (279, 4, 100)]
    entries = b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in tags)
    return (
        b"II*\0" + struct.pack("<I", 108) + b"\0" * 100 + struct.pack("<H", len(tags)) + entries + b"\0" * 4
    )


def ppm(width: int, height: int) -> bytes:
    return f"P6 {width} {height} 255\n".encode() + b"\0" * 300


def webp(width: int, height: int) -> bytes:
    canvas = b"VP8X" + struct.pack("<I", 10) + b"\0" * 4
    canvas += (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    return b"RIFF" + struct.pack("<I", len(canvas) + 4) + b"WEBP" + canvas


LIARS: dict[str, Callable[[int, int], bytes]] = {
    "png": png,
    "bmp": bmp,
    "gif": gif,
    "jpg": jpeg,
    "tif": tiff,
    "ppm": ppm,
    "webp": webp,
}


SIDES = {"webp": (9000, 60_000, 2**24), "gif": (0, 9000, 60_000), "jpg": (0, 9000, 60_000)}
ANY_SIDES = (0, 9000, 60_000, 2**31 - 1)


@pytest.mark.parametrize(
    ("suffix", "side"), [(suffix, side) for suffix in LIARS for side in SIDES.get(suffix, ANY_SIDES)]
)
def test_headers_that_lie_about_the_size_are_failures(tmp_path, suffix, side):
    file = tmp_path / f"a.{suffix}"
    for size in [(side, side), (side, 9), (9, side)] if side == 0 else [(side, side)]:
        file.write_bytes(LIARS[suffix](*size))
        with pytest.raises(ImageError) as caught:
            decode(file)
        if side == 60_000 and suffix != "webp":  # whose reader looks further first
            assert "more than 89478485 pixels" in str(caught.value)


def _peak_of(files: list[Path], told) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for file in files:
        square(file)
    told.put(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)


def test_memory_for_lying_headers_and_damaged_files_is_bounded(corpus, tmp_path):
    files = [file for kind in corpus.values() for file in kind]
    for suffix, lie in LIARS.items():
        for side in (9000, 16_000):
            files.append(tmp_path / f"{side}.{suffix}")
            files[-1].write_bytes(lie(side, side))
    context = get_context("fork")
    told = context.Queue()
    with warnings.catch_warnings():  # of Python 3.12 and later, about threads and forking
        warnings.simplefilter("ignore")
        process = context.Process(target=_peak_of, args=(files, told))
        process.start()
    growth = told.get(timeout=120)
    process.join()
    assert growth < 3 * 9000 * 9000 / 1024 + 100_000  # KiB: the largest picture allowed, once


# Odd shapes, modes, names and places


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif", "bmp", "gif"])
def test_pixels_strips_and_bands_become_squares(tmp_path, suffix):
    long = 16_383 if suffix == "webp" else 20_000  # WebP's end
    for size in [(1, 1), (1, 300), (300, 1), (long, 1), (1, long), (long, 30)]:
        Image.new("RGB", size, (0, 0, 0)).save(tmp_path / f"a.{suffix}")
        assert square(tmp_path / f"a.{suffix}").unique().tolist() == [0]


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBX", "RGBA", "CMYK", "YCbCr", "I;16"])
def test_every_mode_that_a_tiff_can_have_becomes_the_same_picture(tmp_path, mode):
    """Of a picture in black and white, since every mode can say that."""
    black_and_white = np.zeros((40, 30, 3), np.uint8)
    black_and_white[10:25, 5:20] = 255
    image = Image.fromarray(black_and_white)
    if mode == "I;16":
        image = Image.fromarray(black_and_white[..., 0].astype(np.uint16) * 257)
    elif mode == "PA":
        image = image.quantize(2).convert("PA")
    elif mode != "RGB":
        image = image.convert(mode)
    image.save(tmp_path / "a.tif")
    with Image.open(tmp_path / "a.tif") as saved:
        assert saved.mode.startswith(mode.rstrip("X"))
    assert abs(np.asarray(decode(tmp_path / "a.tif")).astype(int) - black_and_white).max() <= 2


ODD_NAMES = [
    b" leading and trailing .png",
    b"new\nline\r.png",
    b"caf\xe9-not-utf8.png",
    b"back\\slash\"quote'*?[1]$HOME.png",
    b"-option.png",
    b"@list.png",
    "\u202egnp.tfel-ot-thgir \U0001f408.png".encode(),
    b"x" * 251 + b".png",
]


@pytest.mark.parametrize("through", ["folder", "names"])
def test_odd_names_keep_their_rows(oxford, tmp_path, monkeypatch, through):
    folder = tmp_path / "odd"
    folder.mkdir()
    monkeypatch.chdir(folder)
    for name in ODD_NAMES:
        Image.new("RGB", (20, 30), "white").save(os.fsdecode(name))
    names = sorted(map(os.fsdecode, ODD_NAMES))
    options = Options(image_size=32, num_workers=1, batch_size=3)
    extract(
        folder if through == "folder" else names, oxford, ["conv2_2"], tmp_path / through, options=options
    )
    table = read_features(tmp_path / through)
    assert table["status"].to_pylist() == ["ok"] * len(names)
    expected = [os.fsencode(name).decode("utf-8", "backslashreplace") for name in names]
    assert table["path"].to_pylist() == expected


def test_what_is_not_a_file_is_never_opened(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "fifo.png")
    (tmp_path / "device.png").symlink_to("/dev/zero")
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "loop.png").symlink_to("loop.png")
    (tmp_path / "one.png").symlink_to("two.png")
    (tmp_path / "two.png").symlink_to("one.png")
    (tmp_path / "nothing.png").symlink_to("nowhere")
    images = ImageList(str(tmp_path), sorted(os.listdir(tmp_path)))
    monkeypatch.setattr("builtins.open", None)
    dataset = ImageDataset(images, PREPROCESS, Options())
    assert {row.path: row.error for row, _ in (dataset[i] for i in range(7))} == {
        "fifo.png": "not a regular file",
        "device.png": "not a regular file",
        "folder.png": "a folder",
        "loop.png": "OSError: Too many levels of symbolic links",
        "one.png": "OSError: Too many levels of symbolic links",
        "two.png": "OSError: Too many levels of symbolic links",
        "nothing.png": "link to a missing file",
    }
    assert [path for path in find_images(tmp_path).paths if path != "folder.png"] == [
        path for path in images.paths if path != "folder.png"
    ]


def test_files_may_vanish_and_grow_after_they_were_listed(folder):
    whole = (folder / "1.png").read_bytes()
    expected = square(folder / "1.png")
    (folder / "2.png").write_bytes(whole[:100])
    images = find_images(folder)
    (folder / "1.png").unlink()
    (folder / "2.png").write_bytes(whole)
    dataset = ImageDataset(images, PREPROCESS, Options())
    assert dataset[0] == (("1.png", "failed", "no such file", None, None), None)
    assert torch.equal(dataset[1][1], expected)


class Sleeper(ImageDataset):
    """Hangs in a file, as a decoder that never ends does."""

    def item(self, index, source):
        if self.images.paths[index] == "4.png":
            time.sleep(60)
        return super().item(index, source)


def test_a_file_that_hangs_its_worker_is_given_up(folder, monkeypatch, watchful_loader):
    monkeypatch.setattr(loading, "PATIENCE", 1)
    dataset = Sleeper(find_images(folder), PREPROCESS, Options())
    rows = [row for found, _ in load_batches(dataset, [range(4), range(4, 10)], 1) for row in found]
    assert [row.path for row in rows] == dataset.images.paths
    assert [(row.path, row.error) for row in rows if row.error] == [("4.png", "took more than 1 s")]


def test_truncated_large_jpegs_fail_at_any_scale(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (600, 900, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "a.jpg")
    content = (tmp_path / "a.jpg").read_bytes()
    (tmp_path / "a.jpg").write_bytes(content[: len(content) * 9 // 10])
    for enough in (None, 300, 75):
        with pytest.raises(ImageError, match="truncated"):
            read(tmp_path / "a.jpg", enough=enough)


# Any mixture of files


BYTES = (PHOTOGRAPHS / "cat.jpg").read_bytes()
CONTENTS = st.one_of(
    st.just(BYTES),
    st.binary(max_size=300),
    st.integers(0, len(BYTES) - 1).map(lambda cut: BYTES[:cut]),
    st.sampled_from(
        [b"\x89PNG\r\n\x1a\n", b"II*\0", b"GIF89a", b"BM", b"RIFF\0\0\0\0WEBP", b"\xff\xd8"]
    ).flatmap(lambda magic: st.binary(max_size=200).map(lambda rest: magic + rest)),
)
NAMES = st.binary(min_size=1, max_size=60).filter(lambda name: not set(name) & {0, ord("/")})
SUFFIXES = st.sampled_from([suffix.encode() for suffixes in FORMATS.values() for suffix in suffixes])


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    files=st.dictionaries(st.tuples(NAMES, SUFFIXES).map(b"".join), CONTENTS, min_size=1, max_size=8),
    batch_size=st.integers(1, 5),
    part_size=st.integers(1, 5),
)
def test_any_folder_gives_its_files_rows_in_order(oxford, tmp_path_factory, files, batch_size, part_size):
    folder = tmp_path_factory.mktemp("any")
    for name, content in files.items():
        Path(folder, os.fsdecode(name)).write_bytes(content)
    options = Options(image_size=32, num_workers=0, batch_size=batch_size, part_size=part_size)
    summary = extract(folder, oxford, ["conv2_2"], folder / "features", options=options)
    rows = read_features(folder / "features").to_pylist()
    names = sorted(map(os.fsdecode, files))
    assert [row["path"] for row in rows] == [
        os.fsencode(name).decode("utf-8", "backslashreplace") for name in names
    ]
    assert summary.failed == sum(row["status"] == "failed" for row in rows)
    good = [row for row, name in zip(rows, names, strict=True) if files[os.fsencode(name)] == BYTES]
    for row in good:
        assert row["status"] == "ok"
        assert row["conv2_2"] == pytest.approx(good[0]["conv2_2"], rel=1e-4, abs=1e-3)
    for row in rows:
        assert (row["conv2_2"] is None) == (row["status"] == "failed") == bool(row["error"])
