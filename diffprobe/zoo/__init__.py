"""Small models really trained on the drawn world, in the ecosystem's own folder layouts, shipped with the package.

weights/      shapes-sd, shapes-clip, shapes-lm, shapes-vit, shapes-reader, each with its card; the checkout's ``recipes`` train them
reader.py     the network of shapes-reader, which says what stands where in a picture
smollm2.py    SmolLM2-135M-Instruct, not ours and not shipped: fetched from a Python package
"""

from __future__ import annotations

from pathlib import Path

from diffprobe.data.samples import did_you_mean

WEIGHTS = Path(__file__).parent / "weights"


def embedded() -> list[tuple[str, Path, int]]:
    """Name, folder and size in bytes of each embedded model."""
    folders = sorted(path for path in WEIGHTS.iterdir() if path.is_dir()) if WEIGHTS.is_dir() else []
    return [(path.name, path, sum(f.stat().st_size for f in path.rglob("*") if f.is_file())) for path in folders]


def locate(name: str) -> Path:
    """The folder of an embedded model, or of one that ``diffprobe zoo fetch`` got.

    Raises:
        ValueError: there is no model of that name, or it has not been fetched yet.

    >>> locate("shapes-sd").name
    'shapes-sd'
    """
    from diffprobe.zoo import smollm2

    if name == smollm2.NAME:
        return smollm2.fetched()
    known = {model: folder for model, folder, _ in embedded()}
    if name not in known:
        every = [*known, smollm2.NAME]
        raise ValueError(f"The zoo has no model {name!r}; it has {', '.join(every)}.{did_you_mean(name, every)}")
    return known[name]
