from functools import partial
from math import sqrt

import pytest
import torch
from torch import nn

from vggenc import UsageError, weight_init


@pytest.mark.parametrize("layer", [nn.Linear(400, 500), nn.Conv2d(400, 500, 1)])
def test_linear_and_1x1_weights_are_normal_with_std_001(layer):
    weight_init(layer)
    assert layer.weight.std().item() == pytest.approx(0.01, rel=0.02)
    assert layer.weight.mean().item() == pytest.approx(0, abs=1e-4)
    # a normal distribution has 4.55 % beyond two standard deviations, PyTorch's uniform default none
    assert (layer.weight.abs() > 0.02).float().mean().item() == pytest.approx(0.0455, abs=0.003)


def test_biases_become_zero_and_batch_norm_one_and_zero():
    linear, norm = nn.Linear(4, 4), nn.BatchNorm2d(4)
    for value in norm.state_dict().values():
        value.fill_(7)
    weight_init(linear, norm)
    assert linear.bias.tolist() == [0] * 4
    state = {key: value.tolist() for key, value in norm.state_dict().items()}
    assert state == {
        "weight": [1] * 4,
        "bias": [0] * 4,
        "running_mean": [0] * 4,
        "running_var": [1] * 4,
        "num_batches_tracked": 0,
    }


def test_wide_convolutions_follow_torchvisions_vgg():
    conv = nn.Conv2d(64, 128, 3)
    weight_init(conv)
    assert conv.weight.std().item() == pytest.approx(sqrt(2 / (128 * 9)), rel=0.02)


def test_xavier_scheme_has_glorots_standard_deviation():
    layer = nn.Linear(300, 500)
    weight_init(layer, scheme="xavier_normal")
    assert layer.weight.std().item() == pytest.approx(sqrt(2 / 800), rel=0.02)


def test_apply_reaches_nested_layers():
    net = nn.Sequential(nn.Sequential(nn.Linear(300, 300)), nn.ReLU())
    net.apply(partial(weight_init, std=0.5))
    assert net[0][0].weight.std().item() == pytest.approx(0.5, rel=0.02)
    net.apply(weight_init)
    assert net[0][0].weight.std().item() == pytest.approx(0.01, rel=0.02)


def test_other_layers_are_left_alone():
    layer = nn.LayerNorm(3)
    nn.init.constant_(layer.weight, 5)
    weight_init(layer)
    assert layer.weight.tolist() == [5, 5, 5]


@pytest.mark.parametrize(
    "call", [partial(weight_init, scheme="he"), partial(weight_init, std=-1), weight_init]
)
def test_mistakes_are_usage_errors(call):
    with pytest.raises(UsageError):
        call(torch.zeros(3))


def test_large_layers_depend_on_the_seed_and_not_on_the_threads():
    layer = nn.Linear(4096, 4096)
    drawn = []
    threads = torch.get_num_threads()
    for count in (1, threads, threads):
        torch.set_num_threads(count)
        torch.manual_seed(7 + len(drawn) // 2)
        weight_init(layer)
        drawn.append(layer.weight.detach().clone())
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[1], drawn[2])
    assert drawn[0].std().item() == pytest.approx(0.01, rel=0.01)
    rows = drawn[0].view(4, -1)  # the slices are not repetitions of each other
    assert torch.corrcoef(rows).triu(1).abs().max() < 0.01
