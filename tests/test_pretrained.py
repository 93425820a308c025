"""From names, files and flags to networks that sample: the 15 released layouts, damaged files, the hub, diffusers' class."""
import hashlib
import http.server
import json
import os
import pickle
import shutil
import threading
import warnings
from dataclasses import asdict, replace
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import torch
from conftest import fill, load_golden
from safetensors.torch import save_file

import adm_repro.checkpoints
from adm_repro.checkpoints import checkpoint_file, find_released, kind_of, layout, network, released, released_config, released_network, save_network
from adm_repro.classifier import ClassifierConfig, NoisyClassifier, log_prob_grad
from adm_repro.diffusion import GaussianDiffusion, named_betas
from adm_repro.files import DownloadError, sha256
from adm_repro.pretrained import (
    Pretrained,
    Process,
    diffusers_settings,
    export_diffusers,
    from_flags,
    from_pretrained,
    infer_config,
    load,
    matching_released,
    parse_flags,
    push_to_hub,
    save_pretrained,
)
from adm_repro.sampling import SamplerConfig, ancestral_step, sample_images, to_uint8, trained_timesteps
from adm_repro.unet import UNet, UNetConfig, Upsampler

# SHA-256 over a line per tensor, its name and its shape, of the state dictionaries that the released code builds
LAYOUTS = {
    "64x64_diffusion": "b41189488aa25b2a801bcaef75f58ea06d9f31346cfc3e4193b71ce964198665",
    "128x128_diffusion": "3e304371ffe30dfe06e155e13231caed19f655fa28e8a6f126a537bf04d74f39",
    "256x256_diffusion": "34403438fb090630d98cee98c758c14bab774a01e00580cfc653a81e36d1684e",
    "256x256_diffusion_uncond": "99b0f51e19c0f48559ffcaead639281ac95de54fa82e0bb6dc03a52a58962ac2",
    "512x512_diffusion": "74099b42b3463e6292df54f446755a17af94b3cf277fb466119bcc7d892262dc",
    "64_256_upsampler": "90fdb62b5beff70867829eb0afea1d6819558bfff7563116aa3cf6e903737ec3",
    "128_512_upsampler": "0ed4a0d2d11c242fd48d30d5e984a320fbb77065a597a62bf742512be743d3dc",
    "lsun_bedroom": "99b0f51e19c0f48559ffcaead639281ac95de54fa82e0bb6dc03a52a58962ac2",
    "lsun_cat": "99b0f51e19c0f48559ffcaead639281ac95de54fa82e0bb6dc03a52a58962ac2",
    "lsun_horse": "99b0f51e19c0f48559ffcaead639281ac95de54fa82e0bb6dc03a52a58962ac2",
    "lsun_horse_nodropout": "99b0f51e19c0f48559ffcaead639281ac95de54fa82e0bb6dc03a52a58962ac2",
}
SMALL = dict(image_size=8, width=32, channel_mult=(1, 2), depth=1, attention_resolutions=(4,), head_channels=16)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache folder, and no network."""
    monkeypatch.setenv("ADM_REPRO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("ADM_REPRO_MIRROR", (tmp_path / "mirror").as_uri())
    (tmp_path / "cache" / "checkpoints").mkdir(parents=True)
    (tmp_path / "mirror").mkdir()
    return tmp_path


def random_values(net, seed=0):
    """A state dictionary of its names and shapes, with values that keep outputs of moderate size."""
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.empty(t.shape).normal_(generator=generator) / max(1, t[0].numel()) ** 0.5 for name, t in net.state_dict().items()}


def on_meta(build):
    with torch.device("meta"):
        return build()


# the 15 released networks


@pytest.fixture
def without_values(cache, monkeypatch):
    """Released checkpoints whose tensors have names and shapes but no values, read as if they were files."""
    def served(found):
        path = cache / f"{found.name}.pt"
        path.write_bytes(b"")
        return path

    monkeypatch.setattr(adm_repro.checkpoints, "released_file", served)
    monkeypatch.setattr(adm_repro.checkpoints, "read_tensors", lambda path: on_meta(lambda: released_network(path.stem)).state_dict())


@pytest.mark.parametrize("name", released())
def test_a_released_network_makes_one_step_at_its_own_size(name, without_values):
    found = find_released(name)
    model = load(found.preset, device="meta")
    size, classes = model.network.config.image_size, model.network.config.classes
    assert sum(p.numel() for p in model.network.parameters()) == found.parameters
    assert model.process.noise_schedule == found.noise_schedule and (model.sampling.steps == found.steps or found.kind == "classifier")
    lines = "\n".join(f"{key} {shape}" for key, shape in layout(model.network).items())
    assert LAYOUTS.get(name) == (None if found.kind == "classifier" else hashlib.sha256(lines.encode()).hexdigest())
    x, t, y = torch.zeros(1, 3, size, size, device="meta"), torch.zeros(1, dtype=torch.long, device="meta"), torch.zeros(1, dtype=torch.long, device="meta")
    if found.kind == "classifier":
        assert log_prob_grad(model.denoise, x, t, y).shape == x.shape
        return
    conditioning = ({"y": y} if classes else {}) | ({"low_res": torch.zeros(1, 3, found.flags["small_size"], found.flags["small_size"], device="meta")} if found.kind == "upsampler" else {})
    guide = load(found.classifier, device="meta") if found.classifier else None
    grad_fn = None if guide is None else lambda x, t: log_prob_grad(guide.denoise, x, t, y)
    with torch.no_grad():
        output = model.denoise(x, t, **conditioning)
    assert output.shape == (1, 6, size, size)
    walk = model.diffusion.respaced(model.sampling.steps)
    assert ancestral_step(walk, output, x, 3, x, replace(model.sampling, guidance_scale=float(guide is not None)), grad_fn).shape == x.shape


def test_the_smallest_released_pair_guides_an_image(cache):
    """Real files, of random values: read, compared, and walked one step; 1.4 GB."""
    for name, seed in (("64x64_diffusion", 0), ("64x64_classifier", 1)):
        torch.save(random_values(on_meta(lambda name=name: released_network(name)), seed), checkpoint_file(name).path)
    model, guide = load("imagenet64"), load("64x64_classifier")
    assert model.about == {"noise_schedule": "cosine", "checkpoint": "64x64_diffusion", "preset": "imagenet64", "sha256": sha256(checkpoint_file("imagenet64").path)}
    plain, guided = model.sample(steps="1", labels=[7]), model.sample(steps="1", labels=[7], classifier=guide, guidance_scale=1e3)
    assert plain.shape == (1, 64, 64, 3) and not torch.equal(plain, guided)
    shutil.rmtree(cache / "cache")


def test_the_original_s_commands_give_the_released_networks():
    for found in released().values():
        line = " ".join(f"--{name} {value}" for name, value in found.flags.items())
        model = from_flags(line + (" --classifier_depth 4" if found.name == "64x64_classifier" else ""), device="meta")
        assert (type(model.network), model.network.config) == released_config(found)
        assert model.process == Process(found.noise_schedule, variance=model.process.variance)
        assert layout(model.network) == layout(on_meta(lambda found=found: released_network(found)))


SHARED = {"imagenet256-uncond", "lsun-bedroom", "lsun-cat", "lsun-horse", "lsun-horse-nodropout"}


@pytest.mark.parametrize("name", [name for name, found in released().items() if found.preset not in SHARED - {"lsun-cat"}])
def test_a_released_layout_is_recognised_and_could_be_inferred(name):
    cls, config = released_config(name)
    shapes = layout(on_meta(lambda: cls(config)))
    like = {found.preset for found in matching_released(shapes)}
    assert like == (SHARED if find_released(name).preset in SHARED else {find_released(name).preset})
    unseen = {field: getattr(config, field) for field in ("image_size", "heads", "head_channels", "new_attention_order", "dropout")}
    assert infer_config(shapes, **unseen) == (kind_of(on_meta(lambda: cls(config))), config, {})
    _, guessed, assumed = infer_config(shapes)
    assert guessed.image_size == (256 if name == "128_512_upsampler" else config.image_size)
    assert ("image_size" in assumed) == (cls is not NoisyClassifier) and "new_attention_order" in assumed


def test_a_file_that_could_be_one_of_five_says_so(cache, monkeypatch):
    state = on_meta(lambda: released_network("lsun_cat")).state_dict()
    monkeypatch.setattr("adm_repro.pretrained.read_tensors", lambda _: state)
    (cache / "some.pt").write_bytes(b"")
    with pytest.warns(UserWarning, match="has the tensors of imagenet256-uncond, lsun-bedroom, lsun-cat, lsun-horse, lsun-horse-nodropout; assumed"):
        model = load(cache / "some.pt", device="meta")
    assert set(model.about["like"]) == SHARED and model.about["assumed"]["noise_schedule"] == "linear" and model.network.config.image_size == 256
    assert model.about["assumed"]["head_channels"] == 64


def test_a_network_of_a_released_layout_is_not_taken_for_it_silently(cache, monkeypatch):
    state = on_meta(lambda: released_network("256x256_diffusion")).state_dict()
    monkeypatch.setattr("adm_repro.pretrained.read_tensors", lambda _: state)
    (cache / "own.pt").write_bytes(b"")
    with pytest.warns(UserWarning, match="own.pt has the tensors of imagenet256; assumed, as its tensors do not say: dropout=0.0, head_channels=64"):
        load(cache / "own.pt", device="meta")
    for known, expected in (({"heads": 4}, (4, None)), ({"head_channels": 32}, (4, 32))):
        with pytest.warns(UserWarning, match="has the tensors of imagenet256"):
            model = load(cache / "own.pt", device="meta", **known)
        assert (model.network.config.heads, model.network.config.head_channels) == expected
        assert not {"heads", "head_channels"} & set(model.about["assumed"])
    with pytest.warns(UserWarning):
        assert load(cache / "own.pt", device="meta", image_size=128).network.config.attention_resolutions == (16, 8, 4)
    (cache / "256x256_diffusion.pt").write_bytes(b"")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load(cache / "256x256_diffusion.pt", device="meta")


# files that are not what they should be


class Code:
    def __reduce__(self):
        return (os.mkdir, ("was-run",))


def damaged(state, path):
    """What a file may be in place of weights, and what is said about it."""
    torch.save(state, path)
    whole = path.read_bytes()
    wrong = dict(state) | {"out.0.bias": state["out.0.bias"][:-1]}
    renamed = {("out.0.offset" if name == "out.0.bias" else name): value for name, value in state.items()}
    for content, message in ((b"<!DOCTYPE html><html>", "HTML or XML page"), (whole[: len(whole) // 2], "cut off"), (b"", "is empty"),
                             (pickle.dumps({"out.0.bias": Code()}, protocol=2), "asks for posix.mkdir, and code from a file is never run")):
        path.write_bytes(content)
        yield message
    for content, message in (({"out.0.bias": Code()}, "asks for posix.mkdir"), (wrong, r"out.0.bias is \[\d+\] in place of \[\d+\]"), (renamed, "missing: out.0.bias"),
                             ({"ema": state, "model": state}, "a dictionary of ema, model, not tensors by name")):
        torch.save(content, path)
        yield message


def test_a_released_name_refuses_every_damaged_file(cache, monkeypatch):
    monkeypatch.chdir(cache)
    name, path = "imagenet128-classifier", cache / "mirror" / "128x128_classifier.pt"
    for message in damaged(random_values(on_meta(lambda: released_network(name))), path):
        with pytest.raises(DownloadError, match=rf"128x128_classifier.pt.* was thrown away .*{message}.*by hand"):
            load(name)
        assert [p.name for p in (cache / "cache" / "checkpoints").iterdir() if not p.name.startswith(".")] == []
    assert not (cache / "was-run").exists()


def test_a_path_refuses_every_damaged_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    net = UNet(UNetConfig(**SMALL))
    for message in damaged(random_values(net), tmp_path / "mine.pt"):
        about_it = "its tensors are not those of" if "missing" in message else message
        with pytest.raises(ValueError, match=rf"mine.pt .*{about_it}"):
            load(tmp_path / "mine.pt")
    assert not (tmp_path / "was-run").exists()
    (tmp_path / "mine.safetensors").write_bytes(b"\x10" * 40)
    with pytest.raises(ValueError, match=r"mine.safetensors is not a file of weights"):
        load(tmp_path / "mine.safetensors")


# any file of the original's tensors


def test_a_networks_file_is_loaded_with_its_values(tmp_path):
    net = UNet(UNetConfig(**SMALL, classes=10))
    state = random_values(net)
    torch.save({name: value.half() for name, value in state.items()}, tmp_path / "half.pt")
    with pytest.warns(UserWarning, match="is not one of the released networks; assumed, as its tensors do not say: dropout=0.0, head"):
        load(tmp_path / "half.pt", image_size=8)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        model = load(tmp_path / "half.pt", image_size=8, head_channels=16, noise_schedule="cosine", dtype=torch.bfloat16)
    assert "noise_schedule" not in str(warned[0].message) and model.process.noise_schedule == "cosine"
    assert model.network.config == net.config and model.network.out["2"].weight.dtype == torch.bfloat16
    assert torch.equal(model.network.label_emb.weight, state["label_emb.weight"].half().bfloat16())
    assert model.sample(2, steps="2").shape == (2, 8, 8, 3)
    assert model.about["sha256"] == sha256(tmp_path / "half.pt")
    torch.save({"state_dict": {f"module.{name}": value for name, value in state.items()}, "epoch": 3}, tmp_path / "trainer.pt")
    trained = load(tmp_path / "trainer.pt", dropout=0.0, head_channels=16, image_size=8, noise_schedule="cosine", new_attention_order=False, predicts="eps", timesteps=1000)
    assert all(torch.equal(value, state[name]) for name, value in trained.network.state_dict().items())


def test_a_file_of_save_network_knows_its_configuration(tmp_path):
    net = fill(UNet(UNetConfig(**SMALL, learned_variance=False)))
    save_network(tmp_path / "mine.safetensors", net, noise_schedule="cosine", steps=5)
    model = load(tmp_path / "mine.safetensors")
    assert model.process == Process("cosine", variance="fixed_large") and model.about["steps"] == 5 and model.network.config == net.config
    save_network(tmp_path / "mine.safetensors", net)
    with pytest.warns(UserWarning, match="does not say which noise schedule"):
        assert load(tmp_path / "mine.safetensors").about["assumed"] == {"noise_schedule": "linear", "timesteps": 1000, "predicts": "eps", "variance": "fixed_large"}


def test_the_weights_of_a_folder_know_their_process_alone(tmp_path):
    model = Pretrained(UNet(UNetConfig(**SMALL, learned_variance=False)), Process("cosine", 400, "x_start", "fixed_small"), SamplerConfig(steps="10"))
    again = load(save_pretrained(model, tmp_path / "model") / "model.safetensors")
    assert again.process == model.process and again.about["assumed"] == {}


@pytest.mark.parametrize(("change", "message"), [
    ("{", "does not say which network"), ([1], "must hold kind, config and about"), ({"config": None}, "must hold kind, config and about"), ({"about": "x"}, "must hold kind, config and about"),
    ({"kind": ["unet"]}, r"its kind is \['unet'\]"), ({"zzz": 1}, "has no field zzz"), ({"width": "32"}, "width of UNetConfig must be int, got '32'"), ({"width": True}, "must be int, got True"),
    ({"depth": 3000}, "describes 6000 blocks but holds"), ({"width": 32 * 600}, "does not fit its own configuration: another shape"), ({"channel_mult": [1e400, 2]}, "channel_mult of UNetConfig"),
    ({"image_size": None}, "image_size of UNetConfig must be int"), ({"about": {"noise_schedule": ["linear"]}}, "describes no process"), ({"about": {"process": {"timesteps": 10**9}}}, "1..100000"),
])
def test_odd_texts_in_a_file_are_refused_by_its_name(change, message, tmp_path):
    net, path = UNet(UNetConfig(**SMALL)), tmp_path / "odd.safetensors"
    text = {"kind": "unet", "config": asdict(net.config), "about": {"noise_schedule": "linear"}}
    if isinstance(change, dict):
        text = text | change if set(change) <= set(text) else text | {"config": text["config"] | change}
    else:
        text = change
    save_file(net.state_dict(), path, {"adm_repro": text if isinstance(text, str) else json.dumps(text)})
    with pytest.raises(ValueError, match=rf"odd.safetensors .*{message}"):
        load(path)


def odd_values(state):
    """Tensors that are no weights, and what is said about them."""
    name = "input_blocks.0.0.weight"
    for value, message in ((state[name].to(torch.int8), "is torch.int8"), (state[name].to_sparse(), "torch.sparse_coo"), (state[name].to("meta"), "on meta"), (state[name] * float("nan"), "NaN or infinite"),
                           (state[name].double() * 1e300, "NaN or infinite"), (torch.zeros(1).expand(state[name].shape), r"its tensors claim [\d,]+ bytes but hold [\d,]+: save copies")):
        yield state | {name: value}, message
    yield dict.fromkeys(state, state[name]), "its tensors claim"


def test_tensors_that_are_no_weights_are_refused(tmp_path):
    for state, message in odd_values(random_values(UNet(UNetConfig(**SMALL)))):
        torch.save(state, tmp_path / "odd.pt")
        with pytest.raises(ValueError, match=rf"odd.pt is not a file of weights: .*{message}"):
            load(tmp_path / "odd.pt", head_channels=16, image_size=8)
    net = UNet(UNetConfig(**SMALL))
    save_network(tmp_path / "odd.safetensors", net, net.state_dict() | {"out.2.bias": torch.full((6,), torch.inf)})
    with pytest.raises(ValueError, match=r"odd.safetensors is not a file of weights: out.2.bias has values that are NaN or infinite"):
        load(tmp_path / "odd.safetensors")


def test_a_network_is_not_its_file(tmp_path):
    """Weights stay what they were when the file is overwritten in place."""
    save_network(tmp_path / "mine.safetensors", fill(UNet(UNetConfig(**SMALL))), noise_schedule="linear")
    weight = load(tmp_path / "mine.safetensors").network.out["2"].weight
    before = weight.clone()
    with open(tmp_path / "mine.safetensors", "r+b") as file:
        size = file.seek(0, 2)
        file.seek(size // 2)
        file.write(bytes(size - size // 2))
    assert torch.equal(weight, before)


@pytest.mark.parametrize("config", [
    UNetConfig(**SMALL | dict(image_size=32, channel_mult=(1, 1, 2), depth=3, attention_resolutions=(16,)), learned_variance=False),
    UNetConfig(**SMALL | dict(image_size=32, channel_mult=(1, 2, 2, 1), depth=2, attention_resolutions=(32, 4)), classes=7),
    UNetConfig(**SMALL | dict(channel_mult=(2,), attention_resolutions=())),
    UNetConfig(**SMALL, in_channels=1, resblock_updown=False), UNetConfig(**SMALL, resblock_updown=False, conv_resample=False, adagn=False),
    ClassifierConfig(**SMALL | dict(image_size=32, channel_mult=(1, 2, 3), depth=4, attention_resolutions=(16, 8)), classes=5),
    ClassifierConfig(**SMALL, pool="adaptive", resblock_updown=False),
], ids=["uneven", "conditional", "one level", "grey, plain", "pooling", "classifier", "adaptive"])
def test_configurations_are_found_again(config):
    cls = NoisyClassifier if isinstance(config, ClassifierConfig) else UNet
    unseen = {field: getattr(config, field) for field in ("image_size", "heads", "head_channels")}
    assert replace(infer_config(layout(on_meta(lambda: cls(config))), **unseen)[1], resblock_updown=config.resblock_updown) == config


def test_an_encoder_that_divides_in_several_ways_says_so():
    config = ClassifierConfig(32, width=32, channel_mult=(1, 1), depth=2, attention_resolutions=(), head_channels=16)  # six stages: 2 x (2 + 1) or 3 x (1 + 1)
    shapes = layout(on_meta(lambda: NoisyClassifier(config)))
    assert "depth" in infer_config(shapes, head_channels=16)[2]
    assert infer_config(shapes, head_channels=16, depth=2, image_size=32)[1] == replace(config, attention_resolutions=())


# flags


def test_flags_are_those_of_the_scripts():
    assert parse_flags(["--class_cond", "yes", "--lr=3e-4", "--channel_mult", "1,2"]) == {"class_cond": True, "lr": 3e-4, "channel_mult": "1,2"}
    assert parse_flags({"image_size": "64", "use_fp16": False}) == {"image_size": 64, "use_fp16": False}
    assert parse_flags('MODEL_FLAGS="--image_size 32 --dropout 0.1"') == {"image_size": 32, "dropout": 0.1}
    line = "mpiexec -n 8 python scripts/classifier_train.py --data_dir x --iterations 300000 --anneal_lr True --batch_size 256 --image_size 64 --classifier_depth 1 --classifier_width 64"
    model = from_flags(line)
    assert model.kind == "classifier" and model.about["without_effect"] == ["anneal_lr", "batch_size", "data_dir", "iterations"]
    assert model.network.config.classes == 1000 and model.network.config.pool == "attention"


TINY = "--num_channels 32 --num_head_channels 32 --num_res_blocks 1"


@pytest.mark.parametrize(("line", "kind", "guided"), [
    ("python scripts/classifier_train.py --image_size 64 --data_dir x", "classifier", False), (f"super_res_train.py {TINY}", "superres", False), (f"super_res_sample.py {TINY}", "superres", False),
    (f"classifier_sample.py {TINY}", "unet", True), (f"image_train.py {TINY}", "unet", False), (f'MODEL_FLAGS="{TINY}"\npython image_sample.py $MODEL_FLAGS --num_samples 10', "unet", False),
])
def test_the_script_decides_what_is_described(line, kind, guided):
    model = from_flags(line, device="meta")
    assert (model.kind, model.classifier is not None) == (kind, guided)
    assert model.about["fresh_weights"] == ["network"] + ["classifier"] * guided
    assert "MODEL_FLAGS" not in line or model.network.config.width == 32


@pytest.mark.parametrize(("line", "message"), [
    (f'MODEL_FLAGS="{TINY}" python image_sample.py --num_samples 10', r"\$MODEL_FLAGS would be lost: image_sample.py only sees"), ("--image_size 64 image_sample.py", "--image_size would be lost"),
    (f"image_sample.py {TINY} --classifier_scale 2", "--classifier_scale is no flag of the original's image_sample.py"), ("super_res_sample.py --image_size 64", "--image_size is no flag"),
    ("--large_size 256 --use_new_attention_order True", "--use_new_attention_order is no flag of the original's scripts for a model of kind upsampler"),
    ("--attention_resolutions 0", "image sizes as in 32,16,8, got '0'"), ("--attention_resolutions ''", "image sizes as in 32,16,8, got ''"), ("--image_size 64 'abc", "close the quote"),
    ("--timestep_respacing 25x", "'25x' is not of the form"), ("--classifier_scale 2 --model_path here.pt", "describe a classifier that guides here.pt, but not its file: add --classifier_path"),
])
def test_lines_that_no_script_would_take(line, message):
    with pytest.raises(ValueError, match=message):
        from_flags(line, device="meta")


def test_flags_and_settings_at_once_are_refused(tmp_path):
    (tmp_path / "model.pt").write_bytes(b"")
    with pytest.raises(ValueError, match="flags say everything, and heads, noise_schedule would be ignored"):
        load(tmp_path / "model.pt", flags=TINY, noise_schedule="cosine", heads=2)


def test_flags_with_weights_are_a_model_of_the_original(tmp_path):
    flags = "--image_size 16 --channel_mult 1,2 --num_channels 32 --num_res_blocks 1 --num_heads 2 --attention_resolutions 8 --learn_sigma True --predict_xstart True --timestep_respacing 4"
    model = from_flags(flags)
    state = random_values(model.network)
    torch.save(state, tmp_path / "model.pt")
    for again in (from_flags(f"{flags} --model_path {tmp_path}/model.pt"), from_flags(flags, tmp_path / "model.pt"), load(tmp_path / "model.pt", flags=flags)):
        assert torch.equal(again.network.out["2"].weight, state["out.2.weight"])
        assert again.process == Process(predicts="x_start") and again.sampling == SamplerConfig("4")
    with pytest.raises(ValueError, match=r"model.pt does not hold the network of these flags: missing: label_emb.weight"):
        from_flags(flags + " --class_cond True", tmp_path / "model.pt")
    with pytest.raises(ValueError, match=r"gone.pt does not exist"):
        from_flags(flags, "gone.pt")


# sampling


def test_samples_are_those_of_the_sampler():
    model, guide = Pretrained(fill(UNet(UNetConfig(**SMALL, classes=10)))), Pretrained(fill(NoisyClassifier(ClassifierConfig(**SMALL, classes=10))))
    y, indices = torch.tensor([3, 1, 4]), torch.arange(5, 8)
    config = SamplerConfig("ddim5", "ddim", guidance_scale=2.0)
    expected = sample_images(model.network, GaussianDiffusion(named_betas("linear", 1000)), config, 9, indices, (3, 8, 8),
                             lambda x, t: log_prob_grad(guide.network, x, t, y), {"y": y})
    assert torch.equal(model.sample(labels=[3, 1, 4], seed=9, first=5, classifier=guide, steps="ddim5", guidance_scale=2.0), to_uint8(expected))
    large = Pretrained(fill(Upsampler(UNetConfig(**SMALL | dict(image_size=16, attention_resolutions=(8,))))))
    small = np.arange(2 * 4 * 4 * 3, dtype=np.uint8).reshape(2, 4, 4, 3)
    low = torch.from_numpy(small).permute(0, 3, 1, 2).float() / 127.5 - 1
    expected = sample_images(large.network, large.diffusion, SamplerConfig("3"), 0, torch.arange(2), (3, 16, 16), None, {"low_res": low})
    assert torch.equal(large.sample(low_res=small, steps="3"), to_uint8(expected))
    with pytest.raises(ValueError, match="cannot guide a superres"):
        large.sample(low_res=small, classifier=guide)


@pytest.mark.parametrize(("guide", "message"), [(dict(classes=10), "knows 10 classes, the network 7"), (dict(classes=7, in_channels=1), r"\(8, 1, 'linear', 1000\), the network for \(8, 3,")])
def test_a_guide_must_know_the_classes_and_channels(guide, message):
    with pytest.raises(ValueError, match=message):
        Pretrained(UNet(UNetConfig(**SMALL, classes=7)), classifier=Pretrained(NoisyClassifier(ClassifierConfig(**SMALL | guide))))
    Pretrained(UNet(UNetConfig(**SMALL)), classifier=Pretrained(NoisyClassifier(ClassifierConfig(**SMALL, classes=7))))


# folders and the hub


class Hub(http.server.SimpleHTTPRequestHandler):
    """The part of the hub that a download needs, for one repository in the server's folder."""

    def do_GET(self):
        if self.path.startswith("/api/models/someone/model/"):
            files = {str(p.relative_to(self.directory)): p.stat().st_size for p in Path(self.directory).rglob("*.*")}
            tree = [{"type": "file", "path": name, "size": size, "oid": "0"} for name, size in files.items()]
            about = {"id": "someone/model", "sha": "1" * 40, "siblings": [{"rfilename": name} for name in files]}
            body = json.dumps(tree if "/tree/" in self.path else about).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            return self.wfile.write(body)
        self.path = self.path.split("1" * 40)[-1]
        return super().do_GET()

    def do_HEAD(self):
        self.path = self.path.split("1" * 40)[-1]
        return super().do_HEAD()

    def end_headers(self):
        self.send_header("ETag", f'"{hashlib.sha256(self.path.encode()).hexdigest()}"')
        self.send_header("X-Repo-Commit", "1" * 40)
        super().end_headers()

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A folder that is the repository someone/model; huggingface_hub's client asks a server here for it."""
    folder = tmp_path / "hub"
    folder.mkdir()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), lambda *args: Hub(*args, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    real = huggingface_hub.snapshot_download
    monkeypatch.setattr(huggingface_hub, "snapshot_download",
                        lambda name, **options: real(name, endpoint=f"http://127.0.0.1:{server.server_port}", cache_dir=tmp_path / "hub-cache", **options))
    yield folder
    server.shutdown()
    server.server_close()


def test_a_model_goes_to_the_hub_and_comes_back(hub, monkeypatch):
    asked = []

    class Api:
        def __init__(self, token):
            asked.append(token)

        def create_repo(self, name, private, exist_ok):
            asked.append((name, private, exist_ok))

        def upload_folder(self, repo_id, folder_path, delete_patterns, commit_message):
            assert delete_patterns == ["classifier/*"]  # of an earlier commit; what is uploaded stays
            shutil.copytree(folder_path, hub, dirs_exist_ok=True)
            return type("Commit", (), {"commit_url": f"https://hub/{repo_id}/commit/1"})

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    guide = Pretrained(fill(NoisyClassifier(ClassifierConfig(**SMALL, classes=10))), Process("cosine"))
    model = Pretrained(fill(UNet(UNetConfig(**SMALL, classes=10))), Process("cosine"), SamplerConfig("3", guidance_scale=2.0), guide, {"note": "tiny"})
    assert push_to_hub(model, "someone/model", private=True, token="t") == "https://hub/someone/model/commit/1"
    assert asked == ["t", ("someone/model", True, True)]
    (hub / "harmful.py").write_text("raise SystemExit")  # not fetched
    again = load("someone/model")
    assert (again.process, again.sampling, again.about) == (model.process, model.sampling, model.about)
    assert torch.equal(again.sample(2), model.sample(2))
    assert not list((hub.parent / "hub-cache").rglob("*.py"))
    with pytest.raises(ValueError, match="someone/else is no folder, and the hub does not give it: "):
        load("someone/else")


def test_the_classifier_of_an_earlier_model_is_not_attached(tmp_path):
    net, guide = UNet(UNetConfig(**SMALL)), Pretrained(NoisyClassifier(ClassifierConfig(**SMALL, classes=10)))
    save_pretrained(Pretrained(net, classifier=guide), tmp_path)
    assert from_pretrained(tmp_path).classifier.kind == "classifier"
    save_pretrained(Pretrained(net), tmp_path)
    assert from_pretrained(tmp_path).classifier is None and (tmp_path / "classifier" / "config.json").exists()


def test_a_folder_that_was_changed_is_refused(tmp_path):
    folder = save_pretrained(Pretrained(UNet(UNetConfig(**SMALL))), tmp_path / "model")
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", "model.safetensors"]
    config = json.loads((folder / "config.json").read_text())
    for change, message in (({"network": config["network"] | {"heads": 2}}, "describes another network"), ({"process": {"noise_schedule": "sine"}}, "unknown noise schedule 'sine'"),
                            ({"sampling": {"speed": 3}}, "cannot be used"), ({"sampling": {"clip_denoised": "False"}}, "clip_denoised of SamplerConfig must be bool"), ({"process": []}, "cannot be used"),
                            ({"about": [1]}, "about must be names and values"), ({"process": {"timesteps": 10.5}}, "timesteps of Process must be int"), ({"process": {"variance": "fixed_small"}}, "does not fit a network")):
        (folder / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(ValueError, match=message):
            from_pretrained(folder)


# diffusers' class

SPECS = {name: spec for name, spec in load_golden("networks.json").items() if isinstance(spec, dict) and spec["kind"] != "classifier"}


@pytest.mark.parametrize("name", SPECS)
def test_diffusers_class_gives_the_released_code_s_output(name):
    spec, arrays = SPECS[name], load_golden("networks.npz")
    ours = fill(network(spec["kind"], spec["settings"]))
    theirs = export_diffusers(ours)
    inputs = {k: torch.tensor(arrays[f"{name}/{k}"]) for k in ("x", "t", "y", "low_res") if f"{name}/{k}" in arrays}
    x = inputs["x"]
    if "low_res" in inputs:
        x = torch.cat([x, torch.nn.functional.interpolate(inputs["low_res"], x.shape[-2:], mode="bilinear")], 1)
    with torch.no_grad():
        got = theirs(x, inputs["t"], class_labels=inputs.get("y")).sample
    expected = torch.tensor(arrays[f"{name}/out"])
    assert (got - expected).abs().max() <= 1e-4 * expected.std()
    assert sum(p.numel() for p in theirs.parameters()) == sum(p.numel() for p in ours.parameters())


@pytest.mark.parametrize("name", ["64x64_diffusion", "128x128_diffusion", "256x256_diffusion", "512x512_diffusion", "64_256_upsampler", "128_512_upsampler", "lsun_cat"])
def test_released_networks_fit_into_diffusers_class(name):
    ours = on_meta(lambda: released_network(name))
    theirs = export_diffusers(ours)
    assert sum(p.numel() for p in theirs.parameters()) == find_released(name).parameters
    _, unsaid = diffusers_settings(ours.config, 6 if find_released(name).kind == "upsampler" else 3)
    assert unsaid == {"128x128_diffusion": ["4 heads at every width"], "64_256_upsampler": ["4 heads at every width"],
                      "512x512_diffusion": ["an embedding of timesteps of another width than the first level"]}.get(name, [])
    assert {m.heads for m in theirs.modules() if hasattr(m, "to_q")} == ({4} if ours.config.head_channels is None else
                                                                         {ours.config.level_channels[i] // 64 for i in range(len(ours.config.channel_mult))
                                                                          if ours.config.image_size >> i in ours.config.attention_resolutions})


def test_an_exported_network_is_saved_and_sampled_by_diffusers(tmp_path):
    import diffusers

    ours = fill(UNet(UNetConfig(**SMALL)))
    export_diffusers(ours).save_pretrained(tmp_path)
    theirs = diffusers.UNet2DModel.from_pretrained(tmp_path)
    scheduler = diffusers.DDPMScheduler(1000, 1e-4, 0.02, "linear", variance_type="learned_range", clip_sample=True)
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        output = theirs(x, 700).sample
    diffusion = GaussianDiffusion(named_betas("linear", 1000))
    torch.testing.assert_close(output, ours(x, trained_timesteps(diffusion, 700, x)), atol=1e-4, rtol=0)
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    expected = ancestral_step(diffusion, output, x, 700, noise, SamplerConfig())
    torch.testing.assert_close(scheduler.step(output, 700, x, generator=torch.Generator().manual_seed(1)).prev_sample, expected, atol=1e-4, rtol=0)


def test_what_diffusers_cannot_say_is_refused():
    with pytest.raises(ValueError, match="cannot say residual sums divided by the square root of two"):
        export_diffusers(UNet(UNetConfig(**SMALL, rescale_residual=True))).save_pretrained("nowhere")
    with pytest.raises(ValueError, match="no class for a classifier"):
        export_diffusers(NoisyClassifier(ClassifierConfig(**SMALL)))
