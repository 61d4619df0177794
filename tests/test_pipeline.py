import json
import os
import resource
import signal

import numpy as np
import pyarrow as pa
import pytest
import torch
from conftest import PHOTOGRAPHS
from PIL import Image
from safetensors.numpy import load_file

from vggenc import (
    Options,
    UsageError,
    VGG19Encoder,
    compute,
    engines,
    extract,
    iter_features,
    pipeline,
    read_features,
)
from vggenc.images import decode

SMALL = Options(image_size=32, part_size=4, batch_size=3, num_workers=0)


def values(table: pa.Table, name: str) -> np.ndarray:
    """A column as rows of numbers, NaN where null."""
    width = table.schema.field(name).type.list_size
    return np.array([row if row is not None else [np.nan] * width for row in table[name].to_pylist()])


def bytes_of(folder) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.glob("part-*")}


@torch.no_grad()
def test_features_equal_encode_and_pooling_by_hand(oxford, tmp_path):
    outputs = ["conv5_4", "conv2_2"]
    options = Options(image_size=64, num_workers=0, batch_size=5, full_decode=True)
    extract(PHOTOGRAPHS, oxford, outputs, tmp_path / "avg", options=options)
    extract(
        PHOTOGRAPHS,
        oxford,
        outputs,
        tmp_path / "max",
        options=Options(pool="max", image_size=64, num_workers=0, full_decode=True),
    )
    table = read_features(tmp_path / "avg")
    assert table.column_names == ["path", "status", "error", "width", "height", *outputs]
    files = sorted(file for file in PHOTOGRAPHS.iterdir() if file.suffix != ".md")
    assert table["path"].to_pylist() == [file.name for file in files]
    images = torch.stack([oxford.preprocess.at(64)(decode(file)) for file in files])
    for name, maps in oxford.encode(images, outputs).items():
        scale = maps.abs().max().item()
        assert abs(values(table, name) - maps.mean((2, 3)).numpy()).max() <= 1e-4 * scale
        maximum = values(read_features(tmp_path / "max"), name)
        assert abs(maximum - maps.amax((2, 3)).numpy()).max() <= 1e-4 * scale


def test_exif_size_is_that_of_the_upright_picture(oxford, tmp_path):
    extract(PHOTOGRAPHS / "coffee-turned.jpg", oxford, ["conv2_2"], tmp_path / "f", options=SMALL)
    row = read_features(tmp_path / "f").to_pylist()[0]
    with Image.open(PHOTOGRAPHS / "coffee-turned.jpg") as stored:
        assert (row["height"], row["width"]) == stored.size


def spoil(folder) -> list[str]:
    """Give a folder damaged files between the good ones, and name them."""
    (folder / "0empty.jpg").write_bytes(b"")
    (folder / "3text.jpg").write_text("not a picture")
    (folder / "6link.png").symlink_to("nowhere")
    whole = (folder / "5.png").read_bytes()
    (folder / "5cut.png").write_bytes(whole[: len(whole) // 2])
    return ["0empty.jpg", "3text.jpg", "5cut.png", "6link.png"]


@pytest.mark.parametrize(
    "options", [{"num_workers": 0}, {"num_workers": 3}, {"batch_size": 1}, {"part_size": 5}]
)
def test_rows_and_values_do_not_depend_on_workers_batches_and_failures(oxford, folder, tmp_path, options):
    extract(folder, oxford, ["conv2_2"], tmp_path / "clean", options=SMALL)
    clean = read_features(tmp_path / "clean")
    bad = spoil(folder)
    settings = {"image_size": 32, "part_size": 4, "batch_size": 3, "num_workers": 0} | options
    summary = extract(folder, oxford, ["conv2_2"], tmp_path / "spoilt", options=Options(**settings))
    spoilt = read_features(tmp_path / "spoilt")
    assert (summary.images, summary.failed) == (14, 4)
    paths = spoilt["path"].to_pylist()
    assert paths == sorted(paths)
    failed = pa.compute.equal(spoilt["status"], "failed")
    assert spoilt.filter(failed)["path"].to_pylist() == bad
    assert all(spoilt.filter(failed)["error"].to_pylist())
    assert spoilt.filter(failed)["conv2_2"].null_count == 4
    good = spoilt.filter(pa.compute.invert(failed))
    assert good["path"].to_pylist() == clean["path"].to_pylist()
    scale = values(clean, "conv2_2").max()
    assert abs(values(good, "conv2_2") - values(clean, "conv2_2")).max() <= 1e-4 * scale


def test_same_run_twice_gives_the_same_bytes(oxford, folder, tmp_path):
    for name in ("one", "two"):
        extract(folder, oxford, output=tmp_path / name, options=SMALL)
    assert bytes_of(tmp_path / "one") == bytes_of(tmp_path / "two")


def test_resuming_computes_only_what_is_missing_and_gives_the_same_bytes(
    oxford, folder, tmp_path, monkeypatch
):
    extract(folder, oxford, ["conv2_2"], tmp_path / "f", options=SMALL)
    whole = bytes_of(tmp_path / "f")
    (tmp_path / "f" / "part-00001.parquet").unlink()
    (tmp_path / "f" / ".vggenc-part-00001.parquet").write_text("left by a killed run")
    summary = extract(folder, oxford, ["conv2_2"], tmp_path / "f", options=SMALL)
    assert (summary.images, summary.computed) == (10, 4)
    assert bytes_of(tmp_path / "f") == whole
    assert sorted(file.name for file in (tmp_path / "f").iterdir()) == ["manifest.json", *sorted(whole)]
    monkeypatch.setattr(pipeline.Engine, "submit", None)  # nothing is computed for a finished folder
    assert extract(folder, oxford, ["conv2_2"], tmp_path / "f", options=SMALL).computed == 0


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"pool": "max"}, "pool was 'avg', now 'max'"),
        ({"image_size": 40}, "preprocess.crop was 32, now 40"),
        ({"dtype": "float16"}, "dtype"),
        ({"precision": "bf16"}, "precision"),
        ({"part_size": 5}, "part_size was 4, now 5"),
    ],
)
def test_other_settings_are_refused_and_leave_the_folder_as_it_is(oxford, folder, tmp_path, change, told):
    extract(folder, oxford, ["conv2_2"], tmp_path / "f", options=SMALL)
    before = bytes_of(tmp_path / "f")
    settings = {"image_size": 32, "part_size": 4, "batch_size": 3, "num_workers": 0} | change
    with pytest.raises(UsageError, match=told):
        extract(folder, oxford, ["conv2_2"], tmp_path / "f", options=Options(**settings))
    assert bytes_of(tmp_path / "f") == before


def test_other_weights_inputs_and_outputs_are_refused_until_overwritten(
    oxford, make_encoder, folder, tmp_path
):
    extract(folder, oxford, ["conv2_2"], tmp_path / "f", options=SMALL)
    with pytest.raises(UsageError, match=r"outputs\.conv3_4"):
        extract(folder, oxford, ["conv3_4"], tmp_path / "f", options=SMALL)
    with pytest.raises(UsageError, match="parameters_sha256"):
        extract(folder, make_encoder(backbone="vgg19"), ["conv2_2"], tmp_path / "f", options=SMALL)
    Image.new("RGB", (99, 99)).save(folder / "1.png")
    with pytest.raises(UsageError, match="the input files differ"):
        extract(folder, oxford, ["conv2_2"], tmp_path / "f", options=SMALL)
    extract(folder, oxford, ["conv3_4"], tmp_path / "f", options=SMALL, overwrite=True)
    assert read_features(tmp_path / "f").column_names[-1] == "conv3_4"


def test_fine_tuned_values_are_other_settings(make_encoder, folder, tmp_path):
    encoder = make_encoder(own=True)
    extract(folder, encoder, ["conv2_2"], tmp_path / "f", options=SMALL)
    with torch.no_grad():
        encoder.fc4.bias.add_(1)  # not behind conv2_2
        extract(folder, encoder, ["conv2_2"], tmp_path / "f", options=SMALL)
        encoder.conv2_2[0].bias.add_(1)
    with pytest.raises(UsageError, match="parameters_sha256"):
        extract(folder, encoder, ["conv2_2"], tmp_path / "f", options=SMALL)


def test_extraction_leaves_the_encoder_as_it_was(make_encoder, folder, tmp_path):
    encoder = make_encoder(own=True).train()
    encoder.freeze("conv2_2")
    before = {key: value.clone() for key, value in encoder.state_dict().items()}
    modes = [module.training for module in encoder.modules()]
    extract(folder, encoder, ["conv3_4"], tmp_path / "f", options=SMALL)
    assert modes == [module.training for module in encoder.modules()]
    assert all(torch.equal(value, before[key]) for key, value in encoder.state_dict().items())


def test_untrained_outputs_need_the_flag(oxford, folder, tmp_path):
    with pytest.raises(UsageError, match="never trained"):
        extract(folder, oxford, ["fc7"], tmp_path / "f", options=SMALL)
    assert not (tmp_path / "f").exists()
    options = Options(image_size=32, num_workers=0, allow_untrained=True)
    extract(folder, oxford, ["attention", "latent"], tmp_path / "f", options=options)
    table = read_features(tmp_path / "f")
    attention = values(table, "attention").reshape(10, 4, 3)
    assert attention.sum(2) == pytest.approx(1, abs=1e-5)
    manifest = json.loads(table.schema.metadata[b"vggenc"])
    assert manifest["settings"]["outputs"] == {"attention": [4, 3], "latent": [3]}


def test_whole_maps_are_written_beside_the_table(oxford, folder, tmp_path):
    spoil(folder)
    options = Options(pool="none", image_size=32, part_size=4, batch_size=3, num_workers=0)
    extract(folder, oxford, ["conv2_2", "conv5_4"], tmp_path / "maps", options=options)
    extract(folder, oxford, ["conv2_2"], tmp_path / "avg", options=SMALL)
    table = read_features(tmp_path / "maps")
    assert table.column_names == ["path", "status", "error", "width", "height"]
    parts = [load_file(file) for file in sorted((tmp_path / "maps").glob("*.safetensors"))]
    maps = np.concatenate([part["conv2_2"] for part in parts])
    assert maps.shape == (14, 128, 16, 16)
    assert parts[0]["conv5_4"].shape == (4, 512, 2, 2)
    expected = values(read_features(tmp_path / "avg"), "conv2_2")
    np.testing.assert_allclose(maps.mean((2, 3)), expected, rtol=1e-5)  # NaN equals NaN here: failed rows


def test_infinite_values_are_never_ok(oxford, tmp_path):
    Image.new("RGB", (40, 40), "white").save(tmp_path / "a.png")
    loud = VGG19Encoder(1, weights="OXFORD_V1")
    with torch.no_grad():
        loud.conv2_2[7].weight.mul_(1e6)
    options = Options(image_size=32, dtype="float16", num_workers=0)
    summary = extract(tmp_path / "a.png", loud, ["conv2_2"], tmp_path / "f", options=options)
    assert summary.failed == 1
    [row] = read_features(tmp_path / "f").to_pylist()
    assert row["status"] == "failed"
    assert "NaN or infinity in conv2_2" in row["error"]
    assert row["conv2_2"] is None


def test_float16_on_request(oxford, folder, tmp_path):
    options = Options(image_size=32, dtype="float16", num_workers=0)
    extract(folder, oxford, ["conv4_4"], tmp_path / "half", options=options)
    extract(folder, oxford, ["conv4_4"], tmp_path / "full", options=SMALL)
    half = read_features(tmp_path / "half")
    assert half.schema.field("conv4_4").type == pa.list_(pa.float16(), 512)
    np.testing.assert_allclose(
        values(half, "conv4_4"), values(read_features(tmp_path / "full"), "conv4_4"), rtol=2e-3, atol=1e-3
    )


def test_bf16_keeps_every_row(oxford, monkeypatch):
    monkeypatch.setattr(engines, "has_bf16", lambda device: True)  # no warning that a stand-in is slow
    rows = {}
    for precision in ("fp32", "bf16"):
        options = Options(image_size=64, precision=precision, num_workers=0)
        [batch] = iter_features(PHOTOGRAPHS, oxford, ["conv3_4", "conv5_4"], options=options)
        rows[precision] = batch.features
    for name, full in rows["fp32"].items():
        half = rows["bf16"][name]
        assert half.dtype == np.float32
        cosine = (full * half).sum(1) / np.linalg.norm(full, axis=1) / np.linalg.norm(half, axis=1)
        assert cosine.min() >= 0.9999
        assert not np.array_equal(full, half)


def test_encoder_of_half_precision_is_run_as_it_is(make_encoder, folder):
    encoder = make_encoder(own=True)
    options = Options(image_size=32, num_workers=0)
    [full] = iter_features(folder, encoder, ["conv3_4"], options=options)
    [half] = iter_features(folder, encoder.bfloat16(), ["conv3_4"], options=options)
    np.testing.assert_allclose(half.features["conv3_4"], full.features["conv3_4"], atol=0.02, rtol=0.05)


def test_iterator_gives_the_rows_and_values_of_the_store(oxford, folder, tmp_path):
    spoil(folder)
    options = Options(image_size=32, part_size=6, batch_size=3, num_workers=0)
    extract(folder, oxford, ["conv2_2"], tmp_path / "f", options=options)
    table = read_features(tmp_path / "f")
    batches = list(iter_features(folder, oxford, ["conv2_2"], options=options))
    assert [len(batch.rows) for batch in batches] == [3, 3, 3, 3, 2]
    assert [row._asdict() for batch in batches for row in batch.rows] == table.drop_columns(
        "conv2_2"
    ).to_pylist()
    np.testing.assert_array_equal(
        np.concatenate([batch.features["conv2_2"] for batch in batches]), values(table, "conv2_2")
    )


def test_mistakes_are_told_when_called_not_when_iterated(oxford, folder):
    with pytest.raises(UsageError):
        iter_features(folder, oxford, ["conv1_1"])
    with pytest.raises(UsageError):
        iter_features("nowhere", oxford)


class Killer(pipeline.ImageDataset):
    """Kills the process that decodes certain files, once or always."""

    always: tuple[str, ...] = ()
    once: tuple[str, ...] = ()

    def item(self, index, source):
        name = self.images.paths[index]
        marker = os.path.join(self.images.root, f"killed-{os.path.basename(name)}")
        if name in self.always or (name in self.once and not os.path.exists(marker)):
            open(marker, "w").close()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().item(index, source)


def test_worker_that_dies_costs_at_most_the_file_that_kills_it(
    oxford, folder, tmp_path, monkeypatch, watchful_loader
):
    options = Options(image_size=32, batch_size=2, num_workers=2)
    [*expected] = iter_features(folder, oxford, ["conv2_2"], options=options)
    monkeypatch.setattr(compute, "ImageDataset", Killer)
    monkeypatch.setattr(Killer, "once", ("4.png",))
    monkeypatch.setattr(Killer, "always", ("deep/3.png",))
    batches = list(iter_features(folder, oxford, ["conv2_2"], options=options))
    rows = [row for batch in batches for row in batch.rows]
    assert [row.path for row in rows] == [row.path for batch in expected for row in batch.rows]
    assert [(row.path, row.error) for row in rows if row.status != "ok"] == [
        ("deep/3.png", "the process that decoded it died")
    ]
    good = [row.status == "ok" for row in rows]
    np.testing.assert_allclose(
        np.concatenate([batch.features["conv2_2"] for batch in batches])[good],
        np.concatenate([batch.features["conv2_2"] for batch in expected])[good],
        rtol=1e-5,
        atol=1e-3,
    )


def test_batches_arrive_where_shared_memory_is_too_small(oxford, folder):
    options = Options(image_size=32, batch_size=5, num_workers=1)
    [*expected] = iter_features(folder, oxford, ["conv2_2"], options=options)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))  # which counts for shared memory too
    try:
        [*batches] = iter_features(folder, oxford, ["conv2_2"], options=options)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [batch.rows for batch in batches] == [batch.rows for batch in expected]
    for batch, other in zip(batches, expected, strict=True):
        np.testing.assert_array_equal(batch.features["conv2_2"], other.features["conv2_2"])


def test_memory_does_not_grow_with_the_number_of_images(oxford, folder):
    import tracemalloc

    options = Options(image_size=32, batch_size=2, num_workers=0)
    names = [str(folder / "1.png"), *map(str, folder.glob("*.png"))]
    peaks = []
    for repeat in (1, 20):
        links = folder.parent / f"links{repeat}"
        links.mkdir()
        for i in range(10 * repeat):
            (links / f"{i:04}.png").symlink_to(names[i % len(names)])
        tracemalloc.start()
        for _ in iter_features(links, oxford, ["conv2_2"], options=options):
            pass
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < peaks[0] + 200_000  # 190 more paths, not 190 more feature rows of 64 KiB


needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")


@needs_cuda
def test_cuda_extraction_agrees_with_the_cpu(oxford, tmp_path):
    options = Options(num_workers=0)
    extract(PHOTOGRAPHS, oxford, output=tmp_path / "cpu", options=options)
    extract(
        PHOTOGRAPHS, VGG19Encoder(3, weights="OXFORD_V1").cuda(), output=tmp_path / "cuda", options=options
    )
    cpu, cuda = read_features(tmp_path / "cpu"), read_features(tmp_path / "cuda")
    for name in ("conv2_2", "conv5_4"):
        expected = values(cpu, name)
        assert abs(values(cuda, name) - expected).max() <= 1e-4 * expected.max()
