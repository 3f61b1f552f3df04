"""A saved `FusedMLLM` as transformers' processor and model, for `AutoProcessor` and `AutoModelForImageTextToText`.

A text is a question, and a row's images stand in its first turn.  The language model's input has one image token for each soft
token; pixels go along as they are (uint8, padded to one size), because each encoder fits an image in its own way; so does the
diffusion model's prompt, a text or None for each image.

The invariant: `generate` gives the tokens of `FusedMLLM.answer` for the same questions.  Only a drawn scene's truth, which an
image carries beside its pixels for the oracle, does not pass.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub import snapshot_download
from jaxtyping import Float, Int, UInt8
from PIL import Image
from torch import Tensor
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    BatchFeature,
    GenerationConfig,
    GenerationMixin,
    PreTrainedModel,
    ProcessorMixin,
)
from transformers.image_utils import load_image

from diffprobe.data.images import to_rgb
from diffprobe.mllm.auto_config import FusedAutoConfig
from diffprobe.mllm.card import OwnCard
from diffprobe.mllm.language import IMAGE, ChatFormat, Turn, padded
from diffprobe.mllm.model import FusedMLLM
from diffprobe.mllm.streams import Picture

Message = Mapping[str, Any]
ANSWER = 32  # most tokens of an answer by default, as in `FusedMLLM.answer`


class FusedProcessor(ProcessorMixin):
    """Questions and images into what the model takes.

    Args:
        tokenizer: the language model's.
        template: how conversations are written, as in `ChatFormat`.
        image_token_id, soft_tokens: as in `FusedAutoConfig`.
    """

    def __init__(
        self, tokenizer: Any, template: str = "", image_token_id: int = 0, soft_tokens: int = 0, chat_template: Any = None
    ) -> None:
        super().__init__(tokenizer, chat_template=chat_template)
        self.template, self.image_token_id, self.soft_tokens = template, image_token_id, soft_tokens

    def __call__(
        self, images: Any = None, text: str | Sequence[str] | None = None, *, histories: Sequence[Sequence[Turn]] | None = None,
        prompts: Sequence[str | None] | None = None, return_tensors: str = "pt", padding: bool = True,
    ) -> BatchFeature:  # fmt: skip
        """The inputs of questions about images.

        Args:
            images: of each question its image, or a list of them; a text is a path or URL.
            text: a question, or several, whose rows are padded on the left to one length.
            histories: the questions and answers before each question.
            prompts: of each question the diffusion model's prompt instead of the question itself; None is no prompt.

        Raises:
            ValueError: the numbers of questions, lists of images, histories and prompts differ, or a text has image tokens.
        """
        questions = [text] if isinstance(text, str) else list(text or ())
        shown = [[] for _ in questions] if images is None else list(images) if isinstance(images, list | tuple) else [images]
        if len(questions) == 1 and not any(isinstance(own, list | tuple) for own in shown):
            shown = [shown]
        rows = [own if isinstance(own, list | tuple) else [own] for own in shown]
        told, said = questions if prompts is None else prompts, [()] * len(questions) if histories is None else histories
        if not questions or not len(questions) == len(rows) == len(told) == len(said):
            counts = f"{len(questions)} texts, {len(rows)} lists of images, {len(told)} prompts and {len(said)} histories"
            raise ValueError(f"{counts} do not match.")
        if any(IMAGE in question for question in questions):
            raise ValueError(
                f"A text is a question alone: leave {IMAGE!r} out, or give messages to apply_chat_template(tokenize=True)."
            )
        if return_tensors != "pt" or not padding:
            raise ValueError("This processor makes padded PyTorch tensors: return_tensors='pt', padding=True.")
        written = ChatFormat(self.tokenizer, template=self.template)
        lines = []
        for question, own, before in zip(questions, rows, said, strict=True):
            head, tail = written.prompt(question, bool(own), before)
            lines.append([*head, *[self.image_token_id] * (len(own) * self.soft_tokens), *tail])
        ids, mask = padded(lines, 0, "left"), padded([[1] * len(line) for line in lines], 0, "left")
        ids[mask == 0] = self.tokenizer.eos_token_id if self.tokenizer.pad_token_id is None else self.tokenizer.pad_token_id
        found: dict[str, Any] = {"input_ids": ids, "attention_mask": mask}
        if pixels := [_pixels(image) for own in rows for image in own]:
            sizes = torch.tensor([image.shape[1:] for image in pixels])
            canvas = torch.zeros(len(pixels), 3, *sizes.amax(0).tolist(), dtype=torch.uint8)
            for place, image in zip(canvas, pixels, strict=True):
                place[:, : image.shape[1], : image.shape[2]] = image
            found |= {"pixel_values": canvas, "image_sizes": sizes}
            found["prompts"] = [prompt for prompt, own in zip(told, rows, strict=True) for _ in own]
        return BatchFeature(found)

    def to_dict(self) -> dict[str, Any]:
        """Without its class's name: transformers then asks the model's config, which registers the class."""
        return {name: value for name, value in super().to_dict().items() if name != "processor_class"}

    def save_pretrained(self, save_directory: str | Path, **options: Any) -> None:
        """Write ``processor_config.json`` and the tokenizer, which would keep the class's name too."""
        self.tokenizer.save_pretrained(save_directory)
        self.to_json_file(Path(save_directory) / "processor_config.json")

    def apply_chat_template(
        self, conversation: Any, chat_template: None = None, *, tokenize: bool = False, return_dict: bool = False,
        add_generation_prompt: bool = True, continue_final_message: bool = False, processor_kwargs: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> Any:  # fmt: skip
        """A conversation, or several, that end with a question: as text, as token numbers, or as the model's inputs.

        Args:
            conversation: messages with role (user or assistant) and content, a text or a list of ``{"type": "text", "text": ...}``
                and, in the first message, ``{"type": "image", "image": ...}`` (an image, or a path or URL, also as path or url).
            tokenize: token numbers, not the text.
            return_dict: all of the model's inputs.
            processor_kwargs, options: for `__call__`.

        Raises:
            ValueError: a conversation does not end with a question, or has other roles, or images after its first message.
        """
        several = bool(conversation) and not isinstance(conversation[0], Mapping)
        parsed = [_turns(messages) for messages in (conversation if several else [conversation])]
        if chat_template is not None or continue_final_message or not add_generation_prompt:
            raise ValueError(
                "A conversation ends with a question, is written by the model's own template, and the answer begins after it."
            )
        if not tokenize:
            written = ChatFormat(self.tokenizer, template=self.template)
            texts = [written.text([*history, (question, "")], bool(images)) for images, history, question in parsed]
            return texts if several else texts[0]
        images, histories, questions = (list(part) for part in zip(*parsed, strict=True))
        found = self(images, questions, histories=histories, **(processor_kwargs or {}), **options)
        return found if return_dict else found["input_ids"]


def _turns(messages: Sequence[Message]) -> tuple[list[Any], list[Turn], str]:
    """Images, earlier turns and the last question of a conversation."""
    images, texts = [], []
    for number, message in enumerate(messages):
        content = message["content"]
        content = [{"type": "text", "text": content}] if isinstance(content, str) else content
        shown = [part for part in content if part["type"] == "image"]
        if message["role"] != ("user", "assistant")[number % 2] or (shown and number):
            raise ValueError("In a conversation, user and assistant take turns, and images stand in the first message.")
        images += [next(part[key] for key in ("image", "url", "path") if key in part) for part in shown]
        texts.append("\n".join(part["text"] for part in content if part["type"] == "text"))
    if len(texts) % 2 == 0:
        raise ValueError("A conversation ends with the user's question.")
    return images, list(zip(texts[0:-1:2], texts[1::2], strict=True)), texts[-1]


def _pixels(image: Any) -> UInt8[Tensor, "channel y x"]:
    image = load_image(image) if isinstance(image, str) else image
    rgb = to_rgb(image if isinstance(image, Image.Image) else Image.fromarray(np.asarray(image)))
    return torch.from_numpy(np.array(rgb)).permute(2, 0, 1)


class FusedForImageTextToText(OwnCard, PreTrainedModel, GenerationMixin):
    """A `FusedMLLM` as a model of transformers; `fused` is the model itself, and its encoders stay frozen where they are."""

    config_class = FusedAutoConfig
    main_input_name = "input_ids"

    def __init__(self, config: FusedAutoConfig, fused: FusedMLLM) -> None:
        super().__init__(config)
        self.fused = fused
        self.fusion, self.language_model = fused.fusion, fused.language.model
        tokenizer = fused.language.tokenizer
        end, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
        self.generation_config = GenerationConfig(
            do_sample=False, max_new_tokens=ANSWER, eos_token_id=end, pad_token_id=end if pad is None else pad
        )

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: Any, *given: Any, config: Any = None, device_map: Any = None, dtype: Any = None,
        **options: Any,
    ) -> FusedForImageTextToText:  # fmt: skip
        """A saved model from a folder or the hub.

        Args:
            device_map: a device; the best one there is by default.
            dtype: of the language model's weights; that which suits the device by default.

        Raises:
            ValueError: as `FusedMLLM.from_pretrained`.
        """
        folder = Path(pretrained_model_name_or_path)
        if not folder.is_dir():
            asked = {name: options[name] for name in ("revision", "token", "cache_dir", "local_files_only") if name in options}
            folder = Path(snapshot_download(str(pretrained_model_name_or_path), **asked))
        device = None if device_map in (None, "auto") else str(device_map)
        fused = FusedMLLM.from_pretrained(folder, device)
        model = cls(auto_config(fused), fused)
        if dtype not in (None, "auto"):
            model.language_model.to(dtype)
        return model.eval()

    def save_pretrained(self, save_directory: Any, *, max_shard_size: Any = None) -> None:
        """As `FusedMLLM.save_pretrained`."""
        self.fused.save_pretrained(save_directory, max_shard_size=max_shard_size)

    def card(self) -> str:
        return self.fused.card()

    def get_input_embeddings(self) -> Any:
        return self.fused.language.embeddings

    def embed(
        self, input_ids: Int[Tensor, "row position"], pixel_values: UInt8[Tensor, "image channel y x"] | None = None,
        image_sizes: Int[Tensor, "image side"] | None = None, prompts: Sequence[str | None] | None = None,
    ) -> Float[Tensor, "row position width"]:  # fmt: skip
        """The language model's input, soft tokens in their places.

        Raises:
            ValueError: there are more or fewer image tokens than soft tokens.
        """
        places = input_ids == self.config.image_token_id
        embeddings: Tensor = self.fused.language.embeddings(input_ids.masked_fill(places, 0))
        if pixel_values is None or image_sizes is None:
            return embeddings
        arrays = pixel_values.permute(0, 2, 3, 1).cpu().numpy()
        pictures = [
            Picture.of(Image.fromarray(array[:height, :width]))
            for array, (height, width) in zip(arrays, image_sizes.tolist(), strict=True)
        ]
        soft = self.fused.see(pictures, [None] * len(pictures) if prompts is None else list(prompts))
        if places.sum() != soft.shape[0] * soft.shape[1]:
            raise ValueError(f"{int(places.sum())} image tokens do not fit {len(soft)} images of {soft.shape[1]} soft tokens.")
        return embeddings.masked_scatter(places[..., None], soft.to(embeddings))

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, pixel_values: Tensor | None = None,
        image_sizes: Tensor | None = None, prompts: Sequence[str | None] | None = None, **options: Any,
    ) -> Any:  # fmt: skip
        """The language model's output for what a processor made; with `labels`, its loss."""
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        return self.language_model(
            inputs_embeds=self.embed(input_ids, pixel_values, image_sizes, prompts), attention_mask=mask,
            position_ids=(mask.cumsum(1) - 1).clamp(min=0), **options,
        )  # fmt: skip

    @torch.no_grad()
    def generate(self, input_ids: Tensor, attention_mask: Tensor | None = None, **options: Any) -> Any:
        """The inputs' token numbers, and the answers' after them; greedy by default, with all options of transformers."""
        seen = {name: options.pop(name, None) for name in ("pixel_values", "image_sizes", "prompts")}
        said = self.language_model.generate(
            inputs_embeds=self.embed(input_ids, **seen), attention_mask=attention_mask,
            **{"generation_config": self.generation_config} | options,
        )  # fmt: skip
        new = said if isinstance(said, Tensor) else said.sequences
        whole = torch.cat([input_ids.repeat_interleave(len(new) // len(input_ids), 0), new], 1)
        return whole if isinstance(said, Tensor) else type(said)(**said | {"sequences": whole})


def auto_config(fused: FusedMLLM) -> FusedAutoConfig:
    """What transformers has to know of a model."""
    outside = max(len(fused.language.tokenizer), fused.language.embeddings.num_embeddings)
    return FusedAutoConfig(
        fused=asdict(fused.config), tuned=fused.tuned, image_token_id=outside, soft_tokens=fused.soft_tokens,
        architectures=[FusedForImageTextToText.__name__],
    )  # fmt: skip


def write_auto_files(fused: FusedMLLM, folder: Path) -> None:
    """Write what the auto classes read: ``config.json``, ``processor_config.json`` and a tokenizer."""
    config, language = auto_config(fused), fused.language
    config.save_pretrained(folder)
    processor = FusedProcessor(language.tokenizer, fused.config.template, config.image_token_id, config.soft_tokens)
    processor.save_pretrained(folder)


AutoProcessor.register(FusedAutoConfig, FusedProcessor, exist_ok=True)
AutoModelForImageTextToText.register(FusedAutoConfig, FusedForImageTextToText, exist_ok=True)
