"""What MkDocs does beyond rendering the guide: pages of papers, choices and methods join it, figures, equations."""

from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

import api_pages
import calibration_tables
import choice_pages
import maths
import paper_pages
from fairtrial.catalog import FAMILIES, Catalogue

_catalogue = paper_pages.load()


def on_config(config: MkDocsConfig) -> None:
    """The generated pages take their places in the navigation."""
    for section in config.nav or []:
        if "Papers" in section:
            choices = [{guide.title: guide.address} for guide in choice_pages.GUIDES]
            overviews = ["papers/index.md", {"What held up": "papers/verdicts.md"}, *choices]
            section["Papers"] = [*overviews, *_by_family(_catalogue)]
        if "API" in section:
            section["API"][:0] = [{"Methods": [f"api/{family}.md" for family in api_pages.families()]}]


def _by_family(catalogue: Catalogue) -> list[Any]:
    papers = [(family, [paper for paper in catalogue.values() if paper.family == family]) for family in FAMILIES]
    return [{family.capitalize(): [f"papers/{paper.slug}.md" for paper in found]} for family, found in papers if found]


def on_files(files: Files, config: MkDocsConfig) -> Files:
    makers = (paper_pages, choice_pages, api_pages)
    for address, content in [made for maker in makers for made in maker.pages(_catalogue).items()]:
        files.append(File.generated(config, address, content=content))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    return calibration_tables.with_figures(markdown)


def on_page_content(html: str, **_: Any) -> str:
    return maths.rendered(html)
