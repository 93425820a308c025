"""The fast network beside the plain one: trajectories, gradients, changing batches, and what a compiler is given."""
import copy
import pickle
from dataclasses import replace

import pytest
import torch
from conftest import distance, randomised

from adm_repro import fast as fast_module
from adm_repro.classifier import ClassifierConfig, NoisyClassifier, log_prob_grad
from adm_repro.diffusion import GaussianDiffusion, named_betas
from adm_repro.fast import FastNetwork, FrozenConv, Kit, Packed
from adm_repro.sampling import SamplerConfig, sample_images
from adm_repro.unet import UNet, UNetConfig, Upsampler

CONFIG = UNetConfig(16, width=32, channel_mult=(1, 2), depth=1, attention_resolutions=(8,), head_channels=16, classes=10)
GUIDE = ClassifierConfig(16, width=32, channel_mult=(1, 2), depth=1, attention_resolutions=(8,), head_channels=16, classes=10)
packs = pytest.mark.skipif(not fast_module._PACKS, reason="this build of torch has no oneDNN")


@pytest.fixture(scope="module")
def networks():
    return randomised(UNet(CONFIG)), randomised(NoisyClassifier(GUIDE))


def inputs(n=3):
    generator = torch.Generator().manual_seed(n)
    return torch.randn(n, 3, 16, 16, generator=generator), torch.randint(0, 1000, (n,), generator=generator), torch.randint(0, 10, (n,), generator=generator)


def test_a_guided_trajectory_is_the_plain_one(networks):
    unet, guide = networks
    diffusion, indices, y = GaussianDiffusion(named_betas("linear", 1000)), torch.arange(3), torch.tensor([3, 1, 4])
    plain, fast = (
        sample_images(net, diffusion, SamplerConfig("5", guidance_scale=2.0), 0, indices, (3, 16, 16), lambda x, t, by=by: log_prob_grad(by, x, t, y), {"y": y})
        for net, by in ((unet, guide), (FastNetwork(unet), FastNetwork(guide))))
    assert distance(fast, plain) < 5e-6


def test_the_same_call_gives_the_same_bits(networks):
    unet, guide = networks
    (x, t, y), fast, by = inputs(), FastNetwork(unet), FastNetwork(guide)
    first, grad = fast(x, t, y), log_prob_grad(by, x, t, y)
    for other in (1, 4):  # the order of the weights follows the size of the batch, and comes back
        given = inputs(other)
        assert distance(fast(*given), unet(*given)) < 2e-6
        assert distance(log_prob_grad(by, *given), log_prob_grad(guide, *given)) < 5e-6
    assert torch.equal(fast(x, t, y), first) and torch.equal(log_prob_grad(by, x, t, y), grad)


def test_images_of_any_layout_are_taken_and_left_alone(networks):
    (x, t, y), fast = inputs(), FastNetwork(networks[0])
    wide = torch.cat([x, x], dim=3)[..., :16]
    before = wide.clone()
    assert torch.equal(fast(wide, t, y), fast(x.contiguous(memory_format=torch.channels_last), t, y)) and torch.equal(wide, before)


def test_without_onednn_convolutions_are_torchs(networks, monkeypatch):
    monkeypatch.setattr(fast_module, "_PACKS", False)
    for net, given in zip(networks, (inputs(), inputs()[:2])):
        fast = FastNetwork(net)
        assert fast.kit.method is None and distance(fast(*given), net(*given)) < 2e-6


@packs
def test_one_copy_of_the_weights_is_kept(networks):
    """In oneDNN's order or as they were, not both; mirrored ones only where there was a gradient."""
    (x, t, y), unet = inputs(), FastNetwork(networks[0])
    convs = [module for module in unet.modules() if isinstance(module, FrozenConv)]
    assert len(convs) > 20 and not any(conv.there.weight.is_mkldnn for conv in convs)
    unet(x, t, y)
    assert all(conv.there.weight.is_mkldnn and conv._back is None for conv in convs)
    numbers = sum(p.numel() for p in unet.parameters()) + sum(conv.there.weight.to_dense().numel() + conv.there.bias.numel() for conv in convs)
    plain = sum(p.numel() for p in networks[0].parameters())
    assert 0 < numbers - plain < 0.25 * plain  # a folded convolution has 16 weights where the plain one has 9


@pytest.mark.parametrize("copied", (copy.deepcopy, lambda network: pickle.loads(pickle.dumps(network))), ids=("deepcopy", "pickle"))
def test_a_copy_is_whole_after_a_call(networks, copied):
    """Weights in oneDNN's order cannot be copied; a copy finds that order anew, and goes its own way."""
    (x, t, y), fast, by = inputs(), FastNetwork(networks[0]), FastNetwork(networks[1])
    expected, grad = fast(x, t, y), log_prob_grad(by, x, t, y)
    other, other_by = copied(fast), copied(by)
    assert other.run.__self__ is other
    assert torch.equal(other(x, t, y), expected) and torch.equal(log_prob_grad(other_by, x, t, y), grad)
    fast(*inputs(1))
    assert torch.equal(other(x, t, y), expected)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own
def test_a_compiler_is_given_one_graph(networks):
    """Nothing falls back to Python, forward or backward; here the graph is executed operator by operator."""
    (x, t, y), (unet, guide) = inputs(), networks
    upsampler = randomised(Upsampler(replace(CONFIG, classes=None)))
    for net, given in ((unet, (x, t, y)), (upsampler, (x, t, None, x[:, :, ::2, ::2]))):
        traced = torch.compile(FastNetwork(net, compiled=True)._evaluate, backend="aot_eager", fullgraph=True)
        assert distance(traced(*given), net(*given)) < 5e-6  # its operators round in another order
    traced = torch.compile(FastNetwork(guide, compiled=True)._evaluate, backend="aot_eager", fullgraph=True)
    assert distance(log_prob_grad(traced, x, t, y), log_prob_grad(guide, x, t, y)) < 5e-6


@packs
def test_a_second_gradient_is_refused(networks):
    x, t, _ = inputs()
    x.requires_grad_()
    grad, = torch.autograd.grad(FastNetwork(networks[1])(x, t).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_a_kit_leaves_what_it_does_not_know():
    strided = torch.nn.Conv2d(8, 8, 3, stride=2, padding=1)
    assert Kit(Packed).conv(strided) is strided and Kit().conv(strided) is strided
