"""Hooks that copy out what a network computes, without changing what it computes.

Everything is a forward hook on the library's own modules: features are the modules' outputs, attention maps are computed
beside the real call from the query and key that it projected.  No attention processor is replaced, so the output is
bit-identical with and without a recorder, whichever fused kernel runs.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from types import TracebackType
from typing import Any, Literal, NoReturn
from weakref import WeakKeyDictionary

import torch
from diffusers import PixArtTransformer2DModel, UNet2DConditionModel
from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0
from jaxtyping import Float
from torch import Tensor, nn

from diffprobe.models import FAMILIES, SUPPORTED, DiffusionModel, Network, StopForward, predicted_noise, sites_of
from diffprobe.sites import PREDICTION, Site, select_sites

Reduce = Callable[[Site, Tensor], Tensor]
_CHUNK_BYTES = 32 * 2**20  # float32 scores held at once; larger is no faster and shows in the peak memory
_ACTIVE: WeakKeyDictionary[nn.Module, list[Recorder]] = WeakKeyDictionary()


@dataclass
class Step:
    """What one forward pass left behind.

    Attributes:
        timesteps: the timestep of each row.
        rows: what each row of the batch is, e.g. ("negative", "prompt") under classifier-free guidance.
        tensors: by site name; features (row, channel, y, x), maps (row, head, token, y, x), cross-attention keys and
            values (row, channel, token).
    """

    timesteps: tuple[float, ...] = ()
    rows: tuple[str, ...] = ()
    tensors: dict[str, Tensor] = field(default_factory=dict)


class Recorder:
    """Record sites of a network while it runs, inside a ``with`` block.

    Args:
        model: a `DiffusionModel`, a diffusers pipeline, or a bare UNet or transformer.
        sites: paths, paper names, globs or presets of features; empty for none.
        maps: the same for attention maps; "cross" and "self" are all of a kind; empty for none.
        heads: "mean" averages a map's heads, "all" keeps them.
        tokens: which prompt positions of a cross-attention map are kept; all by default. Probabilities are over all.
        stop_early: end the forward pass after the last wanted site; the network must be called through
            `DiffusionModel.denoise`, which then returns None.  Nested recorders stop when all of them have theirs.
        reduce: applied to each tensor at once, before it is kept.
        keep_steps: keep every forward pass in `steps`, or only the last one.
        reuse: keep the network's own tensors, not copies; only for code that never writes into them.

    Raises:
        ValueError: a pattern matches nothing, or a module cannot be recorded faithfully (it is compiled, its
            projections are fused, or its attention processor is unknown).  A pipeline can change all this on its way, so
            each pass is checked again: one that cannot be recorded ends in this error, and the hooks are gone.

    >>> with Recorder(model, "paper", maps="cross") as recorder:  # doctest: +SKIP
    ...     model.denoise(noised, timesteps, text)
    >>> recorder["U-L1-R1-B0-Cross-Q"].shape  # doctest: +SKIP
    torch.Size([1, 96, 6, 6])
    """

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
        keep_steps: bool = True,
        reuse: bool = False,
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
        available = sites_of(self.network)
        features = select_sites([s for s in available if not s.is_map], sites) if sites else []
        wanted_maps = select_sites([s for s in available if s.is_map], maps) if maps else []
        if not features and not wanted_maps:
            raise ValueError("Nothing to record: give sites, maps, or both.")
        wanted = {s.name for s in [*features, *wanted_maps]}
        self.sites = [site for site in available if site.name in wanted]
        self._modules: dict[str, nn.Module] = {}
        self._find()
        self.steps: list[Step] = []
        self._step: Step | None = None
        self._grid: dict[str, tuple[int, int]] = {}
        self._held: dict[tuple[str, str], Any] = {}
        self._handles: list[Any] = []

    # --- what was recorded ------------------------------------------------------------------------

    @property
    def last(self) -> dict[str, Tensor]:
        """The tensors of the newest complete forward pass, by site name."""
        if not self.steps:
            raise ValueError("Nothing was recorded: no forward pass has ended inside the 'with' block.")
        return self.steps[-1].tensors

    def __getitem__(self, name: str) -> Tensor:
        found = select_sites(self.sites, name)
        return self.last[found[0].name]

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
        _ACTIVE.setdefault(self.network, []).append(self)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._detach()
        _ACTIVE[self.network].remove(self)
        self._step = None

    def _detach(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._held.clear()

    def _find(self) -> None:
        """Take the modules as they are now: adapters replace some."""
        self._modules = dict(self.network.named_modules())
        if lost := [site for site in self.sites if site.module_path not in self._modules]:
            raise ValueError(f"Site {lost[0].name} was taken out of the network; make a new recorder.")
        self._check()

    def _refuse(self, why: str) -> NoReturn:
        """End a pass that cannot be recorded."""
        self._detach()
        self._step = None
        raise ValueError(why)

    def _check(self) -> None:
        """Refuse, by name, what could not be recorded faithfully."""
        ancestors = set()
        for site in self.sites:
            parts = site.module_path.split(".")
            ancestors |= {".".join(parts[:n]) for n in range(len(parts) + 1)}
        _refuse_compiled({path: self._modules[path] for path in sorted(ancestors)})
        for site in self.sites:
            if site.is_map or site.kind.endswith(("_query", "_key", "_value")):
                self._check_attention(site)
        # On the meta device only shapes are asked for, and they need no schedule.
        if self.sites[-1].kind == "prediction" and not next(self.network.parameters()).is_meta:
            self._schedule()

    def _check_attention(self, site: Site) -> None:
        processor = self._modules[site.module_path if site.is_map else site.module_path.rpartition(".")[0]].processor
        kind = type(processor).__name__
        # The module's own `fused_projections` stays True after unfuse_qkv_projections(); its processor tells.
        if kind.startswith("Fused"):
            raise ValueError(
                f"Site {site.name} has fused projections ({kind}), so its query, key and value never exist apart. "
                "Call unfuse_qkv_projections() first."
            )
        if site.is_map and type(processor) not in (AttnProcessor, AttnProcessor2_0):
            raise ValueError(
                f"Site {site.name} uses the attention processor {kind}, whose maps are not known. "
                "Known: AttnProcessor, AttnProcessor2_0; set one with set_attn_processor()."
            )

    # --- hooks ------------------------------------------------------------------------------------

    def _check_pass(self, given: Mapping[str, Any], sample: Tensor) -> None:
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
        for name, value in (("texts", given.get("encoder_hidden_states")), ("timesteps", given["timestep"])):
            if isinstance(value, Tensor) and value.ndim:
                rows[name] = len(value)
        if any(count != len(sample) and (name, count) != ("timesteps", 1) for name, count in rows.items()):
            found = ", ".join(f"{count} {name}" for name, count in rows.items())
            self._refuse(
                f"A pass with {found} cannot be recorded: it is not known which belong together; give one of each a row."
            )

    def _attach(self) -> None:
        add = self._handles.append
        add(self.network.register_forward_pre_hook(self._begin, with_kwargs=True))
        anchors = {site.anchor for site in self.sites if site.anchor and site.kind not in ("block", "resnet")}
        for path in sorted(anchors):
            add(self._modules[path].register_forward_pre_hook(partial(self._note_grid, path), with_kwargs=True))
        for site in self.sites:
            if site.is_map:
                attention: Any = self._modules[site.module_path]
                add(attention.to_q.register_forward_hook(partial(self._hold, (site.name, "query"))))
                add(attention.to_k.register_forward_hook(partial(self._hold, (site.name, "key"))))
                add(attention.register_forward_pre_hook(partial(self._hold_mask, site), with_kwargs=True))
                add(attention.register_forward_hook(partial(self._keep_map, site)))
            elif site.path:
                add(self._modules[site.module_path].register_forward_hook(partial(self._keep_feature, site)))
        add(self.network.register_forward_hook(self._end))

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = inspect.signature(module.forward).bind(*args, **kwargs).arguments
        sample: Tensor = given["sample"] if "sample" in given else given["hidden_states"]
        self._check_pass(given, sample)
        patch = self.network.config.patch_size if isinstance(self.network, PixArtTransformer2DModel) else 1
        self._grid[""] = (sample.shape[-2] // patch, sample.shape[-1] // patch)
        self._sample = sample
        self._timesteps = torch.as_tensor(given["timestep"]).flatten().expand(len(sample))
        noted = () if sample.is_meta else tuple(float(step) for step in self._timesteps.tolist())
        self._step = Step(noted, self._row_names(sample))
        if self.sites[0].kind == "input":
            self._keep(self.sites[0], sample.detach(), copied=False)

    def _row_names(self, sample: Tensor) -> tuple[str, ...]:
        """Pipelines that guide put the negative prompts before the prompts, on the same latents twice.

        Both are asked: PixArt's pipeline does not say whether it guides, and a network called by hand after a
        guided run is not guided.  Some pipelines have other rows (InstructPix2Pix three, perturbed attention its own), which
        shows in how often the latents are repeated.
        """
        rows, pipeline = len(sample), self._pipeline
        if pipeline is None or sample.is_meta:
            return ("prompt",) * rows
        latents = sample[:, : self.network.config.out_channels]  # beside them stand masks and images, which may differ
        parts = [n for n in range(2, rows + 1) if rows % n == 0 and torch.equal(latents[rows // n :], latents[: -rows // n])]
        known = any(cls.__name__ in FAMILIES for cls in type(pipeline).__mro__)
        guides = getattr(pipeline, "do_classifier_free_guidance", True)
        if not parts or (known and not guides):
            return ("prompt",) * rows
        if not guides or 2 not in parts or (not known and parts != [2]):
            self._refuse(
                f"A {type(pipeline).__name__} gives the network {rows} rows with the same latents, and which of them are the "
                "negative prompts is not known here; record the network instead of the pipeline, whose rows have no names."
            )
        return ("negative",) * (rows // 2) + ("prompt",) * (rows // 2)

    def _note_grid(self, path: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        self._grid[path] = (hidden.shape[-2], hidden.shape[-1])

    def _hold(self, key: tuple[str, str], module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        self._held[key] = output.detach()

    def _hold_mask(self, site: Site, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        try:
            self._check_attention(site)
        except ValueError as error:
            self._refuse(str(error))
        self._held[site.name, "mask"] = args[2] if len(args) > 2 else kwargs.get("attention_mask")

    def _keep_map(self, site: Site, attention: Attention, args: tuple[Any, ...], output: Tensor) -> None:
        query, key, mask = (self._held.pop((site.name, part)) for part in ("query", "key", "mask"))
        tokens = self.tokens if site.kind == "cross_map" else None  # a self-map's keys are places
        maps = attention_probabilities(attention, query, key, mask, heads=self.heads, tokens=tokens)
        self._keep(site, maps.unflatten(-1, self._grid[site.anchor]), copied=True)

    def _keep_feature(self, site: Site, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        tensor = (output[0] if isinstance(output, tuple) else output).detach()
        if tensor.ndim == 3:  # (row, place or token, channel)
            tensor = tensor.transpose(1, 2)
            if not site.over_tokens:
                tensor = tensor.unflatten(-1, self._grid[site.anchor])
        self._keep(site, tensor, copied=False)

    def _keep(self, site: Site, tensor: Tensor, copied: bool) -> None:
        assert self._step is not None
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
            raw = (output[0] if isinstance(output, tuple) else output.sample).detach()
            if raw.is_meta:
                noise = raw[:, : self._sample.shape[1]]
            else:
                noise = predicted_noise(raw, self._sample, self._timesteps.long(), *self._schedule())
            self._keep(self.sites[-1], noise, copied=False)
        else:
            self._finish()

    def _schedule(self) -> tuple[Tensor, str]:
        """Levels of the noise and what the network predicts; ValueError where its output cannot be turned into noise."""
        if isinstance(self.model, DiffusionModel):
            return self.model.alphas_cumprod, self.model.prediction_type
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
        if not self._keep_steps:
            self.steps.clear()
        self.steps.append(self._step)
        self._step = None


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
    if not isinstance(network, UNet2DConditionModel | PixArtTransformer2DModel):
        raise ValueError(
            f"A {type(network).__name__} cannot be recorded: give a DiffusionModel, a diffusers pipeline, or its network. "
            f"Supported: {SUPPORTED}."
        )
    return network, pipeline


def _refuse_compiled(modules: Mapping[str, nn.Module]) -> None:
    for path, module in modules.items():
        if getattr(module, "_compiled_call_impl", None) is not None or type(module).__name__ == "OptimizedModule":
            raise ValueError(
                f"Module {path or 'network'!r} is compiled, and hooks added after torch.compile are ignored. "
                "Record the uncompiled model."
            )


def attention_probabilities(
    attention: Attention,
    query: Float[Tensor, "row place width"],
    key: Float[Tensor, "row token width"],
    mask: Tensor | None = None,
    *,
    heads: Literal["mean", "all"] = "mean",
    tokens: Sequence[int] | None = None,
) -> Float[Tensor, "row head kept_token place"]:
    """Softmax over all tokens of the scaled scores, in float32, in chunks of rows.

    Args:
        query, key: what the module's own `to_q` and `to_k` gave.
        mask: the attention mask as the module was given it.
        tokens: which tokens are kept afterwards; the softmax is over all of them.
    """
    rows, width = len(query), query.shape[-1] // attention.heads
    query, key = (x.unflatten(-1, (attention.heads, width)).transpose(1, 2) for x in (query, key))
    # The two processors differ: only the fused one knows norms, and only the eager one the module's own scale.
    scale = attention.scale
    if isinstance(attention.processor, AttnProcessor2_0):
        scale = width**-0.5
        if attention.norm_q is not None:
            query = attention.norm_q.forward(query)
        if attention.norm_k is not None:
            key = attention.norm_k.forward(key)
    bias = attention.prepare_attention_mask(mask, key.shape[2], rows)
    bias = None if bias is None else bias.view(rows, attention.heads, -1, bias.shape[-1]).float()
    # Each place's softmax stands alone, so both rows and places can be taken in pieces.
    row_bytes = 4 * attention.heads * query.shape[2] * key.shape[2]
    rows_at_once = max(1, _CHUNK_BYTES // row_bytes)
    places_at_once = max(1, query.shape[2] * _CHUNK_BYTES // row_bytes)
    results = []
    for row in range(0, rows, rows_at_once):
        part = slice(row, row + rows_at_once)
        keys = key[part].float().transpose(-1, -2)
        pieces = []
        for piece in query[part].split(places_at_once, dim=2):
            scores = torch.matmul(piece.float() * scale, keys)
            if bias is not None:
                scores = scores + bias[part]
            maps = scores.softmax(-1)
            maps = maps.mean(1, keepdim=True) if heads == "mean" else maps
            pieces.append((maps if tokens is None else maps[..., list(tokens)]).transpose(-1, -2))
        results.append(torch.cat(pieces, dim=-1))
    return torch.cat(results)


def site_shapes(network: Network, latent_size: tuple[int, int], prompt_tokens: int) -> dict[str, tuple[int, ...]]:
    """Shape of every site for one image, without running the real network: (channel, y, x), or (head, token, y, x) for maps.

    The network's config is built again on the meta device, where a forward pass costs nothing; so this works
    for a model of any size on any machine.  Sites over prompt tokens give (channel, token).
    """
    with torch.device("meta"):
        twin = type(network).from_config(network.config).eval()
        config = network.config
        rows = torch.zeros(1, config.in_channels, *latent_size)
        if isinstance(twin, PixArtTransformer2DModel):
            width = config.caption_channels
        elif (width := config.encoder_hid_dim) is None:  # cross_attention_dim may be a list, one for each block
            width = next((m.cross_attention_dim for m in twin.modules() if getattr(m, "is_cross_attention", False)), 1)
        arguments: dict[str, Any] = {"encoder_hidden_states": torch.zeros(1, prompt_tokens, width)}
        if isinstance(twin, PixArtTransformer2DModel):
            extra = torch.zeros(1, 2) if twin.use_additional_conditions else None
            arguments["added_cond_kwargs"] = {"resolution": extra, "aspect_ratio": None if extra is None else extra[:, :1]}
        elif config.addition_embed_type == "text_time":
            pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
            arguments["added_cond_kwargs"] = {"text_embeds": torch.zeros(1, pooled), "time_ids": torch.zeros(1, 6)}
        with torch.no_grad(), Recorder(twin, "*", maps=("cross", "self"), heads="all", reuse=True) as recorder:
            twin(rows, timestep=torch.zeros(1, dtype=torch.long), return_dict=False, **arguments)
    return {name: tuple(tensor.shape[1:]) for name, tensor in recorder.last.items()}
