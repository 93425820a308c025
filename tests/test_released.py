"""Steps that fetch released files, from a mirror on this machine."""
import functools
import http.server
import io
import json
import os
import threading
import zipfile

import numpy as np
import pytest
import torch
from conftest import ROOT

from adm_repro.checkpoints import fetch_batch, load_network, released_network, released_url
from adm_repro.files import DownloadError, sha256

BATCH = "VIRTUAL_imagenet64_labeled.npz"


@pytest.fixture
def mirror(tmp_path, monkeypatch):
    """An empty folder that is served with the released files' paths."""
    folder = tmp_path / "mirror"
    (folder / "ref_batches" / "imagenet" / "64").mkdir(parents=True)
    handler = type("Quiet", (http.server.SimpleHTTPRequestHandler,), {"log_message": lambda *_: None})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(handler, directory=folder))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("ADM_REPRO_MIRROR", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("ADM_REPRO_CACHE", str(tmp_path / "cache"))
    yield folder
    server.shutdown()
    server.server_close()


def run_cells(name, **parameters):
    """A paper notebook's code cells, run here with these parameters."""
    values = {}
    for cell in json.loads((ROOT / "nbs" / "paper" / f"{name}.ipynb").read_text())["cells"]:
        if cell["cell_type"] == "code":
            exec("".join(cell["source"]), values)
            if "parameters" in cell["metadata"].get("tags", []):
                values |= parameters
    return values


def test_a_released_classifier_becomes_a_network_of_a_run(mirror, tmp_path):
    torch.manual_seed(0)
    original = released_network("128x128_classifier")
    torch.save(original.state_dict(), mirror / "128x128_classifier.pt")
    run_cells("released", checkpoint="128x128_classifier", run_dir=str(tmp_path))
    network, about = load_network(tmp_path / "weights.safetensors")
    assert all(torch.equal(a, b) for a, b in zip(original.state_dict().values(), network.state_dict().values(), strict=True))
    assert about == {"noise_schedule": "linear", "checkpoint": "128x128_classifier", "sha256": sha256(mirror / "128x128_classifier.pt")}
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["metrics"]["parameters"] == 42_568_040 and 42 < result["metrics"]["guide_gmacs"] < 44
    (mirror / "64x64_classifier.pt").write_bytes(b"<html>not found</html>")
    with pytest.raises(DownloadError, match="not a file of weights: it is an HTML"):
        run_cells("released", checkpoint="64x64_classifier", run_dir=str(tmp_path))


def test_batches_are_fetched_once_and_compared_later(mirror, tmp_path):
    served = mirror / "ref_batches" / "imagenet" / "64" / BATCH
    np.savez(served, arr_0=np.zeros((2, 8, 8, 3), np.uint8))
    path = fetch_batch(BATCH)
    assert path == tmp_path / "cache" / BATCH and path.read_bytes() == served.read_bytes()
    served.unlink()
    assert fetch_batch(BATCH) == path  # it is there
    path.write_bytes(b"other")
    with pytest.raises(DownloadError, match="when it was first seen"):
        fetch_batch(BATCH)


@pytest.mark.parametrize(("name", "content", "message"), [
    ("empty.npz", b"", "it is empty"), ("page.npz", b"<html>", "HTML"), ("text.npz?sig=1", b"data", "no .npz archive"), ("huge.npz", {"arr_0.npy": (10**9, 64, 64, 3)}, r"arr_0.npy is uint8 \(1000000000"),
    ("negative.npz", {"arr_0.npy": (-4, 64, 64, 3)}, "arr_0.npy is uint8"), ("flat.npz", {"arr_0.npy": (100,)}, "arr_0.npy is uint8"), ("broken.npz", {"arr_0.npy": None}, "damaged or encrypted"),
    ("other.npz", {"x.npy": (100,)}, "neither images"),
])
def test_a_batch_of_an_address_is_looked_into(name, content, message, mirror, tmp_path):
    path = mirror / name.partition("?")[0]
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        with zipfile.ZipFile(path, "w") as archive:
            for member, shape in content.items():
                header = io.BytesIO()
                if shape:
                    np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": shape})
                archive.writestr(member, header.getvalue() + bytes(100))
    with pytest.raises(DownloadError, match=message):
        fetch_batch(f"{os.environ['ADM_REPRO_MIRROR']}/{name}")
    assert not list((tmp_path / "cache").rglob("*.sha256"))


def test_the_name_of_a_batch_is_that_of_its_address(mirror):
    np.savez(mirror / "mine.npz", arr_0=np.zeros((2, 8, 8, 3), np.uint8))
    assert fetch_batch(f"{os.environ['ADM_REPRO_MIRROR']}/mine.npz?sig=a/b").name == "mine.npz"
    with pytest.raises(ValueError, match="names no file"):
        fetch_batch(f"{os.environ['ADM_REPRO_MIRROR']}/folder/")


def test_a_mirror_is_an_address_or_a_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("ADM_REPRO_MIRROR", str(tmp_path))
    assert released_url("a.pt") == f"{tmp_path.as_uri()}/a.pt"
    for wrong in ("mirror.example.org/x", "/no/folder", "ftp://example.org"):
        monkeypatch.setenv("ADM_REPRO_MIRROR", wrong)
        with pytest.raises(ValueError, match=f"ADM_REPRO_MIRROR must be an address .*, or a folder that exists, got '{wrong}'"):
            released_url("a.pt")


@pytest.mark.parametrize(("name", "parameters", "message"), [
    ("released", {"run_dir": "x"}, "needs a checkpoint"),
    ("released", {"checkpoint": "256"}, "choose one of 64x64_diffusion"),
    ("released_features", {"features": "clip"}, "features must be"),
    ("released_features", {"features": "inception", "references": ["nowhere.npz"]}, "no batch of that name was released"),
    ("evaluate", {"reference": BATCH}, "give both samples and reference"),
    ("evaluate", {"reference": BATCH, "samples": "nowhere.npz"}, "no batch of that name was released"),
])
def test_wrong_parameters_are_refused_before_anything_is_fetched(name, parameters, message, tmp_path, monkeypatch):
    monkeypatch.setenv("ADM_REPRO_CACHE", str(tmp_path))
    with pytest.raises(ValueError, match=message):
        run_cells(name, **parameters)
    assert not list(tmp_path.iterdir())


def test_evaluate_measures_the_samples_of_a_run(inception_weights, tmp_path, monkeypatch):
    monkeypatch.setenv("ADM_REPRO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("adm_repro.features.inception_file", lambda: inception_weights)
    images = np.random.default_rng(0).integers(0, 256, (2, 12, 32, 32, 3), np.uint8)
    np.savez(tmp_path / "reference.npz", arr_0=images[0])
    (tmp_path / "row").mkdir()
    np.savez(tmp_path / "row" / "samples.npz", arr_0=images[1])
    values = run_cells("evaluate", samples=str(tmp_path / "row"), reference=str(tmp_path / "reference.npz"), run_dir=str(tmp_path))
    metrics = json.loads((tmp_path / "result.json").read_text())["metrics"]
    assert metrics["count"] == 12 and metrics["fid"] == values["evaluation"].metrics["fid"] > 0
