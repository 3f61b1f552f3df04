"""Random-weight pipelines to measure: speed and memory depend on shapes, not on values.

small  Stable Diffusion 2.1's topology with about 18M parameters, 128 px images, the recipe's autoencoder and text tower
tiny   the same with the narrowest widths: for runs over many samples
sd21   Stable Diffusion 2.1's real configuration
sdxl   Stable Diffusion XL's real configuration
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from diffprobe.models import DiffusionModel
from diffprobe.sites import PAPER_SITES
from recipes import sd

SD_BLOCKS: dict[str, Any] = {
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    "use_linear_projection": True,
}
SDXL_BLOCKS: dict[str, Any] = {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
}
# SDXL has no attention at its finest level, so two of the six sites move one block up.
SDXL_SITES = (
    "D-L2-R0-B0-Cross-Q", "U-L0-R1-B0-Cross-Q", "U-L0-R1-B0-Out", "U-L1-R1-B0-Cross-Q", "U-L1-R2-B0-Cross-Q", "U-L2-R2-Res-Out",
)  # fmt: skip


@dataclass(frozen=True)
class Subject:
    """A model to measure, the image side it is given, its six sites, and the module that the last of them ends in."""

    name: str
    model: DiffusionModel
    resolution: int
    sites: tuple[str, ...] = PAPER_SITES
    last: str = "up_blocks.2.resnets.2"

    @property
    def parameters(self) -> int:
        parts = (part for part in self.model.pipeline.components.values() if isinstance(part, nn.Module))
        return sum(p.numel() for part in parts for p in part.parameters())


def filled(build: Callable[[], Any], device: str, dtype: torch.dtype) -> Any:
    """A module built without its own initialisation, which takes minutes at full size; activations stay near one."""
    with torch.device("meta"):
        module = build()
    module = nn.Module.to(module, dtype).to_empty(device=device).eval().requires_grad_(False)
    for name, parameter in module.named_parameters():
        if parameter.ndim > 1:
            parameter.normal_(std=(parameter[0].numel()) ** -0.5 if "embedding" not in name else 0.02)
        else:
            parameter.fill_(1.0 if name.endswith("weight") else 0.0)
    for name, buffer in module.named_buffers():
        if not name.endswith("position_ids"):  # the one buffer that these classes have
            raise ValueError(f"Buffer {name} of {type(module).__name__} would be left unset.")
        buffer.copy_(torch.arange(buffer.shape[-1]).expand_as(buffer))
    return module


def _text_config(tokenizer: CLIPTokenizer, width: int, layers: int, heads: int, act: str = "gelu") -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers, num_attention_heads=heads,
        projection_dim=width, hidden_act=act, max_position_embeddings=77, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip


def _real_vae(smoke: bool, scale: float) -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(32,) * 4 if smoke else (128, 256, 512, 512), layers_per_block=2, latent_channels=4, scaling_factor=scale,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
    )  # fmt: skip


def _pipeline(
    unet: UNet2DConditionModel, vae: AutoencoderKL, text: nn.Module, tokenizer: CLIPTokenizer, prediction: str
) -> DiffusionModel:
    scheduler = type(sd.build_scheduler()).from_config(sd.build_scheduler().config, prediction_type=prediction)
    pipeline = StableDiffusionPipeline(
        vae=vae, text_encoder=text, tokenizer=tokenizer, unet=unet, scheduler=scheduler,
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    return DiffusionModel(pipeline, "benchmark")


def _narrow(name: str, channels: tuple[int, ...], side: int, device: str, dtype: torch.dtype) -> Subject:
    """Heads are 32 wide and grow in number with the channels, as in the recipe."""
    torch.manual_seed(0)
    tokenizer = sd.build_tokenizer(sd.Config())
    heads = tuple(width // 32 for width in channels)
    unet = UNet2DConditionModel(
        sample_size=side // 4,
        in_channels=4,
        out_channels=4,
        block_out_channels=channels,
        cross_attention_dim=128,
        attention_head_dim=heads,
        **SD_BLOCKS,
    )
    vae, text = sd.build_vae(), sd.build_text_encoder(tokenizer)
    for part in (unet, vae, text):
        nn.Module.to(part.eval().requires_grad_(False), device, dtype)
    return Subject(name, _pipeline(unet, vae, text, tokenizer, "epsilon"), side)


def small(device: str = "cpu", dtype: torch.dtype = torch.float32, smoke: bool = False) -> Subject:
    return _narrow("small", (32,) * 4 if smoke else (64, 128, 160, 160), 64 if smoke else 128, device, dtype)


def tiny(device: str = "cpu", dtype: torch.dtype = torch.float32, smoke: bool = False) -> Subject:
    return _narrow("tiny", (32,) * 4, 64, device, dtype)


def sd21(device: str = "cpu", dtype: torch.dtype = torch.float32, smoke: bool = False) -> Subject:
    tokenizer = sd.build_tokenizer(sd.Config())
    width, layers = (64, 2) if smoke else (1024, 23)

    def unet() -> UNet2DConditionModel:
        return UNet2DConditionModel(
            sample_size=96, in_channels=4, out_channels=4, block_out_channels=(32, 32, 64, 64) if smoke else (320, 640, 1280, 1280),
            attention_head_dim=(1, 1, 2, 2) if smoke else (5, 10, 20, 20), cross_attention_dim=width, upcast_attention=True, **SD_BLOCKS,
        )  # fmt: skip

    text = filled(lambda: CLIPTextModel(_text_config(tokenizer, width, layers, width // 64)), device, dtype)
    vae = filled(lambda: _real_vae(smoke, 0.18215), device, dtype)
    return Subject("sd21", _pipeline(filled(unet, device, dtype), vae, text, tokenizer, "v_prediction"), 64 if smoke else 512)


def sdxl(device: str = "cpu", dtype: torch.dtype = torch.bfloat16, smoke: bool = False) -> Subject:
    tokenizer = sd.build_tokenizer(sd.Config())
    first, second = ((64, 2, 1), (64, 2, 1)) if smoke else ((768, 12, 12), (1280, 32, 20))

    def unet() -> UNet2DConditionModel:
        return UNet2DConditionModel(
            sample_size=128, in_channels=4, out_channels=4, block_out_channels=(32, 32, 64) if smoke else (320, 640, 1280),
            attention_head_dim=(1, 1, 2) if smoke else (5, 10, 20), transformer_layers_per_block=(1, 1, 2) if smoke else (1, 2, 10),
            cross_attention_dim=first[0] + second[0], addition_time_embed_dim=256, projection_class_embeddings_input_dim=second[0] + 6 * 256, **SDXL_BLOCKS,
        )  # fmt: skip

    pipeline = StableDiffusionXLPipeline(
        vae=filled(lambda: _real_vae(smoke, 0.13025), device, dtype),
        text_encoder=filled(lambda: CLIPTextModel(_text_config(tokenizer, *first, act="quick_gelu")), device, dtype),
        text_encoder_2=filled(lambda: CLIPTextModelWithProjection(_text_config(tokenizer, *second)), device, dtype),
        tokenizer=tokenizer, tokenizer_2=tokenizer, unet=filled(unet, device, dtype), scheduler=sd.build_scheduler(), add_watermarker=False,
    )  # fmt: skip
    return Subject("sdxl", DiffusionModel(pipeline, "benchmark"), 64 if smoke else 1024, SDXL_SITES)


MODELS: dict[str, Callable[[str, torch.dtype, bool], Subject]] = {"small": small, "tiny": tiny, "sd21": sd21, "sdxl": sdxl}
