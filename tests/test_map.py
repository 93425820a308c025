"""The map of modules in CONTRIBUTING.md is drawn from the imports; what that page and the other notes name is there."""
import ast
import re
import tomllib
from functools import cache

import yaml
from conftest import ROOT

from adm_repro.cli import main

CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text()


def imported(tree):
    """Modules of this library that the statements of a tree import."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.level == 1 or (node.module or "").startswith("adm_repro")):
            name = (node.module or "").removeprefix("adm_repro").removeprefix(".")
            yield from [name] if name else [alias.name for alias in node.names if (ROOT / "adm_repro" / f"{alias.name}.py").is_file()]


@cache
def imports():
    """Module -> what it imports when it is loaded, and what only inside functions."""
    order = [re.sub(r"\d+_", "", path.stem) for path in sorted((ROOT / "nbs").glob("[0-9]*.ipynb"))]
    found = {}
    for name in order:
        tree = ast.parse((ROOT / "adm_repro" / f"{name}.py").read_text())
        now = {m for node in tree.body if isinstance(node, ast.ImportFrom) for m in imported(ast.Module([node], []))}
        found[name] = (sorted(now, key=order.index), sorted(set(imported(tree)) - now - {name}, key=order.index))
    return found


def reduced(found):
    """Without arrows that follow from others: a module that is reached anyway needs none of its own."""
    reach = {}
    for name, (now, _) in found.items():  # in reading order, what is imported comes first
        reach[name] = set(now).union(*(reach[m] for m in now)) if now else set()
    return {name: ([m for m in now if not any(m in reach[other] for other in now)], later) for name, (now, later) in found.items()}


def drawing():
    lines = ["```mermaid", "graph BT"]
    for name, (now, later) in reduced(imports()).items():
        lines += [f"  {name} --> {' & '.join(now)}"] * bool(now) + [f"  {name} -.-> {' & '.join(later)}"] * bool(later)
        lines += [f"  {name}"] * (not now and not later)
    return "\n".join([*lines, "```"])


def test_the_map_is_that_of_the_imports():
    said = CONTRIBUTING.split("<!-- map -->\n")[1].split("\n<!-- end of map -->")[0]
    assert said == drawing(), f"the map should be:\n{drawing()}"


def test_a_lesson_imports_only_earlier_ones_at_once():
    found = imports()
    order = list(found)
    assert all(order.index(m) < order.index(name) for name, (now, _) in found.items() for m in now)
    assert found["unet"][0] == ["blocks"] and "shortcuts" in found["drawing"][1]


def test_what_contributing_names_is_there():
    for path in re.findall(r"`((?:nbs|tests|experiments|adm_repro|reliability|docs|benchmarks)/[\w./-]+)`", CONTRIBUTING):
        assert (ROOT / path).exists() or path == "nbs/NN_name.ipynb", path
    for path in re.findall(r"(?:nbs|tests)/[\w./-]+", CONTRIBUTING.split("```sh")[1].split("```")[0]):
        assert (ROOT / path).exists(), path
    for path in re.findall(r"`([A-Z_]+\.(?:md|cff))`", CONTRIBUTING):
        assert (ROOT / path).is_file(), path
    makefile = (ROOT / "Makefile").read_text()
    assert all(re.search(rf"^{target}:", makefile, re.M) for target in re.findall(r"`?make (\w+)", CONTRIBUTING))
    assert set(re.findall(r"adm-repro (\w+)", CONTRIBUTING)) <= set(main.commands)


def test_forms_ask_for_the_record():
    forms = {path.stem: yaml.safe_load(path.read_text()) for path in (ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml")}
    assert set(forms) == {"bug", "different_result", "proposal", "config"}
    for name in ("bug", "different_result", "proposal"):
        fields = {part["id"]: part for part in forms[name]["body"]}
        assert forms[name]["name"] and all(part["attributes"]["label"] for part in fields.values()) and any(part.get("validations", {}).get("required") for part in fields.values())
        assert name == "proposal" or "record" in fields
    assert forms["different_result"]["body"][0]["validations"]["required"] and "doctor" in {part["id"] for part in forms["bug"]["body"]}
    assert "record.json" in (ROOT / ".github" / "pull_request_template.md").read_text()


def test_the_citation_is_of_this_version():
    cite = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert cite["version"] == project["version"] and cite["repository-code"] == project["urls"]["Repository"] and cite["license"] == project["license"]
    assert [author["family-names"] for author in cite["references"][0]["authors"]] == ["Dhariwal", "Nichol"] and "2105.05233" in cite["references"][0]["url"]


def test_every_data_set_is_in_the_statement():
    text = (ROOT / "DATA_STATEMENT.md").read_text()
    named = {parameters["data"] for path in [*(ROOT / "experiments").glob("*.toml"), *(ROOT / "experiments" / "rows").glob("*.toml")] for parameters in used(tomllib.loads(path.read_text()))}
    known = {"digits": "`digits`", "cifar10": "`cifar10`", "tinyimagenet64": "`tinyimagenet64`", "imagenet": "ImageNet"}
    assert named and all(known.get(name, "LSUN" if "lsun" in name or "bedroom" in name or "cat" in name or "horse" in name else name) in text for name in named), named


def used(file):
    parts = [*file.get("steps", {}).values(), *file.get("rows", {}).values(), *file.get("notebooks", {}).values()]
    return [part["parameters"] for part in parts if "data" in part.get("parameters", {})]
