"""What scripts and shells may rely on: examples, exit statuses, one JSON value, no colours, completion."""
import ast
import json
import os
import pty
import re
import shlex
import signal
import subprocess
import sys
import time

import click
import numpy as np
import pytest
from click.testing import CliRunner
from conftest import ROOT

from adm_repro import cli
from adm_repro.cli import main
from adm_repro.runs import RunError

SCRIPTED = sorted(set(main.commands) - {"completion"})  # completion prints a script, whatever is asked
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
TINY = ["--set", "image_size=8", "--set", "in_channels=1", "--set", "width=32", "--set", "channel_mult=[1,1]", "--set", "depth=1", "--set", "attention_resolutions=[4]", "--set", "head_channels=32", "--set", "ema_rate=0"]
WRONG = {  # a mistake of each command -> a word of its error
    "list": ["tabel4"], "run": ["tabel4"], "reproduce": ["tabel4"], "report": ["--size", "galaxy"], "picture": ["nobody", "0"], "doctor": ["galaxy", "--offline"],
    "evaluate": ["gone.npz", "gone.npz"], "reference": ["gone", "out.npz"], "download": ["imagenet257"], "sample": ["gone.pt", "--out", "drawn"],
    "train": ["imagenet65", "--data", "digits", "--out", "run"]}


def invoke(*arguments):
    return CliRunner().invoke(main, [str(word) for word in arguments])


def command(*arguments, **more):
    return subprocess.run([sys.executable, "-m", "adm_repro", *map(str, arguments)], capture_output=True, text=True, check=False, cwd=ROOT, env=ENVIRONMENT | more)


@pytest.mark.parametrize("name", sorted(main.commands))
def test_help_ends_with_examples_that_have_their_options(name):
    said = invoke(name, "--help").output
    lines = re.findall(r"^ +adm-repro (.+)$", said.split("Examples:\n")[1].replace("\\\n", " "), re.M)
    assert lines, "no example"
    known = {option for parameter in main.commands[name].params for option in (*parameter.opts, *parameter.secondary_opts)}
    for line in lines:
        first, *words = shlex.split(line.split("#")[0].split(">")[0])
        words = words[:words.index("--")] if "--" in words else words
        assert first == name and {word.split("=")[0] for word in words if word.startswith("--")} <= known, line


def test_help_says_all_statuses():
    said = invoke("--help").output
    assert re.findall(r"^      (\d+) ", said, re.M) == ["0", "1", "2", "130"] and "143 by SIGTERM" in said
    assert all(f"adm-repro {name}" in said for name in main.commands)


@pytest.mark.parametrize("name", SCRIPTED)
def test_with_json_a_mistake_is_one_object(name, tmp_path, monkeypatch):
    for folder in ("CACHE", "DATA"):
        monkeypatch.setenv(f"ADM_REPRO_{folder}", str(tmp_path))
    monkeypatch.setenv("ADM_REPRO_ROOT", str(ROOT))
    monkeypatch.chdir(tmp_path)
    assert set(WRONG) == set(SCRIPTED)
    for arguments in (WRONG[name], ["--no-such-option"]):
        result = invoke(name, *arguments, "--json")
        error = json.loads(result.stdout)
        assert result.exit_code == error["status"] == 2 and set(error) == {"error", "status"}, result.output
        assert error["error"] in result.stderr.replace("\n", " ") or error["error"] in result.stderr
        assert invoke(name, *arguments).stdout == ""


def test_a_command_that_there_is_not_is_a_mistake_too():
    assert json.loads(invoke("rnu", "--json").stdout)["status"] == 2


def test_a_fault_of_ours_has_a_traceback_and_status_1(monkeypatch):
    def broken(*_):
        raise LookupError("ours")
    monkeypatch.setattr(cli, "load_experiment", broken)
    result = invoke("list", "--json")
    assert json.loads(result.stdout) == {"error": "LookupError: ours", "status": 1} and isinstance(result.exception, LookupError)


@pytest.mark.parametrize("fails", [False, True])
def test_run_says_what_became_of_each_job(fails, monkeypatch):
    record = {"job": "features", "result": {"metrics": {"accuracy": 0.9}}, "provenance": {"seconds": 3.0}}

    def done(experiment, job, *_):
        if fails:
            raise RunError(f"{job.id} failed: no luck")
        return record | {"job": job.id}
    monkeypatch.setattr(cli, "run_job", done)
    monkeypatch.setattr(cli, "read_record", lambda _: None if fails else record)
    result = invoke("run", "features", "--size", "smoke", "--json")
    (job,) = (said := json.loads(result.stdout))["jobs"]
    assert (result.exit_code, said["failed"], said["done"]) == ((1, 1, 0) if fails else (0, 0, 1))
    assert (job["state"], job["failure"], job["metrics"]) == (("failed", "features failed: no luck", {}) if fails else ("done", None, {"accuracy": 0.9}))


def test_train_sample_and_reference_end_in_one_object(tmp_path):
    arguments = ["train", "imagenet64", "--data", "digits", "--out", tmp_path / "run", *TINY, "--iterations", "2", "--batch-size", "8", "--device", "cpu", "--json"]
    plan = json.loads(command(*arguments, "--dry-run").stdout)
    assert plan["steps_done"] == 0 and plan["recipe"]["train"]["iterations"] == 2 and any("differs from the paper: width" in line for line in plan["plan"])
    two = command(*arguments, "--processes", "2")  # the first process alone writes it
    said = json.loads(two.stdout)
    assert (two.returncode, said["weights"], said["steps"], said["processes"]) == (0, str(tmp_path / "run" / "weights.safetensors"), 2, 2)
    wrong = command(*arguments, "--processes", "2", "--set", "dropout=0.5")  # both processes refuse the folder, one object says so
    assert wrong.returncode == 2 and "dropout" in json.loads(wrong.stdout)["error"]
    drawn = json.loads(command("sample", said["weights"], "--out", tmp_path / "drawn", "--num", "2", "--steps", "2", "--device", "cpu", "--json").stdout)
    assert (drawn["count"], drawn["path"]) == (2, str(tmp_path / "drawn" / "samples.npz"))


def test_reference_says_what_it_kept(tmp_path):
    from adm_repro.checkpoints import save_network
    from adm_repro.features import FeatureConfig, FeatureNet

    save_network(tmp_path / "space.safetensors", FeatureNet(FeatureConfig(8)))
    np.savez(tmp_path / "images.npz", arr_0=np.random.default_rng(0).integers(0, 256, (20, 8, 8, 1), dtype=np.uint8))
    result = invoke("reference", tmp_path / "images.npz", tmp_path / "out.npz", "--features", tmp_path / "space.safetensors", "--keep", "8", "--device", "cpu", "--json")
    said = json.loads(result.stdout)
    assert (said["path"], said["count"], said["kept"]) == (str(tmp_path / "out.npz"), 20, 8) and len(said["space"]["sha256"]) == 64


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_in_its_status_and_one_object(number, status, tmp_path):
    arguments = ["train", "imagenet64", "--data", "digits", "--out", str(tmp_path / "run"), *TINY, "--iterations", "100000", "--batch-size", "8", "--log-every", "1", "--device", "cpu", "--json"]
    out, err, log = tmp_path / "out", tmp_path / "err", tmp_path / "run" / "log.jsonl"
    with out.open("w") as stdout, err.open("w") as stderr:  # files: a process that reads images may outlive its parent for a moment, and would keep a pipe open
        process = subprocess.Popen([sys.executable, "-m", "adm_repro", *arguments], cwd=ROOT, env=ENVIRONMENT, stdout=stdout, stderr=stderr)
    try:
        while not (log.exists() and log.stat().st_size):
            assert process.poll() is None, err.read_text()
            time.sleep(0.1)
        process.send_signal(number)
        assert process.wait(120) == status, err.read_text()
    finally:
        process.kill()
        process.wait()
    said = json.loads(out.read_text())
    assert said["status"] == status and "holds a checkpoint of step" in said["error"]


def test_nothing_is_coloured():
    for arguments in (["--help"], ["train", "--help"], ["list", "tabel4"], ["list", "table4", "--size", "smoke"]):
        master, slave = pty.openpty()
        with subprocess.Popen([sys.executable, "-m", "adm_repro", *arguments], cwd=ROOT, stdout=slave, stderr=slave, env=ENVIRONMENT | {"FORCE_COLOR": "1", "TERM": "xterm"}) as process:
            os.close(slave)
            written = b""
            while True:
                try:
                    written += (part := os.read(master, 65536))
                except OSError:
                    break
                if not part:
                    break
        os.close(master)
        assert process.returncode in (0, 2) and len(written) > 20 and b"\x1b" not in written
    source = (ROOT / "adm_repro" / "cli.py").read_text()
    assert '"--nocolor"' in source, "Snakemake colours what it writes to a log under FORCE_COLOR"
    assert not re.search(r"click\.(style|secho)", source + (ROOT / "adm_repro" / "tools.py").read_text())


@pytest.fixture
def shim(tmp_path):
    """An adm-repro on the path that cannot import torch."""
    path = tmp_path / "bin" / "adm-repro"
    path.parent.mkdir()
    path.write_text(f"#!{sys.executable}\nimport sys\nsys.modules['torch'] = None\nfrom adm_repro.cli import main\nmain(prog_name='adm-repro')\n")
    path.chmod(0o755)
    return ENVIRONMENT | {"PATH": f"{path.parent}{os.pathsep}{os.environ['PATH']}"}


@pytest.mark.parametrize(("line", "expected"), [
    ("adm-repro repr", {"reproduce"}), ("adm-repro reproduce table1", {"table1", "table16"}),
    ("adm-repro list --size imagenet", {"imagenet64", "imagenet128", "imagenet256", "imagenet512"}), ("adm-repro train lsun-c", {"lsun-cat"}),
    ("adm-repro download admnet_imagenet64", {"admnet_imagenet64.npz"}), ("adm-repro sample imagenet256 --classifier imagenet256", {"imagenet256-classifier"}),
    ("adm-repro reproduce --profile sl", {"slurm"})])
def test_bash_completes_without_torch(line, expected, shim):
    words = line.split(" ")
    script = ('eval "$(adm-repro completion bash)"; complete -p adm-repro >/dev/null || exit 3\n'
              f"COMP_WORDS=({' '.join(words)}); COMP_CWORD={len(words) - 1}; _adm_repro_completion adm-repro; printf '%s\\n' \"${{COMPREPLY[@]}}\"")
    done = subprocess.run(["bash", "--norc", "-c", script], capture_output=True, text=True, check=False, cwd=ROOT, env=shim)
    assert done.returncode == 0, done.stderr
    assert expected <= set(done.stdout.split()), done


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_prints_a_script_and_where_it_belongs(shell, shim):
    done = subprocess.run(["adm-repro", "completion", shell], capture_output=True, text=True, check=False, env=shim)
    assert done.returncode == 0 and done.stdout.startswith("# ") and f"adm-repro completion {shell}" in done.stdout.splitlines()[0]
    assert f"_ADM_REPRO_COMPLETE={shell}_complete" in done.stdout


@pytest.mark.parametrize("arguments", [["list"], ["reproduce", "--dry-run"], ["doctor", "--offline"]])
def test_a_table_without_tabulate_is_one_line(arguments, monkeypatch):
    monkeypatch.setitem(sys.modules, "tabulate", None)
    result = invoke(*arguments)
    assert result.exit_code == 2 and result.stderr == "adm-repro: tables of experiments need tabulate: pip install 'adm_repro[reproduce]'; --json does without\n"
    assert invoke(*arguments, "--json").exit_code == 0


def test_a_reader_who_has_enough_is_no_mistake():
    with subprocess.Popen([sys.executable, "-m", "adm_repro", "download", "--list"], cwd=ROOT, env=ENVIRONMENT | {"PYTHONUNBUFFERED": "1"}, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert process.stderr.read() == b"" and process.wait() == 1


def test_python_m_is_the_command():
    assert command("--version").stdout.startswith("adm-repro, version ")
    tree = ast.parse((ROOT / "adm_repro" / "__main__.py").read_text())
    assert len(tree.body) == 3, "__main__ has no lesson, so it defines nothing"


def test_usage_errors_are_clicks_own():
    result = invoke("run")
    assert result.exit_code == 2 and "Usage: " in result.stderr and isinstance(main, click.Group)
