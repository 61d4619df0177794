import json
import sys

import pytest
import torch
from conftest import PHOTOGRAPHS, Terminal
from PIL import Image

from vggenc import UsageError, benchmark, contenders
from vggenc.benchmark import draw, measure
from vggenc.inputs import find_images

CPU = torch.device("cpu")


def test_contenders_are_the_plain_loop_and_what_is_installed_and_able(monkeypatch):
    monkeypatch.setattr(contenders, "has_bf16", lambda device: True)
    names = [each.name for each in contenders.contenders(CPU)]
    fp32 = ["torch fp32", "openvino fp32", "ncnn fp32"]
    assert names == ["plain loop", *fp32, "torch bf16", "ncnn bf16", "openvino bf16", "openvino int8"]
    monkeypatch.setattr(contenders, "has_bf16", lambda device: False)
    assert "torch bf16" not in [each.name for each in contenders.contenders(CPU)]
    names = [each.name for each in contenders.contenders(torch.device("cuda"))]
    assert names == ["plain loop", "torch fp32", "torch bf16", "torch fp16"]
    monkeypatch.setattr(contenders, "installed", lambda engine: engine == "torch")
    assert [each.name for each in contenders.contenders(CPU)] == ["plain loop", "torch fp32"]


def test_peak_is_of_the_order_that_one_product_shows():
    found = contenders.peak(CPU, ["fp32"])["fp32"]
    a = torch.rand(1024, 1024)
    seconds = contenders._fastest(lambda: a @ a, CPU)
    assert 0.3 < found / (2 * 1024**3 / seconds / 1e9) < 10


@pytest.mark.slow
def test_benchmark_measures_every_contender(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setattr(benchmark, "_SECONDS", 0.3)
    report = measure(
        find_images(PHOTOGRAPHS), "OXFORD_V1", None, rounds=1, images=2, image_size=64, progress=True
    )
    assert "100%" in sys.stderr.getvalue()
    json.dumps(report)
    rows = {row["engine"]: row for row in report["engines"]}
    assert list(rows) == [each.name for each in contenders.contenders(CPU)]
    assert rows["plain loop"]["ratio"] == 1
    for name, row in rows.items():
        assert row["images/s"] > 0
        assert row["worst cosine"] > (0.99 if "int8" in name else 0.9999)
        assert row["peak MB"] > 200
    assert report["depth"][0]["torch fp32"] == "up to conv2_2"
    assert len(report["files"]) == len(rows) - 1 + 1
    one = measure(
        None, "OXFORD_V1", None, rounds=1, images=1, image_size=32, engine="torch", end_to_end=False
    )
    assert [row["engine"] for row in one["engines"]] == ["plain loop", "torch fp32"]
    with pytest.raises(UsageError, match="the engine 'magic' can't run here; one of torch, ncnn, openvino"):
        measure(None, "OXFORD_V1", None, engine="magic")
    draw(report, tmp_path / "chart.png")
    with Image.open(tmp_path / "chart.png") as chart:
        assert chart.width > 600
