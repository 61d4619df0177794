import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torchvision.models import VGG19_Weights

from vggenc import UsageError
from vggenc.stages import STAGE_NAMES
from vggenc.trunks import Conv, NcnnTrunk, OpenVinoTrunk, TorchTrunk, bound, flops, fold, pooled

CPU = torch.device("cpu")
TRUNKS = {
    "torch": lambda chain, taps: TorchTrunk(chain, taps, device=CPU, dtype=torch.float32, compiled=False),
    "ncnn": lambda chain, taps: NcnnTrunk(chain, taps, bf16=False),
    "openvino": lambda chain, taps: OpenVinoTrunk(chain, taps, precision="fp32"),
}


def chain_of(encoder, names=STAGE_NAMES):
    return fold({name: getattr(encoder, name) for name in names})


@pytest.mark.parametrize("backbone", ["vgg19_bn", "vgg19"])
@torch.no_grad()
def test_folded_chain_computes_what_the_encoder_does(make_encoder, backbone):
    encoder = make_encoder(backbone=backbone)
    x = torch.randn(2, 3, 64, 64)
    expected = encoder.encode(x)
    for name, layers in chain_of(encoder).items():
        for layer in layers:
            x = F.max_pool2d(x, 2) if layer is None else F.relu(F.conv2d(x, *layer, padding=1))
        assert (x - expected[name]).abs().max() <= 1e-5 * expected[name].max()


@pytest.mark.parametrize("backbone", ["vgg19_bn", "vgg19"])
@pytest.mark.parametrize("engine", TRUNKS)
@torch.inference_mode()
def test_every_trunk_agrees_with_the_encoder_at_odd_sizes(make_encoder, engine, backbone):
    encoder = make_encoder(backbone=backbone)
    images = torch.randn(2, 3, 99, 70)
    taps = [(name, pool) for name in STAGE_NAMES for pool in ("avg", "max", "none")][::-1]
    found = TRUNKS[engine](chain_of(encoder), taps)(images)
    maps = encoder.encode(images)
    assert set(found) == set(taps)
    for (name, pool), value in found.items():
        expected = pooled(maps[name], pool)
        assert value.shape == expected.shape
        assert (value - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_pooling_is_over_all_places(images):
    x = images.numpy()
    np.testing.assert_allclose(pooled(images, "avg").numpy(), x.mean((2, 3)), atol=1e-6)
    np.testing.assert_array_equal(pooled(images, "max").numpy(), x.max((2, 3)))
    assert pooled(images, "none") is images


def test_strange_layers_are_named(make_encoder):
    encoder = make_encoder(own=True)
    encoder.conv3_4[1] = nn.Conv2d(128, 256, 5)
    with pytest.raises(UsageError, match=r"conv3_4 holds a layer that VGG19 doesn't have: Conv2d\(128"):
        chain_of(encoder)


def test_operations_are_those_that_torchvision_states(make_encoder):
    classifier = 25088 * 4096 + 4096 * 4096 + 4096 * 1000
    stated = 2 * (VGG19_Weights.IMAGENET1K_V1.meta["_ops"] * 1e9 - classifier)
    assert flops(chain_of(make_encoder(backbone="vgg19")), 224, 224) == pytest.approx(stated, rel=2e-3)


def test_bound_is_what_an_input_of_extremes_reaches():
    first = torch.zeros(1, 3, 3, 3)
    first[0, :, 1, 1] = torch.tensor([2.0, -1.0, 0.5])
    second = torch.stack([-torch.ones(1, 3, 3), torch.ones(1, 3, 3)])
    layers = [Conv(first, torch.tensor([1.0])), None, Conv(second, torch.tensor([5.0, -3.0]))]
    images = torch.tensor([4.0, -3.0, 2.0]).reshape(1, 3, 1, 1).expand(1, 3, 6, 6)
    found = TRUNKS["torch"]({"conv2_2": layers}, [("conv2_2", "max")])(images)
    assert found["conv2_2", "max"].max() == bound({"conv2_2": layers}, [4, 3, 2]) == 9 * (8 + 3 + 1 + 1) - 3


def test_grid_is_what_the_heads_see_of_larger_maps_and_leaves_smaller_ones():
    maps = torch.randn(1, 2, 28, 28)
    assert torch.equal(pooled(maps, "grid"), F.max_pool2d(maps, 2))
    assert pooled(maps[..., :8, :8], "grid").shape == (1, 2, 8, 8)
