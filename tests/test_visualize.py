import os
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import PHOTOGRAPHS, Terminal
from PIL import Image

from vggenc import Options, UsageError, VGG19Encoder, sheets, visualize
from vggenc.stages import STAGE_NAMES
from vggenc.visualize import attention_sheet, show

SMALL = Options(image_size=64, num_workers=0)


@pytest.fixture
def drawn(monkeypatch) -> list[list[list[sheets.Panel]]]:
    """The rows of panels of each sheet, as they are handed to what draws them."""
    found: list[list[list[sheets.Panel]]] = []
    draw = sheets.draw

    def record(rows, **options):
        found.append(rows)
        return draw(rows, **options)

    monkeypatch.setattr(sheets, "draw", record)
    return found


def bright(corner: tuple[int, int]) -> Image.Image:
    """Noise in a small square on the colour that the network sees as 0, also beyond the edges."""
    image = Image.new("RGB", (146, 146), (124, 117, 104))
    noise = np.random.default_rng(0).integers(0, 256, (40, 40, 3)).astype(np.uint8)
    image.paste(Image.fromarray(noise), corner)
    return image


def peak(image: Image.Image) -> tuple[float, float]:
    """Where a heat map is brightest: x and y as shares of its sides, the middle of its top thousandth."""
    values = np.asarray(image.convert("L"), float)
    ys, xs = np.nonzero(values >= np.quantile(values, 0.999))
    return float(xs.mean()) / values.shape[1], float(ys.mean()) / values.shape[0]


@pytest.mark.parametrize("corner", [(12, 12), (92, 12), (12, 92), (92, 92)])
def test_heat_maps_peak_where_the_input_is_bright(oxford, drawn, tmp_path, corner):
    bright(corner).save(tmp_path / "a.png")
    list(show(tmp_path / "a.png", oxford, tmp_path / "sheets", options=replace(SMALL, image_size=128)))
    for row in drawn[0][1:]:
        for panel in row[1:]:
            assert (np.round(peak(panel.image)) == np.array(corner) // 92).all(), panel.lines


def test_the_strongest_channels_are_those_with_the_largest_values(oxford, drawn, tmp_path):
    list(show(PHOTOGRAPHS / "cat.jpg", oxford, tmp_path, options=SMALL))
    image = oxford.preprocess.at(64)(Image.open(PHOTOGRAPHS / "cat.jpg"))
    with torch.no_grad():
        maps = oxford.encode(image[None])
    for column, name in enumerate(STAGE_NAMES, 1):
        expected = maps[name].amax((0, 2, 3)).topk(3).indices.tolist()
        assert [row[column].lines[0] for row in drawn[0][1:]] == [f"{name}, channel {i}" for i in expected]


def test_the_same_place_has_the_same_colour_in_all_images(oxford, drawn, tmp_path):
    """One PCA over all images: a picture shown twice has one colouring, and another beside a third one."""
    paths = [PHOTOGRAPHS / f"{name}.jpg" for name in ("cat", "flower")]
    for i in (1, 2):
        (tmp_path / f"cat{i}.jpg").symlink_to(paths[0])
    list(
        show([tmp_path / "cat1.jpg", paths[1], tmp_path / "cat2.jpg"], oxford, tmp_path / "a", options=SMALL)
    )
    list(show(paths[0], oxford, tmp_path / "b", options=SMALL))
    one, _, two, alone = ([panel.image.tobytes() for panel in rows[0][1:]] for rows in drawn)
    assert one == two
    assert one != alone


def test_colours_are_principal_components_as_scikit_learn_finds_them():
    from sklearn.decomposition import PCA

    rng = np.random.default_rng(0)
    maps = rng.normal(0, np.arange(1, 9)[:, None, None], (8, 30, 20)).astype(np.float32)
    components = visualize._Components()
    components.add(maps[:, :10])
    components.add(maps[:, 10:])
    pca = PCA(3, whiten=True).fit(maps.reshape(8, -1).T)
    expected = pca.transform(maps.reshape(8, -1).T).reshape(30, 20, 3) / 5 + 0.5
    found = np.asarray(components.colours(maps), float) / 255
    inside = (expected > 0.02) & (expected < 0.98)
    for i in range(3):
        pairs = np.stack([found[..., i], expected[..., i]])[:, inside[..., i]]
        assert min(abs(pairs[0] - pairs[1]).max(), abs(1 - pairs[0] - pairs[1]).max()) < 0.01


def test_the_same_input_gives_the_same_bytes(oxford, tmp_path):
    for name in ("a", "b"):
        list(show(PHOTOGRAPHS / "cat.jpg", oxford, tmp_path / name, options=SMALL))
    assert (tmp_path / "a" / "cat.jpg.png").read_bytes() == (tmp_path / "b" / "cat.jpg.png").read_bytes()


@pytest.mark.parametrize("size", [(900, 30), (30, 900), (3, 2)])
def test_wide_tall_and_tiny_pictures_make_sheets_of_one_size(oxford, tmp_path, size):
    Image.effect_noise(size, 80).save(tmp_path / "odd.png")
    Image.effect_noise((64, 64), 80).save(tmp_path / "even.png")
    files = [sheet.file for sheet in show(tmp_path, oxford, tmp_path / "sheets", options=SMALL)]
    with Image.open(files[0]) as one, Image.open(files[1]) as two:
        assert one.size == two.size


def test_a_failed_image_has_a_reason_and_no_sheet(oxford, folder, tmp_path):
    (folder / "deep" / "0.png").write_bytes(b"")
    found = list(show(folder / "deep", oxford, tmp_path / "s", options=SMALL))
    assert [(sheet.path, sheet.error) for sheet in found][:2] == [("0.png", "empty file"), ("3.png", None)]
    assert sorted(file.name for file in (tmp_path / "s").iterdir()) == ["3.png.png", "6.png.png", "9.png.png"]


@torch.no_grad()
def test_attributes_come_from_the_cells_that_their_weights_look_at(drawn):
    """Heads by hand: attribute 2 is predicted largest, and stage 1 sees it in one cell of the grid alone."""
    encoder = VGG19Encoder(3, weights="OXFORD_V1")
    for i in range(4):
        getattr(encoder, f"extract_{i}")[-1].weight.zero_()
        getattr(encoder, f"fc{i}").weight.zero_()
    encoder.extract_1[-1].weight[2] = 1e-3  # counts activity
    cell = 3 * 14 + 10  # row 3, column 10
    encoder.fc1.weight[0, cell] = 1.0
    encoder.bn1.weight.zero_()
    encoder.bn1.bias.copy_(torch.tensor([1.0, 1.0, 5.0]))
    encoder.mark_trained()
    picture = Image.open(PHOTOGRAPHS / "cat.jpg")
    attention_sheet(picture, encoder, ["furry", "striped", "tame"])
    top = drawn[0][0]
    assert [row[0].lines[0] for row in drawn[0]] == ["tame", "furry", "striped"]
    x, y = peak(top[2].image)
    assert (int(x * 14), int(y * 14)) == (10, 3)
    image = encoder.preprocess(picture)[None]
    attention = encoder.eval().encode(image, ["attention"])["attention"][0, :, 2]
    assert [panel.lines[1] for panel in top[1:]] == [f"attention {value:.2g}" for value in attention.tolist()]


def test_names_of_any_length_and_bytes_have_sheets_of_their_own(oxford, tmp_path):
    names = [b"\xff.png", b"a" * 251 + b".png", b"a" * 250 + b"b.png", b"new\nline.png"]
    for name in names:
        Image.effect_noise((32, 32), 80).save(tmp_path / "one.png")
        os.rename(tmp_path / "one.png", os.fsencode(tmp_path) + b"/" + name)
    sheets = list(show(tmp_path, oxford, tmp_path / "s", options=replace(SMALL, image_size=32)))
    assert len({sheet.file for sheet in sheets if sheet.file.is_file()}) == 4


def test_a_terminal_sees_both_passes_over_the_images(oxford, monkeypatch, folder, tmp_path):
    monkeypatch.setattr(sys, "stderr", Terminal())
    list(show(folder / "deep", oxford, tmp_path / "s", options=SMALL, progress=True))
    for part in ("100%", "8/8", "img/s", "failed=0"):
        assert part in sys.stderr.getvalue()


def test_names_that_do_not_fit_and_untrained_heads_are_usage_errors(oxford):
    with pytest.raises(UsageError, match="attributes; got 2 names"):
        list(show(PHOTOGRAPHS, oxford, "sheets", names=["a", "b"]))
    with pytest.raises(UsageError, match="is a file, not a folder"):
        list(show(PHOTOGRAPHS, oxford, PHOTOGRAPHS / "cat.jpg"))
    with pytest.raises(UsageError, match="never trained"):
        attention_sheet(Image.new("RGB", (64, 64)), oxford)


def test_long_names_are_shortened_to_their_panel():
    font = sheets._font(13)
    short = sheets._shorten("a" * 80 + "\n.png", font, 180)
    assert font.getlength(short) <= 180
    assert short.startswith("aaa")
    assert short.endswith("?.png")


def test_the_command_writes_a_sheet_for_each_image_and_tells_failures(vggenc, folder, tmp_path):
    (folder / "1.png").write_bytes(b"")
    options = ["--weights", "OXFORD_V1", "--image-size", 32, "--num-workers", 0]
    result = vggenc("show", folder / "1.png", folder / "2.png", "--output", tmp_path / "s", *options)
    assert result.returncode == 3
    assert result.stdout == f"{tmp_path}/s/2.png.png\n"
    assert result.stderr == "1.png: empty file\n1 of 2 images failed\n"
    (tmp_path / "names.txt").write_text("1 black\n2 white\n")
    result = vggenc(
        "show", folder / "2.png", "--output", tmp_path / "s", "--names", tmp_path / "names.txt", *options
    )
    assert (result.returncode, result.stderr) == (2, "error: the encoder has 85 attributes; got 2 names\n")
