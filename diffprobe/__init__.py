"""Record, probe and reuse what text-to-image diffusion models know.

The names that a notebook types.  They load on first use, so that opening a store needs no torch.

>>> from diffprobe import open_store, features
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffprobe.data import load_dataset
    from diffprobe.extraction import extract
    from diffprobe.models import load_model
    from diffprobe.probes.linear import fit_probe
    from diffprobe.recorder import Recorder
    from diffprobe.sites import list_sites
    from diffprobe.store import attention_maps, features, open_store

_HOMES = {
    "Recorder": "recorder",
    "attention_maps": "store",
    "extract": "extraction",
    "features": "store",
    "fit_probe": "probes.linear",
    "list_sites": "sites",
    "load_dataset": "data",
    "load_model": "models",
    "open_store": "store",
}
__all__ = [
    "Recorder",
    "attention_maps",
    "extract",
    "features",
    "fit_probe",
    "list_sites",
    "load_dataset",
    "load_model",
    "open_store",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'diffprobe' has no attribute {name!r}; it has {', '.join(sorted(_HOMES))}")
    value = getattr(import_module(f"diffprobe.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
