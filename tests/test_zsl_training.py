import csv
import os
import socket
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image

from vggenc import DataError, Options, UsageError, VGG19Encoder, VggencError
from vggenc.zsl import Recipe, Setup
from vggenc.zsl.balance import balance_stages, scale_stages
from vggenc.zsl.batches import ClassBalanced, Grids, ImageBatches, cache_grids
from vggenc.zsl.training import LAST, Training, fit

RECIPE = Recipe(epochs=2, backbone_lr=1e-4, fc_lr=1e-3, head_lr=1e-3, batch_size=32, image_size=32)
GENTLE = replace(RECIPE, backbone_lr=1e-5, fc_lr=1e-5, head_lr=1e-5)  # at which rounding doesn't grow
SETUP = Setup(weights="OXFORD_V1", device="cpu", num_workers=0)
SMALL = Options(image_size=32, num_workers=0, allow_untrained=True)


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


@pytest.mark.slow
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


def test_losses_that_become_nan_end_the_training(data, narrow, tmp_path):
    module = fresh(data, replace(RECIPE, freeze="conv5_4"))
    torch.nn.init.constant_(module.encoder.fc4.bias, float("nan"))
    with pytest.raises(VggencError, match="the losses of epoch 1 are NaN or infinite"):
        fit(module, tmp_path, epochs=2)
    assert not (tmp_path / LAST).exists()


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
from pathlib import Path
sys.path.insert(0, "tests")
import pytest, test_zsl_training as t
from conftest import narrow
from vggenc.zsl import load_data
with pytest.MonkeyPatch.context() as patch:
    narrow.__wrapped__(patch)
    data = load_data(sys.argv[1])
    module = t.fresh(data, t.replace(t.GENTLE, freeze="fc7"))
    t.fit(module, Path(sys.argv[2]), epochs=2, devices=2)
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
