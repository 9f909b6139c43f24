"""How Sphinx builds the site: sphinx-build -W --keep-going -b html -c nbs/site nbs build/site

The source folder is `nbs`, so that the notebooks are pages where they lie.
"""

import sys
from configparser import ConfigParser
from pathlib import Path

from sphinx.application import Sphinx

sys.path.insert(0, str(Path(__file__).parent / "extensions"))

ROOT = Path(__file__).parent.parent.parent
settings = ConfigParser(delimiters=["="])
settings.read(ROOT / "settings.ini", encoding="utf-8")
settings = settings["DEFAULT"]

project = settings["lib_name"]
author = settings["author"]
version = release = settings["version"]
html_title = project

extensions = ["myst_nb", "sphinx.ext.autodoc", "atlas", "docments"]
include_patterns = ["index.md", "*.ipynb", "site/*.md"]
nb_execution_mode = "off"  # the notebooks are committed with their outputs
myst_heading_anchors = 3
suppress_warnings = ["mystnb.unknown_mime_type"]

add_module_names = False
autodoc_typehints = "none"  # the types stand beside the parameters
autodoc_member_order = "bysource"

copyright = f"{author}, {settings['license']}"
html_theme = "pydata_sphinx_theme"
html_static_path = ["static"]
html_css_files = ["site.css"]
html_js_files = ["tables.js"]
html_sidebars = {"**": []}  # the pages stand in the line at the top
html_show_sourcelink = False
html_theme_options = {
    "show_prev_next": False,
    "header_links_before_dropdown": 6,
    "navbar_align": "left",
    "navbar_end": ["search-button", "theme-switcher"],
    "navbar_persistent": [],
    "footer_start": ["copyright"],
    "footer_end": [],
    "pygments_light_style": "default",
}


def link_the_records(app: Sphinx, page: str, source: list[str]) -> None:
    "Let the links of the notebooks to the folder of the records, which is no page, lead to the page about them."
    source[0] = source[0].replace("](benchmarks)", "](site/atlas.md)")


def setup(app: Sphinx) -> None:
    app.connect("source-read", link_the_records)
