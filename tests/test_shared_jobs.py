"""Jobs of several processes: who does what, whose error is told, and that nobody is left behind."""
import json
import os
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT

from adm_repro.runs import (
    _SHARED,
    RunError,
    _own_gpus,
    execute_shared,
    gpus,
    job_folder,
    job_key,
    parse_experiment,
    processes_of,
    read_failure,
    run_job,
)

PARAMETERS = 'x: float = 1.0  # added up\nfail: str = ""  # who fails, and how\ndevice: str = "cpu"  # or "cuda"\nseed: int = 0  # unused\nrun_dir: str = ""  # folder of the run'
ADD_UP = """
import os, signal, sys, time
from pathlib import Path
import torch, torch.distributed as dist
from adm_repro import processes
from adm_repro.runs import write_result
mine = processes.rank()
Path(run_dir, f"pid-{mine}").write_text(str(os.getpid()))
print("process", mine, file=sys.stderr)
"""
MEET = """
with processes.process_group("cpu", timeout=60):
    if fail == f"error in {mine}":
        raise ValueError(f"{mine} does not like {x}")
    if fail == f"killed {mine}":
        os.kill(os.getpid(), signal.SIGKILL)
    if fail == f"asleep {mine}":
        time.sleep(60)
    total = torch.tensor(x * (mine + 1))
    seen = [None] * processes.world()
    if processes.world() > 1:
        dist.all_reduce(total)
        dist.all_gather_object(seen, (os.environ.get("CUDA_VISIBLE_DEVICES"), os.environ["OMP_NUM_THREADS"], str(processes.own_device("cpu"))))
"""
RESULT = """
Path(run_dir, f"ended-{mine}").touch()
write_result(run_dir, metrics={"total": float(total)}, seen=seen, who=mine)
"""
SPEC = 'title = "t"\nnote = "n"\nseeds = [0]\nthreads = 1\n[steps]\n[rows.two]\nnotebook = "train_diffusion"\ntables = ["t"]\nparameters = { x = 2.0 }\n'


def notebook(*cells):
    tags = [["parameters"]] + [[]] * len(cells)
    return json.dumps({"cells": [{"cell_type": "code", "id": f"c{i}", "metadata": {"tags": t}, "source": s.strip(), "outputs": [], "execution_count": None}
                                 for i, (s, t) in enumerate(zip((PARAMETERS, *cells), tags))],
                       "metadata": {"kernelspec": {"name": "python3", "language": "python", "display_name": "python3"}}, "nbformat": 4, "nbformat_minor": 5})


@pytest.fixture()
def root(tmp_path, monkeypatch):
    (tmp_path / "experiments").mkdir()
    (tmp_path / "nbs" / "paper").mkdir(parents=True)
    (tmp_path / "experiments" / "s.toml").write_text(SPEC)
    (tmp_path / "nbs" / "paper" / "train_diffusion.ipynb").write_text(notebook(ADD_UP, MEET, RESULT))
    monkeypatch.setenv("ADM_REPRO_ROOT", str(tmp_path))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return tmp_path


def the_job(change=""):
    experiment = parse_experiment("s", SPEC.replace("x = 2.0", "x = 2.0" + change))
    return experiment, experiment.jobs["two-seed0"]


def alive(pid):
    """Whether a process still runs; one that ended but was not waited for does not."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_two_processes_share_a_notebook_and_one_reports(root, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")
    experiment, job = the_job()
    record = run_job(experiment, job, processes=2)
    folder = job_folder(experiment, job)
    assert record["result"] == {"metrics": {"total": 6.0}, "seen": [["5", "1", "cpu"], ["7", "1", "cpu"]], "who": 0}
    assert record["provenance"]["processes"] == 2
    assert {p.name for p in folder.iterdir()} == {".lock", "executed.ipynb", "record.json", "result.json", "pid-0", "pid-1", "ended-0", "ended-1"}
    key = job_key(experiment, job)
    (folder / "record.json").unlink()
    alone = run_job(experiment, job)
    assert alone["result"]["metrics"] == {"total": 2.0} and alone["provenance"]["processes"] == 1
    assert alone["recipe"] == record["recipe"] and job_key(experiment, job) == key  # how many there are is no part of what is asked


@pytest.mark.parametrize(("fail", "message"), [
    ("error in 1", "train_diffusion.ipynb failed in process 1, cell 4: ValueError: 1 does not like 2.0"),
    ("error in 0", "train_diffusion.ipynb failed in cell 4: ValueError: 0 does not like 2.0"),
    ("killed 1", "train_diffusion.ipynb: its process 1 was killed (SIGKILL), most often for lack of memory"),
    ("killed 0", "train_diffusion.ipynb: its kernel died, most often for lack of memory"),
])
def test_the_first_error_ends_the_job(root, fail, message):
    experiment, job = the_job(f', fail = "{fail}"')
    started = time.monotonic()
    with pytest.raises(RunError) as caught:
        run_job(experiment, job, processes=2)
    assert str(caught.value).startswith(message) and time.monotonic() - started < 40
    folder = job_folder(experiment, job)
    assert read_failure(folder)["reason"].startswith(message) and str(root) not in read_failure(folder)["reason"]
    assert "process 1" in (folder / "processes.log").read_text()
    time.sleep(2)  # kernels look for their parents every second
    assert not any(alive(int((folder / f"pid-{i}").read_text())) for i in (0, 1))


def test_a_killed_job_leaves_nobody_behind(root):
    (root / "experiments" / "s.toml").write_text(SPEC.replace("x = 2.0", 'x = 2.0, fail = "asleep 1"'))
    experiment, job = the_job(', fail = "asleep 1"')
    victim = subprocess.Popen([sys.executable, "-m", "adm_repro.cli", "run", "two", "--size", "s", "--processes", "2"], cwd=root,
                              env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    files = [job_folder(experiment, job) / f"pid-{i}" for i in (0, 1)]
    deadline = time.monotonic() + 60
    while not all(file.exists() and file.read_text() for file in files):
        assert victim.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)
    pids = [int(file.read_text()) for file in files]
    assert all(map(alive, pids))
    victim.send_signal(signal.SIGKILL)
    victim.wait()
    deadline = time.monotonic() + 15
    while any(map(alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(map(alive, pids))


def test_after_its_part_only_the_first_goes_on(root):
    path = root / "nbs" / "paper" / "sample.ipynb"
    path.write_text(notebook(ADD_UP, "assemble, total, seen = print, 1.0, []", "count = assemble(total)", RESULT))
    folder = root / "run"
    folder.mkdir()
    execute_shared(path, folder / "executed.ipynb", {"run_dir": str(folder)}, 1, 2)
    assert (folder / "ended-0").exists() and (folder / "pid-1").exists() and not (folder / "ended-1").exists()


def test_how_many_processes(root, monkeypatch, tmp_path):
    experiment, job = the_job(', device = "cuda"')
    other = parse_experiment("s", SPEC.replace("train_diffusion", "theory"))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2")
    assert gpus() == ["0", "1", "2"]
    assert [processes_of(experiment, job, n) for n in (None, 2)] == [3, 2] and processes_of(*the_job()) == 1 and processes_of(*the_job(), 4) == 4
    assert processes_of(other, other.jobs["two-seed0"], 4) == 1  # it would not know what to do with others
    with pytest.raises(RunError, match="4 processes were asked for and 3 GPUs are here: --processes 3"):
        run_job(experiment, job, processes=4)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with _own_gpus(2):
        assert gpus() == ["0", "1"]
    with _own_gpus(1):
        assert gpus() == ["0"]
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2")  # as another process would see them
        with _own_gpus(1):
            assert gpus() == ["1"]
        with _own_gpus(3):  # nothing to choose
            assert gpus() == ["0", "1", "2"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert gpus() == [] and processes_of(experiment, job) == 1


def test_shared_work_is_where_it_is_said_to_be():
    for name, call in _SHARED.items():
        cells = json.loads((ROOT / "nbs" / "paper" / f"{name}.ipynb").read_text())["cells"]
        assert sum(call in "".join(cell["source"]) for cell in cells if cell["cell_type"] == "code") == 1
