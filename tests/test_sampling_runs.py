"""A sampling run ends in the same bytes however it is dealt out, killed and continued."""
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import ROOT

from adm_repro.batches import assemble, block_indices
from adm_repro.classifier import ClassifierConfig, NoisyClassifier, log_prob_grad
from adm_repro.diffusion import GaussianDiffusion, linear_betas
from adm_repro.noise import normals
from adm_repro.sampling import SamplerConfig, image_labels, sample_images, to_uint8
from adm_repro.training import initialise
from adm_repro.unet import UNet, UNetConfig

BLOCK_SIZE_TOLERANCE = 1e-4  # absolute, images in [-1, 1]
SMALL = dict(image_size=8, in_channels=1, width=32, channel_mult=(1, 1), depth=1, attention_resolutions=(4,), head_channels=16)


def networks():
    unet, guide = UNet(UNetConfig(**SMALL, classes=10)), NoisyClassifier(ClassifierConfig(**SMALL, classes=10))
    for network, seed in ((unet, 0), (guide, 1)):
        initialise(network, seed).eval().requires_grad_(False)
        draw = torch.Generator().manual_seed(seed)
        for parameter in network.parameters():  # no zero-initialised layers: every block must matter
            parameter.copy_(parameter + 0.05 * torch.randn(parameter.shape, generator=draw))
    return unet, guide


def sample(indices, steps="6"):
    unet, guide = networks()
    y = image_labels(0, indices, 10)
    return sample_images(unet, GaussianDiffusion(linear_betas(1000)), SamplerConfig(steps=steps, guidance_scale=2.0), 0, indices, (1, 8, 8),
                         lambda x, t: log_prob_grad(guide, x, t, y), {"y": y})


def block(indices):
    return to_uint8(sample(indices)).numpy(), image_labels(0, indices, 10).numpy()


PROCESS = """
import sys, time
sys.path.insert(0, "tests")
import torch
torch.set_num_threads(1)
from test_sampling_runs import block
from adm_repro.batches import sample_to_folder
folder, rank, world, pause = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4])
def slow(indices):
    time.sleep(pause)
    return block(indices)
sample_to_folder(slow, 22, 4, folder, {"seed": 0}, rank, world, progress=False)
"""


def start(folder, rank=0, world=1, pause=0.0):
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, "-c", PROCESS, str(folder), str(rank), str(world), str(pause)], cwd=ROOT, env=env)


def finished(folder):
    path = folder.with_suffix(".npz")
    assemble(folder, path)
    return path.read_bytes()


def test_processes_and_kills_do_not_change_a_byte(tmp_path):
    whole, shared, killed = (tmp_path / name for name in ("whole", "shared", "killed"))
    assert start(whole).wait() == 0
    processes = [start(shared, rank, 3) for rank in (2, 0, 1)]
    victim = start(killed, pause=1.0)
    while len(list(killed.glob("block_*.npz"))) < 2:  # in the middle of the third block
        time.sleep(0.05)
    victim.send_signal(signal.SIGKILL)
    victim.wait()
    assert 0 < len(list(killed.glob("block_*.npz"))) < len(block_indices(22, 4))
    assert start(killed).wait() == 0
    assert [p.wait() for p in processes] == [0, 0, 0]
    assert finished(whole) == finished(shared) == finished(killed)
    assert not list(killed.glob(".*tmp*"))


def test_another_block_size_gives_the_same_images_within_tolerance():
    together = sample(torch.arange(8))
    for indices in ([0], [7, 3], [6, 5, 4, 2, 1]):
        assert (sample(torch.tensor(indices)) - together[indices]).abs().max() < BLOCK_SIZE_TOLERANCE


@pytest.mark.parametrize("order", [list(range(64)), list(range(63, -1, -1)), np.random.RandomState(0).permutation(64).tolist()])
def test_noise_is_identical_bit_for_bit(order):
    reference = normals(3, torch.arange(64), (3, 16, 16), "step noise", 17)
    for pieces in (1, 3, 64):
        got = torch.cat([normals(3, torch.tensor(part), (3, 16, 16), "step noise", 17) for part in np.array_split(order, pieces)])
        assert torch.equal(got, reference[order])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU that torch can use")
def test_noise_on_a_gpu_agrees_to_the_last_place_of_float32():
    cpu = normals(3, torch.arange(512), (3, 32, 32), "step noise", 17)
    gpu = normals(3, torch.arange(512, device="cuda"), (3, 32, 32), "step noise", 17).cpu()
    assert torch.all((cpu - gpu).abs() <= torch.from_numpy(np.spacing(cpu.abs().numpy())))
