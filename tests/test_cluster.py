"""The workflow as Slurm jobs. Skipped where no Slurm answers; tests/cluster/README.md says how to bring one up."""
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from importlib.util import find_spec

import pytest
from conftest import ROOT
from test_shared_jobs import ADD_UP, notebook

from adm_repro.runs import load_experiment


def slurm_answers():
    if shutil.which("sbatch") is None or find_spec("snakemake_executor_plugin_slurm") is None:
        return False
    try:
        return bool(subprocess.run(["sinfo", "--noheader", "--states=idle,alloc,mix"], capture_output=True, text=True, timeout=5, check=True).stdout.strip())
    except (subprocess.SubprocessError, OSError):
        return False


pytestmark = pytest.mark.skipif(not slurm_answers(), reason="no Slurm answers here: tests/cluster/up.sh FOLDER")
SLURM = ["--slurm-status-command", "squeue", "--slurm-no-account", "--slurm-init-seconds-before-status-checks", "2", "--latency-wait", "10", "--retries", "0"]
SIZE = """
title = "Cluster"
note = "Only for tests."
seeds = [0]
sections = ["t"]
[steps.first]
notebook = "theory"
[rows.two]
notebook = "train_diffusion"
tables = ["t"]
needs = { model = "first" }
[rows.bad]
notebook = "theory"
tables = ["t"]
parameters = { x = -1.0 }
[rows.slow]
notebook = "theory"
tables = ["t"]
parameters = { x = 100.0 }
"""
SMALL = """
import os, time
from pathlib import Path
from adm_repro.runs import write_result
if x < 0:
    raise ValueError(f"x must not be negative, got {x}")
Path(run_dir, "job").write_text(os.environ["SLURM_JOB_ID"])
while x > 99 and not Path(os.environ["ADM_REPRO_ROOT"], "go on").exists():
    time.sleep(0.1)
write_result(run_dir, metrics={"x": x}, slurm=os.environ["SLURM_JOB_ID"])
"""
TWO = """
import torch.distributed as dist
with processes.process_group("cpu", timeout=60):
    job = [None] * 2
    dist.all_gather_object(job, (os.environ["SLURM_JOB_ID"], os.environ["SLURM_CPUS_PER_TASK"]))
write_result(run_dir, metrics={}, job=job)
"""


def command(root, *names, size="small", processes="1"):
    env = os.environ | {"ADM_REPRO_ROOT": str(root), "PYTHONPATH": str(ROOT)}
    return dict(args=[sys.executable, "-m", "adm_repro.cli", "reproduce", *names, "--size", size, "--profile", "slurm", "--processes", processes, "--", *SLURM],
                cwd=root, env=env, text=True)


def adm(root, *names, **settings):
    return subprocess.run(**command(root, *names, **settings), capture_output=True, check=False)


def records(root, size="small"):
    return {record["name"]: record for record in (json.loads(path.read_text()) for path in (root / "runs" / size).glob("*/record.json"))}


@pytest.fixture()
def root(tmp_path):
    (tmp_path / "nbs" / "paper").mkdir(parents=True)
    shutil.copytree(ROOT / "experiments", tmp_path / "experiments")
    (tmp_path / "experiments" / "small.toml").write_text(SIZE)
    (tmp_path / "nbs" / "paper" / "theory.ipynb").write_text(notebook(SMALL))
    (tmp_path / "nbs" / "paper" / "train_diffusion.ipynb").write_text(notebook(ADD_UP, TWO).replace("# unused", "# unused\\nmodel: str = ''  # unused"))
    for name in ("t", "report"):  # looked up, not run
        (tmp_path / "nbs" / "paper" / f"{name}.ipynb").write_text(notebook())
    yield tmp_path
    subprocess.run(["scancel", "--full", f"--user={os.getuid()}"], check=False)


def test_two_processes_get_two_cores_and_a_failure_says_why(root):
    result = adm(root, "two", "bad", processes="2")
    assert result.returncode == 1, result.stdout + result.stderr
    assert "bad-seed0 failed: theory.ipynb failed in cell 3: ValueError: x must not be negative, got -1.0" in result.stderr
    assert "again: adm-repro reproduce bad-seed0 --size small --profile slurm" in result.stderr and "Of 3 jobs, 2 are done; 1 failed" in result.stderr
    done = records(root)
    assert set(done) == {"first", "two"} and done["two"]["provenance"]["processes"] == 2 and done["first"]["provenance"]["processes"] == 1
    job = done["two"]["result"]["job"]
    assert [cores for _, cores in job] == ["2", "2"] and job[0] == job[1] and job[0][0] != done["first"]["result"]["slurm"]


def started(root, victim):
    """The number of the slow job, once it runs."""
    deadline = time.monotonic() + 120
    while not (found := [path.read_text() for path in (root / "runs" / "small").glob("slow-*/job") if path.read_text()]):
        assert victim.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)
    for path in (root / "runs" / "small").glob("slow-*/job"):
        path.unlink()
    return found[0]


def test_cancelled_jobs_are_told_and_continued(root):
    heard = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # a shell lets what it starts in the background ignore it
    options = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True, preexec_fn=heard)
    victim = subprocess.Popen(**command(root, "slow"), **options)
    started(root, victim)
    os.killpg(victim.pid, signal.SIGINT)  # as Ctrl-C in a terminal
    out, err = victim.communicate(timeout=60)
    assert victim.returncode == 130 and "Stopped. The same command continues." in err
    assert not subprocess.run(["squeue", "--noheader", "--states=running,pending"], capture_output=True, text=True, check=True).stdout
    victim = subprocess.Popen(**command(root, "slow"), **options)
    number = started(root, victim)
    subprocess.run(["scancel", number], check=True)
    out, err = victim.communicate(timeout=120)
    assert victim.returncode == 1 and f"slow-seed0 failed: SLURM-job '{number}' failed, SLURM status is: 'CANCELLED'" in err, out + err
    (root / "go on").touch()
    result = adm(root, "slow")
    assert result.returncode == 0 and "[1/1] slow-seed0 done in" in result.stdout, result.stdout + result.stderr


def test_what_slurm_refuses_is_told(root):
    refused = command(root, "first")
    refused["args"] += ["--default-resources", "slurm_partition=nowhere"]
    result = subprocess.run(**refused, capture_output=True, check=False)
    assert result.returncode == 1 and "first-seed0 failed: SLURM sbatch failed. The error message was 'sbatch: error: invalid partition specified: nowhere" in result.stderr


def test_gpus_are_asked_for_and_time_can_be_limited(root):
    """What would be submitted: this node has no GPUs."""
    (root / "bin").mkdir()
    (root / "bin" / "sbatch").write_text(f'#!/bin/sh\necho "$@" >> {root}/asked\nexit 1\n')
    (root / "bin" / "sbatch").chmod(0o755)
    shutil.copy(ROOT / "nbs" / "paper" / "train_diffusion.ipynb", root / "nbs" / "paper")
    toml = root / "experiments" / "small.toml"
    toml.write_text(toml.read_text().replace("seeds = [0]", "seeds = [0]\nthreads = 3").replace('needs = { model = "first" }', 'parameters = { device = "cuda" }'))
    asked = command(root, "two", "first", processes="4")
    asked["args"] += ["--resources", "runtime=600", "--set-resource-scopes", "runtime=local"]
    asked["env"] |= {"PATH": f"{root}/bin:{os.environ['PATH']}"}
    result = subprocess.run(**asked, capture_output=True, check=False)
    assert result.returncode == 1 and (root / "asked").exists(), result.stdout + result.stderr
    gpu, cpu = sorted((root / "asked").read_text().splitlines(), key=lambda line: "--gpus" not in line)
    assert all(f" {word} " in gpu for word in ("--gpus=4", "--cpus-per-task=12", "--nodes=1", "--mem 32007", "-t 11"))
    assert all(f" {word} " in cpu for word in ("--cpus-per-task=3", "--nodes=1", "--mem 2000", "-t 600")) and "--gpus" not in cpu.split("--wrap")[0]


def test_the_smoke_size(tmp_path):
    for name in ("experiments", "nbs/paper"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns(".ipynb_checkpoints"))
    result = adm(tmp_path, size="smoke")
    assert result.returncode == 0, result.stdout + result.stderr
    assert len(records(tmp_path, "smoke")) == len(load_experiment("smoke").jobs)
    text = (tmp_path / "reports" / "smoke" / "README.md").read_text()
    assert "Not run" not in text and "Failed" not in text
