"""What days bring: full disks, folders that cannot be written, clocks, two runs at once, inputs that went, signals. Each has one clear line and an exit status."""
import ctypes
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file

import adm_repro.batches
import adm_repro.cli
from adm_repro import runs
from adm_repro.batches import images_done
from adm_repro.checkpoints import save_network
from adm_repro.features import FeatureConfig, FeatureNet
from adm_repro.files import write_json
from adm_repro.runs import job_folder, job_recipe, load_experiment
from adm_repro.training import steps_done

TINY = ["--set=image_size=8", "--set=in_channels=1", *(f"--set={s}" for s in ("width=32", "channel_mult=[1,1]", "depth=1", "attention_resolutions=[4]", "head_channels=32", "dropout=0"))]
MINI = """
title = "Mini"
note = "Only for tests."
seeds = [0]
sections = ["table4"]
[steps.first]
notebook = "one"
[rows.second]
notebook = "two"
tables = ["table4"]
needs = { made = "first" }
"""


@pytest.fixture(scope="module", autouse=True)
def loaded():
    """Commands import what they need: here it is there before a child gives up its rights or its disk."""
    import adm_repro.data
    import adm_repro.drawing
    import adm_repro.evaluation
    import adm_repro.presets
    import adm_repro.reports  # noqa: F401

    torch.set_num_threads(1)


def give_up_rights() -> None:
    """A root that permissions bind, as they do everybody else: without CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH."""
    libc, header, data = ctypes.CDLL(None, use_errno=True), (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    assert libc.capget(header, data) == 0
    for i in (0, 1):
        data[i] &= ~0b110
    assert libc.capset(header, data) == 0


def adm(*arguments, before=lambda: None, **environment):
    """The command in a child of this process: exit status (negative for a signal), what it said."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.dup2(write, 1)
            os.dup2(write, 2)
            os.environ.update({name: str(value) for name, value in environment.items()})
            sys.stdout, sys.stderr = (os.fdopen(fd, "w", buffering=1, closefd=False) for fd in (1, 2))
            warnings.simplefilter("default")  # as outside of the tests
            before()
            adm_repro.cli.main([str(a) for a in arguments], prog_name="adm-repro")
        except SystemExit as ended:
            os._exit(ended.code or 0)
        except BaseException:
            sys.excepthook(*sys.exc_info())
        os._exit(99)
    os.close(write)
    with os.fdopen(read) as said:
        text = said.read()
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), text


def refused(result, *words):
    """One line that says it all, exit status 2."""
    status, said = result
    assert status == 2 and "Traceback" not in said, said
    last = said.splitlines()[-1]
    assert last.startswith("adm-repro: ") and all(word in last for word in words), last
    return last


def train(out, *more):
    return ["train", "imagenet64", "--data", "digits", *TINY, "--iterations", "4", "--batch-size", "8", "--save-every", "2", "--precision", "fp32", "--device", "cpu", "--workers", "0",
            "--out", out, *more]


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A training and its images, features, a reference."""
    folder = tmp_path_factory.mktemp("done")
    torch.manual_seed(0)
    save_network(folder / "features.safetensors", FeatureNet(FeatureConfig(8, 1, 10, 16, 8)))
    np.savez(folder / "images.npz", arr_0=np.random.default_rng(0).integers(0, 256, (64, 8, 8, 1), dtype=np.uint8))
    status, said = adm(*train(folder / "run"))
    assert status == 0, said
    status, said = adm(*sample(folder, folder / "drawn"))
    assert status == 0, said
    return folder


def sample(done, out, *more):
    return ["sample", done / "run", "--num", "16", "--block-size", "4", "--steps", "4", "--device", "cpu", "--out", out, *more]


def evaluate(done, *more):
    return ["evaluate", done / "images.npz", done / "drawn" / "samples.npz", "--features", done / "features.safetensors", "--device", "cpu", "--only", "frechet", *more]


def reference(done, out):
    return ["reference", done / "images.npz", out, "--features", done / "features.safetensors", "--device", "cpu"]


@pytest.fixture
def disk(tmp_path):
    """Mounts a file system of a given size."""
    mounted = []

    def mount(size, name="disk"):
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(folder)], capture_output=True, check=False).returncode:
            pytest.skip("mounting needs root")
        mounted.append(folder)
        return folder

    yield mount
    for folder in mounted:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def no_half_files(folder):
    assert not [p for p in Path(folder).rglob("*") if ".tmp" in p.name or p.name == "kept"], "leftovers"


# full disks


def test_a_full_disk_is_said_with_the_file_and_what_to_do(done, disk):
    small = disk("1m")
    refused(adm(*train(small / "run")), f"{small}/run: ", "bytes are needed", "are free: make room")
    tiny = disk("4k", "tiny")
    refused(adm(*sample(done, tiny / "drawn")), f"{tiny}/drawn/blocks", "the disk is full: make room")
    no_half_files(tiny)
    assert not list(tiny.rglob("*.npz"))


def test_a_disk_that_fills_while_images_are_drawn_keeps_the_finished_blocks(done, disk):
    full = disk("16k")
    refused(adm(*sample(done, full / "drawn")), "the disk is full", "the same command continues")
    kept = images_done(full / "drawn" / "blocks")
    assert 0 < kept < 16
    no_half_files(full)
    subprocess.run(["mount", "-o", "remount,size=1m", str(full)], check=True)  # room is made
    assert adm(*sample(done, full / "drawn"))[0] == 0
    assert (full / "drawn" / "samples.npz").read_bytes() == (done / "drawn" / "samples.npz").read_bytes()


def test_a_checkpoint_that_does_not_fit_leaves_the_one_before(done, disk, monkeypatch):
    full = disk("10m")  # network 0.4 M: two checkpoints take 12 MB
    monkeypatch.setattr("adm_repro.training.check_room", lambda *_: None)
    last = refused(adm(*train(full / "run")), "training.safetensors could not be written", "the last checkpoint is kept, and the same command continues")
    assert "No space left" in last and steps_done(full / "run") == 2
    no_half_files(full)
    subprocess.run(["mount", "-o", "remount,size=20m", str(full)], check=True)
    assert adm(*train(full / "run"))[0] == 0
    torch.testing.assert_close(load_file(full / "run" / "weights.safetensors"), load_file(done / "run" / "weights.safetensors"), rtol=0, atol=0)


def test_a_reference_batch_that_does_not_fit_does_not_end_the_process_with_a_signal(done, disk, monkeypatch):
    full = disk("4k")
    refused(adm(*reference(done, full / "batch.npz")), "bytes are needed for the reference batch", "make room")
    monkeypatch.setattr("adm_repro.evaluation.check_room", lambda *_: None)  # somebody else fills it after the look
    refused(adm(*reference(done, full / "batch.npz")), f"{full}/batch.npz: the disk is full: make room")
    assert list(full.iterdir()) == []


def test_features_that_cannot_be_kept_do_not_cost_the_result(done, disk):
    status, said = adm(*evaluate(done), ADM_REPRO_CACHE=disk("4k"))
    assert status == 0 and "Frechet distance: " in said


# permissions


@pytest.fixture
def locked_folder(tmp_path):
    if os.geteuid():
        pytest.skip("the rights that are given up are root's")
    folder = tmp_path / "locked"
    folder.mkdir()
    folder.chmod(0o555)
    return folder


def test_a_folder_that_cannot_be_written_is_named(done, locked_folder, mini):
    for command in (train(locked_folder / "run"), sample(done, locked_folder / "drawn")):
        refused(adm(*command, before=give_up_rights), f"{locked_folder}/", ": permission denied: change its permissions")
    refused(adm(*reference(done, locked_folder / "batch.npz"), before=give_up_rights), f"{locked_folder} cannot be written (Permission denied): choose another folder")
    refused(adm(*evaluate(done), before=give_up_rights, ADM_REPRO_CACHE=locked_folder), "cannot be written (Permission denied)", "ADM_REPRO_CACHE")
    refused(adm("download", "inception", before=give_up_rights, ADM_REPRO_CACHE=locked_folder), "nothing can be written beside it (Permission denied)")
    refused(adm("reproduce", "--size", "mini", before=give_up_rights, ADM_REPRO_ROOT=mini, ADM_REPRO_RUNS=locked_folder), f"{locked_folder}/mini: permission denied")
    (mini / "reports").mkdir()
    (mini / "reports").chmod(0o555)
    refused(adm("report", "--size", "mini", before=give_up_rights, ADM_REPRO_ROOT=mini), f"{mini}/reports/.mini: permission denied")


def test_a_finished_folder_may_be_read_only(done, tmp_path, locked_folder):
    shutil.copytree(done / "drawn", tmp_path / "drawn")
    for path in (tmp_path / "drawn").rglob("*"):
        path.chmod(0o555 if path.is_dir() else 0o444)
    status, said = adm("evaluate", done / "images.npz", tmp_path / "drawn" / "samples.npz", "--features", done / "features.safetensors", "--device", "cpu", "--only", "frechet", "--no-cache",
                       before=give_up_rights)
    assert status == 0, said


def test_an_input_without_permission_is_not_called_missing(done, tmp_path, locked_folder):
    shutil.copytree(done / "run", tmp_path / "run")
    for name, command in (("weights.safetensors", ["sample", tmp_path / "run", "--num", "4", "--out", tmp_path / "drawn"]), ("training.safetensors", train(tmp_path / "run"))):
        (tmp_path / "run" / name).chmod(0)
        assert "No such file" not in refused(adm(*command, before=give_up_rights), f"{tmp_path}/run/{name}", "permission denied")


# two at once


def test_two_at_once_on_one_folder(done, tmp_path, mini):
    first = subprocess.Popen([sys.executable, "-c", f"import fcntl, os, time; f = open({str(tmp_path / 'held')!r}, 'a'); fcntl.flock(f, 2); f.write(f'{{os.getpid()}} on here'); "
                              "f.flush(); print(flush=True); time.sleep(99)"], stdout=subprocess.PIPE)
    first.stdout.readline()
    try:
        for lock, command in ((tmp_path / "run" / ".training.lock", train(tmp_path / "run")), (mini / "runs" / "mini" / ".lock", ["reproduce", "--size", "mini"]),
                              (mini / "reports" / ".mini" / ".lock", ["report", "--size", "mini"])):
            lock.parent.mkdir(parents=True)
            os.link(tmp_path / "held", lock)
            refused(adm(*command, ADM_REPRO_ROOT=mini), f"process {first.pid} on here", "wait for it")
    finally:
        first.kill()
        first.communicate()


def test_images_may_be_drawn_by_two_runs_at_once(done, tmp_path):
    with ThreadPoolExecutor(2) as pool:
        assert [status for status, _ in pool.map(lambda _: adm(*sample(done, tmp_path / "drawn")), range(2))] == [0, 0]
    assert (tmp_path / "drawn" / "samples.npz").read_bytes() == (done / "drawn" / "samples.npz").read_bytes()


def test_two_references_of_one_name_do_not_replace_each_other(done, tmp_path, monkeypatch):
    real = adm_repro.evaluation.measure_images

    def slow(*arguments, **options):
        measured = real(*arguments, **options)
        (tmp_path / "batch.npz").write_bytes(b"of the other run")
        return measured
    monkeypatch.setattr("adm_repro.evaluation.measure_images", slow)
    refused(adm(*reference(done, tmp_path / "batch.npz")), "batch.npz was written by somebody else in the meantime")
    assert (tmp_path / "batch.npz").read_bytes() == b"of the other run"


# inputs that went, changed, or are half there


def test_files_that_are_gone_are_made_again_or_named(done, tmp_path):
    whole = (done / "drawn" / "samples.npz").read_bytes()
    for name in ("blocks/settings.json", "blocks/assembled.json", "samples.npz"):
        shutil.copytree(done / "drawn", tmp_path / "drawn", dirs_exist_ok=True)
        (tmp_path / "drawn" / name).unlink()
        status, said = adm(*sample(done, tmp_path / "drawn"))
        assert status == 0 and (tmp_path / "drawn" / "samples.npz").read_bytes() == whole, (name, said)
    shutil.copytree(done / "run", tmp_path / "run")
    (tmp_path / "run" / "weights.safetensors").unlink()
    assert adm(*train(tmp_path / "run"))[0] == 0
    torch.testing.assert_close(load_file(tmp_path / "run" / "weights.safetensors"), load_file(done / "run" / "weights.safetensors"), rtol=0, atol=0)
    refused(adm("sample", tmp_path / "gone", "--out", tmp_path / "x"), "gone is no file, no folder and no released checkpoint")
    refused(adm("reference", tmp_path / "gone", tmp_path / "x.npz", "--features", done / "features.safetensors"), "gone does not exist")


def test_a_damaged_note_is_named_with_what_to_do(done, tmp_path, mini):
    for folder, name, command in (("drawn", "settings.json", sample(done, tmp_path / "drawn")), ("drawn", "blocks/assembled.json", sample(done, tmp_path / "drawn")),
                                  ("run", "training.json", train(tmp_path / "run"))):
        shutil.copytree(done / folder, tmp_path / folder, dirs_exist_ok=True)
        (tmp_path / folder / name).write_text("{")
        refused(adm(*command), f"{tmp_path}/{folder}/{name} is damaged", "delete it")
    record = make_record(mini, "first")
    record.write_text("{")
    refused(adm("reproduce", "--size", "mini", ADM_REPRO_ROOT=mini), f"{record} is damaged", "delete it, and the job runs again")


def test_a_changed_model_is_another_drawing(done, tmp_path):
    shutil.copytree(done / "drawn", tmp_path / "drawn")
    shutil.copytree(done / "run", tmp_path / "run")
    assert adm(*train(tmp_path / "run2", "--seed", "1"))[0] == 0
    shutil.copy(tmp_path / "run2" / "weights.safetensors", tmp_path / "run" / "weights.safetensors")
    refused(adm(*sample(tmp_path, tmp_path / "drawn")), f"{tmp_path}/drawn holds samples of other settings (model.sha256", "use another folder")


def test_what_a_killed_process_began_is_removed_and_what_another_writes_is_kept(done, tmp_path):
    """Right after the kill: a writer holds a lock on its temporary file, and a process that has ended holds none."""
    shutil.copytree(done / "drawn", tmp_path / "drawn")
    blocks = tmp_path / "drawn" / "blocks"
    for name in ("samples.npz", "blocks/assembled.json", "blocks/block_000002.npz"):
        (tmp_path / "drawn" / name).unlink()
    code = f"import time; from adm_repro.files import replacing\nwith replacing({str(blocks / 'block_000002.npz')!r}): print('began', flush=True); time.sleep(600)"
    writers = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=ROOT) for _ in range(2)]
    try:
        assert [writer.stdout.readline() for writer in writers] == ["began\n"] * 2
        assert len(list(blocks.glob(".block_000002.npz.*.tmp.npz"))) == 2
        writers[0].kill()
        writers[0].wait()
        assert adm(*sample(done, tmp_path / "drawn"))[0] == 0
        assert len(list(blocks.glob(".block_000002.npz.*.tmp.npz"))) == 1
        assert (tmp_path / "drawn" / "samples.npz").read_bytes() == (done / "drawn" / "samples.npz").read_bytes()
    finally:
        for writer in writers:
            writer.kill()
            writer.communicate()


# clocks


def test_a_clock_that_was_set_back_keeps_no_leftovers(done, tmp_path):
    shutil.copytree(done / "drawn", tmp_path / "drawn")
    for name in ("samples.npz", "blocks/assembled.json", "blocks/block_000002.npz"):
        (tmp_path / "drawn" / name).unlink()
    leftover = tmp_path / "drawn" / "blocks" / ".block_000002.npz.0123.tmp.npz"
    leftover.touch()
    os.utime(leftover, (time.time() + 1e6,) * 2)
    assert adm(*sample(done, tmp_path / "drawn"))[0] == 0
    assert not leftover.exists() and (tmp_path / "drawn" / "samples.npz").read_bytes() == (done / "drawn" / "samples.npz").read_bytes()


@pytest.fixture
def mini(tmp_path):
    """A repository of two jobs."""
    root = tmp_path / "mini"
    (root / "nbs" / "paper").mkdir(parents=True)
    (root / "experiments").mkdir()
    shutil.copy(ROOT / "experiments" / "Snakefile", root / "experiments")
    (root / "experiments" / "mini.toml").write_text(MINI)
    run, section = 'from adm_repro.runs import write_result\nwrite_result(run_dir, metrics={"x": 1.0})', 'from adm_repro.reports import write_section\nwrite_section(run_dir, "Title", "text")'
    for name, parameters, code in (("one", "seed: int = 0  # of all", run), ("two", 'seed: int = 0  # of all\nmade: str = ""  # what it needs', run),
                                   ("table4", 'size: str = ""  # name\nrecords: str = ""  # folder\nseeds: int = 0  # how many', section)):
        cells = [(f'run_dir: str = ""  # folder\n{parameters}', ["parameters"]), (code, [])]
        cells = [{"cell_type": "code", "id": f"c{i}", "metadata": {"tags": tags}, "source": source, "outputs": [], "execution_count": None} for i, (source, tags) in enumerate(cells)]
        notebook = {"cells": cells, "metadata": {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}, "nbformat": 4, "nbformat_minor": 5}
        (root / "nbs" / "paper" / f"{name}.ipynb").write_text(json.dumps(notebook))
    shutil.copy(ROOT / "nbs" / "paper" / "report.ipynb", root / "nbs" / "paper")
    return root


def make_record(root, name, **provenance):
    """The record of a job, as if it had run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ADM_REPRO_ROOT", str(root))
        experiment = load_experiment("mini")
        job = experiment.jobs[f"{name}-seed0"]
        path = job_folder(experiment, job) / "record.json"
        write_json(path, {"job": job.id, "name": job.name, "seed": 0, "size": "mini", "notebook": job.notebook, "recipe": job_recipe(experiment, job), "threads": 1, "parameters": {},
                          "needs": job.needs, "result": {"metrics": {"x": 1.0}}, "provenance": runs.provenance() | {"seconds": 1.0, "bytes": 1, "timing": {}, "processes": 1} | provenance})
        return path


def test_what_is_needed_may_be_newer_than_what_was_made_of_it(mini):
    os.utime(make_record(mini, "first"), (time.time() + 1e6,) * 2)  # before the clock was set back
    status, said = adm("reproduce", "second", "--size", "mini", "--jobs", "1", ADM_REPRO_ROOT=mini)
    assert status == 0 and "second-seed0 done" in said, said
    assert len(list(mini.glob("runs/mini/*/record.json"))) == 2


def test_what_changed_under_a_finished_record_is_said(mini):
    first = make_record(mini, "first").parent
    (first / "weights.safetensors").write_bytes(bytes(3_000_000))
    second = make_record(mini, "second", inputs={"made": runs._marks(first)})
    plan = ("reproduce", "--size", "mini", "--dry-run")
    assert "warning" not in adm(*plan, ADM_REPRO_ROOT=mini)[1]
    (first / "weights.safetensors").write_bytes(bytes(2_999_999) + b"1")
    status, said = adm(*plan, ADM_REPRO_ROOT=mini)
    assert status == 0 and f"warning: second-seed0 was made of another weights.safetensors in {first}: adm-repro run second-seed0 --size mini --again" in said
    shutil.rmtree(first)
    assert "warning" not in adm(*plan, ADM_REPRO_ROOT=mini)[1] and second.exists()


# signals


def start(*arguments):
    return subprocess.Popen([sys.executable, "-m", "adm_repro.cli", *map(str, arguments)], env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT)


def wait_for(path, process):
    while not path.exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)


@pytest.mark.parametrize("number, processes", [(signal.SIGINT, 1), (signal.SIGTERM, 2)])
def test_a_training_that_is_stopped_says_where_it_stands(tmp_path, number, processes):
    run = start(*train(tmp_path / "run", "--processes", processes, "--iterations", "100000", "--save-every", "5" if processes > 1 else "100000", "--log-every", "1"))
    wait_for(tmp_path / "run" / ("training.safetensors" if processes > 1 else "log.jsonl"), run)
    run.send_signal(number)
    _, said = run.communicate(timeout=60)
    assert run.returncode == 128 + number and "Traceback" not in said and "torch.distributed" not in said, said
    done = int(re.search(r"holds a checkpoint of step (\d+) of 100,000, from which the same command continues$", said.splitlines()[-1])[1])
    assert said.splitlines()[-1].startswith(f"adm-repro: stopped: {tmp_path}/run holds") and done == steps_done(tmp_path / "run") > 0


@pytest.mark.parametrize("number, processes", [(signal.SIGINT, 2)])
def test_a_drawing_that_is_stopped_says_where_it_stands(done, tmp_path, number, processes):
    run = start(*sample(done, tmp_path / "drawn", "--processes", processes, "--num", "40000"))
    wait_for(tmp_path / "drawn" / "blocks" / "block_000001.npz", run)
    run.send_signal(number)
    _, said = run.communicate(timeout=60)
    assert run.returncode == 128 + number and "Traceback" not in said and "torch.distributed" not in said, said
    held = re.fullmatch(rf"adm-repro: stopped: {tmp_path}/drawn holds (\d+) of 40,000 images; the same command continues", said.splitlines()[-1])
    assert int(held[1]) == images_done(tmp_path / "drawn" / "blocks") > 0
    no_half_files(tmp_path / "drawn")


def test_a_stopped_training_ends_in_the_same_weights(done, tmp_path):
    class AfterThree:
        asked = 0

        def __call__(self):
            self.asked += 1
            return self.asked == 3

        def note(self, number):
            pass
        number = signal.SIGTERM

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("adm_repro.tools._AfterThisStep", AfterThree)
        status, said = adm(*train(tmp_path / "run"))
    assert status == 143 and steps_done(tmp_path / "run") == 3, said
    assert adm(*train(tmp_path / "run"))[0] == 0
    torch.testing.assert_close(load_file(tmp_path / "run" / "weights.safetensors"), load_file(done / "run" / "weights.safetensors"), rtol=0, atol=0)


# numbers that lie


def test_a_trajectory_that_diverges_is_not_stored(done, tmp_path):
    from adm_repro.checkpoints import load_network
    from adm_repro.classifier import ClassifierConfig, NoisyClassifier

    torch.manual_seed(0)
    small = dict(image_size=8, in_channels=1, width=32, channel_mult=(1, 1), depth=1, attention_resolutions=(4,), head_channels=32)
    guide = NoisyClassifier(ClassifierConfig(**small, classes=10))
    for parameter in guide.parameters():
        parameter.data.normal_(0, 1.0)
    for name, about, classes, told in (("guide", {}, 10, ""), ("other", {"noise_schedule": "linear"}, 10, "differ in noise schedule: cosine and linear"), ("few", {}, 7, "differ in number of classes: 10 and 7")):
        network = guide if classes == 10 else NoisyClassifier(ClassifierConfig(**small, classes=classes))
        save_network(tmp_path / f"{name}.safetensors", network, **{"noise_schedule": "cosine"} | about)
        guided = sample(done, tmp_path / "drawn", "--classifier", tmp_path / f"{name}.safetensors", "--guidance-scale", "1e25" if not told else "1", "--steps", "ddim4")
        refused(adm(*guided), told or "images of seed 0 diverged, with values that are not finite (image ", "" if told else "lower the guidance scale")
    assert not list((tmp_path / "drawn").rglob("block_*.npz"))
    network, about = load_network(done / "run" / "weights.safetensors")
    network.out["2"].weight.fill_(7e4)  # beyond float16
    with torch.no_grad():
        assert not network(torch.ones(1, 1, 8, 8), torch.zeros(1, dtype=torch.long), y=torch.zeros(1, dtype=torch.long)).half().isfinite().all()
    (tmp_path / "run").mkdir()
    save_network(tmp_path / "run" / "weights.safetensors", network, **about)
    refused(adm("sample", tmp_path / "run", "--num", "4", "--steps", "4", "--device", "cpu", "--precision", "fp16", "--out", tmp_path / "half"), "diverged", "use fp32 or bf16 in place of fp16")


def test_features_that_do_not_vary_are_said(done, tmp_path):
    np.savez(tmp_path / "same.npz", arr_0=np.full((64, 8, 8, 1), 100, np.uint8))
    status, said = adm("evaluate", done / "images.npz", tmp_path / "same.npz", "--features", done / "features.safetensors", "--device", "cpu", "--no-cache", "--only", "frechet")
    assert status == 0 and "warning: the samples all have the same features" in said, said
    status, said = adm(*evaluate(done, "--no-cache"))
    assert "the same features" not in said and "16 samples are too few for" in said and "the covariance has no full rank" in said
