"""Settings of a fused model, of its answers and of its trainings: frozen dataclasses of plain values, readable without torch.

`asdict` of a config is what a run folder keeps; a folder that holds other settings is refused.  A new field therefore needs a
default that does what earlier versions did.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args

REQUEST = "Describe the image."
TEMPLATES = ("", "v1", "plain")  # how a conversation is written: the tokenizer's own way, or one of `language.FORMATS`
Tuned = Literal["", "full", "lora"]  # what is trained of the language model
Precision = Literal["auto", "no", "bf16"]


# --- the model --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class BackboneConfig:
    """The frozen parts of a fused model, and the token grid that their features are brought to.

    Attributes:
        language_model: hub id, folder or name, for `load_language_model`.
        encoder: the vision encoder, for `load_encoder`; not loaded if the fusion does not use it.
        diffusion: the diffusion model, for `load_model`; not loaded if the fusion does not use it.
        grid: tokens per side.
        merge: "mean" averages the places of a token, "stack" concatenates their channels.
        noise_seed: seed of the diffusion model's noise.
    """

    language_model: str = "shapes-lm"
    encoder: str = "shapes-clip"
    diffusion: str = "shapes-sd"
    grid: int = 8
    merge: str = "mean"
    noise_seed: int = 0


@dataclass(frozen=True)
class FusedConfig(BackboneConfig):
    """What a `FusedMLLM` is made of.

    Attributes:
        template: how the language model is spoken to; "" is its tokenizer's chat template.
        fusion: one of `diffprobe.mllm.fusion.FUSIONS`.
        layer: layer of the vision encoder; "" is its second-to-last.
        sites: sites of the diffusion model, whose channels are concatenated.  Controls in place of sites: "latent" (the image
            before the network), "text" (the prompt alone), "truth" (the oracle: what a drawn scene says) and
            "encoder:NAME" (the second-to-last layer of another vision encoder).
        timestep: timestep of the diffusion model's noise.
        guidance: s in f_u + s (f_c - f_u); 0 never reads the question.
        projector: one of `diffprobe.mllm.projector.KINDS`.
        heads: heads of cross-attention.
        fit: how images that are not square reach the encoders: pad (as LLaVA-1.5), crop or squash.
        seed: seed of the fusion's first weights.
    """

    template: str = ""
    fusion: str = "cross_attention"
    layer: str = ""
    sites: tuple[str, ...] = ("U-L1-R1-B0-Cross-Q",)
    timestep: int = 50
    guidance: float = 4.0
    projector: str = "mlp2x_gelu"
    heads: int = 4
    fit: str = "pad"
    seed: int = 0


def read_config(given: Mapping[str, Any], source: str | Path) -> FusedConfig:
    """A config from its plain form.

    Raises:
        ValueError: it has a field that no config has.

    >>> read_config({"fusion": "clip", "sites": ["U-L2-R1-B0-Cross-Q"]}, "here").sites
    ('U-L2-R1-B0-Cross-Q',)
    """
    known = [field.name for field in fields(FusedConfig)]
    if unknown := [name for name in given if name not in known]:
        raise ValueError(f"{source}: {unknown[0]!r} is no setting of a fused model; settings are {', '.join(known)}.")
    plain: dict[str, Any] = {name: tuple(value) if name == "sites" else value for name, value in given.items()}
    return FusedConfig(**plain)


# --- answers ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sampling:
    """How the tokens of an answer are chosen.

    Attributes:
        temperature: 0 takes the likeliest; above, tokens are drawn from softmax(logits / temperature).
        top_p: they are drawn among the fewest that have this share together (nucleus sampling, Holtzman et al. 2020).
        seed: of the draws.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not (0 <= self.temperature < float("inf") and 0 < self.top_p <= 1):
            raise ValueError(
                f"A temperature is at least 0 and top_p above 0, at most 1; got {self.temperature:g} and {self.top_p:g}."
            )
        if self.top_p < 1 and not self.temperature:
            raise ValueError(f"top_p is {self.top_p:g}, but nothing is drawn at a temperature of 0; set one, such as 0.7.")


GREEDY = Sampling()


# --- trainings --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Schedule:
    """What decides the steps of a training.

    Attributes:
        steps: optimizer steps at most.
        batch: samples of a step, over all processes.
        accumulate: forward passes of each process per step.
        learning_rate: after a warm-up over 3% of the steps; it then falls to zero along a cosine.
        dropout: share of samples that are shown their unconditional features instead, drawn anew in each step.
        evaluate_every: steps between checkpoints, and between evaluations on the dev split where there is one.
        patience: evaluations without a better dev loss after which training ends; 0 never ends it.
        seed: seed of the weights, the order of the samples and the dropout.
    """

    steps: int = 400
    batch: int = 32
    accumulate: int = 1
    learning_rate: float = 1e-3
    dropout: float = 0.0
    evaluate_every: int = 50
    patience: int = 3
    seed: int = 0


@dataclass(frozen=True)
class TrainConfig(Schedule):
    """Everything but the data that decides a projector's weights; defaults follow LLaVA-1.5's stage 1.

    Attributes:
        kind: one of `diffprobe.mllm.projector.KINDS`.
        request: what the user asks for.
    """

    kind: str = "mlp2x_gelu"
    request: str = REQUEST


@dataclass(frozen=True)
class StageConfig(Schedule):
    """One of the two stages of a fused model; `STAGE1` and `STAGE2` have LLaVA-1.5's values.

    Attributes:
        steps: 0 is `epochs` times through the data.
        epochs: used if `steps` is 0.
        tune: what is trained of the language model: "" nothing, "full" all of it, "lora" an adapter.
        prompted: whether the diffusion model is given the question as its prompt.
        template: how conversations are written in this stage; "" is the model's own way.
        max_length: tokens of a conversation after its first question; longer ones are cut.
        lora_rank, lora_alpha: rank and scale of the adapter.
        checkpointing: recompute the language model's activations in the backward pass, to save memory.
        precision: "no" computes in float32, "bf16" in bfloat16 where torch's autocast does (weights stay float32); "auto" is
            accelerate's own configuration, else bf16 on a GPU and no on a CPU.
    """

    steps: int = 0
    epochs: int = 1
    patience: int = 0
    tune: Tuned = ""
    prompted: bool = False
    template: str = ""
    max_length: int = 2048
    lora_rank: int = 128
    lora_alpha: int = 256
    checkpointing: bool = False
    precision: Precision = "auto"

    def __post_init__(self) -> None:
        for name, known in (("tune", get_args(Tuned)), ("precision", get_args(Precision)), ("template", TEMPLATES)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} is one of {', '.join(map(repr, known))}; got {getattr(self, name)!r}.")


STAGE1 = StageConfig(batch=256, learning_rate=1e-3)
STAGE2 = StageConfig(batch=128, learning_rate=2e-5, tune="full", prompted=True)
SMALL1 = StageConfig(steps=1500, batch=24, learning_rate=2e-3, precision="bf16")
SMALL2 = StageConfig(steps=800, batch=24, learning_rate=1e-3, tune="full", prompted=True, precision="bf16")
RECIPES = {"llava": (STAGE1, STAGE2), "small": (SMALL1, SMALL2)}  # "small" is made for the embedded models
