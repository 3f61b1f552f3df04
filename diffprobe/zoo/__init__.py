"""Small models really trained on the drawn world, in diffusers' own folder layout, shipped with the package."""

from __future__ import annotations

from pathlib import Path

WEIGHTS = Path(__file__).parent / "weights"


def embedded() -> list[tuple[str, Path, int]]:
    """Name, folder and size in bytes of each embedded model."""
    folders = sorted(path for path in WEIGHTS.iterdir() if path.is_dir()) if WEIGHTS.is_dir() else []
    return [(path.name, path, sum(f.stat().st_size for f in path.rglob("*") if f.is_file())) for path in folders]
