"""The soak tells a leak from noise; the page of reliability is what its results say."""
import json
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "reliability"))
import report
import soak


def series(loop, count=40, **changes):
    """Rounds without growth, with noise and a warm-up; `changes` map a measure to its values."""
    draw = np.random.default_rng(0)
    rounds = [{name: float(5e8 + 1e6 * draw.standard_normal() - 2e8 * (i == 0)) for name in soak.MARGINS[loop]} | dict.fromkeys(soak.COUNTS[loop], 3) | {"failed": ""} for i in range(count)]
    for name, values in changes.items():
        for entry, value in zip(rounds, values):
            entry[name] = entry[name] + value
    return rounds


@pytest.mark.parametrize("loop", soak.MARGINS)
def test_noise_is_no_growth_and_every_planted_leak_is_found(loop):
    assert soak.growth(loop, series(loop))["grows"] == []
    for name, margin in soak.MARGINS[loop].items():
        found = soak.growth(loop, series(loop, **{name: [max(20 * margin, 200_000) * i for i in range(40)]}))["grows"]
        assert len(found) == 1 and found[0].startswith(name)
    for name in soak.COUNTS[loop]:
        found = soak.growth(loop, series(loop, **{name: [i // 10 for i in range(40)]}))["grows"]
        assert found == [f"{name}: 4 to 6"]


def test_few_rounds_give_no_verdict_and_failures_are_told():
    rounds = series("process", 7)
    rounds[2]["failed"] = "ValueError: x"
    verdict = soak.growth("process", rounds)
    assert verdict["grows"] is None and verdict["failed"] == ["ValueError: x"]


LOOP = """
import json, os, sys, tempfile
from pathlib import Path
import psutil
sys.path.insert(0, sys.argv[1])
from soak import growth, left_on_disk
leak, home, me, kept = sys.argv[2], Path(sys.argv[3]), psutil.Process(), []
for name in ("tmp", "home", "cache"): (home / name).mkdir(parents=True)
rounds = []
for i in range(30):
    block = bytearray(os.urandom(1 << 20))
    if leak == "memory": kept.append(block)
    if leak == "descriptors": kept.append(open(os.devnull))
    if leak == "tmp_files": tempfile.mkstemp(dir=home / "tmp")
    del block
    rounds.append({"memory": me.memory_info().rss, "descriptors": me.num_fds(), "threads": me.num_threads(), "children": len(me.children()), **left_on_disk(home), "failed": ""})
print(json.dumps(growth("process", rounds)))
"""


@pytest.mark.parametrize("leak", ["none", "memory", "descriptors", "tmp_files"])
def test_real_leaks_of_a_process(leak, tmp_path):
    done = subprocess.run([sys.executable, "-c", LOOP, str(ROOT / "reliability"), leak, str(tmp_path)], capture_output=True, text=True, check=True)
    names = {text.split(":")[0] for text in json.loads(done.stdout)["grows"]}
    if leak == "none":
        assert names == set()
    else:
        assert leak in names and names <= {leak, "descriptors"}


def test_the_page_is_what_the_results_say():
    assert (ROOT / "reports" / "reliability.md").read_text() == report.report(ROOT / "reliability" / "results", ROOT / "reliability" / "findings.toml"), "python reliability/report.py"


def test_the_page_hides_nothing(tmp_path):
    assert report.report(tmp_path, tmp_path / "none.toml").count("Not run.") == 4
    kill = {"hardware": "one machine", "commands": {"train": {"kills": [{"moment": 1.0, "processes_killed": 1, "findings": ["x is missing"], "bytes_lost": 7, "files_finished_before": 2},
                                                                  {"moment": 2.0, "processes_killed": 1, "findings": [], "bytes_lost": 0, "files_finished_before": 1}]}}}
    (tmp_path / "kill.json").write_text(json.dumps(kill))
    rounds = series("process", tmp_bytes=[1e6 * i for i in range(40)])
    found = {"hours": 0.5, "size": "smoke", "hardware": "one machine", "stretches": [{"hours": 0.5, "loops": {"process": {"rounds": 40, "verdict": soak.growth("process", rounds)}}}]}
    (tmp_path / "soak.json").write_text(json.dumps(found))
    (tmp_path / "memory.json").write_text(json.dumps([{"name": "train", "size": "64", "predicted_bytes": 1e6, "measured_bytes": 2e6, "ratio": 0.5}]))
    text = report.report(tmp_path, tmp_path / "none.toml")
    assert "| train | 2 of 50 | 2 | 1 | 3 | 7 | 1 |" in text and "x is missing" in text
    assert "0.50 of 2 hours" in text and "tmp_bytes: " in text and "| train | 64 | 1.0 | 2.0 | 0.500 |" in text
