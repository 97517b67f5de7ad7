"""Hook of mkdocs: pages that lie outside docs/ become pages of the site, and links between them and docs/ go to the pages."""

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[2]
# Page of the site: its file. GitHub shows the files where they are, so that no text is there twice.
OUTSIDE = {
    "index.md": "README.md",
    "contributing.md": "CONTRIBUTING.md",
    "changelog.md": "CHANGELOG.md",
    "place_compare.md": "benchmarks/results/place_compare.md",
    "step_workloads.md": "benchmarks/results/step_workloads.md",
}


def on_files(files: Files, *, config: Any) -> Files:
    """Add the pages outside."""
    for page, file in OUTSIDE.items():
        files.append(File.generated(config, page, content=(ROOT / file).read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Turn links that hold in the repository into those that hold in the site."""
    markdown = markdown.replace("](../../docs/", "](")
    for page, file in OUTSIDE.items():
        markdown = re.sub(rf"\]\((\.\./)?{re.escape(file)}(?=[#)])", f"]({page}", markdown)
    return markdown.replace("](docs/", "](")
