import copy
import json

import numpy as np
import pytest
import torch
from conftest import PHOTOGRAPHS

from vggenc import Options, StoreError, UsageError, engines, extract, iter_features, read_features, trunks
from vggenc.engines import Engine, pick
from vggenc.stages import STAGE_NAMES

CPU = torch.device("cpu")


def features(encoder, **options) -> dict[str, np.ndarray]:
    settings = Options(**{"num_workers": 0, "image_size": 128, "full_decode": True, **options})
    batches = list(iter_features(PHOTOGRAPHS, encoder, STAGE_NAMES, options=settings))
    return {name: np.concatenate([batch.features[name] for batch in batches]) for name in STAGE_NAMES}


def cosines(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> float:
    """The worst of all rows and stages."""
    worst = 1.0
    for name in STAGE_NAMES:
        a, b = found[name].astype(float), expected[name].astype(float)
        worst = min(worst, ((a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)).min())
    return worst


@pytest.fixture(scope="module")
def plain(oxford) -> dict[str, np.ndarray]:
    """Pooled stages by the encoder itself, in fp32."""
    from vggenc.images import decode

    files = sorted(file for file in PHOTOGRAPHS.iterdir() if file.suffix != ".md")
    with torch.no_grad():
        maps = oxford.encode(torch.stack([oxford.preprocess.at(128)(decode(file)) for file in files]))
    return {name: value.mean((2, 3)).numpy() for name, value in maps.items()}


@pytest.mark.parametrize("engine", ["torch", "ncnn", "openvino"])
def test_fp32_of_every_engine_is_exact(oxford, plain, engine):
    found = features(oxford, engine=engine)
    for name, expected in plain.items():
        assert abs(found[name] - expected).max() <= 1e-4 * abs(expected).max()


def test_bf16_of_ncnn_keeps_every_row(oxford, plain):
    assert 0.9999 <= cosines(features(oxford, engine="ncnn", precision="bf16"), plain) < 1 - 1e-7


def test_int8_keeps_every_row_and_its_model_is_kept_for_resuming(oxford, plain, tmp_path, monkeypatch):
    options = Options(
        engine="openvino", precision="int8", image_size=128, full_decode=True, num_workers=0, part_size=5
    )

    def run():
        return extract(PHOTOGRAPHS, oxford, STAGE_NAMES, tmp_path / "f", options=options)

    summary = run()
    assert (summary.engine, summary.precision) == ("openvino", "int8")
    table = read_features(tmp_path / "f")
    found = {name: np.stack(table[name].to_numpy()) for name in STAGE_NAMES}
    assert 0.998 <= cosines(found, plain) < 1 - 1e-5
    names = [
        "calibrated.bin",
        "calibrated.xml",
        "manifest.json",
        *(f"part-0000{i}.parquet" for i in range(3)),
    ]
    assert sorted(file.name for file in (tmp_path / "f").iterdir()) == names

    monkeypatch.setattr(trunks, "_calibrated", None)  # not called again
    part = tmp_path / "f" / "part-00001.parquet"
    before = part.read_bytes()
    part.unlink()
    assert run().computed == 5
    assert part.read_bytes() == before
    part.unlink()
    (tmp_path / "f" / "calibrated.xml").unlink()
    with pytest.raises(StoreError, match=r"calibrated\.xml is gone"):
        run()


def test_int8_without_a_readable_image_is_told(oxford, tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"")
    options = Options(engine="openvino", precision="int8", num_workers=0)
    with pytest.raises(UsageError, match="none of those sampled can be read"):
        iter_features(tmp_path, oxford, options=options)


@pytest.mark.parametrize("engine", ["ncnn", "openvino"])
def test_heads_stand_on_every_engine(make_encoder, engine):
    encoder = make_encoder(k=3)
    pixels = torch.randint(256, (2, 3, 64, 64), dtype=torch.uint8)
    outputs = ("latent", "attention", "conv4_4", "fc7", "attributes")
    options = {"image_size": 64, "allow_untrained": True}
    found = Engine(encoder, outputs, Options(engine=engine, **options))(pixels)
    with torch.no_grad():
        expected = encoder.encode(encoder.preprocess.normalize(pixels), outputs, allow_untrained=True)
    expected["conv4_4"] = expected["conv4_4"].mean((2, 3))
    assert list(found) == list(outputs)
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value.numpy(), atol=1e-4 * value.abs().max().item())


def test_no_deeper_stage_is_computed_than_asked(make_encoder):
    engine = Engine(make_encoder(), ("conv3_4",), Options(image_size=32))
    assert list(engine._chain) == ["conv2_2", "conv3_4"]


@pytest.mark.parametrize("name", ["ncnn", "openvino"])
def test_the_engine_asked_for_is_the_one_that_computes(oxford, folder, tmp_path, monkeypatch, name):
    monkeypatch.setattr(trunks.TorchTrunk, "forward", None)
    options = Options(engine=name, image_size=32, num_workers=0)
    extract(folder, oxford, ["conv2_2"], tmp_path / "f", options=options)
    settings = json.loads((tmp_path / "f" / "manifest.json").read_text())["settings"]
    assert (settings["engine"], settings["precision"]) == (name, "fp32")
    assert name in settings["versions"]


def test_auto_takes_the_fastest_that_is_installed_and_able(monkeypatch):
    monkeypatch.setattr(engines, "has_bf16", lambda device: True)
    fastest = {"fp32": "ncnn", "bf16": "openvino", "int8": "openvino", "fp16": "torch"}
    for precision, engine in fastest.items():
        assert pick(Options(engine="auto", precision=precision), CPU) == (engine, precision)
    monkeypatch.setattr(engines, "has_bf16", lambda device: False)  # which ncnn merely keeps values in
    assert pick(Options(engine="auto", precision="bf16"), CPU) == ("ncnn", "bf16")
    cuda = torch.device("cuda")
    assert pick(Options(engine="auto"), cuda) == ("torch", "fp32")
    monkeypatch.setattr(engines, "installed", lambda name: name == "torch")
    assert pick(Options(engine="auto"), CPU) == ("torch", "fp32")
    with pytest.raises(UsageError, match=r"int8 with openvino needs its extra: .*vggenc\[openvino\]"):
        pick(Options(engine="auto", precision="int8"), CPU)
    with pytest.raises(UsageError, match=r"vggenc\[ncnn\]"):
        pick(Options(engine="ncnn"), CPU)


def test_auto_precision_is_what_the_hardware_has(monkeypatch):
    monkeypatch.setattr(engines, "has_bf16", lambda device: True)
    assert pick(Options(precision="auto"), CPU) == ("torch", "bf16")
    monkeypatch.setattr(engines, "has_bf16", lambda device: False)
    assert pick(Options(precision="auto"), CPU) == ("torch", "fp32")


def test_cpu_engines_refuse_a_gpu():
    with pytest.raises(UsageError, match="ncnn runs on the CPU, not on cuda"):
        pick(Options(engine="ncnn"), torch.device("cuda"))


def test_bf16_that_is_only_imitated_is_told(make_encoder, monkeypatch):
    monkeypatch.setattr(engines, "has_bf16", lambda device: False)
    engine = Engine(make_encoder(), ("conv2_2",), Options(precision="bf16", image_size=32))
    with pytest.warns(UserWarning, match="far slower than fp32"):
        engine.prepare()


@pytest.mark.slow
def test_compiled_engine_is_exact(oxford, plain):
    found = features(oxford, compile=True)
    for name, expected in plain.items():
        assert abs(found[name] - expected).max() <= 1e-4 * abs(expected).max()


@pytest.mark.parametrize(
    ("engine", "precision", "loudness"),
    [
        ("torch", "fp32", 1e36),
        ("torch", "bf16", 1e36),
        ("torch", "fp16", 1e3),
    ],
)
@pytest.mark.filterwarnings("ignore:this CPU doesn't compute with bf16")
def test_overflow_is_a_failure_at_its_depth_and_at_every_later_one(
    oxford, folder, engine, precision, loudness
):
    loud = copy.deepcopy(oxford)
    with torch.no_grad():
        loud.conv2_2[5].weight.mul_(loudness)
    options = Options(engine=engine, precision=precision, image_size=32, num_workers=0)
    for output in ("conv2_2", "conv4_4"):
        [batch] = iter_features(folder / "1.png", loud, [output], options=options)
        assert {row.status for row in batch.rows} == {"failed"}
        assert f"NaN or infinity in {output} ({precision}" in batch.rows[0].error


@pytest.mark.parametrize(("engine", "precision"), [("ncnn", "fp32"), ("ncnn", "bf16"), ("openvino", "int8")])
def test_engines_that_hide_overflow_refuse_weights_that_may_overflow(oxford, folder, engine, precision):
    loud = copy.deepcopy(oxford)
    with torch.no_grad():
        loud.conv2_2[5].weight.mul_(1e36)
    with pytest.raises(UsageError, match=f"may overflow, which the engine {engine} doesn't show"):
        iter_features(folder, loud, ["conv2_2"], options=Options(engine=engine, precision=precision))
