"""Each planted wrong formula of mutations.toml is caught by a lesson or a test."""
import gc
import json
import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import matplotlib
import pytest
from conftest import ROOT

TESTS = Path(__file__).parent
MUTATIONS = tomllib.loads((TESTS / "mutations.toml").read_text())["mutation"]


def run_lesson(cells):
    """Execute a notebook's code cells in order; an error surfaces as it does for a reader."""
    matplotlib.use("Agg")
    namespace = {"__name__": "__lesson__"}
    for source in cells:
        exec(compile(source, "lesson", "exec"), namespace)


def lesson_cells(module):
    if module == "winograd" and not shutil.which("c++"):
        pytest.skip("needs a C++ compiler")
    path, = (ROOT / "nbs").glob(f"[0-9][0-9]_{module}.ipynb")
    return ["".join(c["source"]) for c in json.loads(path.read_text())["cells"] if c["cell_type"] == "code"]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("module", sorted({m["module"] for m in MUTATIONS if m.get("lesson")}))
def test_the_right_formula_passes(module):
    """The control: without a planted error the same way of running a lesson succeeds."""
    run_lesson(lesson_cells(module))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda m: m["name"].replace(" ", "_"))
def test_planted_error_is_caught(mutation, tmp_path):
    module_text = (ROOT / "adm_repro" / f"{mutation['module']}.py").read_text()
    assert module_text.count(mutation["right"]) == 1, "the formula that the mutation replaces is no longer there: update mutations.toml"
    if mutation.get("lesson"):
        cells = lesson_cells(mutation["module"])
        changed = [cell.replace(mutation["right"], mutation["wrong"]) for cell in cells]
        assert changed != cells
        with pytest.raises(Exception) as failure:
            run_lesson(changed)
        del failure
        gc.collect()  # what the lesson left open is closed here, where warnings are ignored
        return
    shutil.copytree(ROOT / "adm_repro", tmp_path / "adm_repro", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "adm_repro" / f"{mutation['module']}.py").write_text(module_text.replace(mutation["right"], mutation["wrong"]))
    shutil.copytree(TESTS, tmp_path / "tests", ignore=shutil.ignore_patterns("__pycache__"))
    result = subprocess.run([sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(tmp_path / "tests" / mutation["test"])],
                            cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(tmp_path)}, capture_output=True, text=True, check=False)
    assert result.returncode == 1 and "1 failed" in result.stdout, result.stdout + result.stderr
