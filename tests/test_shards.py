"""The same pixels and labels from folders, tar shards and LMDB; the released code's preprocessing; batches that other processes make; damaged and hostile files."""
import gzip
import hashlib
import io
import json
import os
import random
import re
import subprocess
import tarfile
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import lmdb
import numpy as np
import pytest
import torch
from conftest import load_golden
from PIL import EpsImagePlugin, Image

from adm_repro import data, shards
from adm_repro.batches import open_batch
from adm_repro.data import (
    area_averaged,
    box_crop,
    center_crop,
    dataset_from_arrays,
    decoded,
    load_dataset,
    load_folder,
    load_npz,
    loading_workers,
    random_crop,
    subset,
    to_float,
    training_batch,
    training_batches,
)
from adm_repro.shards import open_folder, open_lmdb, open_tar_shards
from adm_repro.sources import open_images

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning", "ignore:.*multi-threaded, use of fork:DeprecationWarning")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ADM_REPRO_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("ADM_REPRO_DATA", raising=False)
    monkeypatch.delenv("ADM_REPRO_WORKERS", raising=False)


def picture(seed, width, height):
    """The pictures of golden/preprocessing.json."""
    y, x = np.mgrid[:height, :width]
    waves = np.stack([127 + 90 * np.sin(x / (7 + 5 * c + seed) + y / (11 + 3 * c)) for c in range(3)], -1)
    return np.clip(waves + np.random.RandomState(seed).standard_normal((height, width, 3)) * 25, 0, 255).astype(np.uint8)


def encoded(seed, kind="PNG", width=40, height=30):
    file = io.BytesIO()
    Image.fromarray(picture(seed, width, height)).save(file, kind, **({"lossless": True} if kind == "WEBP" else {}))
    return file.getvalue()


def pack(path, members):
    """A tar of (name, content or TarInfo) pairs."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = content if isinstance(content, tarfile.TarInfo) else tarfile.TarInfo(name)
            info.name = name
            if isinstance(content, bytes):
                info.size = len(content)
            tar.addfile(info, io.BytesIO(content) if isinstance(content, bytes) else None)
    return path


def make_lmdb(path, values):
    with lmdb.open(str(path), map_size=1 << 26) as base, base.begin(write=True) as transaction:
        for key, value in values.items():
            transaction.put(key, value)
    return path


@pytest.fixture
def three_kinds(tmp_path):
    """Twelve images of two classes, as a folder, two shards and an LMDB."""
    files = {f"{('ant', 'bee')[i % 2]}/{i:03d}.webp": encoded(i, "WEBP") for i in range(12)}
    for name, content in files.items():
        (tmp_path / "folder" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "folder" / name).write_bytes(content)
    ordered = sorted(files)
    for number, part in enumerate((ordered[:5], ordered[5:])):
        members = [(name, files[name]) for name in part] + [(f"{name[:-5]}.cls", str(int(name.startswith("bee"))).encode()) for name in part]
        pack(tmp_path / "tars" / f"{number:06d}.tar", members)
    make_lmdb(tmp_path / "ant_train_lmdb", {name.encode(): files[name] for name in ordered})
    return tmp_path


def all_three(root, size=16, crop="center"):
    return [decoded(images, size, crop=crop) for images in (open_folder(root / "folder"), open_tar_shards(root / "tars"), open_lmdb(root / "ant_train_lmdb"))]


# The released code's preprocessing

class Scripted:
    """A generator that gives what the released code drew, if it is asked for the same range."""

    def __init__(self, draws):
        self.draws = iter(draws)

    def integers(self, low, high=None):
        first, end, value = next(self.draws)
        assert (first, end) == ((0, low) if high is None else (low, high))
        return value


def test_every_crop_equals_the_released_code_bit_for_bit():
    golden = load_golden("preprocessing.json")
    assert center_crop(Image.fromarray(picture(2, 130, 97)), 8).tolist() == golden["example"]
    pictures = {}
    for case in golden["cases"]:
        key = case["seed"], case["width"], case["height"]
        image = pictures.setdefault(key, Image.fromarray(picture(*key)))
        rng = [Scripted(case["draws"])] if case["crop"] == "random" else []
        found = {"center": center_crop, "random": random_crop, "box": box_crop}[case["crop"]](image, case["size"], *rng)
        assert hashlib.sha256(np.ascontiguousarray(found).tobytes()).hexdigest() == case["sha256"], case


def test_a_folder_equals_the_released_loader_in_order_labels_and_floats(tmp_path):
    golden = load_golden("preprocessing.json")["loader"]
    for i, name in enumerate(golden["files"]):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        pixels = picture(20 + i, 40 + i, 33 + 2 * i)
        Image.fromarray(pixels[..., 0] if i == 2 else pixels).save(tmp_path / name, "PNG")
    dataset = load_folder(tmp_path, 16, label_from="prefix")
    assert dataset.labels.tolist() == golden["labels"]
    assert hashlib.sha256(to_float(dataset.images()).numpy().tobytes()).hexdigest() == golden["sha256"]


# One data set in three forms

def test_folder_shards_and_lmdb_give_equal_pixels_and_labels(three_kinds):
    folder, tars, base = all_three(three_kinds)
    assert np.array_equal(folder.images(), tars.images()) and np.array_equal(folder.images(), base.images())
    assert folder.labels.tolist() == tars.labels.tolist() == [0] * 6 + [1] * 6 and base.labels.tolist() == [0] * 12
    assert decoded(open_tar_shards(three_kinds / "tars", "folder"), 16).class_names == folder.class_names == ("ant", "bee")
    assert len({image.tobytes() for image in folder.images()}) == 12
    for crop in ("center", "random", "box"):
        batches = [training_batch(dataset, 3, torch.arange(5, 20))[0] for dataset in all_three(three_kinds, 12, crop)]
        assert torch.equal(batches[0], batches[1]) and torch.equal(batches[0], batches[2])


def test_load_dataset_knows_each_form_and_its_splits(three_kinds, monkeypatch):
    tars, small = three_kinds / "tars", {"size": 16}
    found = [load_dataset(str(name), **small) for name in (three_kinds / "folder", tars, f"{tars}/{{000000..000001}}.tar", three_kinds / "ant_train_lmdb", three_kinds / "ant_train_lmdb" / "data.mdb")]
    assert [len(dataset) for dataset in found] == [12] * 5
    assert np.array_equal(found[3].images([4]), np.stack([box_crop(Image.fromarray(picture(8, 40, 30)), 16)]))  # LSUN's own crop
    assert len(load_dataset(f"{tars}/000000.tar", **small)) == 5
    for name in (tars, three_kinds / "folder", f"{tars}/000000.tar", three_kinds / "ant_train_lmdb"):
        with pytest.raises(ValueError, match="has no test split"):
            load_dataset(str(name), "test", **small)
    home = three_kinds / "home"
    monkeypatch.setenv("ADM_REPRO_DATA", str(home))
    for number, split in enumerate(("train", "train", "validation")):
        pack(home / "in1k" / f"in1k-{split}-{number}.tar", [(f"{i}.png", encoded(i)) for i in range(number + 1)])
        pack(home / "parts" / ("val" if split == "validation" else split) / f"{number}.tar", [("1.png", encoded(number))])
    make_lmdb(home / "bedroom_train_lmdb", {b"a": encoded(1, "WEBP"), b"b": encoded(2, "WEBP")})
    make_lmdb(home / "bedroom_val_lmdb", {b"c": encoded(3, "WEBP")})
    assert [len(load_dataset(name, split, **small)) for name in ("in1k", "parts", "bedroom") for split in ("train", "test")] == [3, 3, 2, 1, 2, 1]
    assert load_dataset("in1k", crop="random", **small).random_crops and load_dataset("in1k", label_from="none", **small).classes == 1
    for wrong, message in (({"label_from": "sample"}, "3 of 3 images have no label"), ({"crop": "middle"}, "crop must be one of"), ({"label_from": "x"}, "label_from must be one of")):
        with pytest.raises(ValueError, match=message):
            load_dataset("in1k", **small | wrong)
    with pytest.raises(ValueError, match="an LMDB has no labels"):
        load_dataset("bedroom", label_from="folder", **small)
    with pytest.raises(ValueError, match="neither a named data set"):
        load_dataset("bathroom", **small)
    with pytest.raises(ValueError, match="neither a named data set"):
        load_dataset("x-{0..1}.tar", **small)
    with pytest.raises(ValueError, match="1 of 3 shards do not exist"):
        load_dataset("in1k/in1k-train-{0..2}.tar", **small)
    assert len(load_dataset("in1k/in1k-train-{0..1}.tar", **small)) == 3
    with pytest.raises(ValueError, match="must count upwards"):
        load_dataset("in1k-train-{2..1}.tar", **small)
    Image.new("RGB", (9, 9)).save(home / "in1k" / "cover.png")
    with pytest.raises(ValueError, match=r"holds both \.tar files and folders"):
        load_dataset("in1k", **small)


def test_labels_of_samples(tmp_path):
    path = pack(tmp_path / "a.tar", [("1.png", encoded(1)), ("1.cls", b" 3\n"), ("1.json", b'{"label": 9}'), ("2.json", b'{"cls": 1, "caption": "x"}'), ("2.JPG", encoded(2, "JPEG")),
                                     ("2.txt", b"x"), ("._3.png", b"hidden"), ("dir", tarfile.TarInfo()), ("3.png", encoded(3)), ("3.json", b'{"label": "0"}')])
    images = open_tar_shards(path)
    assert images.labels.tolist() == [3, 1, 0] and images.class_names == ("0", "1", "2", "3")
    path = pack(tmp_path / "b.tar", [("1.png", encoded(1)), ("1.json", b'{"width": 40}'), ("2.png", encoded(2)), ("2.json", b"[]")])
    assert open_tar_shards(path).class_names == ("b",)  # nothing is known about classes
    with pytest.raises(ValueError, match=r"2 of 2 images have no label .* 1\.png"):
        open_tar_shards(path, "sample")


def test_images_with_dots_in_their_names_are_taken_or_named(tmp_path, recwarn):
    names = ["a/2.png", "b/img.2.png", "b/n01_val.0003.JPEG", "b/img.1.png"]
    images = open_tar_shards(pack(tmp_path / "dots.tar", [(name, encoded(i, "JPEG" if "JPEG" in name else "PNG")) for i, name in enumerate(names)]))
    assert [images.where(i).rpartition(": ")[2] for i in range(4)] == names and images.labels.tolist() == [0, 1, 1, 1] and not recwarn.list
    assert images.read_bytes(3) == encoded(3)
    masks = [(f"{i}.{end}", content) for i in range(3) for end, content in (("seg.png", b""), ("jpg", encoded(i, "JPEG")), ("cls", b"1"), ("meta.json", b"{" * (1 << 20)), ("2.cls", b"x"))]
    with pytest.warns(UserWarning, match=r"masks\.tar: 0\.seg\.png is a field of a sample .* 2 others"):
        images = open_tar_shards(pack(tmp_path / "masks.tar", masks))
    assert images.labels.tolist() == [1, 1, 1] and images.read_bytes(2) == encoded(2, "JPEG")


@pytest.mark.parametrize("kind", ["folder", "tars", "shards of one folder", "tar"])
def test_a_test_split_is_numbered_as_the_training_split(tmp_path, kind):
    home = tmp_path / "home"

    def write(split, names):
        if kind == "folder":
            for name in names:
                (home / split / name).parent.mkdir(parents=True, exist_ok=True)
                (home / split / name).write_bytes(encoded(1))
        else:
            place = {"tars": f"{split}/0.tar", "shards of one folder": f"x-{split}-0.tar", "tar": f"{split}.tar"}[kind]
            pack(home / place, [(name, encoded(1)) for name in names])

    write("train", ["a/1.png", "b/2.png", "c/3.png", "4.png"])
    write("test", ["b/5.png", "c/6.png", "7.png"])
    train, test = (load_dataset(str(home), split, 16) for split in ("train", "test"))
    by_name = {name: number for number, name in enumerate(train.class_names)}
    whole = next(iter(set(by_name) - {"a", "b", "c"}))
    assert test.class_names == train.class_names and sorted(test.labels.tolist()) == sorted(by_name[name] for name in ("b", "c", whole))
    write("test", ["b/5.png", "d/6.png"])
    with pytest.raises(ValueError, match=r"classes are not among the 4 of the training images .* the first is 'd'"):
        load_dataset(str(home), "test", 16)
    for part in ("train", "x-train-0.tar", "train.tar"):  # alone, the held-out images have classes of their own
        if (home / part).exists():
            (home / part).rename(home / ".gone")
    assert "d" in load_dataset(str(home), "test", 16).class_names


# What is damaged or hostile

@pytest.fixture
def ghostscript(tmp_path, monkeypatch):
    """A program that leaves a mark, in place of Ghostscript, and a file for it."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "gs").write_text(f"#!/bin/sh\ntouch {tmp_path / 'ran'}\nexit 1\n")
    (tmp_path / "bin" / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)  # it has not been looked for
    content = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n%%EndComments\nshowpage\n%%EOF\n"
    with pytest.raises((OSError, subprocess.CalledProcessError)):
        Image.open(io.BytesIO(content)).load()
    (tmp_path / "ran").unlink()  # it does run, if it is let
    return content


def test_no_other_program_runs_for_an_image(tmp_path, ghostscript):
    for i in range(2):
        (tmp_path / "images" / "a").mkdir(parents=True, exist_ok=True)
        (tmp_path / "images" / "a" / f"{i}.png").write_bytes(ghostscript)
    with pytest.raises(ValueError, match=r"a/0\.png is not a readable image \(none of PNG, JPEG"):
        load_dataset(str(tmp_path / "images"))
    with pytest.raises(ValueError, match=r"a/0\.png is not a readable image"):
        open_images(tmp_path / "images")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("size", [(30000, 1), (1, 30000), (330, 10)])
def test_ribbons_are_refused_before_they_are_resized(tmp_path, monkeypatch, size):
    for name in ("resize_shorter_side", "box_crop"):
        monkeypatch.setattr(data, name, lambda *_: pytest.fail("resized"))
    (tmp_path / "a").mkdir()
    for i in range(2):
        Image.new("RGB", size).save(tmp_path / "a" / f"{i}.png")
    for opened in (lambda: load_folder(tmp_path, 256), lambda: load_folder(tmp_path, 256, crop="box"), lambda: open_images(tmp_path, 256)):
        with pytest.raises(ValueError, match=r"a/0\.png is not a readable image \(\d+x\d+ pixels: one side is more than 32 times the other\)"):
            opened()


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_too_many_pixels_are_refused_and_long_shapes_are_not(tmp_path, monkeypatch):
    (tmp_path / "a").mkdir()
    for i in range(2):
        Image.new("RGB", (320, 10)).save(tmp_path / "a" / f"{i}.png")
    assert load_folder(tmp_path, 8).images().shape == (2, 8, 8, 3)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 3199)
    for opened in (lambda: load_folder(tmp_path, 8), lambda: open_images(tmp_path)):
        with pytest.raises(ValueError, match=r"a/0\.png is not a readable image \(320x10 pixels are more than 3199"):
            opened()


@pytest.mark.parametrize(("indexed", "message"), [(False, r"data\.mdb cannot be read .* copy it again"), (True, r"_lmdb: key b'\d+' cannot be read .* copy it again")])
def test_data_bases_with_damaged_pages_are_named(tmp_path, monkeypatch, indexed, message):
    base = make_lmdb(tmp_path / "a_lmdb", {b"%03d" % i: encoded(i, width=90) for i in range(60)})
    whole, found = (base / "data.mdb").read_bytes(), 0
    if indexed:  # before the damage
        names = shards.Names.of(b"%03d" % i for i in range(60))
        monkeypatch.setattr(shards, "_indexed", lambda files, build: {"text": names.text, "ends": names.ends})
    for page in range(2, len(whole) // 4096):
        changed = bytearray(whole)
        changed[page * 4096 + 10] ^= 0xFF  # the kind of the page
        copy = tmp_path / f"{page}_lmdb"
        copy.mkdir()
        (copy / "data.mdb").write_bytes(changed)
        try:
            opened = open_lmdb(copy)
            for i in range(len(opened)):
                opened.read_bytes(i)
        except ValueError as error:
            assert re.search(message, str(error)) and "\n" not in str(error)
            found += 1
        if copy in shards._environments:
            shards._environments.pop(copy)[1].close()
    assert found


def link(kind, target):
    info = tarfile.TarInfo()
    info.type, info.linkname = kind, target
    return info


def long_header(size):
    info = tarfile.TarInfo("1.png")
    info.size = size
    return info.tobuf(tarfile.GNU_FORMAT)


@pytest.mark.parametrize(("members", "message"), [
    ([("/etc/1.png", b"")], "points elsewhere"),
    ([("a/../../1.png", b"")], "points elsewhere"),
    ([("1.png", link(tarfile.SYMTYPE, "/etc/passwd"))], "is a link"),
    ([("1.png", b"x"), ("2.cls", link(tarfile.LNKTYPE, "1.png"))], "is a link"),
    ([("1.png", b"x"), ("1.png", b"y")], "another image"),
    ([("1.png", b"x"), ("1.jpeg", b"y")], "another image"),
    ([("1.png", b"x"), ("1.cls", b"1"), ("1.cls", b"2")], r"another \.cls"),
    ([("1.cls", b"1")], "has a label, but no image"),
    ([("1.png", b"x"), ("1.cls", b"1" * 65)], "has 65 bytes, more than"),
    *[([("1.png", b"x"), ("1.cls", value)], "a label is a whole number") for value in (b"-1", b"1.0", b"", b"cat", b"1_0", "٣".encode(), b"1048576", b"9" * 60, b"\xff")],
    *[([("1.png", b"x"), ("1.json", value)], "a label is a whole number") for value in (b'{"label": true}', b'{"label": 1.5}', b'{"label": "cat"}', b'{"cls": [1]}', b'{"label": 1e5}')],
    *[([("1.png", b"x"), ("1.json", value)], "is not JSON") for value in (b"{", b"\xff\xfe\xfa", b"[" * 100_000)],
    ([("1.png", b"x"), ("2.png", b"x"), ("2.cls", b"0")], r"1 of 2 images have no label .* 1\.png"),
    ([("inner.tar", b"x")], "no images"),
    ([("1.2.png", b"x"), ("1.2.cls", b"3")], "one dot in each name"),
    ([("1.2.png", b"x"), ("1.cls", b"3")], "one dot in each name"),
    ([("1.json", b"{}"), ("1.left.png", b"x"), ("1.right.png", b"x")], "one dot in each name"),
    ([("1.2.png", link(tarfile.SYMTYPE, "/etc/passwd"))], "is a link"),
    ([], "no images"),
])
def test_wrong_members_are_named(tmp_path, members, message):
    with pytest.raises(ValueError, match=message) as error:
        open_tar_shards(pack(tmp_path / "bad.tar", members))
    assert "bad.tar" in str(error.value) and "\n" not in str(error.value)
    assert not list((tmp_path / "cache").rglob("*.npz")) or "no images" in message or "have no label" in message  # no index of what is wrong


@pytest.mark.parametrize(("content", "message"), [
    (gzip.compress(b"x" * 999, mtime=0), r"compressed \(gzip\).*unpack it to a plain"),
    (b"\x28\xb5\x2f\xfd" + bytes(999), r"compressed \(zstd\)"),
    (b"", "damaged or not whole"),
    (b"<html>not found</html>" * 99, "damaged or not whole"),
    (long_header(1 << 40) + bytes(1024), r"has 1099511627776 bytes, more than"),
    (long_header(5000) + bytes(1024), "damaged or not whole"),
])
def test_wrong_files_are_named(tmp_path, content, message):
    (tmp_path / "bad.tar").write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        open_tar_shards(tmp_path / "bad.tar")
    assert "\n" not in str(error.value)


def test_a_negative_size_does_not_loop(tmp_path):
    header = bytearray(long_header(0))
    header[124:136] = (-512).to_bytes(12, "big", signed=True)
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    (tmp_path / "bad.tar").write_bytes(pack(tmp_path / "good.tar", [("0.png", b"x")]).read_bytes()[:1024] + header + bytes(10240))
    with pytest.raises(ValueError, match="damaged or not whole"):
        open_tar_shards(tmp_path / "bad.tar")


def test_any_damaged_byte_is_refused_or_harmless(tmp_path):
    """500 tars with a changed or missing part: an error in one line, or an index that stays within the file."""
    whole = pack(tmp_path / "good.tar", [(f"a/{i}.{end}", content) for i in range(3) for end, content in (("png", b"x" * 700), ("cls", b"1"), ("json", b"{}"))]).read_bytes()
    draw, refused = random.Random(0), 0
    for _ in range(500):
        changed = bytearray(whole[:draw.randrange(len(whole)) if draw.random() < 0.2 else len(whole)])
        for _ in range(draw.randrange(4)):
            if changed:
                changed[draw.randrange(len(changed))] = draw.choice((0, 0x80, 0xFF, draw.randrange(256)))
        (tmp_path / "bad.tar").write_bytes(changed)
        try:
            found = shards._scan_shard(tmp_path / "bad.tar")
        except ValueError as error:
            assert "\n" not in str(error)
            refused += 1
        else:
            assert len(found) == 3 and all(start > 0 and start + size <= len(changed) and size == 700 for _, start, size, _ in found)
    assert 100 < refused < 500


def test_compressed_or_missing_shards_of_a_folder_are_named(tmp_path):
    (tmp_path / "0.tar.gz").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"holds no \.tar, but 0\.tar\.gz: unpack"):
        load_dataset(str(tmp_path))
    pack(tmp_path / "s-0.tar", [("1.png", encoded(0))])
    with pytest.raises(ValueError, match=r"1 of 2 shards do not exist, the first is .*s-1\.tar"):
        open_tar_shards(f"{tmp_path}/s-{{0..1}}.tar")


def test_wrong_data_bases_are_named(tmp_path, monkeypatch):
    base = make_lmdb(tmp_path / "a_lmdb", {b"%03d" % i: os.urandom(9000) for i in range(40)})
    with pytest.raises(ValueError, match=r"a_lmdb: key b'000' is not a readable image \(none of PNG, JPEG, GIF, BMP, WEBP\)"):
        load_dataset(str(base))
    cut = tmp_path / "cut_lmdb"
    cut.mkdir()
    (cut / "data.mdb").write_bytes((base / "data.mdb").read_bytes()[:100_000])
    with pytest.raises(ValueError, match=r"has 100000 bytes, but its records say .* copy it again"):
        open_lmdb(cut)
    with pytest.raises(ValueError, match="is empty"):
        open_lmdb(make_lmdb(tmp_path / "none_lmdb", {}))
    (tmp_path / "data.mdb").write_bytes(b"<html>")
    with pytest.raises(ValueError, match="cannot be read as an LMDB"):
        open_lmdb(tmp_path)
    monkeypatch.setitem(__import__("sys").modules, "lmdb", None)
    with pytest.raises(ImportError, match=r"pip install 'adm_repro\[data\]'"):
        open_lmdb(make_copy(base, tmp_path / "other_lmdb"))


def make_copy(folder, to):
    to.mkdir()
    (to / "data.mdb").write_bytes((folder / "data.mdb").read_bytes())
    return to


@pytest.mark.parametrize("damage", [lambda content: content[:300], lambda content: b"<html>", lambda content: content[:60] + bytes(60) + content[120:]])
def test_a_damaged_image_is_named_when_it_is_read(tmp_path, damage):
    path = pack(tmp_path / "a.tar", [("0.png", encoded(0)), ("1.png", damage(encoded(1)))])
    dataset = decoded(open_tar_shards(path), 16)
    for workers in (0, 1):
        with pytest.raises(ValueError, match=r"a\.tar: 1\.png is not a readable image .*remove or replace it") as error:
            list(training_batches(dataset, 0, [torch.arange(2)], workers=workers))
        assert "\n" not in str(error.value)


def odd_archive(path, kind, names):
    """An .npz file of these two arrays that cannot be read: with a password, of an unknown compression, of a size that no memory has, or with a broken list of its parts."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        for name, shape, dtype in zip(names, ((4, 8, 8, 3), (1 << 50,) if kind == "size" else (4,)), ("|u1", "<i8")):
            part = io.BytesIO()
            np.lib.format.write_array_header_1_0(part, {"descr": dtype, "fortran_order": False, "shape": shape})
            archive.writestr(f"{name}.npy", part.getvalue() + bytes(768 if len(shape) == 4 else 32))
    changed = bytearray(content.getvalue())
    for start, flags, method in ((b"PK\3\4", 6, 8), (b"PK\1\2", 8, 10)):
        for found in re.finditer(re.escape(start), bytes(changed)):
            if kind == "password":
                changed[found.start() + flags] |= 1
            if kind == "compression" and (start == b"PK\3\4" or b"arr_0" not in changed[found.start():found.start() + 60]):
                changed[found.start() + method] = 99
            if kind == "list" and start == b"PK\1\2":
                changed[found.start()] = 0
    path.write_bytes(changed)
    return path


@pytest.mark.parametrize("kind", ["password", "compression", "size", "list"])
def test_archives_that_cannot_be_read_are_named(tmp_path, kind):
    batch, dataset = odd_archive(tmp_path / "odd.npz", kind, ("arr_0", "arr_1")), odd_archive(tmp_path / "both.npz", kind, ("train_images", "train_labels"))
    assert zipfile.is_zipfile(batch)
    for message, opened in ((r"odd\.npz cannot be read as an \.npz file", lambda: load_npz(batch)), (r"both\.npz cannot be read as an \.npz file", lambda: load_dataset(str(dataset))),
                            (r"odd\.npz is damaged or no plain batch", lambda: open_batch(batch))):
        with pytest.raises(ValueError, match=message) as error:
            opened()
        assert "\n" not in str(error.value)


# The index

def test_the_index_is_made_once_and_again_when_a_shard_changes(three_kinds, monkeypatch):
    walked, scan = [], shards._scan_shard
    monkeypatch.setattr(shards, "_scan_shard", lambda path: walked.append(path.name) or scan(path))
    tars = three_kinds / "tars"
    first = open_tar_shards(tars).labels
    assert open_tar_shards(tars, "folder").labels.tolist() == first.tolist() and walked == ["000000.tar", "000001.tar"]
    size = (tars / "000001.tar").stat().st_size
    pack(tars / "000001.tar", [("x/9.webp", encoded(9, "WEBP")), ("x/9.cls", b"4")])
    changed = open_tar_shards(tars)
    assert changed.labels.tolist() == [*first[:5], 4] and walked[2:] == ["000000.tar", "000001.tar"]
    same_size = tars / "000001.tar"
    same_size.write_bytes(pack(three_kinds / "z.tar", [("x/7.webp", encoded(9, "WEBP")), ("x/7.cls", b"5")]).read_bytes())
    os.utime(same_size, ns=(1, 1))  # of another time
    assert same_size.stat().st_size <= size and open_tar_shards(tars).labels.tolist()[-1] == 5
    before = same_size.stat()
    same_size.write_bytes(pack(three_kinds / "z.tar", [("x/7.webp", encoded(9, "WEBP")), ("x/7.cls", b"6")]).read_bytes())
    os.utime(same_size, ns=(1, 1))  # of the same size and time
    assert (before.st_size, before.st_mtime_ns) == (same_size.stat().st_size, 1) and open_tar_shards(tars).labels.tolist()[-1] == 6
    pack(tars / "000002.tar", [("y.webp", encoded(3, "WEBP")), ("y.cls", b"0")])
    assert len(open_tar_shards(tars)) == 7


def test_a_damaged_index_and_a_cache_that_cannot_be_written_do_no_harm(three_kinds, monkeypatch):
    expected = open_tar_shards(three_kinds / "tars").labels.tolist()
    index, = (three_kinds / "cache").rglob("*.npz")
    for content in (b"", b"x" * 99, index.read_bytes()[:-300]):
        index.write_bytes(content)
        assert open_tar_shards(three_kinds / "tars").labels.tolist() == expected
    monkeypatch.setenv("ADM_REPRO_CACHE", str(index))  # a file, not a folder
    assert open_tar_shards(three_kinds / "tars").labels.tolist() == expected


def test_a_shard_that_shrinks_later_is_noticed(tmp_path):
    path = pack(tmp_path / "a.tar", [("0.png", encoded(0)), ("1.png", encoded(1))])
    images = open_tar_shards(path)
    os.truncate(path, 2000)
    with pytest.raises(ValueError, match=r"a\.tar: 1\.png is no longer whole"):
        images.read_bytes(1)


def forked(function):
    """Run in a forked process; True if it returned True."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            status = 0 if function() else 1
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_one_of_many_processes_makes_the_index(three_kinds, monkeypatch):
    notes, scan = three_kinds / "notes", shards._scan_shard

    def slow(path):
        with notes.open("a") as file:
            file.write(path.name + "\n")
        time.sleep(0.2)
        return scan(path)

    monkeypatch.setattr(shards, "_scan_shard", slow)
    with ThreadPoolExecutor(3) as pool:
        assert all(pool.map(lambda _: forked(lambda: len(open_tar_shards(three_kinds / "tars")) == 12), range(3)))
    assert sorted(notes.read_text().split()) == ["000000.tar", "000001.tar"]


# Reading

def test_images_are_read_when_asked_for_and_no_others(three_kinds, monkeypatch):
    """A data set larger than the memory: opening it reads one image, a batch reads its own."""
    open_tar_shards(three_kinds / "tars")  # the index is kept
    asked, pread = [], os.pread
    monkeypatch.setattr(os, "pread", lambda file, size, start: asked.append(size) or pread(file, size, start))
    dataset = load_dataset(str(three_kinds / "tars"), size=16)
    assert len(asked) == 1
    batches = training_batches(dataset, 0, (torch.arange(4 * step, 4 * step + 4) for step in range(10**9)), workers=0)
    for _ in range(3):
        next(batches)
    assert len(asked) == 13


def test_workers_do_not_run_far_ahead(three_kinds):
    dataset, asked = load_dataset(str(three_kinds / "folder"), size=16), []

    def steps():
        for step in range(10**9):
            asked.append(step)
            yield torch.arange(64 * step, 64 * step + 64)

    batches = training_batches(dataset, 0, steps(), workers=2)
    for _ in range(3):
        next(batches)
    assert len(asked) in (5, 6)  # two ahead
    batches.close()


def test_files_stay_readable_in_threads_and_forked_processes(three_kinds):
    sets = all_three(three_kinds)
    expected = [dataset.images() for dataset in sets]  # opens the files in this process
    with ThreadPoolExecutor(8) as pool:
        for dataset, images in zip(sets, expected):
            assert all(np.array_equal(found, images[i % 12]) for i, found in enumerate(pool.map(lambda i, d=dataset: d.read(i % 12, None), range(96))))
    assert all(forked(lambda d=dataset, e=images: np.array_equal(d.images(), e)) for dataset, images in zip(sets, expected))
    assert all(np.array_equal(dataset.images(), images) for dataset, images in zip(sets, expected))  # and the children closed nothing of ours
    again = open_lmdb(three_kinds / "ant_train_lmdb")  # LMDB itself refuses a second time
    assert again.read_bytes(3) == open_folder(three_kinds / "folder").read_bytes(3)


def test_few_of_many_shards_are_open_at_a_time(tmp_path):
    for number in range(150):
        pack(tmp_path / f"{number:03d}.tar", [("0.png", b"%d" % number)])
    images = open_tar_shards(tmp_path)
    before = len(os.listdir("/proc/self/fd"))
    assert all(images.read_bytes(i) == b"%d" % i for i in (*range(150), *range(150)))
    assert len(os.listdir("/proc/self/fd")) - before <= 128


# Batches made ahead

@pytest.mark.parametrize("crop", ["center", "random"])
def test_workers_make_the_batches_that_one_process_makes(three_kinds, crop):
    for dataset in all_three(three_kinds, 12, crop):
        for first, share in ((0, slice(None)), (7, slice(0, 10)), (7, slice(10, 20))):  # from any step; a process's slice of each batch
            steps = [(torch.arange(20) + 20 * step)[share] for step in range(first, first + 4)]
            expected = [training_batch(dataset, 5, places) for places in steps]
            for workers in (0, 2):
                found = list(training_batches(dataset, 5, iter(steps), workers=workers))
                assert len(found) == 4
                assert all(torch.equal(a, b) and a.stride() == b.stride() for pair in zip(found, expected) for a, b in zip(*pair))
    unflipped = list(training_batches(dataset, 5, steps, flip=False, workers=1))
    assert torch.equal(unflipped[0][0], training_batch(dataset, 5, steps[0], flip=False)[0]) and not torch.equal(unflipped[0][0], expected[0][0])


def test_workers_read_derived_data_sets(three_kinds):
    dataset = area_averaged(subset(load_dataset(str(three_kinds / "tars"), size=16), np.arange(3, 9)), 2)
    assert dataset.encoded
    (images, labels), = training_batches(dataset, 1, [torch.arange(30)], workers=2)
    assert images.shape == (30, 3, 8, 8)
    assert torch.equal(images, training_batch(dataset, 1, torch.arange(30))[0]) and torch.equal(labels, training_batch(dataset, 1, torch.arange(30))[1])


def test_workers_leave_nothing_behind_and_no_random_number_changed(three_kinds):
    children = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children")
    dataset, before, state = load_dataset(str(three_kinds / "folder"), size=16), children.read_text(), torch.get_rng_state()
    batches = training_batches(dataset, 0, (torch.arange(8) for _ in range(100)), workers=2)
    next(batches)
    assert len(children.read_text().split()) >= len(before.split()) + 2
    batches.close()
    deadline = time.monotonic() + 10
    while children.read_text() != before and time.monotonic() < deadline:
        time.sleep(0.05)
    assert children.read_text() == before
    assert torch.equal(torch.get_rng_state(), state)


def test_an_image_that_vanishes_is_named_by_the_worker(three_kinds):
    dataset = load_dataset(str(three_kinds / "folder"), size=16)
    (three_kinds / "folder" / "bee" / "005.webp").unlink()
    with pytest.raises(ValueError, match=r"bee/005\.webp cannot be read \(No such file") as error:
        list(training_batches(dataset, 0, [torch.arange(12)], workers=2))
    assert "\n" not in str(error.value)


def test_how_many_workers(three_kinds, monkeypatch):
    dataset, in_memory = load_dataset(str(three_kinds / "tars"), size=16), dataset_from_arrays("x", np.zeros((2, 4, 4, 3), np.uint8), np.arange(2))
    monkeypatch.setattr(data.os, "sched_getaffinity", lambda process: range(12), raising=False)
    assert (loading_workers(dataset), loading_workers(in_memory)) == (11, 0)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert loading_workers(dataset) == 2
    monkeypatch.setenv("ADM_REPRO_WORKERS", "7")
    assert (loading_workers(dataset), loading_workers(in_memory)) == (7, 0)
    monkeypatch.setenv("ADM_REPRO_WORKERS", "many")
    with pytest.raises(ValueError, match="ADM_REPRO_WORKERS must be a number of processes, 0 or more, got 'many'"):
        training_batches(dataset, 0, [])
    with pytest.raises(ValueError, match="0 or more, got -1"):
        training_batches(dataset, 0, [], workers=-1)


def test_names_that_are_no_text_and_folders_that_are_links(tmp_path):
    odd = os.fsdecode(b"caf\xe9.png")
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / odd).write_bytes(encoded(1))
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "class_a").symlink_to(tmp_path / "real")
    images = open_folder(tmp_path / "set")
    assert images.class_names == ("class_a",) and images.read_bytes(0) == encoded(1) == open_tar_shards(pack(tmp_path / "a.tar", [(odd, encoded(1))])).read_bytes(0)
    assert json.dumps(images.where(0))
