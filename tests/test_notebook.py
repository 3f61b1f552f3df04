"""The notebooks: what is committed was executed and is clean, and every cell still runs, offline, in an empty folder."""

from __future__ import annotations

import base64
import importlib.util
import io
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import nbformat
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
# Pictures that a notebook shows, and files that it draws.
NOTEBOOKS = {"tour": (4, {"tour_probe.png", "tour_heatmaps.png"}), "families": (1, set[str]())}


@pytest.fixture(scope="module")
def refresh() -> ModuleType:
    spec = importlib.util.spec_from_file_location("refresh", ROOT / "notebooks" / "refresh.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(params=NOTEBOOKS)
def place(request: pytest.FixtureRequest) -> Path:
    return ROOT / "notebooks" / f"{request.param}.ipynb"


@pytest.fixture
def tour(place: Path) -> Any:
    return nbformat.read(place, as_version=4)


def outputs(notebook: Any) -> list[list[str]]:
    """The kinds of output of each code cell."""
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    return [sorted(k for o in cell.outputs for k in (o.get("data") or {o.get("name", "error"): None})) for cell in cells]


def test_what_is_committed_was_executed_from_top_to_bottom(tour: Any) -> None:
    code = [cell for cell in tour.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert all(cell.outputs for cell in code)
    assert not {"stderr", "error"} & {kind for kinds in outputs(tour) for kind in kinds}


def test_nothing_in_it_belongs_to_one_machine(tour: Any, place: Path, refresh: ModuleType) -> None:
    text = place.read_text(encoding="utf-8")
    assert not re.search(r"/(home|root|tmp|work|Users)/|\d{4}-\d\d-\d\dT\d\d", re.sub(r'"image/\w+": "[^"]*"', "", text))
    assert refresh.clean(nbformat.from_dict(tour)) == tour
    assert len(text) < 1_000_000


def test_its_pictures_can_be_seen(tour: Any, place: Path) -> None:
    pictures = [o.data["image/png"] for cell in tour.cells for o in cell.get("outputs", []) if "image/png" in o.get("data", {})]
    assert len(pictures) == NOTEBOOKS[place.stem][0]
    for picture in pictures:
        with Image.open(io.BytesIO(base64.b64decode(picture))) as image:
            assert max(high - low for low, high in image.convert("RGB").getextrema()) > 60, "an empty picture"  # type: ignore[misc]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning:jupyter_client.*", "ignore::DeprecationWarning:zmq.*")
def test_every_cell_runs_and_shows_what_it_showed(
    tour: Any, place: Path, refresh: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))  # nothing of the user's own profile
    (tmp_path / "here").mkdir()
    done = refresh.execute(tour, tmp_path / "here")
    assert outputs(refresh.clean(done)) == outputs(tour)
    assert {path.name for path in (tmp_path / "here/runs/figures").glob("*.png")} == NOTEBOOKS[place.stem][1]
