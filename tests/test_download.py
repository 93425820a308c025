"""Fetching from a server on this machine that breaks off, stalls, lies, ignores ranges; onto disks that are full; into folders that cannot be written."""
import errno
import hashlib
import http.server
import os
import re
import shutil
import subprocess
import threading
import time

import numpy as np
import pytest
import torch
from click.testing import CliRunner

import adm_repro.files
from adm_repro.checkpoints import ReleasedFile, checkpoint_file, find_files, find_released, layout, released, released_network, released_samples
from adm_repro.cli import main
from adm_repro.files import DownloadError, check_cache_room, download, sha256
from adm_repro.runs import paper_line

CONTENT = np.random.default_rng(0).bytes(3_000_000)
DIGEST = hashlib.sha256(CONTENT).hexdigest()


class Server(http.server.BaseHTTPRequestHandler):
    """Serves CONTENT in the way that the path's first part says."""

    asked: list = []

    def do_GET(self):
        way, wanted = self.path.split("/")[1], self.headers.get("Range")
        self.asked.append(wanted)
        first, tag = len(self.asked) == 1, None
        if way.startswith("changes"):  # another version after the first answer
            tag = '"1"' if first else '"2"'
            wanted = None if way == "changes" and self.headers.get("If-Range") == '"1"' else wanted
        start = int(re.match(r"bytes=(\d+)-", wanted)[1]) if wanted and way != "no-ranges" else 0
        if start >= len(CONTENT):
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(CONTENT)}")
            return self.end_headers()
        if way == "busy" and len(self.asked) < 3:
            return self.send_error(503)
        if way == "too-many" and first:
            self.send_response(429)
            self.send_header("Retry-After", "1")
            return self.end_headers()
        body = b"<!DOCTYPE html><title>Sign in</title>" if way == "page" else CONTENT[start:]
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(body)))
        if tag:
            self.send_header("ETag", tag)
        if start:
            self.send_header("Content-Range", f"bytes {start + (7 if way == 'other-range' else 0)}-{len(CONTENT) - 1}/{len(CONTENT)}")
        self.end_headers()
        if way == "stalls" and len(self.asked) == 1:
            self.wfile.write(body[:1_000_000])
            self.wfile.flush()
            return self.server.stop.wait(5)
        if way == "pieces":  # a connection that never holds for longer than a fifth of the file
            body = body[:600_000]
        if way in ("breaks", "no-ranges", "other-range") and first:
            body = body[:1_234_567]
        if way.startswith("changes") and first:
            body = bytes(1_234_567)
        if way == "always-breaks":
            body = body[: max(0, 1_000_000 - start)]
        self.wfile.write(body)
        return None

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch, tmp_path):
    """The address of a server; what it is asked is in `Server.asked`."""
    Server.asked = []
    served = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
    served.stop = threading.Event()
    threading.Thread(target=served.serve_forever, daemon=True).start()
    monkeypatch.setenv("ADM_REPRO_CACHE", str(tmp_path / "cache"))
    yield f"http://127.0.0.1:{served.server_port}"
    served.stop.set()
    served.shutdown()
    served.server_close()


def test_an_interrupted_download_is_continued(server, tmp_path):
    assert download(f"{server}/breaks/file", tmp_path / "file", DIGEST).read_bytes() == CONTENT
    assert Server.asked == [None, "bytes=1234567-"]
    assert not (tmp_path / "file.part").exists()


def test_what_an_earlier_process_left_is_continued(server, tmp_path):
    (tmp_path / "file.part").write_bytes(CONTENT[:2_000_000])
    assert download(f"{server}/good/file", tmp_path / "file", None).read_bytes() == CONTENT
    assert Server.asked == ["bytes=2000000-"]
    assert (tmp_path / "file.sha256").read_text() == f"{DIGEST}  file\n"


def test_a_connection_that_brings_something_is_not_given_up(server, tmp_path):
    assert download(f"{server}/pieces/file", tmp_path / "file", DIGEST, attempts=1).read_bytes() == CONTENT
    assert len(Server.asked) == 5


def test_a_connection_that_brings_nothing_is(server, tmp_path):
    with pytest.raises(DownloadError, match=r"could not be fetched .* or try again"):
        download(f"{server}/always-breaks/file", tmp_path / "file", DIGEST, attempts=2)
    assert (tmp_path / "file.part").read_bytes() == CONTENT[:1_000_000]  # kept for the next time
    assert not (tmp_path / "file").exists()


def test_a_server_that_stalls_is_asked_again(server, tmp_path):
    start = time.perf_counter()
    assert download(f"{server}/stalls/file", tmp_path / "file", DIGEST, timeout=0.3).read_bytes() == CONTENT
    assert Server.asked == [None, "bytes=1000000-"] and time.perf_counter() - start < 4


def test_a_busy_server_is_asked_again(server, tmp_path):
    assert download(f"{server}/busy/file", tmp_path / "file", DIGEST).read_bytes() == CONTENT


def test_a_server_without_ranges_starts_again(server, tmp_path):
    assert download(f"{server}/no-ranges/file", tmp_path / "file", DIGEST).read_bytes() == CONTENT
    assert Server.asked == [None, "bytes=1234567-"]


@pytest.mark.parametrize("way", ["changes", "changes-and-does-not-look"])
def test_two_versions_of_a_file_are_not_spliced(way, server, tmp_path):
    assert download(f"{server}/{way}/file", tmp_path / "file", None).read_bytes() == CONTENT
    assert Server.asked == [None, "bytes=1234567-", *([None] if way != "changes" else [])]
    assert sorted(p.name for p in tmp_path.iterdir() if not p.name.endswith(".lock")) == ["file", "file.sha256"]


def test_the_version_of_a_part_outlives_the_process(server, tmp_path, monkeypatch):
    with pytest.raises(DownloadError):
        download(f"{server}/changes/file", tmp_path / "file", None, attempts=0)
    monkeypatch.setattr(adm_repro.files, "_same", lambda *_: pytest.fail("the server has looked"))
    assert download(f"{server}/changes/file", tmp_path / "file", None).read_bytes() == CONTENT


@pytest.mark.parametrize(("one", "other", "same"), [
    ({"ETag": '"1"', "Last-Modified": "a", "size": "5"}, {"ETag": '"1"', "Last-Modified": "b", "size": "5"}, True), ({"size": "5"}, {"size": "6"}, False), ({}, {"ETag": '"1"'}, True),
    ({"ETag": '"1"', "size": "5"}, {"ETag": '"1"', "size": "6"}, False), ({"Last-Modified": "a"}, {"ETag": '"1"', "Last-Modified": "b"}, False),
])
def test_versions_differ_in_what_both_say(one, other, same):
    assert adm_repro.files._same(one, other) == same


def test_a_weak_tag_is_no_condition():
    assert adm_repro.files._range_headers(5, {"ETag": 'W/"1"', "Last-Modified": "then"}) == {"Range": "bytes=5-", "If-Range": "then"}


def test_a_damaged_archive_is_not_trusted(server, tmp_path):
    np.savez(tmp_path / "good.npz", arr_0=np.arange(1000))
    content = bytearray((tmp_path / "good.npz").read_bytes())
    content[500] ^= 1
    (tmp_path / "bad.npz").write_bytes(content)
    with pytest.raises(DownloadError, match=r"thrown away .*CRC-32|thrown away .*checksum"):
        download((tmp_path / "bad.npz").as_uri(), tmp_path / "new.npz", None)
    with pytest.raises(DownloadError, match="delete it, and it is downloaded again"):
        download("", tmp_path / "bad.npz", None)
    assert not list(tmp_path.glob("*.sha256"))


def test_a_second_download_is_compared_with_the_first(server, tmp_path):
    (tmp_path / "one").write_bytes(b"one")
    (tmp_path / "two").write_bytes(b"two")
    download((tmp_path / "one").as_uri(), tmp_path / "file", None).unlink()
    with pytest.raises(DownloadError, match=r"had 7692c3ad.* when it was first seen; .* delete file.sha256"):
        download((tmp_path / "two").as_uri(), tmp_path / "file", None)
    assert download((tmp_path / "one").as_uri(), tmp_path / "file", None).read_bytes() == b"one"
    (tmp_path / "file.sha256").write_text("")
    with pytest.raises(DownloadError, match=r"file.sha256 does not begin with a SHA-256 of 64 digits: restore it, or delete it"):
        download("", tmp_path / "file", None)


def test_whatever_a_look_into_a_file_raises_is_said(server, tmp_path):
    def look(path):
        raise EOFError("no more\nof it")

    with pytest.raises(DownloadError, match=r"thrown away \(.*file.part cannot be read \(EOFError: no more of it\)\)"):
        download(f"{server}/good/file", tmp_path / "file", DIGEST, check=look)
    (tmp_path / "file").write_bytes(b"x")
    with pytest.raises(DownloadError, match=r"EOFError.*delete it"):
        download(f"{server}/good/file", tmp_path / "file", None, check=look)


def test_a_server_that_asks_for_patience_gets_it(server, tmp_path, monkeypatch):
    waited = []
    monkeypatch.setattr(adm_repro.files.time, "sleep", waited.append)
    assert download(f"{server}/too-many/file", tmp_path / "file", DIGEST).read_bytes() == CONTENT
    assert waited == [1]


def test_another_range_than_was_asked_for_is_not_appended(server, tmp_path):
    with pytest.raises(DownloadError, match=r"sent bytes 1234574-.* in place of bytes 1234567-"):
        download(f"{server}/other-range/file", tmp_path / "file", None)


def test_a_part_that_is_too_long_begins_again(server, tmp_path):
    (tmp_path / "file.part").write_bytes(CONTENT + b"more")
    assert download(f"{server}/good/file", tmp_path / "file", None).read_bytes() == CONTENT
    (tmp_path / "whole.part").write_bytes(CONTENT)
    assert download(f"{server}/good/file", tmp_path / "whole", None).read_bytes() == CONTENT
    assert Server.asked == [f"bytes={len(CONTENT) + 4}-", None, f"bytes={len(CONTENT)}-"]


def test_a_wrong_hash_is_thrown_away(server, tmp_path):
    with pytest.raises(DownloadError, match=f"SHA-256 {DIGEST}, not the published 0000"):
        download(f"{server}/good/file", tmp_path / "file", "0" * 64)
    assert [p.name for p in tmp_path.iterdir() if not p.name.startswith(".")] == []


def test_a_page_in_place_of_a_network_is_never_trusted(server, tmp_path):
    file = checkpoint_file("imagenet64-classifier")
    with pytest.raises(DownloadError, match="an HTML or XML page"):
        file.fetch(f"{server}/page/x")
    assert list(file.path.parent.glob("64x64*")) == []
    file.path.write_bytes(b"<html>saved by a browser")  # put there by hand
    with pytest.raises(DownloadError, match=r"an HTML or XML page.*delete it"):
        file.fetch(f"{server}/good/x")
    assert not file.path.with_name("64x64_classifier.pt.sha256").exists()


def test_a_file_that_does_not_fit_is_not_begun(server, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=2_999_999)
    monkeypatch.setattr(adm_repro.files.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(DownloadError, match=r"3,000,000 bytes are needed for what is fetched, and 2,999,999 are free: make room, or name another folder in ADM_REPRO_CACHE"):
        download(f"{server}/good/file", tmp_path / "file", DIGEST)
    assert (tmp_path / "file.part").stat().st_size == 0
    (tmp_path / "file.part").write_bytes(CONTENT[:1])  # what is there already needs no room
    download(f"{server}/good/file", tmp_path / "file", DIGEST)
    check_cache_room(tmp_path, 2_999_999)


def test_a_disk_that_fills_up_keeps_what_was_fetched(server, tmp_path, monkeypatch):
    """Another program takes the room in the meantime."""
    def full(path, mode):
        file = open(path, mode)
        write = file.write

        def limited(chunk):
            if file.tell() + len(chunk) > 500_000:
                raise OSError(errno.ENOSPC, "No space left on device")
            return write(chunk)

        return Wrapped(file, limited)

    class Wrapped:
        def __init__(self, file, write):
            self.file, self.write = file, write

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.file.close()

        def truncate(self, size):
            self.file.truncate(size)

    monkeypatch.setattr(adm_repro.files, "open", full, raising=False)
    with pytest.raises(DownloadError, match=r"the disk is full after [\d,]+ bytes, which are kept; make room and try again"):
        download(f"{server}/good/file", tmp_path / "file", DIGEST)
    assert len(Server.asked) == 1  # asking again would not help
    monkeypatch.undo()
    kept = (tmp_path / "file.part").stat().st_size
    assert download(f"{server}/good/file", tmp_path / "file", DIGEST).read_bytes() == CONTENT
    assert Server.asked[1] == (f"bytes={kept}-" if kept else None)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of one megabyte."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(folder)], capture_output=True, check=False).returncode:
        pytest.skip("mounting needs root")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_small_disk_is_seen_before_and_while_writing(server, small_disk, monkeypatch):
    with pytest.raises(DownloadError, match=r"3,000,000 bytes are needed for what is fetched, and 1,0\d\d,\d\d\d are free"):
        download(f"{server}/good/file", small_disk / "file", DIGEST)
    monkeypatch.setattr(adm_repro.files, "check_cache_room", lambda *_: None)
    with pytest.raises(DownloadError, match="the disk is full after"):
        download(f"{server}/good/file", small_disk / "file", DIGEST)
    part = (small_disk / "file.part").read_bytes()
    assert 900_000 < len(part) < 1_100_000 and CONTENT.startswith(part)


def test_a_shared_folder_that_is_read_only_here(server, small_disk):
    (small_disk / "file").write_bytes(CONTENT[:1000])
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    assert download(f"{server}/good/file", small_disk / "file", None).read_bytes() == CONTENT[:1000]
    with pytest.raises(DownloadError, match=r"other is not there, and nothing can be written beside it .*: have it put there, or name a folder of your own in ADM_REPRO_CACHE"):
        download(f"{server}/good/file", small_disk / "other", None)
    assert Server.asked == []


def test_a_folder_that_cannot_be_written(server, tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError(errno.EACCES, "Permission denied")

    (tmp_path / "file").write_bytes(b"shared")
    monkeypatch.setattr(adm_repro.files, "FileLock", lambda _: type("Lock", (), {"acquire": refuse})())
    assert download(f"{server}/good/file", tmp_path / "file", None).read_bytes() == b"shared"
    with pytest.raises(DownloadError, match=r"nothing can be written beside it \(Permission denied\)"):
        download(f"{server}/good/file", tmp_path / "other", None)


# the registry


def test_every_checkpoint_and_batch_of_the_original_is_known():
    assert len(released()) == 15 and len({r.preset for r in released().values()}) == 15
    assert sum(bool(b.reference) for b in released_samples().values()) == 27 and len(released_samples()) == 34
    assert all(b.reference in released_samples() for b in released_samples().values() if b.reference)
    for file in find_files(["*"]):
        assert file.licence and file.bytes > 10**6 and file.url.startswith("https://")


@pytest.mark.parametrize("name", released())
def test_references_into_the_paper_pick_one_line(name):
    found = find_released(name)
    for run in found.expected:
        for id, select in run["paper"].items():
            assert paper_line(id, select)["fid"] > 0
    for steps, ref in found.guidance_scale.items():
        assert steps in ("250", "ddim25") and paper_line(ref["entry"], ref["select"])[ref["column"]] > 0
    assert bool(found.guidance_scale) == bool(found.classifier)
    assert {run["steps"] for run in found.expected} <= {"250", "ddim25", "1000", "90,60,60,20,20"}
    assert (found.steps in {run["steps"] for run in found.expected}) == (found.kind != "classifier")


def test_batches_are_lines_of_the_paper_at_their_size():
    for batch in released_samples().values():
        for id, select in batch.paper.items():
            line = paper_line(id, select)
            assert line["fid"] > 0 and f"{batch.image_size}x{batch.image_size}" in line.get("group", "256x256"), batch.name
            assert ("guided" in batch.name) == ("ADM-G" in line.get("model", "") or line.get("scale", 0) > 0)


# the command


def run(*arguments, **environment):
    return CliRunner().invoke(main, ["download", *arguments], env=environment)


@pytest.fixture
def shelf(tmp_path):
    """A folder with a released classifier (random values), a batch, and an unrelated file of a released name."""
    folder = tmp_path / "shelf"
    (folder / "batches").mkdir(parents=True)
    torch.save(released_network("imagenet128-classifier").state_dict(), folder / "128x128_classifier.pt")
    np.savez(folder / "batches" / "VIRTUAL_imagenet512.npz", mu=np.zeros(2))
    torch.save({"w": torch.zeros(3)}, folder / "64x64_classifier.pt")
    return folder


def test_without_a_network_files_come_from_a_folder(shelf, tmp_path):
    cache = {"ADM_REPRO_CACHE": str(tmp_path / "cache"), "ADM_REPRO_MIRROR": "http://127.0.0.1:9"}
    result = run("imagenet128-classifier", "VIRTUAL_imagenet512.npz", "--from", str(shelf), **cache)
    assert result.exit_code == 0, result.output
    for name, path in (("128x128_classifier.pt", "checkpoints/128x128_classifier.pt"), ("VIRTUAL_imagenet512.npz", "VIRTUAL_imagenet512.npz")):
        assert f"{name}: {tmp_path / 'cache' / path}" in result.stdout
        assert (tmp_path / "cache" / f"{path}.sha256").read_text().split()[0] == sha256(tmp_path / "cache" / path)
    result = run("imagenet64-classifier", "--from", str(shelf), **cache)
    assert result.exit_code == 2 and "does not hold the network 64x64_classifier: missing: time_embed.0.weight" in result.output
    assert len(result.output.splitlines()) == 1
    result = run("imagenet256*", "--from", str(shelf), **cache)
    assert "holds no 256x256_diffusion.pt, 256x256_diffusion_uncond.pt, 256x256_classifier.pt" in result.output
    (shelf / "64x64_classifier.pt.sha256").write_text("0" * 64 + "  64x64_classifier.pt\n")
    assert "does not have the SHA-256 in 64x64_classifier.pt.sha256" in run("imagenet64-classifier", "--from", str(shelf), **cache).output


def test_a_mirror_serves_what_the_authors_serve(shelf, tmp_path):
    cache = {"ADM_REPRO_CACHE": str(tmp_path / "cache"), "ADM_REPRO_MIRROR": shelf.as_uri()}
    assert run("imagenet128-classifier", **cache).exit_code == 0
    (shelf / "128x128_classifier.pt").unlink()
    assert run("imagenet128-classifier", **cache).exit_code == 0  # it is there
    kept = tmp_path / "cache" / "checkpoints" / "128x128_classifier.pt"
    kept.write_bytes(kept.read_bytes()[:-1])
    assert "when it was first seen: delete both" in run("imagenet128-classifier", **cache).output


def test_one_failure_does_not_stop_the_others(shelf, tmp_path):
    cache = {"ADM_REPRO_CACHE": str(tmp_path / "cache"), "ADM_REPRO_MIRROR": shelf.as_uri()}
    result = run("*-classifier", **cache)
    assert result.exit_code == 2 and (tmp_path / "cache" / "checkpoints" / "128x128_classifier.pt").exists()
    assert len(result.stderr.splitlines()) == 3  # 64 holds something else, 256 and 512 are not there


def test_room_for_everything_is_looked_for_first(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=10**9)
    monkeypatch.setattr(adm_repro.files.shutil, "disk_usage", lambda _: usage)
    result = run("imagenet256", "imagenet64", ADM_REPRO_CACHE=str(tmp_path / "cache"), ADM_REPRO_MIRROR="http://127.0.0.1:9")
    assert result.exit_code == 2 and f"{tmp_path / 'cache'}: {4 * (553_838_086 + 295_904_454):,} bytes are needed for what is fetched, and 1,000,000,000 are free" in result.output


def test_inceptions_weights_are_compared_with_the_published_ones(tmp_path):
    (tmp_path / "weights-inception-2015-12-05-6726825d.pth").write_bytes(b"other")
    result = run("inception", ADM_REPRO_CACHE=str(tmp_path))
    assert result.exit_code == 2 and "not the published 6726825d" in result.output


def test_the_look_into_a_checkpoint_reads_names_and_shapes(shelf):
    """Also of files in torch's old format."""
    file = checkpoint_file("imagenet128-classifier")
    file.check(shelf / "128x128_classifier.pt")
    state = torch.load(shelf / "128x128_classifier.pt", weights_only=True)
    torch.save(state, shelf / "old.pt", _use_new_zipfile_serialization=False)
    file.check(shelf / "old.pt")
    state["out.0.bias"] = state["out.0.bias"][:-1]
    torch.save(state, shelf / "wrong.pt")
    with pytest.raises(ValueError, match=r"does not hold the network 128x128_classifier: another shape: out.0.bias is \[511\] in place of \[512\]"):
        file.check(shelf / "wrong.pt")
    assert isinstance(file, ReleasedFile) and layout(state)["time_embed.0.weight"] == (512, 128)
