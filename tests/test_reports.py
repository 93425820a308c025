"""The committed report is what the committed records give, and it is honest."""
import json
import re
import shutil

import pytest
from conftest import ROOT
from test_workflow import adm

from adm_repro.paper import claims, entry
from adm_repro.runs import job_recipe, load_experiment
from adm_repro.verdicts import ARITHMETIC, AT_FULL_SIZE, CONFIRMED, INCONCLUSIVE, NOT_RUN, REVERSED, Effect, load_records

SIZES = sorted(p.parent.name for p in (ROOT / "reports").glob("*/records") if p.parent.name != "smoke")


@pytest.fixture(scope="module", params=SIZES)
def rebuilt(request, tmp_path_factory):
    """A repository with nothing but the committed records and results of benchmarks, and the report built from them."""
    root = tmp_path_factory.mktemp("rebuilt")
    for name in ("experiments", "nbs/paper", "benchmarks/results"):
        shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns(".ipynb_checkpoints"))
    shutil.copytree(ROOT / "reports" / request.param / "records", root / "reports" / request.param / "records")
    result = adm(root, "report", "--size", request.param)
    assert result.returncode == 0, result.stderr
    return ROOT / "reports" / request.param, root / "reports" / request.param


def test_a_digits_report_is_committed():
    assert "digits" in SIZES


def test_rebuilt_byte_for_byte(rebuilt):
    committed, fresh = rebuilt
    names = sorted(str(p.relative_to(committed)) for p in committed.rglob("*") if p.is_file())
    assert names == sorted(str(p.relative_to(fresh)) for p in fresh.rglob("*") if p.is_file())
    for name in names:
        assert (committed / name).read_bytes() == (fresh / name).read_bytes(), name


def test_page_asks_nobody_for_anything(rebuilt):
    page = (rebuilt[0] / "index.html").read_text()
    assert not re.search(r"<script|<link|@import|url\(|src=\"(?!data:)", page)
    pictures = re.findall(r"<img[^>]*>", page)
    assert pictures and all(re.search(r'alt="[^"]{12,}"', picture) for picture in pictures)
    assert 'name="viewport"' in page


def test_pictures_of_the_markdown_exist_and_none_is_left_over(rebuilt):
    named = set(re.findall(r"\]\((figures/[^)]+)\)", (rebuilt[0] / "README.md").read_text()))
    assert named == {f"figures/{p.name}" for p in (rebuilt[0] / "figures").iterdir()}


def test_records_are_of_the_present_experiment(rebuilt):
    """Every committed record was made by the recipe that its job has now (notebook, parameters, needs), from a clean commit."""
    size = rebuilt[0].name
    experiment = load_experiment(size)
    records = load_records(rebuilt[0] / "records")
    assert set(records) == set(experiment.jobs)
    for id, record in records.items():
        assert record["recipe"] == job_recipe(experiment, experiment.jobs[id]), f"{id} is of another recipe: run it again"
        assert record["parameters"] | experiment.jobs[id].parameters == record["parameters"]
        assert not record["provenance"]["uncommitted_changes"], f"{id} was run with uncommitted changes"
        assert not re.search(r'"/[\w.-]+/', json.dumps(record)), f"{id} names a place on a machine"


def test_every_claim_has_a_verdict_in_words_that_cannot_flatter(rebuilt):
    text = (rebuilt[0] / "README.md").read_text()
    assert "not FID" in text and "What this is not" in text
    rows = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in text.split("## Claims")[1].split("\n## ")[0].splitlines() if re.match(r"\| [A-D]\d", line)]
    assert [row[0] for row in rows] == list(claims())
    words = {CONFIRMED, INCONCLUSIVE, REVERSED, NOT_RUN, *AT_FULL_SIZE.values(), *ARITHMETIC.values()}
    for row in rows:
        verdicts = {re.sub(r" \(\d+ of \d+\)$", "", verdict) for verdict in row[2].split("<br>")}
        assert verdicts <= words | {f"{NOT_RUN}: nothing of the {rebuilt[0].name} size tests it"}, row
    full_size = [row[0] for row in rows if "reproduced" in row[2]]
    assert set(full_size) <= {"B1", "B2", "B3"}, "only theorems are at their full size here"


def test_every_row_of_the_experiment_and_every_line_of_the_paper_has_its_place(rebuilt):
    text = (rebuilt[0] / "README.md").read_text()
    size = rebuilt[0].name
    for name in {job.name for job in load_experiment(size).jobs.values() if job.tables and job.notebook != "toy_guidance"}:
        assert f"| adm-repro reproduce {name} --size {size} |" in text, name
    for id in ("table4", "table5", "table6"):
        for row in entry(id).rows:
            assert re.search(rf"\| {re.escape(format(row['fid'], 'g'))}(<br>| )", text), (id, row)


def test_the_readme_counts_as_the_report_does():
    readme, report = ((ROOT / name).read_text() for name in ("README.md", "reports/digits/README.md"))
    summary = re.search(r"^(\d+) effects: (.*?)\. Each", report, re.M)
    counted = {verdict: number for number, verdict in re.findall(r"(\d+) ([^,]+)", summary[2])}
    words = (f"{summary[1]} effects", f"{counted[CONFIRMED]} confirmed", f"{counted[REVERSED]} reversed", f"{counted[INCONCLUSIVE]} inconclusive",
             f"{counted['reproduced']} theorems reproduced", f"{counted[NOT_RUN]} not run")
    assert [word for word in words if word not in readme] == []


def test_the_report_is_made_by_little_code():
    """Making tables and pages is no second project."""
    assert len((ROOT / "adm_repro" / "reports.py").read_text().splitlines()) < 300


@pytest.mark.parametrize(("differences", "expected", "verdict"), [
    ((1.0, 1.1, 0.9), 1, CONFIRMED), ((1.0, 1.1, 0.9), -1, REVERSED), ((1.0, -1.1, 0.9), 1, INCONCLUSIVE), ((5.0,), 1, INCONCLUSIVE), ((), 1, NOT_RUN),
])
def test_verdict_follows_the_interval(differences, expected, verdict):
    assert Effect("B4", "", expected, differences).verdict() == verdict


def test_text_of_a_record_cannot_become_markup(tmp_path):
    """Names in a record end up escaped in the page."""
    import nbformat

    from adm_repro.reports import convert_report, markdown_table

    cell = nbformat.v4.new_code_cell("", outputs=[nbformat.v4.new_output(
        "display_data", {"text/markdown": markdown_table(["<script>alert(1)</script>"], [["<img src=x onerror=alert(1)>"]])})])
    notebook = nbformat.v4.new_notebook(cells=[cell], metadata=json.loads((ROOT / "nbs" / "paper" / "report.ipynb").read_text())["metadata"])
    nbformat.write(notebook, tmp_path / "executed.ipynb")
    convert_report(tmp_path / "executed.ipynb", tmp_path / "out", "A <b>title</b>")
    page = (tmp_path / "out" / "index.html").read_text()
    assert "<script" not in page and "<img" not in page and "<b>title" not in page
