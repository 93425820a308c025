"""Shortcuts that change the numbers: as fast as is said, named in the settings, refused where they do not belong; without them everything stays as it was."""
import json
from dataclasses import asdict, replace

import pytest
import torch
from click.testing import CliRunner
from conftest import save_small_models

from adm_repro import shortcuts
from adm_repro.batches import open_batch
from adm_repro.checkpoints import config_from_json
from adm_repro.classifier import log_prob_grad
from adm_repro.cli import main
from adm_repro.cost import count_macs, forward_macs, guide_macs, plan_cost
from adm_repro.diffusion import GaussianDiffusion, named_betas
from adm_repro.drawing import Drawing, block_sampler, draw, expectation
from adm_repro.pretrained import load
from adm_repro.sampling import SamplerConfig, ddim_decode, ddim_encode, evaluations, sample_images
from adm_repro.shortcuts import DeepCache, deep_cache_macs

ATTENTION = 0.03  # share of the operations that is attention, which the counter does not see on a CPU


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return save_small_models(tmp_path_factory.mktemp("models"))


def drawing(models, guided=True, **settings):
    cache = settings.pop("deep_cache", None)
    config = SamplerConfig(**{"guidance_scale": 2.0} | settings) if guided else SamplerConfig(**settings)
    return Drawing(load(models / "model.safetensors"), config, load(models / "guide.safetensors") if guided else None, deep_cache=cache)


@pytest.mark.parametrize("settings", [dict(steps="4", sampler="heun"), dict(steps="6", sampler="dpm++2m", guidance_interval=(0.1, 0.7)), dict(steps="ddim5", sampler="ddim", deep_cache=2),
                                      dict(steps="6", guidance_interval=(0.5, 1.0), deep_cache=3)], ids=lambda s: "-".join(map(str, s.values())))
def test_the_operations_that_are_announced_are_those_that_are_done(models, settings):
    drawn = drawing(models, **settings)
    net, guide, y = drawn.model.network, drawn.guide.network, torch.zeros(1, dtype=torch.long)
    asked, guiding = evaluations(1000, drawn.config)
    cached = deep_cache_macs(net, drawn.deep_cache, asked) if drawn.deep_cache else forward_macs(net)
    announced = asked * cached + guiding * guide_macs(guide)
    assert f"{2 * announced * 10:.2e} FLOPs in all" in expectation(drawn, 10)
    images = torch.arange(1)
    done = count_macs(lambda: sample_images(DeepCache(net, drawn.deep_cache) if drawn.deep_cache else net, drawn.model.diffusion, drawn.config, 0, images, (1, 8, 8),
                                            lambda x, t: log_prob_grad(lambda x, t: guide(x.clone(), t), x, t, y), {"y": y}))
    assert (1 - ATTENTION) * announced < done <= announced


def test_an_expectation_without_shortcuts_says_nothing_of_them(models):
    lines = expectation(drawing(models, steps="4"), 10).splitlines()
    assert len(lines) == 1 and "GMACs a step, " in lines[0] and "evaluation" not in lines[0]
    assert expectation(drawing(models, steps="4", sampler="dpm++2m"), 10).splitlines()[1] == "sampler dpm++2m: not the paper's sampler, and not its numbers"


def test_folders_of_before_stay_valid_and_shortcuts_are_other_settings(models, tmp_path):
    plain = drawing(models, steps="4")
    draw(plain, 5, tmp_path, 5, progress=False)
    kept, file = json.loads((tmp_path / "settings.json").read_text()), (tmp_path / "samples.npz").read_bytes()
    assert kept.pop("deep_cache") is kept.pop("shortcuts") is kept["sampler"].pop("guidance_interval") is None
    for path in (tmp_path / "settings.json", tmp_path / "blocks" / "settings.json"):
        path.write_text(json.dumps(kept))  # as it was written before there were shortcuts
    assert draw(plain, 5, tmp_path, 5, progress=False).made == 0
    assert (tmp_path / "samples.npz").read_bytes() == file
    for changed, message in ((replace(plain, deep_cache=2), "deep_cache is null there and 2 here"), (drawing(models, steps="4", sampler="heun"), 'sampler.sampler is "ancestral" there and "heun" here'),
                             (drawing(models, steps="4", guidance_interval=(0.0, 0.5)), r"sampler.guidance_interval is null there and \[0.0, 0.5\] here")):
        with pytest.raises(ValueError, match=message):
            draw(changed, 5, tmp_path, 5, progress=False)


def test_sample_with_shortcuts_from_the_command_line(models, tmp_path):
    arguments = ["sample", str(models / "model.safetensors"), "--out", str(tmp_path / "quick"), "--num", "6", "--steps", "10", "--sampler", "dpm++2m", "--classifier",
                 str(models / "guide.safetensors"), "--guidance-interval", "0.2,0.8", "--deep-cache", "3", "--device", "cpu", "--block-size", "3"]
    result = CliRunner().invoke(main, [*arguments, "--json"], catch_exceptions=False)
    said = "sampler dpm++2m, guidance only for timesteps from 0.2 to 0.8, deep features computed once in 3 evaluations: not the paper's sampler, and not its numbers"
    assert result.exit_code == 0 and said in result.stderr
    settings = json.loads(result.stdout)["settings"]
    assert (settings["shortcuts"], settings["deep_cache"], settings["sampler"]["guidance_interval"]) == (said, 3, [0.2, 0.8])
    assert json.loads((tmp_path / "quick" / "blocks" / "assembled.json").read_text())["shortcuts"] == said
    wanted, _ = block_sampler(drawing(models, steps="10", sampler="dpm++2m", guidance_scale=1.0, guidance_interval=(0.2, 0.8), deep_cache=3))(torch.arange(3))
    assert (open_batch(tmp_path / "quick" / "samples.npz").read(0, 3) == wanted).all()
    again = CliRunner().invoke(main, arguments)  # the second time there is nothing left to do
    assert again.exit_code == 0 and "all of them were there" in again.stdout
    other = CliRunner().invoke(main, [*arguments[:-6], *arguments[-4:]])
    assert other.exit_code == 2 and "deep_cache is 3 there and null here" in other.stderr


def test_a_block_that_was_interrupted_leaves_nothing_in_the_cache(models):
    """Memory runs out in the middle of a trajectory, and smaller parts are computed with the same networks."""
    net, calls = load(models / "model.safetensors").network, []
    cached, config, y = DeepCache(net, 3), SamplerConfig(steps="6", sampler="ddim"), torch.zeros(3, dtype=torch.long)
    process = load(models / "model.safetensors").diffusion

    def fails(x, t, **given):
        calls.append(int(t[0]))
        if len(calls) == 3:
            raise RuntimeError("out of memory")
        return cached(x, t, **given)

    with pytest.raises(RuntimeError):
        sample_images(fails, process, config, 0, torch.arange(3), (1, 8, 8), None, {"y": y})
    for indices in (torch.arange(3), torch.arange(3) + 5):  # the same batch, and then another
        assert torch.equal(sample_images(cached, process, config, 0, indices, (1, 8, 8), None, {"y": y}), sample_images(DeepCache(net, 3), process, config, 0, indices, (1, 8, 8), None, {"y": y}))


def test_a_cache_shares_its_parameters_and_leaves_the_network_alone(models):
    net, x = load(models / "upsampler.safetensors").network, torch.randn(2, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    given = (x, torch.tensor([5, 5]), torch.tensor([1, 2]), x[..., ::2, ::2])
    before, names = net(*given), [name for name, _ in net.named_modules()]
    cached = DeepCache(net, 2)
    assert {id(p) for p in cached.parameters()} == {id(p) for p in net.parameters()}
    assert torch.equal(cached(*given), before) and torch.equal(net(*given), before)
    assert [name for name, _ in net.named_modules()] == names


def test_memory_is_measured_with_the_guide(models, tmp_path, monkeypatch):
    """The two steps that are tried on a GPU may lie outside an interval."""
    from adm_repro import drawing as module

    seen = []
    monkeypatch.setenv("ADM_REPRO_CACHE", str(tmp_path))  # where nothing was measured yet
    monkeypatch.setattr(module, "_peaks", lambda *_: {2: 1.0, 4: 2.0})
    monkeypatch.setattr(module, "block_sampler", lambda drawing, *_: seen.append(evaluations(1000, drawing.config)))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: type("", (), {"name": "H200", "total_memory": 2**30}))
    module.choose_block_size(drawing(models, steps="20", guidance_interval=(0.3, 0.6)), 8, torch.device("cuda"), None, (None,))
    assert seen == [(2, 2)]


def test_an_interval_survives_json_and_is_walked_both_ways(models):
    config = SamplerConfig(steps="ddim20", sampler="ddim", guidance_scale=3.0, guidance_interval=(0.1, 0.6))
    assert config_from_json(SamplerConfig, json.loads(json.dumps(asdict(config)))) == config
    net, guide = (load(models / f"{name}.safetensors") for name in ("model", "guide"))
    images, y, asked = torch.zeros(2, 1, 8, 8), torch.tensor([1, 2]), []

    def grad_fn(x, t):
        asked.append(int(t[0]))
        return log_prob_grad(guide.network, x, t, y)

    for walk in (ddim_encode, ddim_decode):
        images = walk(net.network, net.diffusion, images, config, grad_fn, {"y": y})
    assert asked == [*range(100, 600, 50), *range(550, 99, -50)]


@pytest.mark.parametrize("name", ["dpm++2m", "heun"])
def test_solvers_sample_images_in_float32_near_the_end_of_the_path(name):
    """Clipped, with variance channels, where pixels are normally distributed: closer to what many steps give than as many DDIM steps are."""
    process, mean, std = GaussianDiffusion(named_betas("cosine", 1000)), torch.linspace(-0.5, 0.5, 16).view(1, 4, 4), 0.15

    def model(x, t):
        abar = process.alphas_cumprod[t].view(-1, 1, 1, 1).float()
        eps = (1 - abar).sqrt() * (x - abar.sqrt() * mean) / (abar * std**2 + 1 - abar)
        return torch.cat([eps, torch.zeros_like(x)], dim=1)

    run = lambda sampler, steps: sample_images(model, process, SamplerConfig(steps=str(steps), sampler=sampler), 0, torch.arange(64), (1, 4, 4))
    exact, quick = run("heun", 250), run(name, 40)
    assert quick.dtype == torch.float32
    assert 2 * (quick - exact).norm() < (run("ddim", 40) - exact).norm()


def test_solvers_are_those_that_the_sampler_names():
    assert set(shortcuts.SOLVERS) == {"dpm++2m", "heun"}
    for name in shortcuts.SOLVERS:
        SamplerConfig(sampler=name)


def test_the_plan_of_a_row_counts_the_second_evaluation_of_heun():
    network = ("train_diffusion", dict(data="digits", class_conditional=True, width=32, channel_mult=[1, 1], depth=1, attention_resolutions=[4], head_channels=16))
    row = dict(num_samples=10, steps="13", sampler="heun", guidance_scale=0.0)
    assert plan_cost("sample", row, {"model": network}).steps == 24
    assert plan_cost("sample", row | {"sampler": "dpm++2m"}, {"model": network}).steps == 13
