import json
import os
import pickle
import signal
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import PHOTOGRAPHS
from PIL import Image
from safetensors.numpy import load_file
from test_pipeline import Killer

from vggenc import Cluster, Options, StoreError, UsageError, cli, cluster, extract, read_features
from vggenc.cluster import Workers
from vggenc.engines import has_bf16
from vggenc.images import ImageDataset
from vggenc.inputs import ImageList, find_images
from vggenc.loading import load_batches
from vggenc.parts import map_files
from vggenc.weights import REGISTRY

COMMAND = [sys.executable, "-m", "vggenc", "extract"]
OPTIONS = [
    "--weights",
    "OXFORD_V1",
    "--outputs",
    "conv2_2,conv3_4",
    "--image-size",
    "32",
    "--part-size",
    "20",
]


@pytest.fixture(scope="module")
def nodes(tmp_path_factory):
    """A cluster of two nodes on this machine, with two cores each."""
    utils = pytest.importorskip("ray.cluster_utils")
    os.environ["RAY_TMPDIR"] = "/tmp"  # sockets below need short paths
    cluster = utils.Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": 2, "object_store_memory": 400_000_000, "include_dashboard": False},
    )
    add_node(cluster)
    yield cluster
    cluster.shutdown()


def add_node(cluster):
    cluster.add_node(num_cpus=2, object_store_memory=400_000_000)
    cluster.wait_for_nodes()


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """2,000 small JPEG files, of which twenty are damaged in five ways."""
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for i in range(2000):
        coarse = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8))
        file = folder / f"{i:04}.jpg"
        coarse.resize((80, 60), Image.Resampling.BICUBIC).save(file, quality=85)
        if i % 100 == 7:
            whole = file.read_bytes()
            damaged = [b"", b"no picture", whole[:300], whole[: len(whole) // 2], whole[:2] + whole[40:]]
            file.write_bytes(damaged[i // 100 % 5])
    return folder


@pytest.fixture(scope="module")
def local(pictures, tmp_path_factory):
    """What the local pipeline makes of them."""
    folder = tmp_path_factory.mktemp("local") / "features"
    run = subprocess.run([*COMMAND, str(pictures), "--output", str(folder), *OPTIONS], capture_output=True)
    assert run.returncode == 3
    return read_features(folder)


def assert_same(there, here):
    facts = ["path", "status", "error", "width", "height"]
    assert there.select(facts).to_pylist() == here.select(facts).to_pylist()
    for name in ("conv2_2", "conv3_4"):
        one, other = (
            np.stack([v for v in table[name].to_pylist() if v is not None]) for table in (there, here)
        )
        assert np.abs(one - other).max() < 1e-4 * np.abs(other).max()


def on_cluster(cluster, inputs, output, *options):
    command = [*COMMAND, str(inputs), "--output", str(output), *OPTIONS, "--ray", cluster.address, *options]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def parts(folder):
    return len(list(Path(folder).glob("part-*.parquet")))


def wait_for_parts(run, folder, count):
    while run.poll() is None and parts(folder) < count:
        time.sleep(0.05)
    assert run.poll() is None


def computers():
    """The processes that compute."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if b"ray::MapWorker(Map(_Computer))" in (entry / "cmdline").read_bytes():
                found.append(int(entry.name))
        except OSError:
            continue
    return found


def parent(pid):
    return int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1])


@pytest.mark.slow
def test_two_nodes_give_the_table_of_the_local_pipeline(nodes, pictures, local, tmp_path):
    run = on_cluster(nodes, pictures, tmp_path / "f")
    _, err = run.communicate(timeout=500)
    assert (run.returncode, len(err.splitlines())) == (3, 7), err
    assert "20 of 2000 images failed" in err
    there = read_features(tmp_path / "f")
    assert_same(there, local)
    assert len(set(there["path"].to_pylist())) == 2000


@pytest.mark.slow
def test_a_killed_actor_and_a_killed_node_change_nothing(nodes, pictures, local, tmp_path):
    run = on_cluster(nodes, pictures, tmp_path / "f")
    wait_for_parts(run, tmp_path / "f", 5)
    os.kill(computers()[0], signal.SIGKILL)
    wait_for_parts(run, tmp_path / "f", 15)
    [second] = nodes.worker_nodes
    raylet = second.all_processes["raylet"][0].process.pid
    assert raylet in map(parent, computers())  # it computes
    nodes.remove_node(second, allow_graceful=False)
    _, err = run.communicate(timeout=500)
    add_node(nodes)
    assert run.returncode == 3, err
    there = read_features(tmp_path / "f")
    assert_same(there, local)
    assert len(set(there["path"].to_pylist())) == 2000


@pytest.mark.slow
def test_a_stopped_run_goes_on_and_computes_no_part_again(nodes, pictures, local, tmp_path):
    run = on_cluster(nodes, pictures, tmp_path / "f")
    wait_for_parts(run, tmp_path / "f", 5)
    run.send_signal(signal.SIGINT)
    _, err = run.communicate(timeout=100)
    assert run.returncode == 1
    assert "this goes on" in err
    assert f"--ray {nodes.address}" in err
    before = {file.name: file.stat().st_mtime_ns for file in (tmp_path / "f").glob("part-*")}
    assert 5 <= len(before) < 100
    run = on_cluster(nodes, pictures, tmp_path / "f", "--json")
    out, err = run.communicate(timeout=500)
    assert run.returncode == 3, err
    after = {file.name: file.stat().st_mtime_ns for file in (tmp_path / "f").glob("part-*")}
    assert {name: after[name] for name in before} == before
    assert f'"computed": {2000 - 20 * len(before)}' in out
    assert_same(read_features(tmp_path / "f"), local)


@pytest.mark.slow
def test_urls_are_read_and_written_on_a_cluster(folder, photos, bucket, tmp_path):
    """On a cluster of its own, whose nodes have the credentials."""
    command = [*COMMAND, photos, "--output", f"{bucket}/out", *OPTIONS, "--json", "--ray", "local"]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 3, run.stderr
    assert json.loads(run.stdout)["images"] == 13
    subprocess.run([*COMMAND, str(folder), "--output", str(tmp_path / "f"), *OPTIONS], capture_output=True)
    assert_same(read_features(f"{bucket}/out"), read_features(tmp_path / "f"))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # Ray warns of its own options
def test_python_gives_the_same_with_whole_maps_and_many_parts_a_block(
    nodes, oxford, folder, tmp_path, monkeypatch
):
    import ray

    monkeypatch.setattr(cluster, "_BLOCKS", 1)
    for name in find_images(folder).paths[2:4]:  # a part of nothing but failures
        (folder / name).write_bytes(b"no picture")
    options = Options(image_size=32, part_size=2, pool="none", dtype="float16")
    here = extract(folder, oxford, ["conv4_4", "conv5_4"], tmp_path / "here", options=options)
    monkeypatch.setenv("RAY_ADDRESS", nodes.address)
    there = Cluster(workers=1)
    with Workers(there):  # as if the caller were connected
        found = extract(
            folder, oxford, ["conv4_4", "conv5_4"], tmp_path / "there", options=options, cluster=there
        )
        assert ray.is_initialized()
    assert not ray.is_initialized()
    assert (found.images, found.failures) == (here.images, here.failures)
    for one, other in zip(map_files(tmp_path / "there"), map_files(tmp_path / "here"), strict=True):
        maps, expected = load_file(one[0]), load_file(other[0])
        for name in ("conv4_4", "conv5_4"):
            np.testing.assert_array_equal(maps[name], expected[name])


@pytest.mark.slow
def test_a_cluster_computes_int8_with_the_one_calibrated_model(nodes, tmp_path):
    options = ["--engine", "openvino", "--precision", "int8"]
    run = on_cluster(nodes, PHOTOGRAPHS, tmp_path / "f", *options)
    _, err = run.communicate(timeout=500)
    assert run.returncode == 0, err
    there = read_features(tmp_path / "f")
    (tmp_path / "f" / "part-00000.parquet").unlink()
    command = [*COMMAND, str(PHOTOGRAPHS), "--output", str(tmp_path / "f"), *OPTIONS, *options]
    assert subprocess.run(command, capture_output=True).returncode == 0
    assert_same(there, read_features(tmp_path / "f"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--device", "cuda"], 2, "the cluster has no GPU"),
        (["--engine", "ncnn", "--precision", "auto", "--compile"], 2, "compile goes with the engine torch"),
        (["--engine", "openvino", "--precision", "bf16"], 2, "OpenVINO doesn't compute with bf16"),
    ],
)
def test_what_a_cluster_cannot_do_is_told_in_a_line(nodes, tmp_path, options, code, message):
    if "bf16" in options and has_bf16(torch.device("cpu")):
        pytest.skip("this CPU computes with bf16")
    run = on_cluster(nodes, PHOTOGRAPHS, tmp_path / "f", *options)
    _, err = run.communicate(timeout=500)
    assert run.returncode == code, err
    assert err.startswith("error: ")
    assert message in err
    assert len(err.splitlines()) == 1


# Without a cluster


def test_a_cluster_that_is_not_there_is_told(tmp_path):
    pytest.importorskip("ray")
    with pytest.raises(StoreError, match=r"the cluster 127\.0\.0\.1:1 doesn't answer: .*refused"):
        Workers(Cluster(address="127.0.0.1:1")).__enter__()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"device": "cuda:1"}, "device of a cluster must be one of auto, cuda, cpu; got 'cuda:1'"),
        ({"workers": 0}, "workers must be 1 or more; got 0"),
        ({"address": "ray://head:10001"}, "Ray Data doesn't go through ray://"),
    ],
)
def test_clusters_that_cannot_be_meant_are_usage_errors(changes, message):
    with pytest.raises(UsageError, match=message):
        Cluster(**changes)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("a --ray", "a --ray auto"),
        ("--ray a", "--ray auto a"),
        ("a --ray --json", "a --ray auto --json"),
        ("--ray head:6379 a", "--ray head:6379 a"),
        ("--ray=head:6379 a", "--ray=head:6379 a"),
        ("--ray local a", "--ray local a"),
        ("--ray s3://bucket/a", "--ray auto s3://bucket/a"),
    ],
)
def test_ray_stands_alone_or_before_an_address(arguments, expected):
    assert cli._with_addresses(arguments.split()) == expected.split()


def test_options_of_a_cluster_and_of_this_machine_exclude_each_other(vggenc):
    result = vggenc("extract", PHOTOGRAPHS, "--ray", "--num-workers", 2)
    assert (result.returncode, "--num-workers is for this machine" in result.stderr) == (2, True)
    result = vggenc("extract", PHOTOGRAPHS, "--ray-workers", 2)
    assert (result.returncode, "--ray-workers goes with --ray" in result.stderr) == (2, True)


def test_without_ray_the_extra_is_named(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"pip install 'vggenc\[ray\]'"), Workers(Cluster()):
        pass


def decoded(images, options, versions=None):
    step = cluster._Decoder(REGISTRY[0].preprocess.at(32), options, versions or {})
    return step({"part": 3, "images": pickle.dumps(images)})


def test_a_decoding_actor_gives_the_rows_and_pixels_of_the_local_pipeline(folder):
    (folder / "cut.png").write_bytes((folder / "1.png").read_bytes()[:400])
    images, options = find_images(folder), Options(batch_size=4)
    item = decoded(images, options)
    rows = pickle.loads(item["rows"])
    dataset = ImageDataset(images, REGISTRY[0].preprocess.at(32), options)
    chunks = [range(i, min(i + 4, 11)) for i in range(0, 11, 4)]
    expected = list(load_batches(dataset, chunks, 0))
    assert rows == [row for some, _ in expected for row in some]
    assert sum(row.status == "failed" for row in rows) == 1
    again = list(cluster._batches(rows, item["pixels"], 4))
    assert [some for some, _ in again] == [some for some, _ in expected]
    for (_, one), (_, other) in zip(again, expected, strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_file_that_kills_its_decoder_is_a_failed_row_on_a_cluster_too(folder, monkeypatch, watchful_loader):
    monkeypatch.setattr(cluster, "ImageDataset", Killer)
    monkeypatch.setattr(Killer, "always", ("deep/3.png",))
    rows = pickle.loads(decoded(find_images(folder), Options(batch_size=4))["rows"])
    assert [(row.path, row.error) for row in rows if row.error] == [
        ("deep/3.png", "the process that decoded it died")
    ]


def test_a_part_without_a_picture_is_a_part(folder):
    item = decoded(ImageList(str(folder), ["gone.png", "too.png"]), Options())
    rows = pickle.loads(item["rows"])
    assert [row.error for row in rows] == ["no such file"] * 2
    assert item["pixels"].shape == (0, 32, 32, 3)
    assert list(cluster._batches(rows, item["pixels"], 32)) == [(rows, None)]


def test_an_error_of_ours_goes_on_as_the_items(monkeypatch):
    def silent(*_):
        raise StoreError("s3://bucket doesn't answer")

    monkeypatch.setattr(cluster, "ImageDataset", silent)
    item = decoded(ImageList("s3://bucket", ["a.png"]), Options())
    assert str(pickle.loads(item["error"])) == "s3://bucket doesn't answer"
    assert cluster._Step()(item) == item  # later steps pass it on


def test_a_node_that_would_decode_otherwise_says_what_differs(folder):
    item = decoded(find_images(folder), Options(), {"pillow": "1.0"})
    error = pickle.loads(item["error"])
    assert isinstance(error, UsageError)
    assert f"would compute otherwise: pillow was '1.0', now '{version('pillow')}'" in str(error)
