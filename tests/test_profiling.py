"""Time by groups of operators: nothing unknown in our networks, and kernels alone on a GPU."""
import contextlib
from types import SimpleNamespace

import pytest
import torch
from torch.autograd import DeviceType

from adm_repro import profiling
from adm_repro.classifier import ClassifierConfig, NoisyClassifier, log_prob_grad
from adm_repro.fast import FastNetwork
from adm_repro.profiling import GROUPS, group_of, profiled
from adm_repro.unet import UNet, UNetConfig, Upsampler

SMALL = dict(image_size=16, in_channels=3, width=32, channel_mult=(1, 2), depth=1, attention_resolutions=(8,), head_channels=16, classes=10)
X, T, Y = torch.randn(2, 3, 16, 16), torch.tensor([3, 700]), torch.tensor([1, 2])


@pytest.mark.parametrize("changes", [{}, {"resblock_updown": False, "adagn": False}, {"rescale_residual": True, "dropout": 0.1}], ids=str)
@pytest.mark.parametrize("wrap", [lambda net: net, lambda net: FastNetwork(net, compiled=False), lambda net: FastNetwork(net, "bf16", compiled=False)], ids=["plain", "fast", "bf16"])
def test_no_operator_of_our_networks_is_unknown(changes, wrap):
    unet, up, guide = (wrap(cls(config).eval().requires_grad_(False)) for cls, config in (
        (UNet, UNetConfig(**SMALL | changes)), (Upsampler, UNetConfig(**SMALL | changes)), (NoisyClassifier, ClassifierConfig(**SMALL | changes))))
    with torch.no_grad():
        for run in (lambda: unet(X, T, Y), lambda: up(X, T, Y, low_res=X[:, :, ::2, ::2]), lambda: log_prob_grad(guide, X, T, Y)):
            found = profiled(run, rounds=1)
            assert {name for group, name in found.operators if group == "other"} == set()
            assert sum(found.groups.values()) == pytest.approx(found.total)
            assert all(found.groups[group] > 0 for group in GROUPS if group != "other")


def test_products_inside_attention_are_attention():
    q = torch.randn(1, 2, 64, 32, dtype=torch.float64).requires_grad_()
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        found = profiled(lambda: torch.nn.functional.scaled_dot_product_attention(q, q, q), rounds=1)
    assert ("attention", "aten::bmm") in found.operators
    assert found.groups["products"] == 0


def test_on_a_gpu_kernels_count_and_nothing_else(monkeypatch):
    def event(name, device, seconds, annotation=False):
        return SimpleNamespace(name=name, device_type=device, self_device_time_total=1e6 * seconds, self_cpu_time_total=1e9, cpu_parent=None, is_user_annotation=annotation)
    events = [event("aten::convolution", DeviceType.CPU, 9.0), event("sm90_xmma_fprop_implicit_gemm_bf16", DeviceType.CUDA, 2.0), event("cudaLaunchKernel", DeviceType.CPU, 9.0),
              event("void at::native::RowwiseMomentsCUDAKernel<float>", DeviceType.CUDA, 0.5), event("my_own_kernel", DeviceType.CUDA, 0.25),
              event("## Call CompiledFxGraph ##", DeviceType.CUDA, 9.0, annotation=True)]
    asked = []

    @contextlib.contextmanager
    def profile(activities):
        asked.extend(activities)
        yield SimpleNamespace(events=lambda: events)
    monkeypatch.setattr(profiling, "profile", profile)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: asked.append("synchronize"))
    found = profiled(lambda: None, "cuda", rounds=1)
    assert found.groups == dict.fromkeys(GROUPS, 0.0) | {"products": 2.0, "normalisation": 0.5, "other": 0.25}
    assert asked == [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA, "synchronize"]


def test_names_of_one_letter_are_whole_words():
    assert [group_of(name) for name in ("aten::t", "kernel_of_somebody", "void func_wrapper_t", "TBackward0")] == ["copies", "other", "copies", "copies"]
