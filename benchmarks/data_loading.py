"""Images per second and core from folders, tar shards and LMDB, beside the released loader and what a GPU needs. One thread, interleaved rounds, medians.

    pip install blobfile mpi4py     # the released loader imports both; without them the first is Python's open, the second one process
    python benchmarks/data_loading.py --original PATH/TO/guided-diffusion --out benchmarks/results/data_loading.json

The images are pieces of scikit-learn's two photographs with some grain: JPEG of 500x375 pixels at quality 90 (ImageNet's files
have some 110 KB on average, these 78); WebP with a shorter side of 256 as LSUN's. They lie in the page cache: a disk may be slower. Times are processor time, so that neighbours matter less,
but for the index.
"""
import argparse
import importlib
import importlib.metadata
import importlib.util
import io
import json
import os
import platform
import statistics
import sys
import tarfile
import tempfile
import time
import types
from contextlib import suppress
from pathlib import Path

for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(variable, "1")

import lmdb
import numpy as np
import torch
from PIL import Image, features
from sklearn.datasets import load_sample_images
from torch.utils.data import default_collate

from adm_repro.data import decoded, to_float, training_batch, training_batches
from adm_repro.paper import entry
from adm_repro.runs import hardware
from adm_repro.shards import open_folder, open_lmdb, open_tar_shards

SECTIONS = ("read", "workers", "halving", "index")
SIZES = (64, 128, 256)
H200 = 0.5 * 790e12  # half of the bf16 products per second that were measured on one: a prediction of a training step, no measurement


def photographs(count: int, seed: int = 0):
    """Pieces of 500x375 pixels, with grain."""
    rng, photos = np.random.default_rng(seed), load_sample_images().images
    for number in range(count):
        photo = photos[number % len(photos)]
        top, left = (int(rng.integers(length - piece + 1)) for length, piece in zip(photo.shape, (375, 500)))
        piece = photo[top:top + 375, left:left + 500] + rng.normal(0, 6, (375, 500, 1))
        yield Image.fromarray(np.clip(piece, 0, 255).astype(np.uint8)[:, ::int(rng.choice([-1, 1]))].copy())


def encode(image: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    tar.addfile(info, io.BytesIO(content))


def write(folder: Path, count: int) -> dict:
    """The same photographs as a folder, as tar shards, and, smaller, as an LMDB."""
    jpeg, webp = [], []
    for image in photographs(count):
        jpeg.append(encode(image, "JPEG", quality=90))
        webp.append(encode(image.resize((341, 256), Image.Resampling.BICUBIC), "WEBP", quality=75))
    (folder / "files").mkdir()
    for number, content in enumerate(jpeg):
        (folder / "files" / f"{'ab'[number % 2]}_{number:05d}.jpg").write_bytes(content)
    names = sorted(path.name for path in (folder / "files").iterdir())
    for shard in range(4):
        with tarfile.open(folder / f"{shard:06d}.tar", "w") as tar:
            for name in names[shard * len(names) // 4:(shard + 1) * len(names) // 4]:
                add(tar, name, (folder / "files" / name).read_bytes())
                add(tar, name.replace(".jpg", ".cls"), b"%d" % "ab".index(name[0]))
    with lmdb.open(str(folder / "photos_train_lmdb"), map_size=1 << 30) as base, base.begin(write=True) as transaction:
        for number, content in enumerate(webp):
            transaction.put(b"%040d" % number, content)
    return {"jpeg_kilobytes": round(statistics.mean(map(len, jpeg)) / 1000, 1), "webp_kilobytes": round(statistics.mean(map(len, webp)) / 1000, 1)}


def released_loader(checkout: str):
    """The original's image_datasets module."""
    stand_ins = []
    try:
        importlib.import_module("blobfile")
    except ImportError:
        sys.modules["blobfile"] = types.SimpleNamespace(BlobFile=open, listdir=os.listdir, join=os.path.join, isdir=os.path.isdir, basename=os.path.basename)
        stand_ins.append("blobfile")
    try:
        importlib.import_module("mpi4py.MPI")
    except ImportError:
        world = types.SimpleNamespace(Get_rank=lambda: 0, Get_size=lambda: 1)
        sys.modules["mpi4py"] = types.SimpleNamespace(MPI=types.SimpleNamespace(COMM_WORLD=world))
        stand_ins.append("mpi4py")
    spec = importlib.util.spec_from_file_location("image_datasets", Path(checkout) / "guided_diffusion" / "image_datasets.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module, stand_ins


def interleaved(functions: dict, rounds: int, clock) -> dict:
    """name -> seconds of each round; every round calls each function once, after one that is not counted."""
    seconds = {name: [] for name in functions}
    for number in range(rounds + 1):
        for name, function in functions.items():
            start = clock()
            function()
            if number:
                seconds[name].append(clock() - start)
    return seconds


def needed(size: int) -> dict:
    """Images per second that training ADM at this size consumes, per GPU."""
    table = entry("table7")
    v100 = next(row["imgs_per_v100_sec"] for row in table.groups[""] if row["model"] == f"{size}x{size}" and row["implementation"] == "optimized")
    return {"V100, Table 7": v100, "H200, predicted": round(H200 / (6e9 * table.facts["derived_check"][f"{size}x{size}"]["forward_gmacs"]), 1)}


class Benchmark:
    def __init__(self, options, folder: Path, files: dict):
        self.options, self.folder, self.files, self.rows = options, folder, files, []

    def note(self, row: dict) -> None:
        self.rows.append(row)
        print("  ".join(f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in row.items()), flush=True)

    def datasets(self, size: int, crop: str = "center") -> dict:
        return {"JPEG folder": decoded(open_folder(self.folder / "files", "prefix"), size, crop=crop), "JPEG tar shards": decoded(open_tar_shards(self.folder), size, crop=crop),
                "WebP LMDB": decoded(open_lmdb(self.folder / "photos_train_lmdb"), size, crop="box" if crop == "center" else crop)}

    def read(self) -> None:
        """One process: decode, resize, crop, flip, scale, and stack to batches of 20."""
        n = self.options.images
        places = torch.arange(n).split(20)
        for size in SIZES:
            for crop in ("center", "random"):
                sets = self.datasets(size, crop)
                functions = {name: lambda dataset=dataset: [training_batch(dataset, 0, batch) for batch in places] for name, dataset in sets.items()}
                agree, extra = {}, {}
                if self.options.original:
                    module, stand_ins = released_loader(self.options.original)
                    paths = module._list_image_files_recursively(str(self.folder / "files"))
                    theirs = module.ImageDataset(size, paths, [0] * n, random_crop=crop == "random")
                    functions["released loader, JPEG folder"] = lambda theirs=theirs: [default_collate([theirs[i] for i in batch.tolist()]) for batch in places]
                    if crop == "center":
                        plain = module.ImageDataset(size, paths, random_flip=False)
                        ours = sets["JPEG tar shards"]
                        agree = {"pixels_equal": all(np.array_equal(plain[i][0], training_batch_of(ours, i)) for i in range(n))}
                    extra = {"stand_ins": stand_ins} if stand_ins else {}
                seconds = interleaved(functions, self.options.rounds, time.process_time)
                for name, values in seconds.items():
                    rate = n / statistics.median(values)
                    row = {"what": name, "size": size, "crop": "box" if crop == "center" and "LMDB" in name else crop, "images_per_second_and_core": round(rate, 1)}
                    if name.startswith("released"):
                        ratios = [other / own for other, own in zip(values, seconds["JPEG folder"])]
                        row |= {"ours_is_faster_by": round(statistics.median(ratios), 3), "from_to": [round(min(ratios), 3), round(max(ratios), 3)], **agree, **extra}
                    else:
                        row["cores_per_gpu"] = {gpu: round(images / rate, 2) for gpu, images in needed(size).items()}
                    self.note(row)
        self.note({"what": "what a GPU needs, images per second", **{str(size): needed(size) for size in SIZES}})

    def workers(self) -> None:
        """What handing batches of 256 from process to process costs: processor time of all of them, with their start and end."""
        for size in SIZES:
            dataset = self.datasets(size)["JPEG tar shards"]

            def run(workers, dataset=dataset):
                steps = (torch.arange(256) + step * 256 for step in range(self.options.steps))
                for _ in training_batches(dataset, 0, steps, workers=workers):
                    pass

            functions = {workers: lambda workers=workers, run=run: run(workers) for workers in (0, 1, 2)}
            seconds = {name: statistics.median(values) for name, values in interleaved(functions, self.options.rounds, lambda: sum(os.times()[:4])).items()}
            for workers, value in seconds.items():
                self.note({"what": "batches of 256, JPEG tar shards", "size": size, "workers": workers, "images_per_second_and_core": round(256 * self.options.steps / value, 1),
                           "of_one_process": round(seconds[0] / value, 3)})

    def halving(self) -> None:
        """Is Pillow's fast halving the box filter? It is not, so it is not used; nor are JPEG's smaller decodings."""
        images = list(photographs(20))
        for side in (374, 375):  # even and odd
            pieces = [image.crop((0, 0, 500, side)) for image in images]
            ways = {"resize with a box filter": lambda pieces=pieces, side=side: [piece.resize((250, side // 2), Image.Resampling.BOX) for piece in pieces],
                    "reduce(2)": lambda pieces=pieces, side=side: [piece.reduce(2).crop((0, 0, 250, side // 2)) for piece in pieces]}
            seconds = interleaved(ways, self.options.rounds, time.process_time)
            exact, fast = (np.stack([np.asarray(image) for image in way()]) for way in ways.values())
            self.note({"what": f"halving 500x{side}", **{name: round(statistics.median(values) / 20 * 1000, 3) for name, values in seconds.items()}, "unit": "ms",
                       "pixels_that_differ": round(float((exact != fast).mean()), 4)})

    def index(self) -> None:
        """The walk over shards and keys that a data set costs once."""
        n = self.options.index_samples
        with tarfile.open(self.folder / "many.tar", "w") as tar:
            for number in range(n):
                add(tar, f"{number:08d}.jpg", bytes(110_000 if number % 10 == 0 else 2000))
                add(tar, f"{number:08d}.cls", b"%d" % (number % 1000))
        with lmdb.open(str(self.folder / "many_lmdb"), map_size=1 << 30) as base, base.begin(write=True) as transaction:
            for number in range(n):
                transaction.put(b"%040d" % number, bytes(100))
        for what, path, function, total in (("tar samples with .cls", "many.tar", open_tar_shards, 1_281_167), ("LMDB keys", "many_lmdb", open_lmdb, 3_033_042)):
            seconds = []
            for _ in range(2):  # walked, then kept
                start = time.perf_counter()
                function(self.folder / path)
                seconds.append(time.perf_counter() - start)
            self.note({"what": f"index of {what}", "per_second": round(n / seconds[0]), "kept_index_seconds": round(seconds[1], 4), f"minutes_for_{total}": round(total * seconds[0] / n / 60, 2)})


def training_batch_of(dataset, i: int) -> np.ndarray:
    """Image i as training sees it, not mirrored."""
    return to_float(dataset.images([i]))[0].numpy()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--original", help="a checkout of openai/guided-diffusion")
    parser.add_argument("--images", type=int, default=240)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=2, help="batches of the section on workers")
    parser.add_argument("--index-samples", type=int, default=20_000)
    parser.add_argument("--only", nargs="*", choices=SECTIONS, default=SECTIONS)
    parser.add_argument("--out", help="JSON file; sections that were not run keep their rows")
    options = parser.parse_args()
    torch.set_num_threads(1)
    results = json.loads(Path(options.out).read_text()) if options.out and Path(options.out).exists() else {}
    with tempfile.TemporaryDirectory() as folder:
        os.environ["ADM_REPRO_CACHE"] = f"{folder}/cache"
        root = Path(folder) / "data"
        root.mkdir()
        benchmark = Benchmark(options, root, write(root, options.images))
        for section in options.only:
            getattr(benchmark, section)()
            packages = {"numpy": np.__version__, "torch": torch.__version__, "pillow": Image.__version__, "libjpeg_turbo": features.version("libjpeg_turbo"),
                        "webp": features.version("webp"), "lmdb": lmdb.__version__}
            with suppress(importlib.metadata.PackageNotFoundError):
                packages["blobfile"] = importlib.metadata.version("blobfile") if "blobfile" in sys.modules else None
            results[section] = {"rows": benchmark.rows, "files": benchmark.files, "images": options.images, "hardware": hardware(), "threads": 1, "rounds": options.rounds,
                                "python": platform.python_version(), "packages": {name: version for name, version in packages.items() if version}}
            benchmark.rows = []
            if options.out:
                Path(options.out).write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
