"""Whatever ends a program that started processes ends them, too."""
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT

WORKER = """
import os, sys, time
from pathlib import Path
from adm_repro.processes import end_with_launcher, rank
end_with_launcher()
Path(sys.argv[1], str(rank())).write_text(str(os.getpid()))
time.sleep(60)
"""
PARENT = """
import signal, sys
from adm_repro.processes import launch
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # under nohup it is ignored, also by what is started
launch(2, *sys.argv[1:])
print("went on")
"""


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGKILL])
def test_nobody_outlives_the_program_that_started_them(tmp_path, number):
    worker = tmp_path / "worker.py"
    worker.write_text(WORKER)
    with open(tmp_path / "said", "w") as said:
        parent = subprocess.Popen([sys.executable, "-c", PARENT, str(worker), str(tmp_path)], cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=said, stderr=subprocess.DEVNULL)
    until = time.monotonic() + 60
    while not all((tmp_path / name).exists() and (tmp_path / name).read_text() for name in "01"):
        assert parent.poll() is None and time.monotonic() < until
        time.sleep(0.1)
    pids = [int((tmp_path / name).read_text()) for name in "01"]
    torchrun = int(Path(f"/proc/{pids[0]}/stat").read_text().rpartition(")")[2].split()[1])
    parent.send_signal(number)
    assert parent.wait(20) == -number, "the signal has its effect, once all have ended"
    assert "went on" not in (tmp_path / "said").read_text()
    until = time.monotonic() + (20 if number == signal.SIGKILL else 0.5)
    while (left := [pid for pid in (*pids, torchrun) if alive(pid)]) and time.monotonic() < until:
        time.sleep(0.1)
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert not left
