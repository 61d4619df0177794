import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, SHARED_DATA
from scipy.io import loadmat
from test_zsl_training import RECIPE, SETUP, SMALL, fresh

from vggenc import Options, StoreError, UsageError, VGG19Encoder, WeightsError
from vggenc.zsl import Recipe, load_data, make_report, train
from vggenc.zsl.batches import cache_grids
from vggenc.zsl.evaluation import METHODS
from vggenc.zsl.training import LAST

HEADS = ["--heads-only", "--weights", "OXFORD_V1", "--image-size", 32, "--device", "cpu", "--num-workers", 0]


def test_a_run_chooses_on_seen_classes_and_ends_with_a_trained_encoder(data, narrow, tmp_path):
    run = train(data, tmp_path / "run", RECIPE, replace(SETUP, heads_only=True))
    selection = run["selection"]
    assert len(selection["classes"]) == 5
    assert set(selection["classes"]) <= {data.classes[i] for i in data.seen}
    assert 1 <= selection["epochs"] <= 2
    encoder = VGG19Encoder.from_pretrained(tmp_path / "run")
    encoder.check_trained(["attributes", "latent"])
    stored = json.loads((tmp_path / "run" / "run.json").read_text())
    assert stored == json.loads(json.dumps(run))
    assert stored["settings"]["recipe"]["freeze"] == "conv5_4"  # these weights hold no classifier
    assert not list((tmp_path / "run").glob("*/*.ckpt"))
    model = (tmp_path / "run" / "model.safetensors").stat()
    train(data, tmp_path / "run", RECIPE, replace(SETUP, heads_only=True))  # is done already
    assert (tmp_path / "run" / "model.safetensors").stat() == model
    with pytest.raises(UsageError, match=r"seed was 0, now 1"):
        train(data, tmp_path / "run", RECIPE, replace(SETUP, heads_only=True, seed=1))


@pytest.mark.slow
def test_only_epochs_after_the_last_fall_of_the_rates_are_chosen(data, narrow, tmp_path, monkeypatch):
    """Accuracies as if the first epochs were best."""
    falling = iter([0.9, 0.8, 0.3, 0.5, 0.4])

    def evaluated(*_):
        step = {"mca": next(falling)}
        return {method: {"czsl": step, "gzsl": step, "transductive": False} for method in METHODS}

    monkeypatch.setattr("vggenc.zsl.run.evaluate", evaluated)
    monkeypatch.setattr("vggenc.zsl.run.best_steps", lambda _: {})
    recipe = replace(RECIPE, epochs=5, decay_every=2)
    run = train(data, tmp_path / "run", recipe, replace(SETUP, heads_only=True))
    assert (run["selection"]["epochs"], run["selection"]["mca"]) == (5, pytest.approx(0.4))


@pytest.mark.parametrize(("epochs", "every", "expected"), [(15, None, 0), (15, 10, 10), (5, 3, 3), (6, 3, 3)])
def test_the_last_fall_of_the_rates_is_counted_in_epochs(epochs, every, expected):
    assert Recipe(epochs=epochs, decay_every=every).last_fall == expected


@pytest.mark.slow
def test_the_published_way_of_choosing_is_named_in_the_report(data, narrow, tmp_path):
    recipe = replace(RECIPE, freeze="conv5_4")
    run = train(data, tmp_path / "run", recipe, replace(SETUP, heads_only=True, paper_selection=True))
    assert run["selection"]["on"].startswith("TEST images of unseen classes")
    report = make_report(tmp_path / "run", data)
    best = max(result["czsl"]["mca"] for result in report["results"].values())
    assert best == pytest.approx(run["selection"]["mca"], abs=1e-6)


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_encoder(toy, narrow, tmp_path):
    data = load_data(toy)
    setup = replace(SETUP, heads_only=True, cache=tmp_path / "grids")
    train(data, tmp_path / "calm", RECIPE, setup)
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, toy, tmp_path / "killed", tmp_path / "grids"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    while process.poll() is None and not (tmp_path / "killed" / "selection" / LAST).exists():
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "killed" / "model.safetensors").exists()
    train(data, tmp_path / "killed", RECIPE, setup)
    one, two = (VGG19Encoder.from_pretrained(tmp_path / name).state_dict() for name in ("calm", "killed"))
    assert all(torch.equal(one[key], two[key]) for key in one)


KILLED = """
import sys
sys.path.insert(0, "tests")
import pytest, test_zsl_training as t
from vggenc.zsl import load_data, train
from conftest import narrow
with pytest.MonkeyPatch.context() as patch:
    narrow.__wrapped__(patch)
    setup = t.replace(t.SETUP, heads_only=True, cache=sys.argv[3])
    train(load_data(sys.argv[1]), sys.argv[2], t.RECIPE, setup)
"""


COMMAND = """
import sys
sys.path.insert(0, "tests")
import pytest
from conftest import narrow
from vggenc.cli import main
with pytest.MonkeyPatch.context() as patch:
    narrow.__wrapped__(patch)
    sys.argv[0] = "vggenc"
    main()
"""


@pytest.mark.slow
def test_one_process_carries_on_what_two_of_torchrun_began(toy, tmp_path):
    (tmp_path / "run.py").write_text(COMMAND)
    train_it = ["zsl", "train", toy, "--output", tmp_path / "run", *HEADS, "--epochs", "6"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    two = subprocess.Popen(
        [*launch, tmp_path / "run.py", *map(str, train_it)],
        cwd=ROOT,
        env=environment,
    )
    history = tmp_path / "run" / "selection" / "history.csv"
    while two.poll() is None and not (history.exists() and history.read_text().count("\n") > 2):
        time.sleep(0.01)
    children = Path(f"/proc/{two.pid}/task/{two.pid}/children").read_text().split()
    for pid in [two.pid, *map(int, children)]:  # torchrun's own death would leave those at work
        os.kill(pid, signal.SIGKILL)
    two.wait()
    assert len(children) == 2
    assert not (tmp_path / "run" / "model.safetensors").exists()
    began = history.read_text().splitlines()
    one = subprocess.run(
        [sys.executable, "-c", COMMAND, *map(str, train_it)], cwd=ROOT, env=environment, capture_output=True
    )
    assert one.returncode == 0, one.stderr
    ended = history.read_text().splitlines()
    assert len(ended) == 7
    assert ended[: len(began)] == began
    assert (tmp_path / "run" / "model.safetensors").exists()


@pytest.mark.slow
@pytest.mark.parametrize("nodes", [1, 2])
def test_torchrun_trains_to_the_end_and_one_process_speaks(toy, narrow, tmp_path, nodes):
    """Two processes, on one node or on one each."""
    (tmp_path / "run.py").write_text(COMMAND)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        meet = f"127.0.0.1:{free.getsockname()[1]}"
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nnodes",
        nodes,
        "--nproc-per-node",
        2 // nodes,
    ]
    launch += ["--nnodes", nodes, "--nproc-per-node", 2 // nodes, "--local-addr", "127.0.0.1"]
    launch += ["--rdzv-backend", "c10d", "--rdzv-endpoint", meet]
    train_it = ["zsl", "train", toy, "--output", tmp_path / "run", *HEADS, "--epochs", "2", "--json"]
    runs = [
        subprocess.Popen(
            [str(word) for word in [*launch, tmp_path / "run.py", *train_it]],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(nodes)
    ]
    told = [run.communicate() for run in runs]
    assert [run.returncode for run in runs] == [0] * nodes, told
    assert not any(err for _, err in told), told
    assert json.loads("".join(out for out, _ in told))["folder"] == str(tmp_path / "run")
    VGG19Encoder.from_pretrained(tmp_path / "run").check_trained(["attributes"])


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_training_says_how_to_go_on(toy, tmp_path, number):
    command = ["zsl", "train", toy, "--output", tmp_path / "run", *HEADS, "--epochs", "50"]
    process = subprocess.Popen(
        [sys.executable, "-c", COMMAND, *map(str, command)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stderr=subprocess.PIPE,
        text=True,
    )
    while process.poll() is None and not (tmp_path / "run" / "selection" / LAST).exists():
        time.sleep(0.05)
    process.send_signal(number)
    told = process.communicate()[1]
    assert process.returncode == 1
    assert told.startswith(
        f"stopped; finished epochs are in {tmp_path}/run, this goes on:\n  vggenc zsl train "
    )
    assert "Traceback" not in told


def test_folders_with_other_files_and_other_writers_are_refused(data, tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "thesis.tex").write_text("")
    with pytest.raises(UsageError, match=r"holds other files, such as thesis\.tex"):
        train(data, tmp_path / "a", RECIPE, SETUP)
    from filelock import FileLock

    (tmp_path / "b").mkdir()
    with FileLock(tmp_path / "b" / ".vggenc-lock"), pytest.raises(StoreError, match="another process"):
        train(data, tmp_path / "b", RECIPE, SETUP)


# The command line


def test_commands_go_from_nothing_to_a_report(vggenc, narrow, tmp_path):
    toy, run = tmp_path / "toy", tmp_path / "run"
    assert vggenc("zsl", "make-toy", toy, "--images", 4).returncode == 0
    command = [
        "zsl",
        "train",
        toy,
        "--output",
        run,
        *HEADS,
        "--epochs",
        1,
        "--tensorboard",
    ]
    result = vggenc(*command)
    assert (result.returncode, result.stderr) == (0, "")
    assert "the heads and fc_layers, which the weights lack" in result.stdout
    assert "seen classes held out for validation" in result.stdout
    assert (run / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert list((run / "training" / "tensorboard").glob("events*"))
    result = vggenc("zsl", "evaluate", run, toy, "--calibration", "auto", "--device", "cpu")
    assert (result.returncode, result.stderr) == (0, "")
    split = load_data(toy).sha256()[:16]
    for said in (f"proposed split {split}", "T: transductive", "best of these in CZSL: ", "chance"):
        assert said in result.stdout
    report = json.loads((run / "report.json").read_text())
    assert report["best"] in METHODS
    shown = float(result.stdout.splitlines()[1].split()[2])
    assert shown == pytest.approx(100 * report["results"]["attributes"]["czsl"]["mca"], abs=0.05)
    result = vggenc("zsl", "evaluate", run, toy, "--split", "ss", "--device", "cpu")
    assert result.returncode == 2
    assert "was trained on another split" in result.stderr
    outputs = ["--outputs", "conv5_4,latent", "--output", tmp_path / "mat", "--device", "cpu"]
    result = vggenc("zsl", "export-features", run, toy, *outputs)
    assert result.stdout == f"{512 + 15} features of 84 images in {tmp_path}/mat\n"
    features = loadmat(tmp_path / "mat" / "res101.mat")
    assert features["features"].shape == (527, 84)
    again = load_data(tmp_path / "mat", images=toy / "JPEGImages")
    assert again.sha256() == load_data(toy).sha256()


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--device", "tpu"], "device 'tpu' can't be used"),
        (["--device", "cuda:99"], "device 'cuda:99' can't be used"),
        (["--engine", "magic"], "engine must be one of"),
        (["--image-size", 16], "image_size must be a whole number from 32"),
        (["--image-size", 500], "image_size below 240"),
        (["--num-workers", -1], "num_workers must be"),
        (["--precision", "int8"], "precision must be one of fp32, bf16"),
        (["--seed", -1], "seed"),
        (["--seed", 2**32], "seed must be 0 to 4294967295"),
        (["--epochs", 0], "epochs must be 1 to 10000"),
        (["--batch-size", 6], "batch_size must be a multiple of 4"),
    ],
)
def test_options_that_cannot_be_meant_are_told_before_a_folder_is_made(vggenc, toy, tmp_path, options, told):
    result = vggenc("zsl", "train", toy, "--output", tmp_path / "run", *HEADS, *options)
    assert result.returncode == 2
    assert told in result.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_an_image_that_was_mended_lets_the_same_command_go_on(vggenc, narrow, toy, tmp_path):
    shutil.copytree(toy, tmp_path / "toy")
    image = next((tmp_path / "toy").glob("JPEGImages/*/000.png"))
    content = image.read_bytes()
    image.write_bytes(content[:100])
    command = ["zsl", "train", tmp_path / "toy", "--output", tmp_path / "run", *HEADS, "--epochs", 1]
    result = vggenc(*command)
    assert result.returncode == 1
    assert f"{image} can't be used: " in result.stderr
    image.write_bytes(content)
    (tmp_path / "run" / ".run.json").write_text("left by a kill")
    (tmp_path / "run" / ".model.safetensors.77").write_text("left by another")
    assert vggenc(*command).returncode == 0
    assert not (tmp_path / "run" / ".model.safetensors.77").exists()
    result = vggenc(*command[:-2], "--epochs", 2)
    assert "recipe.epochs was 1, now 2" in result.stderr


def test_a_shared_cache_of_other_images_is_refused(data, narrow, tmp_path):
    cache_grids(fresh(data).encoder, data.images(data.trainval), tmp_path / "grids", SMALL)
    with pytest.raises(UsageError, match=r"grids can't be the cache of this run: .*input files differ"):
        train(data, tmp_path / "run", RECIPE, replace(SETUP, heads_only=True, cache=tmp_path / "grids"))


@pytest.mark.parametrize("calibration", ["nan", "inf", "much"])
def test_a_calibration_that_is_no_number_is_a_usage_error(vggenc, toy, calibration):
    result = vggenc("zsl", "evaluate", "run", toy, "--calibration", calibration)
    assert result.returncode == 2
    assert f"--calibration must be a number or auto; got '{calibration}'" in result.stderr


def test_what_is_no_run_is_told(vggenc, toy, tmp_path):
    (tmp_path / "run").mkdir()
    command = ["zsl", "evaluate", tmp_path / "run", toy, "--device", "cpu"]
    result = vggenc(*command, "--output", tmp_path / "nowhere" / "report.json")
    assert "report.json can't be written: it must be a file in a folder that is there" in result.stderr
    assert "is neither a run of 'vggenc zsl train' nor" in vggenc(*command).stderr
    (tmp_path / "run" / "run.json").write_text('{"format": 1}')
    (tmp_path / "run" / "model.safetensors").write_text("")
    result = vggenc(*command)
    assert result.returncode == 1
    assert "run.json can't be read as a run: 'settings'" in result.stderr


# Published checkpoints


def test_published_checkpoints_load_strictly_and_can_be_evaluated(data, narrow, make_lfgaa, tmp_path):
    state = make_lfgaa(data.k)
    torch.save(state, tmp_path / "ckpt_epoch_12.pth")
    encoder = VGG19Encoder.from_lfgaa(tmp_path / "ckpt_epoch_12.pth")
    assert not encoder.training
    encoder.check_trained(["attributes"])
    options = Options(image_size=32, num_workers=0)
    report = make_report(tmp_path / "ckpt_epoch_12.pth", data, options=options)
    assert report["selection"] is None
    assert report["run"]["weights"] == "ckpt_epoch_12.pth"
    for key, told in (("bn2.weight", "misses bn2.weight"), ("fc4.weight", "misses fc4.weight")):
        torch.save({name: v for name, v in state.items() if name != key}, tmp_path / "cut.pth")
        with pytest.raises(WeightsError, match=told):
            VGG19Encoder.from_lfgaa(tmp_path / "cut.pth")
    torch.save({name: v for name, v in state.items() if not name.startswith("fc0")}, tmp_path / "cut.pth")
    with pytest.raises(WeightsError, match="no checkpoint of LFGAA's VGG19: it lacks fc0"):
        VGG19Encoder.from_lfgaa(tmp_path / "cut.pth")


@pytest.fixture
def make_lfgaa():
    def make(k: int) -> dict[str, torch.Tensor]:
        encoder = VGG19Encoder(k, backbone="vgg19_bn", weights=None)
        state = encoder.state_dict()
        assert len(state) == 144
        return state

    return make


# Real photographs


@pytest.mark.slow
@pytest.mark.skipif(not (SHARED_DATA / "awa2-mini").is_dir(), reason="needs the data set awa2-mini")
def test_awa2_mini_in_a_shortened_form_tells_its_seen_classes_apart(tmp_path):
    data = load_data(SHARED_DATA / "awa2-mini")
    some = [images[::5] for images in (data.trainval, data.test_seen, data.test_unseen)]
    rows = np.concatenate(some)
    ends = np.cumsum([0, *map(len, some)])
    short = replace(
        data,
        paths=tuple(data.paths[i] for i in rows),
        labels=data.labels[rows],
        trainval=np.arange(ends[0], ends[1]),
        test_seen=np.arange(ends[1], ends[2]),
        test_unseen=np.arange(ends[2], ends[3]),
    )
    recipe = Recipe(epochs=3, backbone_lr=0, fc_lr=1e-4, head_lr=1e-3, image_size=128)
    setup = replace(SETUP, heads_only=True, engine="auto")
    train(short, tmp_path / "run", recipe, setup)
    results = make_report(tmp_path / "run", short)["results"]
    assert results["attributes"]["gzsl"]["seen"] > 0.4  # of nine
