"""Families of text-to-image pipelines: how each one's own code is asked for text and for what its network is given.

A family is a row of `FAMILIES`: the names of what its `encode_prompt` returns, and where it departs from the others.  No family's
arguments are written again here.  A copy of the pipeline runs its own call up to the network, with a scheduler that stands at one
timestep, and what it would give the network is kept; so masks, position numbers, sizes and the scale of time are the library's.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from diffprobe.prompts import EncodedText, join_tokens

_BOTH = ("prompt_embeds", "prompt_attention_mask", "negative_prompt_embeds", "negative_prompt_attention_mask")
_POOLED = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
# Of `encode_prompt`, these are given as the pipeline's call gives them by default.
_OPTIONS = ("max_sequence_length", "complex_human_instruction", "text_encoder_out_layers", "system_prompt")
TIME_NAMES = ("timestep", "timesteps", "t")  # of a network's parameters
_ONCE: tuple[tuple[str, Mapping[str, Any]], ...] = (("", {}),)


@dataclass(frozen=True)
class Family:
    """How the pipelines of one family depart from the others.

    Attributes:
        name: what `DiffusionModel.family` says.
        returns: what `encode_prompt` returns, by the names of the pipeline's call; empty for what the call makes anew.
        flow: x_t = (1 - s) x_0 + s e at the training timestep 1000 s, and the network predicts e - x_0; else a schedule with
            alphas_cumprod.
        sign: -1 where the network predicts x_0 - e.
        packed: 2 where 2 x 2 latents become a token before the pass.
        patched: whether the latents themselves are 2 x 2 places of the image encoder's, normalised by its `bn`.
        guided: whether the call's guidance_scale goes into the network.
        null: the unconditional input: the call's "negative" prompt, a text, or None where the family has none.
        alone: prompts are padded to the longest without a mask, so each is encoded by itself.
        limit: the most text tokens, where prompts keep their own lengths; 0 where all are padded to one.
        encode: more arguments of `encode_prompt`; a second call's results get its suffix.
    """

    name: str
    returns: tuple[str, ...]
    network: str = "transformer"
    flow: bool = True
    sign: int = 1
    packed: int = 1
    patched: bool = False
    guided: bool = False
    null: str | None = "negative"
    alone: bool = False
    limit: int = 0
    encode: tuple[tuple[str, Mapping[str, Any]], ...] = _ONCE

    @property
    def mask(self) -> str | None:
        """The name of the text's mask."""
        return next((name for name in self.returns if "mask" in name and not name.startswith("negative")), None)


_SD = Family("sd", _POOLED[:2], "unet", flow=False, null="")
_SDXL = Family("sdxl", _POOLED, "unet", flow=False, null="")
_PIXART = Family("pixart", _BOTH, flow=False, null="", encode=(("", {"clean_caption": False}),))
_HUNYUAN_ENCODERS = tuple(
    (suffix, {"max_sequence_length": length, "text_encoder_index": number})
    for number, (suffix, length) in enumerate((("", 77), ("_2", 256)))
)
FAMILIES: dict[str, Family] = {
    "StableDiffusionPipeline": _SD,
    "StableDiffusionImg2ImgPipeline": _SD,
    "StableDiffusionXLPipeline": _SDXL,
    "StableDiffusionXLImg2ImgPipeline": _SDXL,
    "PixArtAlphaPipeline": _PIXART,
    "PixArtSigmaPipeline": _PIXART,
    "StableDiffusion3Pipeline": Family("sd3", _POOLED),
    "FluxPipeline": Family("flux", ("prompt_embeds", "pooled_prompt_embeds", ""), packed=2, guided=True, null=None),
    "Flux2Pipeline": Family("flux2", ("prompt_embeds", ""), patched=True, guided=True, null=None),
    "Flux2KleinPipeline": Family("flux2-klein", ("prompt_embeds", ""), patched=True, null=""),
    "QwenImagePipeline": Family("qwen-image", ("prompt_embeds", "prompt_embeds_mask"), packed=2, null=" ", limit=512),
    "ZImagePipeline": Family("z-image", ("prompt_embeds", "negative_prompt_embeds"), sign=-1, limit=512),
    "SanaPipeline": Family("sana", _BOTH),
    "Lumina2Pipeline": Family("lumina2", _BOTH, sign=-1),
    "AuraFlowPipeline": Family("aura-flow", _BOTH),
    "ChromaPipeline": Family(
        "chroma",
        ("prompt_embeds", "", "prompt_attention_mask", "negative_prompt_embeds", "", "negative_prompt_attention_mask"),
        packed=2,
    ),
    "CogView4Pipeline": Family("cogview4", _POOLED[:2], alone=True, limit=1024),
    "HunyuanDiTPipeline": Family("hunyuan-dit", (_BOTH[0], _BOTH[2], _BOTH[1], _BOTH[3]), flow=False, encode=_HUNYUAN_ENCODERS),
    "KolorsPipeline": Family("kolors", _POOLED, "unet", flow=False),
    "LatentConsistencyModelPipeline": Family("lcm", _POOLED[:2], "unet", flow=False, guided=True, null=None),
}
SUPPORTED = (
    "Stable Diffusion 1.x and 2.x (epsilon and v), Stable Diffusion XL, their Turbo models, LCM, Kolors, PixArt-alpha and -sigma, "
    "HunyuanDiT, Stable Diffusion 3, Flux.1, Flux.2, Qwen-Image, Z-Image, Sana, Lumina 2, AuraFlow, Chroma, CogView4"
)


def family_of(*class_names: str) -> Family:
    """The family of a pipeline's class, given by name with the classes that it derives from.

    Raises:
        ValueError: none is supported.
    """
    families = [FAMILIES[name] for name in class_names if name in FAMILIES]
    if not families:
        raise ValueError(f"A {class_names[0]} is not supported. Supported: {SUPPORTED}.")
    return families[0]


def _parameters(pipeline: Any, method: str) -> Mapping[str, inspect.Parameter]:
    """What a method of the library's pipeline takes, of which a user's own may derive."""
    known = next(cls for cls in type(pipeline).__mro__ if cls.__name__ in FAMILIES)
    return inspect.signature(getattr(known, method)).parameters


def refuse_unknown_inputs(network: nn.Module, family: str, name: str) -> None:
    """Raise ValueError, naming it, where a network needs an input that `DiffusionModel.given` does not have."""
    config: Any = network.config
    if not hasattr(network, "down_blocks"):
        return
    known = (None, "text", *(["text_time"] if family in ("sdxl", "kolors") else []))
    needs = {
        "a guidance scale (time_cond_proj_dim), as consistency models do": family != "lcm" and config.time_cond_proj_dim is not None,
        "class labels (class_embed_type, num_class_embeds)": getattr(network, "class_embedding", None) is not None,
        f"more than text (addition_embed_type {config.addition_embed_type})": config.addition_embed_type not in known,
        f"images (encoder_hid_dim_type {config.encoder_hid_dim_type}), as an IP-Adapter does; unload_ip_adapter() removes it":
            config.encoder_hid_dim_type not in (None, "text_proj"),
    }  # fmt: skip
    if found := [what for what, needed in needs.items() if needed]:
        raise ValueError(
            f"The network of {name} also takes {'; and '.join(found)}: this is not given here, and without it its features "
            f"would not be its own. Supported: {SUPPORTED}."
        )


# --- text -------------------------------------------------------------------------------------------


def encode_prompts(family: Family, pipeline: Any, texts: list[str], device: torch.device, null: bool) -> dict[str, Tensor]:
    """What the pipeline makes of texts, by the names that its call takes; a list of texts is padded, with a mask.

    Args:
        null: as the call encodes its negative prompt.
    """
    call, takes = _parameters(pipeline, "__call__"), _parameters(pipeline, "encode_prompt")
    negative = null and family.null == "negative"
    found: dict[str, Any] = {}
    for suffix, own in family.encode:
        given: dict[str, Any] = {"device": device, "num_images_per_prompt": 1, "do_classifier_free_guidance": negative}
        given |= {name: call[name].default for name in _OPTIONS if name in call} | {"negative_prompt": list(texts), **own}
        given |= dict.fromkeys(("prompt_2", "prompt_3"))  # further encoders are given the same
        # A pipeline may write its template into the list that it is given.
        returned = pipeline.encode_prompt(list(texts), **{name: value for name, value in given.items() if name in takes})
        named = dict(zip(family.returns, returned, strict=False))
        wanted = {name: f"negative_{name}" if negative else name for name in family.returns if not name.startswith("negative")}
        found |= {name + suffix: named[source] for name, source in wanted.items() if name}
    embeddings = found["prompt_embeds"]
    if isinstance(embeddings, list):
        found["mask"] = join_tokens([torch.ones(1, len(rows), dtype=torch.long, device=device) for rows in embeddings])
        found["prompt_embeds"] = join_tokens([rows[None] for rows in embeddings])
    elif family.mask and found[family.mask] is None:  # all of them are as long
        found[family.mask] = torch.ones(embeddings.shape[:2], dtype=torch.long, device=device)
    return found


def encoded_text(
    family: Family, found: Mapping[str, Tensor], dtype: torch.dtype, ids: Tensor, spans: Tensor, cut: Sequence[bool]
) -> EncodedText:
    """What `encode_prompts` found, in the network's number type."""
    found = {n: t.to(dtype) if "embeds" in n and t.is_floating_point() else t for n, t in found.items() if t is not None}
    embeddings, pooled = found.pop("prompt_embeds"), found.pop("pooled_prompt_embeds", None)
    name = family.mask or "mask"
    plain = name in found and found[name].shape == embeddings.shape[:2]  # else it stays what the pipeline made of it
    mask = found.pop(name) if plain else None
    return EncodedText(embeddings, mask, pooled, ids, spans, tuple(cut), found)


# --- what the network is given ----------------------------------------------------------------------


class _Called(Exception):
    """Ends a pipeline's call where it calls its network."""


class _Listener:
    """Stands in for a network in a pipeline's call, which ends where it is called; keeps what it is given."""

    def __init__(self, network: nn.Module, dtype: torch.dtype) -> None:
        self._network, self.dtype = network, dtype
        self.given: dict[str, Any] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._network, name)

    def cache_context(self, name: str) -> AbstractContextManager[None]:
        return nullcontext()

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.pop("return_dict", None)
        self.given = dict(inspect.signature(self._network.forward).bind(*args, **kwargs).arguments)
        raise _Called


def standing_at(scheduler: Any, timestep: float, dtype: torch.dtype) -> Any:
    """A copy of a scheduler whose only timestep is this one, and which leaves latents as they are."""

    class Standing(type(scheduler)):  # type: ignore[misc]
        init_noise_sigma = 1.0

        def set_timesteps(
            self, num_inference_steps: Any = None, device: Any = None, timesteps: Any = None, sigmas: Any = None, **others: Any
        ) -> None:
            self.timesteps, self.num_inference_steps = torch.tensor([timestep], dtype=dtype, device=device), 1

        def scale_model_input(self, sample: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            return sample

    still = copy.copy(scheduler)
    still.__class__ = Standing
    vars(still).pop("init_noise_sigma", None)
    return still


@torch.no_grad()
def network_given(
    family: Family,
    pipeline: Any,
    latents: Float[Tensor, "row channel y x"],
    text: EncodedText,
    timestep: float,
    guidance: float,
) -> dict[str, Any]:
    """What the pipeline gives its network for latents, text and one timestep, by the names of the network's parameters.

    Args:
        guidance: of a `guided` family; the others are asked not to guide.
    """
    twin, takes = copy.copy(pipeline), _parameters(pipeline, "__call__")
    network = getattr(pipeline, family.network)
    listener = _Listener(network, network.dtype)
    still = standing_at(pipeline.scheduler, timestep, torch.float32 if family.flow else torch.int64)
    vars(twin).update({family.network: listener, "scheduler": still, "_progress_bar_config": {"disable": True}})
    for name in ("text_encoder", "text_encoder_2", "text_encoder_3"):  # pipelines bring the text to their number type
        if getattr(pipeline, name, None) is not None:
            vars(twin)[name] = _Listener(getattr(pipeline, name), text.embeddings.dtype)
    side = pipeline.vae_scale_factor * (2 if family.patched else 1)
    height, width = (places * side for places in latents.shape[-2:])
    embeddings: Any = text.embeddings
    if family.mask is None and text.mask is not None:  # of a list of texts, each as long as it is
        embeddings = [rows[mask.bool()] for rows, mask in zip(text.embeddings, text.mask, strict=True)]
    texts = {"prompt_embeds": embeddings, family.mask or "": text.mask, "pooled_prompt_embeds": text.pooled, **text.more}
    given = {
        "height": height, "width": width, "latents": pack(family, latents), "num_inference_steps": 1, "output_type": "latent",
        "guidance_scale": guidance if family.guided else 0.0, "true_cfg_scale": 1.0, "use_resolution_binning": False,
    }  # fmt: skip
    if "guidance_scale" in takes and takes["guidance_scale"].default is None:
        del given["guidance_scale"]
    try:
        twin(**{name: value for name, value in (given | texts).items() if name in takes and value is not None})
    except _Called:
        return {name: value for name, value in listener.given.items() if value is not None}
    raise ValueError(
        f"A {type(pipeline).__name__} ended without a call of its network, so what it would be given is not known."
    )


def network_guidance(pipeline: Any) -> float:
    """The guidance that a pipeline's call gives its network by default."""
    return float(_parameters(pipeline, "__call__")["guidance_scale"].default)


def pack(family: Family, latents: Float[Tensor, "row channel y x"]) -> Tensor:
    """Latents as the pipeline's call takes them: (row, token, channel) where 2 x 2 of them are a token."""
    return latents if family.packed == 1 else F.pixel_unshuffle(latents, family.packed).flatten(2).mT


def unpack(family: Family, output: Any, like: Float[Tensor, "row channel y x"]) -> Float[Tensor, "row channel y x"]:
    """A network's output as latents; of more channels than these the first (the others are a learned variance)."""
    output = torch.stack(output) if isinstance(output, list | tuple) else output
    output = output.squeeze(2) if output.ndim == 5 else output
    if output.ndim == 3:
        output = output.mT.unflatten(-1, [side // family.packed for side in like.shape[-2:]])
        output = F.pixel_shuffle(output, family.packed)
    return output[:, : like.shape[1]]
