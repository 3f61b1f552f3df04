"""Any supported diffusers pipeline as one small object: encode image, encode text, add noise, ONE denoising call.

The library's own classes do the work.  Nothing about a model is assumed that its config states: scaling and shift of
the latents, prediction type, noise schedule.  What is said of a prompt (tokens, words, truncation) is heard from the
pipeline while it encodes.  Every pass runs in evaluation mode, whatever mode the pipeline was left in.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, TypeAlias

import diffusers
import diffusers.utils.logging
import torch
import transformers.utils.logging
from diffusers import AutoencoderKL, DiffusionPipeline
from diffusers.models.modeling_utils import ModelMixin
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from jaxtyping import Float, Int
from safetensors import SafetensorError
from torch import Tensor, nn

from diffprobe import checkpoints, families
from diffprobe.noise import Levels
from diffprobe.prompts import MARKS, EncodedText, StopForward, hear, join_tokens, plain_tokenizer
from diffprobe.sites import Site, list_sites, transformer_sites

# How many text tokens pipelines give their transformers, by how their classes begin; 512 where it is not said, at most.
PROMPT_TOKENS = {
    "PixArtSigma": 300, "PixArtAlpha": 120, "StableDiffusion3": 333, "HunyuanDiT": 333, "AuraFlow": 256, "Sana": 300, "Lumina2": 256,
}  # fmt: skip
EMBEDDED = Path(__file__).parent / "zoo" / "weights"
LatentRule = Literal["mean", "mode", "sample"]
Network: TypeAlias = ModelMixin
SCHEDULE = (
    "num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "rescale_betas_zero_snr", "prediction_type"
)  # fmt: skip


class DiffusionModel:
    """A text-to-image pipeline seen as a feature extractor.

    Args:
        pipeline: a loaded diffusers pipeline of a supported family; it is not copied and not changed.
        random_weights: the seed that the network's weights were drawn with, if they were.
        loading: further options of `load_model` that the pipeline was loaded with, for a store's provenance.
        guidance: what a network is given as guidance that takes it as an input (Flux, LCM); the pipeline's own default by default.

    Attributes:
        network: the UNet or transformer.
        kind: how the family's pipelines are called.
        family: its name, such as "sd" or "flux".
        levels: the noise at each training timestep.
        resolution: the image side in pixels that the model was made for.
    """

    def __init__(
        self, pipeline: DiffusionPipeline, model_id: str = "", revision: str | None = None, random_weights: int | None = None,
        *, loading: Mapping[str, Any] | None = None, guidance: float | None = None,
    ) -> None:  # fmt: skip
        self.kind = families.family_of(*(cls.__name__ for cls in type(pipeline).__mro__))
        self.family = self.kind.name
        self.pipeline, self.model_id, self.revision = pipeline, model_id or type(pipeline).__name__, revision
        self.random_weights, self.loading = random_weights, dict(loading or {})
        self.network: Network = getattr(pipeline, self.kind.network)
        known = (self.kind.network, "vae", "text_encoder", "tokenizer")
        self._parts = [name for word in known for name in (word, f"{word}_2", f"{word}_3") if hasattr(pipeline, name)]
        needed = [name for name in [*self._parts, "scheduler"] if not name.endswith("_3")]
        if absent := [name for name in needed if getattr(pipeline, name) is None]:
            raise ValueError(f"{self.model_id} has no {' and no '.join(absent)}; load the pipeline with all its parts.")
        self._parts = [name for name in self._parts if getattr(pipeline, name) is not None]
        if self.network.config.in_channels != self.latent_channels * self.kind.packed**2:
            raise ValueError(
                f"{self.model_id} takes {self.network.config.in_channels // self.kind.packed**2} latent channels where its VAE gives "
                f"{self.latent_channels}: an inpainting or editing model. Supported: {families.SUPPORTED}."
            )
        self.guided = self.kind.guided and bool(
            self.network.config.get("guidance_embeds", True) and self.network.config.get("time_cond_proj_dim", 1)
        )
        if guidance is not None and not self.guided:
            raise ValueError(f"{self.model_id} takes no guidance as an input of its network; it is guided by two passes.")
        self.guidance = (families.network_guidance(pipeline) if guidance is None else guidance) if self.guided else None
        self.passing: Tensor | None = None  # training timesteps of the pass that runs
        self._times: dict[tuple[int, torch.dtype], Tensor] = {}
        if self.family == "sdxl" and pipeline.config.get("requires_aesthetics_score"):
            raise ValueError(
                f"{self.model_id} is the SDXL refiner, which makes no image from text. Supported: {families.SUPPORTED}."
            )
        families.refuse_unknown_inputs(self.network, self.family, self.model_id)
        if self.kind.flow:
            self.levels = Levels.of_flow()
            self.prediction_type = "flow"
            return
        if not hasattr(pipeline.scheduler, "alphas_cumprod"):
            kind = type(pipeline.scheduler).__name__
            raise ValueError(
                f"{self.model_id} has a {kind}, whose noise levels have no alphas_cumprod. Supported: {families.SUPPORTED}."
            )
        self.alphas_cumprod: Tensor = pipeline.scheduler.alphas_cumprod.float().cpu()
        self.levels = Levels.of_alphas(self.alphas_cumprod)
        self.prediction_type = pipeline.scheduler.config.prediction_type
        if self.prediction_type not in ("epsilon", "v_prediction"):
            raise ValueError(f"{self.model_id} predicts {self.prediction_type!r}; supported are epsilon and v_prediction.")

    @property
    def device(self) -> torch.device:
        return next(self.network.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """What the network computes in, which need not be what its weights are kept in."""
        return self.network.dtype

    @property
    def latent_channels(self) -> int:
        config = self.pipeline.vae.config
        return int(config.get("latent_channels") or config.get("z_dim")) * (4 if self.kind.patched else 1)

    @property
    def vae_factor(self) -> int:
        """Pixels of an image's side for each place of its latents."""
        return int(self.pipeline.vae_scale_factor) * (2 if self.kind.patched else 1)

    @property
    def resolution(self) -> int | tuple[int, int]:
        """The image side in pixels that the model was made for, or (height, width) where they differ.

        Raises:
            ValueError: the network's config states none.
        """
        height, width = self.size
        return height if height == width else (height, width)

    @property
    def size(self) -> tuple[int, int]:
        """`resolution` as (height, width)."""
        y, x = stated_size(self.network, self.model_id)
        return y * self.vae_factor, x * self.vae_factor

    @property
    def sites(self) -> list[Site]:
        return sites_of(self.network)

    @property
    def granularity(self) -> int:
        """Image sides must be multiples of this many pixels, or the network's halvings would not fit together."""
        if self.kind.network == "transformer":
            config: Any = self.network.config
            patch = config.get("patch_size") or config.get("all_patch_size") or 1
            return self.vae_factor * (
                self.kind.packed if self.kind.packed > 1 else patch if isinstance(patch, int) else patch[0]
            )
        return self.vae_factor * 2 ** (len(self.network.config.block_out_channels) - 1)

    def latent_size(self, height: int, width: int) -> tuple[int, int]:
        """Latent (y, x) of an image size in pixels.

        Raises:
            ValueError: a side is not a positive multiple of `granularity`.
        """
        unit = self.granularity
        if height <= 0 or width <= 0 or height % unit or width % unit:
            near = [max(1, round(side / unit)) * unit for side in (height, width)]
            raise ValueError(
                f"Resolution {height}x{width} does not fit {self.model_id}: sides must be multiples of {unit}; "
                f"try {near[0]}x{near[1]}."
            )
        return height // self.vae_factor, width // self.vae_factor

    # --- images -----------------------------------------------------------------------------------

    @torch.no_grad()
    def encode_image(
        self,
        images: Float[Tensor, "image 3 height width"],
        rule: LatentRule = "mean",
        generator: Sequence[torch.Generator] | None = None,
    ) -> Float[Tensor, "image channel y x"]:
        """Scaled latents of images in [-1, 1].

        Args:
            rule: what of the encoder's distribution is taken; "sample" draws with one CPU generator an image.  An encoder
                without a distribution, such as TAESD, has one latent, which is its mean and its mode.

        Raises:
            ValueError: the rule is unknown, or asks for a draw where there is no distribution.
        """
        vae, dtype = self.pipeline.vae, self.pipeline.vae.dtype
        overflows = dtype == torch.float16 and vae.config.get("force_upcast")  # SDXL's encoder gives NaN in float16
        if overflows:
            vae.to(torch.float32)
        try:
            with evaluating(vae):
                pixels = images.to(self.device, vae.dtype)
                # An image encoder made for videos takes one frame.
                encoded = vae.encode(pixels[:, :, None] if "z_dim" in vae.config else pixels)
        finally:
            if overflows:
                vae.to(dtype)
        posterior: Any = getattr(encoded, "latent_dist", None)
        latents: Any = getattr(encoded, "latents", getattr(encoded, "latent", None))
        if posterior is None and (latents is None or rule == "sample"):
            lacks = "no latents that are known here" if latents is None else "no distribution to sample from; take 'mean'"
            raise ValueError(f"The {type(vae).__name__} of {self.model_id} gives {lacks}.")
        if rule == "sample":
            if generator is None:
                raise ValueError("The latent rule 'sample' needs one generator for each image.")
            noise = torch.stack([torch.randn(posterior.mean.shape[1:], generator=g) for g in generator])
            latents = posterior.mean + posterior.std * noise.to(self.device, posterior.std.dtype)
        elif rule not in ("mean", "mode"):
            raise ValueError(f"Latent rule {rule!r} is not one of mean, mode, sample.")
        elif posterior is not None:
            latents = posterior.mean if rule == "mean" else posterior.mode()
        latents = latents.float().squeeze(2) if latents.ndim == 5 else latents.float()
        if self.kind.patched:
            statistics = vae.bn
            latents = nn.functional.pixel_unshuffle(latents, 2)
            centre, spread = statistics.running_mean, torch.sqrt(statistics.running_var + vae.config.batch_norm_eps)
            return ((latents - centre.float().view(-1, 1, 1)) / spread.float().view(-1, 1, 1)).to(self.dtype)
        centre, spread = vae.config.get("latents_mean"), vae.config.get("latents_std")
        if centre is not None and spread is not None:
            latents = (latents - latents.new_tensor(centre).view(-1, 1, 1)) / latents.new_tensor(spread).view(-1, 1, 1)
        return ((latents - (vae.config.get("shift_factor") or 0.0)) * (vae.config.get("scaling_factor") or 1.0)).to(self.dtype)

    # --- text -------------------------------------------------------------------------------------

    @torch.no_grad()
    def encode_text(self, prompts: Sequence[str | None]) -> EncodedText:
        """Encode prompts as the pipeline itself would; None is the pipeline's own unconditional input.

        For most families that is the encoding of the empty text; SDXL's config can ask for zeros instead.

        Raises:
            ValueError: the family has no unconditional input, as where guidance was distilled into the network.
        """
        parts, order = [], list[int]()
        for places, texts, null in self._groups(prompts):
            with evaluating(*(getattr(self.pipeline, name) for name in self._parts if "encoder" in name)):
                found = families.encode_prompts(self.kind, self.pipeline, texts, self.device, null)
            ids, spans, _, cut = self._hear([prompts[place] for place in places], texts, null)
            text = families.encoded_text(self.kind, found, self.dtype, ids, spans, cut)
            if self.family == "sdxl" and self.pipeline.config.force_zeros_for_empty_prompt:
                empty = torch.tensor([prompts[place] is None for place in places], device=self.device)
                assert text.pooled is not None
                pooled = text.pooled.masked_fill(empty[:, None], 0)
                text = replace(text, embeddings=text.embeddings.masked_fill(empty[:, None, None], 0), pooled=pooled)
            parts.append(text)
            order += places
        if len(parts) == 1:
            return parts[0]
        return EncodedText.concatenate(parts).take([order.index(place) for place in range(len(order))])

    @cached_property
    def prompt_tokens(self) -> int:
        """How many tokens every prompt is padded or cut to; the most, where prompts keep their own lengths."""
        return self.kind.limit or self.tokens([""])[0].shape[1]

    def tokens(
        self, prompts: Sequence[str | None]
    ) -> tuple[Int[Tensor, "prompt token"], Int[Tensor, "prompt token 2"], list[int]]:
        """What `encode_text` says of prompts, without running a text encoder: its `ids` and `spans`.

        The third value is each prompt's own number of tokens, start and end included, before it is padded or cut.
        """
        groups = self._groups(prompts)
        told = [self._hear([prompts[place] for place in places], texts, null) for places, texts, null in groups]
        order = [place for places, _, _ in groups for place in places]
        back = torch.tensor([order.index(place) for place in range(len(order))], dtype=torch.long)
        ids, spans = join_tokens([one[0] for one in told])[back], join_tokens([one[1] for one in told])[back]
        lengths = [length for one in told for length in one[2]]
        return ids, spans, [lengths[place] for place in back.tolist()]

    def _groups(self, prompts: Sequence[str | None]) -> list[tuple[list[int], list[str], bool]]:
        """Prompts that are encoded at once: their places, their texts, and whether they are the unconditional input."""
        kind, null = self.kind, [place for place, prompt in enumerate(prompts) if prompt is None]
        if null and (kind.null is None or self.pipeline.config.get("is_distilled")):
            raise ValueError(
                f"{self.model_id} has no unconditional input: guidance was distilled into its network. Leave out the conditioning "
                "'null'; 'fixed:' gives the empty text."
            )
        limit: Any = getattr(self.pipeline.tokenizer, "model_max_length", 0)
        if limit > 2**20 and self.family in ("sd", "sdxl", "lcm"):
            raise ValueError(
                f"The tokenizer of {self.model_id} states no prompt length (its model_max_length is {limit:g}); set "
                "pipeline.tokenizer.model_max_length to what the text encoder takes, 77 for CLIP."
            )
        texts = [kind.null if prompt is None and kind.null != "negative" else prompt or "" for prompt in prompts]
        apart = kind.null == "negative"
        groups = [[place for place in range(len(prompts)) if place not in null], null] if apart else [[*range(len(prompts))]]
        if kind.alone:
            groups = [[place] for group in groups for place in group]
        return [(g, [str(texts[place]) for place in g], apart and prompts[g[0]] is None) for g in groups if g]

    def _hear(
        self, prompts: Sequence[str | None], texts: Sequence[str], null: bool
    ) -> tuple[Tensor, Tensor, list[int], list[bool]]:
        def encode(pipeline: Any, given: list[str]) -> Tensor:
            found = families.encode_prompts(self.kind, pipeline, given, self.device, null)
            embeddings = [t for name, t in found.items() if name.startswith("prompt_embeds") and t.ndim == 3]
            return torch.cat([tensor[..., :MARKS] for tensor in embeddings], 1)  # of all text tokens, in the network's order

        ids, spans, lengths, cut = hear(self.pipeline, encode, texts, self.model_id, null)
        spans[torch.tensor([prompt is None for prompt in prompts])] = 0
        return ids, spans, lengths, cut

    def special_tokens(self) -> dict[str, int]:
        """Token numbers of the start, end and padding token, by those names, where the tokenizer has them."""
        tokenizer = plain_tokenizer(self.pipeline.tokenizer)
        named = {"start": tokenizer.bos_token_id, "end": tokenizer.eos_token_id, "padding": tokenizer.pad_token_id}
        return {name: int(number) for name, number in named.items() if number is not None}

    # --- one step ---------------------------------------------------------------------------------

    def check_timestep(self, timestep: int) -> None:
        """Raise ValueError unless the timestep is one that the model was trained with."""
        if not 0 <= timestep < len(self.levels.signal):
            last = len(self.levels.signal) - 1
            raise ValueError(f"Timestep {timestep} is outside 0..{last}, which {self.model_id} was trained with.")

    def add_noise(
        self,
        latents: Float[Tensor, "row channel y x"],
        noise: Float[Tensor, "row channel y x"],
        timesteps: Int[Tensor, " row"],
    ) -> Float[Tensor, "row channel y x"]:
        """Latents at a noise level, sqrt(a) x + sqrt(1 - a) noise, or (1 - s) x + s noise of a flow, computed in float32."""
        signal, spread = (
            level.to(latents.device)[timesteps.to(latents.device)] for level in (self.levels.signal, self.levels.spread)
        )
        return (signal.view(-1, 1, 1, 1) * latents.float() + spread.view(-1, 1, 1, 1) * noise.float()).to(latents.dtype)

    @torch.no_grad()
    def denoise(
        self, noised: Float[Tensor, "row channel y x"], timesteps: Int[Tensor, " row"], text: EncodedText
    ) -> Float[Tensor, "row channel y x"] | None:
        """One forward pass; the predicted noise, or None where a recorder stopped the pass early.

        A velocity prediction is turned into noise; a learned variance is dropped.
        """
        (_, latents), *others = self.given(noised, timesteps, text).items()
        self.passing = timesteps
        try:
            with evaluating(self.network):
                output = self.network(latents, **dict(others), return_dict=False)[0]
        except StopForward:
            return None
        finally:
            self.passing = None
        return self.noise_in(families.unpack(self.kind, output, noised), noised, timesteps)

    def noise_in(self, output: Tensor, noised: Tensor, timesteps: Int[Tensor, " row"]) -> Tensor:
        """A network's output as noise; of a flow e = x + (1 - s) v, where v = e - x_0 is predicted."""
        if not self.kind.flow:
            return predicted_noise(output, noised, timesteps, self.alphas_cumprod, self.prediction_type)
        signal = self.levels.signal.to(output.device)[timesteps.to(output.device)].view(-1, *[1] * (output.ndim - 1))
        return (noised.float() + signal * self.kind.sign * output[:, : noised.shape[1]].float()).to(output.dtype)

    def forward(self, inputs: Tensor, timesteps: Tensor, text: EncodedText) -> Tensor | None:
        """`denoise`, by the name that `diffprobe.forward` calls on every model."""
        return self.denoise(inputs, timesteps, text)

    def given(
        self, noised: Float[Tensor, "row channel y x"], timesteps: Int[Tensor, " row"], text: EncodedText
    ) -> dict[str, Any]:
        """All that the network is given for one pass, latents first, by the names of its parameters."""
        steps: list[int] = timesteps.tolist()
        found = self._asked(noised, steps[0], text)
        name = next(name for name in found if name in families.TIME_NAMES)
        if self.family == "sd":
            return found | {name: timesteps.to(noised.device)}
        for step in set(steps):
            if (step, noised.dtype) not in self._times:
                self._times[step, noised.dtype] = self._asked(noised[:1], step, text.take([0]))[name].reshape(-1)[0]
        times = torch.stack([self._times[step, noised.dtype] for step in steps])
        return found | {name: times.to(noised.device)}

    def network_arguments(self, noised: Tensor, text: EncodedText) -> dict[str, Any]:
        """What the network wants besides latents and timesteps."""
        _, *others = (found := self._asked(noised, 0, text))
        return {name: found[name] for name in others if name not in families.TIME_NAMES}

    def _asked(self, noised: Tensor, timestep: int, text: EncodedText) -> dict[str, Any]:
        """What the pipeline gives its network at one timestep; of Stable Diffusion, which gives little, without asking it."""
        families.refuse_unknown_inputs(self.network, self.family, self.model_id)
        if self.family == "sd":
            return {"sample": noised, "timestep": timestep, "encoder_hidden_states": text.embeddings}
        return families.network_given(self.kind, self.pipeline, noised, text, float(timestep), self.guidance or 0.0)

    def weights_hash(self, portable: bool = False) -> str:
        """A short hash of all that decides the features: networks, tokenizers, noise schedule."""
        digest = hashlib.sha256()
        for name in self._parts:
            part: Any = getattr(self.pipeline, name)
            if isinstance(part, nn.Module):
                adapters = checkpoints.adapters_of(part)  # their weights are among the part's
                digest.update(f"{name} {adapters}\n".encode() if adapters else b"")
                found = checkpoints.weights_hash(part, portable)
            else:
                found = checkpoints.vocabulary_hash(plain_tokenizer(part))
            digest.update(f"{name} {found}\n".encode())
        config = self.pipeline.scheduler.config
        digest.update(json.dumps({name: config.get(name) for name in SCHEDULE}, default=list).encode())
        return digest.hexdigest()[:16]


def sites_of(network: nn.Module) -> list[Site]:
    """The sites of a network; a UNet's attentions say themselves whether they attend to the prompt."""
    modules = dict(network.named_modules())
    if not hasattr(network, "down_blocks"):
        return transformer_sites(modules)
    crossing = {path: bool(m.is_cross_attention) for path, m in modules.items() if hasattr(m, "is_cross_attention")}
    return list_sites(modules, crossing)


@contextlib.contextmanager
def evaluating(*networks: nn.Module) -> Iterator[None]:
    """Evaluation mode for a while (no dropout); each module's own mode comes back afterwards."""
    training = [module for network in networks for module in network.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def stated_size(network: nn.Module, name: str) -> tuple[int, int]:
    """Latent (y, x) that a network's config says it was made for; 1024 px where it has no such entry, as Flux and its kin.

    Raises:
        ValueError: it says nothing.
    """
    size: Any = network.config.get("sample_size", 128)  # type: ignore[operator,union-attr]
    if size is None:
        raise ValueError(f"The config of {name} states no sample_size; give the resolution in pixels.")
    return (int(size), int(size)) if isinstance(size, int) else (int(size[0]), int(size[1]))


# --- weights ----------------------------------------------------------------------------------------


def predicted_noise(
    output: Float[Tensor, "row out_channel y x"],
    noised: Float[Tensor, "row in_channel y x"],
    timesteps: Int[Tensor, " row"],
    alphas_cumprod: Float[Tensor, " train_step"],
    prediction_type: str,
) -> Float[Tensor, "row channel y x"]:
    """A network's output as noise: velocities v = sqrt(a) e - sqrt(1 - a) x turned back, extra variance channels dropped.

    Of an input with more channels than the output (masks, images beside the latents) the first are the latents.

    Raises:
        ValueError: the prediction type is neither epsilon nor v_prediction.
    """
    if prediction_type not in ("epsilon", "v_prediction"):
        raise ValueError(f"Prediction type {prediction_type!r} is not one of epsilon, v_prediction.")
    channels = min(output.shape[1], noised.shape[1])
    output, noised = output[:, :channels], noised[:, :channels]
    if prediction_type == "epsilon":
        return output
    alpha = alphas_cumprod.to(output.device)[timesteps.to(output.device)].view(-1, 1, 1, 1)
    return (alpha.sqrt() * output.float() + (1 - alpha).sqrt() * noised.float()).to(output.dtype)


def resolve(id_or_dir: str | Path) -> str:
    """The folder of an embedded model's name, else the id or folder as given."""
    embedded = EMBEDDED / str(id_or_dir)
    return str(embedded) if str(id_or_dir) and embedded.is_dir() and "/" not in str(id_or_dir) else str(id_or_dir)


def kept_name(id_or_dir: str | Path) -> str:
    """How a model is called in what is kept of a run: a folder by its whole path, so that it is found from elsewhere too."""
    name = str(id_or_dir)
    return os.path.abspath(name) if resolve(name) == name and Path(name).exists() else name  # noqa: PTH100 (keeps links)


def model_index(source: str, revision: str | None) -> dict[str, Any]:
    """What a pipeline's folder or hub page says it is made of; ValueError where there is none."""
    try:
        return dict(DiffusionPipeline.load_config(source, revision=revision))
    except (OSError, HFValidationError, HfHubHTTPError, LocalEntryNotFoundError) as error:
        known = ", ".join(sorted(p.name for p in EMBEDDED.iterdir())) if EMBEDDED.is_dir() else "none"
        raise ValueError(
            f"No model at {source!r}: neither a folder with a model_index.json, nor an id that the hub or its cache "
            f"can give here. Embedded models: {known}."
        ) from error


def load_model(
    id_or_dir: str | Path = "shapes-sd",
    device: str | torch.device | None = None,
    dtype: torch.dtype | str = "auto",
    revision: str | None = None,
    *,
    use_safetensors: bool = True,
    random_weights: int | None = None,
    variant: str | None = None,
    loras: Sequence[str] = (),
    config: str | Path | None = None,
    guidance: float | None = None,
) -> DiffusionModel:
    """Load a text-to-image pipeline by hub id, folder, single file of weights or embedded name.

    Args:
        device: CUDA where there is one (each process of a launch takes its own), else the CPU, by default.
        dtype: "auto" is float32 on a CPU and bfloat16 elsewhere (SD 2.1 overflows in float16).
        use_safetensors: refuse weights in pickle files, which can run code; False allows them.
        random_weights: draw the denoising network's weights anew from this seed, as a baseline: what its shape alone
            gives.  Image encoder and text encoder stay as they were trained.
        variant: which of several files of weights, such as "fp16".
        loras: adapters, each as FILE or FILE:SCALE; they are not merged into the weights.
        config: for a single file a folder (or hub id) of configs and tokenizers of such a model; asked of the hub by default.

    Raises:
        ValueError: nothing is there, or its family is not supported.

    >>> load_model().family  # doctest: +SKIP
    'sd'
    """
    source, file = resolve(id_or_dir), Path(str(id_or_dir)).expanduser()
    adapters = [checkpoints.parse_lora(text) for text in loras]
    for path in [path for path, _ in adapters] + [file] * file.is_file():
        if use_safetensors:
            checkpoints.refuse_pickle(path)
    if adapters and random_weights is not None:
        raise ValueError("A LoRA belongs to trained weights; leave out random_weights or the LoRA.")
    if file.is_file():
        config = resolve(config) if config else checkpoints.guess_config(file)
        try:
            index = model_index(config, None)
        except ValueError as error:
            raise ValueError(
                f"'{file}' holds weights alone, and the configs of {config!r} cannot be had here: give --config FOLDER, a folder in "
                "diffusers' layout of such a model, whose configs and tokenizers are read."
            ) from error
    else:
        index = model_index(source, revision)
    families.family_of(str(index.get("_class_name")))
    device = choose_device(device)
    if isinstance(dtype, str):
        dtype = as_dtype(dtype, device)
    options: dict[str, Any] = {"safety_checker": None} if "safety_checker" in index else {}
    options["use_safetensors"] = True if use_safetensors else None  # None: pickle only where there is nothing else
    try:
        with quiet(source):
            pipeline = (
                checkpoints.load_single_file(file, index, str(config), dtype)
                if file.is_file()
                else DiffusionPipeline.from_pretrained(
                    source, dtype=dtype, revision=revision, variant=variant, trust_remote_code=False, **options
                )
            )
    except (OSError, ValueError, SafetensorError) as error:
        hint = checkpoints.pickle_hint(source, error) if use_safetensors else ""
        raise ValueError(f"The model at {source!r} could not be read: {error}{hint}") from error
    if random_weights is not None:
        trained = pipeline.components.get("transformer") or pipeline.components["unet"]
        drawn = fresh_weights(lambda: type(trained).from_config(trained.config), random_weights)
        trained.load_state_dict(drawn.state_dict())
    if adapters:
        checkpoints.add_loras(pipeline, adapters)
    pipeline.to(device)
    pipeline.set_progress_bar_config(disable=True)
    named = {
        "variant": variant,
        "loras": [f"{path}:{scale:g}" for path, scale in adapters],
        "config": config and kept_name(config),
    }
    loading = {name: value for name, value in named.items() if value}
    return DiffusionModel(pipeline, kept_name(id_or_dir), revision, random_weights, loading=loading, guidance=guidance)


def choose_device(device: str | torch.device | None) -> torch.device:
    """The device asked for, else CUDA where there is one (each process of a launch takes its own), else the CPU.

    Raises:
        ValueError: this torch, or this machine, has no such device.
    """
    if device is None:
        return torch.device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
        torch.ones(1, device=chosen).item()  # "meta" makes tensors, but they hold nothing
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        there = ["cpu", *(f"cuda:{number}" for number in range(torch.cuda.device_count()))]
        raise ValueError(
            f"Device {str(device)!r} cannot be used here; torch {torch.__version__} sees {', '.join(there)}."
        ) from error
    return chosen


def fresh_weights(build: Callable[[], nn.Module], seed: int) -> nn.Module:
    """A module built with weights drawn from a seed, on the CPU; the caller's random state stays as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build()


def out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, on a device or on the host, where torch says so in words alone."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or bool(
        re.search(r"not enough memory|can't allocate memory", str(error))
    )


@contextlib.contextmanager
def quiet(source: str) -> Iterator[None]:
    """No progress bars of the libraries where `source` is a folder: only a download deserves them."""
    if not Path(source).is_dir():
        yield
        return
    logs = (diffusers.utils.logging, transformers.utils.logging)
    for log in logs:
        log.disable_progress_bar()
    try:
        yield
    finally:
        for log in logs:
            log.enable_progress_bar()


def as_dtype(name: str, device: torch.device) -> torch.dtype:
    """A dtype by name; "auto" is float32 on a CPU and bfloat16 elsewhere."""
    names = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
    names["auto"] = torch.float32 if device.type == "cpu" else torch.bfloat16
    if name not in names:
        raise ValueError(f"dtype {name!r} is not one of {', '.join(sorted(names))}.")
    return names[name]


def load_network_config(id_or_dir: str | Path, revision: str | None = None) -> tuple[nn.Module, int, int]:
    """The network of a model on the meta device, its VAE's factor and its prompt length, from config files alone."""
    source = resolve(id_or_dir)
    index = model_index(source, revision)
    kind = str(index.get("_class_name"))
    folder = next((name for name in ("unet", "transformer") if name in index), None)
    if folder is None or kind in families.FAMILIES:
        families.family_of(kind)
    # An index names each part as [library, class].
    named = index[folder] if folder else ("", "")
    cls = getattr(diffusers, str(named[1]), None)
    if folder is None or cls is None:
        raise ValueError(
            f"The {folder} of {id_or_dir} is a {named[1]} of {named[0]}, which this version of diffusers does not have."
        )
    with torch.device("meta"):
        network = cls.from_config(cls.load_config(source, subfolder=folder, revision=revision))
    if kind in families.FAMILIES:
        families.refuse_unknown_inputs(network, families.FAMILIES[kind].name, str(id_or_dir))
    vae = AutoencoderKL.load_config(source, subfolder="vae", revision=revision) if "vae" in index else {}
    levels = next(
        (vae[name] for name in ("block_out_channels", "encoder_block_out_channels", "dim_mult") if name in vae), (0,) * 4
    )
    tokens = next((count for name, count in PROMPT_TOKENS.items() if kind.startswith(name)), 77 if folder == "unet" else 512)
    return network, 2 ** (len(levels) - 1), tokens
