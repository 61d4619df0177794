import os
import subprocess
import sys
import zipfile

import pytest
from conftest import PHOTOGRAPHS, ROOT


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        str(ROOT),
        "--no-deps",
        "--no-build-isolation",
        "-q",
        "-w",
        str(folder),
    ]
    subprocess.run(command, check=True)
    [file] = folder.glob("*.whl")
    return file


def test_wheel_holds_the_package_and_nothing_else(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert "vggenc/py.typed" in names
    assert {name.split("/")[0] for name in names} == {"vggenc", wheel.name.split("-py3")[0] + ".dist-info"}
    sources = {file.name for file in (ROOT / "vggenc").glob("*.*") if file.suffix in (".py", ".css", ".js")}
    assert sources <= {name.split("/")[-1] for name in names}


def test_wheel_installs_and_runs_outside_the_checkout(wheel, tmp_path):
    site = tmp_path / "site"
    install = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "-q",
        "--no-deps",
        "--no-index",
        "--target",
        str(site),
        str(wheel),
    ]
    subprocess.run(install, check=True)
    environment = {**os.environ, "PYTHONPATH": str(site)}
    where = subprocess.run(
        [sys.executable, "-c", "import vggenc; print(vggenc.__file__)"],
        cwd=tmp_path, env=environment, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert where.stdout.startswith(str(site))
    run = [str(site / "bin" / "vggenc"), "extract", str(PHOTOGRAPHS / "cat.jpg"), "--weights", "OXFORD_V1"]
    result = subprocess.run(
        [*run, "--image-size", "32"], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "features" / "part-00000.parquet").exists()


def test_public_names_are_there_and_documented():
    import vggenc

    for name in dir(vggenc):
        if name != "__version__":
            assert getattr(vggenc, name).__doc__
    with pytest.raises(AttributeError, match="nothing"):
        vggenc.nothing  # noqa: B018
