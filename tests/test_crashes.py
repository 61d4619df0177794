"""Killed, stopped and competing runs, and disks that are full: what is on disk stays whole."""

import multiprocessing
import os
import random
import resource
import select
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vggenc import Options, StoreError, VGG19Encoder, extract, pipeline, read_features
from vggenc.inputs import find_images
from vggenc.loading import load_batches
from vggenc.weights import REGISTRY

PROCESSES = multiprocessing.get_context("forkserver")  # which imports torch once for all of them
PROCESSES.set_forkserver_preload(["vggenc.pipeline"])
ROUNDS = 100


def small_parts(pictures: Path, target: Path) -> None:
    multiprocessing.set_start_method("fork", force=True)  # so that its children are the workers, no others
    options = Options(image_size=32, part_size=2, batch_size=2, num_workers=2)
    extract(pictures, VGG19Encoder(1, weights="OXFORD_V1"), ["conv2_2"], target, options=options)


def begin(pictures: Path, target: Path) -> multiprocessing.Process:
    """A run in a process of its own that has begun to write."""
    process = PROCESSES.Process(target=small_parts, args=(pictures, target))
    process.start()
    lock = target / ".vggenc-lock"
    while process.is_alive() and not (lock.exists() and lock.read_text()):
        time.sleep(0.005)
    return process


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(1)
    for i in range(160):
        Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(folder / f"{i:03}.png")
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def kill_one_of(children: str, chance: random.Random) -> bool:
    """End one of the processes whose numbers a file of /proc lists."""
    try:
        found = Path(children).read_text().split()
        os.kill(int(chance.choice(found)), signal.SIGKILL)
    except (IndexError, OSError):  # it has none now, or has ended
        return False
    return True


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/task"), reason="needs Linux, to find the workers")
def test_kills_of_the_main_process_and_of_workers_change_nothing_on_disk(pictures, tmp_path):
    calm = begin(pictures, tmp_path / "calm")
    calm.join()
    expected = contents(tmp_path / "calm")
    assert len(expected) == 81
    shared = set(os.listdir("/dev/shm"))
    chance = random.Random(0)
    killed = {"main": 0, "worker": 0}
    finished = 0
    for _ in range(ROUNDS):
        process = begin(pictures, tmp_path / "killed")
        time.sleep(chance.uniform(0, 0.6))
        if chance.random() < 0.5:
            process.kill()
        elif kill_one_of(f"/proc/{process.pid}/task/{process.pid}/children", chance):
            killed["worker"] += 1
            process.join(60)
            assert process.exitcode == 0, "the run goes on when a worker was killed"
        process.join(60)
        killed["main"] += process.exitcode != 0
        for part in (tmp_path / "killed").glob("part-*"):
            assert part.read_bytes() == expected[part.name]
        if process.exitcode == 0:
            finished += 1
            assert contents(tmp_path / "killed") == expected
            shutil.rmtree(tmp_path / "killed")
    begin(pictures, tmp_path / "killed").join()
    assert contents(tmp_path / "killed") == expected
    assert min(*killed.values(), finished) >= ROUNDS / 6
    assert set(os.listdir("/dev/shm")) <= shared


def keep_a_worker(folder, told) -> None:
    dataset = pipeline.ImageDataset(find_images(folder), REGISTRY[0].preprocess, Options())
    batches = load_batches(dataset, [range(1), range(1, 2), range(2, 10)], 1)
    next(batches)
    [worker] = multiprocessing.active_children()
    told.put(worker.pid)
    time.sleep(60)


@pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="needs Linux")
def test_workers_die_with_a_killed_main_process(folder):
    told = PROCESSES.Queue()
    main = PROCESSES.Process(target=keep_a_worker, args=(folder, told))
    main.start()  # by a fork server, so that its worker may be no child of it
    worker = os.pidfd_open(told.get())
    main.kill()
    main.join()
    assert select.select([worker], [], [], 10)[0]
    os.close(worker)


def test_a_full_disk_ends_with_1_and_whole_parts_and_the_rerun_completes(vggenc, folder, tmp_path):
    for i in range(4):  # a part without values, which still fits
        (folder / f"0{i}.png").write_bytes(b"")
    options = ["--weights", "OXFORD_V1", "--image-size", 32, "--part-size", 4, "--num-workers", 0]
    command = ["extract", folder, "--outputs", "conv4_4,conv5_4", *options, "--output"]
    assert vggenc(*command, tmp_path / "calm").returncode == 3
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8_000, limits[1]))
    try:
        result = vggenc(*command, tmp_path / "full")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert result.returncode == 1
    assert result.stderr.startswith(f"error: {tmp_path}/full/part-00001.parquet can't be written: ")
    assert "File too large" in result.stderr
    assert sorted(contents(tmp_path / "full")) == ["manifest.json", "part-00000.parquet"]
    assert read_features(tmp_path / "full", partial=True).num_rows == 4
    assert vggenc(*command, tmp_path / "full").returncode == 3
    assert contents(tmp_path / "full") == contents(tmp_path / "calm")


@pytest.mark.parametrize("room", [0, 100])
def test_a_disk_that_is_full_from_the_start_leaves_an_empty_folder(oxford, folder, tmp_path, room):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
    try:
        with pytest.raises(StoreError, match="can't be written"):
            extract(folder, oxford, ["conv2_2"], tmp_path / "f", options=Options(num_workers=0))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list((tmp_path / "f").iterdir()) == []
    extract(folder, oxford, ["conv2_2"], tmp_path / "f", options=Options(image_size=32, num_workers=0))


def test_a_second_process_is_refused_and_told_who_works(vggenc, pictures, tmp_path):
    options = ["--weights", "OXFORD_V1", "--image-size", 32, "--outputs", "conv2_2", "--num-workers", 2]
    options += ["--part-size", 2, "--batch-size", 2]
    process = begin(pictures, tmp_path / "f")
    os.kill(process.pid, signal.SIGSTOP)  # so that it isn't done before the second has begun
    try:
        refused = vggenc("extract", pictures, "--output", tmp_path / "f", *options)
    finally:
        os.kill(process.pid, signal.SIGCONT)
    assert refused.returncode == 1
    assert f"error: {tmp_path}/f is being written by process {process.pid} on " in refused.stderr
    process.kill()
    process.join()
    assert (tmp_path / "f" / ".vggenc-lock").exists()
    done = vggenc("extract", pictures, "--output", tmp_path / "f", *options)  # the lock's owner is dead
    assert (done.returncode, done.stderr) == (0, "")
    assert read_features(tmp_path / "f").num_rows == 160
    assert not (tmp_path / "f" / ".vggenc-lock").exists()
