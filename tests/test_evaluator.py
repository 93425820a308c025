"""The evaluator as its users meet it: files in, the original's lines out, and one line for every mistake."""
import hashlib
import http.server
import json
import os
import re
import subprocess
import sys
import threading
import zipfile

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from conftest import inception_state
from PIL import Image

from adm_repro import features
from adm_repro.cli import main
from adm_repro.evaluation import evaluate, save_reference
from adm_repro.features import INCEPTION_FILE, DinoSpace, FeatureSpace, inception_space
from adm_repro.files import cache_folder, sha256
from adm_repro.metrics import feature_statistics, frechet_distance, inception_score, precision_recall

RELEASED = cache_folder()  # with the weights and the released batches, where somebody has them


@pytest.fixture(scope="module")
def space(inception_weights):
    return inception_space(inception_weights)


@pytest.fixture(scope="module")
def batches(tmp_path_factory):
    """Two small batches of structured images, and a folder for them."""
    folder, rng = tmp_path_factory.mktemp("batches"), np.random.default_rng(0)
    for name, count, shift in (("reference", 12, 0), ("samples", 10, 40)):
        coarse = rng.integers(0, 200, (count, 4, 4, 3))
        images = (coarse.repeat(8, 1).repeat(8, 2) + rng.integers(0, 16, (count, 32, 32, 3)) + shift).astype(np.uint8)
        np.savez(folder / f"{name}.npz", arr_0=images, arr_1=np.arange(count) % 5)
    return folder


def adm(*arguments):
    return CliRunner().invoke(main, [str(a) for a in arguments])


def test_the_metrics_are_those_of_the_features(space, batches):
    reference, samples = (np.load(batches / f"{name}.npz")["arr_0"] for name in ("reference", "samples"))
    with torch.no_grad():
        real, fake = (space.net(torch.from_numpy(images)) for images in (reference, samples))
    result = evaluate(batches / "reference.npz", batches / "samples.npz", space, batch_size=3)
    logits = fake.pool.double() @ space.net.fc.weight.T.double()
    assert list(result.metrics) == ["inception_score", "fid", "sfid", "precision", "recall"]
    assert result.metrics["inception_score"] == pytest.approx(inception_score(logits.softmax(1).numpy()), rel=1e-5)
    for name, ours, other in (("fid", real.pool, fake.pool), ("sfid", real.spatial, fake.spatial)):
        expected = frechet_distance(feature_statistics(ours.numpy()), feature_statistics(other.numpy()))
        assert result.metrics[name] == pytest.approx(expected, rel=1e-5)
    assert (result.metrics["precision"], result.metrics["recall"]) == precision_recall(real.pool.numpy(), fake.pool.numpy())
    assert (result.samples, result.reference_images) == (10, 12)
    assert result.space["sha256"] == space.sha256 and result.sources["samples"]["sha256"] == sha256(batches / "samples.npz")


def test_command_line_prints_the_originals_lines(batches, inception_weights, tmp_path, monkeypatch):
    monkeypatch.setenv("ADM_REPRO_CACHE", str(tmp_path))
    result = adm("evaluate", batches / "reference.npz", batches / "samples.npz", "--weights", inception_weights)
    assert result.exit_code == 0, result.output
    counts, *lines = result.stdout.splitlines()
    assert counts == "Samples: 10 (reference: 12 images; fid and sfid: statistics of 12 images; features: inception-2015-12-05)"
    assert [line.split(":")[0] for line in lines] == ["Inception Score", "FID", "sFID", "Precision", "Recall"]
    assert "10 samples are too few for fid (2048 features) and sfid (2023 features)" in result.stderr and "is not the published weights-inception" in result.stderr
    assert len(list(tmp_path.rglob("*.safetensors"))) == 2
    again = adm("evaluate", batches / "reference.npz", batches / "samples.npz", "--weights", inception_weights, "--json", "--interval", "--resamples", 10)
    record = json.loads(again.stdout)
    assert [f"{value}" for value in record["metrics"].values()] == [line.split(": ")[1] for line in lines]
    assert set(record["intervals"]) == set(record["metrics"]) and record["samples"] == 10


def test_the_part_of_the_network_never_says_fid(batches, tmp_path):
    state = {k: v.numpy() for k, v in inception_state().items() if not k.startswith(("Mixed_7", "fc")) and "tracked" not in k}
    np.savez(tmp_path / "part.npz", **state)
    result = adm("evaluate", batches / "reference.npz", batches / "samples.npz", "--weights", tmp_path / "part.npz", "--no-cache")
    assert [line.split(":")[0] for line in result.stdout.splitlines()[1:]] == ["FID768", "sFID", "Precision768", "Recall768"]


def test_a_reference_batch_of_ones_own(batches, space, tmp_path):
    path = tmp_path / "mine.npz"
    assert save_reference(batches / "reference.npz", path, space, keep=8) == 12
    with zipfile.ZipFile(path) as archive, archive.open("arr_0.npy") as file:  # what the original's reader asks for
        assert np.lib.format.read_magic(file) == (1, 0)
        assert np.lib.format.read_array_header_1_0(file) == ((8, 32, 32, 3), False, np.uint8)
    with np.load(path) as arrays:
        assert {"arr_0", "arr_1", "mu", "sigma", "mu_s", "sigma_s"} <= set(arrays.files)
        assert (arrays["mu"].shape, arrays["sigma"].shape, arrays["mu_s"].shape) == ((2048,), (2048, 2048), (2023,))
        whole = np.load(batches / "reference.npz")
        for image, label in zip(arrays["arr_0"], arrays["arr_1"], strict=True):  # images keep their labels
            place, = np.flatnonzero((whole["arr_0"] == image).all((1, 2, 3)))
            assert whole["arr_1"][place] == label
    stored = evaluate(path, batches / "samples.npz", space)
    direct = evaluate(batches / "reference.npz", batches / "samples.npz", space)
    assert stored.metrics["fid"] == pytest.approx(direct.metrics["fid"], rel=1e-9)
    assert stored.reference_statistics == {"fid": "stored (of 12 images)", "sfid": "stored (of 12 images)"} and stored.reference_images == 8
    assert evaluate(batches / "samples.npz", path, space, ("frechet",)).warnings[-1].startswith(f"{path} stores statistics, and")  # the original uses them, too


def test_reference_command(batches, tmp_path, inception_weights):
    arguments = ("reference", batches / "reference.npz", tmp_path / "mine.npz", "--weights", inception_weights, "--keep", 5)
    result = adm(*arguments)
    assert result.exit_code == 0 and result.stdout == f"{tmp_path / 'mine.npz'}: statistics of 12 images, and 5 of them\n", result.output
    with np.load(tmp_path / "mine.npz") as arrays:
        assert arrays["arr_0"].shape == (5, 32, 32, 3)
    again = adm(*arguments)
    assert again.exit_code == 2 and "is not overwritten" in again.output
    assert "it comes after the images" in adm("reference", tmp_path / "mine.npz", tmp_path, "--weights", inception_weights).output  # exchanged
    assert "only image files can be cropped" in adm("reference", batches / "reference.npz", tmp_path / "new.npz", "--size", 16).output
    for name in ("mine.npy", "no/such.npz"):
        (tmp_path / "no").write_bytes(b"")
        assert adm("reference", batches / "reference.npz", tmp_path / name, "--weights", inception_weights).exit_code == 2


def test_statistics_of_other_weights_are_refused(batches, space, tmp_path):
    save_reference(batches / "reference.npz", tmp_path / "mine.npz", space)
    state = inception_state()
    state["fc.weight"] = state["fc.weight"] * 1.01
    torch.save(state, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="make the reference again"):
        evaluate(tmp_path / "mine.npz", batches / "samples.npz", inception_space(tmp_path / "other.pth"))
    part = {k: v.numpy() for k, v in inception_state().items() if not k.startswith(("Mixed_7", "fc")) and "tracked" not in k}
    np.savez(tmp_path / "part.npz", **part)  # the part up to Mixed_6e takes the spatial statistics, and only them
    mixed = evaluate(tmp_path / "mine.npz", batches / "samples.npz", inception_space(tmp_path / "part.npz"), ("frechet",))
    assert mixed.reference_statistics == {"fid768": "of 12 images", "sfid": "stored (of 12 images)"}
    whole = evaluate(batches / "reference.npz", batches / "samples.npz", space, ("frechet",))
    assert any("made with the weights" in w for w in mixed.warnings)
    assert mixed.metrics["sfid"] == pytest.approx(whole.metrics["sfid"], rel=1e-4)


class Pixels(FeatureSpace):
    """A space without a network: mean colours of the quarters of an image."""

    name, sha256, in_papers = "pixels", "0" * 64, False
    lengths, frechet_names, suffixes = {"mean": 12}, {"mean": "d"}, {}
    metric_names = {"precision": "precision", "kernel": "kernel_distance"}

    def check(self, shape):
        pass

    def layers(self, images):
        n, h, w, _ = images.shape
        means = images.reshape(n, 2, h // 2, 2, w // 2, 3).astype("float32").mean((2, 4)) / 64
        return {"mean": torch.from_numpy(means.reshape(n, 12))}


def test_the_kernel_distance_is_an_extra(tmp_path):
    rng = np.random.default_rng(0)
    near, far = (rng.integers(low, 256, (1000, 8, 8, 3), dtype=np.uint8) for low in (0, 60))
    result = evaluate(near, near[::-1].copy(), Pixels(), ("kernel",), cache=tmp_path)
    assert list(result.metrics) == ["kernel_distance"] and not result.warnings
    assert abs(result.metrics["kernel_distance"]) < 0.01 * evaluate(near, far, Pixels(), ("kernel",)).metrics["kernel_distance"]
    with pytest.raises(ValueError, match="999 images, but kernel_distance needs at least 1000"):
        evaluate(near[1:], far, Pixels(), ("kernel",))
    assert list(evaluate(near, far, Pixels()).metrics) == ["d", "precision"]  # it has neither recall nor classes
    with pytest.raises(ValueError, match="pixels has none of recall"):
        evaluate(near, far, Pixels(), ("recall",))


def test_statistics_alone_give_frechet_distances(batches, space, tmp_path):
    save_reference(batches / "reference.npz", tmp_path / "mine.npz", space)
    with np.load(tmp_path / "mine.npz") as arrays:
        np.savez(tmp_path / "only.npz", **{key: arrays[key] for key in ("mu", "sigma", "mu_s", "sigma_s")})
    only = evaluate(tmp_path / "only.npz", batches / "samples.npz", space, ("frechet", "inception_score"))
    assert list(only.metrics) == ["inception_score", "fid", "sfid"]
    with np.load(tmp_path / "mine.npz") as arrays:
        np.savez(tmp_path / "pool.npz", mu=arrays["mu"], sigma=arrays["sigma"])  # as pytorch-fid's files
    assert list(evaluate(tmp_path / "pool.npz", batches / "samples.npz", space, ("fid",)).metrics) == ["fid"]
    assert only.metrics["fid"] == pytest.approx(evaluate(batches / "reference.npz", batches / "samples.npz", space, ("frechet",)).metrics["fid"], rel=1e-6)
    with pytest.raises(ValueError, match="precision, recall need: leave these metrics out"):
        evaluate(tmp_path / "only.npz", batches / "samples.npz", space)


IMAGES = np.random.default_rng(1).integers(0, 256, (9, 16, 16, 3), dtype=np.uint8)


@pytest.mark.parametrize(("arrays", "message"), [
    ({"arr_0": IMAGES / 255}, "got float64 in 0.*store np.clip"),
    ({"arr_0": IMAGES.astype(np.int32)}, "must be uint8 in 0..255, got int32"),
    ({"arr_0": IMAGES.transpose(0, 3, 1, 2)}, "channels first"),
    ({"arr_0": IMAGES[..., :1]}, "repeat the grey channel three times"),
    ({"arr_0": IMAGES[:1]}, "at least 2"),
    ({"arr_0": IMAGES[:3]}, "precision needs at least 4"),
    ({"arr_0": np.where(IMAGES > 9, np.nan, 0.5)}, "NaN"),
    ({"arr_0": np.array([None] * 9)}, "never loaded"),
    ({"arr_0": IMAGES[:, :8]}, "they must have one size"),
    ({"images": IMAGES}, "has no arr_0"),
    ({"arr_0": IMAGES, "mu": np.zeros(2048), "sigma": np.eye(2047)}, "needs a square covariance"),
    ({"arr_0": IMAGES, "mu": np.zeros(64), "sigma": np.eye(64)}, "statistics of 64 features"),
])
def test_bad_input_is_one_line_and_exit_code_2_before_the_network_runs(arrays, message, tmp_path, inception_weights, monkeypatch):
    monkeypatch.setattr("adm_repro.inception.Inception.forward", lambda *_: pytest.fail("the network ran"))
    np.savez(tmp_path / "good.npz", arr_0=IMAGES)
    np.savez(tmp_path / "bad.npz", **arrays)
    files = ("bad.npz", "good.npz") if "mu" in arrays else ("good.npz", "bad.npz")
    result = adm("evaluate", *(tmp_path / name for name in files), "--weights", inception_weights, "--no-cache")
    assert result.exit_code == 2 and len(result.output.splitlines()) == 1, result.output
    assert "bad.npz" in result.output
    assert re.search(message, result.output), result.output


@pytest.mark.parametrize("damage", ["cut", "flipped"])
def test_a_damaged_file_is_named(damage, tmp_path, inception_weights):
    np.savez(tmp_path / "good.npz", arr_0=IMAGES)
    whole = (tmp_path / "good.npz").read_bytes()
    (tmp_path / "bad.npz").write_bytes(whole[:-50] if damage == "cut" else whole[:5000] + bytes(9) + whole[5009:])
    result = adm("evaluate", tmp_path / "good.npz", tmp_path / "bad.npz", "--weights", inception_weights, "--no-cache")
    assert result.exit_code == 2 and "bad.npz is damaged, not whole" in result.output and "Traceback" not in result.output


def test_weights_are_downloaded_once_checked_and_kept(inception_weights, tmp_path, monkeypatch):
    content, asked = inception_weights.read_bytes(), []

    class Server(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.headers.get("Range"))
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("ADM_REPRO_CACHE", str(tmp_path))
    monkeypatch.setattr(features, "INCEPTION_URL", f"http://127.0.0.1:{server.server_port}/{INCEPTION_FILE}")
    np.savez(tmp_path / "a.npz", arr_0=IMAGES)
    try:
        refused = adm("evaluate", tmp_path / "a.npz", tmp_path / "a.npz", "--no-cache")
        assert refused.exit_code == 2 and "not the published 6726825d" in refused.output and "--weights" in refused.output
        assert not (tmp_path / INCEPTION_FILE).exists()
        monkeypatch.setattr(features, "INCEPTION_SHA256", hashlib.sha256(content).hexdigest())
        for _ in range(2):
            assert adm("evaluate", tmp_path / "a.npz", tmp_path / "a.npz", "--no-cache", "--only", "frechet").exit_code == 0
    finally:
        server.shutdown()
        server.server_close()
    assert len(asked) == 2 and (tmp_path / INCEPTION_FILE).read_bytes() == content


def test_sorted_labels_and_jpeg_are_warned_about(space, tmp_path):
    order = np.argsort(np.arange(9) % 3, kind="stable")
    np.savez(tmp_path / "sorted.npz", arr_0=IMAGES[order], arr_1=np.arange(9)[order] % 3)
    one_split = evaluate(IMAGES, tmp_path / "sorted.npz", space, ("inception_score",))
    two_splits = evaluate(IMAGES, tmp_path / "sorted.npz", space, ("inception_score",), split_size=5)
    assert not any("sorted" in w for w in one_split.warnings) and any("sorted by class" in w for w in two_splits.warnings)
    (tmp_path / "photos").mkdir()
    for i, image in enumerate(IMAGES):
        Image.fromarray(image).save(tmp_path / "photos" / f"{i}.jpg")
    assert any("JPEG" in w for w in evaluate(IMAGES, tmp_path / "photos", space, ("inception_score",)).warnings)


MEMORY = """
import resource, sys, numpy as np, torch
from adm_repro.evaluation import evaluate
from adm_repro.features import FeatureSpace
class Mean(FeatureSpace):
    name, sha256, lengths, frechet_names, metric_names, suffixes, in_papers = "mean", "0", {"f": 6}, {"f": "d"}, {"precision": "p"}, {}, False
    def check(self, shape): pass
    def layers(self, images):
        half = images.reshape(len(images), 2, -1, 3).astype("float32")
        return {"f": torch.from_numpy(half.mean(2).reshape(len(images), 6))}
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
result = evaluate(sys.argv[1], sys.argv[1], Mean(), ("frechet",), batch_size=16)
assert result.samples == 1200 and abs(result.metrics["d"]) < 1e-6
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""


def test_memory_does_not_grow_with_the_number_of_images(tmp_path):
    """944 MB of images of 512 x 512 pixels, packed small, are measured in a tenth of that."""
    rng = np.random.default_rng(0)
    with zipfile.ZipFile(tmp_path / "large.npz", "w", zipfile.ZIP_DEFLATED) as archive, archive.open("arr_0.npy", "w") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": (1200, 512, 512, 3)})
        for _ in range(1200):
            file.write(np.broadcast_to(rng.integers(0, 256, (2, 1, 3), dtype=np.uint8), (2, 512 * 256, 3)).tobytes())
    done = subprocess.run([sys.executable, "-c", MEMORY, str(tmp_path / "large.npz")], capture_output=True, text=True, check=True, env=os.environ)
    assert float(done.stdout) < 95, done.stdout


def test_dinov2_through_transformers():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.Dinov2Config(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=518, patch_size=14)
    space = DinoSpace(transformers.Dinov2Model(config))
    assert isinstance(space, FeatureSpace) and space.neighbours == 5
    result = evaluate(IMAGES, IMAGES[::-1].copy(), space)
    assert list(result.metrics) == ["fd_dinov2", "precision_dinov2", "recall_dinov2"]
    assert abs(result.metrics["fd_dinov2"]) < 1e-4 and result.metrics["precision_dinov2"] == 1.0
    assert result.lines()[1].startswith("FD-DINOv2: ")
    resized = np.stack([np.asarray(Image.fromarray(image).resize((224, 224), Image.Resampling.BICUBIC)) for image in IMAGES])
    normal = (resized / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]  # ImageNet's mean and standard deviation
    expected = space.net(torch.from_numpy(normal).permute(0, 3, 1, 2).float()).last_hidden_state[:, 0]
    torch.testing.assert_close(space.layers(IMAGES)["class_token"], expected, rtol=1e-4, atol=1e-4)
    other = transformers.Dinov2Model(transformers.Dinov2Config(**{**config.to_dict(), "num_attention_heads": 4, "image_size": 224}))
    other.load_state_dict(space.net.state_dict())
    assert DinoSpace(space.net).sha256 == space.sha256 != DinoSpace(other).sha256


RELEASED_BATCHES = [  # printed by the original's README (256) and by a re-evaluation with its evaluator (128)
    ("VIRTUAL_imagenet256_labeled.npz", "admnet_guided_upsampled_imagenet256.npz", (215.837, 3.94256, 6.14043, 0.8265, 0.5309)),
    ("VIRTUAL_imagenet128_labeled.npz", "admnet_guided_imagenet128.npz", (141.477, 2.97329, 5.09456, 0.78138, 0.5929)),
]


@pytest.mark.parametrize(("reference", "samples", "published"), RELEASED_BATCHES, ids=["256", "128"])
def test_the_released_batches(reference, samples, published):
    """Hours on a CPU; needs the published weights and batches in ADM_REPRO_CACHE."""
    missing = [name for name in (INCEPTION_FILE, reference, samples) if not (RELEASED / name).is_file()]
    if missing:
        pytest.skip(f"{', '.join(missing)} not in {RELEASED}: download them there, or name another folder in ADM_REPRO_CACHE")
    measured_equals_published(RELEASED / reference, RELEASED / samples, inception_space(device="cuda" if torch.cuda.is_available() else "cpu"), published)


def measured_equals_published(reference, samples, space, published):
    result = evaluate(reference, samples, space, cache=RELEASED / "features" if RELEASED in samples.parents else None)
    assert list(result.metrics) == ["inception_score", "fid", "sfid", "precision", "recall"]
    for (name, found), expected, tolerance in zip(result.metrics.items(), published, (0.2, 0.003, 0.003, 0.0005, 0.0005), strict=True):
        assert found == pytest.approx(expected, abs=tolerance), name


def test_the_released_test_itself_runs(batches, space):
    """On stand-ins: it passes with the right numbers and fails with others."""
    paths = batches / "reference.npz", batches / "samples.npz"
    found = tuple(evaluate(*paths, space).metrics.values())
    measured_equals_published(*paths, space, found)
    with pytest.raises(AssertionError, match="sfid"):
        measured_equals_published(*paths, space, (*found[:2], found[2] + 0.01, *found[3:]))
