"""Parameters and operations of every network of the paper, counted on the meta device."""
import pytest
import torch
from conftest import load_golden

from adm_repro.checkpoints import find_released, released, released_network
from adm_repro.classifier import NoisyClassifier
from adm_repro.cost import forward_macs, guide_macs, parameter_count, plan_cost, training_flops
from adm_repro.paper import entry

# forward GMACs measured on the released code (openai/guided-diffusion at 22e0df8, meta device, batch 1), with the numbers of parameters
RELEASED_CODE = {
    "64x64_diffusion": (295_904_454, 109.68), "128x128_diffusion": (421_529_606, 306.93), "256x256_diffusion": (553_838_086, 1119.83),
    "256x256_diffusion_uncond": (552_814_086, 1119.83), "512x512_diffusion": (558_997_638, 1982.33), "64_256_upsampler": (311_795_910, 631.64),
    "128_512_upsampler": (308_835_270, 2504.78), "lsun_bedroom": (552_814_086, 1119.83), "lsun_cat": (552_814_086, 1119.83),
    "lsun_horse": (552_814_086, 1119.83), "lsun_horse_nodropout": (552_814_086, 1119.83), "64x64_classifier": (65_438_568, 19.08),
    "128x128_classifier": (42_568_040, 21.04), "256x256_classifier": (54_096_360, 73.35), "512x512_classifier": (54_448_360, 112.77),
}
GUIDES = {"64x64_classifier": 38, "128x128_classifier": 42, "256x256_classifier": 147, "512x512_classifier": 226}  # GMACs, there taken as twice the forward pass


@pytest.mark.parametrize("name", RELEASED_CODE)
def test_a_released_network_has_the_size_and_cost_of_the_released_code(name):
    with torch.device("meta"):
        network = released_network(name)
    parameters, gmacs = RELEASED_CODE[name]
    macs = forward_macs(network)
    if isinstance(network, NoisyClassifier):  # the released code pools into all 65 positions, projects all of them to 1000 classes, and keeps one
        assert guide_macs(network) / 1e9 == pytest.approx(GUIDES[name], rel=0.07)  # and attention's second factor
        positions, channels = 65, 512
        macs += (positions - 1) * (channels * 1000 + 2 * positions * channels)
    assert (parameter_count(network), round(macs / 1e9, 2)) == (parameters, gmacs)
    assert find_released(name).parameters == parameters


def test_the_registry_is_that_of_the_golden_state_dicts():
    golden = list(load_golden("checkpoints.json").values())
    for checkpoint in released().values():
        with torch.device("meta"):
            shapes = {key: list(value.shape) for key, value in released_network(checkpoint).state_dict().items()}
        assert any(spec["state_dict"] == shapes and spec["flags"].items() - {("classifier_use_fp16", False)} <= checkpoint.flags.items() for spec in golden), checkpoint.name


BASE = dict(data="imagenet", image_size=128, class_conditional=True, width=160, channel_mult=[1, 1, 2, 3, 4], depth=2, heads=1, head_channels=0,
            attention_resolutions=[16], adagn=True, resblock_updown=False, rescale_residual=False, iterations=700_000, batch_size=256)
TABLE2 = BASE | dict(width=128, attention_resolutions=[32, 16, 8], resblock_updown=True)
ABLATIONS = {
    "T1 base 160/2/1/16": BASE, "T1 128/depth4": BASE | dict(width=128, depth=4), "T1 heads4": BASE | dict(heads=4),
    "T1 attn 32,16,8": BASE | dict(attention_resolutions=[32, 16, 8]), "T1 biggan": BASE | dict(resblock_updown=True),
    "T1 rescale (same graph as base)": BASE | dict(rescale_residual=True),
    "T1 combined": BASE | dict(heads=4, attention_resolutions=[32, 16, 8], resblock_updown=True),
}


@pytest.mark.parametrize("name", ABLATIONS)
def test_table1_networks(name):
    cost = plan_cost("train_diffusion", ABLATIONS[name], {})
    assert [round(cost.parameters / 1e6, 2), round(cost.gmacs, 2)] == entry("table1").facts["derived_cost"]["rows"][name]


@pytest.mark.parametrize("heads", [dict(heads=1), dict(heads=2), dict(heads=4), dict(heads=8), dict(head_channels=32), dict(head_channels=64), dict(head_channels=128)])
def test_table2_networks(heads):
    cost = plan_cost("train_diffusion", TABLE2 | heads, {})
    assert [round(cost.parameters / 1e6, 2), round(cost.gmacs, 2)] == entry("table2").facts["derived_cost"]["value"]


@pytest.mark.parametrize(("operation", "adagn"), [("AdaGN", True), ("Addition+GroupNorm", False)])
def test_table3_networks(operation, adagn):
    cost = plan_cost("train_diffusion", TABLE2 | dict(head_channels=64, adagn=adagn), {})
    assert [round(cost.parameters / 1e6, 2), round(cost.gmacs, 2)] == entry("table3").facts["derived_cost"][operation]


@pytest.mark.parametrize(("model", "checkpoint"), [("64x64", "64x64_diffusion"), ("128x128", "128x128_diffusion"), ("256x256", "256x256_diffusion"),
                                                   ("64->256", "64_256_upsampler"), ("128->512", "128_512_upsampler")])
def test_theoretical_throughput_of_table7(model, checkpoint):
    printed, = (row["imgs_per_v100_sec"] for row in entry("table7").rows if (row["model"], row["implementation"]) == (model, "theoretical"))
    with torch.device("meta"):
        assert 120e12 / training_flops(forward_macs(released_network(checkpoint)), images=1) == pytest.approx(printed, abs=0.06)


def test_digits_and_unknown_networks():
    digits = dict(data="digits", width=32, channel_mult=[1, 1], depth=1, attention_resolutions=[4], head_channels=16, image_size=64, iterations=500, batch_size=64)
    unconditional = digits | {"class_conditional": False}
    trained, classifier = plan_cost("train_diffusion", unconditional, {}), plan_cost("train_classifier", digits, {})
    assert trained.training and classifier.parameters < trained.parameters < 1e6
    assert plan_cost("train_diffusion", digits | {"class_conditional": True}, {}).parameters == trained.parameters + 10 * 128
    second_image = 9 * 32  # one more channel into the first convolution
    upsampler = plan_cost("train_upsampler", digits | {"factor": 2}, {})
    assert (upsampler.parameters - trained.parameters - 10 * 128, upsampler.gmacs - trained.gmacs) == (second_image, pytest.approx(64 * second_image / 1e9))
    row = dict(num_samples=192, steps="ddim25", guidance_scale=1.0)
    guided = plan_cost("sample", row, {"model": ("train_diffusion", unconditional), "classifier": ("train_classifier", digits)})
    assert (guided.images, guided.steps, guided.gmacs) == (192, 25, trained.gmacs) and guided.guide_gmacs > classifier.gmacs
    for notebook, parameters, needs in (("toy_guidance", {}, {}), ("sample", row, {}), ("released", {"checkpoint": ""}, {}),
                                        ("sample", row, {"model": ("train_diffusion", unconditional | {"data": "photos"})})):
        assert plan_cost(notebook, parameters, needs) is None
