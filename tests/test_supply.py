"""What is installed in CI is what was pinned, by hash."""
import configparser
import re
import sys
import tomllib
from importlib.metadata import distributions

from conftest import ROOT

sys.path.insert(0, str(ROOT / "reliability"))
from constraints import ON_REQUEST, WITHOUT_HASH, pins

TEXT = (ROOT / "requirements-ci.txt").read_text()


def plain(name):
    return re.sub(r"[-_.]+", "-", name).lower()


def test_every_pin_has_hashes_and_nothing_else_has():
    blocks = re.findall(r'^([\w.-]+)==([^\s;]+)(?: ; (.*))? \\\n((?:    --hash=sha256:[0-9a-f]{64}(?: \\)?\n)+)', TEXT, re.M)
    assert {plain(name): version for name, version, _, _ in blocks} == {plain(name): version for name, version in pins().items() if name not in WITHOUT_HASH}
    assert sum(len(name) > 0 for name, *_ in blocks) == len(re.findall(r"^[^\s#]", TEXT, re.M)), "a line without hashes"
    assert {name for name, _, marker, _ in blocks if "extra ==" in marker} == set(ON_REQUEST)


def test_what_is_installed_is_pinned():
    """Dependencies of dependencies too, or they would come without a hash."""
    known = {plain(name) for name in pins()}
    asked = {plain(re.split(r"[\s;<>=!~\[(]", text)[0]) for package in distributions() if plain(package.name) in known for text in package.requires or [] if "extra" not in text}
    here = {plain(package.name) for package in distributions()}
    elsewhere = {name for name in asked & here - known if not name.startswith(("nvidia-", "cuda-")) and name not in ("triton", "setuptools", "pip", "wheel")}
    assert not elsewhere, f"installed, needed, and not pinned: {sorted(elsewhere)}"


def test_every_dependency_has_a_licence():
    rows = re.findall(r"^\| ([\w.-]+) \| (\S+) \| (.+) \|$", (ROOT / "LICENSES.md").read_text(), re.M)[1:]
    rows = [row for row in rows if row[0] != "---"]
    assert {name: version for name, version, _ in rows} == pins(), "python reliability/licences.py"
    assert all(licence not in ("not looked up", "") for *_, licence in rows)


def test_actions_are_pinned_and_can_only_read():
    text = (ROOT / ".github" / "workflows" / "ci.yml").read_text()
    uses = re.findall(r"uses: (\S+)", text)
    assert uses and all(re.fullmatch(r"[\w-]+/[\w-]+@[0-9a-f]{40}", one) for one in uses)
    assert "permissions:\n  contents: read\n" in text and "write" not in text


def test_installing_runs_no_code_of_ours():
    """Static metadata, built by setuptools itself, and the same as nbdev's."""
    assert not (ROOT / "setup.py").exists() and not (ROOT / "setup.cfg").exists()
    file = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert file["build-system"]["build-backend"] == "setuptools.build_meta" and "backend-path" not in file["build-system"]
    parser = configparser.ConfigParser(delimiters=["="])
    parser.read(ROOT / "settings.ini")
    ini, project = parser["DEFAULT"], file["project"]
    assert "dynamic" not in project and file["tool"]["setuptools"] == {"packages": [ini["lib_path"]], "package-data": {ini["lib_path"]: ["*.json", "*.html", "py.typed"]}}
    assert (project["name"], project["version"], project["description"], project["requires-python"]) == (ini["lib_name"], ini["version"], ini["description"], f">={ini['min_python']}")
    assert project["authors"] == [{"name": ini["author"], "email": ini["author_email"]}] and project["keywords"] == ini["keywords"].split()
    assert project["dependencies"] == ini["requirements"].split() and project["urls"] == {"Repository": ini["git_url"]} and project["license"].lower() == ini["license"]
    assert project["optional-dependencies"] == {key.removesuffix("_requirements"): ini[key].split() for key in ini if key.endswith("_requirements")}
    assert [f"{name}={place}" for name, place in project["scripts"].items()] == ini["console_scripts"].split()
