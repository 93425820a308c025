"""The experiment files of the paper's sizes: every line of the paper has its row, with the paper's settings, and a cost that is known before it runs."""
import tomllib

import pytest
from conftest import ROOT

from adm_repro.checkpoints import fetch_batch, find_released, released, released_batches
from adm_repro.cost import plan_cost
from adm_repro.paper import entry
from adm_repro.runs import notebook_parameters

SIZES = ("imagenet64", "imagenet128", "imagenet256", "imagenet512", "lsun", "released-batches")
FILES = {size: tomllib.loads((ROOT / "experiments" / f"{size}.toml").read_text()) for size in SIZES}
ROWS = {f"{size}/{name}": row for size, file in FILES.items() for name, row in file["rows"].items()}


def job(size, name):
    """A step or row with what its notebook's section adds: notebook, parameters, needs."""
    file = FILES[size]
    template = (file["steps"] | file["rows"])[name]
    shared = file.get("notebooks", {}).get(template["notebook"], {})
    return template["notebook"], shared.get("parameters", {}) | template.get("parameters", {}), shared.get("needs", {}) | template.get("needs", {})


def picked(id, selector):
    """Indices of the paper's lines that a selector picks; True is no 1."""
    return [i for i, line in enumerate(entry(id).rows) if all(k in line and line[k] == v and isinstance(line[k], bool) == isinstance(v, bool) for k, v in selector.items())]


@pytest.mark.parametrize("row", ROWS)
def test_a_row_points_at_one_line_of_each_entry(row):
    for id, selector in ROWS[row].get("paper", {}).items():
        assert len(picked(id, selector)) == 1, (id, selector)


def iterations_of(size, name):
    """Training steps behind a row's weights, which its training must keep; None for a released network."""
    _, parameters, needs = job(size, name)
    notebook, training, _ = job(size, needs["model"])
    if notebook == "released":
        return None
    kept = training.get("keep", [])
    assert parameters.get("iterations", 0) in (0, *kept) and max(kept, default=0) < training["iterations"]
    return parameters.get("iterations") or training["iterations"]


def is_ours(line):
    return "model" not in line or line["model"].startswith("ADM")


COVERED = [("table1", None), ("table2", None), ("table3", None), ("figure2", None), ("figure3", None), ("table4", None), ("figure4", None), ("table5", is_ours), ("table6", is_ours),
           ("table8", None), ("table9", None), ("table14", None), ("table15", None), ("table16", None), ("papers_with_code", None),
           ("figure5", lambda line: line["group"] == "left_guidance"), ("table7", lambda line: line["implementation"] == "optimized")]


@pytest.mark.parametrize(("id", "which"), COVERED, ids=[id for id, _ in COVERED])
def test_every_line_of_the_paper_has_a_row_that_samples_or_times(id, which):
    selectors = [row["paper"][id] for name, row in ROWS.items() if id in row.get("paper", {}) and not name.startswith("released-batches/")]
    found = {i for selector in selectors for i in picked(id, selector)}
    wanted = {i for i, line in enumerate(entry(id).rows) if which is None or which(line)}
    assert wanted <= found, [entry(id).rows[i] for i in wanted - found]


def test_every_released_file_is_used():
    used = [parameters for size, file in FILES.items() for name in file["steps"] | file["rows"] for _, parameters, _ in [job(size, name)]]
    assert {p["checkpoint"] for p in used if "checkpoint" in p} == set(released())
    assert {p[k] for p in used for k in ("samples", "reference") if k in p} == set(released_batches())


@pytest.mark.parametrize("size", SIZES)
def test_rows_belong_to_sections_and_need_steps_that_exist(size):
    file = FILES[size]
    assert file["full_size"] is True
    for name in file["steps"] | file["rows"]:
        _, _, needs = job(size, name)
        assert set(needs.values()) <= set(file["steps"] | file["rows"]), name
        once = (file["steps"] | file["rows"])[name].get("once", False)
        assert not once or all((file["steps"] | file["rows"])[n].get("once") for n in needs.values()), name
    for name, row in file["rows"].items():
        assert set(row["tables"]) <= set(file["sections"]), name
    assert {table for row in file["rows"].values() for table in row["tables"]} == set(file["sections"]) - {"table11", "gallery"}


@pytest.mark.parametrize("row", [name for name, row in ROWS.items() if row["notebook"] == "sample"])
def test_a_row_has_the_settings_of_its_line(row):
    """Scale, steps, iterations and data of a row are those of the lines that it points at."""
    size, name = row.split("/")
    _, parameters, needs = job(size, name)
    scale = parameters["guidance_scale"]
    assert ("classifier" in needs) == (scale > 0)
    assert (parameters["sampler"] == "ddim") == (parameters["steps"] == "ddim25")
    assert parameters["num_samples"] == (10_000 if row.startswith("imagenet128/figure2") else 50 if "figure8" in row else 50_000)
    for id, selector in ROWS[row].get("paper", {}).items():
        line = entry(id).rows[picked(id, selector)[0]]
        if id in ("table4", "figure3", "figure4", "figure5"):
            assert line["scale"] == scale
        if id == "table14":
            assert scale == line["DDIM 25 steps" if parameters["steps"] == "ddim25" else "250 steps"]
        if id in ("table8", "table9"):
            assert scale == 1 and iterations_of(size, name) in (None, int(line["iterations"][:-1]) * 1000)
        if id in ("table2", "table3"):
            assert iterations_of(size, name) == 700_000
        if id == "table1":
            assert iterations_of(size, name) in (700_000, 1_200_000)
        if id == "table15":
            assert parameters["steps"] == line["schedule"]
        if id == "table16":
            assert line["schedule"] in (f"{parameters['steps']} steps", f"{parameters['steps']} steps (uniform)", f"250 steps (sweep {parameters['steps']})")
        if id == "table5":
            assert ("25 steps" in line["model"]) == (parameters["steps"] == "ddim25") and ("ADM-G" in line["model"]) == (scale > 0)
            assert line["group"].split("x")[-1] in parameters["reference"] and line["group"].split()[0].lower() in parameters["reference"]
        if id == "table6" and "low_res" in needs:
            assert parameters["steps"].removeprefix("ddim") == str(line["s_upsample"]) and scale == 0
            _, base, _ = job(size, needs["low_res"])
            assert base["steps"].removeprefix("ddim") == str(line["s_base"]) and (base["guidance_scale"] > 0) == ("ADM-G" in line["model"])


# per model: millions of parameters, forward GMACs, GMACs of a guided step's classifier (twice its forward pass), measured on the released code
GMACS = {"64x64_diffusion": (295.90, 109.68, 38), "128x128_diffusion": (421.53, 306.93, 42), "256x256_diffusion": (553.84, 1119.83, 147), "256x256_diffusion_uncond": (552.81, 1119.83, 147),
         "512x512_diffusion": (559.00, 1982.33, 226), "64_256_upsampler": (311.80, 631.64, 0), "128_512_upsampler": (308.84, 2504.78, 0),
         **dict.fromkeys(("lsun_bedroom", "lsun_cat", "lsun_horse", "lsun_horse_nodropout"), (552.81, 1119.83, 0))}
STEPS = {"250": 250, "1000": 1000, "ddim25": 25, "25": 25, **{line["schedule"]: 250 for line in entry("table15").rows}}


@pytest.mark.parametrize("size", SIZES[:-1])
def test_the_cost_of_every_row_is_that_of_the_released_code(size):
    for name in FILES[size]["rows"]:
        notebook, parameters, needs = job(size, name)
        models = {parameter: job(size, needed)[:2] for parameter, needed in needs.items()}
        cost = plan_cost(notebook, notebook_parameters(ROOT / "nbs" / "paper" / f"{notebook}.ipynb") | parameters, models)
        if notebook != "sample":
            assert (cost is None) == (notebook not in ("encode", "neighbours", "time_network")), name
            continue
        if models["model"][0] == "released":
            millions, gmacs, guide = GMACS[models["model"][1]["checkpoint"]]
            images, steps = parameters["num_samples"], STEPS[parameters["steps"]]
            assert (round(cost.parameters / 1e6, 2), round(cost.gmacs, 2), cost.images, cost.steps) == (millions, gmacs, images, steps), name
            expected = gmacs + guide * (parameters["guidance_scale"] > 0)
            assert cost.flops == pytest.approx(2e9 * expected * images * steps, rel=0.02), name  # attention's gradient costs a little more than twice
        else:
            training = plan_cost(*models["model"], {})
            assert (training.parameters, training.gmacs) == (cost.parameters, cost.gmacs) and training.flops == pytest.approx(6e9 * cost.gmacs * training.images), name


@pytest.mark.parametrize(("row", "exaflops"), [("imagenet128/conditional-s0", 7.7), ("imagenet128/conditional-s0.5", 8.7), ("imagenet256/conditional-s1", 31.7), ("imagenet512/conditional-s4", 55.2),
                                               ("imagenet64/dropout-s0", 2.7), ("lsun/bedroom-1000", 112)])
def test_round_figures_of_whole_rows(row, exaflops):
    size, name = row.split("/")
    notebook, parameters, needs = job(size, name)
    cost = plan_cost(notebook, parameters, {parameter: job(size, needed)[:2] for parameter, needed in needs.items()})
    assert cost.flops / 1e18 == pytest.approx(exaflops, rel=0.02)


@pytest.mark.parametrize(("size", "step", "model", "iterations"), [("imagenet64", "no-dropout", "ImageNet 64", 540_000), ("imagenet128", "trained", "ImageNet 128", 2_000_000),
                                                                  ("imagenet256", "trained", "ImageNet 256", 1_500_000)])
def test_networks_trained_from_scratch_are_those_of_table_11(size, step, model, iterations):
    _, parameters, _ = job(size, step)
    line, = (line for line in entry("table11").rows if line["model"] == model)
    expected = {"noise_schedule": line["noise_schedule"], "width": line["channels"], "depth": line["depth"], "channel_mult": line["channel_mult"], "batch_size": line["batch_size"],
                "attention_resolutions": line["attention_resolutions"], "learning_rate": line["learning_rate"], "iterations": iterations, "head_channels": line["head_channels"] or 0}
    assert {name: parameters[name] for name in expected} == expected and parameters.get("heads") == line["heads"]
    assert round(plan_cost("train_diffusion", parameters, {}).parameters / 1e6) * 10**6 == line["model_size"]


def test_checkpoints_and_batches_fit_together():
    for size in SIZES[:-1]:
        for name in FILES[size]["rows"]:
            notebook, _, needs = job(size, name)
            steps = {parameter: job(size, needed) for parameter, needed in needs.items()}
            if notebook == "sample" and all(k in steps and steps[k][0] == "released" for k in ("model", "classifier")):
                model, guide = (find_released(steps[k][1]["checkpoint"]) for k in ("model", "classifier"))
                assert model.flags["image_size"] == guide.flags["image_size"] and model.noise_schedule == guide.noise_schedule, name
    with pytest.raises(ValueError, match="no batch of that name"):
        fetch_batch("VIRTUAL_imagenet512_labeled.npz")
