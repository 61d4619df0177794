import json
import shutil
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import PHOTOGRAPHS
from PIL import Image

from vggenc import ImageError, Options, UsageError, VGG19Encoder, extract, read_features, sheets
from vggenc import similar as similar_module
from vggenc.similar import contact_sheet, similar

SMALL = Options(image_size=64, num_workers=0, part_size=5)


@pytest.fixture
def features(oxford, tmp_path) -> str:
    """Two stages of the photographs, in parts of five."""
    extract(PHOTOGRAPHS, oxford, ["conv3_4", "conv5_4"], tmp_path / "f", options=SMALL)
    return str(tmp_path / "f")


@pytest.mark.parametrize("output", ["conv3_4", "conv5_4"])
def test_neighbours_are_those_of_all_cosines_by_hand(features, output):
    table = read_features(features)
    vectors = np.array(table[output].to_pylist(), np.float64)
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    cosines = unit @ unit[table["path"].to_pylist().index("cat.jpg")]
    order = np.argsort(-cosines)[:7]
    found = similar(PHOTOGRAPHS / "cat.jpg", features, by=output, top=7)
    assert [one.path for one in found] == [table["path"][int(i)].as_py() for i in order]
    np.testing.assert_allclose([one.cosine for one in found], cosines[order], rtol=1e-5)


def test_the_first_neighbour_of_an_image_of_the_folder_is_itself(features):
    for photograph in PHOTOGRAPHS.glob("*.[jp][pn]g"):
        assert similar(photograph, features, top=1)[0] == (photograph.name, pytest.approx(1, abs=1e-6))


def test_an_image_from_elsewhere_is_computed_as_the_folder_was(features, tmp_path):
    shutil.copy(PHOTOGRAPHS / "flower.jpg", tmp_path / "else.jpg")
    here = similar(PHOTOGRAPHS / "flower.jpg", features)
    there = similar(tmp_path / "else.jpg", features)
    assert [one.path for one in here] == [one.path for one in there]
    np.testing.assert_allclose([one.cosine for one in here], [one.cosine for one in there], atol=1e-5)


def test_failed_rows_are_no_neighbours(oxford, folder, tmp_path):
    (folder / "1.png").write_bytes(b"")
    extract(folder, oxford, output=tmp_path / "f", options=SMALL)
    found = similar(folder / "2.png", tmp_path / "f", top=50)
    assert len(found) == 9
    assert "1.png" not in {one.path for one in found}
    with pytest.raises(ImageError, match=r"1\.png: empty file"):
        similar(folder / "1.png", tmp_path / "f")


def test_many_rows_are_left_to_faiss_where_it_is_installed(features, monkeypatch):
    """A stand-in with the signature of faiss.knn, which isn't installed here."""
    asked = []

    def knn(queries, base, k, metric):
        asked.append((queries.shape, base.shape, k, metric))
        scores = queries @ base.T
        order = np.argsort(-scores, axis=1)[:, :k]
        return np.take_along_axis(scores, order, 1), order

    expected = similar(PHOTOGRAPHS / "cat.jpg", features, top=3)
    monkeypatch.setattr(similar_module, "_EXACT_IN_NUMPY", 11)
    monkeypatch.setitem(
        sys.modules, "faiss", SimpleNamespace(knn=knn, METRIC_INNER_PRODUCT=0, __spec__=object())
    )
    assert similar(PHOTOGRAPHS / "cat.jpg", features, top=3) == expected
    assert asked[-1] == ((1, 512), (2, 512), 2, 0)


def test_what_cannot_be_compared_is_a_usage_error(features, oxford, narrow, tmp_path):
    with pytest.raises(UsageError, match="by must be one of conv3_4, conv5_4; got 'conv2_2'"):
        similar(PHOTOGRAPHS / "cat.jpg", features, by="conv2_2")
    with pytest.raises(UsageError, match="top must be 1 or more"):
        similar(PHOTOGRAPHS / "cat.jpg", features, top=0)
    Image.new("RGB", (64, 64)).save(tmp_path / "else.png")
    changed = VGG19Encoder(2, weights="OXFORD_V1")
    changed.conv2_2[0].bias.data += 1
    changed.save_pretrained(tmp_path / "changed")
    with pytest.raises(UsageError, match="computed with other weights"):
        similar(tmp_path / "else.png", features, weights=str(tmp_path / "changed"))
    changed = VGG19Encoder.from_pretrained(tmp_path / "changed", k=2)
    extract(PHOTOGRAPHS / "cat.jpg", changed, output=tmp_path / "of-changed", options=SMALL)
    with pytest.raises(UsageError, match="'saved from OXFORD_V1'; name the file"):
        similar(tmp_path / "else.png", tmp_path / "of-changed")
    extract(
        PHOTOGRAPHS / "cat.jpg", oxford, output=tmp_path / "maps", options=Options(pool="none", image_size=64)
    )
    with pytest.raises(UsageError, match="whole maps only"):
        similar(PHOTOGRAPHS / "cat.jpg", tmp_path / "maps")


def test_the_contact_sheet_shows_the_query_then_the_neighbours(features, monkeypatch):
    rows = []
    monkeypatch.setattr(similar_module, "draw", lambda given: rows.extend(given) or sheets.draw(given))
    found = similar(PHOTOGRAPHS / "cat.jpg", features, top=7)
    sheet = contact_sheet(PHOTOGRAPHS / "cat.jpg", features, found)
    query, first, *others = (panel for row in rows for panel in row)
    assert query.image.tobytes() == first.image.tobytes()
    assert query.lines == ("query, cosines of conv5_4", "cat.jpg")
    assert [panel.lines[1] for panel in (first, *others)] == [one.path for one in found]
    assert sheet.width < 1000


def test_a_picture_that_has_moved_away_is_a_grey_square(oxford, folder, tmp_path):
    extract(folder, oxford, output=tmp_path / "f", options=SMALL)
    found = similar(folder / "2.png", tmp_path / "f", top=2)
    before = contact_sheet(folder / "2.png", tmp_path / "f", found)
    (folder / found[1].path).unlink()
    after = contact_sheet(folder / "2.png", tmp_path / "f", found)
    assert after.size == before.size
    assert after.tobytes() != before.tobytes()


def test_the_command_prints_a_table_and_writes_a_sheet(vggenc, features, tmp_path):
    sheet = tmp_path / "sheet.png"
    result = vggenc("similar", PHOTOGRAPHS / "cat.jpg", features, "--top", 3, "--sheet", sheet)
    assert (result.returncode, result.stderr) == (0, "")
    lines = result.stdout.splitlines()
    assert lines[0].split() == ["cosine", "of", "conv5_4", "path"]
    assert lines[1].split() == ["1.0000", "cat.jpg"]
    assert len(lines) == 4
    with Image.open(sheet) as image:
        assert image.format == "PNG"
    found = json.loads(vggenc("similar", PHOTOGRAPHS / "cat.jpg", features, "--json").stdout)
    assert len(found) == 12
    assert found[0]["path"] == "cat.jpg"
    result = vggenc("similar", PHOTOGRAPHS / "cat.jpg", tmp_path)
    assert result.returncode == 2
    assert "is no features folder" in result.stderr
