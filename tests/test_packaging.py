"The metadata, and what `pip install .` installs."

import shutil
import subprocess
import sys
import tarfile
import zipfile
from configparser import ConfigParser
from email.parser import Parser
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def clean_copy(folder):
    "The checkout as it would be cloned, below `folder`."
    skip = shutil.ignore_patterns(".*", "*.egg-info", "build", "dist", "__pycache__")
    return shutil.copytree(ROOT, folder / "source", ignore=skip)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    "The wheel of a clean copy of the checkout."
    folder = tmp_path_factory.mktemp("wheel")
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "-q",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        folder,
        clean_copy(folder),
    ]
    subprocess.run(command, check=True)
    (file,) = folder.glob("*.whl")
    return zipfile.ZipFile(file)


def test_source_distribution_can_be_built_from(tmp_path):
    command = [sys.executable, "setup.py", "-q", "sdist", "-d", tmp_path]
    subprocess.run(command, cwd=clean_copy(tmp_path), check=True)
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as files:
        names = {name.partition("/")[2] for name in files.getnames()}
    assert {"setup.py", "settings.ini", "pyproject.toml", "README.md", "LICENSE"} <= names


def test_wheel_holds_the_package_alone(wheel):
    files = {str(file.relative_to(ROOT)) for file in (ROOT / "channelslast").rglob("*") if file.is_file()}
    files = {file for file in files if "__pycache__" not in file}
    assert {name for name in wheel.namelist() if ".dist-info/" not in name} == files
    assert {"channelslast/py.typed", "channelslast/summary/tracer.py"} <= files


def test_metadata_is_that_of_settings_ini(wheel):
    settings = ConfigParser(delimiters=["="])
    settings.read(ROOT / "settings.ini")
    settings = settings["DEFAULT"]
    (name,) = [name for name in wheel.namelist() if name.endswith(".dist-info/METADATA")]
    metadata = Parser().parsestr(wheel.read(name).decode())
    assert (metadata["Name"], metadata["Version"]) == (settings["lib_name"], settings["version"])
    assert metadata["Requires-Python"] == f">={settings['min_python']}"
    required = [line for line in metadata.get_all("Requires-Dist") if "extra" not in line]
    assert sorted(required) == sorted(settings["requirements"].split())


def test_clone_beside_a_script_does_not_hide_the_package(tmp_path):
    "A folder of that name would be a namespace package, found before what an import hook knows."
    source = clean_copy(tmp_path)
    clone = source.rename(tmp_path / "channelslast")
    build = "from setuptools import build_meta; print(build_meta.build_editable('..'))"
    subprocess.run([sys.executable, "-c", build], cwd=clone, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    find = "import site, sys; from importlib.util import find_spec; site.addsitedir(sys.argv[1])"
    find += "; print(find_spec('channelslast').origin)"
    command = [sys.executable, "-S", "-E", "-c", find, tmp_path / "site"]
    found = subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True).stdout
    assert Path(found.strip()) == clone / "channelslast" / "__init__.py"
