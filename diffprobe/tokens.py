"""Which tokens of a transformer are image and which are text, and where in the image they are.

Where a network joins both in one sequence, its order is traced: the forward pass runs twice with attention replaced by the identity,
so that no token sees another, once with every number of the latents NaN and once with those of the text.  What comes out NaN at
a site is that stream, whatever the model's class, padding and extra tokens.
"""

from __future__ import annotations

import contextlib
import inspect
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from diffprobe.tap import Call, Index, Tap

_TEXT = re.compile(r"encoder_hidden_states|cap_feats|caption|text|prompt|txt|context")
_NO_TEXT = re.compile(r"mask|image|ids|rotary|len|kwargs|pool|audio|lens|timestep")
TRACED: WeakSet[nn.Module] = WeakSet()  # networks in the middle of a trace, at which recorders look away


def tensors_of(value: Any) -> list[Tensor]:
    """The tensors of an argument or an output: itself, or those of a list or tuple."""
    if isinstance(value, Tensor):
        return [value]
    return [tensor for part in value for tensor in tensors_of(part)] if isinstance(value, list | tuple) else []


def first_of(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """The first argument of a module's call."""
    return args[0] if args else next(iter(kwargs.values()))


def arguments_of(network: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """What a forward pass is given, by the names of its parameters; the latents are the first."""
    return dict(inspect.signature(network.forward).bind(*args, **kwargs).arguments)


def texts_of(given: Mapping[str, Any]) -> list[str]:
    """The names of arguments that hold text embeddings."""
    names = [name for name in list(given)[1:] if _TEXT.search(name) and not _NO_TEXT.search(name)]
    return [n for n in names if (found := tensors_of(given[n])) and all(t.is_floating_point() and t.ndim > 1 for t in found)]


def image_grid(network: nn.Module, given: Mapping[str, Any]) -> tuple[tuple[int, ...], int]:
    """(y, x), or (frame, y, x), of the image's tokens, and how many tokens the latents become.

    There may be more than the grid has places, when reference images follow the noised one.

    Raises:
        ValueError: the arguments do not say it.
    """
    config: Any = network.config
    latents = next(iter(given.values()))
    latents = latents[0][None] if isinstance(latents, list | tuple) else latents
    patch = given.get("patch_size") or _config(config, "patch_size", "all_patch_size") or 1
    if latents.ndim >= 4:
        patch = patch[0] if isinstance(patch, list | tuple) and len(patch) < 3 else patch
        steps = (1, patch, patch) if isinstance(patch, int) else tuple(patch)
        grid = tuple(side // step for side, step in zip(latents.shape[-2:], steps[-2:], strict=True))
        if latents.ndim == 5:
            channels = _config(config, "in_channels")
            # CogVideoX and its kin give (row, frame, channel, ...)
            axis = 1 if latents.shape[1] != channels == latents.shape[2] else 2
            step = given.get("f_patch_size") or _config(config, "patch_size_t") or steps[0]
            grid = (-(-latents.shape[axis] // step), *grid)
        places = math.prod(grid)
    else:
        places = latents.shape[1] if latents.ndim == 3 else 0
        grid = _packed_grid(given) or ((math.isqrt(places),) * 2 if latents.is_meta else ())
        if not grid or math.prod(grid) > places:
            said = f"an image of {' x '.join(map(str, grid))} places" if grid else "nothing that says where they are"
            raise ValueError(
                f"A {type(network).__name__} was given {places} latent tokens and {said}; give img_shapes, img_ids, or height and width."
            )
    return (grid[1:] if len(grid) == 3 and grid[0] == 1 else grid), places


def _packed_grid(given: Mapping[str, Any]) -> tuple[int, ...]:
    """What the arguments say of tokens that were packed before the pass; the first image, where references follow it."""
    if (shapes := given.get("img_shapes")) is not None:
        return tuple(int(side) for side in (shapes[0][0] if isinstance(shapes[0], list) else shapes[0]))
    if (ids := given.get("img_ids")) is not None and not ids.is_meta:
        ids = ids[0] if ids.ndim == 3 else ids
        own = ids[ids[:, 0] == ids[0, 0]]
        return tuple(len(own[:, axis].unique()) for axis in (1, 2))
    if all(isinstance(given.get(name), int) for name in ("height", "width")):
        return (given.get("num_frames") or 1, given["height"], given["width"])
    return ()


def meta_arguments(
    network: nn.Module, latent_size: tuple[int, int], prompt_tokens: int
) -> tuple[dict[str, Any], tuple[tuple[int, ...], int]]:
    """Arguments of a forward pass over one image, of which only the shapes matter, and its grid, as `image_grid` gives it.

    To be called with "meta" as torch's device.

    Raises:
        ValueError: an argument that the pass needs is not known here.
    """
    config: Any = network.config
    parameters = inspect.signature(network.forward).parameters
    first = next(iter(parameters))
    height, width = latent_size
    channels, patch = _config(config, "in_channels") or 4, _config(config, "patch_size")
    packed = not {"img_shapes", "img_ids"}.isdisjoint(parameters) and "img_sizes" not in parameters
    grid: tuple[int, ...] = (height // 2, width // 2)  # pipelines pack 2 x 2 latents into a token before the pass
    flat = "num_frames" in parameters or packed
    if flat:
        latents: Any = torch.zeros(1, math.prod(grid), channels)
    elif first == "x":
        latents = [torch.zeros(channels, 1, height, width)]
    elif (isinstance(patch, list | tuple) and len(patch) == 3) or "3D" in type(network).__name__:
        latents = torch.zeros(1, channels, 1, height, width)
    else:
        latents = torch.zeros(1, channels, height, width)
    text = _config(
        config, "joint_attention_dim", "text_embed_dim", "text_dim", "cap_feat_dim", "caption_channels", "encoder_hid_dim",
        "cross_attention_dim", "text_in_dim", "context_in_dim", "caption_projection_dim",
    )  # fmt: skip
    if isinstance(text, list | tuple):  # one for each block, or for each text encoder
        crossing = (m.cross_attention_dim for m in network.modules() if getattr(m, "is_cross_attention", False))
        text = next(crossing, text[0])
    words = torch.zeros(1, prompt_tokens, text or 1)
    pair, six = torch.zeros(1, 2), torch.zeros(1, 6)
    heads = _config(config, "attention_head_dim")
    known: dict[str, Any] = {
        first: latents, "timestep": torch.zeros(1), "timesteps": torch.zeros(1), "t": torch.zeros(1),
        "encoder_hidden_states": words, "cap_feats": [words[0]], "guidance": torch.zeros(1) if config.get("guidance_embeds") else None,
        "pooled_projections": torch.zeros(1, _config(config, "pooled_projection_dim") or 1), "img_shapes": [[(1, *grid)]],
        "img_ids": torch.zeros(math.prod(grid), len(_config(config, "axes_dims_rope") or (1, 1, 1))),
        "txt_ids": torch.zeros(prompt_tokens, len(_config(config, "axes_dims_rope") or (1, 1, 1))),
        "original_size": pair, "target_size": pair, "crop_coords": pair, "num_frames": 1, "height": grid[0], "width": grid[1],
    }  # fmt: skip
    if parameters.get("encoder_attention_mask") and parameters["encoder_attention_mask"].default is inspect.Parameter.empty:
        known["encoder_attention_mask"] = torch.ones(1, prompt_tokens, dtype=torch.bool)
    if "text_embedding_mask_t5" in parameters:
        known |= {
            "encoder_hidden_states": torch.zeros(1, config.text_len, config.cross_attention_dim),
            "encoder_hidden_states_t5": torch.zeros(1, config.text_len_t5, config.cross_attention_dim_t5),
            "text_embedding_mask": torch.ones(1, config.text_len), "text_embedding_mask_t5": torch.ones(1, config.text_len_t5),
            "image_meta_size": six[0], "style": torch.zeros(1, dtype=torch.long),
            "image_rotary_emb": [torch.zeros(height // patch * (width // patch), heads)] * 2,
        }  # fmt: skip
    if "encoder_hidden_states_llama3" in parameters:
        widths, layers = config.caption_channels, len(config.llama_layers)
        known["encoder_hidden_states_t5"] = torch.zeros(1, prompt_tokens, widths[0])
        known["encoder_hidden_states_llama3"] = torch.zeros(layers, 1, prompt_tokens, widths[1])
        known["pooled_embeds"] = torch.zeros(1, config.text_emb_dim)
    if "added_cond_kwargs" in parameters:
        known["added_cond_kwargs"] = {"resolution": None, "aspect_ratio": None}
        if getattr(network, "use_additional_conditions", False):
            known["added_cond_kwargs"] = {"resolution": pair, "aspect_ratio": pair[:, :1]}
        if config.get("addition_embed_type") == "text_time":
            pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
            known["added_cond_kwargs"] = {"text_embeds": torch.zeros(1, pooled), "time_ids": six}
    needed = [name for name, p in parameters.items() if p.default is inspect.Parameter.empty]
    if unknown := [name for name in needed if name not in known]:
        raise ValueError(
            f"The shapes of a {type(network).__name__} are not known without a pass: it needs {', '.join(unknown)}."
        )
    given = {name: value for name, value in known.items() if name in parameters and value is not None}
    return given, (grid, math.prod(grid)) if flat else image_grid(network, given)


def _config(config: Any, *names: str) -> Any:
    return next((value for name in names if (value := config.get(name)) is not None), None)


class Lengths(TorchFunctionMode):
    """On the meta device, where tensors hold no numbers: whoever reads one is told the text's length, for masks are summed."""

    def __init__(self, tokens: int) -> None:
        super().__init__()
        self.tokens = tokens

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.tolist and args[0].is_meta:
            return [getattr(args[0], "filled", self.tokens)] * args[0].numel()
        found = func(*args, **(kwargs or {}))
        if func is torch.full and found.is_meta:  # of how many tokens an expert takes the value is known
            found.filled = args[1]
        return found


# --- tracing ----------------------------------------------------------------------------------------


@dataclass
class Streams:
    """Where a forward pass holds image and text.

    Attributes:
        image, text: by (module path, what of it), for each tensor there which tokens (row, token) the latents, or the text, reach.
    """

    image: dict[tuple[str, str], list[Tensor]]
    text: dict[tuple[str, str], list[Tensor]]

    def find(self, path: str, what: str, wanted: str) -> tuple[int, Index] | None:
        """Which tensor of several holds the image or the text, and at which positions; None where none does."""
        for number, image in enumerate(self.image.get((path, what), [])):
            text = self.text[path, what][number] & ~image
            if bool(self.text[path, what][number].all()) and not image.all():  # pooled text reaches every token
                text = ~image
            found = image if wanted == "image" else text
            if found.any():
                return number, _index(found, ~image & ~text)
        return None


def fingerprint(value: Any) -> Any:
    """What of a pass's arguments decides where its tokens stand: shapes, and the contents of masks."""
    if isinstance(value, Tensor):
        return tuple(value.shape)
    if isinstance(value, dict):
        masks = {
            n: v.tolist() for n, v in value.items() if "mask" in n and isinstance(v, Tensor) and v.ndim < 3 and not v.is_meta
        }
        return repr((masks, [(name, fingerprint(part)) for name, part in value.items()]))
    return tuple(fingerprint(part) for part in value) if isinstance(value, list | tuple) else type(value).__name__


@torch.no_grad()
def trace(
    network: nn.Module, given: Mapping[str, Any], outputs: Iterable[str], inputs: Iterable[str], attentions: Iterable[str]
) -> Streams:
    """Find the streams at the outputs and inputs of modules, and at the calls of attentions, which must be all of the network's.

    Raises:
        ValueError: the pass fails without attention.
    """
    latents, texts = next(iter(given)), texts_of(given)
    marked: dict[str, dict[tuple[str, str], list[Tensor]]] = {}
    for stream, names in (("image", [latents]), ("text", texts)):
        marked[stream] = {}
        spoiled = {name: _spoil(value) if name in names else value for name, value in given.items()}
        with _listening(network, outputs, inputs, attentions, marked[stream]):
            TRACED.add(network)
            try:
                network.forward(**spoiled)
            except Exception as error:
                raise ValueError(
                    f"Image and text tokens of this {type(network).__name__} cannot be told apart: without attention, and with NaN "
                    f"for its {stream}, its pass ends in {type(error).__name__}: {error}"
                ) from error
            finally:
                TRACED.discard(network)
    return Streams(marked["image"], marked["text"])


def _spoil(value: Any) -> Any:
    """NaN in place of every number, in tensors and lists of them."""
    if isinstance(value, Tensor):
        return torch.full_like(value, torch.nan) if value.is_floating_point() else value
    return type(value)(_spoil(part) for part in value) if isinstance(value, list | tuple) else value


def _index(marked: Tensor, spare: Tensor) -> Index:
    """Marked tokens (row, token) as positions; rows with fewer go on with the spare tokens that follow, which are their padding."""
    rows = [row.nonzero().flatten() for row in marked]
    longest = max(map(len, rows))
    for number, row in enumerate(rows):
        after = spare[number].nonzero().flatten()
        rows[number] = torch.cat([row, after[after > row[-1] if len(row) else after >= 0][: longest - len(row)]])
        if len(rows[number]) < longest:
            raise ValueError(f"Rows of this batch hold {longest} and {len(row)} tokens of one stream; record them one by one.")
    positions = torch.stack(rows)
    first, last = int(positions[0, 0]), int(positions[0, -1])
    if last - first + 1 == longest and bool((positions == positions[0]).all()):
        return slice(first, last + 1)
    return positions


@contextlib.contextmanager
def _listening(
    network: nn.Module, outputs: Iterable[str], inputs: Iterable[str], attentions: Iterable[str],
    marks: dict[tuple[str, str], list[Tensor]],
) -> Iterator[None]:  # fmt: skip
    """Note where NaN is while the network runs, and keep its tokens apart."""
    handles: list[Any] = []
    taps: list[Tap] = []

    def note(path: str, what: str, value: Any) -> None:
        sequences = [t for t in tensors_of(value) if t.ndim >= 3]
        marks.setdefault((path, what), [t.isnan().flatten(2).any(2) for t in sequences])

    def apart(path: str) -> Callable[[Call, Callable[[], Tensor]], Tensor]:
        def attend(call: Call, run: Callable[[], Tensor]) -> Tensor:
            note(path, f"query{call.index}", call.query.transpose(1, 2))
            note(path, f"key{call.index}", call.key.transpose(1, 2))
            value = call.value if call.value is not None else call.query
            shape = (*call.query.shape[:3], value.shape[-1])
            return (call.query[..., :1] * 0).expand(shape).to(value.dtype).contiguous()

        return attend

    for path in outputs:
        hook: Any = lambda m, args, output, path=path: note(path, "output", output)  # noqa: E731
        handles.append(network.get_submodule(path).register_forward_hook(hook))
    for path in inputs:
        hook = lambda m, args, kwargs, path=path: note(path, "input", first_of(args, kwargs))  # noqa: E731
        handles.append(network.get_submodule(path).register_forward_pre_hook(hook, with_kwargs=True))
    for path in attentions:
        taps.append(Tap(network.get_submodule(path), apart(path)))
        handles += taps[-1].attach()
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for tap in taps:
            tap.close()
