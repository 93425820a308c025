"""Training that is killed continues bit for bit; every precision trains."""
import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT
from safetensors import SafetensorError

from adm_repro.checkpoints import load_network
from adm_repro.data import load_digits_dataset
from adm_repro.diffusion import GaussianDiffusion, cosine_betas
from adm_repro.training import DenoisingObjective, NotEnoughMemory, TrainConfig, train, update_ema
from adm_repro.unet import UNet, UNetConfig

SMALL = dict(image_size=8, in_channels=1, width=32, channel_mult=(1, 1), depth=1, attention_resolutions=(4,), head_channels=16)
PROCESS = """
import sys
import torch
torch.set_num_threads(1)
sys.path.insert(0, "tests")
from test_training_runs import run
run(sys.argv[1])
"""


def run(folder, **changes):
    config = TrainConfig(**{"iterations": 60, "batch_size": 16, "learning_rate": 1e-3, "ema_rate": 0.9, "flip": True, "log_every": 3, "save_every": 7} | changes)
    return train(UNet(UNetConfig(**SMALL, classes=10, dropout=0.2)), DenoisingObjective(GaussianDiffusion(cosine_betas(1000))),
                 load_digits_dataset(), config, folder, progress=False)


def start(folder):
    return subprocess.Popen([sys.executable, "-c", PROCESS, str(folder)], cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"})


def log_steps(folder):
    return [{k: v for k, v in json.loads(line).items() if k != "images_per_second"} for line in (folder / "log.jsonl").read_text().splitlines()]


def test_kill_and_continue_is_bit_for_bit(tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert start(whole).wait() == 0
    wait, kills = random.Random(0), 0
    for _ in range(2):
        victim = start(killed)
        while not (killed / "log.jsonl").exists() and victim.poll() is None:
            time.sleep(0.02)
        time.sleep(wait.uniform(0.2, 1.2))
        victim.send_signal(signal.SIGKILL)
        kills += victim.wait() == -signal.SIGKILL
    assert kills, "the run ended before it could be killed"
    assert start(killed).wait() == 0
    assert (whole / "weights.safetensors").read_bytes() == (killed / "weights.safetensors").read_bytes()
    assert log_steps(whole) == log_steps(killed)
    assert [line["step"] for line in log_steps(killed)] == list(range(3, 61, 3))


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_learns_what_float32_learns(tmp_path, precision):
    changes = dict(iterations=8, batch_size=8, learning_rate=2e-3, log_every=1, flip=False)
    losses = {}
    for name in ("fp32", precision):
        weights = run(tmp_path / name, precision=name, **changes)
        losses[name] = [line["mse"] for line in log_steps(tmp_path / name)]
        network, _ = load_network(weights)
        assert all(p.dtype == torch.float32 and torch.isfinite(p).all() for p in network.parameters())
    assert losses[precision] == pytest.approx(losses["fp32"], rel=0.03)
    assert losses[precision][-1] < 0.95 * losses[precision][0]


def test_a_run_folder_belongs_to_its_settings(tmp_path):
    run(tmp_path, iterations=3)
    with pytest.raises(ValueError, match=r"\(train.learning_rate is 0.001 there and 0.0005 here\): use another folder"):
        run(tmp_path, iterations=3, learning_rate=5e-4)
    with pytest.raises(ValueError, match="use another folder"):
        train(UNet(UNetConfig(**SMALL)), DenoisingObjective(GaussianDiffusion(cosine_betas(1000))), load_digits_dataset(), TrainConfig(3), tmp_path, progress=False)


def small(folder, dataset=None, **about):
    dataset = dataset or load_digits_dataset()
    return train(UNet(UNetConfig(**SMALL)), DenoisingObjective(GaussianDiffusion(cosine_betas(1000))), dataset, TrainConfig(2, 4, ema_rate=0.9), folder, progress=False, **about)


def test_a_folder_is_held_and_claimed_from_the_start(tmp_path):
    victim = start(tmp_path)
    while not (tmp_path / "training.json").exists() and victim.poll() is None:
        time.sleep(0.02)
    with pytest.raises(ValueError, match=f"process {victim.pid} on .* trains in"):
        run(tmp_path)
    victim.kill()
    victim.wait()
    (tmp_path / "training.safetensors").unlink(missing_ok=True)
    with pytest.raises(ValueError, match="seed is 0 there and 1 here"):
        run(tmp_path, seed=1)


def test_other_labels_or_crops_are_another_training_and_another_place_is_not(tmp_path):
    digits = load_digits_dataset()
    small(tmp_path, digits, crop="auto")
    small(tmp_path, replace(digits, name="the same, elsewhere"), crop="auto")
    with pytest.raises(ValueError, match=r"data.labels is"):
        small(tmp_path, replace(digits, labels=digits.labels[::-1].copy()), crop="auto")
    with pytest.raises(ValueError, match=r"about.crop is \"auto\" there and \"center\" here"):
        small(tmp_path, digits, crop="center")


def test_what_a_killed_save_left_is_removed_and_nothing_else(tmp_path):
    (tmp_path / "below").mkdir()
    left = [tmp_path / name for name in (".training.safetensors.0123456789ab.tmp.safetensors", ".weights-2.safetensors.0123456789ab.tmp.safetensors")]
    others = [tmp_path / name for name in (".samples.npz.0123456789ab.tmp.npz", "below/.training.safetensors.0123456789ab.tmp.safetensors")]
    for path in left + others:
        path.touch()
    small(tmp_path)
    assert not any(path.exists() for path in left) and all(path.exists() for path in others)


def test_a_disk_that_is_too_small_is_noticed(tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free=10))
    with pytest.raises(OSError, match="two checkpoints"):
        small(tmp_path)
    monkeypatch.undo()

    def full(*_):
        raise SafetensorError("I/O error: No space left on device (os error 28)")
    monkeypatch.setattr("adm_repro.training.save_file", full)
    with pytest.raises(OSError, match=r"training.safetensors could not be written .*make room"):
        small(tmp_path)


def test_memory_that_ends_in_the_optimiser_is_told(tmp_path, monkeypatch):
    def full(*_, **__):
        raise torch.OutOfMemoryError("moments")
    monkeypatch.setattr(torch.optim.AdamW, "step", full)
    with pytest.raises(NotEnoughMemory, match=r"step 1 changed the weights.*smaller microbatch"):
        small(tmp_path)


def test_the_average_lists_the_parameters_once():
    network, calls = torch.nn.Sequential(*(torch.nn.Linear(2, 2) for _ in range(9))), []
    ema, listed = {k: torch.zeros_like(v) for k, v in network.named_parameters()}, network.named_parameters
    network.named_parameters = lambda: calls.append(1) or listed()
    update_ema(ema, network, 0.5)
    assert len(calls) == 1
    for name, value in listed():
        torch.testing.assert_close(ema[name], 0.5 * value)


def test_gradient_checkpointing_changes_nothing(tmp_path):
    images, y = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([1, 2, 3, 4])
    plain = UNet(UNetConfig(**SMALL, classes=10))
    saving = UNet(UNetConfig(**SMALL, classes=10, gradient_checkpointing=True))
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.add_(0.01 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    saving.load_state_dict(plain.state_dict())
    grads = []
    for network in (plain, saving):
        network(images, torch.tensor([1, 10, 100, 999]), y).square().sum().backward()
        grads.append([p.grad for p in network.parameters()])
    for a, b in zip(*grads):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
