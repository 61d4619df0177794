import json

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn
from torchvision.models import get_model_builder
from torchvision.models.feature_extraction import create_feature_extractor

from vggenc import ExportError, UsageError, VGG19Encoder, export, export_network
from vggenc.stages import STAGES


@pytest.fixture
def torchvisions(make_encoder):
    """An encoder, and torchvision's extractor with the same values: names of its nodes are the stages'."""
    encoder = make_encoder(backbone="vgg19")
    with torch.device("meta"):
        network = get_model_builder("vgg19")()
    network.features = nn.Sequential(
        *[layer for stage in STAGES for layer in getattr(encoder, stage.name)], encoder.tail_layer
    )
    ends = {f"features.{(stage.end['vgg19'] - 1) % 36}": stage.name for stage in STAGES[:-1]}
    return encoder, create_feature_extractor(network.eval(), {**ends, "features.35": "conv5_4"})


@pytest.mark.parametrize("format", ["onnx", "torch"])
def test_maps_of_any_batch_and_size_equal_torchvisions(torchvisions, tmp_path, format):
    encoder, extractor = torchvisions
    file = tmp_path / "network.bin"
    assert export_network(encoder, ["conv5_4", "conv2_2"], file, format=format) <= 1e-4
    images = torch.randn(2, 3, 49, 70)
    if format == "onnx":
        session = onnxruntime.InferenceSession(file)
        assert [output.name for output in session.get_outputs()] == ["conv5_4", "conv2_2"]
        found = dict(zip(["conv5_4", "conv2_2"], session.run(None, {"images": images.numpy()}), strict=True))
        [about] = onnx.load(file, load_external_data=False).metadata_props
        assert json.loads(about.value)["preprocess"]["mean"] == list(encoder.preprocess.mean)
    else:
        found = {name: value.numpy() for name, value in torch.export.load(file).module()(images).items()}
    with torch.no_grad():
        expected = extractor(images)
    for name in ("conv5_4", "conv2_2"):
        scale = expected[name].abs().max().item()
        np.testing.assert_allclose(found[name], expected[name].numpy(), atol=1e-5 * scale)
    assert [each.name for each in tmp_path.iterdir()] == ["network.bin"]


@pytest.mark.slow
def test_heads_and_pooled_stages_are_exported_by_name(make_encoder, tmp_path):
    encoder = make_encoder(k=4).train()
    file = tmp_path / "heads.onnx"
    names = ["attributes", "conv4_4", "latent"]
    export_network(encoder, names, file, pool="max", image_size=64, allow_untrained=True)
    assert encoder.training
    images = torch.randn(5, 3, 64, 64)
    found = onnxruntime.InferenceSession(file).run(names, {"images": images.numpy()})
    with torch.no_grad():
        expected = encoder.eval().encode(images, names, allow_untrained=True)
    expected["conv4_4"] = expected["conv4_4"].amax((2, 3))
    for value, name in zip(found, names, strict=True):
        np.testing.assert_allclose(
            value, expected[name].numpy(), atol=1e-5 * expected[name].abs().max().item()
        )


def test_file_whose_values_differ_is_refused_and_replaces_nothing(make_encoder, tmp_path, monkeypatch):
    file = tmp_path / "network.onnx"
    file.write_text("the last good one")

    def wrong(file):
        network = export._read_onnx_before(file)
        return lambda images: {name: value * 1.001 for name, value in network(images).items()}

    monkeypatch.setattr(export, "_read_onnx_before", export._read_onnx, raising=False)
    monkeypatch.setattr(export, "_read_onnx", wrong)
    with pytest.raises(ExportError, match=r"differs from the encoder by 1\.0e-03"):
        export_network(make_encoder(), ["conv2_2"], file)
    assert file.read_text() == "the last good one"
    assert len(list(tmp_path.iterdir())) == 1


def test_place_that_cannot_be_written_is_an_export_error(make_encoder, tmp_path):
    with pytest.raises(ExportError, match="can't be written"):
        export_network(make_encoder(), ["conv2_2"], tmp_path / "nowhere" / "x.pt2", format="torch")


def test_mistakes_are_usage_errors(make_encoder, oxford, tmp_path, monkeypatch):
    file = tmp_path / "x"
    with pytest.raises(UsageError, match="format must be one of onnx, torch; got 'tflite'"):
        export_network(oxford, ["conv2_2"], file, format="tflite")
    with pytest.raises(UsageError, match="never trained"):
        export_network(oxford, ["fc7"], file)
    monkeypatch.setattr(export.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"vggenc\[onnx\]"):
        export_network(VGG19Encoder(1, weights=None), ["conv2_2"], file)
