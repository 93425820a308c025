"""Revisions of notebooks that are said to change no number: what is declared is present, and a job made again gives the committed result."""
import json
import subprocess
import sys
import tomllib

import pytest
from conftest import ROOT

from adm_repro.runs import hardware, load_experiment, notebook_hash, notebook_path, recipe_hash

REVISIONS = tomllib.loads((ROOT / "nbs" / "paper" / "revisions.toml").read_text())["revision"]
QUICK = ("features", "classifier-seed12")  # jobs that need no other


@pytest.mark.parametrize("name", sorted({revision["notebook"] for revision in REVISIONS}))
def test_the_last_revision_is_the_present_code(name):
    """A chain from the present code to the code that the committed records were made with; nothing that leads nowhere."""
    links = {revision["now"]: revision["was"] for revision in REVISIONS if revision["notebook"] == name}
    digest, steps = notebook_hash(notebook_path(name)), 0
    while digest in links:
        digest, steps = links[digest], steps + 1
    assert steps == len(links) and digest == recipe_hash(notebook_path(name))


def test_declared_jobs_are_committed_records():
    jobs = load_experiment("digits").jobs
    for revision in REVISIONS:
        for id in revision["jobs"]:
            assert jobs[id].notebook == revision["notebook"] and (ROOT / "reports" / "digits" / "records" / f"{id}.json").is_file()


@pytest.mark.parametrize("id", QUICK)
def test_a_committed_record_can_be_made_again(id, tmp_path, monkeypatch):
    """The same result as committed: byte for byte on the record's kind of processor, to 1 % or an image of a hundred on another, or where the record does not say which it was."""
    assert any(id in revision["jobs"] for revision in REVISIONS)
    monkeypatch.setenv("ADM_REPRO_RUNS", str(tmp_path))
    subprocess.run([sys.executable, "-m", "adm_repro.cli", "run", id, "--quiet"], cwd=ROOT, check=True)
    made, = (json.loads(path.read_text()) for path in tmp_path.glob("digits/*/record.json"))
    committed = json.loads((ROOT / "reports" / "digits" / "records" / f"{id}.json").read_text())
    assert made["recipe"] == committed["recipe"]
    if hardware() == committed["provenance"]["hardware"] and made["provenance"]["versions"]["torch"] == committed["provenance"]["versions"]["torch"]:
        assert made["result"] == committed["result"]
    else:
        assert made["result"]["metrics"] == pytest.approx(committed["result"]["metrics"], rel=0.01, abs=0.01)
