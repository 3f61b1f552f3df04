"""Record, probe and reuse what text-to-image diffusion models know.

Public names load on first use, so that opening a store needs no torch.  Transformers' auto classes know saved models
(`diffprobe.mllm`).

>>> from diffprobe import open_store, features
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

import diffprobe.mllm  # noqa: F401 (makes saved models known to transformers)

if TYPE_CHECKING:
    from diffprobe.data import load_dataset
    from diffprobe.edit import Edit
    from diffprobe.encoders import load_encoder
    from diffprobe.extraction import extract
    from diffprobe.matching import alignment_score
    from diffprobe.mllm.leakage import leakage_report
    from diffprobe.mllm.model import FusedMLLM
    from diffprobe.mllm.verdict import judge_leakage
    from diffprobe.models import load_model
    from diffprobe.probes.correspondence import correspondence
    from diffprobe.probes.knn import knn_probe
    from diffprobe.probes.linear import fit_probe
    from diffprobe.probes.localization import localization_score
    from diffprobe.probes.similarity import similarity
    from diffprobe.probes.streaming import stream_probe
    from diffprobe.recorder import Recorder
    from diffprobe.sites import list_sites
    from diffprobe.store import attention_maps, features, open_store

_HOMES = {
    "Edit": "edit",
    "FusedMLLM": "mllm.model",
    "Recorder": "recorder",
    "alignment_score": "matching",
    "attention_maps": "store",
    "correspondence": "probes.correspondence",
    "extract": "extraction",
    "features": "store",
    "fit_probe": "probes.linear",
    "judge_leakage": "mllm.verdict",
    "knn_probe": "probes.knn",
    "leakage_report": "mllm.leakage",
    "list_sites": "sites",
    "load_dataset": "data",
    "load_encoder": "encoders",
    "load_model": "models",
    "localization_score": "probes.localization",
    "open_store": "store",
    "similarity": "probes.similarity",
    "stream_probe": "probes.streaming",
}
__all__ = [
    "Edit",
    "FusedMLLM",
    "Recorder",
    "alignment_score",
    "attention_maps",
    "correspondence",
    "extract",
    "features",
    "fit_probe",
    "judge_leakage",
    "knn_probe",
    "leakage_report",
    "list_sites",
    "load_dataset",
    "load_encoder",
    "load_model",
    "localization_score",
    "open_store",
    "similarity",
    "stream_probe",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'diffprobe' has no attribute {name!r}; it has {', '.join(sorted(_HOMES))}")
    value = getattr(import_module(f"diffprobe.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
