"""Progress in a terminal, a pipe, a notebook's kernel, and a job of the workflow."""
import os
import pty
import subprocess
import sys

import nbformat
import pytest
from conftest import ROOT
from nbclient import NotebookClient

WORK = """
import time
from adm_repro.files import Progress
for _ in Progress(range(10), desc="work", unit="piece"):
    time.sleep(0.15)
"""
TRAIN = ["train", "imagenet64", "--data", "digits", "--set", "image_size=8", "--set", "in_channels=1", "--set", "width=32", "--set", "channel_mult=[1,1]", "--set", "depth=1", "--set", "attention_resolutions=[4]", "--set", "head_channels=32", "--iterations", "4", "--batch-size", "8", "--log-every", "2", "--device", "cpu", "--out"]


def environment(**variables):
    return {name: value for name, value in os.environ.items() if name not in ("ADM_REPRO_PROGRESS", "TERM")} | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | variables


def in_terminal(*command, **variables):
    """What a command writes to a terminal, as text."""
    master, slave = pty.openpty()
    with subprocess.Popen([sys.executable, *command], stdout=slave, stderr=slave, stdin=slave, env=environment(**variables)) as process:
        os.close(slave)
        written = b""
        while True:
            try:
                part = os.read(master, 65536)
            except OSError:  # the other end is closed
                break
            if not part:
                break
            written += part
    os.close(master)
    assert process.returncode == 0, written.decode()
    return written.decode().replace("\r\n", "\n")


def in_pipe(*command, **variables):
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, env=environment(**variables), check=False)
    assert done.returncode == 0, done.stderr
    return done.stderr


def test_a_terminal_sees_a_bar_and_a_pipe_lines():
    drawn = in_terminal("-c", WORK, TERM="xterm")
    assert drawn.count("\r") > 3 and "work: 100%" in drawn and "\x1b" not in drawn
    assert in_pipe("-c", WORK) == ""  # less than half a minute
    lines = in_pipe("-c", WORK, ADM_REPRO_PROGRESS="0.4")
    assert "\r" not in lines and "\x1b" not in lines
    first, *_, last = lines.splitlines()
    assert first.startswith("work: ") and " of 10 (" in first and first.endswith(" left")
    assert last.startswith("work: 10 of 10 (100%), ") and 2 <= len(lines.splitlines()) <= 5


def test_a_terminal_that_cannot_go_back_gets_lines_and_silence_is_to_be_had():
    assert in_terminal("-c", WORK, TERM="dumb") == ""
    assert in_terminal("-c", WORK, TERM="xterm", ADM_REPRO_PROGRESS="none") == ""


@pytest.mark.parametrize(("variables", "bar"), [({}, True), ({"ADM_REPRO_PROGRESS": "none"}, False)])
def test_a_notebook_sees_a_bar_unless_the_workflow_runs_it(variables, bar, monkeypatch):
    monkeypatch.delenv("ADM_REPRO_PROGRESS", raising=False)
    for name, value in (variables | {"PYTHONPATH": str(ROOT)}).items():
        monkeypatch.setenv(name, value)
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("import sys\n" + WORK)])
    NotebookClient(notebook, kernel_name="python3", timeout=120).execute()
    said = "".join(output["text"] for output in notebook.cells[0].outputs)
    assert ("work: 100%" in said) == bar and (said == "") == (not bar)


def test_jobs_of_the_workflow_draw_nothing_into_their_notebooks():
    from adm_repro.runs import _variables

    assert _variables(1)["ADM_REPRO_PROGRESS"] == "none"


def test_a_long_training_leaves_lines_in_a_log(tmp_path):
    lines = [line for line in in_pipe("-m", "adm_repro.cli", *TRAIN, str(tmp_path / "run"), ADM_REPRO_PROGRESS="0").splitlines() if line.startswith("train unet: ")]
    assert lines[-1].startswith("train unet: 4 of 4 (100%), ") and "step/s" in lines[-1]
    assert "loss=" in lines[-1] and len((tmp_path / "run" / "log.jsonl").read_text().splitlines()) == 2


def test_a_way_that_there_is_not_is_one_line():
    done = subprocess.run([sys.executable, "-m", "adm_repro.cli", *TRAIN, "unused"], capture_output=True, text=True, check=False, cwd="/", env=environment(ADM_REPRO_PROGRESS="loud"))
    assert done.returncode == 2 and done.stderr.splitlines()[-1] == "adm-repro: ADM_REPRO_PROGRESS must be auto, bar, none, or a number of seconds between lines, got 'loud'"
