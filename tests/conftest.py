"""Golden arrays and the rule by which their networks' weights were drawn (see golden/README.md)."""
import json
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

GOLDEN = Path(__file__).parent / "golden"
ROOT = Path(__file__).parent.parent


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
