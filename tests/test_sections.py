"""Every section of every size can be written: from nothing, from failures, and from a whole set of records; no row is lost."""
import base64
import io
import json
import random
import re

import matplotlib
import matplotlib.pyplot as plt
import pytest
from conftest import ROOT
from PIL import Image

from adm_repro.reports import read_section
from adm_repro.runs import load_experiment, resolved_parameters, sizes

SECTIONS = [(size, section) for size in sizes() for experiment in (load_experiment(size),) for section in experiment.sections if experiment.full_size or size == "digits"]
METRICS = ("fid", "sfid", "inception_score", "precision", "recall", "target_probability", "guide_probability", "held_out_mse", "images_per_second", "share_of_peak",
           "error_scale0", "error_scale0_all_steps", "error_scale1", "error_scale2.5", "fd_dinov2", "precision_dinov2", "recall_dinov2",
           "feature_distance", "feature_distance_unseen", "feature_share_closer", "pixel_distance", "pixel_distance_unseen", "pixel_share_closer")


def picture():
    buffer = io.BytesIO()
    Image.new("L", (16, 8)).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def made_up_record(experiment, job):
    """What a finished job leaves, with random numbers."""
    draw, parameters = random.Random(job.id), resolved_parameters(experiment, job)
    metrics = {name: draw.uniform(0.1, 0.9) for name in METRICS} | {f"held_out_mse_{step}": draw.uniform(0.1, 0.9) for step in parameters.get("keep", [])}
    if not experiment.full_size:
        metrics |= {"frechet_distance": metrics.pop("fid"), "spatial_distance": metrics.pop("sfid")}
    result = {"metrics": metrics | {"count": parameters.get("num_samples", 50_000), "parameters": 1000},
              **dict.fromkeys(("first_images_png", "neighbours_png", "reconstructions_png", "interpolations_png"), picture()), "first_labels": [1, 2], "classes": [1, 2]}
    if job.notebook == "toy_guidance":
        result = {"step_counts": [4, 250], "distances": {name: [0.9, 0.1] for name in ("ancestral", "ancestral, gradient at the mean", "ddim")}, "perfect": 0.1, "perfect_high": 0.2,
                  "scales": [0.0, 1.0, 8.0], "confidence": [0.5, 0.9, 1.0], "spread": [0.6, 0.3, 0.2], "to_power": [0.0, 0.1, 0.5]}
    return {"job": job.id, "name": job.name, "seed": job.seed, "parameters": parameters, "result": result,
            "provenance": {"seconds": 60.0, "hardware": "made up", "timing": {"step_seconds": draw.uniform(0.1, 0.2)}}}


def written(size, section, folder, **parameters):
    """Run the cells of a section notebook here; much faster than a kernel for each."""
    matplotlib.use("Agg")
    notebook = json.loads((ROOT / "nbs" / "paper" / f"{section}.ipynb").read_text())
    namespace = {"__name__": "__section__"}
    for cell in (c for c in notebook["cells"] if c["cell_type"] == "code"):
        exec(compile("".join(cell["source"]), section, "exec"), namespace)
        if "parameters" in cell["metadata"].get("tags", []):
            namespace |= {"size": size, "records": str(folder / "records"), "run_dir": str(folder), **parameters}
    plt.close("all")
    return read_section(folder)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("size", "section"), SECTIONS, ids=lambda x: x)
def test_section_from_nothing_from_failures_and_from_everything(size, section, tmp_path, monkeypatch):
    monkeypatch.setenv("ADM_REPRO_ROOT", str(ROOT))
    experiment = load_experiment(size)
    mine = {job.name for job in experiment.jobs.values() if section in job.tables}
    nothing = written(size, section, tmp_path)
    assert all(effect.verdict() in ("not run", "the paper's arithmetic holds") or not effect.differences for effect in nothing.effects)
    (tmp_path / "failures").mkdir()
    for job in experiment.jobs.values():
        (tmp_path / "failures" / f"{job.id}.json").write_text(json.dumps({"job": job.id, "reason": "the disk was full"}))
    failed = written(size, section, tmp_path)
    assert "failed: the disk was full" in failed.markdown or not mine or section == "theory"
    (tmp_path / "records").mkdir()
    for job in experiment.jobs.values():
        (tmp_path / "records" / f"{job.id}.json").write_text(json.dumps(made_up_record(experiment, job)))
        (tmp_path / "failures" / f"{job.id}.json").unlink()
    whole = written(size, section, tmp_path)
    shown = set(re.findall(r"adm-repro reproduce (\S+) --size", whole.markdown))
    assert mine - shown <= ({"toy-guidance"} if section == "theory" else set()), "rows of this section that its tables do not show"
    if experiment.full_size:
        assert not any("smaller run" in effect.verdict() for effect in whole.effects)
    else:  # every effect is decided by rows that are there, but for samples of BigGAN and the exact networks' time
        assert [effect.text for effect in whole.effects if effect.verdict() == "not run" and "BigGAN" not in effect.text and effect.claim != "D3"] == []


@pytest.mark.filterwarnings("ignore")
def test_more_seeds_reach_the_verdict(tmp_path, monkeypatch):
    monkeypatch.setenv("ADM_REPRO_ROOT", str(ROOT))
    experiment = load_experiment("digits", seeds=5)
    (tmp_path / "records").mkdir()
    for job in experiment.jobs.values():
        (tmp_path / "records" / f"{job.id}.json").write_text(json.dumps(made_up_record(experiment, job)))
    counts = {seeds: {len(effect.differences) for effect in written("digits", "table3", tmp_path, seeds=seeds).effects} for seeds in (0, 2, 5)}
    assert counts == {0: {3}, 2: {2}, 5: {5}}
