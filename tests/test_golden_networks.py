"""Networks against outputs of the released code on fixed weights and inputs."""
import pytest
import torch
from conftest import fill, load_golden

from adm_repro.checkpoints import network, settings_from_flags
from adm_repro.classifier import log_prob_grad

SPECS = {name: spec for name, spec in load_golden("networks.json").items() if isinstance(spec, dict)}
CHECKPOINTS = load_golden("checkpoints.json")
RELATIVE = 2e-5  # of the output's standard deviation, float32


def shapes(module):
    return {key: list(value.shape) for key, value in module.state_dict().items()}


@pytest.mark.parametrize("name", SPECS)
def test_output_equals_the_released_code(name):
    spec, arrays = SPECS[name], load_golden("networks.npz")
    module = fill(network(spec["kind"], spec["settings"]))
    assert shapes(module) == spec["state_dict"]
    assert list(module.state_dict()) == list(spec["state_dict"])
    inputs = {k: torch.tensor(arrays[f"{name}/{k}"]) for k in ("x", "t", "y", "low_res") if f"{name}/{k}" in arrays}
    expected = torch.tensor(arrays[f"{name}/out"])
    args = {k: v for k, v in inputs.items() if not (k == "y" and spec["kind"] == "classifier")}
    got = module(**args)
    assert (got - expected).abs().max() <= RELATIVE * expected.std()
    if spec["kind"] == "classifier":
        grad, expected = log_prob_grad(module, inputs["x"], inputs["t"], inputs["y"]), torch.tensor(arrays[f"{name}/grad_log_prob"])
        assert (grad - expected).abs().max() <= RELATIVE * expected.std()


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_released_checkpoints_have_our_keys_and_shapes(name):
    entry = CHECKPOINTS[name]
    with torch.device("meta"):
        module = network(*settings_from_flags(entry["kind"], entry["flags"]))
    assert shapes(module) == entry["state_dict"]
    assert list(module.state_dict()) == list(entry["state_dict"])
    assert sum(p.numel() for p in module.parameters()) == entry["parameters"]
