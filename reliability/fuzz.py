"""Hostile files: every reader is given damaged and malicious inputs, and may only read them or refuse them in words.

    python reliability/fuzz.py --runs 100000                  # so many inputs for each target, in all; continues where it stopped
    python reliability/fuzz.py --runs 300 --quick             # a look at all targets in one process, without guidance; seconds, writes nothing

The inputs are coverage-guided mutations by atheris (libFuzzer), half of them through a mutator that knows the format: it keeps checksums, lengths and
archives right, so that a change reaches the code behind them. Without atheris (pip install atheris; it is no extra, since it has wheels for few systems) the same mutators run with a fixed seed and no guidance, and the results say so.
Each target runs in a process of its own, in a folder in memory. A finding is an error of another type than the reader documents, or without a message;
an end of the process; more than 5 s of processor time; more than 512 MiB of memory for one input (all are smaller than 64 KiB); anything
executed, and any file written, renamed or removed outside the target's folder, as Python's audit events tell.
Findings of earlier runs, what mended them and the tests that keep them mended are in reliability/findings.toml.
"""
import argparse
import base64
import contextlib
import hashlib
import importlib.util
import io
import json
import mmap
import os
import pickle
import platform
import random
import re
import resource
import signal
import struct
import subprocess
import sys
import tarfile
import tempfile
import time
import tomllib
import traceback
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS, FINDINGS = ROOT / "reliability" / "results" / "fuzz.json", ROOT / "reliability" / "findings.toml"
MEMORY, SECONDS, LONGEST = 512 << 20, 5.0, 1 << 16  # bytes, of processor time, bytes of an input
GUIDED = importlib.util.find_spec("atheris") is not None
INSTRUMENTED = ["adm_repro", "PIL", "tarfile", "zipfile", "tomllib"]  # all of torch would take minutes
Bytes = Callable[[bytes], bytes]  # a mutation that knows nothing of the format


@dataclass(frozen=True)
class Target:
    """What reads files from elsewhere."""

    seeds: Callable[[], list[bytes]]  # small valid files, and some that are tricks
    read: Callable[[bytes, Path], None]  # an input and a folder of the target's own
    mutate: Callable[[bytes, random.Random, Bytes], bytes]  # keeps the input's format
    documented: tuple[str, ...] = ("ValueError", "OSError")  # what it may raise, with a message
    most: int = 0  # inputs at most, where each takes long; 0: as many as are asked for
    claims: int = MEMORY  # bytes that may be asked for but not filled: torch asks for what an old checkpoint claims before it reads


# Mutations

INTERESTING = (0, 1, 2, 3, 7, 127, 128, 255, 256, 4095, 4096, 65535, 2**31 - 1, 2**31, 2**32 - 1, 2**33, 2**63 - 1, 2**63, 2**64 - 1)
WORDS = (b"../x", b"/abs/x", b"\0", b"..", b"-1", b"1e999", b"nan", b"null", b"true", b"[]", b"{}", b"\"\"", b"\xff\xfe", b"arr_0.npy", b"O", b"|O", b"__import__('os')")


def mutate_bytes(data: bytes, rng: random.Random) -> bytes:
    """One to four changes anywhere."""
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4))):
        at = rng.randrange(len(out) + 1)
        match rng.randrange(7):
            case 0 if out:
                out[at % len(out)] ^= 1 << rng.randrange(8)
            case 1 if out:
                out[at % len(out)] = rng.randrange(256)
            case 2:
                width = rng.choice((1, 2, 4, 8))
                out[at:at + width] = (rng.choice(INTERESTING) % 256**width).to_bytes(width, rng.choice(("little", "big")))
            case 3:
                del out[at:at + rng.choice((1, 2, 8, 64, 512))]
            case 4:
                piece = out[at:at + rng.choice((1, 8, 64, 512))]
                to = rng.randrange(len(out) + 1)
                out[to:to] = piece
            case 5:
                out[at:at] = rng.choice(WORDS)
            case _:
                del out[at:]
                out += bytes(rng.choice((0, 0, 16)))
    return bytes(out[:LONGEST])


def mutate_text(data: bytes, rng: random.Random, plain: Bytes) -> bytes:
    """Numbers, strings, values and lines of a text, or anything."""
    kind = rng.randrange(5)
    pattern = (rb"-?\d+(\.\d+)?", rb'"[^"\n]*"', rb"[\[{][^\[\]{}]*[\]}]", rb"[^\n]*\n")[kind % 4]
    places = list(re.finditer(pattern, data))
    if kind == 4 or not places:
        return plain(data)
    place = rng.choice(places)
    other = rng.choice((place[0], *(p[0] for p in rng.sample(places, min(3, len(places)))), *(str(n).encode() for n in rng.sample(INTERESTING, 3)), rng.choice(WORDS), b"", b'"text"', b"[1, 2]",
                        b'{"a": 1}', b"1.5", b"-" + place[0], place[0] * 2, b"[" * rng.choice((3, 3000)), b"9" * rng.choice((30, 5000)), plain(place[0])))
    return data[:place.start()] + other + data[place.end():]


def mutate_npy(data: bytes, rng: random.Random, plain: Bytes) -> bytes:
    """The header's text with its length kept right, or the values."""
    if data[:6] != b"\x93NUMPY" or len(data) < 10 or rng.random() < 0.3:
        return plain(data)
    end = 10 + struct.unpack("<H", data[8:10])[0]
    header = mutate_text(data[10:end], rng, plain)[:65535]
    return data[:8] + struct.pack("<H", len(header)) + header + data[end:]


def mutate_zip(inner: Callable[[str, bytes, random.Random, Bytes], bytes]) -> Callable[[bytes, random.Random, Bytes], bytes]:
    """Members, their names and their order, with checksums kept right; or anything."""
    def mutate(data: bytes, rng: random.Random, plain: Bytes) -> bytes:
        if rng.random() < 0.3:
            return plain(data)
        try:
            with zipfile.ZipFile(io.BytesIO(data)) as archive:
                if sum(info.file_size for info in archive.infolist()) > 1 << 20:
                    return plain(data)
                members = [(info.filename, archive.read(info)) for info in archive.infolist()]
        except Exception:
            return plain(data)
        if not members:
            return plain(data)
        i, kind = rng.randrange(len(members)), rng.randrange(8)
        name, content = members[i]
        if kind == 0:
            members[i] = plain(name.encode()).decode(errors="replace")[:100] or "x", content
        elif kind == 1:
            members.append(members[i])
        elif kind == 2:
            del members[i]
        elif kind == 3:
            members[i] = rng.choice(("../x", "/abs/x", "a/../../x", name)), content
        else:
            members[i] = name, inner(name, content, rng, plain)
        return zipped(members, rng.choice((zipfile.ZIP_STORED, zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)))
    return mutate


def zipped(members: list[tuple[str, bytes]], method: int = zipfile.ZIP_STORED) -> bytes:
    """An archive in memory."""
    out = io.BytesIO()
    with warnings.catch_warnings(action="ignore"), zipfile.ZipFile(out, "w", method) as archive:
        for name, content in members:
            archive.writestr(zipfile.ZipInfo(name), content, method)
    return out.getvalue()


def mutate_png(data: bytes, rng: random.Random, plain: Bytes) -> bytes:
    """A chunk, with its checksum and length kept right."""
    if data[:8] != b"\x89PNG\r\n\x1a\n" or rng.random() < 0.2:
        return plain(data)
    chunks, at = [], 8
    while at + 12 <= len(data):
        length = min(struct.unpack(">I", data[at:at + 4])[0], len(data) - at - 12)
        chunks.append((data[at + 4:at + 8], data[at + 8:at + 8 + length]))
        at += 12 + length
    if not chunks:
        return plain(data)
    i = rng.randrange(len(chunks))
    kind, content = chunks[i]
    if kind == b"IDAT" and rng.random() < 0.5:  # the pixels behind the compression
        with contextlib.suppress(zlib.error):
            content = zlib.compress(plain(zlib.decompressobj().decompress(content, 1 << 16)))
        chunks[i] = kind, content
    elif rng.random() < 0.1:
        chunks.insert(i, rng.choice(chunks))
    else:
        chunks[i] = rng.choice((kind, kind, kind, b"tRNS", b"PLTE", b"acTL", b"fcTL", b"zTXt", b"iCCP", b"eXIf")), plain(content)
    return data[:8] + b"".join(struct.pack(">I", len(c)) + k + c + struct.pack(">I", zlib.crc32(k + c)) for k, c in chunks)


def mutate_image(data: bytes, rng: random.Random, plain: Bytes) -> bytes:
    """PNG by chunks, the other formats as bytes."""
    return mutate_png(data, rng, plain) if data[:4] == b"\x89PNG" else plain(data)


def mutate_tar(data: bytes, rng: random.Random, plain: Bytes) -> bytes:
    """A field of a header, or anything, with the checksums of headers put right."""
    out = bytearray(data)
    headers = [at for at in range(0, len(out) - 511, 512) if out[at + 257:at + 262] == b"ustar"]
    if headers and rng.random() < 0.7:
        at = rng.choice(headers)
        start, width = rng.choice(((0, 100), (100, 8), (124, 12), (124, 12), (136, 12), (156, 1), (156, 1), (157, 100), (257, 8), (345, 155)))
        value = rng.choice((b"..%o" % rng.getrandbits(9), b"%011o" % rng.choice(INTERESTING), b"\x80" + bytes(3) + struct.pack(">Q", rng.choice(INTERESTING)), b"\xff" * 12, b"L", b"K", b"x", b"g", b"S", b"1",
                            b"2", b"5", b"../../x.png", b"/abs/x.png", b"a.cls", b"a.json", b"a.b.png", plain(bytes(out[at + start:at + start + width])), bytes(out[rng.choice(headers) + start:][:width])))[:width]
        out[at + start:at + start + width] = value.ljust(width, b"\0")
    else:
        out = bytearray(plain(data))
    for at in range(0, len(out) - 511, 512):
        if out[at + 257:at + 262] == b"ustar":
            out[at + 148:at + 156] = b" " * 8
            out[at + 148:at + 156] = b"%06o\0 " % sum(out[at:at + 512])
    return bytes(out)


def mutate_safetensors(data: bytes, rng: random.Random, plain: Bytes) -> bytes:
    """The header's text with its length kept right, or anything."""
    if len(data) < 8 or rng.random() < 0.2:
        return plain(data)
    end = 8 + min(struct.unpack("<Q", data[:8])[0], len(data) - 8)
    header = data[8:end]
    if rng.random() < 0.5:  # the configuration, which is text inside the text
        with contextlib.suppress(ValueError, TypeError, AttributeError, KeyError, RecursionError):
            held = json.loads(header)
            held["__metadata__"]["adm_repro"] = mutate_text(held["__metadata__"]["adm_repro"].encode(), rng, plain).decode(errors="replace")
            header = json.dumps(held).encode()
            return struct.pack("<Q", len(header)) + header + data[end:]
    header = mutate_text(header, rng, plain)
    return struct.pack("<Q", len(header)) + header + data[end:]


def mutate_lmdb(data: bytes, rng: random.Random, plain: Bytes) -> bytes:
    """A field of a page, or anything."""
    if len(data) < 4096 or rng.random() < 0.3:
        return plain(data)
    out, page = bytearray(data), 4096 * rng.randrange(len(data) // 4096)
    for _ in range(rng.choice((1, 1, 3))):
        width = rng.choice((2, 2, 4, 8))
        at = page + 2 * (rng.randrange(80) if rng.random() < 0.7 else rng.randrange(2044))
        value = rng.choice((*INTERESTING, rng.randrange(16), rng.randrange(4096), rng.randrange(len(data) // 4096 + 1)))
        out[at:at + width] = (value % 256**width).to_bytes(width, "little")
    return bytes(out[:len(data)])


def mutate_pickle(data: bytes, rng: random.Random, plain: Bytes) -> bytes:
    """Opcodes and names of a pickle."""
    if rng.random() < 0.6:
        return plain(data)
    swaps = ((b"torch._utils\n_rebuild_tensor_v2\n", b"posix\nsystem\n"), (b"collections\nOrderedDict\n", b"builtins\neval\n"), (b"FloatStorage", b"UntypedStorage"), (b"FloatStorage", b"LongStorage"), (b"K\x02", b"K\xff"),
             (b"K\x03", b"M\xff\xff"), (b"K\x01", b"J\xff\xff\xff\x7f"), (b"K\x01", b"\x8a\x08" + b"\xff" * 7 + b"\x7f"), (b"K\x00", b"J\xff\xff\xff\xff"), (b"\x89", b"\x88"), (b"cpu", b"cuda:0"), (b"cpu", b"meta"), (b"R", b"b"), (b"t", b"l"))
    old, new = rng.choice(swaps)
    places = [p.start() for p in re.finditer(re.escape(old), data)]
    if not places:
        return plain(data)
    at = rng.choice(places)
    return data[:at] + new + data[at + len(old):]


# Targets

class _Runs:
    """A pickle that would run a command."""

    def __reduce__(self) -> tuple:
        return os.system, ("touch canary",)


def _picture(kind: str, mode: str = "RGB", size: tuple[int, int] = (5, 4), **options: Any) -> bytes:
    from PIL import Image

    out = io.BytesIO()
    gradient = Image.linear_gradient("L").resize(size)
    (gradient if mode == "L" else gradient.convert("RGB").convert(mode)).save(out, kind, **options)
    return out.getvalue()


def _image_seeds() -> list[bytes]:
    return [_picture("PNG"), _picture("PNG", "P"), _picture("PNG", "RGBA"), _picture("PNG", "L"), _picture("PNG", "1"), _picture("JPEG"), _picture("JPEG", "CMYK", progressive=True), _picture("GIF", "P"),
            _picture("BMP"), _picture("BMP", "P"), _picture("WEBP", lossless=True), _picture("WEBP"), _bomb_png()]


def _bomb_png(width: int = 9000, height: int = 9000) -> bytes:
    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 6, 0, 0, 0)) + chunk(b"IDAT", zlib.compress(bytes(40_000_000))[:30_000]) + chunk(b"IEND", b"")


def read_image(data: bytes, folder: Path) -> None:
    """As training does, from a folder, a shard or a data base."""
    import numpy as np

    from adm_repro.data import decoded
    from adm_repro.shards import EncodedImages

    images = EncodedImages("images", np.zeros(1, np.int64), ("all",), lambda i: data, lambda i: "image 0")
    for channels, crop in ((3, "center"), (1, "box")):
        decoded(images, 8, channels, crop)


def read_zip(data: bytes, folder: Path) -> None:
    """As `adm-repro evaluate` does."""
    from adm_repro.sources import open_images

    (folder / "images.zip").write_bytes(data)
    for size in (None, 4):
        for batch in open_images(folder / "images.zip", size).read(2):
            batch.sum()


def _zip_seeds() -> list[bytes]:
    png = _picture("PNG")
    return [zipped([("a/0.png", png), ("b/1.png", png)]), zipped([("0.jpg", _picture("JPEG")), ("1.gif", _picture("GIF", "P"))], zipfile.ZIP_DEFLATED), zipped([("../x.png", png), ("/abs/y.png", png)]),
            zipped([("0.bmp", _picture("BMP", size=(40, 1000))), ("1.bmp", _picture("BMP", size=(40, 1000)))], zipfile.ZIP_DEFLATED)]


def read_tar(data: bytes, folder: Path) -> None:
    """As training does."""
    from adm_repro.shards import open_tar_shards

    (folder / "a.tar").write_bytes(data)
    images = open_tar_shards(folder / "a.tar")
    for i in range(min(3, len(images))):
        images.read_bytes(i)
        images.where(i)


def _tar_seeds() -> list[bytes]:
    def tar(members: list[tuple[str, bytes]], format: int, **fields: Any) -> bytes:
        out = io.BytesIO()
        with tarfile.open(fileobj=out, mode="w:", format=format) as archive:
            for name, content in members:
                member = tarfile.TarInfo(name)
                member.size = len(content)
                for key, value in fields.items():
                    setattr(member, key, value)
                archive.addfile(member, io.BytesIO(content))
        return out.getvalue()[:8192]

    png = _picture("PNG")
    plain = [("0.png", png), ("0.cls", b"1"), ("1.png", png), ("1.json", b'{"label": 0}')]
    huge = tarfile.TarInfo("././@LongLink")
    huge.type, huge.size = tarfile.GNUTYPE_LONGNAME, 3 << 30
    return [tar(plain, tarfile.USTAR_FORMAT), tar([("n/" * 80 + "0.png", png), ("m/1.png", png)], tarfile.GNU_FORMAT), tar([("n/" * 80 + "0.png", png)], tarfile.PAX_FORMAT), tar([("../x.png", png)], tarfile.USTAR_FORMAT),
            tar([("0.png", b"")], tarfile.USTAR_FORMAT, type=tarfile.SYMTYPE, linkname="/etc/passwd"), huge.tobuf(tarfile.GNU_FORMAT) + b"n" * 512 + bytes(1024)]


def read_lmdb(data: bytes, folder: Path) -> None:
    """As training does, on LSUN."""
    from adm_repro import shards

    (folder / "a_lmdb").mkdir(exist_ok=True)
    (folder / "a_lmdb" / "data.mdb").write_bytes(data)
    try:
        images = shards.open_lmdb(folder / "a_lmdb")
        for i in range(min(5, len(images))):
            images.read_bytes(i)
            images.where(i)
    finally:
        for _, environment in shards._environments.values():
            environment.close()
        shards._environments.clear()


def _lmdb_seeds() -> list[bytes]:
    import lmdb

    found = []
    for entries in ([(b"0", b"inline"), (b"1", bytes(5000))], [(b"%04d" % i, b"v" * 40) for i in range(100)]):
        with tempfile.TemporaryDirectory() as folder:
            with lmdb.open(folder, map_size=1 << 20) as environment, environment.begin(write=True) as transaction:
                for key, value in entries:
                    transaction.put(key, value)
            found.append((Path(folder) / "data.mdb").read_bytes())
    return found


def read_pt(data: bytes, folder: Path) -> None:
    """As `adm-repro sample MODEL.pt` does."""
    from adm_repro.checkpoints import read_tensors

    (folder / "model.pt").write_bytes(data)
    error = None
    for lazily in (False, True):
        try:
            read_tensors(folder / "model.pt", lazily)
        except ValueError as refused:
            error = refused
    if error:
        raise error


def _pt_seeds() -> list[bytes]:
    import torch

    state = {"a.weight": torch.arange(6.0).view(2, 3), "a.bias": torch.ones(2, dtype=torch.float16)}
    found = []
    for value, zip_format in ((state, True), (state, False), ({"state_dict": state}, True), ({"a": _Runs()}, True), ({"a": _Runs()}, False)):
        out = io.BytesIO()
        torch.save(value, out, _use_new_zipfile_serialization=zip_format)
        found.append(out.getvalue())
    return [*found, pickle.dumps(_Runs()), pickle.dumps(_Runs(), 0)]


def mutate_pt(data: bytes, rng: random.Random, plain: Bytes) -> bytes:
    """Both formats of torch."""
    inner = lambda name, content, rng, plain: mutate_pickle(content, rng, plain) if name.endswith(".pkl") else plain(content)
    return mutate_zip(inner)(data, rng, plain) if data[:2] == b"PK" else mutate_pickle(data, rng, plain)


def read_safetensors(data: bytes, folder: Path) -> None:
    """A network with its configuration, and tensors alone."""
    from adm_repro.checkpoints import load_network, read_tensors

    (folder / "model.safetensors").write_bytes(data)
    with contextlib.suppress(ValueError):
        read_tensors(folder / "model.safetensors")
    load_network(folder / "model.safetensors")


def _safetensors_seeds() -> list[bytes]:
    from adm_repro.checkpoints import save_network
    from adm_repro.features import FeatureConfig, FeatureNet

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.safetensors"
        save_network(path, FeatureNet(FeatureConfig(image_size=8, width=8, blocks=1, classes=2)), note="text")
        return [path.read_bytes()]


def read_npz(data: bytes, folder: Path) -> None:
    """As training, sampling and the evaluator do."""
    from adm_repro.batches import open_batch
    from adm_repro.data import load_npz
    from adm_repro.sources import open_images

    path = folder / "images.npz"
    path.write_bytes(data)
    errors = []
    for read in (lambda: open_batch(path).read(0, 1), lambda: load_npz(path).read(0, None), lambda: [batch.sum() for batch in open_images(path).read(2)]):
        try:
            read()
        except ValueError as error:
            errors.append(error)
            if over_memory(error):
                raise
    if errors:
        raise errors[0]


def _npz_seeds() -> list[bytes]:
    import numpy as np

    images, found = np.arange(96, dtype=np.uint8).reshape(2, 4, 4, 3), []
    for save, arrays in ((np.savez, {"arr_0": images, "arr_1": np.array([0, 1])}), (np.savez_compressed, {"arr_0": images, "arr_1": np.array([0, 1])}),
                         (np.savez, {"mu": np.zeros(2), "sigma": np.eye(2), "adm_repro": np.array(json.dumps({"space": "x", "count": 3}))}),
                         (np.savez, {"arr_0": np.array([_Runs()], dtype=object)})):
        out = io.BytesIO()
        save(out, **arrays)
        found.append(out.getvalue())
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": (2**31, 4, 4, 3)})
    return [*found, zipped([("arr_0.npy", header.getvalue() + bytes(96)), ("arr_1.npy", header.getvalue() + bytes(8))])]


def read_npy(data: bytes, folder: Path) -> None:
    """As `adm-repro evaluate` does."""
    from adm_repro.sources import open_images

    (folder / "images.npy").write_bytes(data)
    for batch in open_images(folder / "images.npy").read(2):
        batch.sum()


def _npy_seeds() -> list[bytes]:
    import numpy as np

    found = []
    for array in (np.arange(96, dtype=np.uint8).reshape(2, 4, 4, 3), np.linspace(-1, 1, 96).reshape(2, 4, 4, 3), np.array([_Runs()], dtype=object), np.zeros((2, 3, 4, 4), np.uint8)):
        out = io.BytesIO()
        np.save(out, array)
        found.append(out.getvalue())
    return found


_TOML = b'''title = "t"
note = "n"
seeds = [0, 1]
threads = 1
full_size = false
sections = ["table4"]
extends = "base"
drop = ["gone"]

[notebooks.sample]
parameters = { steps = "250", count = 10 }
needs = { model = "diffusion" }

[steps.diffusion]
notebook = "train_diffusion"
once = true
parameters = { iterations = 10, keep = [5, 10], batch_size = 4 }

[rows.unguided]
notebook = "sample"
tables = ["table4"]
paper = { table4 = { conditional = true, guidance = false } }
parameters = { iterations = 5, scale = 1.0 }
note = "smaller"
'''
_SHARED = b'''title = "b"
[steps.gone]
notebook = "train_classifier"
[rows.other]
notebook = "sample"
tables = ["table4"]
'''


def read_toml(data: bytes, folder: Path) -> None:
    """An experiment file, and the one that it extends."""
    from adm_repro.runs import parse_experiment

    own, _, shared = data.decode(errors="replace").partition("\f")
    parse_experiment("x", own, {"base": shared})


def _toml_seeds() -> list[bytes]:
    whole = b"\n".join(line for line in _TOML.splitlines() if not line.startswith((b"extends", b"drop", b"paper")))
    return [_TOML + b"\f" + _SHARED, whole, *(path.read_bytes()[:3000] for path in sorted((ROOT / "experiments").glob("*.toml"))[:2])]


def read_parameters(data: bytes, folder: Path) -> None:
    """Parameters of a row, typed and checked as before a job runs."""
    from adm_repro.runs import Experiment, Job, RunError, _read_toml, check_values, resolved_parameters

    spec = _read_toml("row", data.decode(errors="replace"), {"notebook", "parameters"})
    notebook, parameters = spec.get("notebook"), spec.get("parameters")
    if not isinstance(notebook, str) or not isinstance(parameters, dict):  # as parse_experiment makes sure
        raise RunError("not a row")
    job = Job("x", "row", 0, notebook, parameters, {}, (), {}, "")
    check_values(job, resolved_parameters(Experiment("x", "", "", (0,), 1, False, (), {"row": job}), job))


def _parameters_seeds() -> list[bytes]:
    import ast

    found = []
    for path in sorted((ROOT / "nbs" / "paper").glob("*.ipynb")):
        cells = json.loads(path.read_text())["cells"]
        source = next("".join(c["source"]) for c in cells if "parameters" in c["metadata"].get("tags", []))
        if any("check" in c["metadata"].get("tags", []) for c in cells):
            lines = [f"{s.target.id} = {json.dumps(ast.literal_eval(s.value))}" for s in ast.parse(source).body if s.target.id != "run_dir"]
            found.append("\n".join([f'notebook = "{path.stem}"', "[parameters]", *lines]).encode())
    return found


def read_notebook(data: bytes, folder: Path) -> None:
    """A notebook as the runner reads it before it runs it."""
    from adm_repro.runs import notebook_hash, notebook_parameters

    (folder / "a.ipynb").write_bytes(data)
    notebook_hash(folder / "a.ipynb")
    notebook_parameters(folder / "a.ipynb")


def _notebook_seeds() -> list[bytes]:
    cell = lambda tags, source: {"cell_type": "code", "id": "a", "metadata": {"tags": tags}, "outputs": [], "source": [source]}
    return [json.dumps({"cells": [cell(["parameters"], 'steps: str = "250"  # how\nscale: float = 1.0\nrun_dir: str = ""'), cell(["check"], "assert steps"), cell([], "1")], "metadata": {}, "nbformat": 4}).encode()]


_KEPT = ("record.json", "failed.json", "section.json", "settings.json", "assembled.json", ".part.json", "answer.json")


def read_json(data: bytes, folder: Path) -> None:
    """What the project reads back: records, failures, sections, settings of samples, versions of downloads."""
    from adm_repro import batches, files, reports, runs, verdicts

    if not data:
        return
    name, text = _KEPT[data[0] % len(_KEPT)], data[1:]
    (folder / name).write_bytes(text)
    try:
        match name:
            case "record.json":
                runs.read_record(folder)
                verdicts.load_records(folder)
            case "failed.json":
                runs.read_failure(folder)
            case "section.json":
                reports.read_section(folder)
            case "settings.json":
                batches.check_settings(folder, {"count": 4, "block_size": 2, "model": {"name": "x"}})
                batches.images_done(folder)
            case "assembled.json":
                batches.assembled(folder)
            case ".part.json":
                files._range_headers(3, files._version_of(folder / "part"))
            case "answer.json":
                (folder / "answer.json").read_bytes()
    finally:
        (folder / name).unlink()


def _json_seeds() -> list[bytes]:
    record = next((ROOT / "reports").glob("*/records/*.json")).read_bytes()[:6000]
    held = [{"job": "a", "result": {"metrics": {"fid": 1.0}}, "recipe": "0", "provenance": {"seconds": 1}}, {"job": "a", "reason": "why", "at": "now"},
            {"title": "t", "markdown": "m", "effects": [{"claim": "c", "text": "t", "differences": [1.0]}]}, {"count": 4, "block_size": 2, "model": {"name": "x"}},
            {"file": "../samples.npz", "crc32": {"arr_0": 1}}, {"ETag": "\"1\"", "Last-Modified": "now", "size": "3"}, {"answer": 1}]
    return [*(bytes([i]) + json.dumps(value).encode() for i, value in enumerate(held)), bytes([0]) + record]


def mutate_json(data: bytes, rng: random.Random, plain: Bytes) -> bytes:
    """The text, and seldom which file it is."""
    return (bytes([rng.randrange(256)]) if rng.random() < 0.05 else data[:1]) + mutate_text(data[1:], rng, plain)


def read_command(data: bytes, folder: Path) -> None:
    """A hostile file by way of the command line, which must say what is wrong and show no traceback."""
    from click.testing import CliRunner

    from adm_repro.cli import main

    kind, text = data[:1], data[1:]
    name = {b"z": "a.npz", b"t": "a.tar", b"p": "a.pt", b"s": "a.safetensors", b"e": "experiments/hostile.toml"}.get(kind, "a.zip")
    for part in ("experiments", "nbs/paper"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.write_bytes(text)
    commands = {b"t": ["train", "imagenet64", "--data", str(path), "--out", str(folder / "out"), "--dry-run", "--device", "cpu"], b"p": ["sample", str(path), "--out", str(folder / "out"), "--num", "1", "--device", "cpu", "--dry-run"],
                b"e": ["list", "--size", "hostile"]}
    commands[b"s"] = commands[b"p"]
    os.environ["ADM_REPRO_ROOT"] = str(folder) if kind == b"e" else str(ROOT)
    result = CliRunner().invoke(main, commands.get(kind, ["evaluate", str(path), str(path), "--features", str(folder / "none.safetensors"), "--device", "cpu"]))
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception


def _command_seeds() -> list[bytes]:
    kinds = ((b"z", _npz_seeds), (b"t", _tar_seeds), (b"p", _pt_seeds), (b"s", _safetensors_seeds), (b"e", _toml_seeds), (b"i", _zip_seeds))
    return [kind + content for kind, seeds in kinds for content in seeds()[:3]]


def mutate_command(data: bytes, rng: random.Random, plain: Bytes) -> bytes:
    """The file that a command is given."""
    mutate = {b"z": TARGETS["npz"], b"t": TARGETS["tar"], b"p": TARGETS["checkpoint"], b"s": TARGETS["safetensors"], b"e": TARGETS["toml"]}.get(data[:1], TARGETS["zip"]).mutate
    return data[:1] + mutate(data[1:], rng, plain)


TARGETS = {
    "checkpoint": Target(_pt_seeds, read_pt, mutate_pt, claims=1 << 40),
    "safetensors": Target(_safetensors_seeds, read_safetensors, mutate_safetensors),
    "npz": Target(_npz_seeds, read_npz, mutate_zip(lambda name, content, rng, plain: mutate_npy(content, rng, plain))),
    "npy": Target(_npy_seeds, read_npy, mutate_npy),
    "image": Target(_image_seeds, read_image, mutate_image),
    "zip": Target(_zip_seeds, read_zip, mutate_zip(lambda name, content, rng, plain: mutate_image(content, rng, plain))),
    "tar": Target(_tar_seeds, read_tar, mutate_tar),
    "lmdb": Target(_lmdb_seeds, read_lmdb, mutate_lmdb),
    "toml": Target(_toml_seeds, read_toml, mutate_text, ("RunError",)),
    "parameters": Target(_parameters_seeds, read_parameters, mutate_text, ("RunError",)),
    "notebook": Target(_notebook_seeds, read_notebook, mutate_text, ("RunError",)),
    "json": Target(_json_seeds, read_json, mutate_json, ("ValueError", "OSError", "RunError")),
    "command": Target(_command_seeds, read_command, mutate_command, (), most=500),
}


# One input

class Hang(BaseException):
    """An input took too long."""


def chain(error: BaseException) -> Iterator[BaseException]:
    """An error and those that it came from."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def over_memory(error: BaseException) -> bool:
    """Whether memory ran out, also where another error was made of it."""
    return any(isinstance(e, MemoryError) or "allocate memory" in str(e) or getattr(e, "errno", None) == 12 for e in chain(error))


def _place(error: BaseException) -> str:
    "Where an error was raised, for telling findings apart."
    frames = [f for f in traceback.extract_tb(error.__traceback__) if "/reliability/" not in f.filename]
    own = next((f for f in reversed(frames) if "adm_repro" in f.filename), None)
    return f"{Path(own.filename).name}:{own.name}" if own else "?"


class Watch:
    """Python's audit events: what is executed, and files that are changed outside a folder."""

    def __init__(self, folder: Path):
        self.folder, self.seen, self.on = str(folder), [], False
        sys.addaudithook(self)

    def __call__(self, event: str, arguments: tuple) -> None:
        if not self.on:
            return
        if event == "subprocess.Popen" and arguments[0] == "nvidia-smi":  # the library's own question, which no file has a part in
            return
        if event in ("os.system", "subprocess.Popen", "os.exec", "os.posix_spawn", "os.fork", "socket.connect", "pty.spawn"):
            self.seen.append(f"{event} {arguments!r:.80}")
        elif event == "open":
            path, mode, flags = arguments
            if (isinstance(mode, str) and set(mode) & set("wax+")) or (flags or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
                self._inside(event, path)
        elif event in ("os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.symlink", "os.link", "shutil.rmtree"):
            for path in arguments[:2] if event in ("os.rename", "os.link", "os.symlink") else arguments[:1]:
                self._inside(event, path)

    def _inside(self, event: str, path: Any) -> None:
        if isinstance(path, int):
            return
        place = os.path.abspath(os.fsdecode(path))
        if not place.startswith((self.folder, os.devnull)):
            self.seen.append(f"{event} {place[:80]}")


@dataclass
class Examiner:
    """Gives inputs to a target and keeps what it finds."""

    target: Target
    folder: Path  # of the target's own, below `watch.folder`
    watch: Watch
    log: Path  # a line of JSON for each new finding
    kinds: set[str] = field(default_factory=set)
    before: int = field(default_factory=lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10)  # bytes that were filled at most

    def note(self, kind: str, text: str, data: bytes) -> None:
        if kind not in self.kinds:
            self.kinds.add(kind)
            with open(self.log, "a") as file:
                file.write(json.dumps({"kind": kind, "text": text[:300], "input": base64.b64encode(zlib.compress(data)).decode()}) + "\n")

    def examine(self, data: bytes) -> None:
        began, self.watch.on = time.process_time(), True
        signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS + 1)
        try:
            self.target.read(data, self.folder)
        except Hang:
            pass
        except Exception as error:
            self.watch.on = False
            names = {cls.__name__ for cls in type(error).__mro__}
            if over_memory(error) and self.target.claims == MEMORY:
                self.note(f"memory at {_place(error)}", f"{type(error).__name__}: {error}", data)
            elif not names & set(self.target.documented):
                self.note(f"{type(error).__name__} at {_place(error)}", f"{type(error).__name__}: {error}", data)
            elif not str(error).strip():
                self.note(f"{type(error).__name__} without a message at {_place(error)}", repr(error), data)
        finally:
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)
            self.watch.on = False
        if (seconds := time.process_time() - began) > SECONDS:
            self.note("hang", f"{seconds:.1f} s of processor time", data)
        if (filled := resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10) > self.before + MEMORY:
            self.note("memory", f"{filled - self.before:,} bytes", data)
        for event in self.watch.seen:
            self.note(f"outside: {event}", event, data)
        self.watch.seen.clear()


# A target's process

_STATUS = struct.Struct("<QQ")  # inputs tried; length of the last


def child(name: str, runs: int, seed: int, scratch: Path, guided: bool) -> None:
    """Try so many inputs; `scratch` is shared with the parent, which learns from it what happened if this process ends."""
    os.environ |= {"TORCHINDUCTOR_CACHE_DIR": str(scratch / "box" / "inductor"), "ADM_REPRO_CACHE": os.devnull, "ADM_REPRO_ROOT": str(ROOT), "TQDM_DISABLE": "1"}
    import numpy as np
    import torch

    instrument = contextlib.nullcontext()
    if guided:
        import atheris
        from torch._weights_only_unpickler import Unpickler
        for function in (Unpickler.load, torch.serialization._legacy_load, torch.serialization._load, np.lib._format_impl._read_array_header, np.lib._format_impl.read_array):
            atheris.instrument_func(function)
        for name_of in ("tarfile", "zipfile", "tomllib", "tomllib._parser"):  # imported above, without guidance
            sys.modules.pop(name_of, None)
        instrument = atheris.instrument_imports(include=INSTRUMENTED)
    with instrument:
        import adm_repro.batches
        import adm_repro.checkpoints
        import adm_repro.reports
        import adm_repro.sources  # noqa: F401
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    targets = [TARGETS[one] for one in name.split("+")]
    for folder in ("box/own", "box/cwd", "corpus"):
        (scratch / folder).mkdir(parents=True, exist_ok=True)
    os.chdir(scratch / "box" / "cwd")
    examiner = Examiner(targets[0], scratch / "box" / "own", Watch(scratch / "box"), scratch / "findings.jsonl")
    with open(scratch / "status", "r+b") as file:
        status = mmap.mmap(file.fileno(), _STATUS.size + LONGEST)
    seeds = [target.seeds() for target in targets]
    for i, content in enumerate(seeds[0]):
        (scratch / "corpus" / f"seed{i}").write_bytes(content)
    for target, known in zip(targets, seeds):
        with contextlib.suppress(Exception):
            target.read(known[0], examiner.folder)  # what it imports counts for the process, not for an input
    signal.signal(signal.SIGVTALRM, _too_long)
    pages = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (pages + max(target.claims for target in targets) + (64 << 20),) * 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    count = _STATUS.unpack_from(status)[0]

    def one(data: bytes) -> None:
        nonlocal count
        data = bytes(data)[:LONGEST]
        count += 1
        status[:_STATUS.size + len(data)] = _STATUS.pack(count, len(data)) + data
        examiner.examine(data)

    if guided:
        def mutator(data: bytes, longest: int, seed: int) -> bytes:
            rng = random.Random(seed)
            return targets[0].mutate(bytes(data), rng, lambda part: bytes(atheris.Mutate(part, LONGEST)) if rng.random() < 0.5 else mutate_bytes(part, rng))[:longest]

        atheris.Setup([sys.argv[0], f"-runs={runs}", f"-seed={seed}", f"-max_len={LONGEST}", "-len_control=0", "-rss_limit_mb=0", "-timeout=1000", *(f"-handle_{kind}=0" for kind in ("segv", "abrt", "bus", "fpe", "ill")), "-verbosity=0", f"-artifact_prefix={scratch}/", "-print_final_stats=0", str(scratch / "corpus")],
                      one, custom_mutator=mutator)
        atheris.Fuzz()
        return
    for target, known in zip(targets, seeds):
        rng, examiner.target = random.Random(seed), target
        for i in range(runs // len(targets)):
            fresh = i < len(known) and not seed
            data = known[i] if fresh else rng.choice(known)
            for _ in range(0 if fresh else rng.choice((1, 1, 2, 3))):
                data = target.mutate(data, rng, lambda part, rng=rng: mutate_bytes(part, rng))
            one(data)


def _too_long(*_: Any) -> None:
    raise Hang


# All targets

def campaign(name: str, wanted: int, before: int, scratch: Path, seed: int, guided: bool) -> dict[str, Any]:
    """Run a target until it has tried so many inputs, beginning anew when its process ends; what was tried and found."""
    scratch.mkdir(parents=True, exist_ok=True)
    (scratch / "status").write_bytes(bytes(_STATUS.size + LONGEST))
    (scratch / "findings.jsonl").unlink(missing_ok=True)
    tried, ended, began, found = 0, 0, time.monotonic(), {}
    while tried < wanted and ended < 50:
        with open(scratch / "log", "w") as log:
            process = subprocess.Popen([sys.executable, __file__, "--child", name, "--runs", str(wanted - tried), "--seed", str(seed + before + tried + ended), "--scratch", str(scratch), *["--quick"] * (not guided)], stdout=log, stderr=log,
                                       env=os.environ | {"MALLOC_ARENA_MAX": "1", "OMP_NUM_THREADS": "1"})
            try:
                hung = _wait(process, scratch / "status")
            finally:
                process.kill()
        now, length = _STATUS.unpack_from((scratch / "status").read_bytes())
        if now == tried and not hung:
            raise SystemExit(f"{name}: {(scratch / 'log').read_text()[-2000:]}")
        if hung or process.returncode:
            data = (scratch / "status").read_bytes()[_STATUS.size:_STATUS.size + length]
            kind = "hang" if hung else f"crash: {signal.Signals(-process.returncode).name if process.returncode < 0 else f'exit code {process.returncode}'}"
            found.setdefault(kind, {"kind": kind, "text": _last_words((scratch / "log").read_text()), "input": base64.b64encode(zlib.compress(data)).decode(), "times": 0})["times"] += 1
        tried, ended = now, ended + 1
    if (scratch / "findings.jsonl").exists():
        for line in (scratch / "findings.jsonl").read_text().splitlines():
            found.setdefault(json.loads(line)["kind"], json.loads(line))
    seconds = time.monotonic() - began
    return {"inputs": tried, "seconds": round(seconds, 1), "processes": ended, "found": list(found.values())}


def _last_words(log: str) -> str:
    "What a process said before it ended."
    lines = [line for line in log.splitlines() if "INFO: " not in line and "WARNING: " not in line]
    return " | ".join(lines[:6])[:300]


def _wait(process: subprocess.Popen, status: Path) -> bool:
    "Until a process ends; one that makes no progress for a minute once it has begun is ended, which returns True."
    first = seen = _STATUS.unpack_from(status.read_bytes()[:_STATUS.size])[0]
    since = time.monotonic()
    while process.poll() is None:
        time.sleep(0.05)
        now = _STATUS.unpack_from(status.read_bytes()[:_STATUS.size])[0]
        if now != seen:
            seen, since = now, time.monotonic()
        elif seen != first and time.monotonic() - since > 60:
            process.kill()
            process.wait()
            return True
    return False


def known_findings() -> list[dict[str, Any]]:
    """What was found before, by hand-kept record."""
    return tomllib.loads(FINDINGS.read_text())["finding"] if FINDINGS.exists() else []


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in ("atheris", "torch", "numpy", "pillow", "lmdb", "safetensors"):
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def seeds_hash(name: str) -> str:
    """SHA-256 over a target's seeds."""
    return hashlib.sha256(b"".join(hashlib.sha256(content).digest() for content in TARGETS[name].seeds())).hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=100_000, help="inputs for each target, in all")
    parser.add_argument("--only", nargs="+", choices=TARGETS, default=list(TARGETS), metavar="TARGET", help=", ".join(TARGETS))
    parser.add_argument("--out", type=Path, default=RESULTS, help="what was found; a target that has its inputs there is not run again")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="all targets in one process, without guidance; nothing is written")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--scratch", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        return child(options.child, options.runs, options.seed, options.scratch, GUIDED and not options.quick)
    from adm_repro.files import write_json

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # and take the child along
    print("coverage-guided, with atheris" if GUIDED else "atheris is not installed: seeded mutations without guidance")
    home = Path("/dev/shm") if os.access("/dev/shm", os.W_OK) else Path(tempfile.gettempdir())
    if options.quick:
        names = [name for name in options.only if not TARGETS[name].most]
        with tempfile.TemporaryDirectory(prefix="adm_fuzz_", dir=home) as scratch:
            done = campaign("+".join(names), options.runs * len(names), 0, Path(scratch), options.seed, False)
        print(f"{done['inputs']} inputs, seeded and unguided, {len(done['found'])} findings", *(f"    {finding['kind']}: {finding['text']}" for finding in done["found"]), sep="\n")
        sys.exit(int(bool(done["found"])))
    result = json.loads(options.out.read_text()) if options.out.exists() else {}
    targets = result.get("targets", {})
    failed = False
    for name in options.only:
        kept = targets.get(name, {"inputs": 0, "seconds": 0.0, "new": []})
        wanted = min(options.runs, TARGETS[name].most or options.runs)
        if kept["inputs"] < wanted:
            with tempfile.TemporaryDirectory(prefix="adm_fuzz_", dir=home) as scratch:
                done = campaign(name, wanted - kept["inputs"], kept["inputs"], Path(scratch), options.seed, GUIDED)
            kept["inputs"] += done["inputs"]
            kept["seconds"] = round(kept["seconds"] + done["seconds"], 1)
            kept["new"] = [*kept["new"], *done["found"]]
            kept |= {"per_second": round(kept["inputs"] / kept["seconds"], 1), "guided": GUIDED and kept.get("guided", True), "seeds": len(TARGETS[name].seeds()), "seeds_sha256": seeds_hash(name)}
        kept["findings"] = [{key: finding[key] for key in ("what", "mended", "test")} for finding in known_findings() if finding["target"] == name]
        targets[name] = kept
        write_json(options.out, {"targets": targets, "versions": versions(), "limits": {"seconds": SECONDS, "memory": MEMORY, "bytes": LONGEST}, "machine": platform.machine()})
        failed |= bool(kept["new"])
        print(f"{name:12} {kept['inputs']:7} inputs, {kept['per_second']:7.0f} a second, {len(kept['findings'])} findings before, {len(kept['new'])} new")
        for finding in kept["new"]:
            print(f"    {finding['kind']}: {finding['text']}")
    sys.exit(int(failed))


if __name__ == "__main__":
    main()
