"""Checkpoints: a single file in place of a folder, LoRA adapters with their scales, pickle files, and hashes of weights.

diffusers and peft do the loading.  Adapters are not merged into the weights, so that their scales stay numbers that
`DiffusionModel.weights_hash` counts.
"""

from __future__ import annotations

import hashlib
import json
import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import diffusers
import torch
from diffusers import DiffusionPipeline
from diffusers.loaders.single_file_utils import fetch_diffusers_config, load_single_file_checkpoint
from diffusers.utils.peft_utils import set_weights_and_activate_adapters
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

PICKLES = (".bin", ".ckpt", ".pt", ".pth")
_VOCABULARIES: WeakKeyDictionary[Any, tuple[int, str]] = WeakKeyDictionary()
_DIGESTS: dict[bool, WeakTensorKeyDictionary] = {False: WeakTensorKeyDictionary(), True: WeakTensorKeyDictionary()}
TRUST = "can run code when it is read: if you trust it, --allow-pickle (use_safetensors=False) loads it."


def parse_lora(text: str) -> tuple[Path, float]:
    """A LoRA's file and scale from ``FILE[:scale]``.

    Raises:
        ValueError: there is no such file, or the scale is not finite.

    >>> parse_lora("nowhere.safetensors:0.8")
    Traceback (most recent call last):
    ValueError: There is no LoRA file 'nowhere.safetensors'; give FILE or FILE:SCALE, such as style.safetensors:0.8.
    """
    head, _, tail = text.rpartition(":")
    try:
        path, scale = Path(head or text), float(tail) if head else 1.0
    except ValueError:  # a colon of the path
        path, scale = Path(text), 1.0
    if not path.expanduser().is_file():
        raise ValueError(f"There is no LoRA file '{path}'; give FILE or FILE:SCALE, such as style.safetensors:0.8.")
    if not math.isfinite(scale):
        raise ValueError(f"The scale of the LoRA '{path}' is {scale}; it must be a finite number.")
    return path.expanduser().absolute(), scale


def refuse_pickle(path: Path) -> None:
    """Raises ValueError for a file of weights that can run code."""
    if path.suffix.lower() in PICKLES:
        raise ValueError(f"'{path}' is a pickle file, which {TRUST}")


def pickle_hint(source: str, error: Exception) -> str:
    """What to add to a message about weights that were not found: that there are some which are only read when asked for."""
    there = Path(source).is_dir() and any(file.suffix in PICKLES for file in Path(source).rglob("*"))
    return f" There are weights in a pickle file, which {TRUST}" if there or ".bin" in str(error) else ""


def load_single_file(file: Path, index: dict[str, Any], config: str | None, dtype: torch.dtype) -> DiffusionPipeline:
    """The pipeline of a single file in the original layout.

    Args:
        index: The model index of `config`, which names the pipeline's class.
        config: A folder with the configs and tokenizers of such a model, or a hub id.

    Raises:
        ValueError: that class is not loaded from single files, or file and configs do not fit.
    """
    kind = str(index.get("_class_name"))
    load = getattr(getattr(diffusers, kind, None), "from_single_file", None)
    if load is None:
        raise ValueError(f"a {kind} cannot be loaded from a single file; give a folder in diffusers' layout.")
    options: dict[str, Any] = {"safety_checker": None} if "safety_checker" in index else {}
    local = Path(str(config)).is_dir()
    try:
        return load(str(file), config=config, dtype=dtype, local_files_only=local, **options)
    except Exception as error:  # diffusers raises KeyError, RuntimeError and kinds of its own where keys do not fit
        raise ValueError(f"it is no {kind} with the configs of '{config}' ({error}).") from error


def guess_config(file: Path) -> str:
    """The hub id of the model that a single file's keys and shapes are those of."""
    found = fetch_diffusers_config(load_single_file_checkpoint(str(file)))
    return str(found["pretrained_model_name_or_path"])


def add_loras(pipeline: Any, loras: Sequence[tuple[Path, float]]) -> None:
    """Loads adapters into a pipeline and sets their scales.

    Raises:
        ValueError: the pipeline takes none, or a file holds none that fit it.
    """
    names = [f"lora{number}" for number in range(len(loras))]
    for name, (path, _) in zip(names, loras, strict=True):
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # several are meant
                pipeline.load_lora_weights(str(path.parent), weight_name=path.name, adapter_name=name, local_files_only=True)
        except Exception as error:  # peft and diffusers raise what they meet
            raise ValueError(f"The LoRA '{path}' does not fit a {type(pipeline).__name__}: {error}") from error
        if not any(name in adapters for adapters in pipeline.get_list_adapters().values()):
            raise ValueError(f"The LoRA '{path}' has no weights for a {type(pipeline).__name__}.")
    # part by part: the pipeline's own set_adapters fails where a network's blocks differ in their number of layers
    for part, adapters in pipeline.get_list_adapters().items():
        scales = [(name, scale) for name, (_, scale) in zip(names, loras, strict=True) if name in adapters]
        set_weights_and_activate_adapters(getattr(pipeline, part), *map(list, zip(*scales, strict=True)))


def adapters_of(network: nn.Module) -> list[tuple[str, dict[str, float]]]:
    """The modules of a network that have active adapters, with each adapter's factor, in the order of modules."""
    found = []
    for path, module in network.named_modules():
        scaling = getattr(module, "scaling", None)
        if isinstance(scaling, dict) and scaling and not getattr(module, "disable_adapters", False):
            active = {name: float(scaling[name]) for name in getattr(module, "active_adapters", ()) if name in scaling}
            found += [(path, active)] if active else []
    return found


# --- hashes -------------------------------------------------------------------------------------------


def weights_hash(network: nn.Module, portable: bool = False) -> str:
    """A short hash of a network's parameters and buffers: names, shapes, types and every value.

    Args:
        portable: of the values in bfloat16, so that a CPU's float32 and a GPU's bfloat16 of the same weights agree.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(network.state_dict(keep_vars=True).items()):
        kind = "" if portable else f"{tensor.dtype} "
        digest.update(f"{name} {kind}{tuple(tensor.shape)} ".encode() + _digest(tensor, portable))
    return digest.hexdigest()[:16]


def vocabulary_hash(tokenizer: Any) -> str:
    """A hash of a tokenizer's words and their numbers, kept until it has more."""
    known = _VOCABULARIES.get(tokenizer)
    if known is None or known[0] != len(tokenizer):
        words = json.dumps(sorted(tokenizer.get_vocab().items())).encode()
        known = _VOCABULARIES[tokenizer] = (len(tokenizer), hashlib.sha256(words).hexdigest())
    return known[1]


def _digest(tensor: Tensor, portable: bool) -> bytes:
    """Digest of a tensor's values, kept for as long as the tensor is the same.

    That is told from its memory, torch's count of writes and, since writes through ``.data`` are not counted, 64 values.
    """
    flat = tensor.detach().flatten()
    some = _bytes(flat[:: max(1, flat.numel() // 64)], portable)
    now = (tensor.data_ptr(), tensor._version, some)
    known = _DIGESTS[portable].get(tensor)
    if known is None or known[0] != now:
        known = _DIGESTS[portable][tensor] = (now, hashlib.sha256(_bytes(flat, portable)).digest())
    return bytes(known[1])


def _bytes(flat: Tensor, portable: bool) -> bytes:
    values = flat.to(torch.bfloat16) if portable and flat.is_floating_point() else flat
    return values.cpu().contiguous().view(torch.uint8).numpy().tobytes()
