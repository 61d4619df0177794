import contextlib
import io
import json
import re
import runpy
import shlex
import sys
import warnings

import pytest
from conftest import ROOT

from vggenc.cli import main
from vggenc.stages import OUTPUTS, STAGES

TEXT = (ROOT / "README.md").read_text()
SCALE = (ROOT / "docs" / "scale.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """A folder that has the examples and nothing else, with the virtual environment of the tests."""
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    return tmp_path


def run(line: str, monkeypatch) -> None:
    """A shell line that calls `vggenc` or an example, in this process."""
    words = shlex.split(line)
    monkeypatch.setattr(sys, "argv", words if words[0] == "vggenc" else words[1:])
    with contextlib.ExitStack() as stack:
        if words[0] == "vggenc":
            caught = stack.enter_context(pytest.raises(SystemExit))
            main()
        else:
            runpy.run_path(words[1], run_name="__main__")
    if words[0] == "vggenc":
        assert not caught.value.code


@pytest.mark.slow
def test_every_snippet_runs_and_prints_what_stands_beside_it(elsewhere, monkeypatch):
    setup, *shell = blocks("bash")
    run(setup.splitlines()[0].split(" && ")[1], monkeypatch)
    for block in shell:
        for line in block.splitlines():
            if not re.search("tiny-imagenet|awa2|benchmark|int8|toy| zsl ", line):  # of other tests, or below
                run(line, monkeypatch)
    names: dict[str, object] = {}
    python = blocks("python")
    assert len(python) >= 5
    for block in python:
        shown = io.StringIO()
        with contextlib.redirect_stdout(shown), warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"lightning\..*")  # that there are few workers
            exec(block, names)
        said = re.findall(r"^print\(.*\)  # (.*)$|^# (\d.*)$", block, re.MULTILINE)
        assert shown.getvalue().splitlines() == [beside or below for beside, below in said]


@pytest.mark.slow
def test_zero_shot_lines_go_from_nothing_to_a_report_at_twice_chance(elsewhere, monkeypatch):
    for line in [line for block in blocks("bash") for line in block.splitlines() if " toy" in line]:
        run(line, monkeypatch)
    report = json.loads((elsewhere / "toy-run" / "report.json").read_text())
    assert report["results"]["attributes"]["czsl"]["mca"] >= 2 * report["chance"]
    assert (elsewhere / "toy-mat" / "res101.mat").exists()
    assert (elsewhere / "toy.html").read_text().startswith("<!doctype html>")


@pytest.mark.slow
def test_int8_line_runs(elsewhere, monkeypatch):
    [line] = [line for block in blocks("bash") for line in block.splitlines() if "int8" in line]
    run(line, monkeypatch)
    assert (elsewhere / "small" / "calibrated.xml").exists()


def test_setup_lines_are_those_that_ci_runs():
    first, second = blocks("bash")[0].splitlines()
    extract = "vggenc extract examples/images --output features --weights OXFORD_V1"
    assert first == f"python -m pip install -e '.[oxford]' && {extract}"
    assert second == "python -m pip install -e '.[dev]' && pytest"
    script = (ROOT / ".ci" / "run").read_text()
    assert 'grep "^python -m pip install -e" README.md' in script


def test_stage_table_is_that_of_the_code():
    rows = re.findall(r"^\| `(conv\d_\d)` \| (`features.*) \|$", TEXT, re.MULTILINE)
    expected, start = [], {"vgg19_bn": "", "vgg19": ""}
    for stage in STAGES:
        slices = [f"`features[{start[name]}:{stage.end[name]}]`" for name in start]
        start = {name: str(end) for name, end in stage.end.items()}
        side = 224 // stage.reduction
        cells = [*slices, f"{side}x{side}", str(stage.channels), str(stage.reduction)]
        expected.append((stage.name, " | ".join(cells)))
    assert rows == expected
    for name in OUTPUTS:
        assert f"`{name}`" in TEXT


def test_every_module_stands_in_the_table_of_files():
    for file in (ROOT / "vggenc").rglob("*.py"):
        if not file.name.startswith("__"):
            assert f"`{file.relative_to(ROOT / 'vggenc')}`" in TEXT


def test_every_test_that_backs_the_table_of_faults_exists():
    table = TEXT.split("## What can go wrong")[1].split("\n**")[0]
    code = "".join(file.read_text() for file in (ROOT / "tests").glob("*.py"))
    rows = [line for line in table.splitlines() if line.startswith("| ") and "| what happens |" not in line]
    assert len(rows) > 10
    for row in rows:
        names = re.findall(r"`(test_\w+)(?:\.py)?`", row.split("|")[3])
        assert names, row
        assert all(f"def {name}(" in code or (ROOT / "tests" / f"{name}.py").exists() for name in names), row


def test_commands_of_the_page_on_scale_have_their_options(vggenc):
    lines = re.findall(r"(?:^|-- |-m )vggenc (.*)$", SCALE.replace("\\\n", ""), re.MULTILINE)
    assert len(lines) >= 6
    for line in lines:
        assert vggenc(*shlex.split(line), "--help").returncode == 0
        assert vggenc(*shlex.split(line), "--no-such-option", "--help").returncode == 2


def test_the_check_of_the_page_on_scale_runs(elsewhere, monkeypatch, capsys):
    run("vggenc extract examples/images --output features --weights OXFORD_V1 --image-size 32", monkeypatch)
    capsys.readouterr()
    [block] = re.findall(r"^```python\n(.*?)^```", SCALE, re.MULTILINE | re.DOTALL)
    exec(block, {})
    assert capsys.readouterr().out.splitlines()[:2] == ["12 Counter({'ok': 12})", "True"]
