"""The config by which transformers knows a saved `FusedMLLM`; `diffprobe.mllm` registers it when transformers is used.

The invariant: this module imports nothing but transformers' configs, for it is imported in the middle of transformers.  The
processor and the model are registered by the first config that is made, before their auto classes look for a class.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from transformers.configuration_utils import PreTrainedConfig
from transformers.models.auto.configuration_auto import AutoConfig

MODEL_TYPE = "diffprobe_fused"


class FusedAutoConfig(PreTrainedConfig):
    """What ``config.json`` of a saved model says.

    Args:
        fused: a `diffprobe.mllm.config.FusedConfig` in its plain form.
        tuned: what was trained of the language model.
        image_token_id: stands for a soft token among the token numbers; no token of the tokenizer has it.
        soft_tokens: soft tokens of an image.
    """

    model_type = MODEL_TYPE

    def __init__(
        self, fused: dict[str, Any] | None = None, tuned: str = "", image_token_id: int = 0, soft_tokens: int = 0, **others: Any
    ) -> None:
        self.fused, self.tuned, self.image_token_id, self.soft_tokens = fused or {}, tuned, image_token_id, soft_tokens
        super().__init__(**others)
        import_module("diffprobe.mllm.auto")


AutoConfig.register(MODEL_TYPE, FusedAutoConfig, exist_ok=True)
