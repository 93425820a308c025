"""Golden arrays and the rule by which their networks' weights were drawn (see golden/README.md)."""
import json
import os
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

from adm_repro.checkpoints import save_network
from adm_repro.classifier import ClassifierConfig, NoisyClassifier
from adm_repro.unet import UNet, UNetConfig, Upsampler

for name in ("CI", "BUILD_NUMBER"):  # where these are set pytest writes out whole differences: hours, for megabytes of bytes
    os.environ.pop(name, None)

GOLDEN = Path(__file__).parent / "golden"
ROOT = Path(__file__).parent.parent
SMALL = dict(in_channels=1, width=32, channel_mult=(1, 1), depth=1, attention_resolutions=(4,), head_channels=16)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """With several workers a file's tests stay together, for the fixtures they share; planted errors share none, take longest, and are dealt out."""
    for item in items:
        if item.path.stem != "test_mutations":
            item.add_marker(pytest.mark.xdist_group(item.path.stem))


def load_golden(name: str):
    path = GOLDEN / name
    return json.loads(path.read_text()) if path.suffix == ".json" else np.load(path)


def golden_tensor(key: str, shape) -> torch.Tensor:
    r = np.random.RandomState(zlib.crc32(key.encode())).standard_normal(tuple(shape))
    if len(shape) >= 2:
        r = r / np.sqrt(np.prod(shape[1:]))
    elif key.endswith("weight"):
        r = 1 + 0.1 * r
    else:
        r = 0.1 * r
    return torch.tensor(r, dtype=torch.float32)


def fill(network: torch.nn.Module) -> torch.nn.Module:
    """Give a network the golden weights; every key must be the original's, or the values differ."""
    network.load_state_dict({k: golden_tensor(k, v.shape) for k, v in network.state_dict().items()}, strict=True)
    return network.eval().requires_grad_(False)


@pytest.fixture(scope="session")
def golden():
    return load_golden


def inception_state():
    """Weights of golden/inception.npz: convolutions and the classifier are scaled by sqrt(2), variances are 1 + |0.1 r|."""
    state = {}
    for key, shape in load_golden("inception.json").items():
        value = golden_tensor(key, shape)
        if key.endswith("num_batches_tracked"):
            value = torch.zeros((), dtype=torch.long)
        elif key.endswith("running_var"):
            value = 1 + value.abs()
        elif len(shape) >= 2:
            value = value * 2**0.5
        state[key] = value
    return state


@pytest.fixture(scope="session")
def inception_weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "inception.pth"
    torch.save(inception_state(), path)
    return path


def save_small_models(folder: Path) -> Path:
    """Files of a model, its guide and an upsampler, with weights that all matter."""
    torch.manual_seed(0)
    for name, network in (("model", UNet(UNetConfig(8, **SMALL, classes=10))), ("guide", NoisyClassifier(ClassifierConfig(8, **SMALL, classes=10))),
                          ("upsampler", Upsampler(UNetConfig(16, **SMALL, classes=10)))):
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.add_(0.05 * torch.randn(parameter.shape))
        save_network(folder / f"{name}.safetensors", network, noise_schedule="linear")
    return folder


def randomised(network):
    """Random weights of which none is zero, at a scale that keeps activations near one."""
    generator = torch.Generator().manual_seed(0)
    for p in network.parameters():
        p.data = torch.randn(p.shape, generator=generator) * (p[0].numel() ** -0.5 if p.ndim > 1 else 0.1) + (p.ndim == 1)
    return network.eval().requires_grad_(False)


def distance(a, b):
    """Relative error of one tensor against another."""
    return float(((a.double() - b.double()).norm() / b.double().norm()).detach())
