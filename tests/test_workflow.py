"""The whole path at a tiny size: run, run again, kill, continue, break a row, change a row."""
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT
from PIL import Image

TINY = """
title = "Tiny"
note = "Only for tests."
seeds = [0]
threads = 1
sections = ["theory", "table4", "figure4", "table14", "gallery"]
[notebooks.sample]
needs = { features = "features", classifier = "classifier", model = "conditional" }
parameters = { num_samples = 16, block_size = 8, steps = "3" }
[steps.features]
notebook = "train_features"
once = true
parameters = { iterations = 3 }
[steps.conditional]
notebook = "train_diffusion"
parameters = { iterations = 12, batch_size = 16, save_every = 2 }
[steps.classifier]
notebook = "train_classifier"
parameters = { iterations = 3 }
[rows.plain]
notebook = "sample"
tables = ["table4", "figure4"]
parameters = { guidance_scale = 0.0 }
[rows.guided]
notebook = "sample"
tables = ["table4", "figure4", "table14"]
parameters = { guidance_scale = 1.0 }
"""
NEW_ROW = """
[rows.stronger]
notebook = "sample"
tables = ["table4"]
parameters = { guidance_scale = 10.0 }
"""


@pytest.fixture(scope="module")
def make_root(tmp_path_factory):
    def make(name, toml=TINY):
        root = tmp_path_factory.mktemp(name)
        (root / "nbs").mkdir()
        shutil.copytree(ROOT / "nbs" / "paper", root / "nbs" / "paper", ignore=shutil.ignore_patterns(".ipynb_checkpoints"))
        (root / "experiments").mkdir()
        shutil.copy(ROOT / "experiments" / "Snakefile", root / "experiments")
        (root / "experiments" / "tiny.toml").write_text(toml)
        return root
    return make


def command(root, *args):
    env = os.environ | {"ADM_REPRO_ROOT": str(root), "PYTHONPATH": str(ROOT)}
    return dict(args=[sys.executable, "-m", "adm_repro.cli", *args], cwd=root, env=env, text=True)


def adm(root, *args):
    return subprocess.run(**command(root, *args), capture_output=True, check=False)


def records(root):
    """Everything in the records except where and when they were made."""
    found = {p.parent.name: json.loads(p.read_text()) for p in sorted((root / "runs" / "tiny").glob("*/record.json"))}
    return {name: {k: v for k, v in record.items() if k != "provenance"} for name, record in found.items()}


@pytest.fixture(scope="module")
def undisturbed(make_root):
    root = make_root("undisturbed")
    result = adm(root, "reproduce", "--size", "tiny", "--jobs", "2")
    assert result.returncode == 0, result.stdout + result.stderr
    (root / "said.txt").write_text(result.stdout)
    return root


def test_one_line_for_each_job(undisturbed):
    lines = (undisturbed / "said.txt").read_text().splitlines()
    assert lines[0].startswith("Tiny: 0 of 5 jobs are done, 5 to do") and lines[-1] == f"Report: {undisturbed / 'reports' / 'tiny' / 'index.html'}"
    assert [line.split("]")[0] for line in lines[1:-1]] == [f"[{i}/5" for i in range(1, 6)] and lines[-2].endswith("writing the report")
    assert {line.split()[1] for line in lines[1:-1]} == {"features", "conditional-seed0", "classifier-seed0", "plain-seed0", "guided-seed0"}
    assert "frechet_distance" in next(line for line in lines if "guided-seed0 done in" in line)


def test_a_picture_of_the_gallery_is_drawn_again(undisturbed):
    """Alone, and without what it needs; the report's grid shows the same."""
    text = (undisturbed / "reports" / "tiny" / "README.md").read_text()
    assert "adm-repro picture guided-seed0 0 --size tiny" in text and "(figures/gallery-conditional-3-steps-ancestral-guidance-scale-changes.png)" in text
    result = adm(undisturbed, "picture", "guided-seed0", "11", "2", "--size", "tiny", "--json")
    assert result.returncode == 0, result.stderr
    said = json.loads(result.stdout)
    record = next(record for name, record in records(undisturbed).items() if name.startswith("guided-seed0"))["result"]
    assert said["labels"][1] == record["first_labels"][2] and said["difference_to_record"] <= 1
    with Image.open(undisturbed / said["file"]) as picture:
        assert picture.size == (2 * 128 + 8, 128)
    (trained,) = (undisturbed / "runs" / "tiny").glob("conditional-seed0-*")
    shutil.move(trained, undisturbed / "kept")
    again = adm(undisturbed, "picture", "guided-seed0", "2", "--size", "tiny", "--out", "again.png")
    assert again.returncode == 0 and again.stderr.startswith("conditional-seed0 done in") and "as the record shows it" in again.stdout, again.stdout + again.stderr
    shutil.rmtree(trained)
    shutil.move(undisturbed / "kept", trained)
    for arguments, message in ((["guided-seed0", "16"], "images 0 to 15, it has no 16"), (["conditional-seed0", "0"], "draws no images; rows of tiny that do: guided, plain"),
                               (["guided-seed0", "0", "--out", "nowhere/x.png"], "nowhere is no folder")):
        refused = adm(undisturbed, "picture", *arguments, "--size", "tiny")
        assert refused.returncode == 2 and message in refused.stderr and "Traceback" not in refused.stderr


def test_everything_is_there(undisturbed):
    report = undisturbed / "reports" / "tiny"
    assert len(records(undisturbed)) == 5
    assert {p.name for p in report.iterdir()} == {"README.md", "index.html", "figures", "records"}
    assert len(list((report / "records").glob("*.json"))) == 5
    listed = adm(undisturbed, "list", "--size", "tiny").stdout
    assert all(f"{name} " in listed for name in ("features", "conditional", "classifier", "plain", "guided")) and "0/1" not in listed
    record = json.loads((report / "records" / "guided-seed0.json").read_text())
    assert record["parameters"]["sampler"] == "ancestral"  # defaults are recorded, too
    assert set(record["provenance"]) >= {"commit", "versions", "hardware", "seconds"}


def test_a_second_run_does_nothing(undisturbed):
    before = {p: p.stat().st_mtime_ns for p in undisturbed.rglob("*") if p.is_file() and ".snakemake" not in p.parts and p.name != ".lock"}
    result = adm(undisturbed, "reproduce", "--size", "tiny")
    assert result.returncode == 0 and "5 of 5 jobs are done" in result.stdout
    after = {p: p.stat().st_mtime_ns for p in undisturbed.rglob("*") if p.is_file() and ".snakemake" not in p.parts and p.name != ".lock"}
    assert before == after


def test_killed_runs_end_with_the_same_records(undisturbed, make_root):
    """Killed in the middle of training, and again in the middle of sampling."""
    root = make_root("killed")
    for halfway, unfinished in (("conditional-seed0-*/training.safetensors", "conditional"), ("guided-seed0-*/blocks/block_000000.npz", "guided")):
        victim = subprocess.Popen(**command(root, "reproduce", "--size", "tiny", "--jobs", "2"), start_new_session=True,
                                  stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while not list((root / "runs" / "tiny").glob(halfway)):
            assert victim.poll() is None, "the run ended before it could be killed"
            time.sleep(0.01)
        os.killpg(victim.pid, signal.SIGKILL)  # the command, Snakemake, and the jobs; kernels notice and stop
        victim.wait()
        assert not any(name.startswith(unfinished) for name in records(root)), "a half-done job looks finished"
    result = adm(root, "reproduce", "--size", "tiny", "--jobs", "2")
    assert result.returncode == 0, result.stdout + result.stderr
    assert records(root) == records(undisturbed)
    assert not list((root / "runs").rglob(".*.tmp*")), "leftovers of killed processes"


def test_a_new_row_appears_in_list_plan_and_report(undisturbed, make_root):
    root = make_root("new-row", TINY + NEW_ROW)
    shutil.copytree(undisturbed / "runs", root / "runs")
    shutil.copytree(undisturbed / "reports", root / "reports")
    assert "stronger" in adm(root, "list", "--size", "tiny").stdout
    plan = adm(root, "reproduce", "--size", "tiny", "--dry-run")
    assert "5 of 6 jobs are done" in plan.stdout and re.search(r"^stronger +sample +to do", plan.stdout, re.M)
    assert adm(root, "report", "--size", "tiny").returncode == 0
    assert "Not run: 1 of 6 jobs" in (root / "reports" / "tiny" / "README.md").read_text()
    assert adm(root, "run", "stronger", "--size", "tiny").returncode == 0
    assert adm(root, "report", "--size", "tiny").returncode == 0
    assert "conditional, scale 10" in (root / "reports" / "tiny" / "README.md").read_text()
    assert "Not run" not in (root / "reports" / "tiny" / "README.md").read_text()


def test_a_failing_row_stops_nothing_else(undisturbed, make_root):
    root = make_root("failing", TINY + NEW_ROW.replace("guidance_scale = 10.0", "guidance_scale = 10.0, data = \"nowhere\""))
    shutil.copytree(undisturbed / "runs", root / "runs")
    shutil.rmtree(next((root / "runs" / "tiny").glob("guided-*")))
    result = adm(root, "reproduce", "--size", "tiny", "--jobs", "2")
    assert result.returncode == 1
    assert "'nowhere' is neither a named data set" in result.stderr  # the notebook's own error reaches the terminal
    assert "again: adm-repro run stronger-seed0 --size tiny" in result.stderr and "Of 6 jobs, 5 are done; 1 failed" in result.stderr
    assert "[5/6] guided-seed0 done in" in result.stdout and "plain-seed0" not in result.stdout  # what was done before is not said again
    assert any(name.startswith("guided-seed0") for name in records(root))
    text = (root / "reports" / "tiny" / "README.md").read_text()
    assert "Not run: 1 of 6 jobs** (stronger-seed0)" in text
    assert "**Failed: stronger-seed0**" in text and "Run it again with `adm-repro reproduce stronger-seed0 --size tiny`" in text and "| failed: " in text


@pytest.mark.parametrize(("change", "message"), [
    (("steps = \"3\"", "stepz = \"3\""), "has no parameter 'stepz'"),
    (("steps = \"3\"", "steps = \"ddim999\""), "no integer stride"),
    (("guidance_scale = 1.0", "guidance_scale = -1.0"), "guidance_scale must be"),
    (("iterations = 12", "iterations = 0"), "must be at least 1"),
    (("\"table14\", \"gallery\"]\n[notebooks", "\"dimm\"]\n[notebooks"), "no section table14; sections are theory, table4, figure4, dimm"),
    (("seeds = [0]", "seeds = [0, 0]"), "seeds must be a list of different whole numbers"),
    (("guidance_scale = 1.0", "guidance_scale = \"1.0\""), "should be a float"),
    (("model = \"conditional\"", "model = \"conditonal\""), "needs 'conditonal', which is no step"),
    (("notebook = \"train_features\"", "notebook = \"train_featurez\""), "no notebook nbs/paper/train_featurez.ipynb"),
    (("seeds = [0]", "seeds = [0"), "is not valid TOML"),
])
def test_mistakes_are_found_before_anything_runs(make_root, change, message):
    root = make_root("mistake", TINY.replace(*change))
    result = adm(root, "reproduce", "--size", "tiny")
    assert result.returncode == 2
    assert message in result.stderr and "Traceback" not in result.stderr
    assert not list(root.glob("runs/**/record.json"))


def test_two_at_once_are_refused(make_root):
    root = make_root("two")
    first = subprocess.Popen(**command(root, "reproduce", "--size", "tiny"), start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    lock = root / "runs" / "tiny" / ".lock"
    while not (lock.exists() and lock.read_text()):
        time.sleep(0.05)
    result = adm(root, "reproduce", "--size", "tiny")
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    assert result.returncode == 2 and f"in use by process {first.pid}" in result.stderr


def test_outside_the_repository_the_message_says_where_to_go(tmp_path):
    env = {k: v for k, v in os.environ.items() if k != "ADM_REPRO_ROOT"} | {"PYTHONPATH": str(ROOT)}
    result = subprocess.run([sys.executable, "-m", "adm_repro.cli", "list"], cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
    assert result.returncode == 2 and "change into your clone" in result.stderr
