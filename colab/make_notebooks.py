"""Writes the notebooks from their sources: percent scripts in `sources/`, where each can be read and changed as Python.

    pip install jupytext
    python colab/make_notebooks.py

A cell that says `# install` is the code of `sources/install.py`, the same in every notebook. Where `pyproject.toml`
names a repository on GitHub, each notebook begins with the badge that opens it in Colab, and installs from there if it
finds no clone and no wheel.
"""

import re
import tomllib
from pathlib import Path

import jupytext
import nbformat

FOLDER = Path(__file__).parent
NAMES = ("quickstart", "evaluation", "own_policy", "training")
BADGE = "[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]({})"


def repository() -> str:
    """`owner/name` on GitHub, as the package's metadata says; empty without."""
    project = tomllib.loads((FOLDER.parent / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    found = re.fullmatch(
        r"https://github\.com/([\w.-]+/[\w.-]+?)(\.git)?/?", project.get("urls", {}).get("Repository", "")
    )
    return found[1] if found else ""


def make_notebook(name: str, repository: str = "") -> str:
    """The text of a notebook, without outputs; the same whenever it is made.

    Args:
      name: without its ending.
      repository: `owner/name` on GitHub, for the badge and the install cell; empty for neither.
    """
    install = (FOLDER / "sources" / "install.py").read_text(encoding="utf-8").rstrip()
    if repository:
        install = install.replace('"vlcache_jax"  # the package index', f'"git+https://github.com/{repository}"')
    source = (FOLDER / "sources" / f"{name}.py").read_text(encoding="utf-8")
    notebook = jupytext.reads(source, fmt="py:percent")
    for number, cell in enumerate(notebook.cells):
        cell.id = f"{name}-{number}"
        cell.metadata = nbformat.from_dict({key: x for key, x in cell.metadata.items() if key == "tags"})
        if cell.source.strip() == "# install":
            cell.source = install
    if repository:
        link = f"https://colab.research.google.com/github/{repository}/blob/main/colab/{name}.ipynb"
        notebook.cells.insert(0, nbformat.v4.new_markdown_cell(BADGE.format(link), id=f"{name}-badge"))
    notebook.metadata = nbformat.from_dict(
        {
            "accelerator": "TPU",
            "colab": {"provenance": []},
            "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
            "language_info": {"name": "python"},
        }
    )
    return nbformat.writes(notebook, version=4) + "\n"


if __name__ == "__main__":
    for name in NAMES:
        (FOLDER / f"{name}.ipynb").write_text(make_notebook(name, repository()), encoding="utf-8")
