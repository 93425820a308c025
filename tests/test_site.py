"""The site: every page is reached, every link leads somewhere, nothing is fetched, and it can be read on a telephone, by day and by night.

What needs Sphinx (make docs installs it) or Chromium is skipped where there is none.
"""
import functools
import http.server
import json
import re
import shutil
import subprocess
import sys
import threading
from html.parser import HTMLParser
from importlib.util import find_spec
from urllib.parse import unquote, urldefrag, urlsplit

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "docs"))
from gather import gather, in_repository, notebook, relinked

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    out = tmp_path_factory.mktemp("source")
    gather(out)
    return out


def test_every_page_is_in_the_lists(source):
    listed = set(re.findall(r"^/(\S+)$", (source / "index.md").read_text(), re.M))
    there = {str(path.relative_to(source).with_suffix("")) for suffix in ("md", "ipynb") for path in source.rglob(f"*.{suffix}")} - {"index"}
    assert listed == there
    assert {path.stem for path in (ROOT / "adm_repro").glob("[a-z]*.py")} == {path.stem for path in (source / "api").glob("*.md")}
    committed = {str(path.relative_to(ROOT).with_suffix("")) for path in (ROOT / "nbs").rglob("*.ipynb") if path.parent.name != "paper" and ".ipynb_checkpoints" not in path.parts}
    assert committed <= there


def test_links_to_files_that_are_no_pages_go_to_the_repository():
    known = {"README.md", "nbs/00_diffusion.ipynb", "nbs/07_sampling.ipynb"}
    page = "nbs/00_diffusion.ipynb"
    for before, after in (("[a](07_sampling.ipynb)", "[a](07_sampling.ipynb)"), ("[a](../README.md#speed)", "[a](../index.md#speed)"), ("[a](#part)", "[a](#part)"),
                          ("[`x`](../tests/mutations.toml)", f"[`x`]({in_repository('tests/mutations.toml')})"), ("[a](paper)", f"[a]({in_repository('nbs/paper')})"),
                          ("[a](https://arxiv.org/x)", "[a](https://arxiv.org/x)"), ("![a](x.png)", "![a](x.png)"), ("```\n[a](b.c)\n```", "```\n[a](b.c)\n```")):
        assert relinked(before, page, known) == after


def test_files_are_looked_for_in_the_repository():
    assert in_repository("nbs/paper").endswith("/tree/main/nbs/paper") and in_repository("Makefile").endswith("/blob/main/Makefile")


def test_a_notebook_loses_directives_and_hidden_cells():
    cells = [{"cell_type": "code", "source": ["#| export\n", "x = 1"], "outputs": []}, {"cell_type": "code", "source": ["#| hide\n", "import y"], "outputs": []},
             {"cell_type": "code", "source": ["#| default_exp z"], "outputs": []}, {"cell_type": "markdown", "source": ["see [a](b.py)"]}]
    left = json.loads(notebook(json.dumps({"cells": cells}), "nbs/a.ipynb", set()))["cells"]
    assert [cell["source"] for cell in left] == ["x = 1", f"see [a]({in_repository('nbs/b.py')})"]


@pytest.fixture(scope="module")
def site(source, tmp_path_factory):
    if not all(map(find_spec, ("sphinx", "myst_nb", "furo", "latex2mathml"))):
        pytest.skip("the site needs the extra docs: make docs")
    out = tmp_path_factory.mktemp("site")
    built = subprocess.run([sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-c", str(ROOT / "docs"), str(source), str(out)], cwd=ROOT, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr[-3000:]
    return out


class Page(HTMLParser):
    """What a page loads, links to, and can be linked to by."""

    def __init__(self, path):
        super().__init__()
        self.loads, self.links, self.anchors = [], [], set()
        self.feed(path.read_text())

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        self.anchors |= {found[key] for key in ("id", "name") if found.get(key)}
        if tag == "link" and found.get("rel") in ("stylesheet", "icon", "preload", "shortcut icon"):
            self.loads.append(found["href"])
        elif tag in ("script", "img", "iframe", "source", "video") and found.get("src"):
            self.loads.append(found["src"])
        elif tag == "a" and found.get("href"):
            self.links.append(found["href"])


def test_nothing_is_loaded_from_elsewhere_and_no_link_is_broken(site):
    found = {path: Page(path) for path in sorted(site.rglob("*.html")) if "_static" not in path.parts}
    assert len(found) > 60
    for path, page in found.items():
        for address in page.loads:
            assert not urlsplit(address).netloc, f"{path.name} loads {address}"
            assert address.startswith("data:") or (path.parent / unquote(urlsplit(address).path)).is_file(), f"{path.name} loads {address}"
        for address in page.links:
            if urlsplit(address).scheme or urlsplit(address).netloc:
                continue
            name, anchor = urldefrag(address)
            target = (path.parent / unquote(name)).resolve() if name else path
            assert target.is_file(), f"{path.relative_to(site)} links to {address}"
            if anchor and target in found:
                assert unquote(anchor) in found[target].anchors, f"{path.relative_to(site)} links to {address}"
    for sheet in site.rglob("*.css"):
        assert not re.search(r"url\(['\"]?(https?:)?//|@import ['\"]https?:", sheet.read_text()), sheet
    terms = (site / "searchindex.js").read_text()
    assert all(term in terms for term in ('"guidanc"', '"frechet"', '"respac"'))


def test_formulas_are_formulas_and_outputs_are_there(site):
    lesson = (site / "nbs" / "00_diffusion.html").read_text()
    assert lesson.count("<math") > 20 and "tensor([0.0001" in lesson and "#| export" not in lesson
    api = (site / "api" / "diffusion.html").read_text()
    assert "linear_betas" in api and "length T of the process" in api and "../nbs/00_diffusion.html" in api


LOOK = """<!doctype html><meta charset=utf-8><pre id=found></pre><script>
const pages = %s, found = [], wait = ms => new Promise(done => setTimeout(done, ms));
const bright = text => { const c = text.match(/[\\d.]+/g).map(Number).slice(0, 3).map(v => v / 255).map(v => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
                         return 0.2126 * c[0] + 0.7152 * c[1] + 0.0722 * c[2]; };
async function look(page, width) {
  const frame = document.createElement("iframe");
  frame.style.cssText = `width:${width}px;height:900px;border:0`;
  const loaded = new Promise(done => frame.onload = done);
  frame.src = page; document.body.append(frame); await loaded; await wait(50);
  const root = frame.contentDocument, body = root.body, view = frame.contentWindow;
  const one = {page, width, wide: root.documentElement.scrollWidth};
  for (const theme of ["light", "dark"]) {
    body.dataset.theme = theme; await wait(20);
    const a = bright(view.getComputedStyle(root.querySelector("article p") || body).color), b = bright(view.getComputedStyle(body).backgroundColor);
    one[theme] = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05); one[theme + "_paper"] = b;
  }
  found.push(one); frame.remove();
}
async function search() {
  const frame = document.createElement("iframe");
  frame.src = "search.html?q=guidance"; document.body.append(frame);
  for (let i = 0; i < 100; i++) { await wait(50); const n = frame.contentDocument?.querySelectorAll("#search-results li").length; if (n > 3) { found.push({results: n}); return; } }
  found.push({results: 0});
}
(async () => { for (const page of pages) for (const width of [390, 1440]) await look(page, width); await search(); document.getElementById("found").textContent = JSON.stringify(found); document.title = "done"; })();
</script>"""


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


def test_pages_can_be_read_in_a_browser(site, tmp_path):
    if CHROMIUM is None:
        pytest.skip("no Chromium here: apt-get install chromium")
    names = ["index.html", "nbs/01_blocks.html", "nbs/20_metrics.html", "nbs/walkthrough/3_guide.html", "reports/digits/README.html", "api/unet.html", "DEVIATIONS.html", "CHANGELOG.html", "LICENSES.html"]
    (site / "look.html").write_text(LOOK % json.dumps(names))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(site)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        seen = subprocess.run([CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-component-update",
                               "--disable-sync", "--enable-logging=stderr", "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1", f"--user-data-dir={tmp_path}", "--window-size=1600,1000",
                               "--virtual-time-budget=120000", "--dump-dom", f"http://127.0.0.1:{server.server_port}/look.html"], capture_output=True, text=True, timeout=300, check=False)
    finally:
        server.shutdown()
        server.server_close()
    assert seen.returncode == 0, seen.stderr[-2000:]
    complaints = [line for line in seen.stderr.splitlines() if "CONSOLE" in line]
    assert not complaints, "\n".join(complaints[:10])
    *looks, search = json.loads(re.search(r'<pre id="found">(\[.*?\])</pre>', seen.stdout, re.S)[1].replace("&quot;", '"').replace("&amp;", "&"))
    assert len(looks) == 2 * len(names) and search["results"] > 3
    for one in looks:
        assert one["wide"] <= one["width"], f"{one['page']} is {one['wide']} pixels wide at {one['width']}"
        assert min(one["light"], one["dark"]) > 4.5 and one["dark_paper"] < 0.1 and one["light_paper"] > 0.8, one
