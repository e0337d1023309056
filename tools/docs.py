"""Builds README, docs/ and the other pages as a site with search: `make docs`. Nothing of it needs a network."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from tools.command import ROOT

CONFIG = ROOT / "docs" / "zensical.toml"
FOLDER = ROOT / ".cache" / "docs"
PAGES, SITE = FOLDER / "pages", FOLDER / "site"
FRONT = "index.md"
"""What the generator calls the README."""

LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)\s]+)\)")
COLOUR = re.compile(r"\x1b\[[0-9;]*m")
CODE = re.compile(r"(^```.*?^```$|`[^`\n]*`)", re.MULTILINE | re.DOTALL)


def main() -> int:
    """Returns 1 where a page, a heading or an image that is linked to does not exist."""
    shutil.rmtree(FOLDER, ignore_errors=True)
    sources = pages()
    for source in sources:
        _write(source, _linked(source, sources))
    PAGES.with_name(CONFIG.name).write_text(CONFIG.read_text())
    command = [sys.executable, "-m", "zensical", "build", "--strict", "--config-file", str(FOLDER / CONFIG.name)]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        # Without its colours and its traceback, which would bury what is broken.
        print(COLOUR.sub("", done.stdout).partition("Traceback")[0], file=sys.stderr)
        return 1
    site = SITE.relative_to(ROOT)
    print(f"{site}/index.html can be read as it is. Its search needs a server:")
    print(f"python3 -m http.server --bind 127.0.0.1 --directory {site} 8300")
    return 0


def pages() -> list[Path]:
    """The files that become pages."""
    others = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "build" / "catalog" / "README.md"]
    return [*others, *sorted(CONFIG.parent.glob("*.md"))]


def _linked(source: Path, sources: list[Path]) -> str:
    """The text of a page; links to pages and images stay as they are, others name their file."""

    def link(match: re.Match[str]) -> str:
        image, label, to = match.groups()
        file, _, anchor = to.partition("#")
        target = (source.parent / file).resolve()
        if not file or re.match(r"https?:", to) or not target.exists():
            return match[0]
        if image:
            _place(target).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(target, _place(target))
            return match[0]
        if target in sources:
            path = os.path.relpath(_place(target), _place(source).parent)
            return f"[{label}]({path}{anchor and '#' + anchor})"
        path = str(target.relative_to(ROOT))
        return f"`{path}`" if path.endswith(label.replace("\\", "")) else f"{label} (`{path}`)"

    parts = CODE.split(source.read_text())
    return "".join(part if CODE.fullmatch(part) else LINK.sub(link, part) for part in parts)


def _place(source: Path) -> Path:
    """Where the generator reads a file."""
    return PAGES / (FRONT if source == ROOT / "README.md" else source.relative_to(ROOT))


def _write(source: Path, text: str) -> None:
    _place(source).parent.mkdir(parents=True, exist_ok=True)
    _place(source).write_text(text)


if __name__ == "__main__":
    sys.exit(main())
