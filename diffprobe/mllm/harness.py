"""A trained `FusedMLLM` as a model of lmms-eval, the field's own harness (Zhang et al. 2024; PyPI lmms_eval 0.7.3).

The harness finds it by the entry point group ``lmms_eval.models``, so after an installation of both::

    python -m lmms_eval --model diffprobe --model_args pretrained=runs/fused --tasks mmvp --output_path runs/mmvp

The invariant: the harness gets what `FusedMLLM.answer` gives, greedily, cut at the task's stop strings and nothing else.
Its scores can differ from `diffprobe.mllm.evaluate`'s on the same answers, because it reads answers by other rules.

lmms_eval is no dependency, because its own dependencies are those of a hundred other models; `INSTALL` adds what is needed here.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from PIL import Image

from diffprobe.data.images import to_rgb

try:
    from lmms_eval.api.model import lmms as _Model
except ImportError:  # the harness is optional, and this module can be read without it
    _Model = object

INSTALL = "pip install 'diffprobe[harness]' && pip install --no-deps lmms_eval==0.7.3"
MAX_NEW_TOKENS = 32  # for a task that does not say


def manifest() -> Any:
    """What the entry point gives the harness: the model's name, and where its class is."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(model_id="diffprobe", simple_class_path=f"{__name__}.{HarnessModel.__name__}")


class HarnessModel(_Model):
    """Answers the harness's requests with a saved `FusedMLLM`.

    Args:
        pretrained: the folder that `FusedMLLM.save_pretrained` wrote.
        device: "cpu", "cuda:0"; the best there is by default.  With several processes each takes its own.
        max_new_tokens: the most that a task may ask for; no bound by default.
        options: other options of the harness, which have no effect here.
    """

    is_simple = True  # requests carry a text and what reads the images, not chat messages

    def __init__(
        self, pretrained: str = "", device: str | None = None, batch_size: int | str = 32, max_new_tokens: int | None = None,
        **options: Any,
    ) -> None:  # fmt: skip
        super().__init__()
        if not pretrained:
            raise ValueError("Which model? Give its folder: --model_args pretrained=FOLDER.")
        if not str(batch_size).isdigit() or int(batch_size) < 1:
            raise ValueError(f"batch_size is {batch_size!r}; give a whole number of at least 1.")
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            from accelerate import PartialState

            device = str(PartialState().device)
        from diffprobe.mllm.model import FusedMLLM

        self.model = FusedMLLM.from_pretrained(pretrained, device)
        self.batch_size, self.limit = int(batch_size), max_new_tokens

    @property
    def device(self) -> Any:
        """The language model's device, where the harness gathers counts of several processes."""
        return self.model.language.device

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """The answers, in the order of the requests.

        Args:
            requests: each with `args` (text, generation settings, what gives a document's images, document, task, split).

        Raises:
            ValueError: a task shows something other than images.
        """
        outputs = [""] * len(requests)
        wanted = [int(request.args[1].get("max_new_tokens") or MAX_NEW_TOKENS) for request in requests]
        lengths = wanted if self.limit is None else [min(length, int(self.limit)) for length in wanted]
        for length in sorted(set(lengths)):
            numbers = [k for k, own in enumerate(lengths) if own == length]
            for start in range(0, len(numbers), self.batch_size):  # only the images of one batch are in memory
                part = numbers[start : start + self.batch_size]
                images, texts = [self._images(requests[k]) for k in part], [requests[k].args[0] for k in part]
                said = self.model.answer(images, texts, max_new_tokens=length, batch=self.batch_size)
                for k, text in zip(part, said, strict=True):
                    outputs[k] = _cut(text, requests[k].args[1].get("until"))
        return outputs

    def _images(self, request: Any) -> list[Image.Image]:
        text, _, visuals, document, task, split = request.args
        shown = list(visuals(self.task_dict[task][split][document]) or ())
        for one in shown:
            if not isinstance(one, Image.Image):
                raise ValueError(f"Task {task!r} shows {type(one).__name__} with {text[:60]!r}; this model sees images only.")
        return [to_rgb(one, f"an image of task {task!r}") for one in shown]

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """Not offered: every benchmark of this package is answered in words."""
        raise NotImplementedError("This model writes answers; choose tasks whose output_type is generate_until.")

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
        """Not offered: each question is answered by itself."""
        raise NotImplementedError(
            "This model answers one question at a time; choose tasks whose output_type is generate_until."
        )


def _cut(text: str, until: str | Sequence[str] | None) -> str:
    """The text before the first of the stop strings.

    >>> _cut("left ASSISTANT: right", ["ASSISTANT:"]), _cut("left", None)
    ('left ', 'left')
    """
    for stop in [until] if isinstance(until, str) else until or ():
        if stop:
            text = text.partition(stop)[0]
    return text
