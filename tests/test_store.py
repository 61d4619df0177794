import json
import os
import shutil

import numpy as np
import pytest

from vggenc import StoreError, UsageError, read_features, store
from vggenc.images import Row
from vggenc.parts import map_files
from vggenc.store import Store

ROWS = [Row("a.png", "ok", None, 4, 5), Row("b.png", "failed", "empty file", None, None)]
VECTORS = {"conv2_2": np.array([[1, 2, 3], [np.nan] * 3], dtype=np.float32)}


def new_store(folder, **changes) -> Store:
    arguments = {
        "settings": {"pool": "avg"},
        "root": "/pictures",
        "inputs": "0",
        "vectors": {"conv2_2": 3},
        "rows": 4,
        "part_size": 2,
        "dtype": "float32",
    }
    return Store(folder, **(arguments | changes))


def test_rows_come_back_as_written_with_null_for_failures(tmp_path):
    with new_store(tmp_path, rows=2) as it:
        it.writer.write(0, ROWS, VECTORS)
    assert read_features(tmp_path).to_pylist() == [
        {**ROWS[0]._asdict(), "conv2_2": [1, 2, 3]},
        {**ROWS[1]._asdict(), "conv2_2": None},
    ]
    assert read_features(tmp_path, ["path"]).column_names == ["path"]


def test_unfinished_folders_are_told_apart(tmp_path):
    with new_store(tmp_path) as it:
        it.writer.write(1, ROWS, VECTORS)
        assert it.missing() == [0]
    with pytest.raises(StoreError, match="1 of 2 parts"):
        read_features(tmp_path)
    assert read_features(tmp_path, partial=True).num_rows == 2


@pytest.mark.parametrize("name", ["nothing", "."])
def test_reading_what_is_no_features_folder_is_a_usage_error(tmp_path, name):
    with pytest.raises(UsageError, match="no features folder"):
        read_features(tmp_path / name)


def test_unknown_columns_are_named_with_those_there_are(tmp_path):
    with new_store(tmp_path, rows=2) as it:
        it.writer.write(0, ROWS, VECTORS)
    with pytest.raises(UsageError, match=r"conv2_2.*conv9"):
        read_features(tmp_path, ["conv9"])


def test_damaged_parts_and_manifests_are_store_errors(tmp_path):
    with new_store(tmp_path, rows=2) as it:
        it.writer.write(0, ROWS, VECTORS)
    (tmp_path / "part-00000.parquet").write_bytes(b"PAR1")
    with pytest.raises(StoreError):
        read_features(tmp_path)
    for text in ("{", "[]", "{}", json.dumps({"format": 99})):
        (tmp_path / "manifest.json").write_text(text)
        with pytest.raises(StoreError):
            read_features(tmp_path)


def test_second_writer_is_refused_and_told_who_writes(tmp_path):
    with new_store(tmp_path):
        told = f"is being written by process {os.getpid()} on "
        with pytest.raises(StoreError, match=told), new_store(tmp_path):
            pass
        assert (tmp_path / ".vggenc-lock").exists()
    with new_store(tmp_path):
        pass
    assert [file.name for file in tmp_path.iterdir()] == ["manifest.json"]


def test_lock_of_a_dead_process_does_not_block(tmp_path):
    (tmp_path / ".vggenc-lock").write_text("process 1 on elsewhere")
    with new_store(tmp_path):
        pass


def test_folders_with_other_files_are_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    for overwrite in (False, True):
        with pytest.raises(UsageError, match=r"thesis\.tex"), new_store(tmp_path, overwrite=overwrite):
            pass
    assert [file.name for file in tmp_path.iterdir()] == ["thesis.tex"]


def test_overwriting_removes_only_what_a_run_wrote(tmp_path):
    with new_store(tmp_path, rows=2) as it:
        it.writer.write(0, ROWS, VECTORS | {"map": np.zeros((2, 1, 1, 1), np.float32)})
    (tmp_path / "notes.txt").write_text("mine")
    with new_store(tmp_path, settings={"pool": "max"}, overwrite=True) as it:
        assert it.missing() == [0, 1]
        assert sorted(file.name for file in tmp_path.iterdir()) == [
            ".vggenc-lock",
            "manifest.json",
            "notes.txt",
        ]


def test_failed_write_leaves_earlier_parts_and_nothing_else(tmp_path, monkeypatch):
    def full(table, file, **_):
        file.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    with new_store(tmp_path) as it:
        it.writer.write(0, ROWS, VECTORS)
        monkeypatch.setattr(store.pq, "write_table", full)
        with pytest.raises(StoreError, match="No space left"):
            it.writer.write(1, ROWS, VECTORS)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["manifest.json", "part-00000.parquet"]


def test_a_place_that_cannot_be_written_is_a_store_error(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(StoreError, match="can't be written"), new_store(tmp_path / "file" / "features"):
        pass
    with pytest.raises(UsageError, match="is a file"), new_store(tmp_path / "file"):
        pass


def test_columns_that_cannot_be_meant_are_told(tmp_path):
    settings = {"outputs": {"conv2_2": [3], "conv5_4": [512, 2, 2]}}
    with new_store(tmp_path, rows=2, settings=settings) as it:
        it.writer.write(0, ROWS, VECTORS | {"conv5_4": np.zeros((2, 512, 2, 2), np.float32)})
    with pytest.raises(UsageError, match=r"such as \['conv2_2'\]"):
        read_features(tmp_path, "conv2_2")
    with pytest.raises(UsageError, match="whole maps of conv5_4, in its safetensors files"):
        read_features(tmp_path, ["conv5_4"])


def test_files_of_a_run_have_the_mode_that_the_umask_gives(tmp_path):
    with new_store(tmp_path, rows=2) as it:
        it.writer.write(0, ROWS, VECTORS | {"map": np.zeros((2, 1, 1, 1), np.float32)})
    (tmp_path / "plain").touch()
    assert len({file.stat().st_mode for file in tmp_path.iterdir()}) == 1


def fill(folder, **changes) -> None:
    with new_store(folder, **changes) as it:
        for part in it.missing():
            it.writer.write(part, ROWS, VECTORS)


def test_parts_without_their_manifest_are_taken_over_only_to_be_replaced(tmp_path):
    fill(tmp_path)
    (tmp_path / "manifest.json").unlink()
    with pytest.raises(UsageError, match=r"lost its manifest\.json"), new_store(tmp_path):
        pass
    with pytest.raises(UsageError, match=r"has no manifest\.json, though it has parts: put it back"):
        read_features(tmp_path)
    with new_store(tmp_path, overwrite=True) as it:
        assert it.missing() == [0, 1]


def test_a_damaged_manifest_is_replaced_on_request(tmp_path):
    fill(tmp_path)
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(StoreError, match="--overwrite"), new_store(tmp_path):
        pass
    fill(tmp_path, overwrite=True)
    assert read_features(tmp_path).num_rows == 4


def copied_in_the_run(folder):
    shutil.copy(folder / "part-00000.parquet", folder / "part-00001.parquet")


def copied_from_another_run(folder):
    fill(folder / "other", settings={"pool": "max"})
    shutil.move(folder / "other" / "part-00001.parquet", folder / "part-00001.parquet")
    shutil.rmtree(folder / "other")


def one_too_many(folder):
    shutil.copy(folder / "part-00000.parquet", folder / "part-00002.parquet")


def a_changed_byte(folder):
    file = folder / "part-00001.parquet"
    content = bytearray(file.read_bytes())
    at = content.index(b"empty file")
    content[at] ^= 1
    file.write_bytes(content)


def a_folder(folder):
    (folder / "part-00001.parquet").unlink()
    (folder / "part-00001.parquet").mkdir()


@pytest.mark.parametrize(
    "harm", [copied_in_the_run, copied_from_another_run, one_too_many, a_changed_byte, a_folder]
)
def test_parts_that_are_not_what_their_names_say_are_told_with_the_way_out(tmp_path, harm):
    fill(tmp_path)
    harm(tmp_path)
    with pytest.raises(StoreError, match=r"part-0000[12]\.parquet .*; remove it, and the command"):
        read_features(tmp_path)


def test_maps_of_another_part_are_told(tmp_path):
    settings = {"outputs": {"conv2_2": [3], "conv5_4": [1, 1, 1]}}
    with new_store(tmp_path, settings=settings) as it:
        for part in it.missing():
            it.writer.write(part, ROWS, VECTORS | {"conv5_4": np.full((2, 1, 1, 1), part, np.float32)})
    assert map_files(tmp_path) == [(tmp_path / f"part-0000{i}.safetensors", 2) for i in (0, 1)]
    shutil.copy(tmp_path / "part-00000.safetensors", tmp_path / "part-00001.safetensors")
    with pytest.raises(StoreError, match="isn't part 1 of the run"), new_store(tmp_path, settings=settings):
        pass
    (tmp_path / "part-00001.safetensors").unlink()
    with pytest.raises(StoreError, match=r"part-00001\.safetensors is missing"):
        map_files(tmp_path)
