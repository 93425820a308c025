"""Every step and every section runs: the smoke size by the workflow, the notebooks that need a download by hand."""
import json
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT
from test_workflow import adm

from adm_repro.paper import claims
from adm_repro.runs import load_experiment

NOTEBOOKS = {path.stem for path in (ROOT / "nbs" / "paper").glob("*.ipynb")}
SECTIONS = {path.stem for path in (ROOT / "nbs" / "paper").glob("*.ipynb") if "write_section(" in path.read_text()}
BY_HAND = ("evaluate", "released", "released_features", "time_network")  # as rows they need files that must be downloaded


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    root = tmp_path_factory.mktemp("smoke")
    for name in ("experiments", "nbs/paper"):
        shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns(".ipynb_checkpoints"))
    result = adm(root, "reproduce", "--size", "smoke", "--jobs", "2")
    assert result.returncode == 0, result.stdout + result.stderr
    return root


def test_nothing_is_left_out():
    experiment = load_experiment("smoke")
    assert set(experiment.sections) == SECTIONS
    assert {job.notebook for job in experiment.jobs.values()} | set(BY_HAND) | SECTIONS | {"report"} == NOTEBOOKS


def test_all_jobs_and_sections_of_the_smoke_size_run(smoke):
    experiment = load_experiment("smoke")
    assert len(list((smoke / "runs" / "smoke").glob("*/record.json"))) == len(experiment.jobs)
    text = (smoke / "reports" / "smoke" / "README.md").read_text()
    assert "Not run" not in text and "Failed" not in text
    assert text.count("\n## ") == len(experiment.sections) + 2  # the claims before, where the numbers come from after
    for id in claims():
        assert f"\n| {id} | " in text


@pytest.mark.parametrize("name", BY_HAND)
def test_by_hand_with_nothing_given(name, tmp_path):
    """As papermill's users run a notebook; nothing is downloaded."""
    done = subprocess.run([sys.executable, "-m", "papermill", "--no-progress-bar", "-k", "python3", str(ROOT / "nbs" / "paper" / f"{name}.ipynb"), str(tmp_path / "out.ipynb")],
                          cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


def test_by_hand_with_parameters(tmp_path):
    command = [sys.executable, "-m", "papermill", "--no-progress-bar", "-k", "python3", str(ROOT / "nbs" / "paper" / "train_diffusion.ipynb"), str(tmp_path / "out.ipynb")]
    parameters = ["-p", "iterations", "3", "-p", "batch_size", "8", "-p", "adagn", "False", "-p", "run_dir", str(tmp_path / "run")]
    subprocess.run([*command, *parameters], cwd=tmp_path, check=True, capture_output=True)
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["metrics"]["images_seen"] == 24 and 0 < result["metrics"]["held_out_mse"] < 2
    injected = [c for c in json.loads((tmp_path / "out.ipynb").read_text())["cells"] if "injected-parameters" in c["metadata"].get("tags", [])]
    assert "iterations = 3" in "".join(injected[0]["source"])
