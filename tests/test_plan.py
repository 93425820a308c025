"""Plans and names without training anything: what would run, how long it takes, what failed, who measures which line of the paper."""
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import types
from dataclasses import dataclass

import pytest
from click.testing import CliRunner
from conftest import ROOT

from adm_repro.cli import _plan, _Progress, main
from adm_repro.files import write_json
from adm_repro.runs import RunError, job_folder, job_recipe, load_experiment, read_failure, sizes

RATIO = """
x: float = 1.0  # divided
y: float = 1.0  # divided by
seed: int = 0  # unused
device: str = "cpu"  # unused
model: str = ""  # unused
run_dir: str = ""  # folder of the run
"""
TABLES = """
title = "Ratios"
note = "Only for tests."
seeds = [4, 2]
sections = ["table4", "figure4"]
[steps.model]
notebook = "ratio"
[rows.weak]
notebook = "ratio"
tables = ["table4"]
needs = { model = "model" }
paper = { table4 = { conditional = true, scale = 1.0 } }
[rows.strong]
notebook = "ratio"
tables = ["table4", "figure4"]
needs = { model = "model" }
paper = { table4 = { conditional = true, scale = 10.0 } }
note = "half the steps"
[rows.beside]
notebook = "ratio"
tables = ["figure4"]
parameters = { x = 3.0 }
"""


@pytest.fixture()
def root(tmp_path, monkeypatch):
    """A repository with one small notebook and two sizes that share their rows."""
    (tmp_path / "experiments" / "rows").mkdir(parents=True)
    (tmp_path / "nbs" / "paper").mkdir(parents=True)
    shutil.copy(ROOT / "experiments" / "Snakefile", tmp_path / "experiments")
    (tmp_path / "experiments" / "rows" / "tables.toml").write_text(TABLES)
    (tmp_path / "experiments" / "small.toml").write_text('extends = "tables"\ndrop = ["beside"]\n')
    (tmp_path / "experiments" / "large.toml").write_text('extends = "tables"\nfull_size = true\n[rows.strong]\nparameters = { x = 5.0 }\n')
    cells = [(RATIO.strip(), ["parameters"]), ("if x < 0:\n    raise ValueError(f'x must not be negative, got {x}')", ["check"]),
             ("from adm_repro.runs import write_result\nwrite_result(run_dir, metrics={'ratio': x / y, 'fid': 2.5})", [])]
    notebook = {"cells": [{"cell_type": "code", "id": f"c{i}", "metadata": {"tags": tags}, "source": source, "outputs": [], "execution_count": None} for i, (source, tags) in enumerate(cells)],
                "metadata": {"kernelspec": {"name": "python3", "language": "python", "display_name": "python3"}}, "nbformat": 4, "nbformat_minor": 5}
    for name in ("ratio", "table4", "figure4", "report"):  # sections are looked up, not run
        (tmp_path / "nbs" / "paper" / f"{name}.ipynb").write_text(json.dumps(notebook))
    monkeypatch.setenv("ADM_REPRO_ROOT", str(tmp_path))
    cost = types.ModuleType("adm_repro.cost")
    cost.plan_cost = lambda notebook, parameters, needs: None
    monkeypatch.setitem(sys.modules, "adm_repro.cost", cost)
    return tmp_path


def adm(*args):
    return CliRunner().invoke(main, args, catch_exceptions=False)


def record_of(experiment, id, seconds, size=1000, folder=None):
    """Pretend that a job is done: here, or committed in `folder`."""
    job = experiment.jobs[id]
    record = {"job": id, "name": job.name, "seed": job.seed, "notebook": job.notebook, "recipe": job_recipe(experiment, job), "result": {"metrics": {"fid": 2.5}},
              "provenance": {"seconds": seconds, "bytes": size}}
    write_json(folder / f"{id}.json" if folder else job_folder(experiment, job) / "record.json", record)


def plan(*args):
    result = adm("reproduce", *args, "--dry-run", "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.output)


def test_a_size_extends_rows_and_drops_some(root):
    assert sizes() == ["large", "small"]  # rows that are shared are no size
    small, large = load_experiment("small"), load_experiment("large", 3)
    assert list(small.jobs) == ["model-seed4", "model-seed2", "weak-seed4", "weak-seed2", "strong-seed4", "strong-seed2"]
    assert large.seeds == (4, 2, 5) and large.full_size and not small.full_size
    assert large.jobs["strong-seed5"].parameters == {"x": 5.0, "seed": 5} and large.jobs["strong-seed5"].note == "half the steps"
    same = [job_recipe(e, e.jobs["weak-seed4"]) for e in (small, large)]
    assert same[0] == same[1]


@pytest.mark.parametrize(("text", "message"), [
    ('extends = "tabels"', "extends 'tabels', but there is no experiments/rows/tabels.toml; there are tables"),
    ('extends = "tables"\ndrop = ["besides"]', "drop names 'besides'; experiments/rows/tables.toml has model, weak, strong, beside"),
    ('extends = "tables"\ndrop = ["model"]', "weak: needs 'model', which is no step"),
    ('extends = "tables"\n[rows.weak.paper.table4]\nscale = 7.0', "small.toml, weak: paper: table4 = {'conditional': True, 'scale': 7.0} picks 0 of its 6 lines"),
    ('extends = "tables"\n[rows.weak.paper.table99]\nscale = 7.0', "the paper has no entry 'table99'"),
    ('extends = "tables"\n[rows.new]\nnotebook = "ratio"\ntables = ["table4"]\npaper = { table4 = { scale = 1.0 } }', "new: paper: table4 = {'scale': 1.0} picks 2 of its 6 lines"),
    ('drop = ["weak"]\n' + TABLES, "there is no extends"),
    ('extends = "tables"\n[rows.weak]\nparameters = { x = -1.0 }', "weak-seed4: x must not be negative"),
])
def test_mistakes_in_shared_rows_are_named(root, text, message):
    (root / "experiments" / "small.toml").write_text(text)
    result = adm("reproduce", "--size", "small", "--dry-run")
    assert result.exit_code == 2 and message in result.output and len(result.output.splitlines()) == 1


def test_description_of_a_row_is_no_part_of_its_recipe(root):
    before = load_experiment("small")
    path = root / "experiments" / "rows" / "tables.toml"
    path.write_text(path.read_text().replace("half the steps", "a tenth of the steps").replace('tables = ["table4", "figure4"]', 'tables = ["table4"]'))
    after = load_experiment("small")
    assert after.jobs["strong-seed4"] != before.jobs["strong-seed4"]
    assert job_folder(after, after.jobs["strong-seed4"]) == job_folder(before, before.jobs["strong-seed4"])


def test_plan_counts_jobs_time_and_disk(root):
    small = load_experiment("small")
    record_of(small, "model-seed4", 100.0, 5000)  # done here
    for id, seconds in (("model-seed2", 300.0), ("weak-seed4", 40.0), ("weak-seed2", 60.0)):
        record_of(small, id, seconds, folder=root / "reports" / "small" / "records")  # committed: known, but to do
    found = plan("--size", "small", "--jobs", "2")
    assert {j["job"]: (j["state"], j["seconds"], j["basis"]) for j in found["jobs"]} == {
        "model-seed4": ("done", 100.0, "measured before"), "model-seed2": ("to do", 300.0, "measured before"),
        "weak-seed4": ("to do", 40.0, "measured before"), "weak-seed2": ("to do", 60.0, "measured before"),
        "strong-seed4": ("to do", 125.0, "as other rows of the notebook"), "strong-seed2": ("to do", 125.0, "as other rows of the notebook")}
    totals = found["totals"]
    assert (totals["jobs"], totals["done"], totals["to_do"], totals["jobs_of_unknown_seconds"]) == (6, 1, 5, 0)
    assert totals["seconds_one_after_another"] == 650 and totals["seconds"] == 300 + 125  # rows of seed 2 wait for its model
    assert plan("--size", "small", "--jobs", "1")["totals"]["seconds"] == 650
    assert totals["bytes"] == 3 * 1000 + 2 * (5000 + 3 * 1000) / 4
    shown = adm("reproduce", "--size", "small", "--jobs", "2", "--dry-run").output
    assert re.search(r"^model x 2 +ratio +1 done, 1 to do +5 min +1.0 kB$", shown, re.M) and re.search(r"^weak x 2 +ratio +to do +2 min +2.0 kB$", shown, re.M)
    assert "1 of 6 jobs are done, 5 to do: about 7 min with 2 at a time, 7.0 kB of disk" in shown and "11 min one after another" in shown
    assert not (root / "runs" / "small" / ".snakemake").exists(), "a plan runs nothing"


def test_a_plan_without_records_admits_it(root):
    shown = adm("reproduce", "--size", "small", "--dry-run").output
    assert "time unknown" in shown and "6 unknown" in shown
    record_of(load_experiment("small"), "model-seed4", 50.0)
    (root / "nbs" / "paper" / "other.ipynb").write_text((root / "nbs" / "paper" / "ratio.ipynb").read_text())
    (root / "experiments" / "small.toml").write_text('extends = "tables"\n[rows.weak]\nnotebook = "other"\n')
    assert "at least" in adm("reproduce", "--size", "small", "--dry-run", "--jobs", "1").output


def test_names_are_tables_rows_or_jobs(root):
    def rows(*names):
        return [j["job"] for j in plan(*names, "--size", "large", "--seeds", "1")["jobs"]]

    assert rows("figure4") == ["model-seed4", "strong-seed4", "beside-seed4"]
    assert rows("table4") == ["model-seed4", "weak-seed4", "strong-seed4"]
    assert rows("beside") == ["beside-seed4"] and rows("weak-seed4") == ["model-seed4", "weak-seed4"]
    for name, meant in (("wek", "did you mean weak?"), ("table44", "did you mean table4"), ("weak-sed4", "did you mean weak"), ("qqq", "adm-repro list --size large")):
        result = adm("reproduce", name, "--size", "large")
        assert result.exit_code == 2 and f"large has no row, step or table {name!r}" in result.output and meant in result.output
    assert len(plan("weak", "--size", "large", "--seeds", "4")["jobs"]) == 8


@dataclass(frozen=True)
class Counted:
    parameters: int = 553_800_000
    gmacs: float = 1119.8
    guide_gmacs: float = 146.6
    flops: float = 8e15
    images: int = 50_000
    steps: int = 250
    bytes: int = 7_000_000
    training: bool = False


def test_operations_give_a_time_where_nothing_was_measured(root, monkeypatch):
    asked = []

    def plan_cost(notebook, parameters, needs):
        asked.append((notebook, parameters, needs))
        return Counted() if "model" in needs else None

    monkeypatch.setattr(sys.modules["adm_repro.cost"], "plan_cost", plan_cost)
    found = plan("weak", "--size", "large", "--tflops", "200", "--seeds", "1")
    weak = next(j for j in found["jobs"] if j["row"] == "weak")
    assert weak["seconds"] == 8e15 / 200e12 and weak["basis"] == "operations at 200 TFLOP/s" and weak["bytes"] == 7_000_000
    assert weak["cost"] == {"parameters": 553_800_000, "gmacs": 1119.8, "guide_gmacs": 146.6, "flops": 8e15, "images": 50_000, "steps": 250, "training": False}
    assert asked[-1] == ("ratio", {"x": 1.0, "y": 1.0, "seed": 4, "device": "cpu"}, {"model": ("ratio", {"x": 1.0, "y": 1.0, "seed": 4, "device": "cpu", "model": ""})})
    shown = adm("reproduce", "table4", "--size", "large", "--dry-run").output
    assert "553.8 M" in shown and "1,119.8 + 146.6" in shown and "1.60e+16" in shown  # two seeds
    assert "at 400 TFLOP/s" in shown and "--tflops" in shown and "at least" in shown  # the model's own cost is unknown
    asked.clear()
    plan("weak", "--size", "small")
    assert not asked, "nothing is counted for small networks on a CPU"


def test_list_names_lines_rows_and_where_they_are(root):
    small = load_experiment("small")
    record_of(small, "weak-seed4", 40.0)
    record_of(small, "weak-seed2", 40.0, folder=root / "reports" / "small" / "records")
    shown = adm("list", "--size", "small").output
    assert re.search(r"conditional, scale 1.0 +fid 4.59, .* weak +ratio +2/2 committed, 1 here +80 s +adm-repro reproduce weak --size small", shown)
    assert re.search(r"conditional, scale 10.0 +fid 9.11, .* strong +ratio +0/2 +about 80 s", shown)
    assert re.search(r"no conditional, scale 0.0 +fid 26.21.* -", shown) and re.search(r"Steps that rows need\n.*\n.*\nmodel +ratio +0/2", shown)
    (root / "experiments" / "small.toml").write_text('extends = "tables"\ndrop = ["strong"]\n')
    assert re.search(r"conditional, scale 10.0 .*- \(large\)", adm("list", "table4", "--size", "small").output)
    everywhere = adm("list", "table4", "--size", "small", "--all-sizes").output
    assert "adm-repro reproduce strong --size large" in everywhere and "Steps" not in everywhere
    assert re.search(r"figure4 +beside", adm("list", "figure4", "--size", "large", "--seeds", "1").output)
    assert "did you mean table4" in adm("list", "tabel4", "--size", "small").output


def test_list_starts_without_torch(root):
    code = "import sys\nsys.modules['torch'] = None\nfrom adm_repro.cli import main\nmain(['list', '--size', 'small'])"
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "table4: " in done.stdout, done.stderr


def test_progress_is_one_line_for_each_job_that_ends(root):
    small = load_experiment("small", 1)
    stale = {"job": "strong-seed4", "reason": "an earlier run", "at": "before"}
    write_json(job_folder(small, small.jobs["strong-seed4"]) / "failed.json", stale)
    record_of(small, "model-seed4", 10.0)
    planned = _plan(small, list(small.jobs), 400.0)
    assert [p.state for p in planned] == ["done", "to do", "failed before"]
    progress = _Progress(small, planned, 1, "adm-repro run {} --size small", "; writing the report")
    assert list(progress.look()) == []
    record_of(small, "weak-seed4", 20.0)  # twice what was expected of it
    assert list(progress.look()) == [("[2/3] weak-seed4 done in 20 s: fid 2.5; about 20 s left", False)]
    write_json(job_folder(small, small.jobs["strong-seed4"]) / "failed.json", stale | {"reason": "out of\nmemory"})
    ((line, failure),) = progress.look()
    assert failure and line == "[2/3] strong-seed4 failed: out of memory; again: adm-repro run strong-seed4 --size small"
    record_of(small, "strong-seed4", 20.0)
    assert [line for line, _ in progress.look()] == ["[3/3] strong-seed4 done in 20 s: fid 2.5; writing the report"]
    assert list(progress.look()) == []


@pytest.mark.skipif(importlib.util.find_spec("snakemake") is None, reason="needs Snakemake")
def test_a_part_runs_with_more_seeds_and_a_failure_stops_only_what_needs_it(root):
    (root / "experiments" / "small.toml").write_text('extends = "tables"\n[rows.strong]\nparameters = { y = 0.0 }\n')
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-m", "adm_repro.cli", "reproduce", "table4", "--size", "small", "--seeds", "1", "--jobs", "2"],
                          cwd=root, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    lines = done.stdout.splitlines()
    assert lines[0].startswith("Ratios: 0 of 3 jobs are done, 3 to do") and lines[-1] == "Report: adm-repro report --size small --seeds 1"
    assert [line.split(" done in")[0] for line in lines[1:-1]] == ["[1/3] model-seed4", "[2/3] weak-seed4"]
    assert "strong-seed4 failed: ratio.ipynb failed in cell 4: ZeroDivisionError" in done.stderr and "again: adm-repro run strong-seed4 --size small --seeds 1" in done.stderr
    assert "Of 3 jobs, 2 are done; 1 failed." in done.stderr and "runs/small/.snakemake/log/adm-repro.log" in done.stderr
    small = load_experiment("small")
    failure = read_failure(job_folder(small, small.jobs["strong-seed4"]))
    assert failure["job"] == "strong-seed4" and str(root) not in failure["reason"]
    shown = adm("reproduce", "--size", "small", "--seeds", "1", "--dry-run").output
    assert re.search(r"^strong +ratio +failed before", shown, re.M) and "strong-seed4 failed before: ratio.ipynb failed in cell 4: ZeroDivisionError" in shown


def test_seeds_below_one_are_refused(root):
    for command in (["reproduce", "--dry-run"], ["run", "weak"], ["list"], ["report"]):
        result = adm(*command, "--size", "small", "--seeds", "0")
        assert result.exit_code == 2 and "--seeds must be at least 1, got 0" in result.output
    with pytest.raises(RunError, match="no size 'tables'"):
        load_experiment("tables")


def test_list_says_what_failed_and_what_that_blocks(root):
    experiment = load_experiment("small")
    record_of(experiment, "model-seed4", 10.0)
    write_json(job_folder(experiment, experiment.jobs["model-seed2"]) / "failed.json", {"job": "model-seed2", "reason": "too small", "at": "now"})
    listed = adm("list", "weak", "model", "--size", "small").output
    assert re.search(r"table4 +weak +ratio +0/2, 1 blocked ", listed) and re.search(r" +model +ratio +1/2 here, 1 failed ", listed) and "strong" not in listed
    (weak,) = json.loads(adm("list", "weak", "--size", "small", "--json").output)
    assert weak["jobs"] == {"weak-seed4": "to do", "weak-seed2": "blocked"} and weak["lines"]["table4"]["fid"] == 4.59 and weak["needs"] == ["model"]
    by_row = {row["row"]: row for row in json.loads(adm("list", "--size", "small", "--json").output)}
    assert set(by_row) == {"model", "weak", "strong"} and by_row["model"]["failures"] == {"model-seed2": "too small"}
