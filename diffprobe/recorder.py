"""Hooks that copy out what a network computes, without changing what it computes.

Features are the outputs of the library's own modules, caught by forward hooks.  Attention maps are computed beside the network's own call
of attention, from its very arguments (`diffprobe.tap`).  No module and no attention processor is replaced, so the output is
bit-identical with and without a recorder, whichever fused kernel runs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from types import TracebackType
from typing import Any, Literal, NoReturn
from weakref import WeakKeyDictionary

import torch
from diffusers.models.attention_processor import Attention
from diffusers.models.modeling_utils import ModelMixin
from jaxtyping import Float, Int
from torch import Tensor, nn

from diffprobe.families import FAMILIES, TIME_NAMES
from diffprobe.models import DiffusionModel, Network, evaluating, predicted_noise, sites_of
from diffprobe.prompts import StopForward
from diffprobe.sites import PREDICTION, Site, attentions_of, is_linear, select_sites
from diffprobe.tap import Call, Index, Tap, narrow, output_products, probabilities, take
from diffprobe.tokens import (
    TRACED,
    Lengths,
    Streams,
    arguments_of,
    fingerprint,
    first_of,
    image_grid,
    meta_arguments,
    tensors_of,
    texts_of,
    trace,
)
from diffprobe.words import Ear, Told, as_tree, word_attention

Reduce = Callable[[Site, Tensor], Tensor]
_ACTIVE: WeakKeyDictionary[nn.Module, list[Recorder]] = WeakKeyDictionary()
_PROMPT_FIRST = ("ZImage",)  # pipelines that put the prompts before the negative prompts, by how their classes begin


@dataclass
class Step:
    """What one forward pass left behind.

    Attributes:
        timesteps: the timestep of each row.
        rows: what each row of the batch is, e.g. ("negative", "prompt") under classifier-free guidance.
        tensors: by site name; features (row, channel, y, x), maps (row, head, token, y, x), text streams and cross-attention
            keys and values (row, channel, token).  Of a video of several frames (y, x) is (frame, y, x).
        told: what the text encoders were given before the pass.
        passes: how many passes the tensors are the mean of.
    """

    timesteps: tuple[float, ...] = ()
    rows: tuple[str, ...] = ()
    tensors: dict[str, Tensor] = field(default_factory=dict)
    told: Told = field(default_factory=Told)
    passes: int = 1


class Recorder:
    """Record sites of a network while it runs, inside a ``with`` block.

    Args:
        model: a `DiffusionModel`, a diffusers pipeline, or a bare UNet or transformer of any diffusers class.
        sites: paths, paper names, globs or presets of features; empty for none.
        maps: the same for attention maps; "cross", "self" and "joint" are all of a kind; empty for none.
        heads: "mean" averages a map's heads, "all" keeps them.
        tokens: which prompt positions of a cross-attention or joint map are kept; all by default. Probabilities are over all.
        stop_early: end the forward pass after the last wanted site; the network must be called through
            `DiffusionModel.denoise`, which then returns None.  Nested recorders stop when all of them have theirs.
        reduce: applied to each tensor at once, before it is kept.
        keep_steps: keep every forward pass in `steps`, only the last one, or with "mean" one whose tensors are the running mean
            of all in float32, so that the maps of many steps fit into memory.
        reuse: keep the network's own tensors, not copies; only for code that never writes into them.
        call: which of an attention's calls its map is of: 0 its own, 1 the first image prompt of an IP-Adapter.
        zero_massive: set the channels with this many largest absolute means over the image to 0, in each row of each feature
            (`massive_channels` says which they are).

    Raises:
        ValueError: a pattern matches nothing, or a module cannot be recorded faithfully (it is compiled, its
            projections are fused, or its attention has no softmax that can be seen).  A pipeline can change all this on its way, so
            each pass is checked again: one that cannot be recorded ends in this error, and the hooks are gone.

    >>> with Recorder(model, "paper", maps="cross") as recorder:  # doctest: +SKIP
    ...     model.denoise(noised, timesteps, text)
    >>> recorder["U-L1-R1-B0-Cross-Q"].shape  # doctest: +SKIP
    torch.Size([1, 96, 6, 6])
    """

    _entered: WeakKeyDictionary[nn.Module, list[Any]] = _ACTIVE

    def __init__(
        self,
        model: Any,
        sites: str | Iterable[str] = (),
        *,
        maps: str | Iterable[str] = (),
        heads: Literal["mean", "all"] = "mean",
        tokens: Sequence[int] | None = None,
        stop_early: bool = False,
        reduce: Reduce | None = None,
        keep_steps: bool | Literal["mean"] = True,
        reuse: bool = False,
        call: int = 0,
        zero_massive: int = 0,
    ) -> None:
        self.model = model
        self.network, self._pipeline = _network_of(model)
        if heads not in ("mean", "all"):
            raise ValueError(f"heads={heads!r} is not one of mean, all.")
        if stop_early and not isinstance(model, DiffusionModel):
            raise ValueError("stop_early needs a DiffusionModel, whose denoise() expects to be stopped; a pipeline does not.")
        if tokens is not None and (len(tokens) == 0 or min(tokens) < 0):
            raise ValueError(f"tokens={list(tokens)} must be positions from 0 on, at least one; None keeps all.")
        self.heads, self.tokens, self.stop_early = heads, tokens, stop_early
        self._reduce, self._keep_steps, self._reuse = reduce, keep_steps, reuse
        self.call, self.zero_massive = call, zero_massive
        self.ear = Ear(model.pipeline if isinstance(model, DiffusionModel) else self._pipeline)
        available = sites_of(self.network)
        features = select_sites([s for s in available if not s.is_map], sites) if sites else []
        try:
            wanted_maps = select_sites([s for s in available if s.is_map], maps) if maps else []
        except ValueError as error:
            attentions = [m for m in self.network.modules() if hasattr(m, "processor") and is_linear(m)]
            linear = ", ".join(sorted({type(module.processor).__name__ for module in attentions}))
            raise ValueError(
                f"{error} Its linear attentions ({linear}) have no softmax, and so no map." if linear else error
            ) from error
        if not features and not wanted_maps:
            raise ValueError("Nothing to record: give sites, maps, or both.")
        wanted = {s.name for s in [*features, *wanted_maps]}
        self.sites = [site for site in available if site.name in wanted]
        self._modules: dict[str, nn.Module] = {}
        self._find()
        self.steps: list[Step] = []
        self._step: Step | None = None
        self._grid: dict[str, tuple[int, ...]] = {}
        self._handles: list[Any] = []
        self._taps: list[Tap] = []
        self._late: ValueError | None = None
        self._streams: Streams | None = None
        self._traced: dict[Any, Streams] = {}
        self._told: tuple[tuple[int, ...], int] | None = None  # the grid, where a pass has shapes alone and cannot say it
        self._in_unet = hasattr(self.network, "down_blocks")
        self._joined = any(site.kind.startswith("joint_") for site in available)

    # --- what was recorded ------------------------------------------------------------------------

    @property
    def last(self) -> dict[str, Tensor]:
        """The tensors of the newest complete forward pass, by site name."""
        return self.kept_steps()[-1].tensors

    def kept_steps(self) -> list[Step]:
        """The kept forward passes; ValueError where there are none."""
        if not self.steps:
            raise ValueError("Nothing was recorded: no forward pass has ended inside the 'with' block.")
        return self.steps

    def __getitem__(self, name: str) -> Tensor:
        found = select_sites(self.sites, name)
        return self.last[found[0].name]

    attention, to_xarray = word_attention, as_tree

    # --- entering and leaving ---------------------------------------------------------------------

    def __enter__(self) -> Recorder:
        if self._handles:
            raise RuntimeError("This recorder is already recording; make a second one to nest them.")
        try:
            self._find()
            self._attach()
        except BaseException:
            self._detach()
            raise
        self._entered.setdefault(self.network, []).append(self)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._detach()
        self._entered[self.network].remove(self)
        self._step = None

    def _detach(self) -> None:
        for handle in self._handles:
            handle.remove()
        for tap in self._taps:
            tap.close()
        self._handles.clear()
        self._taps.clear()

    def _find(self) -> None:
        """Take the modules as they are now: adapters replace some."""
        self._modules = dict(self.network.named_modules())
        if lost := [site for site in self.sites if site.module_path not in self._modules]:
            raise ValueError(f"Site {lost[0].name} was taken out of the network; make a new recorder.")
        self._check()

    def _refuse(self, why: str) -> NoReturn:
        """End a pass that cannot be recorded."""
        if not any(tap.busy for tap in self._taps):
            self._detach()
            self._step = None
        raise ValueError(why)

    def _check(self) -> None:
        """Refuse, by name, what could not be recorded faithfully."""
        if getattr(self.network, "is_cache_enabled", False):
            raise ValueError("A cache skips blocks of this network; call its disable_cache() before it is recorded.")
        ancestors = set()
        for site in self.sites:
            parts = site.module_path.split(".")
            ancestors |= {".".join(parts[:n]) for n in range(len(parts) + 1)}
        _refuse_compiled({path: self._modules[path] for path in sorted(ancestors)})
        for site in self.sites:
            if site.is_map or site.kind.endswith(("_query", "_key", "_value")):
                self._check_attention(site)
        # On the meta device only shapes are asked for, and they need no schedule.
        own = isinstance(self.model, DiffusionModel)
        if self.sites[-1].kind == "prediction" and not own and not next(self.network.parameters()).is_meta:
            self._schedule()

    def _check_attention(self, site: Site) -> None:
        attention: Any = self._modules[site.module_path if site.is_map else site.module_path.rpartition(".")[0]]
        kind = type(getattr(attention, "processor", None)).__name__
        # An Attention's own `fused_projections` stays True after unfuse_qkv_projections(); its processor tells.
        fused = kind.startswith("Fused") if isinstance(attention, Attention) else getattr(attention, "fused_projections", False)
        if fused and not site.is_map:
            raise ValueError(
                f"Site {site.name} has fused projections ({kind}), so its query, key and value never exist apart. "
                "Call unfuse_qkv_projections() first."
            )
        if site.is_map and kind.startswith(("Sliced", "XFormers")):
            raise ValueError(
                f"Site {site.name} uses the attention processor {kind}, whose maps are not known. "
                "Known: AttnProcessor, and all that call scaled_dot_product_attention; set one with set_attn_processor()."
            )

    # --- hooks ------------------------------------------------------------------------------------

    def _check_pass(self, given: Mapping[str, Any], sample: Tensor, timestep: Any) -> None:
        """What may have changed since the recorder was entered, and what only a pass shows."""
        try:
            there = [self.network.get_submodule(site.module_path) for site in self.sites]
            self._check()
        except (AttributeError, ValueError) as error:
            self._refuse(str(error))
        for site, module in zip(self.sites, there, strict=True):
            if module is not self._modules[site.module_path]:
                self._refuse(
                    f"Module {site.module_path!r} was replaced while it was recorded; change the network (load adapters) before "
                    "the recorder is entered."
                )
        rows = {"latents": len(sample)}
        for name, value in (("texts", given.get("encoder_hidden_states")), ("timesteps", timestep)):
            if isinstance(value, Tensor) and value.ndim:
                rows[name] = len(value)
        if any(count != len(sample) and (name, count) != ("timesteps", 1) for name, count in rows.items()):
            found = ", ".join(f"{count} {name}" for name, count in rows.items())
            self._refuse(
                f"A pass with {found} cannot be recorded: it is not known which belong together; give one of each a row."
            )

    def _attach(self) -> None:
        add = self._handles.append
        self._handles += self.ear.attach()
        add(self.network.register_forward_pre_hook(self._begin, with_kwargs=True))
        anchors = {site.anchor for site in self.sites if site.anchor and site.kind not in ("block", "resnet")}
        for path in sorted(anchors):
            add(self._modules[path].register_forward_pre_hook(partial(self._note_grid, path), with_kwargs=True))
        mapped: dict[str, list[Site]] = {}
        for site in self.sites:
            if site.is_map:
                mapped.setdefault(site.module_path, []).append(site)
            elif site.kind == "modulated":
                hook = partial(self._keep_input, site)
                add(self._modules[site.module_path].register_forward_pre_hook(hook, with_kwargs=True))
            elif site.path:
                add(self._modules[site.module_path].register_forward_hook(partial(self._keep_feature, site)))
        for path, sites in mapped.items():
            tap = Tap(self._modules[path], partial(self._attend, sites), normaliser=any("joint" in site.kind for site in sites))
            self._taps.append(tap)
            self._handles += tap.attach()
            add(self._modules[path].register_forward_hook(partial(self._check_seen, sites, tap)))
        add(self.network.register_forward_hook(self._end))

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = arguments_of(module, args, kwargs)
        sample = next(iter(given.values()))
        sample = torch.stack(sample) if isinstance(sample, list | tuple) else sample
        timestep = next((given[name] for name in TIME_NAMES if name in given), None)
        self._check_pass(given, sample, timestep)
        try:
            self._grid[""], self._tokens = self._told or image_grid(module, given)
            self._streams = self._trace(given)
        except ValueError as error:
            self._refuse(str(error))
        self._sample = sample
        self._texts = sum(tensor.shape[-2] for name in texts_of(given) for tensor in tensors_of(given[name])[:1])
        times = torch.as_tensor(0 if timestep is None else timestep)
        # A timestep for every token, as some video models take it, is told by that of the first.
        self._timesteps = (times.reshape(len(sample), -1)[:, 0] if times.ndim > 1 else times.flatten()).expand(len(sample))
        noted = () if sample.is_meta or timestep is None else tuple(float(step) for step in self._timesteps.tolist())
        self._step = Step(noted, self._row_names(sample), told=self.ear.told())
        if self.sites[0].kind == "input":
            self._keep(self.sites[0], self._as_image(sample.detach()), copied=False)

    def _trace(self, given: Mapping[str, Any]) -> Streams | None:
        """Where image and text stand, if lengths alone do not say it; found once for all passes of the same shapes."""
        if self._in_unet or not self._joined or tensors_of(next(iter(given.values())))[0].is_meta:
            return None
        wanted = [site for site in self.sites if site.path and site.kind not in ("cross_key", "cross_value")]
        lengths = {tensor.shape[-2] for name in texts_of(given) for tensor in tensors_of(given[name])}
        blocks = all(site.kind == "transformer_block" and site.name.startswith("T-") for site in wanted)
        if blocks and self._tokens not in lengths:
            return None
        key = fingerprint(dict(given))
        if key not in self._traced:
            inputs = [site.module_path for site in wanted if site.kind == "modulated"]
            outputs = {site.module_path for site in wanted if not site.is_map and site.kind != "modulated"}
            attentions = [path for path in attentions_of(self._modules) if not is_linear(self._modules[path])]
            with evaluating(self.network):
                self._traced[key] = trace(self.network, given, outputs, inputs, attentions)
        return self._traced[key]

    def _row_names(self, sample: Tensor) -> tuple[str, ...]:
        """Pipelines that guide put the negative prompts before the prompts, on the same latents twice.

        Both are asked: PixArt's pipeline does not say whether it guides, and a network called by hand after a
        guided run is not guided.  Some pipelines have other rows (InstructPix2Pix three, perturbed attention its own), which
        shows in how often the latents are repeated.
        """
        rows, pipeline = len(sample), self._pipeline
        if pipeline is None or sample.is_meta:
            return ("prompt",) * rows
        config: Any = self.network.config
        # beside the latents stand masks and images, which may differ
        latents = sample[:, : config.get("out_channels")] if sample.ndim == 4 else sample
        parts = [n for n in range(2, rows + 1) if rows % n == 0 and torch.equal(latents[rows // n :], latents[: -rows // n])]
        doubled = ("sd", "sdxl", "pixart")  # their pipelines guide in one pass
        known = any(FAMILIES[cls.__name__].name in doubled for cls in type(pipeline).__mro__ if cls.__name__ in FAMILIES)
        guides = getattr(pipeline, "do_classifier_free_guidance", True)
        if not parts or (known and not guides):
            return ("prompt",) * rows
        if not guides or 2 not in parts or (not known and parts != [2]):
            self._refuse(
                f"A {type(pipeline).__name__} gives the network {rows} rows with the same latents, and which of them are the "
                "negative prompts is not known here; record the network instead of the pipeline, whose rows have no names."
            )
        names = ("negative",) * (rows // 2) + ("prompt",) * (rows // 2)
        return names[::-1] if type(pipeline).__name__.startswith(_PROMPT_FIRST) else names

    def _note_grid(self, path: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        self._grid[path] = (hidden.shape[-2], hidden.shape[-1])

    def _silent(self) -> bool:
        """Whether nothing is to be kept now: between passes, and while a recorder traces where the tokens stand."""
        return self._step is None or self.network in TRACED

    def _attend(self, sites: Sequence[Site], call: Call, run: Callable[[], Tensor]) -> Tensor:
        """An attention call of the network, made by itself; its maps are taken beside it."""
        output = run()
        if not self._silent() and call.index == self.call:
            try:
                for site in sites:
                    self._keep(site, self._map_of(site, call), copied=True)
            except ValueError as error:  # the hooks cannot go while the tap is at work; they do when the module ends
                self._late = error
        return output

    def _check_seen(self, sites: Sequence[Site], tap: Tap, attention: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self._late is not None:
            late, self._late = self._late, None
            self._detach()
            self._step = None
            raise late
        if not self._silent() and tap.calls <= self.call:
            kind = type(getattr(attention, "processor", attention)).__name__
            self._refuse(
                f"Site {sites[0].name} has no map: {kind} made {tap.calls} calls of scaled_dot_product_attention, and of call "
                f"{self.call} (from 0) it was asked for.  Set a processor that calls it with set_attn_processor()."
            )

    def _map_of(self, site: Site, call: Call) -> Tensor:
        """One attention map (row, head, token, y, x)."""
        grid, path, count = self._grid[site.anchor], site.module_path, call.index
        heads, tokens = self.heads, None if self.tokens is None else list(self.tokens)
        if len(call.query) != len(self._sample):
            self._refuse(
                f"Site {site.name} attends to {len(call.query)} rows a call where the pass has {len(self._sample)}, so it is not known "
                "which is which; give the network one row at a time."
            )
        if self._in_unet:
            # A self-map's keys are places, of which all are kept.
            found = probabilities(call, heads=heads, tokens=tokens if site.kind == "cross_map" else None)
            return found.unflatten(-1, grid)
        _, places = self._find_stream(site, path, f"query{count}", [call.query.shape[2]], "image")
        if site.kind == "self_map":
            _, keys = self._find_stream(site, path, f"key{count}", [call.key.shape[2]], "image")
            return probabilities(call, places, keys, heads=heads).unflatten(-1, grid)
        if site.kind == "cross_map" or count:
            return probabilities(call, places, heads=heads, tokens=tokens).unflatten(-1, grid)
        _, words = self._find_stream(site, path, f"key{count}", [call.key.shape[2]], "text")
        asked = tokens or []
        if isinstance(self.model, DiffusionModel) and self.model.kind.limit and site.kind != "joint_mass_map":
            held = words.stop - words.start if isinstance(words, slice) else words.shape[1]
            tokens = [token for token in asked if token < held] if asked else tokens
        if site.kind == "joint_output_map":
            found = output_products(call, places, words, heads=heads, tokens=tokens)
        elif site.kind == "joint_back_map":
            _, asking = self._find_stream(site, path, f"query{count}", [call.query.shape[2]], "text")
            found = probabilities(call, narrow(asking, tokens, call.query.shape[2]), places, heads=heads).mT
        elif site.kind == "joint_mass_map":
            found = probabilities(call, places, words, heads=heads, sum_tokens=True)
        else:
            over: Any = "among" if site.kind == "joint_text_map" else "all"
            found = probabilities(call, places, words, over=over, heads=heads, tokens=tokens)
        if tokens is not None and len(tokens) < len(
            asked
        ):  # prompts keep their own lengths; beyond them nothing is attended to
            found = nn.functional.pad(found, (0, 0, 0, len(asked) - len(tokens)))
        return found.unflatten(-1, grid)

    def _find_stream(self, site: Site, path: str, what: str, lengths: Sequence[int], stream: str) -> tuple[int, Index]:
        """Which of several sequences holds the image's places, or the text, and where in it they stand."""
        places = math.prod(self._grid[site.anchor])
        if self._streams is not None:
            found = self._streams.find(path, what, stream)
            if found is None:
                self._refuse(f"Site {site.name} holds no {stream} tokens in this pass, so there is nothing to record there.")
        else:
            found = next((told for n, length in enumerate(lengths) if (told := self._by_length(n, length, stream))), None)
            if found is None:
                here = " or ".join(map(str, lengths))
                if stream == "text":
                    self._refuse(f"Site {site.name} holds no text beside the {here} tokens of its image; record other sites.")
                self._refuse(
                    f"Site {site.name} holds {here} tokens, which are not the {self._tokens} of this image; record other sites."
                )
        number, index = found
        if stream == "text":
            return found
        held = index.stop - index.start if isinstance(index, slice) else index.shape[1]
        if held < places:
            self._refuse(
                f"Site {site.name} holds {held} image tokens, which are not the {places} of this image; record other sites."
            )
        # Reference images follow the noised one.
        return number, slice(index.start, index.start + places) if isinstance(index, slice) else index[:, :places]

    def _by_length(self, number: int, length: int, stream: str) -> tuple[int, Index] | None:
        """As `_find_stream`, where lengths tell; without numbers (on the meta device) of a joint sequence too."""
        joint = length - self._tokens if length > self._tokens and self._sample.is_meta else 0
        if stream == "image":
            return (number, slice(joint, length)) if joint or length == self._tokens else None
        if joint and length > self._texts:
            return number, slice(0, min(joint, self._texts))
        return (number, slice(0, length)) if length != self._tokens else None

    def _keep_feature(self, site: Site, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self._silent():
            return
        if self._in_unet or site.kind in ("cross_key", "cross_value"):
            tensor = (output[0] if isinstance(output, tuple) else output).detach()
            if tensor.ndim == 3:  # (row, place or token, channel)
                tensor = tensor.transpose(1, 2)
                if not site.over_tokens:
                    tensor = tensor.unflatten(-1, self._grid[site.anchor])
        else:
            tensor = self._stream_of(site, "output", output)
        self._keep(site, tensor, copied=False)

    def _keep_input(self, site: Site, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self._silent():
            self._keep(site, self._stream_of(site, "input", first_of(args, kwargs)), copied=False)

    def _stream_of(self, site: Site, what: str, value: Any) -> Tensor:
        """The image of one or several sequences (row, token, channel) as (row, channel, y, x); the text as (row, channel, token)."""
        sequences = [tensor.detach().flatten(2) for tensor in tensors_of(value) if tensor.ndim >= 3]
        stream = "text" if site.kind == "text_output" else "image"
        number, index = self._find_stream(site, site.module_path, what, [s.shape[1] for s in sequences], stream)
        tensor = take(sequences[number], index, dim=1).transpose(1, 2)
        return tensor if stream == "text" else tensor.unflatten(-1, self._grid[site.anchor])

    def _as_image(self, latents: Tensor) -> Tensor:
        """What goes in or comes out as (row, channel, y, x); a single frame has no axis of its own."""
        grid = self._grid[""]
        if latents.ndim == 3:
            return latents[:, : math.prod(grid)].transpose(1, 2).unflatten(-1, grid)
        return latents.squeeze(2) if latents.ndim == 5 and latents.shape[2] == 1 else latents

    def _keep(self, site: Site, tensor: Tensor, copied: bool) -> None:
        assert self._step is not None
        if self.zero_massive and not site.is_map and not site.over_tokens:
            channels, _ = massive_channels(tensor, self.zero_massive)
            massive = torch.zeros(tensor.shape[:2], dtype=torch.bool, device=tensor.device).scatter_(1, channels, True)
            tensor, copied = tensor.masked_fill(massive.view(*massive.shape, *[1] * (tensor.ndim - 2)), 0), True
        kept = self._reduce(site, tensor) if self._reduce is not None else tensor
        if not copied and not self._reuse and kept.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr():
            kept = kept.clone(memory_format=torch.contiguous_format)  # later layers may write into theirs in place
        self._step.tensors[site.name] = kept
        if len(self._step.tensors) == len(self.sites):
            self._finish()
            # A pass that ends with the predicted noise is complete: there is nothing left to stop.
            if site.kind != "prediction" and all(other.stop_early and other._step is None for other in _ACTIVE[self.network]):
                raise StopForward

    def _end(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self._step is None:
            return
        silent = [site.name for site in self.sites if site.name not in self._step.tensors and site.kind != "prediction"]
        if silent:
            self._refuse(
                f"Site {silent[0]} had no part in this pass ({len(silent)} in all), so there is nothing to record there."
            )
        if self.sites[-1].kind == "prediction":
            raw = output[0] if isinstance(output, tuple) else output.sample
            raw = self._as_image((torch.stack(raw) if isinstance(raw, list) else raw).detach())
            sample = self._as_image(self._sample)
            if raw.is_meta:
                noise = raw[:, : sample.shape[1]]
            elif not isinstance(self.model, DiffusionModel):
                noise = predicted_noise(raw, sample, self._timesteps.long(), *self._schedule())
            elif self.model.passing is None and self.model.kind.flow:
                self._refuse(f"Site {PREDICTION} of a flow needs the pass's training timestep; call the model's denoise().")
            else:
                passing = self._timesteps.long() if self.model.passing is None else self.model.passing
                noise = self.model.noise_in(raw, sample, passing)
            self._keep(self.sites[-1], noise, copied=False)
        else:
            self._finish()

    def _schedule(self) -> tuple[Tensor, str]:
        """Levels of the noise and what the network predicts; ValueError where its output cannot be turned into noise."""
        scheduler: Any = getattr(self._pipeline, "scheduler", None)
        if not hasattr(scheduler, "alphas_cumprod"):
            given = "a bare network" if self._pipeline is None else f"a pipeline with a {type(scheduler).__name__}"
            raise ValueError(
                f"Site {PREDICTION} needs a noise schedule with alphas_cumprod, which {given} does not have; "
                "record a DiffusionModel or a pipeline of a supported family."
            )
        kind, config = type(self._pipeline).__name__, self.network.config
        if config.in_channels > config.out_channels and not kind.startswith("StableDiffusion"):
            raise ValueError(
                f"Site {PREDICTION} needs the latents, and which of the {config.in_channels} channels that a {kind} gives the "
                "network they are is not known; record other sites."
            )
        return scheduler.alphas_cumprod, scheduler.config.prediction_type

    def _finish(self) -> None:
        assert self._step is not None
        step, self._step = self._step, None
        if not self._keep_steps:
            self.steps.clear()
        if self._keep_steps != "mean" or not self.steps:
            if self._keep_steps == "mean":
                step.tensors = {name: tensor.to(torch.float32, copy=True) for name, tensor in step.tensors.items()}
            self.steps.append(step)
            return
        mean, new = self.steps[0], {name: tensor.float() for name, tensor in step.tensors.items()}
        if mean.rows != step.rows or any(mean.tensors[name].shape != tensor.shape for name, tensor in new.items()):
            self._refuse(f"A mean over passes needs equal rows and sizes; {mean.rows} were followed by {step.rows}.")
        mean.passes += 1
        mean.timesteps = ()
        for name, tensor in new.items():
            mean.tensors[name] += (tensor - mean.tensors[name]) / mean.passes


def _network_of(model: Any) -> tuple[Network, Any]:
    """The network to hook, and the pipeline that drives it where one does."""
    network, pipeline = model, None
    if isinstance(model, DiffusionModel):
        network = model.network
    elif not isinstance(model, nn.Module):
        found = (getattr(model, name, None) for name in ("unet", "transformer"))
        network, pipeline = next((part for part in found if isinstance(part, nn.Module)), model), model
    if isinstance(network, nn.Module):
        _refuse_compiled({"": network})
    if not isinstance(network, ModelMixin) or len(sites_of(network)) < 3:
        raise ValueError(
            f"A {type(network).__name__} cannot be recorded: give a DiffusionModel, a diffusers pipeline, or its network, which "
            "must be a UNet or transformer of diffusers with attention in its blocks."
        )
    return network, pipeline


def _refuse_compiled(modules: Mapping[str, nn.Module]) -> None:
    for path, module in modules.items():
        if getattr(module, "_compiled_call_impl", None) is not None or type(module).__name__ == "OptimizedModule":
            raise ValueError(
                f"Module {path or 'network'!r} is compiled, and hooks added after torch.compile are ignored. "
                "Record the uncompiled model."
            )


def massive_channels(
    feature: Float[Tensor, "row channel *place"], count: int = 2
) -> tuple[Int[Tensor, "row count"], Float[Tensor, "row count"]]:
    """Channels whose means over all places are largest in absolute value, and these means, largest first.

    A few such channels outweigh all others in the blocks of diffusion transformers (DiTF, 2025).

    >>> massive_channels(torch.tensor([[[0.0, 1.0], [-9.0, -7.0]]]), 1)
    (tensor([[1]]), tensor([[-8.]]))
    """
    means = feature.float().flatten(2).mean(2)
    channels = means.abs().topk(min(count, means.shape[1])).indices
    return channels, means.gather(1, channels)


def site_shapes(network: Network, latent_size: tuple[int, int], prompt_tokens: int) -> dict[str, tuple[int, ...]]:
    """Shape of every site for one image, without running the real network: (channel, y, x), or (head, token, y, x) for maps.

    The network's config is built again on the meta device, where a forward pass costs nothing; so this works
    for a model of any size on any machine.  Sites over prompt tokens give (channel, token).

    Raises:
        ValueError: the network's pass needs more than shapes, or an argument that is not known here.
    """
    with torch.device("meta"):
        twin = type(network).from_config(network.config).eval()
        given, grid = meta_arguments(twin, latent_size, prompt_tokens)
        maps = "*" if any(site.is_map for site in sites_of(twin)) else ()
        with torch.no_grad(), Recorder(twin, "*", maps=maps, heads="all", reuse=True) as recorder:
            recorder._told = grid
            try:
                with Lengths(prompt_tokens):
                    twin(**given, return_dict=False)
            except ValueError:
                raise
            except Exception as error:
                raise ValueError(
                    f"The shapes of a {type(network).__name__} are not known without its weights: {error}"
                ) from error
    return {name: tuple(tensor.shape[1:]) for name, tensor in recorder.last.items()}
