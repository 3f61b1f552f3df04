"""A multimodal language model that sees through frozen encoders: CLIP, and a diffusion model that is prompted with the question.

Image and question go through the encoders (`streams`), are fused and projected into soft tokens (`fusion`), and stand in
the language model's input where the image was named (`language.build_inputs`).  Several images stand one after the other.

A saved model holds what was trained: the fusion, and the language model or its adapter if that was tuned.  Each frozen part is
kept as a name with a hash of its weights, and loading refuses an encoder with other weights.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from diffprobe.checkpoints import weights_hash
from diffprobe.data.images import to_rgb
from diffprobe.encoders import VisionEncoder, load_encoder
from diffprobe.mllm.card import OwnCard, model_card, write_card
from diffprobe.mllm.config import GREEDY, FusedConfig, Sampling, Tuned, read_config
from diffprobe.mllm.fusion import CLIP, DIFFUSION, FUSIONS, TWICE, Fusion
from diffprobe.mllm.language import LanguageModel, Turn, build_inputs, generate, load_language_model
from diffprobe.mllm.streams import (
    DiffusionEncoder,
    Encoder,
    FeatureCache,
    ImageEncoder,
    Picture,
    Streams,
    TruthEncoder,
)
from diffprobe.models import DiffusionModel, kept_name, load_model, quiet
from diffprobe.rundir import file_digest, whole_file, write_json

CONFIG, WEIGHTS = "fused_mllm.json", "fusion.safetensors"


class FusedMLLM(OwnCard):
    """Frozen encoders, a fusion, a language model.

    Args:
        config: what the model is made of.
        streams: its encoders; `build` loads those that the config names.
        fusion: trained or fresh.
        language: its language model.
        tuned: what was trained of the language model that the config names.

    Attributes:
        data: names of what it was trained on, one for each stage.
        folder: where it was loaded from.

    >>> model = FusedMLLM.from_pretrained("runs/fused")  # doctest: +SKIP
    >>> model.answer([[image]], ["Which way does the red arrow point?"])  # doctest: +SKIP
    ['left']
    """

    def __init__(
        self, config: FusedConfig, streams: Streams, fusion: Fusion, language: LanguageModel, tuned: Tuned = ""
    ) -> None:
        self.config, self.streams, self.language, self.tuned = config, streams, language, tuned
        self.fusion = fusion.to(language.device)
        self.data: list[str] = []
        self.folder: Path | None = None

    @classmethod
    def build(
        cls, config: FusedConfig | None = None, device: str | None = None, *, language: LanguageModel | None = None,
        encoder: VisionEncoder | None = None, diffusion: DiffusionModel | None = None, cache: FeatureCache | None = None,
    ) -> FusedMLLM:  # fmt: skip
        """A model with a fresh fusion.

        Args:
            language, encoder, diffusion: loaded ones instead of those that the config names.
            cache: keeps the encoders' features.

        Raises:
            ValueError: a part is not there, or the fusion lacks one.
        """
        config = config or FusedConfig()
        encoders = _encoders(config, device, encoder, diffusion)
        streams = Streams(encoders, config.grid, config.merge, config.guidance, cache)
        language = language or load_language_model(config.language_model, device, template=config.template)
        fusion = Fusion(
            config.fusion, streams.channels(), language.width, projector=config.projector, rms=language.rms, heads=config.heads,
            seed=config.seed,
        )  # fmt: skip
        return cls(config, streams, fusion, language)

    # --- seeing -----------------------------------------------------------------------------------

    def see(self, pictures: Sequence[Picture], prompts: Sequence[str | None]) -> Float[Tensor, "picture token width"]:
        """Soft tokens of pictures, each under its prompt."""
        if not pictures:
            return torch.zeros(0, 0, self.language.width, device=self.language.device)
        features = self.streams(pictures, prompts)
        soft: Tensor = self.fusion({name: tokens.to(self.language.device) for name, tokens in features.items()})
        return soft

    @property
    def soft_tokens(self) -> int:
        """Soft tokens of an image."""
        return self.streams.grid**2 * (2 if self.fusion.kind in TWICE else 1)

    # --- answering --------------------------------------------------------------------------------

    @torch.no_grad()
    def answer(
        self, images: Sequence[Sequence[Image.Image]], questions: Sequence[str], *, max_new_tokens: int = 32, batch: int = 32,
        prompts: Sequence[str | None] | None = None, histories: Sequence[Sequence[Turn]] | None = None, sampling: Sampling = GREEDY,
    ) -> list[str]:  # fmt: skip
        """Answers to questions about images, greedy by default.

        Args:
            images: the images of each question, in any of Pillow's modes; an empty list asks the language model alone.
            questions: one for each list of images.
            max_new_tokens: the longest answer.
            batch: questions answered together; the answers do not depend on it.
            prompts: the diffusion model's prompts in place of the questions; None is no prompt.
            histories: the questions and answers before each question, whose images are those of the whole conversation.
            sampling: where answers are drawn, each of them depends on the seed and on its own question alone.

        Raises:
            ValueError: the numbers of images, questions, prompts and histories differ.
        """
        prompts = questions if prompts is None else prompts
        if not len(images) == len(questions) == len(prompts):
            raise ValueError(
                f"{len(images)} lists of images, {len(questions)} questions and {len(prompts)} prompts do not match."
            )
        histories = [()] * len(questions) if histories is None else histories
        if len(histories) != len(questions):
            raise ValueError(f"{len(questions)} questions and {len(histories)} histories do not match.")
        batch = 1 if sampling.temperature else batch
        self.fusion.eval()
        self.language.model.eval()
        answers = [""] * len(questions)
        # rows of a batch have as many images, and questions of about one length, so little of it is padding
        order = sorted(range(len(questions)), key=lambda k: (len(images[k]), len(questions[k])))
        for start in range(0, len(order), batch):
            part = order[start : start + batch]
            pictures = [Picture.of(to_rgb(image)) for k in part for image in images[k]]
            soft = self.see(pictures, [prompts[k] for k in part for _ in images[k]])
            inputs = build_inputs(
                self.language, soft, [questions[k] for k in part], images=[len(images[k]) for k in part],
                histories=[histories[k] for k in part],
            )  # fmt: skip
            for k, text in zip(part, generate(self.language, inputs, max_new_tokens, sampling), strict=True):
                answers[k] = text
        return answers

    @property
    def cut_prompts(self) -> int:
        """Number of different prompts that were longer than the diffusion model's text encoder takes, and were cut."""
        encoder = self.streams.encoders.get(DIFFUSION)
        return len(encoder.engine.cut) if isinstance(encoder, DiffusionEncoder) else 0

    # --- keeping ----------------------------------------------------------------------------------

    def save_pretrained(
        self, folder: str | Path, weights: Mapping[str, Mapping[str, Tensor]] | None = None, *, max_shard_size: Any = None
    ) -> None:
        """Write ``fused_mllm.json``, ``fusion.safetensors``, and ``language/`` or ``adapter/`` if the language model was tuned.

        Beside them stand a page that describes the model, README.md, and what transformers' auto classes read.

        Args:
            folder: is made if it does not exist.
            weights: state dicts of "fusion" and "language" instead of the model's own, which may be spread over processes.
            max_shard_size: the largest file of a language model that was tuned as a whole; transformers' own by default.
        """
        from diffprobe.mllm.auto import write_auto_files

        folder, weights = Path(folder), weights or {}
        folder.mkdir(parents=True, exist_ok=True)
        if self.tuned:
            part = folder / {"full": "language", "lora": "adapter"}[self.tuned]
            with quiet(str(folder)):
                sharding = {"max_shard_size": max_shard_size} if max_shard_size and self.tuned == "full" else {}
                self.language.model.save_pretrained(part, state_dict=weights.get("language"), **sharding)
            if self.tuned == "full":
                self.language.tokenizer.save_pretrained(part)
        fusion = weights.get("fusion") or self.fusion.state_dict()
        with whole_file(folder / WEIGHTS) as beside:
            save_file({name: value.contiguous() for name, value in fusion.items()}, beside)
        written = [folder / WEIGHTS, *(sorted(part.rglob("*")) if self.tuned else [])]
        files = {path.relative_to(folder).as_posix(): file_digest(path) for path in written if path.is_file()}
        config = asdict(self.config)
        for name in (
            "language_model",
            "encoder",
            "diffusion",
        ):  # folders by their whole path: a model is loaded from elsewhere too
            config[name] = kept_name(config[name])
        write_auto_files(self, folder)
        write_card(folder, self.card())
        kept = {"config": config, "tuned": self.tuned, "origins": self.origins(), "files": files, "data": self.data}
        write_json(folder / CONFIG, kept)  # the last, because it says that all is there

    def card(self) -> str:
        """The page that describes the model."""
        return model_card(self)

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, device: str | None = None, *, encoder: VisionEncoder | None = None,
        diffusion: DiffusionModel | None = None, cache: FeatureCache | None = None,
    ) -> FusedMLLM:  # fmt: skip
        """A saved model, its encoders loaded by name.

        Raises:
            ValueError: there is none, a file is missing or not as it was written, or an encoder has other weights than in
                training.
        """
        folder = Path(folder)
        if not (folder / CONFIG).is_file() or not (folder / WEIGHTS).is_file():
            raise ValueError(f"{folder} holds no fused model: {CONFIG} and {WEIGHTS} are needed.")
        kept = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        config, tuned = read_config(kept["config"], folder / CONFIG), kept["tuned"]
        for name, digest in kept.get("files", {}).items():  # earlier versions kept none
            if not (folder / name).is_file() or file_digest(folder / name) != digest:
                raise ValueError(
                    f"{folder / name} is not what was written there (its checksum differs); copy it anew, or train again."
                )
        source = folder / "language" if tuned == "full" else config.language_model
        language = load_language_model(source, device, template=config.template)
        if tuned == "lora":
            from peft import PeftModel

            language = LanguageModel(
                PeftModel.from_pretrained(language.model, str(folder / "adapter"), torch_device=str(language.device)),
                language.tokenizer,
                language.name,
                language.template,
            )
        model = cls.build(config, device, language=language, encoder=encoder, diffusion=diffusion, cache=cache)
        model.fusion.load_state_dict(load_file(folder / WEIGHTS))
        model.fusion.eval()
        model.tuned, model.data, model.folder = tuned, kept.get("data", []), folder
        here = model.origins(), model.origins(portable=False)  # the second is what earlier versions kept
        if differing := [name for name in here[0] if kept["origins"].get(name) not in [origins[name] for origins in here]]:
            name = {CLIP: config.encoder, DIFFUSION: config.diffusion}.get(differing[0], config.language_model)
            raise ValueError(
                f"{folder} was trained with other weights or settings of {name!r} than are there now ({differing[0]}); "
                "give it the ones it was trained with, or train it again."
            )
        return model

    def origins(self, portable: bool = True) -> dict[str, Any]:
        """What decides the features of each stream, and the untuned language model's hash; alike on a CPU and a GPU if portable."""
        found: dict[str, Any] = {
            name: [json.loads(json.dumps(encoder.origin(site, portable))) for site in encoder.sites]
            for name, encoder in self.streams.encoders.items()
        }
        return found if self.tuned else {**found, "language_model": weights_hash(self.language.model, portable)}


def _encoders(
    config: FusedConfig, device: str | None, encoder: VisionEncoder | None, diffusion: DiffusionModel | None
) -> dict[str, Encoder]:
    """The encoders that a config's fusion needs, by the name of their stream."""
    if config.fusion not in FUSIONS:
        raise ValueError(f"Fusion {config.fusion!r} is not one of {', '.join(FUSIONS)}.")
    found: dict[str, Encoder] = {}
    if CLIP in FUSIONS[config.fusion]:
        found[CLIP] = ImageEncoder(encoder or load_encoder(config.encoder, device), config.layer, config.fit)
    if DIFFUSION in FUSIONS[config.fusion]:
        kind, _, name = config.sites[0].partition(":")
        if config.sites == TruthEncoder.sites:
            found[DIFFUSION] = TruthEncoder()
        elif kind == "encoder":
            found[DIFFUSION] = ImageEncoder(load_encoder(name, device), fit=config.fit)
        else:
            model = diffusion or load_model(config.diffusion, device)
            found[DIFFUSION] = DiffusionEncoder(model, config.sites, config.timestep, config.noise_seed, config.fit)
    return found
