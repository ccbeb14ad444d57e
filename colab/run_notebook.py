"""Runs a notebook from its own folder, as a user would, with other values of its parameters where they are given.

    pip install nbclient ipykernel
    python colab/run_notebook.py evaluation samples=8

The values replace those of the cell that is tagged `parameters`; nothing else is changed, and no notebook is written.
What the cells printed is printed; the first cell that fails ends it.
"""

import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient

FOLDER = Path(__file__).parent


def run_notebook(name: str, folder: Path = FOLDER, **parameters: str) -> str:
    """Runs a notebook in `folder`. Returns what its cells printed.

    Args:
      name: without its ending.
      folder: where it runs.
      **parameters: Python expressions by the names of variables.

    Raises:
      ValueError: parameters for a notebook that has no cell for them, or that this cell does not set.
      nbclient.exceptions.CellExecutionError: a cell failed.
    """
    notebook = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
    cells = [i for i, cell in enumerate(notebook.cells) if "parameters" in cell.metadata.get("tags", ())]
    if parameters:
        if not cells or any(known not in notebook.cells[cells[0]].source for known in parameters):
            raise ValueError(f"{name} has no parameters {', '.join(parameters)}")
        values = "\n".join(f"{key} = {value}" for key, value in parameters.items())
        notebook.cells.insert(cells[0] + 1, nbformat.v4.new_code_cell(values))
    NotebookClient(
        notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(folder)}}
    ).execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    return "".join(o.get("text", "") or o.get("data", {}).get("text/plain", "") + "\n" for o in outputs)


if __name__ == "__main__":
    print(run_notebook(sys.argv[1], **dict(word.split("=", 1) for word in sys.argv[2:])))
