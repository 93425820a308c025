"""The recipes are those of the paper's Tables 11 to 13."""
import json
import re

import pytest
from conftest import ROOT

from adm_repro.checkpoints import released
from adm_repro.paper import entry
from adm_repro.presets import preset, presets

BY_NAME = presets()


def paper_row(name):
    table, model = released()[name].paper
    return next(row for row in entry(table).rows if row["model"] == model)


def test_there_is_a_recipe_for_every_released_network():
    recipes = json.loads((ROOT / "adm_repro" / "recipes.json").read_text())
    assert list(recipes) == list(released())
    assert all(preset(found.name) == BY_NAME[found.preset] for found in released().values())


@pytest.mark.parametrize("name", list(released()))
def test_a_recipe_is_the_papers(name):
    recipe, row = preset(name), paper_row(name)
    network, train = recipe.network, recipe.train
    assert (train.batch_size, train.learning_rate, train.weight_decay) == (row["batch_size"], row["learning_rate"], row.get("weight_decay", 0.0))
    assert (network.width, network.depth, network.resblock_updown, recipe.noise_schedule) == (row["channels"], row["depth"], row["biggan_updown"], row["noise_schedule"])
    assert network.dropout == (0.0 if name == "lsun_horse_nodropout" else row.get("dropout", 0.0))
    levels = re.match(r"[0-9.,]+", str(row["channel_mult"]).strip("[]").replace(" ", ""))[0].strip(",")
    assert network.channel_mult == tuple(float(part) for part in levels.split(","))
    assert (network.heads if row.get("heads") else None, network.head_channels) == (row.get("heads"), row["head_channels"])
    smallest = network.image_size // 2 ** (len(network.channel_mult) - 1)
    assert set(network.attention_resolutions) == {size for size in row["attention_resolutions"] if size >= smallest}
    iterations = row["iterations"]
    if isinstance(iterations, str):  # "varies: cat 200K, horse 250K, bedroom 500K"
        iterations = 1000 * int(re.search(rf"{name.split('_')[1]} (\d+)K", iterations)[1])
    assert train.iterations == iterations
    assert (train.anneal, train.ema_rate, recipe.crop) == ((True, None, "random") if recipe.kind == "classifier" else (False, 0.9999, "auto"))
