"""Vision encoders seen as feature extractors, recorded by the same `extract` into the same kind of store.

Any transformer with an image tower that transformers can load (CLIP, SigLIP, DINOv2, ...).  An encoder has no noise and
no text: its store has the one timestep 0 and the one conditioning ``null``.  Sites are its layers, ``L1`` to ``Ln``, and
``last``, the last layer after the final norm; class and register tokens are dropped, patches are (channel, y, x).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel
from transformers.image_processing_utils import BaseImageProcessor

from diffprobe.models import (
    DiffusionModel,
    EncodedText,
    as_dtype,
    choose_device,
    fresh_weights,
    load_model,
    model_index,
    model_name,
    quiet,
    resolve,
    weights_hash,
)
from diffprobe.sites import Site

NORMS = ("post_layernorm", "layernorm", "norm", "final_layer_norm")
ABSENT = (OSError, ValueError, KeyError, HFValidationError, HfHubHTTPError, LocalEntryNotFoundError)


class VisionEncoder:
    """An image tower behind the names by which `extract` knows a `DiffusionModel`.

    Args:
        model: a transformers model that has an image tower or is one.
        processor: its image processor's settings: image_mean, image_std, and crop_size or size.
        model_id: what to write into a store's provenance.
        random_weights: the seed that its weights were drawn with, if they were.

    Raises:
        ValueError: the model takes no images.
    """

    latent_channels = 3
    prompt_tokens = 1
    prediction_type = "vision encoder"

    def __init__(
        self,
        model: Any,
        processor: Mapping[str, Any],
        model_id: str = "",
        revision: str | None = None,
        random_weights: int | None = None,
    ) -> None:
        self.pipeline, self.model_id, self.revision, self.random_weights = model, model_id, revision, random_weights
        self.network: Any = getattr(model, "vision_model", model)
        if "pixel_values" not in inspect.signature(self.network.forward).parameters:
            raise ValueError(f"{model_id or type(model).__name__} takes no images, so it is no vision encoder.")
        self.size = _input_size(processor)
        self._mean, self._std = (torch.tensor(processor[key]).view(-1, 1, 1) for key in ("image_mean", "image_std"))
        modules = dict(self.network.named_modules())
        stack = max((name for name, m in modules.items() if isinstance(m, nn.ModuleList)), key=lambda name: len(modules[name]))
        self._layers = [f"{stack}.{number}" for number in range(len(modules[stack]))]
        self._norm = next((name for name in NORMS if name in modules), "")
        self._grid = (0, 0)

    @property
    def device(self) -> torch.device:
        return next(self.network.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.network.parameters()).dtype

    @property
    def resolution(self) -> tuple[int, int]:
        """The (height, width) in pixels that the image processor gives."""
        return self.size

    @property
    def sites(self) -> list[Site]:
        layers = [Site(f"L{number}", path, "layer", "") for number, path in enumerate(self._layers, 1)]
        return [*layers, Site("last", self._norm or self._layers[-1], "layer", "")]

    @property
    def preset(self) -> tuple[str, str]:
        """What "paper" means for an encoder: the second-to-last layer, which its CLIP gives, and the last."""
        return f"L{max(1, len(self._layers) - 1)}", "last"

    def latent_size(self, height: int, width: int) -> tuple[int, int]:
        """The image size itself, for an encoder has no latents.

        Raises:
            ValueError: the size is neither the encoder's own nor a multiple of its patches.
        """
        patch = self._patch
        if (height, width) != self.size and (height <= 0 or width <= 0 or height % patch or width % patch):
            raise ValueError(
                f"Resolution {height}x{width} does not fit {self.model_id}: sides must be multiples of {patch}, or its "
                f"own {self.size[0]}x{self.size[1]}."
            )
        return height, width

    @property
    def _patch(self) -> int:
        patch = self.network.config.patch_size
        return int(patch if isinstance(patch, int) else patch[0])

    def weights_hash(self) -> str:
        """`weights_hash` of the image tower."""
        return weights_hash(self.network)

    # --- what a diffusion model has and an encoder has not ----------------------------------------

    def check_timestep(self, timestep: int) -> None:
        """Raise ValueError for any but timestep 0."""
        if timestep:
            raise ValueError(f"{self.model_id} is a vision encoder, whose only timestep is 0; got {timestep}.")

    def encode_text(self, prompts: Sequence[str | None]) -> EncodedText:
        """No text: one empty token for every prompt."""
        ids, spans, lengths = self.tokens(prompts)
        return EncodedText(torch.zeros(len(lengths), 1, 1), None, None, ids, spans, (False,) * len(lengths))

    def tokens(
        self, prompts: Sequence[str | None]
    ) -> tuple[Int[Tensor, "prompt token"], Int[Tensor, "prompt token 2"], list[int]]:
        """As for a diffusion model, with one empty token for every prompt."""
        count = len(prompts)
        return torch.zeros(count, 1, dtype=torch.long), torch.zeros(count, 1, 2, dtype=torch.long), [1] * count

    def special_tokens(self) -> dict[str, int]:
        return {}

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """The images as they are."""
        return latents

    # --- images -----------------------------------------------------------------------------------

    def encode_image(
        self, images: Float[Tensor, "image 3 y x"], rule: str = "mean", generator: Any = None
    ) -> Float[Tensor, "image 3 y x"]:
        """Images in [-1, 1] brought to the mean and spread that the image processor states."""
        return (((images + 1) / 2 - self._mean) / self._std).to(self.device, self.dtype)

    @torch.no_grad()
    def denoise(self, noised: Float[Tensor, "row 3 y x"], timesteps: Tensor, text: EncodedText) -> None:
        """One forward pass over normalised images; its layers go to the recorder that is listening."""
        height, width = noised.shape[-2:]
        self._grid = (height // self._patch, width // self._patch)
        own = self.network.config.image_size
        options: dict[str, Any] = {}
        if "interpolate_pos_encoding" in inspect.signature(self.network.forward).parameters:
            options["interpolate_pos_encoding"] = (height, width) != ((own, own) if isinstance(own, int) else tuple(own))
        self.network(pixel_values=noised, **options)

    def recorder(self, sites: Sequence[str], reduce: Callable[[Site, Tensor], Tensor] | None = None) -> EncoderRecorder:
        """Listens to layers, inside a ``with`` block."""
        return EncoderRecorder(self, [s for s in self.sites if s.name in sites], reduce)

    def patches(self, site: Site, tokens: Float[Tensor, "row token channel"]) -> Float[Tensor, "row channel y x"]:
        """The places of a layer's output; what stands before them (class token, registers) is dropped."""
        if site.name == "last" and self._norm:
            tokens = self.network.get_submodule(self._norm)(tokens)
        height, width = self._grid
        return tokens[:, -height * width :].transpose(1, 2).unflatten(-1, self._grid)


class EncoderRecorder:
    """The layers of the newest forward pass, by site name, in `last`."""

    def __init__(self, encoder: VisionEncoder, sites: Sequence[Site], reduce: Callable[[Site, Tensor], Tensor] | None) -> None:
        self._encoder, self._sites, self._reduce = encoder, sites, reduce
        self._handles: list[Any] = []
        self.last: dict[str, Tensor] = {}

    def __enter__(self) -> EncoderRecorder:
        for site in self._sites:
            path = self._encoder._layers[-1] if site.name == "last" else site.path
            layer = self._encoder.network.get_submodule(path)
            self._handles.append(layer.register_forward_hook(partial(self._keep, site)))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        while self._handles:
            self._handles.pop().remove()

    def _keep(self, site: Site, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        patches = self._encoder.patches(site, output[0] if isinstance(output, tuple) else output)
        self.last[site.name] = patches if self._reduce is None else self._reduce(site, patches)


def _input_size(processor: Mapping[str, Any]) -> tuple[int, int]:
    """The (height, width) that an image processor's settings end at.

    >>> _input_size({"crop_size": {"height": 336, "width": 336}, "size": {"shortest_edge": 336}})
    (336, 336)
    >>> _input_size({"do_center_crop": False, "crop_size": 224, "size": {"height": 384, "width": 384}})
    (384, 384)
    """
    crops = processor.get("do_center_crop", True) and processor.get("crop_size")
    size = processor["crop_size"] if crops else processor["size"]
    if isinstance(size, Mapping):
        return (int(size["height"]), int(size["width"])) if "height" in size else (int(size["shortest_edge"]),) * 2
    return int(size), int(size)


def load_encoder(
    id_or_dir: str | Path,
    device: str | torch.device | None = None,
    dtype: torch.dtype | str = "auto",
    revision: str | None = None,
    *,
    use_safetensors: bool = True,
    random_weights: int | None = None,
) -> VisionEncoder:
    """Load a vision encoder by hub id, folder or embedded name; the options are those of `load_model`.

    Raises:
        ValueError: nothing is there, it has no image processor, or it takes no images.

    >>> load_encoder("shapes-clip").resolution  # doctest: +SKIP
    (64, 64)
    """
    source, device = resolve(id_or_dir), choose_device(device)
    dtype = as_dtype(dtype, device) if isinstance(dtype, str) else dtype
    try:
        processor, _ = BaseImageProcessor.get_image_processor_dict(source, revision=revision)
        with quiet(source):
            options: dict[str, Any] = {"use_safetensors": True} if use_safetensors else {}
            model = AutoModel.from_pretrained(source, dtype=dtype, revision=revision, trust_remote_code=False, **options)
    except ABSENT as error:
        raise ValueError(f"The vision encoder at {source!r} could not be read: {error}") from error
    if random_weights is not None:
        model = fresh_weights(lambda: AutoModel.from_config(model.config, dtype=dtype), random_weights)
    return VisionEncoder(model.to(device).eval(), processor, model_name(id_or_dir), revision, random_weights)


def load_extractor(
    id_or_dir: str | Path,
    device: str | torch.device | None = None,
    dtype: torch.dtype | str = "auto",
    revision: str | None = None,
    *,
    use_safetensors: bool = True,
    random_weights: int | None = None,
) -> DiffusionModel | VisionEncoder:
    """Whatever is there: a text-to-image pipeline, as `load_model` gives it, or a vision encoder."""
    source = resolve(id_or_dir)
    load: Callable[..., DiffusionModel | VisionEncoder] = load_model
    try:
        model_index(source, revision)
    except ValueError as nothing:
        try:
            AutoConfig.from_pretrained(source, revision=revision, trust_remote_code=False)
        except ABSENT:
            raise nothing from None
        load = load_encoder
    return load(id_or_dir, device, dtype, revision, use_safetensors=use_safetensors, random_weights=random_weights)
