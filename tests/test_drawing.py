"""Drawing at scale: the same bytes from any number of processes, killed or not; small memory, damaged files and full disks; stacks in one command."""
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from conftest import ROOT, save_small_models

from adm_repro import batches, drawing, tools
from adm_repro.batches import DamagedBatch, assemble, open_batch, read_blocks, sample_to_folder
from adm_repro.checkpoints import save_network
from adm_repro.cli import main
from adm_repro.drawing import Drawing, block_sampler, choose_block_size, draw, placed
from adm_repro.pretrained import load
from adm_repro.sampling import SamplerConfig

BLOCK_SIZE_TOLERANCE = 1e-4  # absolute, images in [-1, 1]
COUNT, BLOCK = 22, 4  # six blocks, the last one of two images


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # as the processes of torchrun
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Files of a model, its guide and an upsampler, with weights that all matter."""
    return save_small_models(tmp_path_factory.mktemp("models"))


def guided(models, steps="4"):
    return Drawing(load(models / "model.safetensors"), SamplerConfig(steps=steps, guidance_scale=2.0), load(models / "guide.safetensors"))


@pytest.fixture(scope="module")
def alone(models, tmp_path_factory):
    """samples.npz of one process."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    made = draw(guided(models), COUNT, tmp_path_factory.mktemp("alone"), BLOCK, progress=False)
    torch.set_num_threads(before)
    return made.path.read_bytes()


def environment(**more):
    return os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | more


def options(models, folder):
    return [str(models / "model.safetensors"), "--classifier", str(models / "guide.safetensors"), "--guidance-scale", "2", "--steps", "4", "--num", str(COUNT),
            "--block-size", str(BLOCK), "--device", "cpu", "--out", str(folder)]


PROCESS = """
import os, sys, time
from pathlib import Path
sys.path.insert(0, "tests")
import torch
torch.set_num_threads(1)
from test_drawing import BLOCK, COUNT, guided
from adm_repro import drawing
pause, sampler = float(sys.argv[3]), drawing.block_sampler
def slow(*arguments):
    sample_block = sampler(*arguments)
    def paused(indices):
        time.sleep(pause)
        return sample_block(indices)
    return paused
drawing.block_sampler = slow
drawing.draw(guided(Path(sys.argv[1])), COUNT, sys.argv[2], BLOCK, progress=False)
"""


def start(models, folder, rank, world, pause=0.0):
    command = [sys.executable, "-c", PROCESS, str(models), str(folder), str(pause)]
    return subprocess.Popen(command, cwd=ROOT, env=environment(RANK=str(rank), WORLD_SIZE=str(world)))


def test_three_processes_of_the_command_make_the_bytes_of_one(models, alone, tmp_path):
    command = [sys.executable, "-m", "adm_repro.cli", "sample", *options(models, tmp_path), "--processes", "3", "--json"]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=True)
    assert (tmp_path / "samples.npz").read_bytes() == alone
    assert json.loads(done.stdout)["settings"]["block_size"] == BLOCK
    assert done.stderr.count("22 images of 8x8, 4 guided ancestral steps") == 1  # only the first process speaks


def test_a_process_that_is_killed_and_another_number_of_processes_change_no_byte(models, alone, tmp_path):
    """Two processes without torchrun, as on two machines that share a folder; one is killed between its blocks."""
    victim, other = start(models, tmp_path, 1, 2, pause=1.0), start(models, tmp_path, 0, 2)
    blocks = tmp_path / "blocks"
    while not (blocks / "block_000001.npz").exists():
        time.sleep(0.02)
    victim.send_signal(signal.SIGKILL)
    victim.wait()
    while not (blocks / "block_000004.npz").exists():
        time.sleep(0.02)
    assert other.poll() is None  # it waits for the blocks of the other
    assert not (blocks / "block_000005.npz").exists() and not (tmp_path / "samples.npz").exists()
    other.send_signal(signal.SIGKILL)  # what torchrun does when one of its processes dies
    other.wait()
    made = draw(guided(models), COUNT, tmp_path, progress=False)  # the block size is the folder's
    assert made.path.read_bytes() == alone
    assert 0 < made.made < COUNT


def test_two_processes_and_two_runs_at_once_make_the_bytes_of_one(models, alone, tmp_path):
    processes = [start(models, tmp_path / "dealt", rank, 2) for rank in (1, 0)]
    with ThreadPoolExecutor(2) as pool:  # both make everything, and neither minds the other
        list(pool.map(lambda _: draw(guided(models), COUNT, tmp_path / "twice", BLOCK, progress=False), range(2)))
    assert [process.wait() for process in processes] == [0, 0]
    assert (tmp_path / "dealt" / "samples.npz").read_bytes() == (tmp_path / "twice" / "samples.npz").read_bytes() == alone
    assert not list(tmp_path.rglob(".*tmp*"))


ASSEMBLE = """
import sys, time
from pathlib import Path
from adm_repro import batches
read = batches.read_blocks
def slow(folder):
    print("writes", flush=True)
    for block in read(folder):
        time.sleep(0.3)
        yield block
batches.read_blocks = slow
batches.assemble(sys.argv[1], sys.argv[2], keep_blocks=len(sys.argv) > 3)
"""


@pytest.mark.parametrize("keep", [True, False])
def test_one_of_several_runs_writes_the_file_and_no_block_is_missed(tmp_path, keep):
    images = np.arange(10, dtype=np.uint8)[:, None, None, None]
    sample_to_folder(lambda indices: (images[indices], indices.numpy()), 10, 3, tmp_path / "blocks", {}, progress=False)
    (tmp_path / ".samples.npz.0123456789ab.tmp.npz").touch()  # of a process that was killed
    command = [sys.executable, "-c", ASSEMBLE, str(tmp_path / "blocks"), str(tmp_path / "samples.npz"), *["keep"] * keep]
    runs = [subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, text=True) for _ in range(3)]
    assert sum(run.communicate()[0].count("writes") for run in runs) == 1
    assert [run.returncode for run in runs] == [0, 0, 0]
    assert (open_batch(tmp_path / "samples.npz").read(0, 10) == images).all()
    assert len(list((tmp_path / "blocks").glob("block_*"))) == 4 * keep
    assert not list(tmp_path.glob(".*tmp*"))


def test_another_block_size_gives_the_same_images_within_tolerance(models, alone, tmp_path, monkeypatch):
    (tmp_path / "four.npz").write_bytes(alone)
    nine = open_batch(draw(guided(models), COUNT, tmp_path / "nine", 9, progress=False).path)
    four = open_batch(tmp_path / "four.npz")
    assert np.abs(four.read(0, COUNT).astype(int) - nine.read(0, COUNT)).max() <= 1
    assert (four.labels == nine.labels).all()
    monkeypatch.setattr(drawing, "to_uint8", lambda images: images)  # before they are quantised
    sample_block = block_sampler(guided(models))
    together, parts = sample_block(torch.arange(12))[0], [sample_block(part)[0] for part in torch.arange(12).split(5)]
    assert np.abs(np.concatenate(parts) - together).max() < BLOCK_SIZE_TOLERANCE


def test_blocks_that_do_not_fit_are_computed_in_parts(models, alone, tmp_path, monkeypatch, capsys):
    sizes = []

    def cramped(*arguments):
        sample_block = block_sampler(*arguments)

        def limited(indices):
            sizes.append(len(indices))
            if len(indices) > 3:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return sample_block(indices)
        return limited

    monkeypatch.setattr(drawing, "block_sampler", cramped)
    made = open_batch(draw(guided(models), COUNT, tmp_path, 8, progress=False).path)
    assert capsys.readouterr().err.count("8 images do not fit into memory: they are computed 2 at a time") == 1
    assert sizes == [8, 4, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2]  # found out once; 22 images are 8, 8 and 6
    notes = {path.name: json.loads(path.read_text()) for path in (tmp_path / "blocks").glob("block_*.json")}
    assert notes == {f"block_00000{i}.json": {"computed_size": 2} for i in range(3)}
    (tmp_path / "alone.npz").write_bytes(alone)
    assert np.abs(made.read(0, COUNT).astype(int) - open_batch(tmp_path / "alone.npz").read(0, COUNT)).max() <= 1


def test_one_image_that_does_not_fit_is_said_in_a_line(models, tmp_path, monkeypatch):
    def full(indices):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(drawing, "block_sampler", lambda *_: full)
    result = CliRunner().invoke(main, ["sample", *options(models, tmp_path / "new")])
    assert result.exit_code == 2
    assert "adm-repro: there is not enough memory for one image (CUDA out of memory): free some" in result.stderr


@pytest.mark.parametrize("damage", ["cut", "empty", "bit", "other"])
def test_damaged_blocks_are_made_anew(models, alone, tmp_path, damage):
    draw(guided(models), COUNT, tmp_path, BLOCK, progress=False)
    (tmp_path / "samples.npz").unlink()
    block = tmp_path / "blocks" / "block_000002.npz"
    content = bytearray(block.read_bytes())
    content[content.index(b"NUMPY") + 150] ^= 4
    block.write_bytes({"cut": content[:300], "empty": b"", "bit": content, "other": (block.parent / "block_000005.npz").read_bytes()}[damage])  # the last block is shorter
    if damage == "bit":
        with pytest.raises(DamagedBatch, match="Bad CRC-32"):
            list(read_blocks(tmp_path / "blocks"))
    assert draw(guided(models), COUNT, tmp_path, BLOCK, progress=False).path.read_bytes() == alone


def test_blocks_that_were_removed_are_not_missed(models, alone, tmp_path):
    draw(guided(models), COUNT, tmp_path, BLOCK, keep_blocks=False, progress=False)
    assert not list((tmp_path / "blocks").glob("block_*"))
    assert sum(len(labels) for _, labels in read_blocks(tmp_path / "blocks")) == COUNT
    assert draw(guided(models), COUNT, tmp_path, BLOCK, progress=False).made == 0
    (tmp_path / "samples.npz").write_bytes(alone[:-100])  # it was all there was
    again = draw(guided(models), COUNT, tmp_path, BLOCK, progress=False)
    assert (again.made, again.path.read_bytes()) == (COUNT, alone)


def test_blocks_of_a_process_that_is_gone_are_made_by_those_that_wait(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(batches, "_PATIENCE", 0.2)
    sample_to_folder(lambda indices: (np.zeros((len(indices), 2, 2, 1), np.uint8), indices.numpy()), 10, 3, tmp_path, {}, progress=False)
    assert [labels.tolist() for _, labels in read_blocks(tmp_path)] == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9]]
    with pytest.raises(TimeoutError, match=r"samples.npz was not written by the first process"):
        assemble(tmp_path, tmp_path / "samples.npz")


def test_a_full_disk_is_noticed_before_and_during_the_work(models, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("shutil.disk_usage", lambda _: type("", (), {"free": 1000}))
        result = CliRunner().invoke(main, ["sample", *options(models, tmp_path / "new")])
        assert (result.exit_code, (tmp_path / "new").exists()) == (2, False)
        assert " bytes are needed for the rest of the images and the file that is made of them, and 1,000 are free: make room" in result.stderr
    draw(guided(models), COUNT, tmp_path, BLOCK, progress=False)  # with room the same goes on


def test_a_stack_in_one_command_is_its_two_steps(models, tmp_path):
    base, enlarge = [str(models / "model.safetensors"), "--steps", "ddim4"], [str(models / "upsampler.safetensors"), "--steps", "2"]
    common = ["--block-size", "4", "--device", "cpu", "--seed", "3", "--out"]
    for arguments in ([*base, *common, tmp_path / "stack", "--num", "10", "--upsampler", enlarge[0], "--upsampler-steps", "2"],
                      [*base, *common, tmp_path / "small", "--num", "10"], [*enlarge, *common, tmp_path / "large", "--low-res", tmp_path / "small" / "samples.npz"]):
        result = CliRunner().invoke(main, ["sample", *map(str, arguments)], catch_exceptions=False)
        assert result.exit_code == 0, result.output
    assert (tmp_path / "stack" / "base" / "samples.npz").read_bytes() == (tmp_path / "small" / "samples.npz").read_bytes()
    assert (tmp_path / "stack" / "samples.npz").read_bytes() == (tmp_path / "large" / "samples.npz").read_bytes()
    small, large = (open_batch(tmp_path / name / "samples.npz") for name in ("small", "large"))
    assert large.shape == (10, 16, 16, 1)
    assert (small.labels == large.labels).all()


def test_settings_are_kept_and_others_refused(models, tmp_path):
    draw(guided(models), COUNT, tmp_path, BLOCK, progress=False)
    kept = json.loads((tmp_path / "settings.json").read_text())
    assert (kept["count"], kept["block_size"], kept["sampler"]["guidance_scale"], len(kept["model"]["sha256"]), len(kept["guide"]["sha256"])) == (COUNT, BLOCK, 2.0, 64, 64)
    other = models / "other.safetensors"
    network = load(models / "model.safetensors").network
    with torch.no_grad():
        network.out["2"].bias[0] += 1e-3
    save_network(other, network, noise_schedule="linear")
    for change, message in ((["--seed", "1"], "(seed is 0 there and 1 here)"), (["--num", "30"], "(count is 22 there and 30 here)"),
                            (["--steps", "5"], 'sampler.steps is "4" there and "5" here'), (["--block-size", "8"], "(block_size is 4 there and 8 here)"), (["--threads", "2"], "(threads is 1 there and 2 here)"),
                            (["--precision", "bf16"], 'precision is "fp32" there and "bf16" here'), ([], "model.sha256 is ")):
        arguments = options(models, tmp_path) + change
        arguments[0] = arguments[0] if change else str(other)
        for more in ([], ["--processes", "2"]):  # said once, before processes are started
            result = CliRunner().invoke(main, ["sample", *arguments, *more])
            assert (result.exit_code, len(result.output.splitlines())) == (2, 1), result.output
            assert message in result.stderr


@pytest.fixture
def gpu(models, monkeypatch, tmp_path):
    """Measurements are made up: 1 GB of other things, 100 MB per image, and a GPU of 8 GiB of which hardly anything is free. What was computed."""
    computed = []
    monkeypatch.setenv("ADM_REPRO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(drawing, "block_sampler", lambda *_: lambda indices: computed.append(len(indices)))
    monkeypatch.setattr(drawing, "placed", lambda drawing, device: (drawing.model.network, drawing.guide.network))
    for name, value in (("reset_peak_memory_stats", None), ("empty_cache", None), ("mem_get_info", (1000, 0)), ("memory_allocated", 10**9),
                        ("get_device_properties", type("", (), {"name": "H200", "total_memory": 8 * 2**30 + 3 * 10**8}))):
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda _: 10**9 + 10**8 * computed[-1])
    return computed


def test_the_block_size_of_a_gpu_is_what_two_steps_say(models, gpu, monkeypatch):
    device = torch.device("cuda")
    assert choose_block_size(guided(models), 1000, device) == 64  # 80 % of 8 GiB hold 68 images
    assert gpu == [2, 2, 4]
    assert choose_block_size(guided(models), 1000, device) == 64  # remembered
    assert gpu == [2, 2, 4]
    assert choose_block_size(guided(models), 40, device) == 32
    for kind, size in (("cuda", 64), ("cpu", 32)):  # whatever the number of processes
        for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"):
            monkeypatch.setenv(name, "100")
        assert choose_block_size(guided(models), 1000, torch.device(kind)) == size
    monkeypatch.setattr(drawing, "activation_bytes", lambda _: 3e8)
    assert choose_block_size(guided(models), 1000, torch.device("cpu")) == 2  # 2 GB hold 3 of both networks


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("CUDA error: out of memory"), RuntimeError("CUBLAS_STATUS_ALLOC_FAILED when calling"), None])
def test_a_gpu_that_does_not_hold_four_images_takes_one(models, gpu, monkeypatch, error):
    def full(indices):
        raise error or RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(drawing, "block_sampler", lambda *_: full)
    with contextlib.nullcontext() if error else pytest.raises(RuntimeError, match="illegal memory access"):
        assert choose_block_size(guided(models), 1000, torch.device("cuda")) == 1


def test_fast_networks_are_built_once_and_leave_the_originals(models, tmp_path, monkeypatch):
    fast = replace(guided(models), fast=True)

    net, guide = placed(fast, "meta")
    assert [next(network.parameters()).device.type for network in (net, guide, fast.model.network, fast.guide.network)] == ["meta", "meta", "cpu", "cpu"]
    built, used = placed(fast, "cpu"), []

    def count(drawing, device, low_res, networks, *_):
        used.append(networks)
        return lambda indices: (np.zeros((len(indices), 8, 8, 1), np.uint8), indices.numpy())

    def choose(drawing, number, device, low_res, networks):
        used.append(networks)
        return 4

    monkeypatch.setattr(drawing, "placed", lambda *_: built)
    monkeypatch.setattr(drawing, "block_sampler", count)
    monkeypatch.setattr(drawing, "choose_block_size", choose)
    draw(fast, 4, tmp_path, progress=False)
    assert used[0] is used[1] is built


def test_threads_and_products_are_the_same_everywhere(models, tmp_path, monkeypatch):
    seen, full = [], [False]

    def watched(*arguments):
        sample_block = block_sampler(*arguments)

        def look(indices):
            seen.append((torch.get_num_threads(), full[-1], torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark))
            return sample_block(indices)
        return look

    @contextlib.contextmanager
    def full_float32():
        full.append(True)
        yield
        full.append(False)

    monkeypatch.setattr(drawing, "block_sampler", watched)
    monkeypatch.setattr(drawing, "full_float32", full_float32)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    torch.set_num_threads(2)
    draw(guided(models, "1"), 4, tmp_path / "one", 4, progress=False)
    draw(guided(models, "1"), 4, tmp_path / "three", 4, progress=False, threads=3)
    draw(replace(guided(models, "1"), precision="bf16"), 4, tmp_path / "half", 4, progress=False)
    assert seen == [(1, True, True, False), (3, True, True, False), (1, False, True, False)]  # half precision has no use for TF32's switch
    assert (torch.get_num_threads(), torch.backends.cudnn.benchmark) == (2, True)
    assert [json.loads((tmp_path / name / "settings.json").read_text())["threads"] for name in ("one", "three")] == [1, 3]
    with pytest.raises(ValueError, match="threads must be at least 1, got 0"):
        draw(guided(models), 4, tmp_path, 4, threads=0)


def test_processes_choose_the_block_size_and_threads_of_one(models, tmp_path):
    """Without --block-size, and whatever OMP_NUM_THREADS says."""
    arguments = options(models, tmp_path / "two")
    torch.set_num_threads(2)
    lone = draw(guided(models), COUNT, tmp_path / "one", progress=False)
    arguments = [argument for i, argument in enumerate(arguments) if "--block-size" not in arguments[max(0, i - 1):i + 1]]
    subprocess.run([sys.executable, "-m", "adm_repro.cli", "sample", *arguments, "--processes", "2"], env=environment(OMP_NUM_THREADS="2"), check=True)
    assert (tmp_path / "two" / "samples.npz").read_bytes() == lone.path.read_bytes()
    assert (tmp_path / "two" / "settings.json").read_text() == (tmp_path / "one" / "settings.json").read_text()


def test_more_processes_than_gpus_are_refused(models, tmp_path, monkeypatch):
    monkeypatch.setattr(tools, "_device", lambda device: device)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    result = CliRunner().invoke(main, ["sample", *options(models, tmp_path), "--processes", "8", "--device", "cuda"])
    assert (result.exit_code, result.stderr) == (2, "adm-repro: 8 processes on cuda need as many GPUs, and there is 1\n")


def test_recorded_memory_of_50000_images_is_below_4_gb():
    recorded = json.loads((ROOT / "benchmarks" / "results" / "sampling_memory.json").read_text())
    assert [row["samples"] for row in recorded["rows"]] == [50_000] * 3
    assert max(row["peak_gib"] for row in recorded["rows"]) * 2**30 < 4e9


def test_help_does_not_wait_for_torch():
    code = "import sys\nfrom click.testing import CliRunner\nfrom adm_repro.cli import main\nresult = CliRunner().invoke(main, ['sample', '--help'])\n" \
           "assert '--guidance-scale' in result.output\nassert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], env=environment(), check=True)
