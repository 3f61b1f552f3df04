"""Execute the notebooks of this folder again and keep their outputs without times and machine paths.

python notebooks/refresh.py [NAME.ipynb ...]; to be run after the embedded model or the package's pictures have changed, about a minute
on one core.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

import nbclient
import nbformat

NOTEBOOKS = sorted(Path(__file__).parent.glob("*.ipynb"))


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
            cell.outputs = joined([output for output in cell.outputs if output.get("name") != "stderr"])
    nbformat.validate(notebook)
    return notebook


def joined(outputs: list[nbformat.NotebookNode]) -> list[nbformat.NotebookNode]:
    """Texts one after the other as one; how a kernel parts what it prints is a matter of time."""
    found: list[nbformat.NotebookNode] = []
    for output in outputs:
        if output.output_type == "stream" and found and found[-1].get("name") == output.name:
            found[-1].text += output.text
        else:
            found.append(output)
    return found


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    for path in [place for place in NOTEBOOKS if not sys.argv[1:] or place.name in sys.argv[1:]]:
        with tempfile.TemporaryDirectory() as folder:
            nbformat.write(clean(execute(nbformat.read(path, as_version=4), Path(folder))), path)
        print(f"{path} is up to date, {path.stat().st_size / 1e3:.0f} kB.")
