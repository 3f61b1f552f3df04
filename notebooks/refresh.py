"""Execute notebooks/tour.ipynb again and keep its outputs without times and machine paths: python notebooks/refresh.py

To be run after the embedded model or the package's pictures have changed; about a minute on one core.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import nbclient
import nbformat

TOUR = Path(__file__).with_name("tour.ipynb")


def execute(notebook: nbformat.NotebookNode, folder: Path) -> nbformat.NotebookNode:
    """Run every cell of a notebook in a kernel whose working folder is `folder`.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell raises; the message shows cell and traceback.
    """
    done = nbformat.from_dict(notebook)
    place = {"metadata": {"path": str(folder)}}
    nbclient.NotebookClient(done, kernel_name="python3", timeout=600, resources=place).execute()
    return done


def clean(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """Leave out what differs from machine to machine: times, versions, and libraries' warnings of what else is installed."""
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    for cell in notebook.cells:
        cell.metadata = {}
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
    nbformat.validate(notebook)
    return notebook


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    with tempfile.TemporaryDirectory() as folder:
        nbformat.write(clean(execute(nbformat.read(TOUR, as_version=4), Path(folder))), TOUR)
    print(f"{TOUR} is up to date, {TOUR.stat().st_size / 1e3:.0f} kB.")
