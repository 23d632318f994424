"""The site builds without a warning or a network, names all that is public, and its links lead."""

import importlib
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType
from urllib.parse import unquote, urlsplit

import pytest

ROOT = Path(__file__).parents[1]
PUBLIC = [
    *("flows", "flows.diagnostics", "flows.distributions", "flows.export", "flows.givens"),
    *("flows.householder", "flows.interop", "flows.nets", "flows.objectives", "flows.optim"),
    *("flows.parametrize", "flows.plots", "flows.recipes", "flows.splines", "flows.training"),
    "flows.transforms",
    *("datasets.base", "datasets.densities", "datasets.image_folder", "datasets.images"),
    *("datasets.posteriors", "datasets.tabular", "datasets.toy", "datasets.uci"),
]


class Page(HTMLParser):
    """What a page calls by an id, links to, and loads to be shown."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.ids: set[str] = set()
        self.links: list[str] = []
        self.loads: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attributes}
        self.ids |= {values["id"]} if "id" in values else set()
        if tag == "a":
            self.links += [values["href"]] if "href" in values else []
        else:
            self.loads += [values[name] for name in ("src", "href", "data") if name in values]


def is_remote(address: str) -> bool:
    return bool(urlsplit(address).netloc)


def undocumented(modules: list[ModuleType], ids: set[str]) -> list[str]:
    """Public names without an entry, there or in another module that exports them."""

    def is_there(name: str, value: object) -> bool:
        if isinstance(value, ModuleType):
            return f"module-{value.__name__}" in ids
        homes = [m.__name__ for m in modules if getattr(m, name, None) is value]
        return any(f"{home}.{name}" in ids for home in homes)

    return [
        f"{module.__name__}.{name}"
        for module in modules
        for name in module.__all__
        if not is_there(name, getattr(module, name))
    ]


def dead_links(pages: dict[Path, Page]) -> list[str]:
    """Links and files within the site that lead nowhere."""
    dead = []
    for path, page in pages.items():
        for address in [*page.links, *page.loads]:
            parts = urlsplit(address)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            if target in pages:
                found = not parts.fragment or unquote(parts.fragment) in pages[target].ids
            else:
                found = target.exists()
            if not found:
                dead.append(f"{path.name}: {address}")
    return dead


def test_the_site_builds_and_is_whole(tmp_path):
    for name in ("furo", "myst_nb", "sphinx", "sphinx_copybutton", "sphinx-mathjax-offline"):
        pytest.importorskip(name)  # of the extra `docs`
    site = (tmp_path / "html").resolve()
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html"]
    command += ["-d", str(tmp_path / "doctrees"), str(ROOT / "docs"), str(site)]
    process = subprocess.run(command, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr

    pages = {path: Page(path.read_text()) for path in site.rglob("*.html")}
    notebooks = {path.stem for path in ROOT.glob("notebooks/*.ipynb")}
    assert notebooks == {path.stem for path in pages if path.parent.name == "notebooks"}

    entries = set().union(*(page.ids for path, page in pages.items() if path.parent.name == "api"))
    assert undocumented([importlib.import_module(name) for name in PUBLIC], entries) == []
    assert dead_links(pages) == []

    assert [load for page in pages.values() for load in page.loads if is_remote(load)] == []
    for style in site.rglob("*.css"):
        assert not re.search(r"(url\(|@import)\s*['\"]?(https?:)?//", style.read_text()), style


def test_what_is_missing_is_seen(tmp_path):
    (tmp_path / "here.html").touch()
    page = Page(
        '<h1 id="top"></h1><a href="#top"></a><a href="here.html?x=1"></a><a href="#bottom"></a>'
        '<a href="gone.html#top"></a><a href="https://example.org"></a><img src="data:,"/>'
        '<img src="gone.png"/><script src="//example.org/x.js"></script>'
    )
    gone = ["page.html: #bottom", "page.html: gone.html#top", "page.html: gone.png"]
    assert dead_links({tmp_path / "page.html": page}) == gone
    assert [load for load in page.loads if is_remote(load)] == ["//example.org/x.js"]

    module = ModuleType("module")
    module.__all__ = ["here", "gone"]
    module.here = module.gone = object()
    assert undocumented([module], {"module.here"}) == ["module.gone"]
