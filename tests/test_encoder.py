import copy
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models import get_model_builder
from torchvision.models.feature_extraction import create_feature_extractor

from vggenc import EncoderOutput, UsageError, VGG19Encoder
from vggenc.stages import OUTPUTS, STAGE_NAMES

BACKBONES = ["vgg19_bn", "vgg19"]
# Convolutions between poolings in VGG19, by stage (Simonyan and Zisserman 2015, table 1, column E).
BLOCKS = {"conv2_2": [2, 2], "conv3_4": [4], "conv4_4": [4], "conv5_4": [4]}
# The last activation of each stage in torchvision's numbering of `features`.
RELUS = {"vgg19_bn": [12, 25, 38, 51], "vgg19": [8, 17, 26, 35]}


def norm(x: Tensor, state: dict, name: str, training: bool) -> Tensor:
    mean, var = state[f"{name}.running_mean"].clone(), state[f"{name}.running_var"].clone()
    return F.batch_norm(x, mean, var, state[f"{name}.weight"], state[f"{name}.bias"], training=training)


def reference(state: dict, x: Tensor, k: int, backbone: str, training: bool) -> tuple[Tensor, Tensor]:
    """The equations of the network from a state dict alone, with the fixed poolings of a 224 x 224 input."""
    stages = []
    for stage, blocks in BLOCKS.items():
        layer = 0
        for block, convolutions in enumerate(blocks):
            if stage != "conv2_2" or block > 0:
                x, layer = F.max_pool2d(x, 2), layer + 1
            for _ in range(convolutions):
                x = F.conv2d(x, state[f"{stage}.{layer}.weight"], state[f"{stage}.{layer}.bias"], padding=1)
                if backbone == "vgg19_bn":
                    x, layer = norm(x, state, f"{stage}.{layer + 1}", training), layer + 1
                x, layer = F.relu(x), layer + 2
        stages.append(x)
    fc = F.max_pool2d(x, 2).flatten(1)
    for layer in (0, 3):
        fc = F.relu(F.linear(fc, state[f"fc_layers.{layer}.weight"], state[f"fc_layers.{layer}.bias"]))
    h = F.relu(F.linear(fc, state["fc4.weight"], state["fc4.bias"]))
    latent = norm(h[:, k:], state, "bn2", training)
    p = 0
    for i, (stage, pool) in enumerate(zip(stages, (8, 4, 2, 1), strict=True)):
        head = f"extract_{i}.{0 if i == 3 else 1}"
        evidence = F.conv2d(F.max_pool2d(stage, pool), state[f"{head}.weight"], state[f"{head}.bias"])
        score = F.linear(
            evidence.flatten(2) + latent[:, :, None], state[f"fc{i}.weight"], state[f"fc{i}.bias"]
        )
        p = p + F.softmax(score.squeeze(2), dim=1)
    return norm(h[:, :k], state, "bn1", training) * p, latent


@pytest.mark.parametrize("k", [1, 85, 312])
@pytest.mark.parametrize("backbone", BACKBONES)
@torch.no_grad()
def test_forward_equals_the_equations(make_encoder, images, backbone, k):
    encoder = make_encoder(k, backbone)
    encoder.fc_layers[2].p = 0.0
    for module in encoder.modules():
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
            module.momentum = 0.0  # the values are shared with other tests
    for training in (False, True):
        attributes, latent = reference(encoder.state_dict(), images, k, backbone, training)
        assert latent.abs().max() > 0.05  # so that the tolerance means something
        for batch in (3,) if training else (1, 3):
            output = encoder.train(training)(images[:batch])
            assert isinstance(output, EncoderOutput)
            for ours, expected in zip(output, (attributes[:batch], latent[:batch]), strict=True):
                atol = 1e-5 * max(1.0, expected.abs().max().item())
                torch.testing.assert_close(ours, expected, rtol=0, atol=atol)


@pytest.mark.parametrize("backbone", BACKBONES)
@torch.no_grad()
def test_stages_equal_torchvisions_feature_extractor(make_encoder, images, backbone):
    encoder = make_encoder(backbone=backbone)
    vgg = get_model_builder(backbone)(init_weights=False).eval()
    values = [v for key, v in encoder.state_dict().items() if key.startswith("conv")]
    features = {key: v for key, v in vgg.state_dict().items() if key.startswith("features")}
    vgg.load_state_dict(dict(zip(features, values, strict=True)), strict=False)
    nodes = {f"features.{index}": name for index, name in zip(RELUS[backbone], STAGE_NAMES, strict=True)}
    expected = create_feature_extractor(vgg, nodes)(images[:1])
    maps = encoder.encode(images[:1])
    assert list(maps) == list(STAGE_NAMES)
    for name, value in maps.items():
        assert torch.equal(value, expected[name])


def test_state_dict_has_the_published_keys_and_size(make_encoder):
    convolutions = {
        "conv2_2": [0, 3, 7, 10],
        "conv3_4": [1, 4, 7, 10],
        "conv4_4": [1, 4, 7, 10],
        "conv5_4": [1, 4, 7, 10],
    }
    statistics = ["weight", "bias", "running_mean", "running_var", "num_batches_tracked"]
    keys = [
        f"{stage}.{i}.{p}"
        for stage, layers in convolutions.items()
        for i in layers
        for p in ("weight", "bias")
    ]
    keys += [
        f"{stage}.{i + 1}.{p}" for stage, layers in convolutions.items() for i in layers for p in statistics
    ]
    layers = ["fc_layers.0", "fc_layers.3", "fc0", "fc1", "fc2", "fc3", "fc4"]
    layers += ["extract_0.1", "extract_1.1", "extract_2.1", "extract_3.0"]
    keys += [f"{layer}.{p}" for layer in layers for p in ("weight", "bias")]
    keys += [f"{layer}.{p}" for layer in ("bn1", "bn2") for p in statistics]
    state = make_encoder(85).state_dict()
    assert set(state) == set(keys)
    assert len(state) == 144
    assert sum(value.numel() for value in state.values()) == 140_410_252


def test_published_checkpoint_loads_strictly_and_counts_as_trained(make_encoder):
    published = make_encoder(5).state_dict()
    encoder = make_encoder(5)
    encoder.load_state_dict(published, strict=True)
    encoder.check_trained(OUTPUTS)


@torch.no_grad()
def test_heads_at_224_equal_the_fixed_pools_exactly(make_encoder, images):
    encoder = make_encoder()
    for i, (x, size) in enumerate(zip(encoder.encode(images[:1]).values(), (8, 4, 2, 1), strict=True)):
        convolution = encoder.get_submodule(f"extract_{i}")[-1]
        x14 = F.adaptive_max_pool2d(x, 14) if i == 3 else x
        assert torch.equal(encoder.get_submodule(f"extract_{i}")(x14), convolution(F.max_pool2d(x, size)))


@pytest.mark.parametrize(("height", "width"), [(320, 256), (64, 64), (32, 47)])
@torch.no_grad()
def test_other_sizes_keep_the_shapes_of_the_stage_table(make_encoder, height, width):
    encoder = make_encoder(7)
    output = encoder.encode(torch.randn(2, 3, height, width), OUTPUTS, allow_untrained=True)
    shapes = {name: tuple(value.shape) for name, value in output.items()}
    assert shapes == {
        "conv2_2": (2, 128, height // 2, width // 2),
        "conv3_4": (2, 256, height // 4, width // 4),
        "conv4_4": (2, 512, height // 8, width // 8),
        "conv5_4": (2, 512, height // 16, width // 16),
        "fc7": (2, 4096),
        "attention": (2, 4, 7),
        "attributes": (2, 7),
        "latent": (2, 7),
    }


@torch.no_grad()
def test_attention_sums_to_one_and_scales_the_attributes(make_encoder, images):
    encoder = make_encoder(7)
    x = images[:2, :, :64, :64]
    output = encoder.encode(x, ["attention", "attributes", "fc7"], allow_untrained=True)
    torch.testing.assert_close(output["attention"].sum(2), torch.ones(2, 4))
    scores = encoder.bn1(F.relu(encoder.fc4(output["fc7"]))[:, :7])
    torch.testing.assert_close(output["attributes"], scores * output["attention"].sum(1))
    torch.testing.assert_close(output["attributes"], encoder(x).attributes)


@pytest.mark.parametrize(
    ("outputs", "reached"),
    [
        (["conv2_2"], ["conv2_2"]),
        (["conv4_4", "conv3_4"], ["conv2_2", "conv3_4", "conv4_4"]),
        (["fc7"], [*STAGE_NAMES, "tail_layer", "fc_layers"]),
        (["latent"], [*STAGE_NAMES, "tail_layer", "fc_layers", "fc4", "bn2"]),
    ],
)
@torch.no_grad()
def test_encode_computes_no_deeper_than_asked(make_encoder, outputs, reached):
    encoder = make_encoder()
    ran: list[str] = []
    for name, module in encoder.named_children():
        module.register_forward_hook(lambda *_, name=name: ran.append(name))
    found = encoder.encode(torch.randn(1, 3, 32, 32), outputs, allow_untrained=True)
    assert list(found) == outputs
    assert ran == reached


@pytest.mark.parametrize(
    "images",
    [
        torch.zeros(3, 64, 64),
        torch.zeros(1, 1, 64, 64),
        torch.zeros(1, 3, 31, 64),
        torch.zeros(1, 3, 64, 64, dtype=torch.uint8),
    ],
)
def test_wrong_images_are_usage_errors_that_tell_shape_or_type(make_encoder, images):
    with pytest.raises(UsageError, match=r"uint8|\(" + ", ".join(map(str, images.shape))):
        make_encoder()(images)


def test_unknown_outputs_and_strings_are_usage_errors(make_encoder):
    encoder, image = make_encoder(), torch.zeros(1, 3, 32, 32)
    with pytest.raises(UsageError, match="conv9_9"):
        encoder.encode(image, ["conv9_9"])
    with pytest.raises(UsageError, match="list of names"):
        encoder.encode(image, "conv2_2")
    with pytest.raises(UsageError, match="no outputs"):
        encoder.encode(image, [])


@pytest.mark.parametrize("k", [0, -3, 2.5, True, "85", 100_001])
def test_k_out_of_range_is_a_usage_error(k):
    with pytest.raises(UsageError, match="k, the number of attributes"):
        VGG19Encoder(k, weights=None)


def test_untrained_outputs_are_refused_until_declared_trained(make_encoder):
    encoder, image = make_encoder(), torch.zeros(1, 3, 32, 32)
    with pytest.raises(UsageError, match=r"never trained.*fc4"):
        encoder.encode(image, ["attributes"])
    encoder.encode(image, ["attributes"], allow_untrained=True)
    encoder.mark_trained()
    encoder.encode(image, ["attributes"])


def test_compiles_as_one_graph(make_encoder):
    encoder, image = make_encoder(), torch.randn(1, 3, 32, 32)
    compiled = torch.compile(encoder, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(image), encoder(image))


@torch.no_grad()
def test_exports_with_a_dynamic_batch(make_encoder):
    encoder = make_encoder()
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(encoder, (torch.randn(2, 3, 64, 64),), dynamic_shapes=({0: batch},))
    image = torch.randn(5, 3, 64, 64)
    torch.testing.assert_close(program.module()(image), encoder(image))


@pytest.mark.parametrize("again", [copy.deepcopy, lambda encoder: pickle.loads(pickle.dumps(encoder))])
@torch.no_grad()
def test_copies_give_the_same_and_stand_alone(make_encoder, again):
    encoder, image = make_encoder(), torch.randn(1, 3, 32, 32)
    encoder.mark_trained("fc4")
    twin = again(encoder)
    torch.testing.assert_close(twin(image), encoder(image), rtol=0, atol=0)
    assert (twin.k, twin.trained, twin.preprocess) == (encoder.k, encoder.trained, encoder.preprocess)
    twin.fc4.bias.add_(1)
    assert not torch.equal(twin.fc4.bias, encoder.fc4.bias)


@torch.no_grad()
def test_autocast_stays_near_fp32(make_encoder, images):
    encoder, image = make_encoder(), images[:2, :, :64, :64]
    with torch.autocast("cpu", torch.bfloat16):
        half = encoder(image).latent
    assert F.cosine_similarity(half.float(), encoder(image).latent).min() > 0.999


def one_step(encoder: VGG19Encoder, image: Tensor) -> dict[str, Tensor | None]:
    encoder.fc_layers[2].p = 0.0
    output = encoder(image)
    (output.attributes.square().mean() + output.latent.square().mean() + output.latent.sum()).backward()
    return {name: p.grad for name, p in encoder.named_parameters()}


def test_gradients_reach_every_parameter_that_is_not_frozen(make_encoder):
    encoder = make_encoder(32, own=True).train()
    encoder.freeze("conv4_4")
    grads = one_step(encoder, torch.randn(3, 3, 64, 64))
    frozen = {name for name in grads if name.startswith(("conv2_2", "conv3_4", "conv4_4"))}
    assert {name for name, grad in grads.items() if grad is None} == frozen
    weights = {name: grad for name, grad in grads.items() if name.endswith("weight") and grad is not None}
    assert {name for name, grad in weights.items() if not grad.any()} == set()


def test_frozen_batch_norm_does_not_move_in_a_training_step(make_encoder):
    encoder = make_encoder(own=True)
    encoder.freeze("conv3_4")
    encoder.train()
    before = copy.deepcopy(encoder.state_dict())
    encoder.fc_layers.requires_grad_(False)  # shared with other tests
    optimizer = torch.optim.SGD(encoder.param_groups(backbone_lr=0.1, head_lr=0.1), weight_decay=0.1)
    one_step(encoder, torch.randn(2, 3, 64, 64))
    optimizer.step()
    moved = {key for key, value in encoder.state_dict().items() if not torch.equal(value, before[key])}
    assert not any(key.startswith(("conv2_2", "conv3_4")) for key in moved)
    assert {"conv4_4.2.running_mean", "conv4_4.1.weight", "bn1.running_var", "fc4.weight"} <= moved


def test_unfreeze_trains_everything_again(make_encoder):
    encoder = make_encoder(own=True).train()
    encoder.freeze()
    encoder.unfreeze()
    assert all(p.requires_grad for p in encoder.parameters())
    assert all(module.training for module in encoder.modules())


def test_freeze_and_param_groups_know_their_names(make_encoder):
    encoder = make_encoder(own=True)
    with pytest.raises(UsageError, match="conv1_1"):
        encoder.freeze("conv1_1")
    groups = encoder.param_groups(backbone_lr=1e-5, head_lr=1e-3)
    assert sum(len(group["params"]) for group in groups) == len(list(encoder.parameters()))
    for group in groups:
        assert all((p.ndim > 1) != ("weight_decay" in group) for p in group["params"])
        in_backbone = {id(p) for n, p in encoder.named_parameters() if n.startswith(("conv", "fc_layers"))}
        expected = 1e-5 if id(group["params"][0]) in in_backbone else 1e-3
        assert group["lr"] == expected


def test_requires_grad_on_the_images_alone(make_encoder):
    encoder = make_encoder().requires_grad_(False)
    image = torch.randn(1, 3, 32, 32, requires_grad=True)
    encoder.encode(image, ["conv5_4"])["conv5_4"].sum().backward()
    assert image.grad.abs().sum() > 0


def test_checkpointing_changes_no_gradient_and_no_statistic(make_encoder):
    image = torch.randn(2, 3, 64, 64)
    plain, checkpointed = make_encoder(own=True).train(), make_encoder(own=True).train()
    checkpointed.set_grad_checkpointing()
    for encoder in (plain, checkpointed):
        maps = encoder.encode(image)
        sum(value.square().mean() for value in maps.values()).backward()
    others = dict(checkpointed.named_parameters())
    for name, value in plain.named_parameters():
        if name.startswith("conv"):
            torch.testing.assert_close(others[name].grad, value.grad, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(checkpointed.state_dict(), plain.state_dict(), rtol=0, atol=0)


def test_checkpointing_compiles_and_moves_statistics_once(make_encoder):
    image = torch.randn(2, 3, 32, 32)
    plain, checkpointed = make_encoder(own=True).train(), make_encoder(own=True).train()
    checkpointed.set_grad_checkpointing()
    plain.encode(image)["conv5_4"].square().mean().backward()
    torch.compile(checkpointed.encode, backend="aot_eager")(image)["conv5_4"].square().mean().backward()
    torch.testing.assert_close(checkpointed.state_dict(), plain.state_dict())
    torch.testing.assert_close(checkpointed.conv2_2[0].weight.grad, plain.conv2_2[0].weight.grad)


def test_checkpointing_keeps_only_stage_boundaries(make_encoder):
    def saved(checkpointing: bool) -> int:
        encoder = make_encoder(own=True).train()
        encoder.set_grad_checkpointing(checkpointing)
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
            encoder.encode(torch.randn(1, 3, 64, 64), ["conv5_4"])
        return sum(sizes)

    assert saved(True) < saved(False) / 3


def test_hooks_see_a_convolutions_own_output(make_encoder):
    encoder, seen = make_encoder(backbone="vgg19"), []
    encoder.conv2_2[0].register_forward_hook(lambda _module, _inputs, output: seen.append(output))
    encoder.encode(torch.randn(1, 3, 32, 32), ["conv2_2"])
    assert seen[0].min() < 0  # an activation in place would have cut it off


# timm


@pytest.fixture(scope="module")
def timm_vgg():
    import timm

    return timm.create_model("vgg19_bn", pretrained=False).eval()


def test_feature_info_agrees_with_timms(make_encoder, timm_vgg):
    import timm

    theirs = timm.create_model("vgg19_bn", features_only=True, out_indices=(1, 2, 3, 4)).feature_info
    ours = make_encoder().feature_info
    assert ours.channels() == theirs.channels()
    assert ours.reduction() == theirs.reduction()
    assert ours.channels(-1) == theirs.channels()[-1]
    assert ours.get_dicts(["num_chs"], [0, 2]) == theirs.get_dicts(["num_chs"], [1, 3])
    assert ours.module_name() == list(STAGE_NAMES)
    assert len(ours) == 4


@pytest.mark.parametrize("stop_early", [False, True])
@pytest.mark.parametrize(
    ("indices", "theirs"), [(None, [1, 2, 3, 4]), (2, [3, 4]), ([0, 2], [1, 3]), ([-1], [4]), ([1, -3], [2])]
)
@torch.no_grad()
def test_forward_intermediates_behaves_as_timms(make_encoder, timm_vgg, indices, theirs, stop_early):
    encoder, image = make_encoder(), torch.randn(1, 3, 64, 64)
    ours = [value for key, value in encoder.state_dict().items() if key.startswith("conv")]
    keys = [key for key in timm_vgg.state_dict() if key.startswith("features")]
    timm_vgg.load_state_dict(dict(zip(keys, ours, strict=True)), strict=False)
    x, maps = encoder.forward_intermediates(image, indices, stop_early=stop_early)
    expected_x, expected = timm_vgg.forward_intermediates(image, theirs, stop_early=stop_early)
    torch.testing.assert_close(x, expected_x)
    torch.testing.assert_close(maps, expected)
    torch.testing.assert_close(
        encoder.forward_intermediates(image, indices, intermediates_only=True), expected
    )


@pytest.mark.parametrize(
    "arguments", [{"indices": [4]}, {"indices": 5}, {"indices": []}, {"output_fmt": "NLC"}]
)
def test_forward_intermediates_refuses_what_there_is_not(make_encoder, arguments):
    with pytest.raises(UsageError):
        make_encoder().forward_intermediates(torch.zeros(1, 3, 32, 32), **arguments)


# CUDA

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")


@needs_cuda
@torch.no_grad()
def test_cuda_forward_agrees_with_the_cpu(make_encoder, images):
    encoder = make_encoder(85)
    expected = encoder(images)
    output = copy.deepcopy(encoder).cuda()(images.cuda())
    torch.testing.assert_close(
        output.latent.cpu(), expected.latent, rtol=1e-2, atol=1e-2
    )  # TF32 convolutions


@needs_cuda
@torch.no_grad()
def test_cuda_autocast_stays_near_fp32(make_encoder, images):
    encoder = copy.deepcopy(make_encoder(85)).cuda()
    with torch.autocast("cuda", torch.bfloat16):
        half = encoder(images.cuda()).latent
    assert F.cosine_similarity(half.float(), encoder(images.cuda()).latent).min() > 0.99


def test_every_module_with_values_is_in_the_table(make_encoder):
    with_values = {name for name, module in make_encoder().named_children() if list(module.parameters())}
    assert with_values == set(OUTPUTS["attributes"])
    assert isinstance(make_encoder().tail_layer, nn.MaxPool2d)


def test_layer_decay_slows_each_stage_down_and_nothing_else(make_encoder):
    encoder = make_encoder(own=True)
    groups = encoder.param_groups(backbone_lr=1.0, fc_lr=3.0, head_lr=2.0, layer_decay=0.5)
    rates = {id(p): group["lr"] for group in groups for p in group["params"]}
    found = {name.split(".")[0]: rates[id(p)] for name, p in encoder.named_parameters()}
    stages = {"conv2_2": 0.125, "conv3_4": 0.25, "conv4_4": 0.5, "conv5_4": 1.0}
    assert found == {**dict.fromkeys(found, 2.0), **stages, "fc_layers": 3.0, "fc4": 3.0}
    for wrong in (0, 1.5):
        with pytest.raises(UsageError, match="layer_decay must be above 0, up to 1"):
            encoder.param_groups(backbone_lr=1, head_lr=1, layer_decay=wrong)
