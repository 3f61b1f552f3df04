"""Any supported diffusers pipeline as one small object: encode image, encode text, add noise, ONE denoising call.

The library's own classes do the work.  Nothing about a model is assumed that its config states: scaling and shift of
the latents, prediction type, noise schedule, prompt length.
"""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import diffusers.utils.logging
import torch
import transformers.utils.logging
from diffusers import AutoencoderKL, DiffusionPipeline, PixArtTransformer2DModel, UNet2DConditionModel
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from jaxtyping import Float, Int
from torch import Tensor, nn

from diffprobe.sites import Site, list_sites

FAMILIES: dict[str, str] = {
    "StableDiffusionPipeline": "sd",
    "StableDiffusionImg2ImgPipeline": "sd",
    "StableDiffusionXLPipeline": "sdxl",
    "StableDiffusionXLImg2ImgPipeline": "sdxl",
    "PixArtAlphaPipeline": "pixart",
    "PixArtSigmaPipeline": "pixart",
}
SUPPORTED = "Stable Diffusion 1.x and 2.x (epsilon and v), Stable Diffusion XL, PixArt-alpha and -sigma"
EMBEDDED = Path(__file__).parent / "zoo" / "weights"
LatentRule = Literal["mean", "mode", "sample"]
Network: TypeAlias = UNet2DConditionModel | PixArtTransformer2DModel


class StopForward(Exception):
    """Raised by a recorder inside the network once it has all it wants; `DiffusionModel.denoise` catches it."""


@dataclass(frozen=True)
class EncodedText:
    """Prompts as the network takes them, with where their tokens stand in the text.

    Attributes:
        embeddings: (prompt, token, width).
        mask: (prompt, token), 1 at real tokens, for families that mask; None for those that attend to padding.
        pooled: (prompt, width) for SDXL, else None.
        ids: (prompt, token) token numbers of the first tokenizer.
        spans: (prompt, token, 2) start and end characters; (0, 0) for start, end and padding tokens.
        truncated: for each prompt whether it was cut at the encoder's limit.
    """

    embeddings: Float[Tensor, "prompt token width"]
    mask: Int[Tensor, "prompt token"] | None
    pooled: Float[Tensor, "prompt pooled_width"] | None
    ids: Int[Tensor, "prompt token"]
    spans: Int[Tensor, "prompt token 2"]
    truncated: tuple[bool, ...]

    def take(self, rows: Sequence[int]) -> EncodedText:
        """The same for some prompts, repeated or reordered as asked."""
        index = torch.as_tensor(list(rows), device=self.embeddings.device)
        cpu = index.cpu()
        return EncodedText(
            self.embeddings[index],
            None if self.mask is None else self.mask[index],
            None if self.pooled is None else self.pooled[index],
            self.ids[cpu],
            self.spans[cpu],
            tuple(self.truncated[i] for i in cpu.tolist()),
        )

    @staticmethod
    def concatenate(parts: Sequence[EncodedText]) -> EncodedText:
        """Several batches of prompts as one."""
        first = parts[0]
        return EncodedText(
            torch.cat([p.embeddings for p in parts]),
            None if first.mask is None else torch.cat([p.mask for p in parts if p.mask is not None]),
            None if first.pooled is None else torch.cat([p.pooled for p in parts if p.pooled is not None]),
            torch.cat([p.ids for p in parts]),
            torch.cat([p.spans for p in parts]),
            tuple(flag for p in parts for flag in p.truncated),
        )


class DiffusionModel:
    """A text-to-image pipeline seen as a feature extractor.

    Args:
        pipeline: a loaded diffusers pipeline of a supported family; it is not copied and not changed.
        model_id: what to write into a store's provenance.
        random_weights: the seed that the network's weights were drawn with, if they were.

    Attributes:
        network: the UNet or transformer.
        family: "sd", "sdxl" or "pixart".
        resolution: the image side in pixels that the model was made for.
    """

    def __init__(
        self, pipeline: DiffusionPipeline, model_id: str = "", revision: str | None = None, random_weights: int | None = None
    ) -> None:
        self.family = family_of(type(pipeline).__name__)
        self.pipeline, self.model_id, self.revision = pipeline, model_id or type(pipeline).__name__, revision
        self.random_weights = random_weights
        self.network: Network = pipeline.transformer if self.family == "pixart" else pipeline.unet
        if self.network.config.in_channels != pipeline.vae.config.latent_channels:
            raise ValueError(
                f"{self.model_id} takes {self.network.config.in_channels} latent channels where its VAE gives "
                f"{pipeline.vae.config.latent_channels}: an inpainting or editing model. Supported: {SUPPORTED}."
            )
        if self.family == "sdxl" and pipeline.config.get("requires_aesthetics_score"):
            raise ValueError(f"{self.model_id} is the SDXL refiner, which makes no image from text. Supported: {SUPPORTED}.")
        if not hasattr(pipeline.scheduler, "alphas_cumprod"):
            kind = type(pipeline.scheduler).__name__
            raise ValueError(
                f"{self.model_id} has a {kind}, whose noise levels have no alphas_cumprod. Supported: {SUPPORTED}."
            )
        self.alphas_cumprod: Tensor = pipeline.scheduler.alphas_cumprod.float().cpu()
        self.prediction_type: str = pipeline.scheduler.config.prediction_type
        if self.prediction_type not in ("epsilon", "v_prediction"):
            raise ValueError(f"{self.model_id} predicts {self.prediction_type!r}; supported are epsilon and v_prediction.")

    @property
    def device(self) -> torch.device:
        return next(self.network.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.network.parameters()).dtype

    @property
    def latent_channels(self) -> int:
        return int(self.pipeline.vae.config.latent_channels)

    @property
    def vae_factor(self) -> int:
        return 2 ** (len(self.pipeline.vae.config.block_out_channels) - 1)

    @property
    def resolution(self) -> int:
        return int(self.network.config.sample_size) * self.vae_factor

    @property
    def sites(self) -> list[Site]:
        return list_sites(name for name, _ in self.network.named_modules())

    @property
    def granularity(self) -> int:
        """Image sides must be multiples of this many pixels, or the network's halvings would not fit together."""
        if self.family == "pixart":
            return self.vae_factor * int(self.network.config.patch_size)
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
            rule: what of the encoder's distribution is taken; "sample" draws with one CPU generator an image.
        """
        vae, dtype = self.pipeline.vae, self.pipeline.vae.dtype
        overflows = dtype == torch.float16 and vae.config.force_upcast  # SDXL's encoder gives NaN in float16
        if overflows:
            vae.to(torch.float32)
        try:
            posterior = vae.encode(images.to(self.device, vae.dtype)).latent_dist
        finally:
            if overflows:
                vae.to(dtype)
        if rule == "sample":
            if generator is None:
                raise ValueError("The latent rule 'sample' needs one generator for each image.")
            noise = torch.stack([torch.randn(posterior.mean.shape[1:], generator=g) for g in generator])
            latents = posterior.mean + posterior.std * noise.to(self.device, posterior.std.dtype)
        elif rule in ("mean", "mode"):
            latents = posterior.mean if rule == "mean" else posterior.mode()
        else:
            raise ValueError(f"Latent rule {rule!r} is not one of mean, mode, sample.")
        latents = latents.float()
        centre, spread = vae.config.get("latents_mean"), vae.config.get("latents_std")
        if centre is not None and spread is not None:
            latents = (latents - latents.new_tensor(centre).view(-1, 1, 1)) / latents.new_tensor(spread).view(-1, 1, 1)
        return ((latents - (vae.config.get("shift_factor") or 0.0)) * vae.config.scaling_factor).to(self.dtype)

    # --- text -------------------------------------------------------------------------------------

    @torch.no_grad()
    def encode_text(self, prompts: Sequence[str | None]) -> EncodedText:
        """Encode prompts as the pipeline itself would; None is the pipeline's own unconditional input.

        For most families that is the encoding of the empty text; SDXL's config can ask for zeros instead.
        """
        ids, spans, lengths = self.tokens(prompts)
        truncated = tuple(length > self.prompt_tokens for length in lengths)
        texts = ["" if prompt is None else prompt for prompt in prompts]
        mask = pooled = None
        if self.family == "sdxl":
            embeddings, _, pooled, _ = self.pipeline.encode_prompt(texts, device=self.device, do_classifier_free_guidance=False)
            if self.pipeline.config.force_zeros_for_empty_prompt:
                empty = torch.tensor([prompt is None for prompt in prompts], device=self.device)
                embeddings = embeddings.masked_fill(empty[:, None, None], 0)
                pooled = pooled.masked_fill(empty[:, None], 0)
        elif self.family == "pixart":
            options = {"clean_caption": False, "max_sequence_length": self.prompt_tokens}
            embeddings, mask, _, _ = self.pipeline.encode_prompt(texts, False, device=self.device, **options)
        else:
            embeddings, _ = self.pipeline.encode_prompt(texts, self.device, 1, False)
        return EncodedText(embeddings, mask, pooled, ids, spans, truncated)

    @property
    def prompt_tokens(self) -> int:
        """How many tokens every prompt is padded or cut to."""
        if self.family != "pixart":
            return int(self.pipeline.tokenizer.model_max_length)
        return int(inspect.signature(self.pipeline.encode_prompt).parameters["max_sequence_length"].default)

    def tokens(
        self, prompts: Sequence[str | None]
    ) -> tuple[Int[Tensor, "prompt token"], Int[Tensor, "prompt token 2"], list[int]]:
        """Token numbers and their (start, end) in the text, padded and cut as the text encoder is given them.

        The third value is each prompt's own number of tokens, start and end included, before it is padded or cut.
        """
        tokenizer, limit = self.pipeline.tokenizer, self.prompt_tokens
        texts = ["" if prompt is None else prompt for prompt in prompts]
        starts = [0] * len(texts)
        if self.family == "pixart":  # whose pipeline tokenizes text.lower().strip()
            starts = [len(text) - len(text.lstrip()) for text in texts]
            texts = [text.lower().strip() for text in texts]
        found = tokenizer(texts, truncation=False, verbose=False, return_offsets_mapping=True)
        ids = torch.full((len(prompts), limit), tokenizer.pad_token_id)
        spans = torch.zeros(len(prompts), limit, 2, dtype=torch.long)
        for row, (numbers, offsets) in enumerate(zip(found["input_ids"], found["offset_mapping"], strict=True)):
            if len(numbers) > limit:
                numbers, offsets = [*numbers[: limit - 1], numbers[-1]], [*offsets[: limit - 1], (0, 0)]
            ids[row, : len(numbers)] = torch.tensor(numbers)
            stripped = starts[row]
            spans[row, : len(numbers)] = torch.tensor([(a + stripped, b + stripped) if b > a else (0, 0) for a, b in offsets])
        return ids, spans, [len(numbers) for numbers in found["input_ids"]]

    def special_tokens(self) -> dict[str, int]:
        """Token numbers of the start, end and padding token, by those names, where the tokenizer has them."""
        tokenizer = self.pipeline.tokenizer
        named = {"start": tokenizer.bos_token_id, "end": tokenizer.eos_token_id, "padding": tokenizer.pad_token_id}
        return {name: int(number) for name, number in named.items() if number is not None}

    # --- one step ---------------------------------------------------------------------------------

    def check_timestep(self, timestep: int) -> None:
        """Raise ValueError unless the timestep is one that the model was trained with."""
        if not 0 <= timestep < len(self.alphas_cumprod):
            last = len(self.alphas_cumprod) - 1
            raise ValueError(f"Timestep {timestep} is outside 0..{last}, which {self.model_id} was trained with.")

    def add_noise(
        self,
        latents: Float[Tensor, "row channel y x"],
        noise: Float[Tensor, "row channel y x"],
        timesteps: Int[Tensor, " row"],
    ) -> Float[Tensor, "row channel y x"]:
        """Latents at a noise level, sqrt(a) x + sqrt(1 - a) noise, computed in float32."""
        alpha = self.alphas_cumprod.to(latents.device)[timesteps.to(latents.device)].view(-1, 1, 1, 1)
        return (alpha.sqrt() * latents.float() + (1 - alpha).sqrt() * noise.float()).to(latents.dtype)

    @torch.no_grad()
    def denoise(
        self, noised: Float[Tensor, "row channel y x"], timesteps: Int[Tensor, " row"], text: EncodedText
    ) -> Float[Tensor, "row channel y x"] | None:
        """One forward pass; the predicted noise, or None where a recorder stopped the pass early.

        A velocity prediction is turned into noise; a learned variance is dropped.
        """
        arguments = self.network_arguments(noised, text)
        try:
            output = self.network(noised, timestep=timesteps.to(noised.device), return_dict=False, **arguments)[0]
        except StopForward:
            return None
        return predicted_noise(output, noised, timesteps, self.alphas_cumprod, self.prediction_type)

    def network_arguments(self, noised: Tensor, text: EncodedText) -> dict[str, Any]:
        """What the network wants besides latents and timesteps."""
        rows, (height, width) = len(noised), (side * self.vae_factor for side in noised.shape[-2:])
        arguments: dict[str, Any] = {"encoder_hidden_states": text.embeddings}
        if self.family == "sdxl":
            size = torch.tensor([height, width, 0, 0, height, width], dtype=text.embeddings.dtype, device=noised.device)
            arguments["added_cond_kwargs"] = {"text_embeds": text.pooled, "time_ids": size.expand(rows, -1)}
        elif self.family == "pixart":
            arguments["encoder_attention_mask"] = text.mask
            added: dict[str, Tensor | None] = {"resolution": None, "aspect_ratio": None}
            if self.network.use_additional_conditions:
                size, ratio = noised.new_tensor([height, width]), noised.new_tensor([height / width])
                added = {"resolution": size.expand(rows, -1), "aspect_ratio": ratio.expand(rows, -1)}
            arguments["added_cond_kwargs"] = added
        return arguments

    def weights_hash(self) -> str:
        """`weights_hash` of the network."""
        return weights_hash(self.network)


def weights_hash(network: nn.Module, portable: bool = False) -> str:
    """A short hash of a network's parameter names, shapes and a slice of each one's values.

    Args:
        portable: of the values in bfloat16, so that a CPU's float32 and a GPU's bfloat16 of the same weights agree.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        flat = tensor.detach().flatten()
        part = flat[:: max(1, flat.numel() // 64)][:64].cpu()
        values = (part.to(torch.bfloat16) if portable and part.is_floating_point() else part).float().numpy()
        digest.update(f"{name}{tuple(tensor.shape)}".encode() + values.tobytes())
    return digest.hexdigest()[:16]


def predicted_noise(
    output: Float[Tensor, "row out_channel y x"],
    noised: Float[Tensor, "row channel y x"],
    timesteps: Int[Tensor, " row"],
    alphas_cumprod: Float[Tensor, " train_step"],
    prediction_type: str,
) -> Float[Tensor, "row channel y x"]:
    """A network's output as noise: velocities v = sqrt(a) e - sqrt(1 - a) x turned back, extra variance channels dropped.

    Raises:
        ValueError: the prediction type is neither epsilon nor v_prediction.
    """
    if prediction_type not in ("epsilon", "v_prediction"):
        raise ValueError(f"Prediction type {prediction_type!r} is not one of epsilon, v_prediction.")
    output = output[:, : noised.shape[1]]
    if prediction_type == "epsilon":
        return output
    alpha = alphas_cumprod.to(output.device)[timesteps.to(output.device)].view(-1, 1, 1, 1)
    return (alpha.sqrt() * output.float() + (1 - alpha).sqrt() * noised.float()).to(output.dtype)


def family_of(class_name: str) -> str:
    """Raise ValueError naming the supported families unless the pipeline class is of one."""
    if class_name not in FAMILIES:
        raise ValueError(f"A {class_name} is not supported. Supported: {SUPPORTED}.")
    return FAMILIES[class_name]


def resolve(id_or_dir: str | Path) -> str:
    """The folder of an embedded model's name, else the id or folder as given."""
    embedded = EMBEDDED / str(id_or_dir)
    return str(embedded) if str(id_or_dir) and embedded.is_dir() and "/" not in str(id_or_dir) else str(id_or_dir)


def model_name(id_or_dir: str | Path) -> str:
    """What provenance calls a model: a folder by its whole path, for it is looked for from elsewhere too; others as given."""
    given = str(id_or_dir)
    return os.path.abspath(given) if resolve(given) == given and Path(given).is_dir() else given  # noqa: PTH100 (keeps links)


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
) -> DiffusionModel:
    """Load a text-to-image pipeline by hub id, folder or embedded name.

    Args:
        device: CUDA where there is one (each process of a launch takes its own), else the CPU, by default.
        dtype: "auto" is float32 on a CPU and bfloat16 elsewhere (SD 2.1 overflows in float16).
        use_safetensors: refuse weights in pickle files, which can run code; False allows them.
        random_weights: draw the denoising network's weights anew from this seed, as a baseline: what its shape alone
            gives.  Image encoder and text encoder stay as they were trained.

    Raises:
        ValueError: nothing is there, or its family is not supported.

    >>> load_model().family  # doctest: +SKIP
    'sd'
    """
    source = resolve(id_or_dir)
    index = model_index(source, revision)
    family_of(str(index.get("_class_name")))
    device = choose_device(device)
    if isinstance(dtype, str):
        dtype = as_dtype(dtype, device)
    options: dict[str, Any] = {"safety_checker": None} if "safety_checker" in index else {}
    options["use_safetensors"] = True if use_safetensors else None  # None: pickle only where there is nothing else
    try:
        with quiet(source):
            pipeline = DiffusionPipeline.from_pretrained(
                source, dtype=dtype, revision=revision, trust_remote_code=False, **options
            )
    except OSError as error:
        raise ValueError(f"The model at {source!r} could not be read: {error}") from error
    if random_weights is not None:
        trained = pipeline.components.get("transformer") or pipeline.components["unet"]
        drawn = fresh_weights(lambda: type(trained).from_config(trained.config), random_weights)
        trained.load_state_dict(drawn.state_dict())
    pipeline.to(device)
    pipeline.set_progress_bar_config(disable=True)
    return DiffusionModel(pipeline, model_name(id_or_dir), revision, random_weights)


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
    family = family_of(str(index.get("_class_name")))
    cls, folder = (PixArtTransformer2DModel, "transformer") if family == "pixart" else (UNet2DConditionModel, "unet")
    with torch.device("meta"):
        network = cls.from_config(cls.load_config(source, subfolder=folder, revision=revision))
    vae = AutoencoderKL.load_config(source, subfolder="vae", revision=revision)
    tokens = 77 if family != "pixart" else 300 if index["_class_name"] == "PixArtSigmaPipeline" else 120
    return network, 2 ** (len(vae["block_out_channels"]) - 1), tokens
