"""Files that mean harm, and files that are damaged: an error in one line, and no memory, time or code of theirs. reliability/fuzz.py found what is here."""
import io
import json
import os
import pickle
import random
import re
import struct
import subprocess
import sys
import tarfile
import time
import tomllib
import tracemalloc
import zipfile
import zlib

import lmdb
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from conftest import ROOT
from PIL import Image

from adm_repro import batches, data, files, reports, runs, shards, sources, verdicts
from adm_repro.checkpoints import load_network, read_tensors
from adm_repro.cli import main
from adm_repro.runs import RunError


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ADM_REPRO_CACHE", str(tmp_path / "cache"))


def refused(what, *arguments, error=ValueError, match=None, seconds=5.0, memory=32 << 20):
    """The message with which something is refused, in one line, at once and with little memory."""
    tracemalloc.start()
    began = time.process_time()
    try:
        with pytest.raises(error, match=match) as raised:
            what(*arguments)
        assert tracemalloc.get_traced_memory()[1] < memory
    finally:
        tracemalloc.stop()
    assert time.process_time() - began < seconds
    assert str(raised.value).strip() and "\n" not in str(raised.value)
    return str(raised.value)


def put(path, content):
    path.write_bytes(content)
    return path


# Tar shards

def header(kind, size, name="././@LongLink"):
    member = tarfile.TarInfo(name)
    member.type, member.size = kind, size
    return member.tobuf(tarfile.GNU_FORMAT)


def padded(content):
    return content + bytes(-len(content) % 512)


@pytest.mark.parametrize("kind", [tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XHDTYPE, tarfile.XGLTYPE])
def test_a_tar_header_that_claims_gigabytes_takes_no_memory(tmp_path, kind):
    path = put(tmp_path / "a.tar", header(kind, 3 << 30) + b"n" * 512 + bytes(1024))
    refused(shards.open_tar_shards, path, match="a header of 3221225472 bytes")


def test_a_tar_header_of_digits_takes_no_time(tmp_path):
    content = b"1" * 15_000
    path = put(tmp_path / "a.tar", b"".join(header(tarfile.XHDTYPE, len(content)) + padded(content) for _ in range(60)) + bytes(1024))
    refused(shards.open_tar_shards, path, match="a header that begins", seconds=1)


def test_a_chain_of_tar_headers_is_refused(tmp_path):
    path = put(tmp_path / "a.tar", (header(tarfile.GNUTYPE_LONGNAME, 4) + padded(b"name")) * 1200 + bytes(1024))
    refused(shards.open_tar_shards, path, match="damaged or not whole")


def test_names_in_a_tar_may_be_long(tmp_path):
    picture = io.BytesIO()
    Image.new("RGB", (8, 8)).save(picture, "PNG")
    for format in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        with tarfile.open(tmp_path / "a.tar", "w", format=format) as tar:
            member = tarfile.TarInfo("folder/" * 300 + "0.png")
            member.size = len(picture.getvalue())
            tar.addfile(member, io.BytesIO(picture.getvalue()))
        assert shards.open_tar_shards(tmp_path / "a.tar").read_bytes(0) == picture.getvalue()


# LMDB

def base(path, entries):
    with lmdb.open(str(path), map_size=1 << 22) as environment, environment.begin(write=True) as transaction:
        for key, value in entries:
            transaction.put(key, value)
    return path / "data.mdb"


def changed(file, *places):
    content = bytearray(file.read_bytes())
    for at, form, value in places:
        struct.pack_into(form, content, at, value)
    file.write_bytes(content)


def leaf(content):
    return next(page for page in range(len(content) - 4096, 4096, -4096) if content[page + 10] & 3 == 2)


def value_place(content):
    at = leaf(content)
    node = at + struct.unpack_from("<H", content, at + 16)[0]
    return node, node + 8 + struct.unpack_from("<H", content, node + 6)[0]


def test_damaged_pages_of_a_data_base_are_found_before_its_library_follows_them(tmp_path):
    content = base(tmp_path / "0_lmdb", [(b"a", bytes(9000))]).read_bytes()
    node, number = value_place(content)
    newest = 4096 if struct.unpack_from("<Q", content, 4096 + 144)[0] > struct.unpack_from("<Q", content, 144)[0] else 0
    for i, change in enumerate([(number, "<Q", 1 << 40), (number, "<Q", 0), (node, "<I", 1 << 31), (node + 4, "<H", 2), (node + 6, "<H", 5000), (leaf(content) + 12, "<H", 60_000), (leaf(content) + 16, "<H", 4094),
                                (leaf(content) + 10, "<H", 1), (leaf(content), "<Q", 1), (newest + 128, "<Q", 1 << 50), (newest + 136, "<Q", 1 << 50), (newest + 92, "<H", 4), (newest + 40, "<I", 0)]):
        file = base(tmp_path / f"{i + 1}_lmdb", [(b"a", bytes(9000))])
        changed(file, change)
        refused(shards.open_lmdb, file.parent, match="cannot be read as an LMDB .* copy it again")


def test_a_tree_that_returns_to_itself_is_refused(tmp_path):
    file = base(tmp_path / "a_lmdb", [(b"%05d" % i, b"v" * 40) for i in range(500)])
    content = file.read_bytes()
    branch = next(page for page in range(8192, len(content), 4096) if content[page + 10] & 3 == 1)
    changed(file, (branch + struct.unpack_from("<H", content, branch + 16)[0], "<I", branch // 4096))
    refused(shards.open_lmdb, file.parent, match="twice in the tree")


def test_good_data_bases_of_every_form_are_read(tmp_path):
    draw = random.Random(0)
    entries = sorted((b"%06d" % i, draw.randbytes(draw.choice((1, 40, 1900, 5000)))) for i in range(800))
    images = shards.open_lmdb(base(tmp_path / "a_lmdb", entries).parent)
    assert [images.read_bytes(i) for i in range(len(images))] == [value for _, value in entries]


# Images

def chunk(kind, content):
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def test_an_image_of_many_pixels_from_few_bytes_is_refused(tmp_path, monkeypatch):
    (tmp_path / "images").mkdir()
    flat = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 9000, 9000, 8, 6, 0, 0, 0)) + chunk(b"IDAT", zlib.compress(bytes(1 << 20))) + chunk(b"IEND", b"")
    for i in range(2):
        put(tmp_path / "images" / f"{i}.png", flat)
    refused(data.load_folder, tmp_path / "images", 8, match=r"9000x9000 pixels from [\d,]+ bytes would fill the memory")
    refused(sources.open_images, tmp_path / "images", match="would fill the memory")
    monkeypatch.setattr(data, "_USUAL_PIXELS", 100)
    for i in range(2):  # as many pixels as bytes, like a photograph
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (32, 32, 3), np.uint8)).save(tmp_path / "images" / f"{i}.png")
    assert data.load_folder(tmp_path / "images", 8).images().shape == (2, 8, 8, 3) and sources.open_images(tmp_path / "images").count == 2


# Archives of arrays and of images

def test_an_archive_that_unpacks_to_gigabytes_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        for name in ("arr_0", "arr_1"):
            with archive.open(f"{name}.npy", "w") as out:
                np.lib.format.write_array_header_1_0(out, {"descr": "|u1", "fortran_order": False, "shape": (100 << 20,) + (1, 1, 1) * (name == "arr_0")})
                for _ in range(100):
                    out.write(bytes(1 << 20))
    for read in (data.load_npz, sources.open_images):
        refused(read, tmp_path / "a.npz", match="would unpack to")
    (tmp_path / "a.npz").rename(tmp_path / "a.zip")
    refused(sources.open_images, tmp_path / "a.zip", match="would unpack to")


def npz(path, **arrays):
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in arrays.items():
            archive.writestr(f"{name}.npy", content)
    return path


def npy(text, values=b""):
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + values


GOOD = npy(b"{'descr': '|u1', 'fortran_order': False, 'shape': (2, 4, 4, 3), }\n", bytes(range(96)))


@pytest.mark.parametrize("wrong", [
    npy(b"{'descr': '|u1', 'fortran_order': False, 'shape': (3000000000,), }\n", b"01"), npy(b"{'descr': '|u1', 'fortran_order': False, 'shape': (2, 3\n", b"01"), npy(b"{'descr': '|u1',\n\n(", b"01"),
    npy(b"-" * 9000 + b"1\n", b"01"), npy(b"{'descr': '|u1', 'fortran_order': False, 'shape': (-2,), }\n", b"01"), npy(b"{'descr': '|O', 'fortran_order': False, 'shape': (1,), }\n", pickle.dumps([print])), b"\x93NUMPY\x09\x00", b"",
], ids=["claims 3 GB", "cut off", "never ends", "too deep", "negative", "pickle", "of no version", "empty"])
def test_an_array_that_is_not_what_its_header_says_is_refused(tmp_path, wrong):
    labels, images = npz(tmp_path / "labels.npz", arr_0=GOOD, arr_1=wrong), npz(tmp_path / "images.npz", arr_0=wrong, arr_1=npy(b"{'descr': '|u1', 'fortran_order': False, 'shape': (2,), }\n", b"01"))
    for path in (labels, images):
        for read in (batches.open_batch, data.load_npz, sources.open_images):
            refused(read, path)
    refused(sources.open_images, put(tmp_path / "a.npy", wrong))


def test_an_array_that_claims_more_values_than_memory_has_addresses_is_refused(tmp_path):
    refused(sources.open_images, put(tmp_path / "a.npy", npy(b"{'descr': '|u1', 'fortran_order': False, 'shape': (99999999999999999999, 4, 4, 3), }\n", bytes(96))))


# Checkpoints

class Runs:
    """What would touch a file if it was unpickled."""

    def __reduce__(self):
        return os.mkdir, ("canary",)


@pytest.mark.parametrize("zip_format", [True, False, None])
def test_no_code_of_a_checkpoint_is_run(tmp_path, monkeypatch, zip_format):
    monkeypatch.chdir(tmp_path)
    out = io.BytesIO(pickle.dumps(Runs(), 2))
    if zip_format is not None:
        torch.save({"a": Runs()}, out := io.BytesIO(), _use_new_zipfile_serialization=zip_format)
    refused(read_tensors, put(tmp_path / "a.pt", out.getvalue()), match="code from a file is never run")
    assert not (tmp_path / "canary").exists()


def test_a_pickle_that_repeats_its_parts_takes_no_time(tmp_path):
    bomb = b"\x80\x02}" + b"K\x01q\x00" + b"".join(b"0h%ch%c\x86q%c" % (i, i, i + 1) for i in range(60)) + b"K\x01s."  # a key of 2**60 parts, to be hashed
    torch.save({"a": torch.zeros(2)}, whole := io.BytesIO())
    with zipfile.ZipFile(whole) as archive:
        members = [(name, bomb if name.endswith(".pkl") else archive.read(name)) for name in archive.namelist()]
    with zipfile.ZipFile(tmp_path / "zip.pt", "w") as archive:
        for name, content in members:
            archive.writestr(name, content)
    torch.save({}, old := io.BytesIO(), _use_new_zipfile_serialization=False)
    start = old.getvalue()
    place = [match.end() for match in re.finditer(rb"\.", start) if start[match.end():match.end() + 2] == b"\x80\x02"][2]
    for path in (tmp_path / "zip.pt", put(tmp_path / "old.pt", start[:place] + bomb + start[place:])):
        refused(read_tensors, path, match=r"it repeats its parts [\d,]+ times")


def test_a_compressed_checkpoint_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/data.pkl", b"\x80\x02}.")
        archive.writestr("a/data/0", bytes(10 << 20))
    refused(read_tensors, tmp_path / "a.pt", match="compressed or counts parts twice")


def test_a_checkpoint_in_several_archives_or_in_a_tar_is_refused(tmp_path):
    end = b"PK\x05\x06" + struct.pack("<HHHHIIH", 1, 1, 1, 1, 46, 0, 0)
    refused(read_tensors, put(tmp_path / "a.pt", b"PK\x06\x07" + struct.pack("<IQI", 1, 0, 2) + end))
    refused(read_tensors, put(tmp_path / "b.pt", header(tarfile.GNUTYPE_LONGNAME, 3 << 30) + bytes(1024)), match="it is a tar")


@pytest.mark.parametrize("text", ["[" * 100_000, '{"kind": "unet", "config": {"image_size": 1e999}, "about": {}}', '{"kind": ["unet"], "config": {}, "about": {}}', "9" * 5000])
def test_the_text_of_a_network_is_checked(tmp_path, text):
    head = json.dumps({"__metadata__": {"adm_repro": text}, "a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    refused(load_network, put(tmp_path / "a.safetensors", struct.pack("<Q", len(head)) + head + bytes(4)))


# Experiment files, notebooks, what the runner wrote

TOML = 'title = "t"\nnote = "n"\nseeds = [0]\n[steps.a]\nnotebook = "train_diffusion"\n[rows.b]\nnotebook = "sample"\ntables = ["table4"]\nneeds = {model = "a"}\n'


def test_experiment_files_of_other_kinds_are_refused():
    assert runs.parse_experiment("x", TOML).jobs
    for old, new in (('"t"', "1"), ("[0]", "[0]\nthreads = true"), ("[0]", '[0]\nsections = "table4"'), ("[0]", "[0]\nsections = [1]"), ("[0]", "[0]\nnotebooks = 1"), ("[steps.a]\n", "[steps]\na = 1\n[steps.c]\n"), ('["table4"]', "1"),
                     ('["table4"]', "[[1]]"), ('{model = "a"}', "[1]"), ('"sample"', "1"), ('"sample"', '"sample"\nparameters = [1]'), ('"sample"', '"sample"\npaper = {table4 = 1}'), ('"sample"', '"sample"\nonce = 1'),
                     ("[0]", "[0]\nx = " + "[" * 5000), ("[0]", "[0]\nx = " + "9" * 5000), ("[0]", "[0]\ndrop = 1"), ("[0]", "[0]\nextends = [1]")):
        refused(runs.parse_experiment, "x", TOML.replace(old, new, 1), error=RunError, match=r"experiments/x\.toml")


def test_an_experiment_file_that_is_no_text_is_refused(tmp_path, monkeypatch):
    (tmp_path / "experiments").mkdir()
    (tmp_path / "nbs" / "paper").mkdir(parents=True)
    put(tmp_path / "experiments" / "x.toml", TOML.encode() + b"# \x8c")
    monkeypatch.setenv("ADM_REPRO_ROOT", str(tmp_path))
    refused(runs.load_experiment, "x", error=RunError, match=r"x\.toml is not text")
    result = CliRunner().invoke(main, ["list", "--size", "x"])
    assert result.exit_code == 2 and "is not text" in result.output


def test_parameters_that_no_record_can_keep_are_refused():
    defaults = runs.notebook_parameters(runs.notebook_path("sample"))
    number = next(name for name, value in defaults.items() if isinstance(value, float))
    for name, value in ((number, float("nan")), (number, float("inf")), (number, True), ("unknown", 1)):
        job = runs.Job("x", "row", 0, "sample", {name: value}, {}, (), {}, "")
        refused(runs.resolved_parameters, runs.Experiment("x", "", "", (0,), 1, False, (), {}), job, error=RunError)


@pytest.mark.parametrize("text", [b"", b"[", b"[" * 100_000, b"\xb7", b"[]", b"{}", b'{"cells": 1}', b'{"cells": [1]}', b'{"cells": [{"cell_type": "code"}]}', b'{"cells": [{"cell_type": "code", "source": [1]}]}',
                                  b'{"cells": [{"cell_type": "code", "source": "1", "metadata": 1}]}', b"9" * 5000])
def test_what_is_no_notebook_is_refused(tmp_path, text):
    refused(runs.notebook_hash, put(tmp_path / "a.ipynb", text), error=RunError, match=r"a\.ipynb is not a notebook")


@pytest.mark.parametrize("source", ["a: int = 1 +", "a: int", "a.b: int = 1", "a: int = print(1)", "a: dict = {[]: 1}", "a: int = " + "-" * 5000 + "1", "\0", "a: list = " + "[" * 300])
def test_parameters_of_a_notebook_are_values(tmp_path, source):
    cell = {"cell_type": "code", "source": source, "metadata": {"tags": ["parameters"]}}
    refused(runs.notebook_parameters, put(tmp_path / "a.ipynb", json.dumps({"cells": [cell]}).encode()), error=RunError, match="the parameters cell may only hold lines like")


@pytest.mark.parametrize("text", [b"", b"1", b"[]", b"[" * 100_000, b"\xff", b"9" * 5000, b'{"file": 1}', b'{"count": true, "block_size": []}'])
def test_what_was_written_earlier_is_checked_when_it_is_read(tmp_path, text):
    for name in ("record.json", "failed.json", "section.json", "settings.json", "assembled.json", ".a.part.json"):
        put(tmp_path / name, text)
    refused(reports.read_section, tmp_path)
    refused(batches.images_done, tmp_path)
    refused(batches.assembled, tmp_path)
    assert files._version_of(tmp_path / "a.part") in ({}, {"size": "1"})
    if not text.startswith(b"{"):
        refused(runs.read_record, tmp_path, error=RunError)
        refused(runs.read_failure, tmp_path, error=RunError)
        refused(verdicts.load_records, tmp_path)
        refused(batches.check_settings, tmp_path, {"count": 1})


def test_a_version_of_a_download_cannot_add_headers(tmp_path):
    put(tmp_path / ".a.part.json", json.dumps({"ETag": '"1"\r\nCookie: x', "Last-Modified": 3, "size": "5"}).encode())
    assert files._range_headers(3, files._version_of(tmp_path / "a.part")) == {"Range": "bytes=3-"}


# Reports

def test_text_in_a_report_is_text(tmp_path):
    import nbformat
    from nbformat.v4 import new_code_cell, new_notebook, new_output

    evil = "<script>alert(1)</script><img src=x onerror=alert(2)>"
    record = {"provenance": {"hardware": evil, "versions": {evil: evil}, "commit": evil, "uncommitted_changes": False, "library": evil, "seconds": 1.0}}
    markdown = "\n\n".join([reports.provenance_table({evil: record}), f"**Failed: {evil}**: {evil}", "[a](javascript:alert(3)) [b](https://example.org) ![c](http:x) <javascript:alert(4)>", reports.markdown_table([evil], [["a\nb"], ["[d](javascript:alert(5))"]]),
                            reports.markdown_image(b"abc", "name", f'x" onerror="alert(6)]{evil}')])
    outputs = [new_output("display_data", data={"text/markdown": markdown}), new_output("display_data", data={"text/html": evil, "text/plain": evil}), new_output("stream", text=evil)]
    nbformat.write(new_notebook(cells=[new_code_cell("1", outputs=outputs)]), tmp_path / "a.ipynb")
    reports.convert_report(tmp_path / "a.ipynb", tmp_path, f"</title>{evil}")
    page = (tmp_path / "index.html").read_text()
    assert "Content-Security-Policy\" content=\"default-src 'none'" in page and "https://example.org" in page and "a<br/>b" in page and "data:image/png;name=name;base64,YWJj" in page
    tags = re.findall(r"<[a-zA-Z!/][^>]*>", page)
    assert not [tag for tag in tags if re.match(r"<(script|iframe|object|embed|link|form)", tag) or re.search(r"\son\w+\s*=", re.sub(r"'[^']*'|\"[^\"]*\"", "", tag)) or "javascript:" in tag]
    assert not [line for line in (tmp_path / "README.md").read_text().splitlines() if "<script" in line and not line.startswith("    ")]  # an indented line is a listing


# The command line

@pytest.mark.parametrize(("name", "content"), [("a.npz", b"PK\x05\x06" + bytes(18)), ("a.npz", b""), ("a.npy", npy(b"(", b"")), ("a.zip", b"PK")])
def test_commands_say_what_is_wrong(tmp_path, name, content):
    path = put(tmp_path / name, content)
    result = CliRunner().invoke(main, ["evaluate", str(path), str(path), "--features", str(put(tmp_path / "n.safetensors", b"\xff" * 9)), "--device", "cpu"])
    assert result.exit_code == 2 and isinstance(result.exception, SystemExit) and "Traceback" not in result.output and result.output.strip()


def test_a_look_at_every_reader():
    """300 inputs for each target of reliability/fuzz.py, by the same mutators without guidance."""
    done = subprocess.run([sys.executable, str(ROOT / "reliability" / "fuzz.py"), "--runs", "300", "--quick"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "3600 inputs, seeded and unguided, 0 findings" in done.stdout


def test_every_finding_has_its_test():
    kept = tomllib.loads((ROOT / "reliability" / "findings.toml").read_text())["finding"]
    assert kept and all({"target", "what", "mended", "test"} == set(finding) for finding in kept)
    own = {name for file in ("test_hostile", "test_faults") for name in re.findall(r"^def (test_\w+)", (ROOT / "tests" / f"{file}.py").read_text(), re.M)}
    assert {finding["test"] for finding in kept} <= own
    result = json.loads((ROOT / "reliability" / "results" / "fuzz.json").read_text())
    assert not [new for target in result["targets"].values() for new in target["new"]]
