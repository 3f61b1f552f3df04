"""The real configuration without its weights: SD 2.1, CLIP-L/336 and a 7B Llama (Vicuna-1.5) in one fused model.

    python -m experiments.dry_run [--fusion concat] [--utilisation 0.3] [--no-checkpointing] ...
    torchrun --nproc-per-node 2 -m experiments.dry_run --rehearse runs/rehearsal

Every part is built on the meta device from its published shape, so nothing is downloaded and no memory is needed.  Printed:
parameters of each part and which are trained in which stage; tokens of an image; FLOPs of a sample; hours of both stages of
LLaVA-1.5's recipe (558,128 captions, then 665,298 instructions) and memory of a GPU under DDP and FSDP, on 1, 8 and 64 GPUs.
FLOPs of the convolutional parts are counted by torch on the meta device, up to the site that is read; those of transformers
by `experiments.plan`.  Assumed, and options: how many text tokens a sample has, the share of the peak that is reached, and
the peak itself (an A100's in bfloat16).  Ten seconds on one core.

``--rehearse`` builds the same architectures with tiny random weights and trains two steps of both stages on drawn data, with the
code that trains the real ones.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from diffprobe.mllm.fusion import CLIP, DIFFUSION, FUSIONS, Fusion
from diffprobe.sites import list_sites, select_sites
from experiments.plan import Engine, Transformer, Weights, hours, memory

ENGINES: tuple[Engine, ...] = ("DDP", "FSDP")


@dataclass(frozen=True)
class Config:
    """What is planned; the defaults are the paper's model and LLaVA-1.5's recipe.

    Attributes:
        fusion: of `FUSIONS`.
        sites: of the diffusion model; their channels stand side by side.
        guidance: 0 and 1 take one pass of the diffusion model in stage 2, all others two; stage 1 always one.
        resolution: of the diffusion model's input, in pixels.
        grid: tokens on a side of an image, for every stream; CLIP-L/336 has 24.
        text_tokens: of a sample in stage 1 and 2, assumed.
        samples: of the stages.
        batch: of the stages, over all GPUs.
        most: samples that a GPU works on at a time, of the stages; more are accumulated.
        gpus: numbers of GPUs.
        gigabytes: of one.
        peak: FLOPs a second of one.
        utilisation: share of the peak that is reached, assumed.
        checkpointing: compute the language model's activations twice.
    """

    fusion: str = "cross_attention"
    sites: tuple[str, ...] = ("U-L1-R1-B0-Cross-Q",)
    guidance: float = 4.0
    resolution: int = 512
    grid: int = 24
    text_tokens: tuple[int, int] = (32, 384)
    samples: tuple[int, int] = (558_128, 665_298)
    batch: tuple[int, int] = (256, 128)
    most: tuple[int, int] = (32, 16)
    gpus: tuple[int, ...] = (1, 8, 64)
    gigabytes: float = 80.0
    peak: float = 312e12
    utilisation: float = 0.4
    checkpointing: bool = True


# --- the parts, by their published shapes ---------------------------------------------------------


@dataclass(frozen=True)
class Shapes:
    """What the five networks are built from; the defaults are published."""

    channels: tuple[int, ...] = (320, 640, 1280, 1280)
    heads: tuple[int, ...] = (5, 10, 20, 20)
    vae: tuple[int, ...] = (128, 256, 512, 512)
    text: tuple[int, int, int, int] = (1024, 4096, 23, 16)  # width, inner width, layers, heads
    vision: tuple[int, int, int, int] = (1024, 4096, 24, 16)
    pixels: int = 336
    language: tuple[int, int, int, int] = (4096, 11008, 32, 32)
    words: tuple[int, int] = (49408, 32000)  # that the text encoder and the language model know


PUBLISHED = Shapes()
TINY = Shapes((32,) * 4, (1, 2, 2, 2), (32,) * 4, (32, 64, 2, 2), (32, 64, 3, 2), 56, (32, 64, 2, 2))


def build_parts(shapes: Shapes = PUBLISHED, device: str = "meta") -> dict[str, Any]:
    """The five networks with random weights, or on the meta device with none."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import (
        CLIPTextConfig,
        CLIPTextModel,
        CLIPVisionConfig,
        CLIPVisionModel,
        LlamaConfig,
        LlamaForCausalLM,
    )

    def sizes(given: tuple[int, int, int, int]) -> dict[str, int]:
        return dict(zip(("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"), given, strict=True))

    with torch.device(device):
        return {
            "VAE (SD 2.1)": AutoencoderKL(
                block_out_channels=shapes.vae, down_block_types=("DownEncoderBlock2D",) * 4,
                up_block_types=("UpDecoderBlock2D",) * 4, layers_per_block=2, latent_channels=4,
            ),
            "UNet (SD 2.1)": UNet2DConditionModel(
                sample_size=96, block_out_channels=shapes.channels, cross_attention_dim=shapes.text[0],
                attention_head_dim=shapes.heads, use_linear_projection=True,
            ),
            "text encoder (SD 2.1)": CLIPTextModel(CLIPTextConfig(
                **sizes(shapes.text), hidden_act="gelu", projection_dim=512, vocab_size=shapes.words[0],
            )),
            "CLIP-L/336": CLIPVisionModel(CLIPVisionConfig(
                **sizes(shapes.vision), image_size=shapes.pixels, patch_size=14, projection_dim=768,
            )),
            "Llama 7B (Vicuna-1.5)": LlamaForCausalLM(LlamaConfig(
                **sizes(shapes.language), vocab_size=shapes.words[1], max_position_embeddings=4096,
            )),
        }  # fmt: skip


def shape_of(model: Any) -> Transformer:
    """The shape of a transformer of the library, from its config.

    A vision model's patches are counted apart (`encoder_flops`).
    """
    config = model.config
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    gated = hasattr(config, "num_key_value_heads")
    return Transformer(
        config.num_hidden_layers, config.hidden_size, config.intermediate_size,
        config.hidden_size // config.num_attention_heads * heads, gated, config.vocab_size if gated else 0,
    )  # fmt: skip


def parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


# --- counting -------------------------------------------------------------------------------------


class _Reached(Exception):
    """The last wanted site was computed."""


def forward_flops(network: nn.Module, run: Callable[[], Any], until: Sequence[str] = ()) -> tuple[int, dict[str, Any]]:
    """FLOPs of a forward pass that ends when the modules `until` have been computed, and the shapes of what they gave."""
    shapes: dict[str, Any] = {}

    def note(path: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            shapes[path] = tuple((output[0] if isinstance(output, tuple) else output).shape)
            if len(shapes) == len(until):
                raise _Reached

        return hook

    handles = [network.get_submodule(path).register_forward_hook(note(path)) for path in until]
    counter = FlopCounterMode(display=False)
    try:
        with torch.no_grad(), counter:
            run()
    except _Reached:
        pass
    finally:
        for handle in handles:
            handle.remove()
    return counter.get_total_flops(), shapes


def encoder_flops(parts: dict[str, Any], config: Config) -> tuple[dict[str, int], int]:
    """FLOPs of one forward pass of each encoder for one image, and the channels of the diffusion stream."""
    vae, unet, text, clip = (parts[name] for name in list(parts)[:4])
    pixels = torch.zeros(1, 3, config.resolution, config.resolution, device="meta")
    latent = torch.zeros(1, 4, config.resolution // 8, config.resolution // 8, device="meta")
    words = torch.zeros(1, 77, text.config.hidden_size, device="meta")
    sites = select_sites(list_sites(name for name, _ in unet.named_modules() if name), config.sites)
    step = torch.zeros(1, dtype=torch.long, device="meta")
    denoised, shapes = forward_flops(unet, lambda: unet(latent, step, words), [site.path for site in sites])
    patch = 3 * clip.config.patch_size**2 * clip.config.hidden_size
    patches = (clip.config.image_size // clip.config.patch_size) ** 2
    flops = {
        "VAE (SD 2.1)": forward_flops(vae, lambda: vae.encode(pixels))[0],
        "UNet (SD 2.1)": denoised,
        "text encoder (SD 2.1)": shape_of(text).forward_flops(77),
        "CLIP-L/336": shape_of(clip).forward_flops(patches + 1) + 2 * patches * patch,
    }
    # a sequence of tokens has its channels last, a picture has them second
    return flops, sum(shape[-1] if len(shape) == 3 else shape[1] for shape in shapes.values())


@dataclass(frozen=True)
class Plan:
    """The tables that are printed; `costs` and `memories` are tidy."""

    parts: pd.DataFrame
    tokens: int
    costs: pd.DataFrame
    memories: pd.DataFrame


def plan(config: Config, parts: dict[str, Any] | None = None) -> Plan:
    """Everything that is printed, from the shapes alone."""
    parts = build_parts() if parts is None else parts
    *_, clip, language = parts.values()
    seen, channels = encoder_flops(parts, config)
    streams = FUSIONS[config.fusion]
    sizes = {CLIP: clip.config.hidden_size, DIFFUSION: channels}
    fusion = Fusion(config.fusion, sizes, language.config.hidden_size)
    tokens = config.grid**2 * (2 if config.fusion in ("sequence", "interleave") else 1)
    dummies = {name: torch.zeros(1, config.grid**2, sizes[name]) for name in streams}
    fused, _ = forward_flops(fusion, lambda: fusion(dummies))
    used = [name for name in seen if (CLIP if name == "CLIP-L/336" else DIFFUSION) in streams]
    shape, name = shape_of(language), list(parts)[-1]
    held = {**{part: parameters(parts[part]) for part in used}, "fusion": parameters(fusion), name: parameters(language)}
    table = pd.DataFrame(
        [{"part": part, "parameters": count, "stage 1": _mode(part in ("fusion",)), "stage 2": _mode(part in ("fusion", name))}
         for part, count in held.items()]
    )  # fmt: skip
    costs: list[dict[str, Any]] = []
    memories: list[dict[str, Any]] = []
    for stage, trained in ((1, False), (2, True)):
        length = tokens + config.text_tokens[stage - 1]
        passes = 2 if trained and config.guidance not in (0, 1) else 1
        flops = {part: seen[part] * (passes if part in ("UNet (SD 2.1)", "text encoder (SD 2.1)") else 1) for part in used}
        flops |= {"fusion": 3 * fused, name: shape.training_flops(length, trained=trained, checkpointing=config.checkpointing)}
        total = sum(flops.values())
        weights = Weights(
            trained=held["fusion"] + (held[name] if trained else 0), frozen=0 if trained else held[name],
            apart=sum(held[part] for part in used), largest=shape.layer_weights(),
            root=held["fusion"] + held[name] - shape.layers * shape.layer_weights(),
        )  # fmt: skip
        for gpus in config.gpus:
            samples = config.samples[stage - 1]
            took = hours(total, samples, gpus, config.peak, config.utilisation)
            costs.append({"stage": stage, "gpus": gpus, "tokens": length, **flops, "total": total, "hours": took})
            at_once = max(1, min(config.most[stage - 1], config.batch[stage - 1] // gpus))
            kept = at_once * shape.activations(length, checkpointing=config.checkpointing)
            for engine in ENGINES:
                found = memory(weights, kept, engine, gpus)
                memories.append(
                    {"stage": stage, "gpus": gpus, "engine": engine, "samples": at_once, "weights": found.weights,
                     "gradients": found.gradients, "optimizer": found.optimizer, "activations": found.activations,
                     "total": found.total, "fits": found.total <= config.gigabytes * 1e9}
                )  # fmt: skip
    return Plan(table, tokens, pd.DataFrame(costs), pd.DataFrame(memories))


def _mode(trained: bool) -> str:
    return "trained" if trained else "frozen"


# --- the same parts, small, in training -----------------------------------------------------------


def rehearse(folder: Path, steps: int = 2) -> dict[str, list[float]]:
    """Train both stages for a few steps on tiny random weights of the same architectures; under torchrun, in all its processes.

    Returns:
        The losses of the steps, by stage.
    """
    from diffusers import DDIMScheduler, StableDiffusionPipeline
    from transformers import CLIPTokenizer

    from diffprobe.data.conversations import DrawnCaptions, DrawnInstructions
    from diffprobe.encoders import VisionEncoder
    from diffprobe.mllm.config import STAGE1, STAGE2, FusedConfig
    from diffprobe.mllm.language import LanguageModel, load_language_model
    from diffprobe.mllm.model import FusedMLLM
    from diffprobe.mllm.stages import train_stage
    from diffprobe.models import DiffusionModel
    from diffprobe.zoo import locate

    words = CLIPTokenizer.from_pretrained(locate("shapes-sd") / "tokenizer")  # one trained anew numbers words otherwise
    speech = load_language_model("shapes-lm", "cpu").tokenizer
    torch.manual_seed(0)  # all processes begin with the same weights
    shapes = replace(TINY, words=(len(words), len(speech)))
    vae, unet, text, clip, language = (part.eval().requires_grad_(False) for part in build_parts(shapes, "cpu").values())
    unet.register_to_config(sample_size=16)
    pipeline = StableDiffusionPipeline(
        vae=vae, text_encoder=text, tokenizer=words, unet=unet, safety_checker=None, feature_extractor=None,
        scheduler=DDIMScheduler(beta_schedule="scaled_linear", prediction_type="v_prediction", clip_sample=False, steps_offset=1),
        requires_safety_checker=False,
    )  # fmt: skip
    side = {"height": shapes.pixels, "width": shapes.pixels}
    model = FusedMLLM.build(
        FusedConfig(language_model="tiny", encoder="tiny", diffusion="tiny", grid=4),
        language=LanguageModel(language, speech, "tiny"), diffusion=DiffusionModel(pipeline, "tiny"),
        encoder=VisionEncoder(clip, {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "crop_size": side}, "tiny"),
    )  # fmt: skip
    train_stage(model, DrawnCaptions(8), folder / "stage1", replace(STAGE1, batch=4, steps=steps))
    train_stage(model, DrawnInstructions(8), folder / "stage2", replace(STAGE2, batch=4, steps=steps), start="stage1")
    return {name: pd.read_csv(folder / name / "loss.csv").loss.tolist() for name in ("stage1", "stage2")}


# --- saying it ------------------------------------------------------------------------------------


def lines(found: Plan, config: Config) -> Iterator[str]:
    """The tables as text."""
    shown = found.parts.assign(parameters=[f"{count:,}" for count in found.parts.parameters])
    yield shown.to_string(index=False)
    yield f"\n{found.tokens} tokens an image ({config.grid} x {config.grid} of each stream, {config.fusion})\n"
    yield "TFLOPs of a sample"
    costs = found.costs
    first = costs[costs.gpus == costs.gpus.iloc[0]].drop(columns=["gpus", "hours"]).set_index("stage").T
    yield first.apply(
        lambda row: row.map(lambda v: f"{v:,.0f}" if row.name == "tokens" else f"{v / 1e12:.3f}"), axis=1
    ).to_string()
    yield (
        f"\nHours of an epoch ({config.samples[0]:,} and {config.samples[1]:,} samples), at an assumed {config.utilisation:.0%} of "
        f"{config.peak / 1e12:.0f} TFLOP/s a GPU"
    )
    time = costs.pivot(index="stage", columns="gpus", values="hours")
    yield (
        pd.concat([time, time.sum().rename("both").to_frame().T]).map("{:,.1f}".format).rename_axis(columns="GPUs").to_string()
    )
    yield f"\nGB of a GPU, of {config.gigabytes:.0f}; samples at a time on one, the others of the batch in turn"
    sizes = ["weights", "gradients", "optimizer", "activations", "total"]
    table = found.memories.assign(**{name: (found.memories[name] / 1e9).map("{:.1f}".format) for name in sizes})
    yield table.assign(fits=table.fits.map({True: "yes", False: "NO"})).to_string(index=False)


def read_arguments(arguments: Sequence[str]) -> tuple[Config, Path | None]:
    """The command line's options over the defaults, and where to rehearse, if at all."""
    default = Config()
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--fusion", choices=sorted(FUSIONS), default=default.fusion)
    parser.add_argument("--sites", nargs="+", default=default.sites, help="of SD 2.1's UNet, by paper name")
    for name in ("guidance", "utilisation", "peak", "gigabytes"):
        parser.add_argument(f"--{name}", type=float, default=getattr(default, name))
    for name in ("resolution", "grid"):
        parser.add_argument(f"--{name}", type=int, default=getattr(default, name))
    for name in ("text-tokens", "samples", "batch", "most"):
        given = getattr(default, name.replace("-", "_"))
        parser.add_argument(f"--{name}", type=int, nargs=2, metavar=("STAGE1", "STAGE2"), default=given)
    parser.add_argument("--gpus", type=int, nargs="+", default=default.gpus)
    parser.add_argument("--checkpointing", action=argparse.BooleanOptionalAction, default=default.checkpointing)
    parser.add_argument("--rehearse", type=Path, metavar="FOLDER", help="train two steps of both stages on tiny random weights")
    given = vars(parser.parse_args(arguments))
    folder = given.pop("rehearse")
    return Config(**{name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}), folder


def main(arguments: Sequence[str]) -> None:
    config, folder = read_arguments(arguments)
    if folder is not None:
        for stage, losses in rehearse(folder).items():
            print(f"{stage}: losses {', '.join(f'{loss:.4f}' for loss in losses)}")
        return
    try:
        for line in lines(plan(config), config):
            print(line)
    except ValueError as error:
        print(f"dry_run: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main(sys.argv[1:])
