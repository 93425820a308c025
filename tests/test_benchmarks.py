"""The benchmarks of speed: the plan of all of them fits a GPU's eight minutes, what fails or takes too long is said, and every script takes the arguments of the plan. Nothing is timed here."""
import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import ROOT

BENCHMARKS = ROOT / "benchmarks"


@pytest.fixture(scope="module")
def every():
    """The command as a module."""
    spec = importlib.util.spec_from_file_location("benchmarks_all", BENCHMARKS / "all.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.fixture
def scripts(tmp_path):
    """Stand-ins: one that measures, one that fails after its first case, one that never ends and has a child, one that is given two cases."""
    head = ("import json, os, subprocess, sys, time\nout = sys.argv[sys.argv.index('--out') + 1]\n"
            "def write(rows): json.dump({'rows': rows, 'device': sys.argv[2]}, open(out, 'w'))\n")
    bodies = {"good": "write([{'case': sys.argv[3]}])", "bad": "write([{'case': 1}])\nsys.exit('case 2 differs by 0.5')",
              "slow": "child = subprocess.Popen(['sleep', '600'])\nwrite([{'case': 1, 'pids': [os.getpid(), child.pid]}])\ntime.sleep(600)"}
    for name, body in bodies.items():
        (tmp_path / f"{name}.py").write_text(head + body)
    return tmp_path


def run(every, scripts, *jobs, budget=60.0):
    jobs = [every.Job(name, str(scripts / f"{script}.py"), arguments, seconds) for name, script, arguments, seconds in jobs]
    return every.run_all(tuple(jobs), "cpu", {}, budget, scripts / "results")


def gone(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] == "Z"
    except FileNotFoundError:
        return True


def test_the_plan_of_a_gpu_holds_every_script_and_fits_eight_minutes():
    said = subprocess.run([sys.executable, BENCHMARKS / "all.py", "--device", "cuda", "--dry-run"], capture_output=True, text=True, check=True).stdout
    for script in BENCHMARKS.glob("*.py"):
        assert script.name in ("all.py", "common.py") or script.name in said
    seconds = [float(line.split()[0]) for line in said.splitlines() if line.split()[1:2] == ["s"]]
    *jobs, total = seconds
    assert len(jobs) > 10 and total <= sum(jobs) < 480
    order = [said.index(name) for name in ("imagenet64 ", "imagenet256", "imagenet128 ", "imagenet512", "imagenet64-256", "training_step", "latency.py", "precision.py", "end_to_end", "scaling", "startup")]
    assert order == sorted(order)


def test_what_fails_or_overruns_is_said_and_what_is_done_is_kept(every, scripts, monkeypatch):
    monkeypatch.setattr(every.Job, "limit", lambda job: float(job.seconds))
    start = time.monotonic()
    outcomes = run(every, scripts, ("first", "good", ("1",), 5), ("second", "bad", (), 5), ("third", "slow", (), 2), ("fourth", "good", ("2",), 5), ("fifth", "good", ("3",), 1000))
    assert time.monotonic() - start < 30
    assert [(outcome.job.name, outcome.state) for outcome in outcomes] == [("first", "measured"), ("second", "FAILED"), ("third", "CUT OFF"), ("fourth", "measured"), ("fifth", "not measured")]
    assert outcomes[1].why == "case 2 differs by 0.5, what it had measured is kept"
    assert outcomes[2].why == "after 2 s, what it had measured is kept"
    assert outcomes[4].why.startswith("takes about 1000 s, and ")
    good, bad, slow = (json.loads((scripts / "results" / f"{name}_cpu.json").read_text()) for name in ("good", "bad", "slow"))
    assert good == {"rows": [{"case": "1"}, {"case": "2"}], "device": "cpu"}
    assert bad["rows"] == [{"case": 1}]
    deadline = time.monotonic() + 5
    while not all(map(gone, slow["rows"][0]["pids"])):
        assert time.monotonic() < deadline, "the script that was cut off, or its child, is still there"
        time.sleep(0.05)


def test_stopping_ends_the_script_and_keeps_its_results(scripts):
    (scripts / "guided_diffusion").mkdir()
    code = (f"import sys\nsys.path.insert(0, {str(BENCHMARKS)!r})\nimport importlib\nevery = importlib.import_module('all')\n"
            f"every.PLAN['cpu'] = (every.Job('only', {str(scripts / 'slow.py')!r}, (), 60),)\nsys.exit(every.main())")
    whole = subprocess.Popen([sys.executable, "-c", code, "--original", str(scripts), "--results", str(scripts / "results")], env=os.environ | {"TMPDIR": str(scripts)}, stdout=subprocess.DEVNULL)
    deadline, parts = time.monotonic() + 20, []
    while not (parts and parts[0].read_text().endswith("}")):
        assert time.monotonic() < deadline
        parts = list(scripts.glob("benchmarks-*/part0.json"))
        time.sleep(0.05)
    whole.terminate()
    assert whole.wait(20) == 1
    row, = json.loads((scripts / "results" / "slow_cpu.json").read_text())["rows"]
    while not all(map(gone, row["pids"])):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_failure_is_the_exit_status(every, scripts, capsys, monkeypatch, tmp_path):
    (tmp_path / "guided_diffusion").mkdir()
    for script, status in (("good", 0), ("bad", 1)):
        monkeypatch.setitem(every.PLAN, "cpu", (every.Job("only", str(scripts / f"{script}.py"), ("1",), 5),))
        monkeypatch.setattr(sys, "argv", ["all.py", "--original", str(tmp_path), "--results", str(tmp_path / "results")])
        assert every.main() == status
    assert "FAILED" in capsys.readouterr().out


def test_paths_that_are_missing(every, scripts, capsys, monkeypatch):
    job = every.Job("precision", str(scripts / "good.py"), ("1",), 5, ("runs",))
    outcome, = every.run_all((job,), "cpu", {"runs": None}, 60, scripts / "results")
    assert (outcome.state, outcome.why) == ("not measured", "needs --runs")
    monkeypatch.setattr(sys, "argv", ["all.py", "--original", "nowhere"])
    with pytest.raises(SystemExit):
        every.main()
    assert "--original must be a checkout of openai/guided-diffusion, got nowhere" in capsys.readouterr().err


def test_compiling_beforehand_takes_place_side_by_side_and_times_nothing(every, scripts, capsys):
    (scripts / "compiles.py").write_text("import os, sys, time\nassert sys.argv[-2:] == ['--rounds', '0'] and '--out' not in sys.argv\nassert os.environ['TORCHINDUCTOR_COMPILE_THREADS']\n"
                                         "open(sys.argv[3], 'w').close()\nwhile not os.path.exists(sys.argv[4]): time.sleep(0.01)\n")
    a, b = str(scripts / "a"), str(scripts / "b")
    jobs = [every.Job(name, str(scripts / "compiles.py"), arguments, 5, (), True) for name, arguments in (("one", (a, b)), ("two", (b, a)), ("bad", ("/nowhere/c", a)))]
    every.compile_all(jobs, "cpu", {}, scripts, 30)  # the first two wait for one another
    one, two, bad = capsys.readouterr().out.splitlines()
    assert one.startswith("compiled one") and one.endswith(" s") and two.endswith(" s")
    assert "FileNotFoundError" in bad


def test_help_and_the_arguments_of_the_plan(every):
    """One child reads the arguments of all scripts, so that torch is imported once."""
    calls = {path.name: [["--help"]] for path in BENCHMARKS.glob("*.py") if path.name != "common.py"}
    for job in (job for plan in every.PLAN.values() for job in plan):
        calls[job.script].append([*every.command(job, "cuda", {"original": "somewhere", "runs": "somewhere"}, Path("x.json"))[2:], "--help"])  # what stands before --help is read first
    code = f"""
import contextlib, io, runpy, sys
sys.path.insert(0, {str(BENCHMARKS)!r})
for script, calls in {calls!r}.items():
    for words in calls:
        sys.argv, said = [script, *words], io.StringIO()
        try:
            with contextlib.redirect_stdout(said):
                runpy.run_path(f"{BENCHMARKS}/{{script}}", run_name="__main__")
        except SystemExit as ended:
            assert not ended.code, (script, words, ended.code)
        assert "usage: " in said.getvalue() and len(said.getvalue()) > 300
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_what_is_for_a_gpu_runs_with_the_cpu_in_its_place(tmp_path):
    calls = {"guided_step": ("--networks", "tiny", "--rounds", "1", "--batch", "1"), "latency": ("--sizes", "8", "--batches", "1", "--rounds", "1", "--steps", "4"),
             "end_to_end": ("--network", "tiny", "--num", "4", "--block-size", "4", "--rounds", "1", "--precision", "bf16")}
    words = [word for name, call in calls.items() for word in ("--", str(BENCHMARKS / f"{name}.py"), *call, "--device", "cuda", "--out", str(tmp_path / f"{name}.json"))]
    subprocess.run([sys.executable, ROOT / "tests" / "gpu_stand_in.py", *words], check=True, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)})
    found = {name: json.loads((tmp_path / f"{name}.json").read_text()) for name in calls}
    assert {row["who"] for row in found["guided_step"]["rows"]} >= {"plain", "fast"} and all(row["peak_bytes"] == 0 for row in found["guided_step"]["rows"])
    assert [row["what"] for row in found["latency"]["rows"]] == ["plain", "fast", "fast, recorded"] and found["latency"]["compiled"]
    assert found["end_to_end"]["rows"][0]["clock"] == "wall" and found["end_to_end"]["rows"][0]["precision"] == "bf16"


@pytest.mark.parametrize(("device", "on"), (("cuda", "GPU"), ("cpu", "CPU")))
def test_targets_look_for_rows_that_the_scripts_write(device, on, monkeypatch):
    """A row under another name would be "not measured" for good."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import training_step

    from adm_repro.speed import TARGETS

    who = training_step.makers(SimpleNamespace(device=device, original="", batch=0, who=None), "small", {})
    rows = [{"what": "step", "who": name, "peak_gib": 2.0} | ({} if name == "original" else {"ours_is_faster_by": 2.0, "rounds_from_to": [1.9, 2.1]}) for name in who]
    written, wanted = {size: {"rows": rows} for size in ("small", "adm64")}, [target for target in TARGETS if target.file == f"training_step_{device}"]
    assert len(wanted) >= 4 and {target.device for target in wanted} == {on} and all(target.find(written) for target in wanted)


def test_results_are_replaced_at_once(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import common

    path = tmp_path / "results" / "x.json"
    common.write(path, {"rows": [1]})
    with pytest.raises(TypeError):
        common.write(path, {"rows": [object()]})
    assert common.read(path) == {"rows": [1]} and list(path.parent.iterdir()) == [path]
    assert common.read(tmp_path / "none.json") == {} and common.write(None, {}) is None
