"""Writes the notebooks from their sources: percent scripts in `sources/`, where each can be read and changed as Python.

    pip install jupytext
    python colab/make_notebooks.py

A cell that says `# install` is the code of `sources/install.py`, the same in every notebook.
"""

from pathlib import Path

import jupytext
import nbformat

FOLDER = Path(__file__).parent
NAMES = ("quickstart", "evaluation", "own_policy", "training")


def make_notebook(name: str) -> str:
    """The text of a notebook, without outputs; the same whenever it is made."""
    install = (FOLDER / "sources" / "install.py").read_text(encoding="utf-8").rstrip()
    source = (FOLDER / "sources" / f"{name}.py").read_text(encoding="utf-8")
    notebook = jupytext.reads(source, fmt="py:percent")
    for number, cell in enumerate(notebook.cells):
        cell.id = f"{name}-{number}"
        cell.metadata = nbformat.from_dict({key: x for key, x in cell.metadata.items() if key == "tags"})
        if cell.source.strip() == "# install":
            cell.source = install
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
        (FOLDER / f"{name}.ipynb").write_text(make_notebook(name), encoding="utf-8")
