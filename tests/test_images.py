import io
import os
import stat

import numpy as np
import pytest
import torch
from conftest import PHOTOGRAPHS
from PIL import Image, ImageCms
from torchvision.models import VGG19_BN_Weights

from vggenc import ImageError, Options
from vggenc.images import ImageDataset, decode, read
from vggenc.inputs import find_images
from vggenc.weights import REGISTRY

PREPROCESS = REGISTRY[0].preprocess
rng = np.random.default_rng(0)
NOISE = rng.integers(0, 256, (30, 20, 3), dtype=np.uint8)


def pixels(image: Image.Image) -> np.ndarray:
    assert image.mode == "RGB"
    return np.asarray(image).astype(int)


def test_plain_picture_keeps_its_pixels(tmp_path):
    Image.fromarray(NOISE).save(tmp_path / "a.png")
    assert (pixels(decode(tmp_path / "a.png")) == NOISE).all()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(tmp_path, orientation):
    # What a viewer shows for each value of tag 0x0112 (EXIF 2.32, 4.6.4), as index arithmetic.
    upright = {
        1: NOISE,
        2: NOISE[:, ::-1],
        3: NOISE[::-1, ::-1],
        4: NOISE[::-1],
        5: NOISE.swapaxes(0, 1),
        6: NOISE[::-1].swapaxes(0, 1),
        7: NOISE[::-1, ::-1].swapaxes(0, 1),
        8: NOISE[:, ::-1].swapaxes(0, 1),
    }
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(NOISE).save(tmp_path / "a.png", exif=exif)
    assert (pixels(decode(tmp_path / "a.png")) == upright[orientation]).all()


def test_transparency_lies_on_white(tmp_path):
    alpha = rng.integers(0, 256, (30, 20), dtype=np.uint8)
    Image.fromarray(np.dstack([NOISE, alpha])).save(tmp_path / "rgba.png")
    share = alpha[..., None] / 255
    expected = NOISE * share + 255 * (1 - share)
    assert abs(pixels(decode(tmp_path / "rgba.png")) - expected).max() <= 1

    Image.fromarray(np.dstack([NOISE[..., 0], alpha])).save(tmp_path / "la.png")
    expected = NOISE[..., :1] * share + 255 * (1 - share)
    assert abs(pixels(decode(tmp_path / "la.png")) - expected).max() <= 1


def test_transparent_palette_and_grey_become_white_where_clear(tmp_path):
    indices = rng.integers(0, 4, (30, 20), dtype=np.uint8)
    colours = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255], [9, 9, 9]])
    image = Image.fromarray(indices, "L")
    palette = Image.new("P", image.size)
    palette.putdata(list(indices.reshape(-1)))
    palette.putpalette(colours.reshape(-1).tolist())
    palette.save(tmp_path / "p.png", transparency=2)
    expected = np.where(indices[..., None] == 2, 255, colours[indices])
    assert (pixels(decode(tmp_path / "p.png")) == expected).all()

    image.save(tmp_path / "l.png", transparency=3)
    expected = np.where(indices == 3, 255, indices)[..., None].repeat(3, 2)
    assert (pixels(decode(tmp_path / "l.png")) == expected).all()


def test_sixteen_bit_grey_keeps_its_upper_byte(tmp_path):
    wide = rng.integers(0, 2**16, (30, 20)).astype(np.uint16)
    for name in ("a.png", "a.tif"):
        Image.fromarray(wide).save(tmp_path / name)
        assert (pixels(decode(tmp_path / name)) == (wide // 256)[..., None]).all()


def test_bilevel_grey_and_animated_pictures(tmp_path):
    grey = NOISE[..., 0]
    Image.fromarray(grey).save(tmp_path / "l.png")
    assert (pixels(decode(tmp_path / "l.png")) == grey[..., None]).all()
    Image.fromarray(grey > 128).save(tmp_path / "1.png")
    assert (pixels(decode(tmp_path / "1.png")) == (grey > 128)[..., None] * 255).all()
    frames = [Image.new("RGB", (20, 30), colour) for colour in ("red", "blue", "green")]
    for name in ("a.gif", "a.webp", "a.png", "a.tif"):
        lossless = {"lossless": True} if name == "a.webp" else {}
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:], **lossless)
        assert (pixels(decode(tmp_path / name)) == [255, 0, 0]).all()


def test_cmyk_jpeg_becomes_rgb(tmp_path):
    Image.new("CMYK", (16, 16), (0, 255, 255, 0)).save(tmp_path / "red.jpg", quality=100)
    assert abs(pixels(decode(tmp_path / "red.jpg")) - [255, 0, 0]).max() <= 3


def test_colour_profile_does_not_change_the_numbers(tmp_path):
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    Image.fromarray(NOISE).save(tmp_path / "a.png", icc_profile=profile)
    assert (pixels(decode(tmp_path / "a.png")) == NOISE).all()


def write_truncated(file):
    buffer = io.BytesIO()
    Image.fromarray(NOISE).resize((200, 200)).save(buffer, "JPEG")
    file.write_bytes(buffer.getvalue()[: len(buffer.getvalue()) // 2])


BROKEN = {
    "empty.jpg": (lambda file: file.write_bytes(b""), "empty file"),
    "text.jpg": (lambda file: file.write_text("this is text"), "not an image"),
    "truncated.jpg": (write_truncated, "truncated"),
    "dangling.jpg": (lambda file: file.symlink_to("nothing"), "link to a missing file"),
    "folder.jpg": (lambda file: file.mkdir(), "a folder"),
    "fifo.jpg": (os.mkfifo, "not a regular file"),
    "program.png": (
        lambda file: file.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"),
        "not an image",
    ),
    "float.tif": (lambda file: Image.new("F", (9, 9), 0.5).save(file), "no defined range"),
    "wide.tif": (lambda file: Image.new("I", (9, 9), 2**20).save(file), "no defined range"),
    "missing.jpg": (lambda file: None, "no such file"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_no_picture_is_an_image_error_with_a_reason(tmp_path, name):
    write, reason = BROKEN[name]
    write(tmp_path / name)
    with pytest.raises(ImageError, match=reason):
        decode(tmp_path / name)


def test_pixel_limit_is_checked_before_decoding_and_leaves_pillows_alone(tmp_path):
    Image.fromarray(NOISE).save(tmp_path / "a.png")
    before = Image.MAX_IMAGE_PIXELS
    for limit in (599, 10):  # Pillow warns above its limit and raises above twice the limit
        with pytest.raises(ImageError, match=f"more than {limit} pixels"):
            decode(tmp_path / "a.png", max_pixels=limit)
    assert decode(tmp_path / "a.png", max_pixels=600).size == (20, 30)
    assert before == Image.MAX_IMAGE_PIXELS == 89_478_485


def test_unreadable_file_is_an_image_error(tmp_path, monkeypatch):
    Image.fromarray(NOISE).save(tmp_path / "a.png")

    def refuse(*_args):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("builtins.open", refuse)  # the superuser may read everything, so no mode serves
    with pytest.raises(ImageError, match="Permission denied"):
        decode(tmp_path / "a.png")


# Preprocessing


@pytest.mark.parametrize("file", sorted(PHOTOGRAPHS.glob("*.*g")), ids=lambda file: file.name)
def test_preprocess_equals_torchvisions_preset_exactly(file):
    image = decode(file)
    expected = VGG19_BN_Weights.IMAGENET1K_V1.transforms()(image)
    assert torch.equal(PREPROCESS(image), expected)


def test_image_size_scales_resize_and_crop():
    image = decode(PHOTOGRAPHS / "cat.jpg")
    expected = VGG19_BN_Weights.IMAGENET1K_V1.transforms(crop_size=112, resize_size=128)(image)
    assert torch.equal(PREPROCESS.at(112)(image), expected)
    assert PREPROCESS.at(None) is PREPROCESS


@pytest.mark.parametrize("size", [(1, 1), (1, 20_000), (20_000, 3), (40, 25)])
def test_extreme_shapes_give_the_square_of_their_middle(size):
    image = Image.new("RGB", size, (10, 200, 30))
    square = PREPROCESS.square(image)
    assert square.shape == (3, 224, 224)
    assert (square.permute(1, 2, 0).numpy() == [10, 200, 30]).all()


def test_dataset_gives_a_row_for_every_file_and_no_picture_for_failed_ones(tmp_path):
    Image.fromarray(NOISE).save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(b"")
    dataset = ImageDataset(find_images(tmp_path), PREPROCESS, Options())
    row, square = dataset[0]
    assert (*row,) == ("a.png", "ok", None, 20, 30)
    assert square.dtype == torch.uint8
    assert torch.equal(PREPROCESS.normalize(square), PREPROCESS(Image.fromarray(NOISE)))
    assert dataset[1] == (("b.png", "failed", "empty file", None, None), None)


def test_names_that_are_not_utf8_are_told_readably(tmp_path):
    name = os.fsdecode(b"caf\xe9 \n.png")
    Image.fromarray(NOISE).save(tmp_path / name)
    row, _ = ImageDataset(find_images(tmp_path), PREPROCESS, Options())[0]
    assert row.path == "caf\\xe9 \n.png"
    assert row.status == "ok"


def test_folder_that_cannot_be_listed_stands_in_the_list(folder, monkeypatch):
    real = os.scandir

    def refuse(path):
        if str(path).endswith("deep"):
            raise PermissionError(13, "Permission denied")
        return real(path)

    monkeypatch.setattr(os, "scandir", refuse)
    assert find_images(folder).paths[-1] == "deep"
    assert stat.S_ISDIR(os.stat(folder / "deep").st_mode)


# Large JPEGs


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A photograph of 12 megapixels: a sample enlarged, with the grain that a sensor has."""
    with Image.open(PHOTOGRAPHS / "cat.jpg") as image:
        pixels = np.asarray(image.convert("RGB").resize((4000, 3000), Image.Resampling.BICUBIC)).astype(int)
    grain = np.random.default_rng(0).normal(0, 6, pixels.shape)
    file = tmp_path_factory.mktemp("large") / "large.jpg"
    Image.fromarray(np.clip(pixels + grain, 0, 255).astype(np.uint8)).save(file, quality=90)
    return file


def test_large_jpegs_are_scaled_while_they_are_decoded_and_hardly_change(large):
    scaled = read(large, enough=512)
    assert scaled.image.size == (1000, 750)  # an eighth would be 375, less than 512
    assert (scaled.width, scaled.height) == (4000, 3000)
    full = PREPROCESS.square(decode(large)).float()
    found = PREPROCESS.square(scaled.image).float()
    assert (found - full).abs().mean() < 1  # of 255


def test_dataset_scales_large_jpegs_unless_told_otherwise(large):
    images = find_images(large)
    row, scaled = ImageDataset(images, PREPROCESS, Options())[0]
    exact_row, exact = ImageDataset(images, PREPROCESS, Options(full_decode=True))[0]
    assert row == exact_row
    assert (row.width, row.height) == (4000, 3000)
    assert torch.equal(exact, PREPROCESS.square(decode(large)))
    assert torch.equal(scaled, PREPROCESS.square(read(large, enough=512).image))
    assert not torch.equal(scaled, exact)


def test_size_of_a_scaled_and_turned_jpeg_is_that_of_the_upright_picture(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (1201, 601)).save(tmp_path / "a.jpg", exif=exif)
    found = read(tmp_path / "a.jpg", enough=100)
    assert (found.width, found.height) == (601, 1201)
    assert found.image.size == (151, 301)
