"""The site is built strictly without a network, has every link's end, and all names."""

import html.parser
import os
import subprocess
import sys
import urllib.parse
from pathlib import Path

import pytest

import bn_jax

pytest.importorskip("mkdocs", reason="the extra docs is not installed")
pytest.importorskip("mkdocstrings", reason="the extra docs is not installed")

REPOSITORY = Path(__file__).parents[1]
# An address at which nobody answers, for whatever a build would fetch.
NO_NETWORK = "http://localhost:9"


class Page(html.parser.HTMLParser):
    """What a page points to, what it loads, and what of it can be pointed to."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.anchors: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        if anchor := values.get("id") or values.get("name"):
            self.anchors.add(anchor)
        if tag == "a" and values.get("href"):
            self.links.append(values["href"])
        loads = {"img": "src", "script": "src", "link": "href", "iframe": "src"}
        if tag in loads and values.get(loads[tag]):
            self.loaded.append(values[loads[tag]])


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    proxies = {f"{kind}_proxy": NO_NETWORK for kind in ("http", "https", "all")}
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", folder],
        cwd=REPOSITORY,
        env=os.environ | proxies,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def pages(site):
    return {path: Page(path.read_text()) for path in site.rglob("*.html")}


def test_every_link_has_an_end(site, pages):
    broken = []
    for path, page in pages.items():
        if path.name == "404.html":  # served for any address: its links start at /
            continue
        for link in page.links + page.loaded:
            parts = urllib.parse.urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = path
            if parts.path:
                target = (path.parent / urllib.parse.unquote(parts.path)).resolve()
            if target.is_dir():
                target /= "index.html"
            anchors = pages[target].anchors if target in pages else set()
            lacks = parts.fragment and parts.fragment not in anchors
            if not target.is_file() or lacks:
                broken.append(f"{path.relative_to(site)}: {link}")
    assert broken == []
    assert sum(len(page.links) for page in pages.values()) > 1_000


def test_readers_fetch_nothing_from_elsewhere(pages):
    loaded = {link for page in pages.values() for link in page.loaded}
    assert [link for link in loaded if urllib.parse.urlsplit(link).netloc] == []


def test_the_reference_has_every_public_name(site, pages):
    anchors = pages[site / "reference_functions/index.html"].anchors
    names = {anchor.rpartition(".")[2] for anchor in anchors}
    constants = {"MOMENTS_NAME"}
    assert set(bn_jax.__all__) - constants - names == set()
