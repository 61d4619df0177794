import io
import os
import socket
import sys

import numpy as np
import pytest
from PIL import Image

from vggenc import Options, StoreError, UsageError, extract, images, read_features
from vggenc.inputs import find_images
from vggenc.places import contents, place

SMALL = Options(image_size=32, part_size=4, num_workers=1)


def values(table):
    return np.stack([v for v in table["conv2_2"].to_pylist() if v is not None])


def test_s3_gives_what_the_same_files_on_disk_give(oxford, folder, photos, bucket, tmp_path):
    here = extract(folder, oxford, ["conv2_2"], tmp_path / "f", options=SMALL)
    there = extract(photos, oxford, ["conv2_2"], f"{bucket}/out", options=SMALL)
    assert (there.images, there.failed, there.failures) == (here.images, here.failed, here.failures)
    local, remote = read_features(tmp_path / "f"), read_features(f"{bucket}/out")
    facts = ["path", "status", "error", "width", "height"]
    assert remote.select(facts).to_pylist() == local.select(facts).to_pylist()
    np.testing.assert_array_equal(values(remote), values(local))
    names = {file.name for file in place(f"{bucket}/out").iterdir()}
    assert names == {file.name for file in (tmp_path / "f").iterdir()}


def test_a_run_in_s3_goes_on_at_the_part_that_is_missing(oxford, photos, bucket):
    extract(photos, oxford, ["conv2_2"], f"{bucket}/out", options=SMALL)
    part = place(f"{bucket}/out") / "part-00001.parquet"
    before = part.read_bytes()
    part.unlink()
    with pytest.raises(StoreError, match="3 of 4 parts"):
        read_features(f"{bucket}/out")
    again = extract(photos, oxford, ["conv2_2"], f"{bucket}/out", options=SMALL)
    assert (again.computed, again.images, again.failed) == (4, 13, 3)
    assert part.read_bytes() == before


def test_other_settings_and_foreign_files_in_s3_are_refused(oxford, photos, bucket):
    extract(photos, oxford, ["conv2_2"], f"{bucket}/out", options=SMALL)
    with pytest.raises(UsageError, match=r"other settings.*pool was 'avg'"):
        extract(photos, oxford, ["conv2_2"], f"{bucket}/out", options=Options(image_size=32, pool="max"))
    with pytest.raises(UsageError, match="holds other files"):
        extract(photos, oxford, ["conv2_2"], photos, options=SMALL)
    replaced = Options(image_size=32, part_size=13, num_workers=1)
    extract(photos, oxford, ["conv2_2"], f"{bucket}/out", options=replaced, overwrite=True)
    assert len(list(place(f"{bucket}/out").glob("part-*"))) == 1


def test_whole_maps_in_s3_are_told_when_they_are_cut_or_gone(oxford, photos, bucket):
    options = Options(image_size=32, part_size=13, pool="none", num_workers=1)
    extract(photos, oxford, ["conv5_4"], f"{bucket}/out", options=options)
    maps = place(f"{bucket}/out") / "part-00000.safetensors"
    whole = maps.read_bytes()
    assert read_features(f"{bucket}/out").num_rows == 13
    maps.write_bytes(whole[:-4])
    with pytest.raises(StoreError, match=r"safetensors is damaged.*cut off"):
        read_features(f"{bucket}/out")
    maps.unlink()
    with pytest.raises(StoreError, match=r"safetensors is missing"):
        read_features(f"{bucket}/out")


def test_damaged_parts_and_manifests_in_s3_are_store_errors(oxford, photos, bucket):
    extract(photos, oxford, ["conv2_2"], f"{bucket}/out", options=SMALL)
    (place(f"{bucket}/out") / "part-00002.parquet").write_bytes(b"PAR1")
    with pytest.raises(StoreError, match=r"part-00002.parquet is damaged.*remove it"):
        read_features(f"{bucket}/out")
    (place(f"{bucket}/out") / "manifest.json").write_text("{")
    with pytest.raises(StoreError, match=r"manifest.json can't be read"):
        read_features(f"{bucket}/out")


def test_a_model_calibrated_for_int8_is_kept_in_s3(oxford, photos, bucket):
    options = Options(image_size=32, part_size=13, num_workers=1, engine="openvino", precision="int8")
    extract(photos, oxford, ["conv2_2"], f"{bucket}/out", options=options)
    first = values(read_features(f"{bucket}/out"))
    (place(f"{bucket}/out") / "part-00000.parquet").unlink()
    extract(photos, oxford, ["conv2_2"], f"{bucket}/out", options=options)
    np.testing.assert_array_equal(values(read_features(f"{bucket}/out")), first)
    assert {"calibrated.xml", "calibrated.bin"} <= {file.name for file in place(f"{bucket}/out").iterdir()}


def test_folders_files_patterns_and_lists_of_urls_are_inputs(photos, bucket, folder):
    everything = sorted(str(f.relative_to(folder)) for f in folder.rglob("*") if f.suffix in (".png", ".jpg"))
    found = find_images(photos)
    assert (found.root, found.paths) == (photos, everything)
    assert found.sizes == [os.path.getsize(folder / path) for path in everything]
    assert find_images(f"{photos}/deep/*.png").paths == ["0.png", "3.png", "6.png", "9.png"]
    assert find_images(f"{bucket}/pho*").paths == everything
    assert find_images(f"{photos}/notes.txt").paths == ["notes.txt"]
    place(f"{bucket}/list.txt").write_text(f"{photos}/2.png\n{photos}/deep/0.png\n{photos}/gone.png\n")
    assert find_images(f"@{bucket}/list.txt").paths == ["2.png", "deep/0.png", "gone.png"]


def test_a_listed_url_where_nothing_is_becomes_a_failed_row(oxford, photos, bucket, tmp_path):
    (tmp_path / "list.txt").write_text(f"{photos}/gone.png\n{photos}/2.png\n")
    extract(f"@{tmp_path}/list.txt", oxford, ["conv2_2"], tmp_path / "f", options=SMALL)
    rows = read_features(tmp_path / "f", ["path", "error"]).to_pylist()
    assert rows == [{"path": "gone.png", "error": "no such file"}, {"path": "2.png", "error": None}]


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (["s3://nowhere-at-all/photos"], "no images at"),
        (["gs://bucket/photos"], "needs another package.*gcsfs"),
        (["nonsense://bucket/photos"], "can't be read as a URL"),
        (["@s3://nowhere-at-all/list.txt"], "the list s3://nowhere-at-all/list.txt can't be read"),
    ],
)
def test_urls_that_cannot_be_meant_are_usage_errors(bucket, inputs, message):
    with pytest.raises(UsageError, match=message):
        find_images(inputs)


def test_files_of_two_stores_are_not_one_run(photos, folder):
    with pytest.raises(UsageError, match="one store; got files of this machine, s3://"):
        find_images([photos, str(folder / "1.png")])


def test_storage_that_does_not_answer_stops_the_run(oxford, photos, bucket, tmp_path, monkeypatch):
    found = find_images(photos)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{free.getsockname()[1]}")
        monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
        place(photos).fs.clear_instance_cache()
        with pytest.raises(
            StoreError, match=r"can't be reached: .*once it can, the same command goes on"
        ) as caught:
            extract(found, oxford, ["conv2_2"], tmp_path / "f", options=SMALL)
        with pytest.raises(StoreError, match="can't be reached"):
            extract(photos, oxford, ["conv2_2"], tmp_path / "g", options=SMALL)
    assert "Traceback" not in str(caught.value)
    assert not list((tmp_path / "f").glob("part-*"))
    place(photos).fs.clear_instance_cache()


def test_a_file_too_large_for_memory_is_a_failed_row(photos, monkeypatch):
    for module in (images, sys.modules["vggenc.places"]):
        monkeypatch.setattr(module, "MOST_BYTES", 2000)
    with pytest.raises(images.ImageError, match="or more in an object store"):
        images.read(f"{photos}/1.png")


def test_pictures_by_url_are_those_of_their_files(photos, folder):
    assert images.decode(f"{photos}/1.png") == images.decode(folder / "1.png")
    assert contents(f"{photos}/1.png") == (folder / "1.png").read_bytes()
    assert Image.open(io.BytesIO(contents(f"{photos}/deep/0.png"))).size == (48, 40)


def test_similar_and_report_take_urls(vggenc, oxford, photos, bucket, tmp_path):
    extract(photos, oxford, ["conv2_2"], f"{bucket}/out", options=SMALL)
    result = vggenc("similar", f"{photos}/2.png", f"{bucket}/out", "--top", 1)
    assert (result.returncode, result.stdout.split()[-2:]) == (0, ["1.0000", "2.png"])
    result = vggenc("report", f"{bucket}/out", "--html", tmp_path / "page.html")
    assert result.returncode == 0, result.stderr
    assert "data:image/" in (tmp_path / "page.html").read_text()


def test_the_command_reads_and_writes_urls(vggenc, photos, bucket):
    options = ["--weights", "OXFORD_V1", "--outputs", "conv2_2", "--image-size", 32, "--num-workers", 0]
    result = vggenc("extract", photos, "--output", f"{bucket}/out", *options)
    assert result.returncode == 3
    assert f"folder        {bucket}/out" in result.stdout
    assert read_features(f"{bucket}/out").num_rows == 13
