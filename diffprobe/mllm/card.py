"""The page that describes a saved model (README.md), and how it goes to the hub.

The invariant: a page that a person wrote is never replaced.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
from transformers.utils import PushToHubMixin

from diffprobe.mllm.fusion import CLIP, DIFFUSION, FUSIONS
from diffprobe.rundir import write_whole

if TYPE_CHECKING:
    from diffprobe.mllm.model import FusedMLLM

MARK = "<!-- made by diffprobe; take this line away, and the page stays as it is -->"
_UNWRITTEN = "[More Information Needed]"  # stands in the page that transformers makes for a model without one
TUNED = {"": "frozen", "full": "trained whole", "lora": "a trained adapter (LoRA)"}
USE = """```python
import diffprobe  # makes the three classes known
from transformers import AutoModelForImageTextToText, AutoProcessor

processor = AutoProcessor.from_pretrained(name)
model = AutoModelForImageTextToText.from_pretrained(name)
inputs = processor(images=image, text="What is in the picture?")
print(processor.batch_decode(model.generate(**inputs)[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
```"""


class OwnCard(PushToHubMixin):
    """`push_to_hub` of transformers, with the model's own page in place of an empty one."""

    def card(self) -> str:
        """The page's text."""
        raise NotImplementedError

    def _upload_modified_files(self, working_dir: str | os.PathLike[str], *given: Any, **options: Any) -> Any:
        write_card(Path(working_dir), self.card())
        return super()._upload_modified_files(working_dir, *given, **options)


def write_card(folder: Path, text: str) -> None:
    """Write README.md, unless a person wrote the one that is there."""
    path = folder / "README.md"
    there = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else MARK
    if MARK in there or _UNWRITTEN in there:
        write_whole(path, text)


def model_card(model: FusedMLLM) -> str:
    """What a model is made of, what it was trained on, and its scores where 'diffprobe mllm eval' left them in its folder."""
    config, streams = model.config, FUSIONS[model.config.fusion]
    names = [config.language_model, *([config.encoder] * (CLIP in streams)), *([config.diffusion] * (DIFFUSION in streams))]
    bases = [name for name in names if name.count("/") == 1 and not Path(name).exists()]  # ids of the hub
    head = {"library_name": "transformers", "pipeline_tag": "image-text-to-text", "tags": ["diffprobe"], "base_model": bases}
    shown = {key: Path(value).name if Path(str(value)).is_dir() else value for key, value in asdict(config).items()}
    made: dict[str, object] = {"language model": f"{shown['language_model']}, {TUNED[model.tuned]}", "fusion": config.fusion}
    if CLIP in streams:
        made["vision encoder"] = f"{shown['encoder']}, {config.layer or 'its second-to-last layer'}"
    if DIFFUSION in streams:
        made |= {"diffusion model": shown["diffusion"], "sites": ", ".join(config.sites), "timestep": config.timestep}
        made["guidance"] = f"{config.guidance:g}"
    made |= {"tokens": f"{config.grid} x {config.grid} of each stream", "template": config.template or "the tokenizer's"}
    reads = DIFFUSION in streams and config.guidance != 0
    parts = [
        "\n".join(["---", *(f"{key}: {json.dumps(value)}" for key, value in head.items() if value), "---"]),
        "# A language model that sees through frozen encoders",
        "A fusion of image features, trained into a language model."
        + " The diffusion model reads each question as its prompt." * reads,
        _table([("part", "value"), *made.items()]),
        f"Trained on: {', then '.join(model.data)}." if model.data else "",
        _scores(model.folder),
        f"## Use\n\nIt takes `pip install diffprobe`, and the parts above, which are loaded by name.\n\n{USE}",
        MARK,
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _scores(folder: Path | None) -> str:
    """The main scores of each benchmark, with intervals."""
    path = folder / "eval" / "scores.csv" if folder else None
    if path is None or not path.is_file():
        return ""
    frame = pd.read_csv(path)
    frame = frame[frame["group"].isin(["all", "macro"])].round(3)
    columns = ["benchmark", "score", "condition", "value", "low", "high", "chance", "n"]
    blind = "`own` is the image with its question; `blank`, an even image, and `text`, none, are blind baselines."
    return f"## Scores\n\n{blind}\n\n{_table([columns, *frame[columns].to_numpy().tolist()])}"


def _table(rows: Sequence[Sequence[object]]) -> str:
    lines = ["| " + " | ".join(str(cell).replace("|", "\\|") for cell in row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])
