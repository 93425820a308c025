"""Training that is killed continues bit for bit; every precision trains."""
import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT

from adm_repro.checkpoints import load_network
from adm_repro.data import load_digits_dataset
from adm_repro.diffusion import GaussianDiffusion, cosine_betas
from adm_repro.training import DenoisingObjective, TrainConfig, train
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
    with pytest.raises(ValueError, match="use another folder"):
        run(tmp_path, iterations=3, learning_rate=5e-4)
    with pytest.raises(ValueError, match="use another folder"):
        train(UNet(UNetConfig(**SMALL)), DenoisingObjective(GaussianDiffusion(cosine_betas(1000))), load_digits_dataset(), TrainConfig(3), tmp_path, progress=False)


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
