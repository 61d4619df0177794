import shutil
from dataclasses import replace

import numpy as np
import pytest
from scipy.io import loadmat, savemat

from vggenc.errors import DataError, UsageError
from vggenc.zsl import xlsa17
from vggenc.zsl.data import load_data

CLASSES = ("ant", "bee", "cat", "dog", "elk", "fox", "gnu", "hen")
SEEN, UNSEEN = {"ps": CLASSES[:6], "ss": CLASSES[2:]}, {"ps": CLASSES[6:], "ss": CLASSES[:2]}
FILES = {name: [f"{name}/{i}.png" for i in range(7)] for name in CLASSES}
ALL = [path for files in FILES.values() for path in files]
PARTS = {  # the seventh image of a class is in no list of the proposed split
    "ps": {
        "trainval": [path for name in SEEN["ps"] for path in FILES[name][:5]],
        "test_seen": [FILES[name][5] for name in SEEN["ps"]],
        "test_unseen": [path for name in UNSEEN["ps"] for path in FILES[name][:6]],
    },
    "ss": {
        "trainval": [path for name in SEEN["ss"] for path in FILES[name]],
        "test_seen": [],
        "test_unseen": [path for name in UNSEEN["ss"] for path in FILES[name]],
    },
}
MATRIX = 10.0 * np.arange(8)[:, None] + np.arange(5) + 1
MATRIX[0, 0] = -1
GNU = "61.0 62.0 63.0 64.0 65.0\n"


@pytest.fixture
def pictures(tmp_path):
    for path in ALL:
        (tmp_path / "JPEGImages" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "JPEGImages" / path).touch()
    return tmp_path / "JPEGImages"


@pytest.fixture
def folders(tmp_path, pictures):
    lists = tmp_path / "proposed_split"
    lists.mkdir()
    texts = {
        tmp_path / "classes.txt": [f"{i} {name}" for i, name in enumerate(CLASSES, 1)],
        tmp_path / "predicates.txt": [f"{i} {word}" for i, word in enumerate("abcde", 1)],
        tmp_path / "predicate-matrix-continuous.txt": [" ".join(map(str, row)) for row in MATRIX],
        tmp_path / "trainclasses.txt": SEEN["ss"],
        tmp_path / "testclasses.txt": UNSEEN["ss"],
        lists / "seen_cls.txt": SEEN["ps"],
        lists / "unseen_cls.txt": UNSEEN["ps"],
        **{lists / f"{part}_ps.txt": paths for part, paths in PARTS["ps"].items()},
    }
    for file, lines in texts.items():
        file.write_text("".join(f"{line}\n" for line in lines))
    return tmp_path


@pytest.fixture
def xlsa(tmp_path, pictures):
    """Written by hand as Xian et al. publish it, with the paths of their machine."""
    folder = tmp_path / "xlsa17"
    (folder / "standard_split").mkdir(parents=True)
    stored = [f"/elsewhere/Animals_with_Attributes2//JPEGImages/{path}" for path in ALL]
    labels = np.repeat(np.arange(8), 7)[:, None] + 1
    savemat(
        folder / "res101.mat",
        {"labels": labels, "image_files": np.array([[path] for path in stored], object)},
    )
    for split, file in (("ps", "att_splits.mat"), ("ss", "standard_split/att_splits.mat")):
        locations = {
            f"{part}_loc": np.array([[ALL.index(path) + 1] for path in paths]).reshape(-1, 1)
            for part, paths in PARTS[split].items()
        }
        unit = MATRIX / np.linalg.norm(MATRIX, axis=1, keepdims=True)
        savemat(folder / file, {"att": unit.T, "original_att": MATRIX.T, **locations})
    (folder / "allclasses.txt").write_text("".join(f"{name}\n" for name in CLASSES))
    return folder


def alter(file, change):
    content = {key: value for key, value in loadmat(file).items() if not key.startswith("__")}
    changed = content | change(content)
    savemat(file, {key: value for key, value in changed.items() if value is not None})


def paths_of(data, which):
    return [data.paths[i] for i in which]


@pytest.mark.parametrize("split", ["ps", "ss"])
def test_a_split_of_folders_is_what_its_lists_say(folders, split):
    data = load_data(folders, split)
    assert {part: paths_of(data, getattr(data, part)) for part in PARTS[split]} == PARTS[split]
    assert [data.classes[i] for i in data.labels] == [path.split("/")[0] for path in data.paths]
    assert tuple(data.classes[i] for i in data.seen) == SEEN[split]
    assert tuple(data.classes[i] for i in data.unseen) == UNSEEN[split]
    assert (data.split, data.k, data.validation.size) == (split, 5, 0)


@pytest.mark.parametrize("split", ["ps", "ss"])
def test_both_layouts_of_the_same_data_are_read_alike(folders, xlsa, pictures, split):
    one, other = load_data(folders, split), load_data(xlsa, split, images=pictures)
    assert one.sha256() == other.sha256()
    for field in ("root", "paths", "classes", "split"):
        assert getattr(one, field) == getattr(other, field)
    for field in ("labels", "attributes", "seen", "unseen", "trainval", "test_seen", "test_unseen"):
        np.testing.assert_array_equal(getattr(one, field), getattr(other, field))


@pytest.mark.parametrize("layout", ["folders", "xlsa"])
def test_negative_attributes_count_as_zero(request, pictures, layout):
    data = load_data(request.getfixturevalue(layout), images=pictures)
    assert data.attributes.dtype == np.float32
    np.testing.assert_array_equal(data.attributes[0], [0, 2, 3, 4, 5])
    np.testing.assert_array_equal(data.attributes[1:], MATRIX[1:])


def test_classes_of_no_set_are_left_out(folders):
    for name in ("seen_cls", "trainval_ps", "test_seen_ps"):
        file = folders / f"proposed_split/{name}.txt"
        file.write_text("\n".join(line for line in file.read_text().split() if not line.startswith("bee")))
    data = load_data(folders)
    assert data.classes == tuple(name for name in CLASSES if name != "bee")
    np.testing.assert_array_equal(data.attributes[1:], MATRIX[2:])
    assert [data.classes[i] for i in data.labels] == [path.split("/")[0] for path in data.paths]


def test_lists_of_folders_may_hold_paths_of_another_machine(folders):
    there = load_data(folders)
    file = folders / "proposed_split/trainval_ps.txt"
    file.write_text("".join(f"C:\\data\\{path}\n" for path in PARTS["ps"]["trainval"]).replace("/", "\\"))
    assert load_data(folders).paths == there.paths


def test_images_are_listed_below_the_folder_they_lie_in(folders):
    data = load_data(folders)
    listed = data.images(data.test_seen)
    assert [listed.file(i) for i in (0, 5)] == [
        str(folders / "JPEGImages" / x) for x in ("ant/5.png", "fox/5.png")
    ]


def test_sha256_does_not_depend_on_order(folders):
    before = load_data(folders).sha256()
    for name in ("seen_cls", "unseen_cls", "trainval_ps", "test_unseen_ps"):
        file = folders / f"proposed_split/{name}.txt"
        file.write_text("\n".join(reversed(file.read_text().split())))
    assert load_data(folders).paths[0] == "fox/4.png"
    assert load_data(folders).sha256() == before


def test_sha256_depends_on_each_image_s_list_and_each_class_s_set(folders):
    data = load_data(folders)
    moved = {"trainval": data.trainval[1:], "test_seen": np.append(data.test_seen, data.trainval[0])}
    turned = {"seen": data.seen[1:], "unseen": np.append(data.unseen, data.seen[0])}
    dropped = {"test_unseen": data.test_unseen[1:]}
    hashes = {replace(data, **change).sha256() for change in ({}, moved, turned, dropped)}
    assert len(hashes) == 4


def test_what_is_written_as_xlsa17_is_read_back(folders, pictures, tmp_path):
    data = load_data(folders)
    features = np.arange(len(data.paths) * 3, dtype=np.float32).reshape(-1, 3)
    xlsa17.write(tmp_path / "out", data, features)
    again = load_data(tmp_path / "out", images=pictures)
    assert again.sha256() == data.sha256()
    assert (again.paths, again.classes) == (data.paths, data.classes)
    np.testing.assert_array_equal(again.labels, data.labels)
    np.testing.assert_array_equal(again.attributes, data.attributes)
    np.testing.assert_array_equal(loadmat(tmp_path / "out/res101.mat")["features"].T, features)
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == [
        "allclasses.txt",
        "att_splits.mat",
        "res101.mat",
    ]


def test_written_attributes_are_columns_of_length_one_beside_the_original_ones(folders, tmp_path):
    data = load_data(folders)
    xlsa17.write(tmp_path / "out", data, np.zeros((len(data.paths), 1), np.float32))
    content = loadmat(tmp_path / "out/att_splits.mat")
    np.testing.assert_allclose((content["att"] ** 2).sum(0), np.ones(8), rtol=1e-6)
    np.testing.assert_array_equal(content["original_att"].T, data.attributes)


def test_written_train_and_validation_images_are_those_to_train_on_by_class(folders, tmp_path):
    data = load_data(folders)
    xlsa17.write(tmp_path / "out", data, np.zeros((len(data.paths), 1), np.float32))
    content = loadmat(tmp_path / "out/att_splits.mat")
    train, val = content["train_loc"].ravel() - 1, content["val_loc"].ravel() - 1
    assert sorted([*train, *val]) == list(data.trainval)
    assert len(set(data.labels[train])) == 4
    assert len(set(data.labels[val])) == 2
    assert not set(data.labels[train]) & set(data.labels[val])


def test_stored_paths_are_found_wherever_the_images_lie_below_the_data_set(xlsa, pictures):
    there = load_data(xlsa, images=pictures)
    shutil.move(pictures, xlsa / "deep" / "JPEGImages")
    data = load_data(xlsa)
    assert data.sha256() == there.sha256()
    assert (data.root / data.paths[0]).is_file()


def test_the_longest_common_end_decides_which_file_a_stored_path_means(xlsa, pictures):
    shutil.copytree(pictures, pictures.parent / "copies" / "thumbnails")
    shutil.move(pictures, pictures.parent / "copies")
    data = load_data(xlsa, images=pictures.parent / "copies")
    assert {path.split("/")[0] for path in data.paths} == {"JPEGImages"}


def test_a_stored_path_that_fits_two_files_is_an_error_that_names_all_three(xlsa, pictures):
    shutil.copytree(pictures, pictures.parent / "copies" / "a")
    shutil.copytree(pictures, pictures.parent / "copies" / "b")
    with pytest.raises(DataError, match=r"a/ant/0\.png and b/ant/0\.png both fit .*JPEGImages/ant/0\.png"):
        load_data(xlsa, images=pictures.parent / "copies")


def test_a_missing_image_is_not_taken_for_one_of_the_same_name_of_another_class(xlsa, pictures):
    (pictures / "ant" / "0.png").rename(pictures / "ant" / "only.png")
    for name in CLASSES[1:]:
        (pictures / name / "1.png").unlink()
    with pytest.raises(DataError, match=r"8 of 56 images are missing below .*, such as .*/ant/0\.png"):
        load_data(xlsa, images=pictures)


@pytest.mark.parametrize("seed", [0, 1])
def test_holding_out_touches_seen_classes_and_training_images_only(folders, seed):
    data = load_data(folders)
    held = data.hold_out(seed)
    assert held.split == "validation"
    assert sorted([*held.seen, *held.unseen]) == list(data.seen)
    images = np.concatenate([held.trainval, held.test_seen, held.test_unseen])
    assert sorted(images) == list(data.trainval)
    assert set(held.labels[held.test_unseen]) == set(held.unseen)


def test_holding_out_takes_a_third_of_the_classes_and_a_fifth_of_the_others_images(folders):
    held = load_data(folders).hold_out()
    assert len(held.unseen) == 2
    assert np.bincount(held.labels[held.trainval], minlength=8).max() == 4
    assert sorted(held.labels[held.test_seen]) == list(held.seen)


def test_holding_out_is_the_same_for_the_same_seed_and_differs_between_seeds(folders):
    data = load_data(folders)
    hashes = [data.hold_out(seed).sha256() for seed in range(8)]
    assert hashes == [data.hold_out(seed).sha256() for seed in range(8)]
    assert len(set(hashes)) > 4


def test_holding_out_takes_the_classes_that_the_data_set_itself_holds_out(xlsa, pictures):
    dog_and_fox = [[ALL.index(path) + 1] for name in ("dog", "fox") for path in FILES[name][:5]]
    alter(xlsa / "att_splits.mat", lambda _: {"val_loc": np.array(dog_and_fox)})
    data = load_data(xlsa, images=pictures)
    for seed in (0, 1):
        held = data.hold_out(seed)
        assert [held.classes[i] for i in held.unseen] == ["dog", "fox"]
        assert [held.classes[i] for i in held.seen] == ["ant", "bee", "cat", "elk"]


def test_holding_out_classes_that_leave_none_to_train_on_is_an_error(folders):
    data = load_data(folders)
    with pytest.raises(DataError, match="every seen class has images for validation"):
        replace(data, validation=data.trainval).hold_out()


def test_holding_out_of_fewer_than_four_seen_classes_is_an_error(folders):
    data = load_data(folders)
    assert len(replace(data, seen=data.seen[:4]).hold_out().unseen) == 2
    with pytest.raises(DataError, match="3 seen classes are too few"):
        replace(data, seen=data.seen[:3]).hold_out()


@pytest.mark.parametrize(
    ("file", "old", "new", "told"),
    [
        ("classes.txt", "1 ant", "0 ant", r"from 1 on .*line 1 is '0 ant'"),
        ("classes.txt", "2 bee", "bee", r"line 2 is 'bee'"),
        ("classes.txt", "2 bee", "2 ant", "names twice: ant"),
        ("classes.txt", "8 hen\n", "", r"8 x 5, but classes\.txt has 7 classes and predicates\.txt 5"),
        ("predicates.txt", "5 e", "5 e\n6 f", r"8 x 5, but .* predicates\.txt 6 attributes"),
        ("predicate-matrix-continuous.txt", GNU, "", r"7 x 5, but classes\.txt has 8 classes"),
        ("predicate-matrix-continuous.txt", GNU, "61\n", r"rows of different lengths: \[1, 5\]"),
        ("predicate-matrix-continuous.txt", GNU, GNU.replace("61", "much"), "other than numbers.*much"),
        ("predicate-matrix-continuous.txt", GNU, "-1 -1 -1 -1 -1\n", "no attributes .* for gnu"),
        ("predicate-matrix-continuous.txt", "61.0", "nan", "NaN or infinity in the attributes of gnu"),
        ("proposed_split/seen_cls.txt", "ant", "yak", "names classes that classes.txt doesn't list: yak"),
        ("proposed_split/unseen_cls.txt", "gnu", "yak", "names classes that classes.txt doesn't list: yak"),
        ("proposed_split/unseen_cls.txt", "gnu", "gnu\nant", "both seen and unseen: ant"),
        ("proposed_split/seen_cls.txt", "ant", "ant\nant", r"seen_cls\.txt names twice: ant"),
        ("proposed_split/trainval_ps.txt", "/0.png", "/9.png", r"1 of 30 images of trainval .*ant/9\.png"),
        ("proposed_split/trainval_ps.txt", "ant/0", "ant/1", r"listed twice: ant/1\.png"),
        ("proposed_split/test_seen_ps.txt", "ant/5", "ant/4", r"listed twice: ant/4\.png"),
        (
            "proposed_split/trainval_ps.txt",
            "ant/0",
            "gnu/6",
            r"trainval lists .*aren.t seen: gnu/6\.png",
        ),
        (
            "proposed_split/test_seen_ps.txt",
            "ant/5",
            "gnu/6",
            r"test_seen lists .*aren.t seen: gnu/6\.png",
        ),
        (
            "proposed_split/test_unseen_ps.txt",
            "gnu/5",
            "ant/6",
            r"test_unseen lists .*aren.t unseen: ant/6\.png",
        ),
        (
            "proposed_split/trainval_ps.txt",
            "".join(f"{path}\n" for path in FILES["ant"][:5]),
            "",
            "no image to train on for ant",
        ),
    ],
)
def test_folders_whose_files_contradict_each_other_are_told_how(folders, file, old, new, told):
    text = (folders / file).read_text()
    assert old in text
    (folders / file).write_text(text.replace(old, new, 1))
    with pytest.raises(DataError, match=told):
        load_data(folders)


@pytest.mark.parametrize(
    ("file", "change", "told"),
    [
        ("res101.mat", lambda m: {"labels": m["labels"] - 1}, "labels must be 1 to 8.* 0 to 7"),
        ("res101.mat", lambda m: {"labels": m["labels"] + 1}, "labels must be 1 to 8.* 2 to 9"),
        ("res101.mat", lambda m: {"labels": m["labels"][1:]}, "55 labels for 56 image_files"),
        ("res101.mat", lambda m: {"image_files": m["image_files"][1:]}, "56 labels for 55 image_files"),
        ("res101.mat", lambda m: {"labels": None}, r"res101\.mat has no labels"),
        ("res101.mat", lambda m: {"image_files": None}, r"res101\.mat has no image_files"),
        (
            "res101.mat",
            lambda m: {
                "image_files": np.where(m["image_files"] == m["image_files"][0], "a/x.png", m["image_files"])
            },
            r"1 of 56 images are missing below .*a/x\.png",
        ),
        (
            "res101.mat",
            lambda m: {
                "image_files": np.vstack([m["image_files"][:13], m["image_files"][:1], m["image_files"][14:]])
            },
            r"ant/0\.png is in image_files twice",
        ),
        (
            "att_splits.mat",
            lambda m: {"original_att": m["original_att"].T},
            r"\(8, 5\), but must be \(k, 8\)",
        ),
        (
            "att_splits.mat",
            lambda m: {"original_att": m["original_att"][:, 1:]},
            r"\(5, 7\), but must be \(k, 8",
        ),
        (
            "att_splits.mat",
            lambda m: {"original_att": np.where(np.arange(8) == 6, -1, MATRIX.T)},
            "no attributes .* for gnu",
        ),
        (
            "att_splits.mat",
            lambda m: {"original_att": np.where(MATRIX.T == 61, np.nan, MATRIX.T)},
            "NaN or infinity in the attributes of gnu",
        ),
        (
            "att_splits.mat",
            lambda m: {"trainval_loc": m["trainval_loc"] - 1},
            "trainval_loc must be 1 to 56.* 0 to 39",
        ),
        (
            "att_splits.mat",
            lambda m: {"test_seen_loc": m["test_seen_loc"] * 0},
            "test_seen_loc must be 1 to 56",
        ),
        (
            "att_splits.mat",
            lambda m: {"test_unseen_loc": m["test_unseen_loc"] + 2},
            "test_unseen_loc must be 1 to 56.* 45 to 57",
        ),
        ("att_splits.mat", lambda m: {"val_loc": np.array([[57]])}, "val_loc must be 1 to 56.* 57 to 57"),
        ("att_splits.mat", lambda m: {"trainval_loc": None}, r"att_splits\.mat has no trainval_loc"),
        ("att_splits.mat", lambda m: {"test_unseen_loc": None}, r"att_splits\.mat has no test_unseen_loc"),
        (
            "att_splits.mat",
            lambda m: {"trainval_loc": np.append(m["trainval_loc"], 2)},
            r"listed twice: ant/1\.png",
        ),
        ("att_splits.mat", lambda m: {"test_seen_loc": np.array([[1]])}, r"listed twice: ant/0\.png"),
        (
            "att_splits.mat",
            lambda m: {"trainval_loc": np.append(m["trainval_loc"], 49)},
            "both seen and unseen: gnu",
        ),
        ("att_splits.mat", lambda m: {"test_unseen_loc": np.array([[7]])}, "both seen and unseen: ant"),
        (
            "att_splits.mat",
            lambda m: {"test_seen_loc": np.array([[49]])},
            r"test_seen lists .*aren.t seen: gnu/6\.png",
        ),
    ],
)
def test_xlsa17_files_that_contradict_each_other_are_told_how(xlsa, pictures, file, change, told):
    alter(xlsa / file, change)
    with pytest.raises(DataError, match=told):
        load_data(xlsa, images=pictures)


@pytest.mark.parametrize("file", ["res101.mat", "att_splits.mat"])
def test_damaged_mat_files_are_named(xlsa, pictures, file):
    for content in ((xlsa / file).read_bytes()[:200], b"", b"MATLAB 7.3 MAT-file" + bytes(500)):
        (xlsa / file).write_bytes(content)
        with pytest.raises(DataError, match=rf"{file} can't be read as a MATLAB file"):
            load_data(xlsa, images=pictures)


@pytest.mark.parametrize(
    ("split", "file"),
    [
        ("ps", "predicate-matrix-continuous.txt"),
        ("ps", "proposed_split/seen_cls.txt"),
        ("ps", "proposed_split/unseen_cls.txt"),
        ("ps", "proposed_split/trainval_ps.txt"),
        ("ps", "proposed_split/test_seen_ps.txt"),
        ("ps", "proposed_split/test_unseen_ps.txt"),
        ("ss", "trainclasses.txt"),
        ("ss", "testclasses.txt"),
    ],
)
def test_a_file_that_the_split_needs_is_named_when_it_is_missing(folders, split, file):
    (folders / file).unlink()
    with pytest.raises(UsageError, match=rf"{file} is missing"):
        load_data(folders, split)


@pytest.mark.parametrize(
    ("split", "file"),
    [("ps", "att_splits.mat"), ("ss", "standard_split/att_splits.mat"), ("ps", "allclasses.txt")],
)
def test_a_missing_file_of_xlsa17_is_named(xlsa, pictures, split, file):
    (xlsa / file).unlink()
    with pytest.raises(UsageError, match=rf"{file} is missing"):
        load_data(xlsa, split, images=pictures)


def test_predicates_may_be_missing(folders):
    (folders / "predicates.txt").unlink()
    assert load_data(folders).k == 5


def test_text_that_is_no_utf8_is_a_data_error(folders):
    (folders / "classes.txt").write_bytes(b"1 \xff\n")
    with pytest.raises(DataError, match=r"classes\.txt can't be read"):
        load_data(folders)


def test_a_class_to_train_on_needs_images_and_an_unseen_one_does_not(folders):
    shutil.rmtree(folders / "JPEGImages" / "ant")
    assert {path.split("/")[0] for path in load_data(folders, "ss").paths} == {*CLASSES[1:]}
    shutil.rmtree(folders / "JPEGImages" / "hen")
    with pytest.raises(DataError, match="hen is missing, the images of a class that is trained on"):
        load_data(folders, "ss")


def test_an_empty_folder_of_a_class_is_like_none(folders):
    for path in FILES["ant"]:
        (folders / "JPEGImages" / path).unlink()
    assert {path.split("/")[0] for path in load_data(folders, "ss").paths} == {*CLASSES[1:]}


def test_a_folder_of_neither_layout_is_told_what_either_has(tmp_path):
    for folder in (tmp_path, tmp_path / "nothing"):
        with pytest.raises(UsageError, match=r"neither classes\.txt .* nor res101\.mat"):
            load_data(folder)


def test_an_unknown_split_is_told_which_there_are(folders):
    with pytest.raises(UsageError, match="split must be one of ps, ss; got 'gzsl'"):
        load_data(folders, "gzsl")
