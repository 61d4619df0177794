import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import PHOTOGRAPHS, Terminal
from PIL import Image

from vggenc import __version__, read_features
from vggenc.options import Options
from vggenc.stages import OUTPUTS, STAGE_NAMES

FAST = ["--weights", "OXFORD_V1", "--image-size", "32", "--outputs", "conv2_2", "--num-workers", "0"]


def test_a_folder_becomes_a_table_and_a_summary(vggenc, tmp_path):
    result = vggenc("extract", PHOTOGRAPHS, "--output", tmp_path / "f", *FAST)
    assert result.returncode == 0
    assert result.stderr == ""
    facts = dict(
        line.split(maxsplit=1) for line in result.stdout.replace("first part s", "first").splitlines()
    )
    assert float(facts.pop("images/s")) > 0
    assert float(facts.pop("first")) > 0
    same = {"images": "12", "failed": "0", "computed": "12", "engine": "torch", "precision": "fp32"}
    assert facts == {**same, "folder": f"{tmp_path}/f"}
    assert read_features(tmp_path / "f").num_rows == 12


def test_failed_images_are_told_and_exit_with_3(vggenc, folder, tmp_path):
    for i in range(7):
        (folder / f"bad{i}.jpg").write_bytes(b"")
    result = vggenc("extract", folder, "--output", tmp_path / "f", "--json", *FAST)
    assert result.returncode == 3
    summary = json.loads(result.stdout)
    assert summary.pop("images/s") > summary.pop("first part s") > 0
    same = {"images": 17, "failed": 7, "computed": 17, "engine": "torch", "precision": "fp32"}
    assert summary == {**same, "folder": f"{tmp_path}/f"}
    lines = result.stderr.splitlines()
    assert lines[0] == "7 of 17 images failed:"
    assert lines[1:6] == [f"  bad{i}.jpg: empty file" for i in range(5)]
    assert len(lines) == 7


def test_the_issues_folder_of_good_and_bad_files(vggenc, tmp_path):
    """Good files, and each kind of bad or odd one: a row each, in order, with the right status."""
    folder = tmp_path / "mixed"
    folder.mkdir()
    noise = Image.effect_noise((60, 50), 90).convert("RGB")
    expected = {}

    def add(name, status, save):
        save(folder / name)
        expected[name] = status

    add("a-good.jpg", "ok", noise.save)
    add("b-empty.jpg", "failed", lambda file: file.write_bytes(b""))
    add(
        "c-truncated.jpg", "failed", lambda file: file.write_bytes((folder / "a-good.jpg").read_bytes()[:900])
    )
    add("d-text.jpg", "failed", lambda file: file.write_text("text"))
    add("e-cmyk.jpg", "ok", noise.convert("CMYK").save)
    add("f-16bit.png", "ok", noise.convert("I;16").save)
    add("g-palette.png", "ok", lambda file: noise.quantize(8).save(file, transparency=0))
    add("h-moving.gif", "ok", lambda file: noise.save(file, save_all=True, append_images=[noise.rotate(90)]))
    exif = Image.Exif()
    exif[0x0112] = 6
    add("i-turned.jpg", "ok", lambda file: noise.save(file, exif=exif))
    add("j-dangling.jpg", "failed", lambda file: file.symlink_to("nothing"))
    result = vggenc("extract", folder, "--output", tmp_path / "f", *FAST)
    assert result.returncode == 3
    rows = read_features(tmp_path / "f").to_pylist()
    assert {row["path"]: row["status"] for row in rows} == expected
    assert [row["path"] for row in rows] == sorted(expected)
    sizes = {row["path"]: (row["width"], row["height"]) for row in rows if row["status"] == "ok"}
    assert sizes.pop("i-turned.jpg") == (50, 60)
    assert set(sizes.values()) == {(60, 50)}


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["extract", "nowhere", *FAST], "no such file or folder: nowhere"),
        (["extract", PHOTOGRAPHS, *FAST, "--outputs", "conv1_1"], "conv1_1"),
        (["extract", PHOTOGRAPHS, *FAST, "--outputs", "fc7"], "never trained"),
        (
            ["extract", PHOTOGRAPHS, *FAST, "--backbone", "vgg19_bn"],
            "exists for vgg19, not for backbone 'vgg19_bn'",
        ),
        (
            ["extract", PHOTOGRAPHS, *FAST, "--batch-size", "0"],
            "batch_size must be a whole number from 1 to 65536",
        ),
        (["extract", PHOTOGRAPHS, *FAST, "--device", "cuda:99"], "device 'cuda:99' can't be used"),
        (["extract", PHOTOGRAPHS, *FAST, "--weights", "no.pth"], "no such weights file"),
        (["extract", PHOTOGRAPHS, "--no-such-option"], "No such option"),
        (["weights", "fetch", "NOBODYS"], "NOBODYS"),
    ],
)
def test_wrong_usage_is_one_message_and_exit_code_2(vggenc, monkeypatch, arguments, told, tmp_path):
    monkeypatch.chdir(tmp_path)
    result = vggenc(*arguments)
    assert result.returncode == 2
    assert told in result.stderr
    assert "Traceback" not in result.stderr
    assert result.stdout == ""
    assert list(tmp_path.iterdir()) == []


def test_running_out_of_memory_is_told_with_what_needs_less(vggenc, tmp_path, monkeypatch):
    monkeypatch.setattr("vggenc.engines.Engine.compute", lambda *_: torch.empty(2**50))
    result = vggenc("extract", PHOTOGRAPHS, "--output", tmp_path / "f", *FAST)
    assert result.returncode == 1
    assert "allocate" in result.stderr
    assert "a smaller --batch-size or --image-size needs less" in result.stderr
    assert "Traceback" not in result.stderr


def test_weights_that_cannot_be_had_exit_with_1(vggenc, tmp_path):
    result = vggenc("extract", PHOTOGRAPHS, "--output", tmp_path / "f")
    assert result.returncode == 1
    assert result.stderr.startswith("error: IMAGENET1K_V1 for vgg19_bn is not on this machine")
    assert "--weights PATH" in result.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_interruption_leaves_whole_parts_and_says_how_to_go_on(folder, tmp_path, number):
    for i in range(400):
        (folder / f"x{i}.png").symlink_to(folder / "1.png")
    options = ["--part-size", "2", "--image-size", "64", "--weights", "OXFORD_V1"]
    command = [
        sys.executable,
        "-m",
        "vggenc",
        "extract",
        str(folder),
        "--output",
        str(tmp_path / "f"),
        *options,
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        while len(list(tmp_path.glob("f/*.parquet"))) < 3:
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.05)
        process.send_signal(number)
        out, err = process.communicate()
    assert process.returncode == 1
    assert out == ""
    assert re.match(r"stopped; [1-9]\d* of 410 rows are in ", err)
    assert f"vggenc extract {folder} --output {tmp_path}/f --part-size 2" in err
    assert "Traceback" not in err
    names = {file.name for file in (tmp_path / "f").iterdir()}
    assert all(re.fullmatch(r"part-\d{5}\.parquet|manifest\.json", name) for name in names)
    assert read_features(tmp_path / "f", partial=True).num_rows == 2 * (len(names) - 1)


def test_an_interruption_before_the_folder_is_the_runs_own_tells_of_no_rows(vggenc, tmp_path, monkeypatch):
    vggenc("extract", PHOTOGRAPHS, "--output", tmp_path / "f", *FAST)

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("vggenc.checkpoint.load", interrupted)
    result = vggenc("extract", PHOTOGRAPHS, "--output", tmp_path / "f", "--overwrite", *FAST)
    assert result.returncode == 1
    assert result.stderr.startswith("stopped; nothing was written, this goes on:\n")
    assert "--overwrite" in result.stderr
    assert read_features(tmp_path / "f").num_rows == 12


def test_control_characters_of_names_do_not_reach_the_terminal(vggenc, folder, tmp_path):
    (folder / "a\x1b[2J\n.png").write_bytes(b"")
    result = vggenc("extract", folder, "--output", tmp_path / "f", *FAST)
    assert result.stderr.splitlines()[1] == r"  a\x1b[2J\n.png: empty file"


def test_names_with_nul_in_a_list_are_failed_rows(vggenc, folder, tmp_path):
    (tmp_path / "list.txt").write_text(f"{folder}/1.png\n{folder}/a\0b.png\n")
    result = vggenc("extract", f"@{tmp_path}/list.txt", "--output", tmp_path / "f", *FAST)
    assert result.returncode == 3
    assert read_features(tmp_path / "f")["status"].to_pylist() == ["ok", "failed"]


@pytest.mark.parametrize("closed", ["0<&- 1>&- 2>&-", pytest.param("2>&-", marks=pytest.mark.slow)])
def test_closed_standard_streams_change_nothing_on_disk(vggenc, tmp_path, closed):
    vggenc("extract", PHOTOGRAPHS, "--output", tmp_path / "open", *FAST)
    command = [sys.executable, "-m", "vggenc", "extract", PHOTOGRAPHS, "--output", tmp_path / "closed", *FAST]
    result = subprocess.run(f"{shlex.join(map(str, command))} {closed}", shell=True, check=False)
    assert result.returncode == 0
    assert read_features(tmp_path / "closed").equals(read_features(tmp_path / "open"))


def test_a_terminal_sees_a_progress_bar(vggenc, monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "stderr", Terminal())
    vggenc("extract", PHOTOGRAPHS, "--output", tmp_path / "f", *FAST)
    for part in ("100%", "12/12", "img/s", "failed=0"):
        assert part in sys.stderr.getvalue()


def without_torch(*arguments: str) -> str:
    """What the command prints in a process of its own, which must not have imported torch."""
    code = (
        "import sys; from vggenc.cli import main\n"
        "try: main()\n"
        "finally: assert not {'torch', 'torchvision', 'pyarrow'} & set(sys.modules)"
    )
    environment = {**os.environ, "TERMINAL_WIDTH": "300", "NO_COLOR": "1"}
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout


def test_help_and_version_do_not_import_torch():
    assert without_torch("--version") == f"vggenc {__version__}\n"
    assert "weights" in without_torch("--help")
    assert "fetch" in without_torch("weights", "--help")


def test_help_of_extract_names_every_option_output_and_default():
    text = without_torch("extract", "--help")
    names = (
        "output outputs pool weights backbone batch-size part-size num-workers device precision image-size"
    )
    fields = (name.replace("_", "-") for name in Options.__dataclass_fields__)
    for option in (*names.split(), *fields, "overwrite", "json"):
        assert f"--{option}" in text
    for name in (*OUTPUTS, "IMAGENET1K_V1"):
        assert name in text


def test_info_shows_the_stage_table_versions_and_devices(vggenc):
    lines = vggenc("info").stdout.splitlines()
    assert [line.split() for line in lines[1:5]] == [
        ["conv2_2", "128", "2", "112"],
        ["conv3_4", "256", "4", "56"],
        ["conv4_4", "512", "8", "28"],
        ["conv5_4", "512", "16", "14"],
    ]
    facts = json.loads(vggenc("info", "--json").stdout)
    assert [stage["stage"] for stage in facts["stages"]] == list(STAGE_NAMES)
    assert facts["versions"]["vggenc"] == __version__
    assert facts["devices"][0].startswith("cpu")


def test_weights_list_fetch_and_verify(vggenc, tmp_path):
    listed = json.loads(vggenc("weights", "list", "--json").stdout)
    assert [(row["name"], row["backbone"]) for row in listed] == [
        ("IMAGENET1K_V1", "vgg19_bn"),
        ("IMAGENET1K_V1", "vgg19"),
        ("OXFORD_V1", "vgg19"),
    ]
    assert "OXFORD_V1" in vggenc("weights", "list").stdout
    fetched = vggenc("weights", "fetch", "OXFORD_V1", "--to", tmp_path).stdout.strip()
    assert os.path.dirname(fetched) == str(tmp_path)
    facts = json.loads(vggenc("weights", "verify", fetched, "--json").stdout)
    assert (facts["name"], facts["backbone"], facts["trained"]) == (
        "OXFORD_V1",
        "vgg19",
        list(STAGE_NAMES),
    )
    with open(fetched, "r+b") as file:
        file.seek(10_000_000)
        file.write(b"\0\0\0\0")
    damaged = vggenc("weights", "verify", fetched)
    assert damaged.returncode == 1
    assert fetched in damaged.stderr
    assert "sha256" in damaged.stderr
