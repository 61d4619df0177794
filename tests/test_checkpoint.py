import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torchvision.models import get_model_builder

from vggenc import UsageError, VGG19Encoder, WeightsError
from vggenc.checkpoint import load
from vggenc.stages import STAGE_NAMES
from vggenc.weights import find_entry, locate


def same_values(encoder: VGG19Encoder, other: VGG19Encoder) -> bool:
    state = other.state_dict()
    return all(torch.equal(value, state[key]) for key, value in encoder.state_dict().items())


def stages_of(encoder: VGG19Encoder) -> dict[str, torch.Tensor]:
    return {key: value for key, value in encoder.state_dict().items() if key.startswith("conv")}


@pytest.fixture
def stage_file(make_encoder, tmp_path) -> Path:
    file = tmp_path / "stages.safetensors"
    save_file(stages_of(make_encoder()), file)
    return file


@pytest.fixture
def saved(make_encoder, tmp_path_factory) -> Path:
    """A folder that `save_pretrained` wrote of an encoder declared trained; 560 MB, so written once."""
    folder = tmp_path_factory.getbasetemp() / "saved"
    if not folder.exists():
        encoder = make_encoder(3)
        encoder.mark_trained()
        encoder.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("backbone", ["vgg19_bn", "vgg19"])
def test_torchvision_checkpoint_loads_by_its_own_keys(make_encoder, tmp_path, backbone):
    with torch.device("meta"):
        vgg = get_model_builder(backbone)(init_weights=False).eval()
    values = make_encoder(backbone=backbone).state_dict()
    theirs = [key for key in vgg.state_dict() if not key.startswith("classifier.6")]
    state = dict(zip(theirs, values.values(), strict=False))
    state.update({"classifier.6.weight": torch.zeros(1000, 4096), "classifier.6.bias": torch.zeros(1000)})
    vgg.load_state_dict(state, assign=True)
    file = tmp_path / "vgg.pth"
    torch.save(vgg.state_dict(), file)
    encoder = VGG19Encoder(4, weights=file).eval()
    assert encoder.backbone == backbone
    assert encoder.trained == {*STAGE_NAMES, "fc_layers"}
    image = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = vgg.classifier[:-2](vgg.avgpool(vgg.features(image)).flatten(1))
        assert torch.equal(encoder.encode(image, ["fc7"])["fc7"], expected)


def test_wrappers_and_prefixes_are_taken_off(make_encoder, tmp_path):
    encoder = make_encoder(3)
    for number, wrap in enumerate(
        [
            lambda s: {"state_dict": {f"module.{key}": v for key, v in s.items()}, "epoch": 3},
            lambda s: {"model": {f"_orig_mod.module.{key}": v for key, v in s.items()}},
        ]
    ):
        file = tmp_path / f"{number}.pth"
        torch.save(wrap(stages_of(encoder)), file)
        assert load(file).state.keys() == stages_of(encoder).keys()


def test_layers_that_a_file_lacks_begin_with_weight_init_and_are_untrained(stage_file, make_encoder):
    encoder = VGG19Encoder(85, weights=stage_file)
    assert encoder.trained == set(STAGE_NAMES)
    assert encoder.fc4.weight.std().item() == pytest.approx(0.01, rel=0.02)
    assert encoder.fc4.bias.abs().max() == 0
    for key, value in stages_of(make_encoder()).items():
        assert torch.equal(encoder.state_dict()[key], value)


def test_missing_and_unexpected_keys_are_named(make_encoder, tmp_path):
    state = stages_of(make_encoder())
    state["classifier_head.weight"] = state.pop("conv4_4.1.bias")
    file = tmp_path / "odd.safetensors"
    save_file(state, file)
    with pytest.raises(WeightsError, match=r"misses conv4_4\.1\.bias.*unexpected classifier_head\.weight"):
        VGG19Encoder(3, weights=file)


def test_another_k_is_told_with_both_shapes(saved):
    with pytest.raises(WeightsError, match=r"k=4.*\(3,.*there and \(4,"):
        VGG19Encoder(4, weights=saved)


def test_old_files_without_batch_counts_load(make_encoder, tmp_path):
    state = {
        key: v for key, v in stages_of(make_encoder()).items() if not key.endswith("num_batches_tracked")
    }
    torch.save(state, tmp_path / "old.pth")
    assert VGG19Encoder(3, weights=tmp_path / "old.pth").trained == set(STAGE_NAMES)


def test_a_complete_checkpoint_draws_no_random_number(saved):
    before = torch.get_rng_state()
    VGG19Encoder(3, weights=saved)
    assert torch.equal(torch.get_rng_state(), before)


def test_loaded_values_do_not_depend_on_the_file_any_more(stage_file):
    encoder = VGG19Encoder(3, weights=stage_file)
    before = encoder.conv5_4[10].weight.clone()
    stage_file.write_bytes(b"\0" * stage_file.stat().st_size)
    assert torch.equal(encoder.conv5_4[10].weight, before)


def test_backbone_that_contradicts_a_file_is_a_usage_error(stage_file):
    with pytest.raises(UsageError, match="vgg19_bn, not of backbone 'vgg19'"):
        VGG19Encoder(3, backbone="vgg19", weights=stage_file)
    with pytest.raises(UsageError, match="vgg19_bn, not to 'vgg19'"):
        VGG19Encoder(3, backbone="vgg19", weights=load(stage_file))


class Bomb:
    def __reduce__(self):
        return exec, ("open('executed', 'w').close()",)


def test_damaged_and_hostile_files_are_weights_errors_and_run_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    files = {
        "page.pth": b"<html>404</html>",
        "empty.pth": b"",
        "bomb.pth": pickle.dumps({"state_dict": Bomb()}),
        "header.safetensors": (2**60).to_bytes(8, "little") + b"{}",
        "short.safetensors": b"abc",
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(WeightsError, match=name):
            load(tmp_path / name)
    torch.save([1, 2], tmp_path / "list.pth")
    torch.save({"features.0.weight": torch.full((64, 3, 3, 3), float("nan"))}, tmp_path / "nan.pth")
    torch.save({"head.weight": torch.ones(2)}, tmp_path / "other.pth")
    torch.save({"features.0.weight": 3}, tmp_path / "number.pth")
    for name in ("list.pth", "nan.pth", "other.pth", "number.pth"):
        with pytest.raises(WeightsError, match=name):
            load(tmp_path / name)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("kind", ["saved", "torch.save"])
def test_one_flipped_byte_and_a_missing_end_are_weights_errors(saved, make_encoder, tmp_path, kind):
    if kind == "saved":
        content = bytearray((saved / "model.safetensors").read_bytes())
        file = tmp_path / "model.safetensors"
    else:
        file = tmp_path / "stages.pth"
        torch.save(stages_of(make_encoder()), file)
        content = bytearray(file.read_bytes())
    for at in (len(content) // 3, len(content) // 2):
        content[at] ^= 1
        file.write_bytes(content)
        with pytest.raises(WeightsError, match=f"{file.name} can't be read as a checkpoint"):
            load(file)
        content[at] ^= 1
    file.write_bytes(content[: len(content) - 5000])
    with pytest.raises(WeightsError, match=f"{file.name} can't be read as a checkpoint"):
        load(file)


def test_files_whose_names_are_swapped_are_told(tmp_path):
    oxford = locate(find_entry("OXFORD_V1"))
    shutil.copy(oxford, tmp_path / "vgg19-dcbb9e9d.pth")
    torch.save({"features.0.weight": torch.ones(64, 3, 3, 3)}, tmp_path / oxford.name)
    for name in ("vgg19-dcbb9e9d.pth", oxford.name):
        with pytest.raises(WeightsError, match=f"{name} is not .*: its sha256"):
            load(tmp_path / name)


@pytest.mark.parametrize(
    "about", ["3", "{", '{"backbone": "vgg19"}', '{"backbone": "vgg16", "weights": "x"}']
)
def test_a_files_odd_account_of_itself_is_a_weights_error(tmp_path, about):
    save_file({"conv2_2.0.weight": torch.zeros(1)}, tmp_path / "x.safetensors", metadata={"vggenc": about})
    with pytest.raises(WeightsError, match=r"x\.safetensors can't be read"):
        load(tmp_path / "x.safetensors")


def test_a_path_with_a_name_of_the_registry_must_be_that_file(make_encoder, tmp_path):
    torch.save(stages_of(make_encoder()), tmp_path / "vgg19_bn-c79401a0.pth")
    with pytest.raises(WeightsError, match="is not IMAGENET1K_V1: its sha256"):
        load(tmp_path / "vgg19_bn-c79401a0.pth")


def test_a_path_that_does_not_exist_is_a_usage_error(tmp_path):
    with pytest.raises(UsageError, match="no such weights file"):
        load(tmp_path / "nothing.pth")
    with pytest.raises(UsageError, match="no such weights file"):
        load("nothing/here")


def test_save_and_from_pretrained_keep_values_training_and_preprocessing(oxford, tmp_path, capfd):
    oxford.save_pretrained(tmp_path / "model")
    assert {"config.json", "model.safetensors"} <= {file.name for file in (tmp_path / "model").iterdir()}
    again = VGG19Encoder.from_pretrained(tmp_path / "model")  # the default weights could not be fetched here
    assert same_values(oxford, again)
    assert (again.k, again.backbone, again.trained) == (3, "vgg19", oxford.trained)
    assert again.preprocess == oxford.preprocess
    assert again.weights_name == "saved from OXFORD_V1"
    assert not again.training
    assert capfd.readouterr().out == ""


def test_a_declaration_of_training_survives_the_round_trip(saved, make_encoder):
    again = VGG19Encoder.from_pretrained(saved)
    again.check_trained(["attributes"])
    assert same_values(again, make_encoder(3))


def test_saving_over_the_folder_that_was_loaded_works(saved, tmp_path):
    shutil.copytree(
        saved, tmp_path / "own", copy_function=os.link
    )  # saving replaces files, it never writes in them
    encoder = VGG19Encoder.from_pretrained(tmp_path / "own")
    with torch.no_grad():
        encoder.fc4.bias.add_(1)
    encoder.save_pretrained(tmp_path / "own")
    assert same_values(encoder, VGG19Encoder.from_pretrained(tmp_path / "own"))


def test_folder_without_heads_asks_for_k(stage_file):
    stage_file.rename(stage_file.parent / "model.safetensors")
    with pytest.raises(WeightsError, match="k="):
        VGG19Encoder.from_pretrained(stage_file.parent)
    assert VGG19Encoder.from_pretrained(stage_file.parent, k=9).k == 9


def test_what_is_no_folder_and_no_repository_is_told_without_a_download(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UsageError, match="no such folder: nofolder"):
        VGG19Encoder.from_pretrained("nofolder")
    with pytest.raises(WeightsError, match="owner/name is no folder here and can't be had from the Hub"):
        VGG19Encoder.from_pretrained("owner/name")


def test_saved_files_have_the_mode_that_the_umask_gives(make_encoder, tmp_path):
    make_encoder(1).save_pretrained(tmp_path / "saved")
    assert len({file.stat().st_mode for file in (tmp_path / "saved").iterdir()}) == 1
    assert "pushed" not in (tmp_path / "saved" / "README.md").read_text()
