"""What the README shows is what was recorded, and its Python runs: with stand-ins for files that would be downloaded."""
import json
import re
from functools import partial

import numpy as np
import pytest
import torch
from conftest import ROOT, save_small_models

import adm_repro.features
from adm_repro import pretrained
from adm_repro.paper import claims

README = (ROOT / "README.md").read_text()
KINDS = ("reversed in part", "confirmed", "confirmed in part, the rest open or not run", "open: the interval includes zero", "a theorem: reproduced in full", "the paper's arithmetic holds", "not testable at this size")


def kind(verdicts):
    """What a claim's verdicts come to."""
    found = {re.sub(r"smaller run: | \(\d+ of \d+\)|: .*", "", v) for v in verdicts.split("<br>")}
    if "effect reversed" in found:
        return KINDS[0]
    if found == {"reproduced"}:
        return KINDS[4]
    if "the paper's arithmetic holds" in found:
        return KINDS[5]
    if "effect confirmed" in found:
        return KINDS[1] if len(found) == 1 else KINDS[2]
    return KINDS[6] if found == {"not run"} else KINDS[3]


def glance(report):
    """The README's table of claims, from the report's."""
    rows = re.findall(r"^\| ([A-D]\d+) \| (.+?) \| ((?:smaller run|reproduced|not run|the paper's)[^|]*) \|", report.split("\n## ")[1], re.M)
    assert [id for id, *_ in rows] == list(claims())
    by_kind = {name: [f"{id} {title}" for id, title, verdicts in rows if kind(verdicts) == name] for name in KINDS}
    lines = [f"| {name} | {'; '.join(titles)} |" for name, titles in by_kind.items() if titles]
    return "\n".join(["| verdict | claims of the paper |", "|---|---|", *lines])


def test_claims_are_those_of_the_report():
    report = (ROOT / "reports" / "digits" / "README.md").read_text()
    said = README.split("<!-- claims -->\n")[1].split("\n<!-- end of claims -->")[0]
    assert said == glance(report), f"the README's claims should be:\n{glance(report)}"


def test_kinds_of_verdicts():
    assert kind("smaller run: effect confirmed") == "confirmed"
    assert kind("smaller run: inconclusive (2 of 4)<br>smaller run: effect confirmed (2 of 4)").startswith("confirmed in part")
    assert kind("smaller run: effect reversed (1 of 3)<br>smaller run: effect confirmed (2 of 3)") == "reversed in part"
    assert kind("not run: nothing of the digits size tests it") == "not testable at this size"
    assert kind("smaller run: inconclusive (1 of 2)<br>not run (1 of 2)").startswith("open")


def test_speed_at_a_glance_is_the_recorded_one():
    results = {name: json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text()) for name in ("evaluator", "guided_step_cpu")}
    said = {row.split(" | ")[0].strip("| "): row for row in README.split("## At a glance")[1].split("\n## ")[0].splitlines() if row.startswith("| ")}

    def seconds(section, what, who, key="seconds"):
        return next(row[key] for row in results["evaluator"][section]["rows"] if row["what"].startswith(what) and row["who"] == who)

    ours = seconds("frechet", "Frechet", "adm_repro")
    assert f"| {seconds('frechet', 'Frechet', 'original evaluator') / ours:.1f} ({seconds('frechet', 'Frechet', 'torch-fidelity') / ours:.1f} times torch-fidelity)" in said["scoring: Frechet distance of 2048 features"]
    assert f"| {seconds('precision_recall', 'precision', 'original evaluator') / seconds('precision_recall', 'precision', 'adm_repro'):.1f} |" in said["scoring: precision and recall, 10,000 against 10,000"]
    ratio = seconds("inception", "Inception, 64", "adm_repro", "images_per_second") / seconds("inception", "Inception, 64", "torch-fidelity", "images_per_second")
    assert f"| {ratio:.1f} times torch-fidelity |" in said["scoring: Inception"]
    table = README.split("<!-- speed -->")[1]
    plain, tiles = (re.search(rf"guided step with `{flags}` against the original \|.*/ ([\d.]+)x", table)[1] for flags in ("--fast", "--fast --winograd"))
    assert f"| {plain} ({tiles} with the opt-in Winograd convolutions) |" in said["guided step, ADM 64"]


BLOCKS = re.findall(r"^```python\n(.*?)^```", README, re.M | re.S)


@pytest.fixture()
def stand_ins(tmp_path, monkeypatch, inception_weights):
    """Files under the names that the README uses, and small networks for the released ones."""
    monkeypatch.chdir(tmp_path)
    save_small_models(tmp_path)
    small = {"imagenet64": "model", "imagenet64-classifier": "guide"}
    real = pretrained.load

    def load(name, device="cpu", **known):
        if name in small:
            return real(tmp_path / f"{small[name]}.safetensors")
        return real(tmp_path / "model.safetensors") if name == "my_adm.pt" else real(name, device, **known)

    monkeypatch.setattr(pretrained, "load", load)
    monkeypatch.setattr(pretrained, "from_flags", lambda flags, path: (pretrained.parse_flags(flags), load(path))[1])
    monkeypatch.setattr(adm_repro.features, "inception_space", partial(adm_repro.features.inception_space, weights=inception_weights))
    monkeypatch.setattr(pretrained, "export_diffusers", lambda model: model)  # tests/test_pretrained.py has the real one
    draw = np.random.default_rng(0)
    for name in ("VIRTUAL_imagenet256_labeled.npz", "samples.npz"):
        np.savez(tmp_path / name, arr_0=draw.integers(0, 256, (8, 32, 32, 3), dtype=np.uint8))


def test_the_readme_has_snippets():
    assert len(BLOCKS) >= 3 and any("sample_images" in block for block in BLOCKS) and any("evaluate(" in block for block in BLOCKS)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("block", BLOCKS, ids=[block.splitlines()[0][:60] for block in BLOCKS])
def test_a_snippet_runs(block, stand_ins, capsys):
    torch.manual_seed(0)
    code = block.replace("sample(8,", "sample(2, steps='2',")  # the paper's 250 steps, of a stand-in
    names = {}
    exec(compile(code.replace('"cuda"', '"cpu"'), "README.md", "exec"), names)
    if "result" in names:
        assert set(names["result"].metrics) and names["result"].samples == 8
    if "images" in names:
        assert names["images"].shape[0] in (2, 4) and torch.isfinite(torch.as_tensor(names["images"]).float()).all()
