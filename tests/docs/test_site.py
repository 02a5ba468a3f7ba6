"""The site builds without a warning, has every page, and needs nothing but its own files."""

import json
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

import api_pages
import maths
import paper_pages
from fairtrial.methods.registry import exported

ROOT = Path(__file__).parents[2]
LOADS = {
    "script": "src",
    "img": "src",
    "iframe": "src",
    "source": "src",
    "video": "src",
    "audio": "src",
    "object": "data",
}


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    built = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    return folder


class Read(HTMLParser):
    """What a page loads, what it has ids for, and the tags that it is made of."""

    def __init__(self, page):
        super().__init__()
        self.loads, self.ids, self.tags = [], set(), set()
        self.feed(page.read_text(encoding="utf-8"))
        self.close()

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        self.tags.add(tag)
        self.ids.add(given.get("id"))
        if tag in LOADS and LOADS[tag] in given:
            self.loads.append(given[LOADS[tag]])
        if tag == "link" and {"stylesheet", "icon", "preload", "preconnect", "modulepreload"} & set(
            given["rel"].split()
        ):
            self.loads.append(given["href"])


@pytest.fixture(scope="module")
def read(site):
    return {page.relative_to(site).as_posix(): Read(page) for page in site.rglob("*.html")}


def test_nothing_is_loaded_from_elsewhere(site, read):
    for name, page in read.items():
        if name == "404.html":  # which a server would show at any address, so its links begin at the root
            continue
        for load in page.loads:
            found = urlsplit(load)
            assert not found.scheme, (name, load)
            assert not found.netloc, (name, load)
            assert (site / name).parent.joinpath(unquote(found.path)).resolve().is_file(), (name, load)
    for style in site.rglob("*.css"):
        text = style.read_text(encoding="utf-8")
        assert "@import" not in text
        assert all(url.startswith("data:") for url in re.findall(r"""url\(["']?([^"')]+)""", text)), style


def test_search_works_from_disk(site, read):
    assert any(load.endswith("iframe-worker.js") for load in read["index.html"].loads)
    index = (site / "search" / "search_index.js").read_text(encoding="utf-8").removeprefix("var __index = ")
    found = {entry["location"].partition("#")[0] for entry in json.loads(index)["docs"]}
    assert {f"papers/{slug}.html" for slug in paper_pages.load()} <= found


def test_every_paper_and_every_exported_method_has_its_place(read):
    catalogue = paper_pages.load()
    for slug in catalogue:
        assert {claim.id for claim in catalogue[slug].claims} <= read[f"papers/{slug}.html"].ids, slug
    for family in api_pages.families():
        stub = api_pages.METHODS / family / "__init__.pyi"
        names = [name for exported in exported(stub).values() for name in exported]
        assert {f"fairtrial.methods.{family}.{name}" for name in names} <= read[f"api/{family}.html"].ids


def test_equations_are_drawn(site, read):
    assert "math" in read["verdict.html"].tags
    for name in read:
        assert 'class="arithmatex"' not in (site / name).read_text(encoding="utf-8"), name


def test_an_equation_becomes_mathml():
    drawn = maths.rendered(r'<p><span class="arithmatex">\(a &lt; b\)</span></p>')
    assert drawn.startswith('<p><span class="equation"><math')
    assert "<mi>a</mi><mo>&#x0003C;</mo><mi>b</mi>" in drawn
    assert 'display="block"' in maths.rendered('<div class="arithmatex">\\[\nx\n\\]</div>')
