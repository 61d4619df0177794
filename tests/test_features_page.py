import base64
import io
import json
import os
import re
import shutil
import sys

import numpy as np
import pytest
from pages import parse, rows_of, section, text_of
from PIL import Image

from vggenc import Options, StoreError, UsageError, extract
from vggenc.features_page import SAMPLE, features_page
from vggenc.images import Row
from vggenc.store import Store

SCRIPT, QUOTES = "<script>alert(1)<", 'it\'s "quoted" & more.png'
KINDS = {"blue": (20, 40, 220), "stripes": (230, 210, 60)}
TWELVE = 12


def draw(kind: str, rng) -> Image.Image:
    pixels = np.full((48, 64, 3), KINDS[kind], np.uint8)
    if kind == "stripes":
        pixels[::6] = pixels[1::6] = 0
    noise = rng.integers(-12, 13, pixels.shape)
    return Image.fromarray(np.clip(pixels + noise, 0, 255).astype(np.uint8))


def make_features(folder, encoder, **options):
    """Two kinds of pictures in folders named after them, hostile names among them, and what is no picture."""
    rng = np.random.default_rng(0)
    root = folder / "pictures"
    for kind in KINDS:
        (root / kind).mkdir(parents=True)
        for i in range(TWELVE):
            draw(kind, rng).save(root / kind / f"{i:02}.png")
    (root / "blue" / SCRIPT).mkdir()
    draw("blue", rng).save(root / "blue" / SCRIPT / "script>.png")
    draw("blue", rng).save(root / "blue" / QUOTES)
    draw("blue", rng).save(os.fsencode(root / "blue") + b"/caf\xe9.png")
    (root / "empty.png").write_bytes(b"")
    (root / "<b>text.jpg").write_text("not a picture")
    given = Options(image_size=32, num_workers=0, **options)
    extract(root, encoder, ["conv3_4", "conv2_2"], folder / "features", options=given)
    return folder / "features"


@pytest.fixture(scope="module")
def made(tmp_path_factory, oxford):
    return make_features(tmp_path_factory.mktemp("page"), oxford, part_size=10)


@pytest.fixture
def features(made, tmp_path):
    """A copy that a test may change."""
    shutil.copytree(made.parent, tmp_path / "copy", symlinks=True)
    manifest = tmp_path / "copy" / "features" / "manifest.json"
    manifest.write_text(manifest.read_text().replace(str(made.parent), str(tmp_path / "copy")))
    return tmp_path / "copy" / "features"


def test_failures_stand_in_a_table_with_their_reasons(made):
    page = parse(features_page(made))
    assert rows_of(section(page, "failures")) == [
        ["<b>text.jpg", "not an image in a format that is read"],
        ["empty.png", "empty file"],
    ]
    assert text_of(page.find(".//header/p")) == "29 images, 2 of them failed."
    summary = text_of(section(page, "summary"))
    for said in ("torch, fp32", "OXFORD_V1 (vgg19)", "conv3_4 (256)", "32 x 32 pixels", "torchvision "):
        assert said in summary


def test_hostile_names_are_text_in_tables_tooltips_and_descriptions(made):
    text = features_page(made)
    page = parse(text)
    assert len(list(page.iter("script"))) == 1
    paths = {row[1] for row in rows_of(section(page, "rows"))}
    assert {f"blue/{SCRIPT}/script>.png", f"blue/{QUOTES}", "blue/caf\\xe9.png", "<b>text.jpg"} <= paths
    titles = {text_of(title) for title in section(page, "map").iter("title")}
    assert {f"blue/{SCRIPT}/script>.png", f"blue/{QUOTES}"} <= titles
    assert not list(page.iter("b"))


def test_two_kinds_of_images_lie_apart_on_the_map_and_in_clusters(made):
    page = parse(features_page(made))
    places: dict[str, list[tuple[float, float]]] = {kind: [] for kind in KINDS}
    for dot in section(page, "map").iter("circle"):
        if (title := dot.find("title")) is not None:
            places[text_of(title).split("/")[0]].append((float(dot.get("cx")), float(dot.get("cy"))))
    assert [len(each) for each in places.values()] == [TWELVE + 3, TWELVE]
    first, second = (np.array(each) for each in places.values())
    apart = np.linalg.norm(first[:, None] - second, axis=2).min()
    assert apart > max(
        np.linalg.norm(np.diff(np.sort(each, 0), axis=0), axis=1).max() for each in (first, second)
    )
    names = [text_of(note) for note in section(page, "clusters").iter("p")][1:]
    assert len(names) >= 2
    assert all(re.fullmatch(r"(blue|stripes) \(\d+\)", name) for name in names)
    clusters = {row[1].split("/")[0]: set() for row in rows_of(section(page, "rows")) if row[2] == "ok"}
    for row in rows_of(section(page, "rows")):
        if row[2] == "ok":
            clusters[row[1].split("/")[0]].add(row[5])
    assert not clusters["blue"] & clusters["stripes"]


def test_points_lead_to_the_rows_of_their_images(made):
    page = parse(features_page(made))
    rows = {row.get("id"): text_of(list(row)[1]) for row in section(page, "rows").iter("tr")}
    links = [
        (link.get("href"), text_of(title))
        for link in section(page, "map").iter("a")
        for title in link.iter("title")
    ]
    assert len(links) == 27
    assert all(rows[href.removeprefix("#")] == path for href, path in links)


def test_thumbnails_are_the_images_themselves(made):
    page = parse(features_page(made))
    tiles = list(section(page, "clusters").iter("img"))
    assert len(tiles) > 10
    assert any(tile.get("alt") == "blue/caf\\xe9.png" for tile in tiles)
    for tile in tiles:
        kind, data = tile.get("src").split(",")
        assert kind == "data:image/jpeg;base64"
        with Image.open(io.BytesIO(base64.b64decode(data))) as picture:
            assert picture.size == (128, 128)
            found = np.asarray(picture).mean((0, 1))
        blue = np.abs(found - KINDS["blue"]).max() < 10
        assert blue == tile.get("alt").startswith("blue/")


def test_an_image_that_has_moved_away_is_a_tile_that_says_so(features):
    shutil.rmtree(features.parent / "pictures" / "stripes")
    page = parse(features_page(features))
    gone = [tile for tile in page.iter("div") if tile.get("class") == "missing"]
    assert gone
    assert all(text_of(tile) == "can't be shown: no such file" for tile in gone)
    assert all(tile.get("aria-label").startswith("stripes/") for tile in gone)


def test_the_same_folder_gives_the_same_bytes(features):
    assert features_page(features) == features_page(features)


def test_a_page_refers_to_nothing_outside_itself(made):
    text = features_page(made)
    assert not re.search(r"https?://|@import|url\(", text)
    for element in parse(text).iter():
        for name in ("src", "href"):
            assert element.get(name, "#").startswith(("data:", "#"))


def test_an_unfinished_folder_gives_a_page_of_what_is_there(features):
    (features / "part-00002.parquet").unlink()
    page = parse(features_page(features))
    said = "20 images, 2 of them failed; the run isn't finished, 9 more are to come."
    assert text_of(page.find(".//header/p")) == said
    assert len(rows_of(section(page, "rows"))) == 20
    for part in features.glob("*.parquet"):
        part.unlink()
    with pytest.raises(StoreError, match="no finished part yet"):
        features_page(features)


def test_the_deepest_output_is_taken_unless_another_is_named(made):
    assert "by their conv3_4 features" in features_page(made)
    assert "by their conv2_2 features" in features_page(made, by="conv2_2")
    with pytest.raises(UsageError, match=r"must be one of conv3_4, conv2_2; got 'fc7'"):
        features_page(made, by="fc7")


def test_whole_maps_give_a_page_without_a_map(oxford, folder, tmp_path):
    options = Options(image_size=32, num_workers=0, pool="none")
    extract(folder, oxford, ["conv2_2"], tmp_path / "f", options=options)
    page = parse(features_page(tmp_path / "f"))
    assert "the folder holds whole maps only" in text_of(section(page, "map"))
    assert len(rows_of(section(page, "rows"))) == 10


@pytest.mark.parametrize("copies", [1, 2, 30])
def test_images_that_are_all_the_same_are_one_cluster_at_one_place(copies, oxford, tmp_path):
    for i in range(copies):
        Image.new("RGB", (40, 40), "red").save(tmp_path / f"{i}.png")
    extract(tmp_path, oxford, ["conv2_2"], tmp_path / "f", options=Options(image_size=32, num_workers=0))
    page = parse(features_page(tmp_path / "f"))
    assert text_of(section(page, "clusters").find("h3")) == f"Cluster 1: {copies} images"
    dots = [dot for dot in section(page, "map").iter("circle") if dot.find("title") is not None]
    assert {(dot.get("cx"), dot.get("cy")) for dot in dots} == {("300.0", "200.0")}


def test_failures_alone_give_a_page(oxford, tmp_path):
    (tmp_path / "a.png").write_bytes(b"")
    extract(tmp_path, oxford, ["conv2_2"], tmp_path / "f", options=Options(image_size=32, num_workers=0))
    page = parse(features_page(tmp_path / "f"))
    assert "no row is ok" in text_of(section(page, "map"))
    assert rows_of(section(page, "failures")) == [["a.png", "empty file"]]


def write_many(folder, like, count, *, failed=0):
    """A features folder of random vectors; its images aren't there."""
    settings = json.loads((like / "manifest.json").read_text())["settings"]
    rng = np.random.default_rng(0)
    names = ["ok"] * (count - failed) + ["failed"] * failed
    rows = [
        Row(f"{i % 30:02}/{i:06}.jpg", status, None if status == "ok" else "gone", 640, 480)
        for i, status in enumerate(names)
    ]
    store = Store(
        folder,
        settings={**settings, "outputs": {"conv3_4": [256]}},
        root="/nowhere",
        inputs="0",
        vectors={"conv3_4": 256},
        rows=count,
        part_size=count,
        dtype="float32",
    )
    with store:
        middles = rng.random((30, 256))
        values = middles[np.arange(count) % 30] + 0.1 * rng.random((count, 256))
        store.writer.write(0, rows, {"conv3_4": values.astype(np.float32)})
    return folder


def test_many_rows_are_sampled_and_the_page_says_so(made, tmp_path, monkeypatch):
    monkeypatch.setattr("vggenc.features_page.SAMPLE", 300)
    page = parse(features_page(write_many(tmp_path / "f", made, 1000, failed=400)))
    assert SAMPLE >= 1000
    assert len(rows_of(section(page, "rows"))) == 300
    assert "300 rows, spread evenly, stand for all" in text_of(page.find(".//header/p"))
    assert "300 of 1,000 rows, spread evenly" in text_of(section(page, "rows"))
    assert len(rows_of(section(page, "failures"))) == 300
    assert "The first 300; 100 more failed." in text_of(section(page, "failures"))
    legend = [text_of(button) for button in section(page, "map").iter("button")]
    groups = {row[1].split("/")[0] for row in rows_of(section(page, "rows")) if row[2] == "ok"}
    assert len(groups) > 15
    assert legend[-1].startswith(f"others ({len(groups) - 11} folders)")


# The command line


def test_the_command_writes_a_page_and_leaves_nothing_else(vggenc, features, tmp_path):
    result = vggenc("report", features, "--html", tmp_path / "page.html", "--by", "conv2_2", "--json")
    assert (result.returncode, result.stderr) == (0, "")
    assert json.loads(result.stdout)["of"] == "features"
    assert (tmp_path / "page.html").read_text() == features_page(features, by="conv2_2")
    assert {file.name for file in tmp_path.iterdir()} == {"copy", "page.html"}


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--html", "nowhere/page.html"], "nowhere/page.html can't be written"),
        (["--html", "."], ". can't be written: it must be a file"),
        (["--html", "page.html", "--by", "fc7"], "must be one of conv3_4, conv2_2; got 'fc7'"),
        (["--html", "page.html", "--data", "toy"], "--data and --images are for a run"),
    ],
)
def test_what_cannot_be_meant_is_told(vggenc, made, tmp_path, monkeypatch, options, told):
    monkeypatch.chdir(tmp_path)
    result = vggenc("report", made, *options)
    assert result.returncode == 2
    assert told in result.stderr
    assert not list(tmp_path.iterdir())


def test_what_is_neither_features_nor_a_run_is_told_with_both(vggenc, tmp_path):
    result = vggenc("report", tmp_path, "--html", tmp_path / "page.html")
    assert result.returncode == 2
    assert (
        "neither a features folder of 'vggenc extract' (it has no manifest.json) nor a run" in result.stderr
    )


def test_a_missing_extra_is_told(vggenc, made, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    result = vggenc("report", made, "--html", tmp_path / "page.html")
    assert result.returncode == 2
    assert "pictures need their extra: pip install 'vggenc[viz]'" in result.stderr
