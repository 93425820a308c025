"""Drawing with recorded steps: which way is chosen and remembered, what is continued, what falls back; blocks that are written while the next is computed."""
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import make_dataclass, replace

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from conftest import ROOT

from adm_repro import drawing, graphs
from adm_repro.batches import images_done, open_batch
from adm_repro.checkpoints import save_network
from adm_repro.classifier import ClassifierConfig, NoisyClassifier
from adm_repro.cli import main
from adm_repro.drawing import Drawing, agree, block_sampler, draw, draw_stack, tune
from adm_repro.pretrained import Pretrained
from adm_repro.sampling import SamplerConfig
from adm_repro.unet import UNet, UNetConfig, Upsampler

SMALL = dict(in_channels=1, width=32, channel_mult=(1, 1), depth=1, attention_resolutions=(4,), head_channels=16)


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setenv("ADM_REPRO_CACHE", str(tmp_path / "cache"))
    yield tmp_path / "cache"
    torch.set_num_threads(before)


def network(kind, config):
    torch.manual_seed(0)
    net = kind(config).eval().requires_grad_(False)
    for parameter in net.parameters():  # no zero-initialised layers
        parameter.add_(0.05 * torch.randn(parameter.shape))
    return Pretrained(net)


def guided(steps="3"):
    return Drawing(network(UNet, UNetConfig(8, **SMALL, classes=10)), SamplerConfig(steps=steps, guidance_scale=2.0),
                   network(NoisyClassifier, ClassifierConfig(8, **SMALL, classes=10)), fast=True)


@pytest.fixture
def gpu(monkeypatch):
    """A GPU that is none, and on which ways take as long as `took` says; an error in place of seconds is raised."""
    took, now, asked = {}, [0.0], []
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: type("", (), {"name": "H200", "total_memory": 8 * 2**30}))
    for name in ("synchronize", "empty_cache"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: None)
    monkeypatch.setattr(drawing.time, "perf_counter", lambda: now[0])

    def sampler(short, device, low_res, networks, recorded, stay):
        compiled = torch._dynamo.eval_frame._stance.stance == "default"

        def sample_block(indices):
            asked.append((compiled, recorded, short.config.steps, len(indices)))
            if isinstance(took[compiled, recorded], BaseException):
                raise took[compiled, recorded]
            now[0] += took[compiled, recorded]
        return sample_block

    monkeypatch.setattr(drawing, "block_sampler", sampler)
    return took, asked


def test_the_fastest_way_is_measured_once(gpu, cache):
    took, asked = gpu
    took |= {(True, True): 0.3, (True, False): 0.4, (False, True): torch.OutOfMemoryError("CUDA out of memory"), (False, False): 0.2}
    device = torch.device("cuda")
    assert tune(guided(), 16, 10, device, None, (None, None)) == {"compiled": False, "recorded": False}
    assert [asked.count((*way, "4", 16)) for way in took] == [3, 3, 1, 3]
    took[False, True] = 0.1
    assert tune(guided("250"), 16, 10, device, None, (None, None)) == {"compiled": False, "recorded": False}  # another number of steps is the same step
    assert len(asked) == 10
    assert tune(guided(), 8, 10, device, None, (None, None)) == {"compiled": False, "recorded": True}
    assert {*json.loads(next((cache / "tuned").glob("*.json")).read_text())} >= {"device", "torch", "networks", "precision", "block_size", "answer"}
    for way in took:
        took[way] = RuntimeError("all of them fail")
    assert tune(guided(), 4, 10, device, None, (None, None)) == {"compiled": True, "recorded": True}  # and the run will say why


def test_guidance_on_an_interval_is_no_obstacle(gpu):
    took, _ = gpu
    took |= {(True, False): 2.0, (False, False): 1.0}
    narrow = replace(guided("250"), config=SamplerConfig("250", guidance_scale=1.0, guidance_interval=(0.5, 0.51)))
    assert tune(narrow, 16, 10, torch.device("cuda"), None, (None, None)) == {"compiled": False, "recorded": False}  # of few steps none lies there


def test_a_step_that_cannot_be_recorded_is_no_way(gpu, monkeypatch):
    monkeypatch.setattr(drawing, "block_sampler", lambda *given: lambda indices: graphs.warnings.warn("recording a step failed (no)", stacklevel=1) if given[4] else None)
    assert not tune(guided(), 16, 10, torch.device("cuda"), None, (None, None))["recorded"]


def test_a_folder_keeps_its_way(tmp_path, monkeypatch):
    """What was chosen on a GPU is continued, also elsewhere and by the command; a folder without a choice gets none."""
    fast, used = guided(), []
    settings = fast.settings() | {"count": 5, "threads": 1, "low_res": None}
    agree(tmp_path / "tuned", settings, 4, None, lambda size: {"compiled": False, "recorded": False})
    agree(tmp_path / "before", settings, 4, None)

    def sampler(of, device, low_res, networks, recorded, stay):
        used.append((device.type, torch._dynamo.eval_frame._stance.stance, recorded))
        return block_sampler(of, "cpu", low_res, networks)

    monkeypatch.setattr(drawing, "block_sampler", sampler)
    monkeypatch.setattr(drawing, "own_device", torch.device)
    monkeypatch.setattr(drawing, "placed", lambda of, device, placed=drawing.placed: placed(of, "cpu"))
    for name, device in (("tuned", "cuda"), ("tuned", "cpu"), ("before", "cuda")):  # a CPU that goes on replays nothing
        draw(fast, 5, tmp_path / name, device=device, progress=False)
    assert used == [("cuda", "force_eager", False), ("cpu", "default", None), ("cuda", "default", None)]
    assert [json.loads((tmp_path / name / "blocks" / "settings.json").read_text()).get("tuned") for name in ("tuned", "before")] == [{"compiled": False, "recorded": False}, None]
    for name, loaded in (("model", fast.model), ("guide", fast.guide)):
        save_network(tmp_path / f"{name}.safetensors", loaded.network, noise_schedule="linear")
    command = ["sample", str(tmp_path / "model.safetensors"), "--classifier", str(tmp_path / "guide.safetensors"), "--guidance-scale", "2", "--steps", "3", "--num", "5",
               "--fast", "--device", "cpu", "--json", "--out", str(tmp_path / "tuned")]
    result = CliRunner().invoke(main, command, catch_exceptions=False)
    assert json.loads(result.stdout)["made"] == 0


def test_fast_and_plain_images_are_those_of_the_loop(tmp_path, monkeypatch):
    """Guided or upsampled; settings that no recorded step can follow take the loop."""
    fast, upsampler = guided(), Drawing(network(Upsampler, UNetConfig(16, **SMALL, classes=10)), SamplerConfig(steps="ddim2", sampler="ddim"), fast=True)
    used = []
    monkeypatch.setattr(graphs.FastSampler, "__call__", lambda self, *given, call=graphs.FastSampler.__call__: used.append(self.shape) or call(self, *given))
    draw_stack(fast, upsampler, 5, tmp_path / "fast", 4, progress=False)
    assert set(used) == {(1, 8, 8), (1, 16, 16)}
    used.clear()
    draw_stack(replace(fast, fast=False), replace(upsampler, fast=False), 5, tmp_path / "plain", 4, progress=False)
    later = make_dataclass("Later", [("order", int, 1)], bases=(SamplerConfig,), frozen=True)(steps="3", guidance_scale=2.0, order=2)
    draw(replace(fast, config=later), 5, tmp_path / "later", 4, progress=False)
    assert used == []
    for name, other in (("base/samples.npz", tmp_path / "fast" / "base"), ("samples.npz", tmp_path / "fast"), ("base/samples.npz", tmp_path / "later")):
        assert np.abs(open_batch(tmp_path / "plain" / name).read(0, 5).astype(int) - open_batch(other / "samples.npz").read(0, 5)).max() <= 1


def test_weights_that_are_given_up_are_not_missed(tmp_path):
    kept, given_up = guided(), guided()
    upsamplers = [Drawing(network(Upsampler, UNetConfig(16, **SMALL, classes=10)), SamplerConfig(steps="2"), fast=True) for _ in range(2)]
    draw_stack(kept, upsamplers[0], 5, tmp_path / "kept", 4, progress=False)
    draw_stack(given_up, upsamplers[1], 5, tmp_path / "given_up", 4, progress=False, release=True)
    devices = [{p.device.type for drawn in (d.model, d.guide) if drawn for p in drawn.network.parameters()} for d in (kept, given_up, *upsamplers)]
    assert devices == [{"cpu"}, {"meta"}, {"cpu"}, {"meta"}]
    for name in ("samples.npz", "base/samples.npz"):
        assert (tmp_path / "kept" / name).read_bytes() == (tmp_path / "given_up" / name).read_bytes()
    plain = replace(guided(), fast=False)
    draw(plain, 5, tmp_path / "plain", 4, progress=False, release=True)
    assert {p.device.type for p in plain.model.network.parameters()} == {"cpu"}  # they are the ones that draw


WRITER = """
import os, sys, time
import numpy as np, torch
from adm_repro.batches import sample_to_folder
savez, count = np.savez, 0
def slow(path, **arrays):
    global count
    count += 1
    savez(path, **arrays)
    if sys.argv[2] == "slow" and count == 3:
        os.truncate(path, os.path.getsize(path) // 2)  # half of the third block is on the disk
        print("half", flush=True)
        time.sleep(60)
np.savez = slow
def block(indices):
    return indices.numpy()[:, None, None, None].astype(np.uint8).repeat(8, 1).repeat(8, 2), torch.arange(len(indices))
sample_to_folder(block, 22, 4, sys.argv[1], {}, progress=False)
"""


def test_a_process_killed_while_it_writes_leaves_whole_blocks(tmp_path):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    run = lambda name, how: subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path / name), how], env=environment, stdout=subprocess.PIPE, text=True)
    killed = run("killed", "slow")
    assert killed.stdout.readline() == "half\n"
    time.sleep(0.2)  # the fourth block is computed meanwhile
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert images_done(tmp_path / "killed") == 8
    for again in (run("killed", ""), run("whole", "")):
        again.communicate()
        assert again.returncode == 0
    for path in sorted((tmp_path / "whole").glob("block_*.npz")):
        assert (tmp_path / "killed" / path.name).read_bytes() == path.read_bytes()
