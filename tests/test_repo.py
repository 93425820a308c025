"""The repository keeps its own rules: notebooks and modules in step, metadata in one place, nothing that belongs to one machine."""
import ast
import configparser
import json
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

from adm_repro.speed import load_results, short_table

NOTEBOOKS = sorted(p for p in (ROOT / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)
LESSONS = [p for p in NOTEBOOKS if p.parent == ROOT / "nbs" and p.stem[:2].isdigit()]
PAPER = [p for p in NOTEBOOKS if p.parent.name == "paper"]
MODULES = {p.stem for p in (ROOT / "adm_repro").glob("*.py")} - {"__init__", "__main__", "_modidx"}  # __main__ only calls the command


def settings():
    parser = configparser.ConfigParser(delimiters=["="])
    parser.read(ROOT / "settings.ini")
    return parser["DEFAULT"]


def cells(path, kind="code"):
    return [c for c in json.loads(path.read_text())["cells"] if c["cell_type"] == kind]


def tracked():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("not a git checkout")
    return [ROOT / name for name in listed.stdout.splitlines() if (ROOT / name).is_file()]


def test_modules_and_notebooks_are_in_step(tmp_path):
    """Exporting and cleaning a copy changes nothing: what is committed is what the notebooks say."""
    for name in ("nbs", "adm_repro"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints"))
    for name in ("settings.ini", "README.md"):
        shutil.copy(ROOT / name, tmp_path / name)
    for command in ("nbdev_clean", "nbdev_export"):
        subprocess.run([str(Path(sys.executable).with_name(command))], cwd=tmp_path, check=True, capture_output=True)
    for folder, pattern in (("adm_repro", "*.py"), ("nbs", "**/*.ipynb")):
        for path in sorted((ROOT / folder).glob(pattern)):
            if ".ipynb_checkpoints" not in path.parts:
                assert (tmp_path / path.relative_to(ROOT)).read_text() == path.read_text(), f"{path.name} is out of step: nbdev_clean, nbdev_export"


def test_every_module_has_its_notebook():
    exported = {re.search(r"#\| default_exp (\w+)", "".join(c["source"]))[1] for p in LESSONS for c in cells(p) if "default_exp" in "".join(c["source"])}
    assert exported == MODULES
    assert {p.stem[3:] for p in LESSONS} == MODULES


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_rules(path):
    notebook = json.loads(path.read_text())
    assert notebook["metadata"]["kernelspec"] == {"display_name": "python3", "language": "python", "name": "python3"}
    assert path.stat().st_size < 200_000, "a notebook stays under 200 KB"
    ids = [c["id"] for c in notebook["cells"]]
    assert len(set(ids)) == len(ids)
    first = "".join(notebook["cells"][0]["source"])
    assert first.startswith("# ") and "\n> " in first, "a title and one sentence come first"
    assert "import *" not in path.read_text()


@pytest.mark.parametrize("path", LESSONS, ids=lambda p: p.stem)
def test_lesson_has_prose_and_checks(path):
    code, prose = cells(path), cells(path, "markdown")
    exported = [c for c in code if "".join(c["source"]).startswith("#| export")]
    checks = [c for c in code if re.search(r"\b(assert|test_eq|test_close|expect_fail)\b", "".join(c["source"])) and c not in exported]
    assert len(prose) >= len(exported) // 2
    assert len(checks) >= min(len(exported) - 1, 3)


@pytest.mark.parametrize("path", PAPER, ids=lambda p: p.stem)
def test_paper_notebook_has_typed_parameters_and_exports_nothing(path):
    tagged = [c for c in cells(path) if "parameters" in c["metadata"].get("tags", [])]
    assert len(tagged) == 1
    source = "".join(tagged[0]["source"])
    for statement, line in zip(ast.parse(source).body, source.splitlines()):
        assert isinstance(statement, ast.AnnAssign) and statement.annotation.id in ("int", "float", "str", "bool", "list")
        ast.literal_eval(statement.value)
        assert re.search(r"  # \S", line), f"{line!r} does not say what it means"
    assert 'run_dir: str = ""' in source
    assert "#| export" not in path.read_text()


def test_imports_point_downwards():
    """A lesson imports only modules of lessons before it, so the numbers are the reading order."""
    order = {p.stem[3:]: i for i, p in enumerate(LESSONS)}
    for path in LESSONS:
        text = "\n".join("".join(c["source"]) for c in cells(path))
        for name in re.findall(r"^from adm_repro\.(\w+) import", text, re.M):
            assert order[name] < order[path.stem[3:]], f"{path.stem} imports {name}"


def test_library_imports_without_jupyter_nbdev_or_workflow():
    blocked = ("nbdev", "fastcore", "papermill", "IPython", "ipykernel", "jupyter_client", "nbconvert", "nbformat", "snakemake",
               "matplotlib", "sklearn", "pandas", "tabulate")
    code = f"import sys\nfor name in {blocked!r}: sys.modules[name] = None\n" + "\n".join(f"import adm_repro.{m}" for m in sorted(MODULES))
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_environment_mirrors_settings():
    """environment.yml names the same packages with the same bounds; conda calls torch pytorch."""
    text = (ROOT / "environment.yml").read_text()
    conda = {line.strip()[2:].strip() for line in text.splitlines() if line.strip().startswith("- ")} - {"conda-forge", "pip", "pip:"}
    cfg = settings()
    pip = {r for key in cfg if key.endswith("requirements") for r in cfg[key].split()} | {f"python>={cfg['min_python']}"}
    assert conda == {r.replace("torch>=", "pytorch>=") if r.startswith("torch>=") else r for r in pip}


def test_constraints_cover_all_requirements():
    pinned = {line.split("==")[0].lower() for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line}
    cfg = settings()
    wanted = {re.split(r"[<>=]", r)[0].lower() for key in ("requirements", "reproduce_requirements", "dev_requirements") for r in cfg[key].split()}
    assert wanted <= pinned


def test_no_path_of_a_machine_and_no_large_file():
    home = str(Path.home())
    for path in tracked():
        assert path.stat().st_size < 2_500_000, f"{path} is too large to commit"
        if path.suffix in (".py", ".ipynb", ".md", ".toml", ".json", ".html", ".ini", ".yml", ".txt", ""):
            text = path.read_text(errors="replace")
            for fragment in (f"{ROOT}{os.sep}", "/tmp" + "/tmp", *([f"{home}{os.sep}"] if len(home) > 1 else [])):
                assert fragment not in text, f"{path.relative_to(ROOT)} holds {fragment}"


def test_readme_commands_exist():
    readme, makefile = (ROOT / "README.md").read_text(), (ROOT / "Makefile").read_text()
    for target in set(re.findall(r"make (\w+)", readme)):
        assert re.search(rf"^{target}:", makefile, re.M), f"README names make {target}"
    assert "make test" in (ROOT / ".ci" / "run").read_text()
    for path in re.findall(r"\]\((?!https?:)([^)#]+)\)", readme):
        assert (ROOT / path).exists(), f"README links to {path}"


def test_commands_in_the_readme_have_their_options():
    from adm_repro.cli import main

    pages = [ROOT / "README.md", ROOT / "experiments" / "profiles" / "README.md", ROOT / "tests" / "cluster" / "README.md"]
    lines = [line.split("#")[0] for page in pages for line in page.read_text().splitlines() if re.match(r"(\.venv/bin/)?adm-repro ", line)]
    assert len(lines) > 10
    for line in lines:
        name, *words = shlex.split(line)[1:]
        words = words[:words.index("--")] if "--" in words else words
        known = {option for parameter in main.commands[name].params for option in (*parameter.opts, *parameter.secondary_opts)}
        assert {word.split("=")[0] for word in words if word.startswith("--")} <= known, line


def test_ruff_is_clean():
    subprocess.run([sys.executable, "-m", "ruff", "check", "--no-cache", "."], cwd=ROOT, check=True)


def test_benchmark_numbers_in_the_readme_are_the_recorded_ones():
    results = json.loads((ROOT / "benchmarks" / "results" / "evaluator.json").read_text())
    readme = (ROOT / "README.md").read_text()

    def recorded(section, what, who, key="seconds"):
        return next(row[key] for row in results[section]["rows"] if row["what"].startswith(what) and row["who"] == who)

    for section, what in (("frechet", "Frechet"), ("precision_recall", "precision"), ("inception", "Inception, 64")):
        key, unit, digits = ("images_per_second", "images/s", 1) if section == "inception" else ("seconds", "s", 3)
        values = [recorded(section, what, who, key) for who in ("adm_repro", "original evaluator", "torch-fidelity") if (section, who) != ("inception", "original evaluator")]
        shown = [f"{value:.{digits}f} {unit}" if section == "inception" else f"{value:#.3g} {unit}" for value in values]
        row = next(line for line in readme.splitlines() if line.startswith(f"| {what.split(',')[0]}"))
        assert all(text in row for text in shown), (row, shown)
    whole = recorded("whole", "five metrics", "adm_repro")
    assert f"features cached | {whole:#.3g} s |" in readme


def test_numbers_of_the_data_loader_in_the_readme_are_the_recorded_ones():
    rows = [row for row in json.loads((ROOT / "benchmarks" / "results" / "data_loading.json").read_text())["read"]["rows"] if row.get("crop") == "center"]
    readme = " ".join((ROOT / "README.md").read_text().split())
    ours = [row for row in rows if row["what"] == "JPEG folder"]
    said = re.search(r"A core reads about (\d+), (\d+) and (\d+) ImageNet-like images a second at (\d+), (\d+) and (\d+) pixels, "
                     r"([\d.]+) to ([\d.]+) times as many as the released loader: by prediction ([\d.]+), ([\d.]+) and ([\d.]+) cores feed an H200", readme)
    numbers = [float(number) for number in said.groups()]
    assert [row["size"] for row in ours] == numbers[3:6]
    assert [row["images_per_second_and_core"] for row in ours] == pytest.approx(numbers[:3], rel=0.02)
    assert [row["cores_per_gpu"]["H200, predicted"] for row in ours] == pytest.approx(numbers[8:], abs=0.05)
    faster = [row["ours_is_faster_by"] for row in rows if row["what"] == "released loader, JPEG folder"]
    assert (min(faster), max(faster)) == pytest.approx(tuple(numbers[6:8]), abs=0.05)


def test_the_lesson_on_speed_shows_what_the_benchmarks_left():
    cells = json.loads((ROOT / "nbs" / "35_speed.ipynb").read_text())["cells"]
    stored = ["".join(output["data"]["text/markdown"]) for cell in cells for output in cell.get("outputs", ()) if "text/markdown" in output.get("data", {})]
    assert stored == [short_table(load_results())], "execute nbs/35_speed.ipynb again"


def test_numbers_of_speed_in_the_readme_are_the_recorded_ones():
    result = {path.stem: json.loads(path.read_text()) for path in (ROOT / "benchmarks" / "results").glob("*.json")}
    readme = " ".join((ROOT / "README.md").read_text().split())
    assert f"<!-- speed -->\n{short_table(load_results())}\n<!-- end of speed -->" in (ROOT / "README.md").read_text(), "run python benchmarks/table.py"
    seconds = {row["what"]: row["processor_seconds"] for row in result["startup"]["rows"]}
    assert f"takes {seconds['adm-repro --help']:.2f} s of processor time, `import adm_repro` {seconds['import adm_repro']:.2f} s" in readme
    assert f"`import adm_repro.drawing` {seconds['import adm_repro.drawing']:.2f} s, of which torch's own {seconds['import torch']:.2f} s" in readme
    assert f"{seconds['first image, compiled, empty cache']:.0f} s with an empty and {seconds['first image, compiled, filled cache']:.0f} s with a filled cache" in readme
    moved = {row["setting"]: row["images"] for row in result["precision"]["rows"] if row["way"] == "bf16"}
    for steps, setting in (("250", "ancestral 250"), ("25 DDIM", "DDIM 25")):
        for images in (images for name, images in moved.items() if name.startswith(setting)):
            said = re.search(rf"by ([\d.]+) % in {steps} steps", readme)
            assert abs(100 * images["relative_difference"]["50 %"] - float(said[1])) < 0.05 and 0.4 < images["of_two_seeds"]["50 %"] < 0.7
    deviations = [row["deviation_percent"] for part in result["scaling_cpu"].values() for row in part["rows"]]
    assert f"was within {10 * math.ceil(max(map(abs, deviations)) / 10)} % of {len(deviations)} whole runs" in readme
