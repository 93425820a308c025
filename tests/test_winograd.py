"""Convolutions by tiles beside direct ones: layers, gradients, networks, and what is refused."""
import json
import os
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from click.testing import CliRunner
from conftest import distance, randomised, save_small_models

from adm_repro import fast as fast_module
from adm_repro import tools
from adm_repro import winograd as module
from adm_repro.blocks import GroupNorm32
from adm_repro.classifier import ClassifierConfig, NoisyClassifier, log_prob_grad
from adm_repro.cli import main
from adm_repro.fast import FastNetwork, FrozenConv, Packed
from adm_repro.unet import UNet, UNetConfig, Upsampler
from adm_repro.winograd import POINTS, Winograd, kernels, tile_size, tiled_conv2d, transforms, winograd

compiles = pytest.mark.skipif(not shutil.which("c++") or not fast_module._PACKS, reason="needs a C++ compiler and a torch with oneDNN")
CONFIG = dict(image_size=16, width=32, channel_mult=(1, 2), depth=1, attention_resolutions=(8,), head_channels=16, classes=10)


def layer(n, inputs, outputs, height, width):
    generator = torch.Generator().manual_seed(height)
    return (torch.randn(shape, generator=generator) for shape in ((n, inputs, height, width), (outputs, inputs, 3, 3), (outputs,)))


@pytest.mark.parametrize("m", POINTS)
def test_the_matrices_are_a_filter(m):
    """Each row of outputs collects each entry of the filter once, at its place."""
    b_t, g, a_t = transforms(POINTS[m])
    found = torch.einsum("oi,ik,id->okd", a_t, g, b_t)
    assert torch.allclose(found, torch.stack([torch.eye(m + 2, dtype=torch.float64)[row:row + 3] for row in range(m)]), atol=1e-14)


@compiles
@pytest.mark.parametrize("padding", (0, 1, 2))
@pytest.mark.parametrize("m", POINTS)
def test_any_size_is_convolved(m, padding):
    for n, inputs, outputs, height, width in ((1, 32, 32, 4, 4), (3, 16, 48, 5, 3), (2, 48, 16, 9, 14), (1, 32, 64, 31, 33)):
        x, weight, bias = layer(n, inputs, outputs, height, width)
        exact = F.conv2d(x.double(), weight.double(), bias.double(), padding=padding)
        found = Winograd(weight, bias, padding, lambda *_: m)(x)
        assert found.shape == exact.shape and distance(found, exact) < 2e-6
        assert distance(tiled_conv2d(x.double(), weight.double(), bias.double(), padding, POINTS[m]), exact) < 1e-13


@compiles
def test_bits_do_not_depend_on_parts_threads_or_what_was_computed_before():
    x, weight, bias = layer(3, 32, 48, 17, 22)
    conv = Winograd(weight, bias, 1, lambda *_: 4)
    expected = conv(x)
    other = conv(torch.full_like(x[:1], float("nan")))  # fills the memory that the next call may get
    assert other.isnan().all() and torch.equal(conv(x), expected)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert distance(conv(x), expected) < 1e-6
    finally:
        torch.set_num_threads(threads)
    conv.part = 7
    assert distance(conv(x), expected) < 1e-6 and conv(x).isfinite().all()


@compiles
@pytest.mark.parametrize("channels", (32, 96, 320))
def test_normalisation_does_not_depend_on_threads_or_other_images(channels):
    """Parts of different images and channels meet in no sum, forward or backward, and are whole groups."""
    generator = torch.Generator().manual_seed(channels)
    norm, (x, grad) = GroupNorm32(channels).requires_grad_(False), (torch.randn(3, channels, 9, 8, generator=generator) for _ in range(2))

    def run(x, grad):
        x = x.clone().requires_grad_()
        y = module.compiled_norm_act(x, norm)
        return y.detach(), torch.autograd.grad(y, x, grad)[0]

    expected, threads = run(x, grad), torch.get_num_threads()
    try:
        for count in (2, 4, 7):
            torch.set_num_threads(count)
            assert all(torch.equal(found, one) for found, one in zip(run(x, grad), expected))
    finally:
        torch.set_num_threads(threads)
    x[1] = float("nan")
    for found, one in zip(run(x, grad), expected):
        assert torch.equal(found[[0, 2]], one[[0, 2]]) and found[1].isnan().all()


@compiles
def test_an_image_with_nan_leaves_the_others_alone():
    x, weight, bias = layer(3, 32, 32, 10, 10)
    conv = Winograd(weight, bias, 1, lambda *_: 4)
    expected = conv(x)
    x[1] = float("nan")
    found = conv(x)
    assert torch.equal(found[[0, 2]], expected[[0, 2]]) and found[1].isnan().all()


@compiles
def test_one_layer_changes_its_way_with_the_size_of_the_images():
    x, weight, bias = layer(1, 128, 128, 32, 32)
    conv, ways = Winograd(weight, bias, 1), []
    for part in (x, x[:, :, :8, :8], x[:, :, :4, :4], x):
        ways.append((tile_size(1, *part.shape[2:], 128), distance(conv(part), F.conv2d(part, weight, bias, padding=1)) < 2e-6))
    assert ways == [(4, True), (2, True), (None, True), (4, True)]


@compiles
def test_threads_may_share_a_layer():
    """Whose images want other tiles."""
    x, weight, bias = layer(1, 128, 128, 16, 16)
    conv, images = Winograd(weight, bias, 1), [x, x[:, :, :8, :8]]
    assert [tile_size(1, *part.shape[2:], 128) for part in images] == [4, 2]
    expected = [F.conv2d(part, weight, bias, padding=1) for part in images]
    with ThreadPoolExecutor(2) as threads:
        found = list(threads.map(conv, images * 20))
    assert all(distance(y, exact) < 2e-6 for y, exact in zip(found, expected * 20))


@compiles
def test_another_default_dtype_changes_nothing():
    x, weight, bias = layer(1, 32, 32, 16, 16)
    conv = Winograd(weight, bias, 1, lambda *_: 4)
    expected = conv(x)
    try:
        torch.set_default_dtype(torch.float64)
        assert torch.equal(conv(x), expected)
    finally:
        torch.set_default_dtype(torch.float32)


@compiles
def test_networks_are_the_plain_ones_up_to_rounding():
    generator = torch.Generator().manual_seed(3)
    x, t, y = torch.randn(3, 3, 16, 16, generator=generator), torch.tensor([0, 500, 999]), torch.tensor([3, 1, 4])
    unet, guide, upsampler = randomised(UNet(UNetConfig(**CONFIG))), randomised(NoisyClassifier(ClassifierConfig(**CONFIG))), randomised(Upsampler(UNetConfig(**CONFIG)))
    fast, by = FastNetwork(unet, winograd=True), FastNetwork(guide, winograd=True)
    assert sum(isinstance(part.there, Winograd) for part in fast.modules() if isinstance(part, FrozenConv)) > 10
    assert distance(fast(x, t, y), unet(x, t, y)) < 5e-6 and torch.equal(fast(x, t, y), fast(x, t, y))
    assert distance(FastNetwork(upsampler, winograd=True)(x, t, y, x[:, :, ::2, ::2]), upsampler(x, t, y, x[:, :, ::2, ::2])) < 5e-6
    for n in (3, 1, 3):  # another number of images, another way for a layer
        assert distance(log_prob_grad(by, x[:n], t[:n], y[:n]), log_prob_grad(guide, x[:n], t[:n], y[:n])) < 5e-6
    assert not torch.equal(FastNetwork(unet)(x, t, y), fast(x, t, y))  # it is another rounding, so it has to be asked for


def test_what_is_no_layer_for_tiles_is_onednns():
    for shape in ((32, 32, 1, 1), (32, 32, 2, 2), (32, 3, 3, 3), (16, 32, 3, 3), (40, 32, 3, 3)):
        assert isinstance(winograd(torch.zeros(shape), None, 1), Packed)
    assert isinstance(winograd(torch.zeros(32, 48, 3, 3), None, 1), Winograd)


@pytest.mark.parametrize("given", (dict(precision="bf16"), dict(precision="fp16"), dict(compiled=True), dict(device="meta")))
def test_winograd_is_for_float32_on_a_cpu(given):
    unet = UNet(UNetConfig(**CONFIG))
    with pytest.raises(ValueError, match="winograd is for float32 on a CPU, not compiled, and here it is"):
        FastNetwork(unet, winograd=True, **given)


def test_without_onednn_it_is_refused(monkeypatch):
    monkeypatch.setattr(fast_module, "_PACKS", False)
    with pytest.raises(ValueError, match="without oneDNN"):
        FastNetwork(UNet(UNetConfig(**CONFIG)), winograd=True)


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """An empty cache folder, and a process that has compiled nothing."""
    monkeypatch.setenv("ADM_REPRO_CACHE", str(tmp_path / "cache"))
    kernels.cache_clear()
    yield tmp_path
    kernels.cache_clear()


def test_without_a_compiler_it_is_refused_before_anything_is_computed(elsewhere, monkeypatch):
    monkeypatch.setenv("PATH", str(elsewhere))
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(module.Winograd, "__init__", lambda *_: pytest.fail("a layer was made"))
    with pytest.raises(OSError, match=r"there is no c\+\+: install g\+\+ .*or leave winograd out"):
        FastNetwork(UNet(UNetConfig(**CONFIG)), winograd=True)


@compiles
def test_a_compiler_that_fails_is_told(elsewhere, monkeypatch):
    monkeypatch.setattr(module, "_LOOPS", "this is no C++")
    with pytest.raises(OSError, match=r"c\+\+ refuses it \(.*error.*\): install g"):
        kernels()


@compiles
def test_a_file_that_cannot_be_kept_or_loaded_is_told(elsewhere, monkeypatch):
    (elsewhere / "cache").write_text("no folder")
    with pytest.raises(OSError, match=r"cannot be kept in .*cache/kernels .*name a folder that can be written to in ADM_REPRO_CACHE, or leave winograd out"):
        kernels()
    (elsewhere / "cache").unlink()
    monkeypatch.setattr(module, "_compiled", lambda text, path: (path.parent.mkdir(parents=True), path.write_bytes(b"for another system")))
    with pytest.raises(OSError, match=r"cannot be loaded .*: remove .*winograd-.*or leave winograd out"):
        kernels()


@compiles
def test_a_build_that_was_killed_is_begun_again(elsewhere, monkeypatch):
    """And another compiler may be named."""
    (elsewhere / "cc").write_text("#!/bin/sh\nkill -9 $PPID\n")
    (elsewhere / "cc").chmod(0o755)
    build = [sys.executable, "-c", "from adm_repro.winograd import kernels; print(kernels().tiles_in.argtypes is not None)"]
    killed = subprocess.run(build, env=os.environ | {"CXX": str(elsewhere / "cc")}, capture_output=True, text=True, timeout=60, check=False)
    assert killed.returncode == -signal.SIGKILL and not list((elsewhere / "cache" / "kernels").glob("winograd*"))
    result = subprocess.run(build, env=os.environ | {"CXX": "g++ -g0"}, capture_output=True, text=True, timeout=60, check=False)
    assert result.stdout.strip() == "True", result.stderr


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return save_small_models(tmp_path_factory.mktemp("models"))


def sample(models, out, *more):
    arguments = ["sample", str(models / "model.safetensors"), "--out", str(out), "--num", "5", "--steps", "4", "--classifier", str(models / "guide.safetensors"),
                 "--device", "cpu", "--block-size", "5", *more]
    result = CliRunner().invoke(main, arguments)
    return result, np.load(out / "samples.npz")["arr_0"].astype(int) if result.exit_code == 0 else None


@compiles
def test_images_by_tiles_are_the_fast_ones_and_have_a_folder_of_their_own(models, tmp_path):
    upsampler = "--upsampler", str(models / "upsampler.safetensors"), "--upsampler-steps", "2"
    (_, fast), (result, tiled) = sample(models, tmp_path / "fast", "--fast", *upsampler), sample(models, tmp_path / "tiled", "--fast", "--winograd", *upsampler)
    assert result.exit_code == 0 and np.abs(fast - tiled).max() <= 1
    for folder, said in (("fast", None), ("tiled", True)):
        assert {json.loads((tmp_path / folder / part / "settings.json").read_text()).get("winograd") for part in ("", "base")} == {said}
    other, _ = sample(models, tmp_path / "tiled", "--fast", *upsampler)
    assert other.exit_code == 2 and "winograd is true there and null here" in other.stderr


def test_what_the_command_cannot_do_is_refused_in_a_sentence(models, elsewhere, monkeypatch):
    refused = {("--winograd",): "winograd is a way of fast networks in fp32, got fast=False and fp32: add fast",
               ("--winograd", "--fast", "--precision", "bf16", "--dry-run"): "got fast=True and bf16: take fp32"}
    for given, message in refused.items():
        result, _ = sample(models, elsewhere / "out", *given)
        assert (result.exit_code, len(result.stderr.splitlines())) == (2, 1) and message in result.stderr
    monkeypatch.setenv("PATH", str(elsewhere))
    monkeypatch.delenv("CXX", raising=False)
    result, _ = sample(models, elsewhere / "out", "--fast", "--winograd")
    assert (result.exit_code, len(result.stderr.splitlines())) == (2, 1) and "there is no c++: install g++" in result.stderr
    monkeypatch.setattr(tools, "_device", lambda _: "cuda")
    result, _ = sample(models, elsewhere / "out", "--fast", "--winograd")
    assert result.exit_code == 2 and "--winograd is for a CPU, and the device is cuda" in result.stderr
    assert not (elsewhere / "out").exists()
