"""The pages as a site: `make docs`. Sphinx reads Markdown through MyST; nothing of the package is imported."""

import re
import tomllib
from pathlib import Path

REPOSITORY = "https://github.com/khanhllm/khanhllm"
"""where the repository lies. README.md writes the same address, which tests/docs/test_docs.py checks"""

PROJECT = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text("utf-8"))["project"]
project, version = "KhanhLLM", PROJECT["version"]
extensions = ["myst_parser"]
exclude_patterns = ["_build"]
myst_heading_anchors = 3
html_theme = "furo"
html_title = f"KhanhLLM {version}"
html_theme_options = {"source_repository": REPOSITORY, "source_branch": "main", "source_directory": "docs/"}
html_copy_source = html_show_copyright = False


def to_the_repository(app: object, page: str, text: list[str]) -> None:
    """Links that leave docs/ work as files on GitHub; on the site they lead to GitHub."""
    text[0] = re.sub(r"\]\(\.\./", f"]({REPOSITORY}/blob/main/", text[0])


def setup(app: object) -> None:
    app.connect("source-read", to_the_repository)  # type: ignore[attr-defined]
