"""A release: what a wheel and an sdist hold, that the command starts quickly, and an archive of records whose bytes can be checked."""
import hashlib
import json
import shutil
import subprocess
import sys
import tarfile
import zipfile

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "reports"))
from archive import archive, version


@pytest.fixture(scope="module")
def dist(tmp_path_factory):
    root = tmp_path_factory.mktemp("package")
    for name in ("pyproject.toml", "settings.ini", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, root)
    shutil.copytree(ROOT / "adm_repro", root / "adm_repro", ignore=shutil.ignore_patterns("__pycache__"))
    build = "from setuptools import build_meta as b; b.build_wheel('dist'); b.build_sdist('dist')"
    subprocess.run([sys.executable, "-c", build], cwd=root, check=True, capture_output=True)
    return root / "dist"


def test_a_wheel_holds_the_library_and_its_data(dist):
    (wheel,) = dist.glob(f"adm_repro-{version(ROOT)}-py3-none-any.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    expected = {f"adm_repro/{path.name}" for path in (ROOT / "adm_repro").iterdir() if path.suffix in (".py", ".json", ".html", ".typed")}
    assert {name for name in names if name.startswith("adm_repro/")} == expected
    about = next(name for name in names if name.endswith("entry_points.txt"))
    assert b"adm-repro = adm_repro.cli:main" in zipfile.ZipFile(wheel).read(about)
    assert all(name.startswith("adm_repro") for name in names)


def test_an_sdist_can_be_built_again(dist, tmp_path):
    (sdist,) = dist.glob(f"adm_repro-{version(ROOT)}.tar.gz")
    with tarfile.open(sdist) as tar:
        tar.extractall(tmp_path, filter="data")
    (root,) = tmp_path.iterdir()
    assert all((root / name).is_file() for name in ("pyproject.toml", "settings.ini", "LICENSE", "README.md"))
    subprocess.run([sys.executable, "-c", "from setuptools import build_meta; build_meta.build_wheel('.')"], cwd=root, check=True, capture_output=True)
    (again,), (first,) = root.glob("*.whl"), dist.glob("*.whl")
    assert set(zipfile.ZipFile(again).namelist()) == set(zipfile.ZipFile(first).namelist())
    assert any(name.endswith("licenses/LICENSE") for name in zipfile.ZipFile(again).namelist())


def test_python_m_is_the_command_and_waits_for_no_torch():
    said = subprocess.run([sys.executable, "-X", "importtime", "-m", "adm_repro", "--version"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert said.stdout == f"adm-repro, version {version(ROOT)}\n" and " torch\n" not in said.stderr
    said = subprocess.run([sys.executable, "-c", "import sys, adm_repro; print(sorted({'torch', 'numpy', 'scipy', 'click'} & set(sys.modules)))"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert said.stdout == "[]\n"


def test_the_archive_of_records_is_the_same_twice_and_says_what_it_holds(tmp_path):
    first, second = archive(ROOT, tmp_path / "a"), archive(ROOT, tmp_path / "b")
    assert first.read_bytes() == second.read_bytes() and first.name == f"adm_repro-{version(ROOT)}-records.tar.gz"
    with tarfile.open(first) as tar:
        inside = {name.split("/", 1)[1]: tar.extractfile(name).read() for name in tar.getnames()}
    manifest = json.loads(inside.pop("MANIFEST.json"))
    assert manifest["files"] == {name: hashlib.sha256(content).hexdigest() for name, content in inside.items()}
    assert {name for name in inside if "/records/" in name} == {str(path.relative_to(ROOT)) for path in ROOT.glob("reports/*/records/*.json") if path.parent.parent.name != "smoke"}
