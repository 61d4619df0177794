import re
import runpy
import sys

import numpy as np
import pytest
from conftest import PHOTOGRAPHS, ROOT, SHARED_DATA
from PIL import Image

from vggenc.zsl import make_toy

SCRIPT = str(ROOT / "examples" / "compare_stages.py")
TINY_IMAGENET = SHARED_DATA / "tiny-imagenet-val.parquet"


def compare(monkeypatch, capsys, *arguments: object) -> dict[str, list[float]]:
    monkeypatch.setattr(sys, "argv", [SCRIPT, *map(str, arguments)])
    runpy.run_path(SCRIPT, run_name="__main__")
    lines = capsys.readouterr().out.splitlines()
    return {line.split()[0]: [float(x) for x in line.split()[1:]] for line in lines[2:]}


def test_compare_stages_tells_textures_apart(monkeypatch, capsys, tmp_path):
    rng = np.random.default_rng(0)
    for name, width in (("fine", 1), ("coarse", 8)):
        (tmp_path / name).mkdir()
        for i in range(4):
            blocks = rng.integers(0, 256, (64 // width, 64 // width), dtype=np.uint8)
            Image.fromarray(blocks.repeat(width, 0).repeat(width, 1)).save(tmp_path / name / f"{i}.png")
    scores = compare(monkeypatch, capsys, tmp_path, "--image-size", 64)
    assert set(scores) == {"conv2_2", "conv3_4", "conv4_4", "conv5_4"}
    assert all(pretrained == 1 for pretrained, _ in scores.values())


@pytest.mark.slow
@pytest.mark.skipif(not TINY_IMAGENET.exists(), reason=f"{TINY_IMAGENET.name} is not beside the checkout")
@pytest.mark.parametrize(
    ("size", "expected"),
    # 1-nearest-neighbour accuracies measured beforehand with independent code
    [(64, [0.39, 0.48, 0.61, 0.67]), (128, [0.36, 0.44, 0.58, 0.77])],
)
def test_compare_stages_gives_the_known_figures(monkeypatch, capsys, size, expected):
    scores = compare(monkeypatch, capsys, TINY_IMAGENET, "--image-size", size, "--classes", "3::10")
    assert [pretrained for pretrained, _ in scores.values()] == pytest.approx(expected, abs=0.02)
    assert all(random < 0.3 for _, random in scores.values())


def test_photographs_are_about_a_dozen_small_and_documented():
    files = [file for file in PHOTOGRAPHS.iterdir() if file.suffix != ".md"]
    text = (PHOTOGRAPHS / "README.md").read_text()
    assert {file.name for file in files} == set(re.findall(r"^\| `([^`]+)`", text, re.MULTILINE))
    assert len(files) == 12
    assert all(file.stat().st_size < 200_000 for file in files)
    modes, orientations = set(), set()
    for file in files:
        with Image.open(file) as image:
            modes.add(image.mode)
            orientations.add(image.getexif().get(0x0112))
    assert {"RGB", "L", "RGBA"} <= modes
    assert 6 in orientations


@pytest.mark.slow
def test_peers_are_measured_on_the_same_values(monkeypatch, capsys):
    script = str(ROOT / "benchmarks" / "peers.py")
    monkeypatch.setattr(sys, "argv", [script, str(PHOTOGRAPHS), "--rounds", "1", "--images", "2"])
    runpy.run_path(script, run_name="__main__")  # which ends where values differ
    shown = capsys.readouterr().out
    for name in ("torchvision create_feature_extractor", "timm forward_intermediates", "vggenc torch fp32"):
        assert re.search(rf"^{name} +\d", shown, re.MULTILINE)


def test_ridge_baseline_tells_the_toy_set_s_classes_apart(monkeypatch, capsys, tmp_path):
    make_toy(tmp_path / "toy", images=8)
    script = str(ROOT / "examples" / "ridge_baseline.py")
    options = ["--image-size", "64", "--engine", "torch"]
    monkeypatch.setattr(sys, "argv", [script, str(tmp_path / "toy"), *options])
    runpy.run_path(script, run_name="__main__")
    shown = capsys.readouterr().out
    mca, chance, seen, u, s, h = map(float, re.findall(r"\d+\.\d", shown))
    assert chance == 20
    assert mca > 30
    assert seen > 50
    assert h == pytest.approx(2 * u * s / (u + s), abs=0.1)
