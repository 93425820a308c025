"""The evaluator against its peers: same numbers, how much faster. One thread, interleaved rounds, medians.

    pip install torch-fidelity torchmetrics tensorflow-cpu transformers     # the peers; those that are missing are left out
    python benchmarks/evaluator.py --original PATH/TO/guided-diffusion --dinov2 PATH/TO/dinov2 --out benchmarks/results/evaluator.json
    python benchmarks/evaluator.py --only memory --memory-images 50000    # writes a 39 GB batch to --scratch

Features are synthetic, with the spectrum of a deep network's (eigenvalues ~ k^-1.2, non-negative); Inception has
random weights. Nothing is downloaded.
"""
import argparse
import contextlib
import importlib
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import types
import warnings
import zipfile
from pathlib import Path
from unittest.mock import MagicMock

for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(variable, "1")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np
import torch
from PIL import Image
from scipy import linalg

from adm_repro.evaluation import evaluate, measure_images, save_reference
from adm_repro.features import DinoSpace, FeatureSpace, InceptionSpace
from adm_repro.inception import Inception, load_inception
from adm_repro.metrics import feature_statistics, frechet_distance, inception_score, kernel_distance, precision_recall
from adm_repro.runs import hardware
from adm_repro.sources import open_images

SECTIONS = ("frechet", "precision_recall", "inception", "dinov2", "kernel", "inception_score", "reference", "whole", "memory")


def torch_fidelity(module: str):
    """A module of torch-fidelity, which asks for torchvision: a stand-in where that does not import beside this torch."""
    try:
        importlib.import_module("torchvision")
    except Exception:
        for name in ("", ".transforms", ".transforms.functional", ".datasets", ".models", ".utils"):
            sys.modules[f"torchvision{name}"] = MagicMock(__spec__=types.SimpleNamespace(name=f"torchvision{name}"))
    return importlib.import_module(f"torch_fidelity.{module}")


def original(checkout: str):
    """The original's evaluator module; it predates numpy 1.24."""
    np.bool = bool
    sys.path.insert(0, str(Path(checkout) / "evaluations"))
    return importlib.import_module("evaluator")


def synthetic(n: int, seed: int, shift: float = 0.0, d: int = 2048) -> np.ndarray:
    rotation = np.linalg.qr(np.random.default_rng(99).standard_normal((d, d)))[0]
    spectrum = np.arange(1, d + 1) ** -1.2
    spectrum *= 170 / spectrum.sum()
    x = np.random.default_rng(seed).standard_normal((n, d)) * np.sqrt(spectrum)
    return (np.abs(x @ rotation.T + shift) * 0.6 + 0.2).astype(np.float32)


def interleaved(functions: dict, rounds: int, warm_up: bool = True) -> dict:
    """name -> (result, median seconds); every round calls each function once."""
    seconds, results = {name: [] for name in functions}, {}
    for number in range(rounds + warm_up):
        for name, function in functions.items():
            start = time.perf_counter()
            results[name] = function()
            if number >= warm_up:
                seconds[name].append(time.perf_counter() - start)
    return {name: (results[name], statistics.median(seconds[name])) for name in functions}


class Benchmark:
    def __init__(self, options):
        self.options, self.rows = options, []

    def compare(self, what: str, timed: dict, difference, ours: str = "adm_repro", per: int | None = None) -> None:
        result, seconds = timed[ours]
        for name, (other, other_seconds) in timed.items():
            row = {"what": what, "who": name, "seconds": round(other_seconds, 3)}
            if per:
                row["images_per_second"] = round(per / other_seconds, 2)
            if name != ours:
                row |= {"speedup": round(other_seconds / seconds, 2), "difference": difference(result, other)}
            self.note(row)

    def note(self, row: dict) -> None:
        self.rows.append(row)
        print("  ".join(f"{key} {value:.3g}" if isinstance(value, float) else f"{key} {value}" for key, value in row.items()), flush=True)

    def optional(self, add) -> None:
        """Add a peer if it is installed."""
        try:
            add()
        except ImportError as error:
            print(f"left out: {error}", flush=True)

    def frechet(self) -> None:
        a, b = synthetic(10_000, 1), synthetic(10_000, 2, 0.05)
        ours, theirs = feature_statistics(a), feature_statistics(b)
        functions = {"adm_repro": lambda: frechet_distance(ours, theirs)}

        def scipys():
            root = linalg.sqrtm(ours.covariance @ theirs.covariance)
            return float(((ours.mean - theirs.mean) ** 2).sum() + np.trace(ours.covariance + theirs.covariance) - 2 * np.trace(root).real)

        functions["scipy sqrtm"] = scipys

        def add_fidelity():
            fid = torch_fidelity("metric_fid")
            stats = [{"mu": s.mean, "sigma": s.covariance} for s in (ours, theirs)]
            functions["torch-fidelity"] = lambda: next(iter(fid.fid_statistics_to_metric(*stats, verbose=False).values()))

        def add_torchmetrics():
            torch_fidelity("metric_fid")  # the stand-in for torchvision
            fid = importlib.import_module("torchmetrics.image.fid")
            tensors = [torch.from_numpy(x) for s in (ours, theirs) for x in (s.mean, s.covariance)]
            functions["torchmetrics"] = lambda: float(fid._compute_fid(*tensors))

        self.optional(add_fidelity)
        self.optional(add_torchmetrics)
        if self.options.original:
            module = original(self.options.original)
            stats = [module.FIDStatistics(s.mean, s.covariance) for s in (ours, theirs)]
            functions["original evaluator"] = lambda: float(stats[0].frechet_distance(stats[1]))
        self.compare("Frechet distance, 2048 features", interleaved(functions, self.options.rounds), lambda x, y: abs(x - y) / y)
        timed = interleaved({"adm_repro": lambda: feature_statistics(a).covariance, "numpy cov": lambda: np.cov(a, rowvar=False)}, self.options.rounds)
        self.compare("covariance of 10,000 x 2048", timed, lambda x, y: float(np.abs(x - y).max() / np.abs(y).max()))

    def precision_recall(self) -> None:
        n = self.options.count
        a, b = synthetic(n, 1), synthetic(n, 2, 0.03)
        functions = {"adm_repro": lambda: precision_recall(a, b), "adm_repro, float32": lambda: precision_recall(a, b, distances="float32")}

        def add_fidelity():
            prc = torch_fidelity("metric_prc")
            real, fake = torch.from_numpy(a), torch.from_numpy(b)
            functions["torch-fidelity"] = lambda: tuple(float(x) for x in prc.calculate_precision_recall_full(fake, real))

        def add_original():
            module, tf = original(self.options.original), importlib.import_module("tensorflow.compat.v1")
            session = tf.Session(config=tf.ConfigProto(intra_op_parallelism_threads=1, inter_op_parallelism_threads=1))
            estimator = module.ManifoldEstimator(session)
            module.cpu_count = lambda: 1  # its partition uses all cores

            def run():
                found = estimator.evaluate_pr(a, estimator.manifold_radii(a), b, estimator.manifold_radii(b))
                return float(found[0][0]), float(found[1][0])

            functions["original evaluator"] = run

        self.optional(add_fidelity)
        if self.options.original:
            self.optional(add_original)
        timed = interleaved(functions, self.options.rounds, warm_up=False)
        self.compare(f"precision and recall, {n} against {n}", timed, lambda x, y: max(abs(p - q) for p, q in zip(x, y)))
        for name, (found, _) in timed.items():
            print(f"  {name}: {found}")

    def network(self, path: Path) -> None:
        torch.manual_seed(0)
        net = Inception()
        for module in net.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.1)
                module.running_var.uniform_(0.5, 1.5)
            elif isinstance(module, torch.nn.Conv2d):
                torch.nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        torch.save(net.state_dict(), path)

    def inception(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            weights = Path(folder) / "weights.pth"
            self.network(weights)
            ours = load_inception(weights)
            for batch, side in ((64, 64), (16, 256)):
                images = torch.randint(0, 256, (batch, side, side, 3), dtype=torch.uint8)
                functions = {"adm_repro": lambda images=images: ours(images).pool}

                def add_fidelity(images=images, functions=functions):
                    theirs = torch_fidelity("feature_extractor_inceptionv3").FeatureExtractorInceptionV3(
                        "inception-v3-compat", ["2048"], feature_extractor_weights_path=str(weights))
                    channels_first = images.permute(0, 3, 1, 2).contiguous()
                    functions["torch-fidelity"] = lambda: theirs(channels_first)[0]

                self.optional(add_fidelity)
                with torch.inference_mode():
                    timed = interleaved(functions, self.options.rounds)
                self.compare(f"Inception, {batch} images of {side} pixels", timed, lambda x, y: float((x - y).norm() / y.norm()), per=batch)

    def dinov2(self) -> None:
        """The class token of a small DINOv2 with random weights, ours and by the original's code."""
        if not self.options.dinov2:
            return
        sys.path.insert(0, self.options.dinov2)
        transformers, vit = (importlib.import_module(name) for name in ("transformers", "dinov2.models.vision_transformer"))
        torch.manual_seed(0)
        config = transformers.Dinov2Config(hidden_size=64, num_hidden_layers=3, num_attention_heads=4, image_size=518, patch_size=14)
        net = transformers.Dinov2Model(config).eval()
        for parameter in net.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
        theirs = vit.DinoVisionTransformer(img_size=518, patch_size=14, embed_dim=64, depth=3, num_heads=4, init_values=1.0, block_chunks=0,
                                           interpolate_antialias=False, interpolate_offset=0.1).eval()
        state = net.state_dict()
        for part in ("weight", "bias"):
            for i in range(3):
                names = [f"encoder.layer.{i}.attention.{x}_proj.{part}" for x in "qkv"]
                state[f"blocks.{i}.attn.qkv.{part}"] = torch.cat([state.pop(name) for name in names])
        for old, new in (("encoder.layer.", "blocks."), ("attention.o_proj", "attn.proj"), ("layer_scale1.lambda1", "ls1.gamma"), ("layer_scale2.lambda1", "ls2.gamma"),
                         ("embeddings.patch_embeddings.projection", "patch_embed.proj"), ("embeddings.position_embeddings", "pos_embed"), ("embeddings.", ""),
                         ("layernorm.", "norm.")):
            state = {key.replace(old, new): value for key, value in state.items()}
        theirs.load_state_dict(state)
        images = np.random.default_rng(0).integers(0, 256, (4, 64, 64, 3), dtype=np.uint8)
        resized = np.stack([np.asarray(Image.fromarray(image).resize((224, 224), Image.Resampling.BICUBIC)) for image in images])
        x = torch.from_numpy((resized / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]).permute(0, 3, 1, 2).float()
        with torch.no_grad():
            expected, library = theirs(x), net(x).last_hidden_state[:, 0]
            ours = DinoSpace(net).layers(images)["class_token"]
        for who, found in (("adm_repro", ours), ("transformers as it is", library)):
            self.note({"what": "DINOv2's class token against the original code, share of its spread", "who": who,
                       "difference": float((found - expected).abs().max() / expected.std())})

    def kernel(self) -> None:
        a, b = synthetic(2000, 1), synthetic(2000, 2, 0.05)
        functions = {"adm_repro": lambda: kernel_distance(a, b, 2000, 1)[0]}

        def add_fidelity():
            kid = torch_fidelity("metric_kid")
            settings = dict(kid_subsets=1, kid_subset_size=2000, verbose=False)  # all images: the same ones on both sides
            for name, cast in (("torch-fidelity", torch.float32), ("torch-fidelity in float64", torch.float64)):
                tensors = [torch.from_numpy(x).to(cast) for x in (a, b)]
                functions[name] = lambda tensors=tensors: kid.kid_features_to_metric(*tensors, **settings)["kernel_inception_distance_mean"]

        self.optional(add_fidelity)
        self.compare("kernel distance, 2000 images", interleaved(functions, self.options.rounds), lambda x, y: float(abs(x - y) / y))

    def inception_score(self) -> None:
        a, w = synthetic(12_000, 1), np.random.default_rng(3).standard_normal((2048, 1008)).astype(np.float32) * 0.1

        def ours():
            return inception_score(np.concatenate([torch.from_numpy(a[i:i + 512] @ w).softmax(1).double().numpy() for i in range(0, len(a), 512)]))

        functions = {"adm_repro": ours}

        def add_original():
            module, tf = original(self.options.original), importlib.import_module("tensorflow.compat.v1")
            evaluator = module.Evaluator.__new__(module.Evaluator)  # its constructor downloads the graph; this is the part behind it
            with tf.Graph().as_default():
                evaluator.softmax_input = tf.placeholder(tf.float32, shape=[None, 2048])
                evaluator.softmax = tf.nn.softmax(tf.matmul(evaluator.softmax_input, tf.constant(w)))
                evaluator.sess = tf.Session(config=tf.ConfigProto(intra_op_parallelism_threads=1, inter_op_parallelism_threads=1))
            evaluator.softmax_batch_size = 512
            functions["original evaluator"] = lambda: evaluator.compute_inception_score(a)

        if self.options.original:
            self.optional(add_original)
        self.compare("inception score, 12,000 images, splits of 5,000", interleaved(functions, self.options.rounds), lambda x, y: abs(x - y) / y)

    def reference(self) -> None:
        """Does the original read a reference batch that we wrote?"""
        if not self.options.original:
            return
        module = original(self.options.original)
        with tempfile.TemporaryDirectory() as folder:
            weights, path = Path(folder) / "weights.pth", Path(folder) / "reference.npz"
            self.network(weights)
            net = load_inception(weights)
            images = np.random.default_rng(0).integers(0, 256, (24, 32, 32, 3), dtype=np.uint8)
            save_reference(images, path, InceptionSpace(net), keep=16)
            with module.open_npz_array(str(path), "arr_0") as reader:
                stored = np.concatenate(list(reader.read_batches(5)))
            pool, spatial = module.Evaluator.read_statistics(None, str(path), None)
            ours = open_images(path)
            same = (np.array_equal(stored, next(ours.read(16))) and np.array_equal(pool.sigma, ours.statistics[""].covariance)
                    and np.array_equal(spatial.mu, ours.statistics["_s"].mean))
            self.note({"what": "the original reads our reference batch: images, mu, sigma, mu_s, sigma_s equal", "who": "original evaluator", "equal": bool(same)})

    def whole(self) -> None:
        n = 10_000
        torch.manual_seed(0)
        net = Inception(weights_sha256="0" * 64).fold()
        known = {}

        class Known(InceptionSpace):
            """Inception's space, with features that are known already."""

            def layers(self, images):
                i = images[:, 0, 0].astype(np.int64) @ [1, 256, 65536]
                return {"pool": torch.from_numpy(known["pool"][i]), "spatial": torch.from_numpy(known["spatial"][i])}

        space = Known(net)
        numbers = np.arange(n)
        images = np.zeros((n, 8, 8, 3), np.uint8) + np.stack([numbers % 256, numbers // 256, 0 * numbers], 1)[:, None, None].astype(np.uint8)
        sources = [images, np.concatenate([images[:, :, :, :2], images[:, :, :, 2:] + 0], 3)]
        sources[1][:, 1, 1, 2] = 1  # other content, the same numbers
        with tempfile.TemporaryDirectory() as folder:
            for seed, source in enumerate(sources):
                known.update(pool=synthetic(n, seed, 0.03 * seed), spatial=synthetic(n, 10 + seed, 0.03 * seed, 2023))
                measure_images(open_images(source), space, ["pool"], None, folder, 1000)
            known.clear()  # from here on only the cache knows
            for _ in range(2):
                start = time.perf_counter()
                result = evaluate(*sources, space, cache=folder)
                seconds = time.perf_counter() - start
        self.note({"what": "five metrics, 10,000 against 10,000, from cached features", "who": "adm_repro", "seconds": round(seconds, 2)})
        print(f"  {result.metrics}")

    def memory(self) -> None:
        n = self.options.memory_images
        path = Path(self.options.scratch or tempfile.gettempdir()) / "adm_repro_memory.npz"
        rng = np.random.default_rng(0)
        noise = rng.integers(0, 256, (512 * 512 * 3 + n,), dtype=np.uint8)
        try:
            with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive, archive.open("arr_0.npy", "w", force_zip64=True) as file:
                np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": (n, 512, 512, 3)})
                for i in range(n):
                    file.write(noise[i:i + 512 * 512 * 3].data)  # every image differs
            start = time.perf_counter()
            child = subprocess.run([sys.executable, __file__, "--memory-child", str(path)], check=True, capture_output=True, text=True)
            peak = json.loads(child.stdout.splitlines()[-1])
            self.note({"what": f"{n} images of 512 pixels ({path.stat().st_size / 1e9:.1f} GB), FID-sized features, precision and recall", "who": "adm_repro",
                       "seconds": round(time.perf_counter() - start, 1), **peak})
        finally:
            path.unlink(missing_ok=True)


class Sums(FeatureSpace):
    """As many numbers as Inception gives, for next to nothing: products of pixel sums."""

    name, sha256, in_papers = "sums", "0" * 64, False
    lengths, frechet_names, suffixes = {"pool": 2048, "spatial": 2023}, {"pool": "d", "spatial": "s"}, {}
    metric_names = {"precision": "precision", "recall": "recall"}

    def check(self, shape):
        pass

    def layers(self, images):
        sums = torch.from_numpy(images[:, ::64, ::64].reshape(len(images), -1).astype(np.float32) / 255)
        mix = torch.randn(sums.shape[1], 4071, generator=torch.Generator().manual_seed(0)) / sums.shape[1] ** 0.5
        features = torch.relu(sums @ mix)
        return {"pool": features[:, :2048], "spatial": features[:, 2048:]}


def memory_child(path: str) -> None:
    rng = np.random.default_rng(1)
    reference = rng.integers(0, 256, (1000, 512, 512, 3), dtype=np.uint8)
    result = evaluate(reference, path, Sums())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(json.dumps({"samples": result.samples, "peak_gib": round(peak, 2), "of_which_reference_array_gib": round(reference.nbytes / 2**30, 2)}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--original", help="a checkout of openai/guided-diffusion")
    parser.add_argument("--dinov2", help="a checkout of facebookresearch/dinov2")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--count", type=int, default=10_000, help="images of the precision and recall comparison")
    parser.add_argument("--only", nargs="*", choices=SECTIONS, default=[s for s in SECTIONS if s != "memory"])
    parser.add_argument("--memory-images", type=int, default=50_000)
    parser.add_argument("--scratch", help="folder for the large file of the memory section")
    parser.add_argument("--out", help="JSON file; sections that were not run keep their rows")
    parser.add_argument("--memory-child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.memory_child:
        return memory_child(options.memory_child)
    benchmark, results = Benchmark(options), {}
    if options.out and Path(options.out).exists():
        results = json.loads(Path(options.out).read_text())
    for section in options.only:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            getattr(benchmark, section)()
        packages = {}
        for name in ("numpy", "scipy", "torch", "torch_fidelity", "torchmetrics", "tensorflow"):
            with contextlib.suppress(ImportError):
                packages[name] = getattr(sys.modules.get(name), "__version__", None)
        results[section] = {"rows": benchmark.rows, "hardware": hardware(), "threads": 1, "rounds": options.rounds, "python": platform.python_version(),
                            "packages": {name: version for name, version in packages.items() if version}}
        benchmark.rows = []
        if options.out:
            Path(options.out).write_text(json.dumps(results, indent=1) + "\n")
    return None


if __name__ == "__main__":
    main()
