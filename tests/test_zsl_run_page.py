import json
import re
import shutil
from dataclasses import replace

import numpy as np
import pytest
from conftest import narrow as narrow_fixture
from pages import parse, rows_of, section, text_of
from test_zsl_training import RECIPE, SETUP

from vggenc import Options, UsageError
from vggenc.zsl import Predictions, load_data, make_report, make_toy, train
from vggenc.zsl import run_page as module
from vggenc.zsl.evaluation import confusion, margins
from vggenc.zsl.report import judge, load_encoder
from vggenc.zsl.run_page import SHEETS, run_page

QUICK = Options(num_workers=0)


def make_run(folder):
    """A toy set, and a run on it of an epoch."""
    make_toy(folder / "toy", images=4)
    with pytest.MonkeyPatch.context() as patch:
        narrow_fixture.__wrapped__(patch)
        data = load_data(folder / "toy")
        train(data, folder / "run", replace(RECIPE, epochs=1), replace(SETUP, heads_only=True))
    return folder / "run"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("run-page"))


@pytest.fixture
def sheets(monkeypatch):
    """The calls for attention sheets."""
    calls = []
    draw = module.attention_sheet

    def attention_sheet(*arguments, **options):
        calls.append((arguments, options))
        return draw(*arguments, **options)

    monkeypatch.setattr(module, "attention_sheet", attention_sheet)
    return calls


@pytest.fixture
def run(made, narrow, sheets, tmp_path):
    """A copy of the run that a test may change; the data set stays where it was in training."""
    shutil.copytree(made, tmp_path / "run")
    return tmp_path / "run"


def predictions_of(run, data):
    encoder, about = load_encoder(run, "cpu")
    return judge(run, encoder, about, data, QUICK)


def counted(predictions, data, images, classes):
    """A confusion matrix with nothing but loops."""
    counts = [[0] * len(classes) for _ in classes]
    for image in images:
        mine = predictions.attributes[image]
        scores = [
            float(mine @ data.attributes[i]) / np.linalg.norm(mine) / np.linalg.norm(data.attributes[i])
            for i in classes
        ]
        counts[list(classes).index(data.labels[image])][int(np.argmax(scores))] += 1
    return counts


def test_confusions_on_the_page_equal_a_count_by_hand(run, made):
    data = load_data(made.parent / "toy")
    predictions = predictions_of(run, data)
    part = section(parse(run_page(run, options=QUICK)), "confusions")
    everything = np.sort(np.concatenate([data.seen, data.unseen]))
    tested = np.concatenate([data.test_seen, data.test_unseen])
    settings = [(data.test_unseen, data.unseen), (tested, everything)]
    for i, (images, classes) in enumerate(settings):
        expected = counted(predictions, data, images, classes)
        assert rows_of(part, i) == [
            [data.classes[row], *(str(n) if n else "" for n in counts)]
            for row, counts in zip(classes, expected, strict=True)
        ]
        right = sum(expected[j][j] for j in range(len(classes)))
        assert text_of(list(part.iter("h3"))[i]).endswith(f": {right} of {len(images)} right")


def test_confusions_and_margins_of_known_predictions(data):
    own = data.attributes[data.labels].copy()
    first, second = data.unseen[:2]
    moved = data.test_unseen[data.labels[data.test_unseen] == first][:3]
    own[moved] = data.attributes[second]
    predictions = Predictions(own, own)
    classes, counts = confusion(data, predictions, "czsl")
    assert classes.tolist() == data.unseen.tolist()
    expected = 8 * np.eye(5, dtype=int)
    expected[0, :2] = 5, 3
    np.testing.assert_array_equal(counts, expected)
    nearest, margin = margins(data, predictions)
    wrong = np.isin(data.test_unseen, moved)
    assert (nearest[wrong] == second).all()
    assert (nearest[~wrong] == data.labels[data.test_unseen[~wrong]]).all()
    assert (margin[wrong] < 0).all()
    assert (margin[~wrong] > 0).all()
    a, b = (data.attributes[i] / np.linalg.norm(data.attributes[i]) for i in (first, second))
    np.testing.assert_allclose(margin[wrong], a @ b - 1, rtol=1e-5)


def test_accuracies_and_notes_are_those_of_evaluate(run, made):
    data = load_data(made.parent / "toy")
    report = make_report(run, data, options=QUICK)
    page = parse(run_page(run, options=QUICK))
    rows = {row[0]: row[3:] for row in rows_of(section(page, "accuracies"))}
    assert set(rows) == {*report["results"], "chance"}
    for method, result in report["results"].items():
        values = [result["czsl"]["mca"], *(result["gzsl"][name] for name in ("unseen", "seen", "h"))]
        assert rows[method] == [f"{100 * value:.1f}" for value in values]
    assert f"proposed split {data.sha256()[:16]}" in text_of(section(page, "accuracies"))
    classes = {row[0]: row[1:] for row in rows_of(section(page, "classes"))}
    assert len(classes) == 21
    czsl, gzsl = (report["results"]["attributes"][setting]["by_class"] for setting in ("czsl", "gzsl"))
    for name, cells in classes.items():
        assert cells[1] == ("4" if cells[0] == "unseen" else "1")
        assert cells[2] == (f"{100 * czsl[name]:.1f}" if name in czsl else "-")
        assert cells[3] == f"{100 * gzsl[name]:.1f}"


def test_curves_hold_the_numbers_of_the_history(run):
    told = text_of(section(parse(run_page(run, options=QUICK)), "curves"))
    header, values = (run / "training" / "history.csv").read_text().split()
    history = dict(zip(header.split(","), map(float, values.split(",")), strict=True))
    assert f"attribute loss, training, epoch 1: {history['attribute_loss']:.4g}" in told
    assert "MCA, selection, epoch 1: " in told
    assert "The dotted line marks the epoch chosen, 1." in told


def test_attention_is_shown_of_the_clearest_and_the_most_mistaken_images(run, made, sheets):
    data = load_data(made.parent / "toy")
    margin = margins(data, predictions_of(run, data))[1]
    order = data.test_unseen[np.argsort(-margin, kind="stable")]
    part = section(parse(run_page(run, options=QUICK)), "attention")
    said = [text_of(caption) for caption in part.iter("figcaption")]
    wanted = [*order[:SHEETS], *order[::-1][:SHEETS]]
    assert [caption.split(": ")[0] for caption in said] == [data.paths[row] for row in wanted]
    assert said[0].endswith(f"margin {margin.max():+.3f}")
    assert said[SHEETS].endswith(f"margin {margin.min():+.3f}")
    assert re.search(r": taken for \S+, margin -", said[SHEETS])
    assert all(image.get("alt").startswith("Attention on ") for image in part.iter("img"))
    assert all(int(image.get("width")) > 900 for image in part.iter("img"))
    (image, _, names), options = sheets[0]
    assert image.size == (96, 96)
    assert names[:4] == ["red", "green", "blue", "yellow"]
    assert options == {"image_size": 32}


def test_the_same_run_gives_the_same_bytes_and_refers_to_nothing_outside(run):
    text = run_page(run, options=QUICK)
    assert text == run_page(run, options=QUICK)
    assert not re.search(r"https?://|@import|url\(", text)


def test_many_classes_are_told_by_their_largest_confusions(run, made, monkeypatch):
    monkeypatch.setattr(module, "MOST_CLASSES", 20)
    data = load_data(made.parent / "toy")
    part = section(parse(run_page(run, options=QUICK)), "confusions")
    rows = rows_of(part, 1)
    images = np.concatenate([data.test_seen, data.test_unseen])
    everything = np.arange(21)
    expected = np.array(counted(predictions_of(run, data), data, images, everything))
    assert sum(int(row[2]) for row in rows) == expected.sum() - expected.trace()
    assert int(rows[0][2]) == max(expected[i, j] for i in range(21) for j in range(21) if i != j)
    assert all(true != predicted for true, predicted, _ in rows)


@pytest.mark.slow
def test_a_run_knows_its_data_set_wherever_it_is_called_from(data, narrow, tmp_path, monkeypatch):
    monkeypatch.chdir(data.folder.parent)
    near = load_data(data.folder.name)
    train(near, tmp_path / "run", replace(RECIPE, epochs=1), replace(SETUP, heads_only=True))
    noted = json.loads((tmp_path / "run" / "run.json").read_text())["data"]
    assert noted == {"folder": str(data.folder), "images": str(data.folder / "JPEGImages")}


@pytest.mark.slow
def test_a_data_set_that_has_moved_can_be_named(run, made, tmp_path):
    whole = run_page(run, options=QUICK)
    note = json.loads((run / "run.json").read_text())
    shutil.copytree(made.parent / "toy", tmp_path / "moved")
    gone = {folder: f"/nowhere/{folder}" for folder in ("folder", "images")}
    (run / "run.json").write_text(json.dumps({**note, "data": gone}))
    with pytest.raises(UsageError, match=r"isn't at /nowhere/folder any more; name it with --data"):
        run_page(run, options=QUICK)
    moved = run_page(run, data=tmp_path / "moved", options=QUICK)
    told, expected = (parse(text) for text in (moved, whole))
    places = [text_of(section(each, "summary").find(".//dd")) for each in (told, expected)]
    assert places == [str(tmp_path / "moved"), str(made.parent / "toy")]
    for name in ("accuracies", "classes", "confusions", "attention"):
        assert text_of(section(told, name)) == text_of(section(expected, name))
    del note["data"]
    (run / "run.json").write_text(json.dumps(note))
    with pytest.raises(UsageError, match=r"doesn't say where its data set lies; name it with --data"):
        run_page(run, options=QUICK)
    make_toy(tmp_path / "other", images=4, seed=1)
    with pytest.raises(UsageError, match="was trained on another split"):
        run_page(run, data=tmp_path / "other", options=QUICK)


def test_an_image_that_has_gone_since_is_a_tile_that_says_so(run, made, tmp_path):
    shutil.copytree(made.parent / "toy", tmp_path / "moved")
    for file in (tmp_path / "moved" / "JPEGImages").glob("*/*.png"):
        file.write_bytes(b"")  # the maps of all are cached
    part = section(parse(run_page(run, data=tmp_path / "moved", options=QUICK)), "attention")
    gone = [text_of(tile) for tile in part.iter("div") if tile.get("class") == "missing"]
    assert gone == ["can't be shown: empty file"] * (2 * SHEETS)


def test_an_unfinished_run_is_told(run):
    (run / "model.safetensors").unlink()
    with pytest.raises(UsageError, match="isn't finished; the command that began it goes on"):
        run_page(run, options=QUICK)


def test_the_command_makes_a_page_of_a_run(vggenc, run, tmp_path):
    command = ["report", run, "--html", tmp_path / "page.html", "--num-workers", 0, "--device", "cpu"]
    result = vggenc(*command)
    assert (result.returncode, result.stderr) == (0, "")
    assert "zero-shot run" in result.stdout
    assert (tmp_path / "page.html").read_text() == run_page(run, options=QUICK)
    result = vggenc(*command, "--by", "conv5_4")
    assert result.returncode == 2
    assert "--by is for a features folder" in result.stderr
