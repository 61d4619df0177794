import csv
import json
import os
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
from PIL import Image
from scipy.io import loadmat

from vggenc import DataError, Options, StoreError, UsageError, VGG19Encoder, WeightsError
from vggenc.zsl import Recipe, Setup, evaluate, load_data, make_report, make_toy, predict, train
from vggenc.zsl.balance import balance_stages, scale_stages
from vggenc.zsl.batches import ClassBalanced, Grids, ImageBatches, cache_grids
from vggenc.zsl.evaluation import METHODS
from vggenc.zsl.training import LAST, Training, fit

RECIPE = Recipe(epochs=2, backbone_lr=1e-4, fc_lr=1e-3, head_lr=1e-3, batch_size=32, image_size=32)
GENTLE = replace(RECIPE, backbone_lr=1e-5, fc_lr=1e-5, head_lr=1e-5)  # at which rounding doesn't grow
SETUP = Setup(weights="OXFORD_V1", device="cpu", num_workers=0)
SMALL = Options(image_size=32, num_workers=0, allow_untrained=True)
HEADS = ["--heads-only", "--weights", "OXFORD_V1", "--image-size", 32, "--device", "cpu"]


@pytest.fixture(scope="session")
def toy(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("zsl") / "toy"
    make_toy(folder, images=8)
    return folder


@pytest.fixture
def data(toy):
    return load_data(toy)


def fresh(data, recipe=RECIPE, **options) -> Training:
    torch.manual_seed(0)
    encoder = VGG19Encoder(data.k, weights="OXFORD_V1")
    if recipe.freeze:
        encoder.freeze(recipe.freeze)
    return Training(encoder, data, recipe, seed=3, **options)


def losses(history) -> list[list[float]]:
    return [[row[name] for name in ("loss", "attribute_loss", "latent_loss")] for row in history]


# Batches


def test_batches_hold_four_images_of_each_of_their_classes():
    labels = np.repeat(np.arange(10), 9)
    for batch in ClassBalanced(labels, 24, seed=0):
        assert set(np.bincount(labels[[row for row, _ in batch]])) <= {0, 4}
        assert len(batch) == 24


def test_batches_are_drawn_by_seed_and_epoch_alone():
    labels = np.repeat(np.arange(6), 8)
    first, again, other = (ClassBalanced(labels, 8, seed=seed) for seed in (1, 1, 2))
    begun = list(first)
    again.set_epoch(1)
    assert list(again) != begun
    again.set_epoch(0)
    assert list(again) == begun
    assert list(other) != begun


def test_processes_share_each_batch_without_losing_or_doubling_an_image():
    labels = np.repeat(np.arange(6), 8)
    whole = list(ClassBalanced(labels, 16, seed=0))
    halves = [list(ClassBalanced(labels, 16, seed=0, rank=rank, world=2)) for rank in (0, 1)]
    assert [a + b for a, b in zip(*halves, strict=True)] == whole
    with pytest.raises(UsageError, match="16 images in a batch can't be shared by 3"):
        ClassBalanced(labels, 16, seed=0, world=3)


def test_too_few_classes_for_a_batch_make_it_smaller():
    assert ClassBalanced(np.repeat(np.arange(3), 8), 32, seed=0).batch_size == 12


def test_crops_are_the_same_for_the_same_seed_and_epoch_and_others_otherwise(data, oxford):
    def batch(seed, epoch):
        images = ImageBatches(
            data.images(data.trainval), data.labels[data.trainval], oxford.preprocess.at(32), seed=seed
        )
        return images[[(0, epoch), (5, epoch)]][0]

    assert torch.equal(batch(0, 1), batch(0, 1))
    assert not torch.equal(batch(0, 1), batch(0, 2))
    assert not torch.equal(batch(0, 1), batch(1, 1))


def test_an_image_that_cannot_be_read_is_an_error_that_names_it(data, narrow, tmp_path):
    bad = replace(data, paths=("nothing.png", *data.paths[1:]))
    with pytest.raises(DataError, match=r"nothing\.png.*no such file"):
        fit(fresh(bad), tmp_path, epochs=2)


# Training


def test_a_stopped_training_goes_on_bit_by_bit(data, narrow, tmp_path):
    calm = fresh(data)
    expected = fit(calm, tmp_path / "calm", epochs=3)
    fit(fresh(data), tmp_path / "stopped", epochs=1)
    again = fresh(data)
    assert losses(fit(again, tmp_path / "stopped", epochs=3)) == losses(expected)
    for key, value in calm.encoder.state_dict().items():
        assert torch.equal(again.encoder.state_dict()[key], value), key
    with (tmp_path / "stopped" / "history.csv").open() as stream:
        assert [float(row["loss"]) for row in csv.DictReader(stream)] == [row["loss"] for row in expected]


def test_cached_maps_train_as_the_images_do(data, narrow, tmp_path):
    recipe = replace(GENTLE, freeze="conv5_4", augment=False)
    cache_grids(fresh(data).encoder, data.images(np.arange(len(data.paths))), tmp_path / "grids", SMALL)
    cached = fit(fresh(data, recipe, grids=Grids(tmp_path / "grids")), tmp_path / "cached", epochs=2)
    direct = fit(fresh(data, recipe), tmp_path / "direct", epochs=2)
    np.testing.assert_allclose(losses(cached), losses(direct), rtol=1e-4)


def test_frozen_stages_do_not_change_and_the_others_do(data, narrow, tmp_path):
    module = fresh(data, replace(RECIPE, freeze="conv4_4"))
    before = {key: value.clone() for key, value in module.encoder.state_dict().items()}
    fit(module, tmp_path, epochs=1)
    changed = {
        key.split(".")[0] for key, v in module.encoder.state_dict().items() if not v.equal(before[key])
    }
    assert {"conv2_2", "conv3_4", "conv4_4"}.isdisjoint(changed)
    assert {"conv5_4", "fc_layers", "fc4", "bn1", "bn2", "extract_0", "fc0"} <= changed


def test_rates_fall_to_a_tenth_after_the_epochs_of_the_recipe(data, narrow, tmp_path):
    module = fresh(data, replace(RECIPE, decay_every=1, freeze="conv5_4"))
    fit(module, tmp_path, epochs=2)
    saved = torch.load(tmp_path / LAST, weights_only=True)
    rates = [group["lr"] for group in saved["optimizer_states"][0]["param_groups"]]
    assert rates == pytest.approx([1e-3 * 0.01] * 4)


PROCESS = """
import sys
sys.path.insert(0, "tests")
import pytest, test_zsl_training as t
from conftest import narrow
with pytest.MonkeyPatch.context() as patch:
    narrow.__wrapped__(patch)
    data = t.load_data(sys.argv[1])
    module = t.fresh(data, t.replace(t.GENTLE, freeze="fc7"))
    t.fit(module, t.Path(sys.argv[2]), epochs=2, devices=2)
"""


@pytest.mark.slow
def test_two_processes_train_as_one_does_with_the_same_batches(data, toy, narrow, tmp_path):
    """Under DDP with gloo; frozen `fc_layers`, since dropout differs from process to process."""
    expected = fit(fresh(data, replace(GENTLE, freeze="fc7")), tmp_path / "one", epochs=2)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    launch += ["--master-addr", "127.0.0.1", "--master-port", port]
    (tmp_path / "run.py").write_text(PROCESS)
    subprocess.run(
        [*launch, tmp_path / "run.py", toy, tmp_path / "two"],
        check=True,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        timeout=300,
    )
    with (tmp_path / "two" / "history.csv").open() as stream:
        rows = [
            [float(row[name]) for name in ("loss", "attribute_loss", "latent_loss")]
            for row in csv.DictReader(stream)
        ]
    np.testing.assert_allclose(rows, losses(expected), rtol=1e-4)


@pytest.mark.slow
def test_full_fine_tuning_at_224_runs_and_learns(data, tmp_path):
    few = replace(data, trainval=data.trainval[[0, 1, 2, 3, 6, 7, 8, 9]])
    module = fresh(few, replace(RECIPE, image_size=224, batch_size=8))
    module.encoder.set_grad_checkpointing()
    history = fit(module, tmp_path, epochs=3)
    assert history[-1]["loss"] < history[0]["loss"]


# Runs


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
from conftest import narrow
with pytest.MonkeyPatch.context() as patch:
    narrow.__wrapped__(patch)
    setup = t.replace(t.SETUP, heads_only=True, cache=sys.argv[3])
    t.train(t.load_data(sys.argv[1]), sys.argv[2], t.RECIPE, setup)
"""


def test_folders_with_other_files_and_other_writers_are_refused(data, tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "thesis.tex").write_text("")
    with pytest.raises(UsageError, match=r"holds other files, such as thesis\.tex"):
        train(data, tmp_path / "a", RECIPE, SETUP)
    from filelock import FileLock

    (tmp_path / "b").mkdir()
    with FileLock(tmp_path / "b" / ".vggenc-lock"), pytest.raises(StoreError, match="another process"):
        train(data, tmp_path / "b", RECIPE, SETUP)


# Evaluation


@torch.no_grad()
def test_predictions_are_those_of_forward_and_of_the_cached_maps(data, narrow, tmp_path):
    encoder = fresh(data).encoder.eval()
    which = np.array([3, 40, 7])
    found = predict(encoder, data, which, options=SMALL)
    dataset = ImageBatches(
        data.images(which), data.labels[which], encoder.preprocess.at(32), seed=0, augment=False
    )
    pixels = dataset[[(0, 0), (1, 0), (2, 0)]][0]
    expected = encoder(encoder.preprocess.normalize(pixels))
    np.testing.assert_allclose(found.attributes[which], expected.attributes, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(found.latent[which], expected.latent, rtol=1e-4, atol=1e-4)
    assert np.isnan(found.latent[0]).all()
    cache_grids(encoder, data.images(np.arange(len(data.paths))), tmp_path / "grids", SMALL)
    cached = predict(encoder.train(), data, which, grids=Grids(tmp_path / "grids"))
    assert encoder.training
    np.testing.assert_allclose(cached.latent[which], expected.latent, rtol=1e-4, atol=1e-4)


def test_attributes_of_the_classes_themselves_are_evaluated_as_perfect(data):
    from vggenc.zsl import Predictions

    own = data.attributes[data.labels]
    results = evaluate(data, Predictions(own, own))
    assert set(results) == set(METHODS)
    for method in ("attributes", "hybrid"):
        assert results[method]["czsl"]["mca"] == 1
        assert [results[method]["gzsl"][name] for name in ("unseen", "seen", "h")] == [1, 1, 1]
    assert [method for method, result in results.items() if result["transductive"]] == [
        "self-adaptation",
        "self-adaptation, Euclidean",
    ]


def test_calibration_moves_images_from_seen_to_unseen_classes(data):
    from vggenc.zsl import Predictions

    noise = np.random.default_rng(0).normal(0, 60, (len(data.paths), data.k)).astype(np.float32)
    predictions = Predictions(data.attributes[data.labels] + noise, noise)
    plain, moved = (evaluate(data, predictions, calibration=x)["attributes"]["gzsl"] for x in (0.0, 0.3))
    assert moved["unseen"] > plain["unseen"]
    assert moved["seen"] < plain["seen"]


def test_a_class_without_test_images_is_left_out_and_named(data, narrow, tmp_path):
    fewer = replace(data, test_unseen=data.test_unseen[data.labels[data.test_unseen] != data.unseen[0]])
    encoder = fresh(data).encoder
    encoder.mark_trained()
    encoder.save_pretrained(tmp_path / "model")
    report = make_report(tmp_path / "model", fewer, options=Options(image_size=32, num_workers=0))
    assert report["left_out"] == [data.classes[data.unseen[0]]]
    assert len(report["results"]["attributes"]["czsl"]["by_class"]) == 4
    assert report["chance"] == 1 / 5


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
        "--num-workers",
        0,
        "--tensorboard",
    ]
    result = vggenc(*command)
    assert (result.returncode, result.stderr) == (0, "")
    assert "up to conv5_4" in result.stdout
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


def test_the_same_toy_is_drawn_for_the_same_seed(tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        make_toy(tmp_path / name, images=4, seed=seed)
    files = sorted(file.relative_to(tmp_path / "a") for file in (tmp_path / "a").rglob("*") if file.is_file())
    assert all((tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes() for file in files)
    assert load_data(tmp_path / "a").classes != load_data(tmp_path / "c").classes
    with pytest.raises(UsageError, match="isn't empty"):
        make_toy(tmp_path / "a")


def test_toy_classes_have_one_word_of_each_kind_and_every_word_is_seen(data):
    assert (data.attributes.sum(1) == 500).all()
    assert (data.attributes[data.seen].sum(0) >= 200).all()


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


# The scale of the stages


@torch.no_grad()
def test_balanced_stages_are_the_same_maps_times_powers_of_two(data, narrow, oxford):
    encoder = VGG19Encoder(data.k, weights="OXFORD_V1").eval()
    exponents = balance_stages(encoder, data, SMALL)
    images = torch.stack(
        [oxford.preprocess.at(32)(Image.open(f)) for f in sorted(data.root.glob("*/000.png"))]
    )
    before, after = oxford.encode(images), encoder.encode(images)
    for name, maps in after.items():
        torch.testing.assert_close(maps, before[name] * 2.0 ** exponents[name], rtol=1e-5, atol=1e-6)
    assert 0.1 < after["conv5_4"].square().mean().sqrt() < 1


@torch.no_grad()
def test_scaled_stages_leave_what_trained_fc_layers_give(make_encoder):
    encoder = make_encoder(backbone="vgg19", own=True)
    images = torch.randn(2, 3, 64, 64)
    expected = encoder.encode(images, ["fc7"])["fc7"]
    first = encoder.fc_layers[0].weight.clone()
    scale_stages(encoder, {"conv2_2": -3, "conv3_4": 2, "conv4_4": 1, "conv5_4": -2})
    torch.testing.assert_close(encoder.encode(images, ["fc7"])["fc7"], expected)
    encoder.fc_layers[0].weight.copy_(first)  # shared with other tests
