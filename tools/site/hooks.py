"""MkDocs hooks: pages from outside docs/, notebooks, examples, and links.

Links in all files are relative to the file in the repository, so that they work on GitHub. Here
they are resolved in the repository, and then point to the target's page on the site, or to the
target on GitHub. Names of the API in backticks link to the reference.
"""

from __future__ import annotations

import ast
import base64
import html
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from names import CONSTRUCTORS, DIRECTIONS, linked

ROOT = Path(__file__).parents[2]
GITHUB = "https://github.com/adam-jax/adam_jax/{kind}/main/{path}"
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
SOURCES = {
    "index.md": "README.md",
    "changelog.md": "CHANGELOG.md",
    "contributing.md": "CONTRIBUTING.md",
    "benchmarks.md": "benchmarks/README.md",
    "notebooks/index.md": "notebooks",
    **{f"notebooks/{path.stem}.md": f"notebooks/{path.name}" for path in NOTEBOOKS},
}
"""The files of the repository that are pages of the site without being in docs/."""

PAGES = {source: page for page, source in SOURCES.items()}
LINK = re.compile(r"(\]\()([^)\s#:]+)((?:#[^)\s]*)?\))")
PICTURE = re.compile(
    r'<picture>.*?srcset="(.*?)".*?<img src="(.*?)" alt="(.*?)">.*?</picture>', re.S
)
FENCE = re.compile(r"(^```.*?^```$)", re.MULTILINE | re.DOTALL)
CODE_WITH_BAR = re.compile(r"`([^`\n]*\\\|[^`\n]*)`")
FORMULA = re.compile(r'<span class="arithmatex">\\\((.*?)\\\)</span>', re.DOTALL)


GALLERY = """# Notebooks

Each notebook answers one question about Adam. CI runs them, and the outputs are the committed ones.

<div class="grid cards" markdown>

{cards}
</div>
"""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages from outside docs/, and the gallery's pictures."""
    contents: dict[str, str | bytes] = {p: content(ROOT / s) for p, s in SOURCES.items()}
    contents |= {f"notebooks/{path.stem}.png": first_picture(path) for path in NOTEBOOKS}
    for uri, text in contents.items():
        files.append(File.generated(config, uri, content=text))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Resolve links in the repository, and link names of the API."""
    uri = page.file.src_uri
    source = SOURCES.get(uri, f"docs/{uri}")
    folder = source if (ROOT / source).is_dir() else os.path.dirname(source)

    def resolved(match: re.Match[str]) -> str:
        path = os.path.normpath(os.path.join(folder, match[2]))
        return match[1] + target(path, match[2], os.path.dirname(uri)) + match[3]

    for mark, write in MARKS.items():
        if mark in markdown:
            markdown = markdown.replace(mark, write())
    markdown = PICTURE.sub(r"![\3](\2#only-light)![\3](\1#only-dark)", markdown)
    markdown = CODE_WITH_BAR.sub(code_with_bar, markdown)
    parts = FENCE.split(markdown)
    return "".join(p if FENCE.match(p) else linked(LINK.sub(resolved, p)) for p in parts)


def on_page_content(html_text: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Write formulas as MathML, which needs no script, and expand the source code of rules."""
    html_text = html_text.replace('class="mkdocstrings-source"', 'class="mkdocstrings-source" open')
    return FORMULA.sub(lambda match: convert(html.unescape(match[1])), html_text)


def code_with_bar(match: re.Match[str]) -> str:
    r"""Write a table's `\|` in code as HTML: GitHub shows |, Python-Markdown would show \|."""
    return "<code>" + html.escape(match[1]).replace(r"\|", "&#124;") + "</code>"


def target(path: str, link: str, folder: str) -> str:
    """Return the link from a page in `folder` to a path in the repository."""
    inside = PAGES.get(path) or path.removeprefix("docs/")
    if inside != path or inside.endswith(".png"):  # the gallery's pictures
        return os.path.relpath(inside, folder or ".")
    if (ROOT / path).exists():
        return GITHUB.format(kind="tree" if (ROOT / path).is_dir() else "blob", path=path)
    return link  # MkDocs warns


def examples() -> str:
    """Return a section for each program in examples/: its first paragraph, and its code."""
    sections = []
    for path in sorted((ROOT / "examples").glob("*.py")):
        source = path.read_text("utf-8").rstrip()
        about = (ast.get_docstring(ast.parse(source)) or "").partition("\n\n")[0]
        sections.append(f"### {path.name}\n\n{about}\n\n{fenced('python', source)}")
    return "\n\n".join(sections)


def content(source: Path) -> str:
    """Return the Markdown of a page from outside docs/."""
    if source.is_dir():
        return gallery()
    return notebook(source) if source.suffix == ".ipynb" else source.read_text("utf-8")


def notebook(path: Path) -> str:
    """Return a notebook with its outputs as Markdown."""
    parts = []
    for cell in cells(path):
        source = "".join(cell["source"])
        parts.append(source if cell["cell_type"] == "markdown" else fenced("python", source))
        parts += map(shown, cell.get("outputs", ()))
    return "\n\n".join(parts)


def shown(output: dict[str, Any]) -> str:
    """Return an output: a picture, or text."""
    data = output.get("data", {"text/plain": output.get("text", "")})
    if "image/png" in data:
        encoded = "".join(data["image/png"]).replace("\n", "")
        return f'<img alt="What the code draws" src="data:image/png;base64,{encoded}">'
    return fenced("text", "".join(data["text/plain"]))


def fenced(language: str, text: str) -> str:
    return f"```{language}\n{text.rstrip()}\n```"


def reference(names: Sequence[str]) -> str:
    """Return the directives that mkdocstrings replaces by signatures and docstrings."""
    return "\n\n".join(f"::: adam_jax.{name}" for name in names)


MARKS = {
    "<!-- constructors -->": lambda: reference(CONSTRUCTORS),
    "<!-- directions -->": lambda: reference(DIRECTIONS),
    "<!-- examples -->": examples,
}
"""Marks in pages, and functions that return the Markdown for them."""


def gallery() -> str:
    """Return the page that shows each notebook's title, question, and first picture."""
    cards = []
    for path in NOTEBOOKS:
        text = "".join(cells(path)[0]["source"])
        title = text.partition("\n")[0].removeprefix("# ")
        question = re.search(r"\*\*Question\.\*\* (.*?)(?:\n\n|$)", text, re.DOTALL)
        if not question:
            raise ValueError(f"{path.name}: the first cell must have a line **Question.** …")
        cards.append(
            f"-   [![]({path.stem}.png)]({path.name})\n\n"
            f"    **[{title}]({path.name})**\n\n    {' '.join(question[1].split())}\n"
        )
    return GALLERY.format(cards="\n".join(cards))


def first_picture(path: Path) -> bytes:
    """Return the first PNG among the outputs of a notebook."""
    outputs = [output for cell in cells(path) for output in cell.get("outputs", ())]
    return base64.b64decode(
        next(o["data"]["image/png"] for o in outputs if "image/png" in o.get("data", {}))
    )


def cells(path: Path) -> list[dict[str, Any]]:
    return json.loads(path.read_text("utf-8"))["cells"]
