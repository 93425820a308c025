"""The walkthroughs tell their stories to somebody who only looks: pictures are stored, nothing failed, and the map leads to each."""
import base64
import json
import re

import pytest
from conftest import ROOT

NAMES = ("1_noise", "2_train", "3_guide", "4_measure", "5_upsample", "6_checkpoint", "7_table")
FOLDER = ROOT / "nbs" / "walkthrough"


def notebook(name):
    return json.loads((FOLDER / f"{name}.ipynb").read_text())


def code(name):
    return [(("".join(cell["source"])), cell["outputs"]) for cell in notebook(name)["cells"] if cell["cell_type"] == "code"]


def test_there_are_seven_and_the_map_lists_them():
    assert tuple(sorted(path.stem for path in FOLDER.glob("*.ipynb"))) == NAMES
    index = (ROOT / "nbs" / "index.ipynb").read_text()
    assert re.findall(r"\(walkthrough/(\w+)\.ipynb\)", index) == list(NAMES)
    assert index.index("## Walkthroughs") < index.index("| | notebook | afterwards you can |")


@pytest.mark.parametrize("name", NAMES)
def test_a_walkthrough_has_a_title_pictures_checks_and_no_directives(name):
    cells = notebook(name)["cells"]
    assert re.fullmatch(r"# .+\n\n> .+\n\n.+", "".join(cells[0]["source"]), re.S)
    drawn = [outputs for source, outputs in code(name) if "plt.subplots" in source]
    assert drawn and all(sum("image/png" in output.get("data", {}) for output in outputs) == 1 for outputs in drawn)
    for outputs in drawn:
        picture = next("".join(output["data"]["image/png"]) for output in outputs if "image/png" in output.get("data", {}))
        assert base64.b64decode(picture).startswith(b"\x89PNG")
    assert any("assert " in source for source, _ in code(name))
    assert not any(re.search(r"^#\| (?!hide)", source, re.M) for source, _ in code(name))


@pytest.mark.parametrize("name", NAMES)
def test_what_is_stored_is_short_whole_and_of_no_machine(name):
    for _, outputs in code(name):
        for output in outputs:
            assert output["output_type"] != "error" and output.get("name") != "stderr"
            text = "".join(output.get("text", ())) + "".join("".join(value) for kind, value in output.get("data", {}).items() if kind.startswith("text/") and kind != "text/html")
            assert text.count("\n") < 40, "a cell prints a page"
            assert not re.search(r"(?<![\w.:])/(?:home|root|tmp|work|Users|usr|opt)/", text)


@pytest.mark.parametrize("name", NAMES)
def test_links_lead_somewhere(name):
    for cell in notebook(name)["cells"]:
        for link in re.findall(r"\]\(([^)#:]+\.ipynb)\)", "".join(cell["source"])) if cell["cell_type"] == "markdown" else ():
            assert (FOLDER / link).is_file(), link


def test_the_slider_needs_nothing_from_elsewhere():
    pages = ["".join(output["data"]["text/html"]) for _, outputs in code("3_guide") for output in outputs if "text/html" in output.get("data", {})]
    assert len(pages) == 1 and 'type="range"' in pages[0] and pages[0].count("data:image/png;base64,") == 6
    assert "http" not in pages[0]
