"""Record, probe and reuse what text-to-image diffusion models know.

Public names load on first use, so that opening a store needs no torch.  Transformers' auto classes know saved models
(`diffprobe.mllm`).

>>> from diffprobe import open_store, features
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

import diffprobe.mllm  # noqa: F401 (makes saved models known to transformers)

if TYPE_CHECKING:  # these are exported
    from diffprobe.data import load_dataset as load_dataset
    from diffprobe.edit import Edit as Edit
    from diffprobe.encoders import load_encoder as load_encoder
    from diffprobe.extraction import extract as extract
    from diffprobe.matching import alignment_score as alignment_score
    from diffprobe.mllm.leakage import leakage_report as leakage_report
    from diffprobe.mllm.model import FusedMLLM as FusedMLLM
    from diffprobe.mllm.verdict import judge_leakage as judge_leakage
    from diffprobe.models import load_model as load_model
    from diffprobe.probes.correspondence import correspondence as correspondence
    from diffprobe.probes.knn import knn_probe as knn_probe
    from diffprobe.probes.linear import fit_probe as fit_probe
    from diffprobe.probes.localization import localization_score as localization_score
    from diffprobe.probes.similarity import similarity as similarity
    from diffprobe.probes.streaming import stream_probe as stream_probe
    from diffprobe.recorder import Recorder as Recorder
    from diffprobe.sites import list_sites as list_sites
    from diffprobe.store import attention_maps as attention_maps
    from diffprobe.store import features as features
    from diffprobe.store import open_store as open_store

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
__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'diffprobe' has no attribute {name!r}; it has {', '.join(sorted(_HOMES))}")
    value = getattr(import_module(f"diffprobe.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
