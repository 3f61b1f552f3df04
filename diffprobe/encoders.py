"""Vision encoders as feature extractors: `extract` records them into the same kind of store as diffusion models.

Any transformer with an image tower that transformers can load (CLIP, SigLIP, DINOv2, ...).  An encoder has no noise and
no text: its store has the one timestep 0 and the one conditioning ``null``.  Sites are its layers, ``L1`` to ``Ln``, and
``last``, the last layer after the final norm; class and register tokens are dropped, patches are (channel, y, x).

The invariant: a layer's tokens are the image's patches, row by row.  A pass with two changed patches checks this and finds
where they are; encoders that shuffle, drop or merge patches are refused.
"""

from __future__ import annotations

import contextlib
import hashlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn

import numpy as np
import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoConfig, AutoImageProcessor, AutoModel
from transformers.image_processing_utils import BaseImageProcessor

from diffprobe import models
from diffprobe.checkpoints import weights_hash
from diffprobe.prompts import EncodedText
from diffprobe.sites import Site
from diffprobe.tokens import first_of

ABSENT = (OSError, ValueError, KeyError, SafetensorError)  # what the hub raises are kinds of the first two


class VisionEncoder:
    """An image tower with the methods that `extract` and `diffprobe.forward` call on every model.

    Args:
        model: a transformers model that has an image tower or is one.
        processor: settings of its image processor: crop_size or size; image_mean and image_std unless do_normalize is false.

    Raises:
        ValueError: the model takes no images, its tokens are not the image's patches in order, or a setting is missing.
    """

    latent_channels = 3
    prompt_tokens = 1

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
        self._settings = _settings(processor, model_id or type(model).__name__)
        self.size, scale, mean, std = self._settings
        self.resolution = self.size  # (height, width) in pixels that the image processor gives
        self._scale, self._mean, self._std = scale, *(torch.tensor(values).view(-1, 1, 1) for values in (mean, std))
        self._grid = (0, 0)
        modules = dict(self.network.named_modules())
        stacks = [name for name, module in modules.items() if isinstance(module, nn.ModuleList)]
        if not stacks or not getattr(self.network.config, "patch_size", None):
            self._refuse("it has no patches and layers")
        patch = self.network.config.patch_size
        self._patch = int(patch if isinstance(patch, int) else patch[0])
        stack = max(stacks, key=lambda name: len(modules[name]))
        self._layers = [f"{stack}.{number}" for number in range(len(modules[stack]))]
        self._norm = _final_norm(self.network, stack)
        self._first, self._others = self._find_patches()

    @property
    def device(self) -> torch.device:
        return next(self.network.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.network.parameters()).dtype

    @property
    def sites(self) -> list[Site]:
        layers = [Site(f"L{number}", path, "layer", "") for number, path in enumerate(self._layers, 1)]
        return [*layers, Site("last", self._norm or self._layers[-1], "layer", "")]

    @property
    def preset(self) -> tuple[str, str]:
        """The sites that "paper" means for an encoder: the second-to-last layer, as the paper takes from CLIP, and the last."""
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

    def weights_hash(self, portable: bool = False) -> str:
        """A short hash of what decides the features: the image tower's weights, and size, mean and deviation of its input."""
        return hashlib.sha256(f"{weights_hash(self.network, portable)} {self._settings}".encode()).hexdigest()[:16]

    def _refuse(self, why: str) -> NoReturn:
        raise ValueError(
            f"{self.model_id or 'The encoder'} is a {type(self.network).__name__}, which cannot be recorded: {why}. Supported are "
            "vision transformers whose layers all keep one token for each patch, such as CLIP, SigLIP, DINOv2 and ViT."
        )

    def _find_patches(self) -> tuple[int, int]:
        """The first patch's place among the tokens and the number of other tokens, from a pass with two changed patches."""
        (height, width), patch = self.size, self._patch
        rows, columns = height // patch, width // patch
        places = sorted({min(1, rows * columns - 1), rows * columns - 1})
        images = torch.zeros(2, 3, height, width, device=self.device, dtype=self.dtype)
        for place in places:
            y, x = place // columns * patch, place % columns * patch
            images[1, :, y : y + patch, x : x + patch] = 1
        tokens: list[Tensor] = []
        layers = [self.network.get_submodule(path) for path in self._layers]
        handles = [layers[0].register_forward_pre_hook(lambda m, a, k: tokens.append(first_of(a, k)), with_kwargs=True)]
        handles += [layer.register_forward_hook(lambda m, a, output: tokens.append(_first_of(output))) for layer in layers]
        try:
            self.forward(images)
        except (TypeError, ValueError, RuntimeError, AttributeError, LookupError) as error:
            if models.out_of_memory(error):
                raise
            self._refuse(f"it cannot be given images alone ({error})")
        finally:
            for handle in handles:
                handle.remove()
        shapes = {tuple(t.shape[:-1]) for t in tokens}
        if len(shapes) != 1 or tokens[0].ndim != 3:
            self._refuse(f"its layers have different numbers of tokens ({', '.join(str(tuple(t.shape)) for t in tokens[:3])})")
        change = (tokens[0][1] - tokens[0][0]).float().abs().amax(-1)
        changed = (change > 1e-3 * change.max()).nonzero().flatten().tolist()
        first = changed[-1] - places[-1] if changed else -1
        if first < 0 or changed != [first + place for place in places]:
            self._refuse("its tokens are not the patches of the image in order")
        return first, tokens[0].shape[1] - rows * columns

    # --- timesteps and prompts, of which an encoder has one each ----------------------------------

    def check_timestep(self, timestep: int) -> None:
        """Raises ValueError for any timestep but 0."""
        if timestep:
            raise ValueError(f"{self.model_id} is a vision encoder, whose only timestep is 0; got {timestep}.")

    def encode_text(self, prompts: Sequence[str | None]) -> EncodedText:
        """One empty token for every prompt, whatever it says."""
        ids, spans, lengths = self.tokens(prompts)
        return EncodedText(torch.zeros(len(lengths), 1, 1), None, None, ids, spans, (False,) * len(lengths))

    def tokens(
        self, prompts: Sequence[str | None]
    ) -> tuple[Int[Tensor, "prompt token"], Int[Tensor, "prompt token 2"], list[int]]:
        """`DiffusionModel.tokens`, with one empty token for every prompt."""
        count = len(prompts)
        return torch.zeros(count, 1, dtype=torch.long), torch.zeros(count, 1, 2, dtype=torch.long), [1] * count

    # --- images -----------------------------------------------------------------------------------

    def encode_image(
        self, images: Float[Tensor, "image 3 y x"], rule: str = "mean", generator: Any = None
    ) -> Float[Tensor, "image 3 y x"]:
        """Images in [-1, 1], normalised with the mean and deviation of the image processor."""
        return (((images + 1) / 2 * self._scale - self._mean) / self._std).to(self.device, self.dtype)

    @torch.no_grad()
    def forward(
        self, inputs: Float[Tensor, "row 3 y x"], timesteps: Tensor | None = None, text: EncodedText | None = None
    ) -> None:
        """One pass over normalised images; a recorder that listens gets its layers.  Timesteps and text are not read."""
        height, width = inputs.shape[-2:]
        self._grid = (height // self._patch, width // self._patch)
        own = getattr(self.network.config, "image_size", None)
        options: dict[str, Any] = {}
        if own is not None and "interpolate_pos_encoding" in inspect.signature(self.network.forward).parameters:
            options["interpolate_pos_encoding"] = (height, width) != ((own, own) if isinstance(own, int) else tuple(own))
        with models.evaluating(self.network):
            self.network(pixel_values=inputs, **options)

    def recorder(self, sites: Sequence[str], reduce: Callable[[Site, Tensor], Tensor] | None = None) -> EncoderRecorder:
        """A recorder of layers, for a ``with`` block."""
        return EncoderRecorder(self, [s for s in self.sites if s.name in sites], reduce)

    def patches(self, site: Site, tokens: Float[Tensor, "row token channel"]) -> Float[Tensor, "row channel y x"]:
        """The patches of a layer's output as a grid, without the class token and registers before or after them."""
        if site.name == "last" and self._norm:
            tokens = self.network.get_submodule(self._norm)(tokens)
        count = self._grid[0] * self._grid[1]
        if tokens.shape[1] != count + self._others:
            self._refuse(f"{count} patches came out as {tokens.shape[1]} tokens, of which {self._others} are none")
        return tokens[:, self._first : self._first + count].transpose(1, 2).unflatten(-1, self._grid)


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
        patches = self._encoder.patches(site, _first_of(output))
        self.last[site.name] = patches if self._reduce is None else self._reduce(site, patches)


def _first_of(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def _final_norm(network: nn.Module, stack: str) -> str:
    """The path of the norm that follows a stack of layers, by any name; "" if none does."""
    parts = stack.split(".")
    for depth in range(len(parts) - 1, -1, -1):  # beside the layers first, then beside what holds them
        path = ".".join(parts[:depth])
        children = [name for name, _ in network.get_submodule(path).named_children()]
        for name in children[children.index(parts[depth]) + 1 :]:
            found = f"{path}.{name}".lstrip(".")
            if "norm" in type(network.get_submodule(found)).__name__.lower():
                return found
    return ""


def _settings(processor: Mapping[str, Any], name: str) -> tuple[tuple[int, int], float, list[float], list[float]]:
    """An image processor's (height, width), and scale, mean and deviation of pixels in [0, 1].

    Raises:
        ValueError: the settings lack the size, mean or deviation.

    >>> _settings({"crop_size": {"height": 336, "width": 336}, "size": {"shortest_edge": 300}, "do_normalize": False}, "")
    ((336, 336), 1.0, [0.0], [1.0])
    >>> _settings({"do_center_crop": False, "crop_size": 224, "size": {"longest_edge": 384}, "do_normalize": False}, "")[0]
    (384, 384)
    """
    crops = processor.get("do_center_crop", True) and processor.get("crop_size")
    size = processor["crop_size"] if crops else processor.get("size")
    if isinstance(size, Mapping):  # our images are square, so any edge is both
        size = [size.get(edge) or size.get("shortest_edge") or size.get("longest_edge") for edge in ("height", "width")]
    sides: list[Any] = list(size) if isinstance(size, Sequence) else [size, size]
    normalizes = processor.get("do_normalize", True)
    mean: Any
    std: Any
    mean, std = (processor.get(key) if normalizes else [even] for key, even in (("image_mean", 0.0), ("image_std", 1.0)))
    lacking = [key for key, value in (("size", all(sides) or None), ("image_mean", mean), ("image_std", std)) if value is None]
    if lacking:
        raise ValueError(
            f"The image processor of {name} states no {' and no '.join(lacking)}; add it to preprocessor_config.json."
        )
    scale = 255.0 * processor.get("rescale_factor", 1 / 255) if processor.get("do_rescale", True) else 255.0
    mean, std = ([float(value) for value in np.atleast_1d(values)] for values in (mean, std))
    return (int(sides[0]), int(sides[1])), scale, mean, std


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
    source, device = models.resolve(id_or_dir), models.choose_device(device)
    dtype = models.as_dtype(dtype, device) if isinstance(dtype, str) else dtype
    try:
        processor, _ = BaseImageProcessor.get_image_processor_dict(source, revision=revision)
        with contextlib.suppress(ValueError, ImportError):  # settings that the file lacks are defaults of its class, if known
            processor = AutoImageProcessor.from_pretrained(source, revision=revision, trust_remote_code=False).to_dict()
        with models.quiet(source):
            options: dict[str, Any] = {"use_safetensors": True} if use_safetensors else {}
            model = AutoModel.from_pretrained(source, dtype=dtype, revision=revision, trust_remote_code=False, **options)
    except ABSENT as error:
        raise ValueError(f"The vision encoder at {source!r} could not be read: {error}") from error
    if random_weights is not None:
        model = models.fresh_weights(lambda: AutoModel.from_config(model.config, dtype=dtype), random_weights)
    return VisionEncoder(model.to(device).eval(), processor, models.kept_name(id_or_dir), revision, random_weights)


def load_extractor(
    id_or_dir: str | Path,
    device: str | torch.device | None = None,
    dtype: torch.dtype | str = "auto",
    revision: str | None = None,
    **loading: Any,
) -> models.DiffusionModel | VisionEncoder:
    """Loads a text-to-image pipeline, as `load_model` does, or a vision encoder, whichever the name is of.

    Args:
        **loading: the other options of `load_model`; a vision encoder takes use_safetensors and random_weights of them.
    """
    source = models.resolve(id_or_dir)
    loading = {name: value for name, value in loading.items() if value is not None and value != []}
    load: Callable[..., models.DiffusionModel | VisionEncoder] = models.load_model
    try:
        if not Path(source).expanduser().is_file():  # a single file of weights
            models.model_index(source, revision)
    except ValueError as nothing:
        try:
            AutoConfig.from_pretrained(source, revision=revision, trust_remote_code=False)
        except ABSENT:
            raise nothing from None
        if other := [name for name in loading if name not in ("use_safetensors", "random_weights")]:
            raise ValueError(f"{id_or_dir} is a vision encoder, which is not loaded with {', '.join(other)}.") from None
        load = load_encoder
    return load(id_or_dir, device, dtype, revision, **loading)
