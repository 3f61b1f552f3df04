"""Change what a network computes at named sites while it runs: from what can be read to what is used.

`Edit` is the recorder's counterpart: the same sites, checks and hooks (`diffprobe.recorder`, `diffprobe.tap`), but a value goes back
changed.  What a change is given has the recorder's axes: features (row, channel, y, x), text streams and cross-attention keys and
values (row, channel, token), maps (row, head, token, y, x).

Order: edits of one site act in the order in which they were entered, and before every recorder, however the blocks are
nested; a recorder sees the edited value.  A map is edited by the mask that its softmax is given, so the network's own kernel multiplies it
with the values, and a recorder's map of it is the edited one.

The invariants: rows, timesteps, tokens and places that are not named keep their bits; a change that gives back what it was given is
none, bit for bit; after the block, however it ends, no hook is left.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Container, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Any, TypeAlias
from weakref import WeakKeyDictionary

import numpy as np
import torch
from diffusers.models import attention_dispatch
from jaxtyping import Bool
from torch import Tensor, nn

from diffprobe.conditioning import word_tokens
from diffprobe.models import DiffusionModel, sites_of
from diffprobe.prompts import EncodedText
from diffprobe.recorder import Recorder, Step, _network_of, site_shapes
from diffprobe.sites import Site, select_sites
from diffprobe.tap import ALL, Call, Index, Run, additive, backend_of, probabilities, take, unseen
from diffprobe.tokens import arguments_of, first_of, tensors_of, texts_of

Tokens: TypeAlias = str | int | Sequence[str] | Sequence[int] | Tensor
_EDITS: WeakKeyDictionary[nn.Module, list[Edit]] = WeakKeyDictionary()  # in the order in which they were entered
_SHAPES: WeakKeyDictionary[nn.Module, dict[Any, dict[str, tuple[int, ...]]]] = WeakKeyDictionary()
_SHUT = -1e4  # what diffusers adds to the scores of a token that is masked; less is masked too
_BLOCKS = ("block", "resnet", "transformer_block")


# --- changes ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Change:
    """What is done at a site; the functions below make them.

    Attributes:
        name: as the function that made it is called.
        of: (value, carried) -> value, of all rows; of these the rows, tokens and places that are named are taken.
        carried: a value that must fit the site: a tensor or array, or a `Recorder` that has the site.
        rows: how many rows the pass must have; 0 for any.
        tokens, factor: whose attention is scaled, and by how much.
        text: the prompt whose keys and values a cross-attention is given.
    """

    name: str
    of: Callable[[Tensor, Any], Tensor] | None = None
    carried: Any = None
    rows: int = 0
    tokens: Tokens | None = None
    factor: float = 1.0
    text: str | EncodedText | None = None


def set_to(value: Any) -> Change:
    """The value: a number, one of each channel, one of the site's shape, or one of each row."""
    return Change("set_to", lambda old, new: new.expand_as(old), value)


def patch(value: Any) -> Change:
    """The value from another pass.

    Args:
        value: a `Recorder` that recorded the site (of several passes the one of the same timestep counts), its tensor, or a
            store's sample: ``features(store, site).sel(sample=...)`` at one timestep and conditioning.
    """
    return Change("patch", lambda old, new: new.expand_as(old), value)


def replace_map(maps: Any) -> Change:
    """Attention maps (row, head, token, y, x) in place of the network's; each place's are brought to the sum of 1."""
    return Change("replace_map", lambda old, new: new.expand_as(old), maps)


def add(vector: Any, scale: float = 1.0) -> Change:
    """Adds scale times a vector (channel,), or a value of the site's shape."""
    return Change("add", lambda old, new: old + scale * new, vector)


def zero() -> Change:
    """0 everywhere."""
    return Change("zero", lambda old, _: torch.zeros_like(old))


def mean(value: Any = None) -> Change:
    """Each channel's mean over the places of its row, or a mean (channel,) that is given, such as a dataset's."""
    if value is not None:
        return Change("mean", lambda old, new: new.expand_as(old), value)
    return Change("mean", lambda old, _: old.flatten(2).mean(2).view(*old.shape[:2], *(1,) * (old.ndim - 2)).expand_as(old))


def project_out(direction: Any) -> Change:
    """Takes out what lies along a direction (channel,), or in the span of several (direction, channel)."""
    basis = torch.linalg.qr(torch.atleast_2d(_tensor(direction).double()).mT)[0]

    def of(old: Tensor, _: Any) -> Tensor:
        span = basis.to(old.device, torch.promote_types(old.dtype, torch.float32))
        return old - torch.einsum("cd,ed,re...->rc...", span, span, old.to(span.dtype)).to(old.dtype)

    return Change("project_out", of, basis[:, 0])


def swap(rows: Sequence[int]) -> Change:
    """Each row is given the value of another: row i that of ``rows[i]``."""
    return Change("swap", lambda old, _: old[list(rows)], rows=len(rows))


def scale_token(token: Tokens, factor: float) -> Change:
    """Multiplies the attention on tokens, at a cross-attention's or joint map; what all tokens of a place get then sums to 1 again.

    Args:
        token: a word of the prompt, several, positions in it, or bool (row, token).
        factor: 0 cuts the token off.
    """
    if not 0 <= factor < math.inf:
        raise ValueError(f"scale_token multiplies probabilities: its factor is from 0 on and finite, not {factor:g}.")
    return Change("scale_token", tokens=token, factor=factor)


def swap_prompt(text: str | EncodedText | None) -> Change:
    """Gives cross-attentions the keys and values of another prompt; None is the pipeline's unconditional input."""
    return Change("swap_prompt", text=text)


def skip() -> Change:
    """The block is the identity: image and text leave it as they came."""
    return Change("skip")


# --- the edit ---------------------------------------------------------------------------------------


class Edit(Recorder):
    """Change sites of a network while it runs, inside a ``with`` block.

    Args:
        site: path, paper name, glob or preset, or several; maps are named as such (``*-Cross-Map``).
        change: one that this module's functions make, or any function of a tensor that gives one of its shape.
        timesteps: a number, a container (``range(500, 1000)``) or a function that says whether it acts at a timestep; all by default.
        rows: "prompt" or "negative", positions in the batch, or all by default.
        tokens: words of the prompt or positions, at sites that have tokens.
        places: bool (y, x), or (row, y, x), of any size: a site's cell is edited where the mask touches it.
        prompt: what the rows say, one text for all or one each, where words are named; with it rows are "prompt" by default.

    Raises:
        ValueError: what `Recorder` cannot record, or an edit that would not reach what it names.  What only a pass shows (a value
            of another shape, another prompt) ends the pass before its first block, where the shapes can be known without it.

    >>> with Edit(model, "*-Cross-Map", scale_token("star", 4.0), prompt="a red star"):  # doctest: +SKIP
    ...     model.pipeline("a red star")
    """

    _entered = _EDITS  # apart from recorders, for one that stops early need not wait for an edit

    def __init__(
        self,
        model: Any,
        site: str | Iterable[str],
        change: Change | Callable[[Tensor], Tensor],
        *,
        timesteps: int | float | Container[Any] | Callable[[float], bool] | None = None,
        rows: str | Sequence[int] | None = None,
        tokens: Tokens | None = None,
        places: Any = None,
        prompt: str | Sequence[str | None] | None = None,
    ) -> None:
        chosen = select_sites(sites_of(_network_of(model)[0]), site)
        features, maps = ([s.name for s in chosen if s.is_map is kind] for kind in (False, True))
        super().__init__(model, features, maps=maps, heads="all", keep_steps=False)
        self.change = change if isinstance(change, Change) else Change("function", lambda old, _: change(old))
        self._timesteps_asked, self._rows_asked = timesteps, rows
        self._places = None if places is None else _tensor(places).bool()
        self._prompts = [prompt] if isinstance(prompt, str) else list(prompt or ())
        self._words = self._find_words(tokens if tokens is not None else self.change.tokens)
        self._encoded: Tensor | None = None
        self._check_change()
        self._text = _text_input(model, self.change) if self.change.name == "swap_prompt" else None
        self._inputs: dict[str, dict[str, Any]] = {}
        self._openers: list[Any] = []
        self._seen: set[str] = set()
        self.passes, self.changed = 0, 0

    @property
    def last(self) -> dict[str, Tensor]:
        """Nothing: an edit keeps no tensors."""
        return {}

    # --- what can be refused at once ----------------------------------------------------------------

    def _find_words(self, tokens: Tokens | None) -> list[list[int]] | None:
        """Positions of the tokens that are named, for each prompt, or for all rows at once."""
        if tokens is None:
            return None
        if isinstance(tokens, Tensor):
            return [row.nonzero().flatten().tolist() for row in torch.atleast_2d(tokens)]
        every: list[Any] = [tokens] if isinstance(tokens, str | int) else list(tokens)
        if not any(isinstance(one, str) for one in every):
            return [[int(one) for one in every]]
        if not self._prompts or isinstance(self.model, nn.Module):
            raise ValueError(
                f"Which tokens spell {', '.join(map(repr, every))} is not known without a prompt and its tokenizer: give prompt= and "
                "a DiffusionModel or pipeline, or positions of tokens."
            )
        spans = _speaker(self.model).tokens(self._prompts)[1].tolist()
        found: list[list[int]] = []
        for prompt, places in zip(self._prompts, spans, strict=True):
            words = [word_tokens(prompt or "", str(word), places) for word in every]
            if prompt is not None and (lost := [word for word, at in zip(every, words, strict=True) if not at]):
                raise ValueError(f"{lost[0]!r} is not a word of the prompt {prompt!r}, as far as the text encoder reads it.")
            found.append(sorted({position for at in words for position in at}))
        return found

    def _check_change(self) -> None:
        """Refuse sites at which the change has no meaning."""
        name = self.change.name
        for site in self.sites:
            crossing, named = site.kind in ("cross_map", "joint_map"), self._places is not None or self._words is not None
            module: Any = self._modules[site.module_path]
            widths = [getattr(module, key, None) for key in ("in_channels", "out_channels") if site.kind == "resnet"]
            reasons = {
                "goes in or comes out of the whole network: change what it is given, or what it gives":
                    not site.path or site.kind == "input",
                f"is computed beside the attention; {site.name.rpartition('-Joint-')[0]}-Joint-Map is what the network uses":
                    site.is_map and not crossing and site.kind != "self_map",
                "is no cross-attention, and only these are given a text of their own; at a joint attention swap rows of -Text-Out":
                    name == "swap_prompt" and not site.kind.startswith("cross_"),
                "has no attention on tokens; name maps of cross-attentions or joint ones, such as '*-Cross-Map'":
                    name == "scale_token" and not crossing,
                "is no attention map; use patch": name == "replace_map" and not site.is_map,
                "is no block; use zero, or skip its block": name == "skip" and site.kind not in _BLOCKS,
                "is skipped whole; leave out places and tokens": name == "skip" and named,
                f"takes and gives {' and '.join(map(str, widths))} channels, so it cannot be the identity":
                    name == "skip" and widths[:1] != widths[1:],
                "has no prompt tokens; leave out tokens": self._words is not None and not (site.over_tokens or crossing),
                "has no places in the image; leave out places": self._places is not None and site.over_tokens,
            }  # fmt: skip
            if why := next((why for why, holds in reasons.items() if holds), ""):
                raise ValueError(f"The edit {name} does not reach site {site.name}: it {why}.")

    def _check(self) -> None:
        super()._check()
        registry = attention_dispatch._AttentionBackendRegistry
        for site in self.sites:
            backend = backend_of(self._modules[site.module_path])
            if site.is_map and "attn_mask" not in registry._supported_arg_names.get(backend, ("attn_mask",)):
                raise ValueError(
                    f"Site {site.name} runs on the attention backend {backend.value}, which takes no mask, and a map is edited by its "
                    "mask; call set_attention_backend('native')."
                )

    # --- entering and leaving -----------------------------------------------------------------------

    def __enter__(self) -> Edit:
        super().__enter__()
        self.passes = self.changed = 0
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        super().__exit__(kind, error, trace)
        self._inputs.clear()
        if kind is None and self.passes and not self.changed and self._timesteps_asked is not None:
            warnings.warn(
                f"The edit {self.change.name} at {self.sites[0].name} changed nothing: none of {self.passes} passes was at "
                f"its timesteps.", stacklevel=2,
            )  # fmt: skip

    def _attach(self) -> None:
        super()._attach()
        tapped = [tap.attention._forward_pre_hooks for tap in self._taps]
        self._openers = [h for h in self._handles if any(h.hooks_dict_ref() is hooks for hooks in tapped)]
        for tap in self._taps:
            tap.changes = True
        hooks: list[tuple[str, Any]] = []
        for site in self.sites:
            path, _, part = site.module_path.rpartition(".")
            if self.change.name == "skip":
                note: Any = lambda m, args, kwargs, name=site.name: self._inputs.update({name: arguments_of(m, args, kwargs)})  # noqa: E731
                hooks.append((site.module_path, note))
            elif self.change.name == "swap_prompt":
                hooks.append(
                    (path if site.kind in ("cross_query", "cross_key", "cross_value") else site.module_path, self._give)
                )
            elif site.kind == "modulated" and part.startswith("to_"):  # key and value are projected from the same input
                others = {f"{path}.{name}" for name in ("to_q", "to_k", "to_v")} - {site.module_path}
                hooks += [(other, partial(self._keep_input, site)) for other in sorted(others & self._modules.keys())]
        self._handles += [self._modules[path].register_forward_pre_hook(hook, with_kwargs=True) for path, hook in hooks]

    def _go_first(self) -> None:
        """Puts this edit's hooks before all others; a tap sees a call first when it is opened last."""
        for handle in self._handles:
            hooks = handle.hooks_dict_ref()
            if hooks is not None and handle.id in hooks:
                hooks.move_to_end(handle.id, last=any(handle is opener for opener in self._openers))

    # --- one pass -----------------------------------------------------------------------------------

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        super()._begin(module, args, kwargs)
        assert self._step is not None
        for edit in reversed(_EDITS.get(self.network, [])):
            edit._go_first()
        self.passes += 1
        self._seen.clear()
        try:
            self._chosen = self._choose(self._step)
            self._tokens_of_rows = self._words_of_rows(self._step)
            if self._chosen.any():
                self._check_text(arguments_of(module, args, kwargs))
                self._check_carried(self._step)
        except ValueError as error:
            self._refuse(str(error))

    def _choose(self, step: Step) -> Bool[Tensor, " row"]:
        """The rows that are edited in this pass."""
        count, asked = len(step.rows), self._rows_asked
        if self.change.rows not in (0, count):
            raise ValueError(f"The edit swap names {self.change.rows} rows where the pass has {count}; name one for each.")
        if self._places is not None and self._places.ndim == 3 and len(self._places) not in (1, count):
            raise ValueError(
                f"places= has masks for {len(self._places)} rows where the pass has {count}; give one, or one each."
            )
        if asked is None and self._prompts:
            asked = "prompt"
        if isinstance(asked, str):
            if asked not in step.rows:
                raise ValueError(f"This pass has no rows {asked!r}; it has {', '.join(dict.fromkeys(step.rows))}.")
            chosen = torch.tensor([name == asked for name in step.rows])
        else:
            if asked is not None and (bad := [row for row in asked if not 0 <= row < count]):
                raise ValueError(f"Row {bad[0]} was to be edited, and the pass has {count}, counted from 0.")
            chosen = torch.tensor([asked is None or row in asked for row in range(count)])
        when: Any = self._timesteps_asked
        if when is not None and step.timesteps:
            within = when if callable(when) else {when}.__contains__ if isinstance(when, int | float) else lambda at: at in when
            chosen &= torch.tensor([bool(within(at)) for at in step.timesteps])
        return chosen.to(self._sample.device)

    def _words_of_rows(self, step: Step) -> list[list[int]] | None:
        """The tokens that are named, for each row."""
        if self._words is None or len(self._words) == 1:
            return None if self._words is None else self._words * len(step.rows)
        speaking = [row for row, name in enumerate(step.rows) if name == "prompt" or not self._prompts]
        if len(speaking) != len(self._words):
            raise ValueError(f"Tokens were named for {len(self._words)} prompts, and this pass has {len(speaking)}.")
        given = dict(zip(speaking, self._words, strict=True))
        return [given.get(row, []) for row in range(len(step.rows))]

    def _check_text(self, given: dict[str, Any]) -> None:
        """Refuse a pass whose rows say something else than the prompt whose words are named."""
        names = texts_of(given)
        if self._words is None or not self._prompts or not names or not isinstance(given[names[0]], Tensor):
            return
        if self._encoded is None:
            self._encoded = _speaker(self.model).encode_text(self._prompts).embeddings
        rows = [row for row, name in enumerate(self._step.rows) if name == "prompt"]  # type: ignore[union-attr]
        own = self._encoded if len(self._encoded) > 1 else self._encoded.expand(len(rows), -1, -1)
        there = given[names[0]][rows]
        if there.shape == own.shape and not torch.allclose(there.float(), own.to(there).float(), atol=0.05, rtol=0.05):
            raise ValueError(
                f"This pass is not given the prompt {self._prompts[0]!r}, whose words are to be edited; give prompt= as it runs."
            )

    def _check_carried(self, step: Step) -> None:
        """Refuse a value that does not fit, from shapes alone, where they can be known."""
        if self.change.carried is None or self._sample.is_meta or (self._sample.ndim == 5 and self._sample.shape[2] != 1):
            return
        grid = self._grid[""][-2:]
        size = tuple(self._sample.shape[-2:]) if self._sample.ndim > 3 else (2 * grid[0], 2 * grid[1])
        known = _SHAPES.setdefault(self.network, {})
        if (size, self._texts) not in known:
            try:
                known[size, self._texts] = site_shapes(self.network, size, self._texts)
            except ValueError:  # of a network whose pass needs more than shapes: each site is checked when it runs
                known[size, self._texts] = {}
        for site in self.sites:
            if shape := known[size, self._texts].get(site.name):
                self._carried(site, (len(step.rows), *shape))

    def _carried(self, site: Site, shape: tuple[int, ...]) -> Tensor | None:
        """The value that the change brings, with axes that broadcast to the site's."""
        found = self.change.carried
        if found is None:
            return None
        if isinstance(found, Recorder):
            steps = found.steps
            now = self._step.timesteps[:1]  # type: ignore[union-attr]
            same = steps if len(steps) == 1 else [step for step in steps if step.timesteps[:1] == now]
            if not same or site.name not in same[-1].tensors:
                lacks = f"a pass at timestep {now[0] if now else '?'}" if not same else f"site {site.name}"
                raise ValueError(f"The edit {self.change.name} takes its value from a recorder that has not {lacks}.")
            found = same[-1].tensors[site.name]
        value = _tensor(found)
        if value.ndim == 1 and len(value) == shape[1]:
            return value.view(1, -1, *(1,) * (len(shape) - 2))
        value = value[None] if value.ndim == len(shape) - 1 else value
        fits = value.ndim == 0 or (value.shape[1:] == shape[1:] and len(value) in (1, shape[0]))
        if not fits:
            raise ValueError(
                f"The edit {self.change.name} brings a value of shape {tuple(_tensor(found).shape)} to site {site.name}, which is "
                f"{shape} here; give that, without its first axis {shape[1:]}, or one number for each of {shape[1]} channels."
            )
        return value

    def _acts(self, site: Site) -> bool:
        """Whether this pass is edited; notes that the site had its part in it."""
        if self._silent():
            return False
        self._seen.add(site.name)
        return bool(self._chosen.any())

    def _end(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self._step is None:
            return
        if lost := [site.name for site in self.sites if site.name not in self._seen]:
            self._refuse(f"Site {lost[0]} had no part in this pass ({len(lost)} in all), so the edit did not reach it.")
        self._step = None
        self._inputs.clear()

    # --- features -----------------------------------------------------------------------------------

    def _keep_feature(self, site: Site, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if not self._acts(site) or self.change.name == "swap_prompt":
            return None
        return self._skipped(site, output) if self.change.name == "skip" else self._edited(site, "output", output)

    def _keep_input(self, site: Site, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not self._acts(site):
            return None
        given = first_of(args, kwargs)
        new = self._edited(site, "input", given)
        return ((new, *args[1:]), kwargs) if args else (args, {**kwargs, next(iter(kwargs)): new})

    def _sequence(self, site: Site, what: str, value: Any) -> tuple[Tensor, Index, int]:
        """The tensor that holds the site, where in it, and which of the sequences it is."""
        if self._in_unet or site.kind in ("cross_key", "cross_value"):
            return (value[0] if isinstance(value, tuple) else value), ALL, 0
        every = [tensor for tensor in tensors_of(value) if tensor.ndim >= 3]
        stream = "text" if site.kind == "text_output" else "image"
        number, index = self._find_stream(site, site.module_path, what, [t.shape[1] for t in every], stream)
        return every[number], index, number

    def _edited(self, site: Site, what: str, value: Any) -> Any:
        """The value with the site changed, in the same order of memory."""
        old, index, _ = self._sequence(site, what, value)
        new = _copied(old)
        part = take(new if self._in_unet else new.flatten(2), index, 1) if new.ndim == 3 or not self._in_unet else new
        view = part.transpose(1, 2) if part.ndim == 3 else part
        self._apply(site, view if site.over_tokens or part.ndim == 4 else view.unflatten(-1, self._grid[site.anchor]))
        if not isinstance(index, slice):
            for row, at in enumerate(index.expand(len(new), -1)):
                new.flatten(2)[row, at] = part[row]
        return _replaced(value, old, new)

    def _apply(self, site: Site, view: Tensor) -> None:
        """Changes a value in place, where it is named."""
        assert self.change.of is not None
        try:
            carried = self._carried(site, tuple(view.shape))
            new = self.change.of(view.clone(), None if carried is None else carried.to(view))
            if new.shape != view.shape:
                raise ValueError(
                    f"The edit {self.change.name} made of site {site.name}, which is {tuple(view.shape)}, a tensor of shape "
                    f"{tuple(new.shape)}; it must keep the shape."
                )
            view.copy_(torch.where(self._named(site, view), new.to(view), view))
        except ValueError as error:
            self._refuse(str(error))
        self.changed += 1

    def _named(self, site: Site, value: Tensor) -> Tensor:
        """Where a value is edited, with axes that broadcast to its own."""
        named = self._chosen.view(-1, *(1,) * (value.ndim - 1))
        if self._tokens_of_rows is not None:
            told = torch.zeros(len(value), value.shape[2], dtype=torch.bool, device=value.device)
            for row, at in enumerate(self._tokens_of_rows):
                told[row, _within(at, value.shape[2], site)] = True
            named = named & told.view(len(value), 1, -1, *(1,) * (value.ndim - 3))
        if self._places is not None:
            cells = self._cells(value.shape[-2:]).to(value.device)
            named = named & cells.view(len(cells), *(1,) * (value.ndim - 3), *cells.shape[1:])
        return named

    def _cells(self, grid: tuple[int, ...]) -> Bool[Tensor, "row y x"]:
        """The places that are named, on a site's grid: cells that the mask touches."""
        if self._places is None:
            return torch.ones(1, *grid, dtype=torch.bool)
        mask = self._places[None] if self._places.ndim == 2 else self._places
        return mask if mask.shape[1:] == grid else nn.functional.adaptive_max_pool2d(mask[:, None].float(), grid)[:, 0].bool()

    def _skipped(self, site: Site, output: Any) -> Any:
        """The block's output with the chosen rows as they came in."""
        given = self._inputs.pop(site.name)
        text = next((value for name, value in given.items() if "encoder_hidden_states" in name), None)
        _, _, image = self._sequence(site, "output", output)
        every = [output[0] if isinstance(output, tuple) else output] if self._in_unet else tensors_of(output)
        for number, old in enumerate(tensor for tensor in every if tensor.ndim >= 3):
            came: Any = next(iter(given.values())) if number == image else text
            if not isinstance(came, Tensor) or came.shape != old.shape:
                took = tuple(came.shape) if isinstance(came, Tensor) else "nothing of the kind"
                self._refuse(f"The edit skip does not reach site {site.name}: it gives {tuple(old.shape)} and takes {took}.")
            new = _copied(old)
            new[self._chosen] = came[self._chosen]
            output = _replaced(output, old, new)
        self.changed += 1
        return output

    # --- attention ----------------------------------------------------------------------------------

    def _give(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Before a cross-attention: another text for the chosen rows, with its own mask where the family masks."""
        if self._silent() or not self._chosen.any():
            return None
        assert self._text is not None
        embeddings, bias = self._text
        given: dict[str, Any] = arguments_of(module, args, kwargs)
        there = given["encoder_hidden_states"]
        if there.shape[1:] != embeddings.shape[1:]:
            self._refuse(
                f"The edit swap_prompt brings {embeddings.shape[1]} tokens to a pass with {there.shape[1]}; pad it alike."
            )
        new = {"encoder_hidden_states": (there, embeddings)} | (
            {} if bias is None else {"attention_mask": (given["attention_mask"], bias)}
        )
        self.changed += 1
        rows = self._chosen[:, None, None]
        return args, {**kwargs, **{name: torch.where(rows, own.to(old), old) for name, (old, own) in new.items()}}

    def _attend(self, sites: Sequence[Site], call: Call, run: Run) -> Tensor:
        """An attention call of the network, made with another mask in the rows whose maps are edited."""
        if not self._acts(sites[0]) or call.index or self.change.name == "swap_prompt":
            return run()
        scales, kept = self.change.name == "scale_token", None
        try:
            if not scales:
                with unseen():  # the kernel's normaliser, with which a recorder computes its maps
                    kept = run()
            mask, rows = (self._scaled if scales else self._with_maps)(sites[0], call)
        except ValueError as error:  # the hooks cannot go while the tap is at work; they do when the module ends
            self._late = error
            return run()
        if not rows.any():
            return run()
        output, self.changed = run(mask.to(call.query.dtype)), self.changed + 1
        if rows.all():
            return output
        if kept is None:
            with unseen():  # rows that are not named take the kernel that they would take
                kept = run()
        kept = kept.clone()
        kept.unflatten(0, (len(rows), -1))[rows] = output.unflatten(0, (len(rows), -1))[rows]
        return kept

    def _parts(self, site: Site, call: Call) -> tuple[Index, Index]:
        """Which queries are places, and which keys the map's tokens."""
        if len(call.query) != len(self._sample):
            raise ValueError(f"Site {site.name} attends row by row, so it is not known which is which; give one row at a time.")
        if self._in_unet:
            return ALL, ALL
        _, places = self._find_stream(site, site.module_path, "query0", [call.query.shape[2]], "image")
        if site.kind == "cross_map":
            return places, ALL
        stream = "image" if site.kind == "self_map" else "text"
        return places, self._find_stream(site, site.module_path, "key0", [call.key.shape[2]], stream)[1]

    def _scaled(self, site: Site, call: Call) -> tuple[Tensor, Tensor]:
        """The mask that multiplies the attention on tokens, and the rows that have such tokens."""
        assert self._tokens_of_rows is not None
        places, keys = self._parts(site, call)
        everywhere = places == ALL and self._places is None
        rows, asking, count = len(call.query), call.query.shape[2], call.key.shape[2]
        bias = torch.zeros(rows, 1, 1 if everywhere else asking, count, device=call.query.device)
        factor = math.log(self.change.factor) if self.change.factor else -math.inf
        grid = self._grid[site.anchor]
        cells = self._cells(grid[-2:]).flatten(1).repeat(1, math.prod(grid[:-2])).to(bias.device)
        for row in self._chosen.nonzero().flatten().tolist():
            words = _positions(keys, row, count)
            at = words[_within(self._tokens_of_rows[row], len(words), site)].to(bias.device)
            here = (
                slice(None) if everywhere else _positions(places, row, asking).to(bias.device)[cells[min(row, len(cells) - 1)]]
            )
            bias[row, 0, here if everywhere else here[:, None], at] = factor  # type: ignore[index]
        mask, changed = additive(call.mask, call.query.device) + bias, bias.flatten(1).any(1)
        if (mask.expand(rows, *mask.shape[1:])[changed] <= _SHUT).all(-1).any():
            raise ValueError(f"The edit scale_token leaves site {site.name} without any token to attend to.")
        return mask, changed

    def _with_maps(self, site: Site, call: Call) -> tuple[Tensor, Tensor]:
        """The mask that gives the edited maps, and the rows whose maps are not as they were."""
        maps = self._map_of(site, call)
        new = maps.clone()
        self._apply(site, new)
        other = (new != maps).flatten(3)
        rows = other.flatten(1).any(1)
        if not rows.any():
            return maps, rows
        if not new.isfinite().all() or (new < 0).any():
            raise ValueError(f"The edit {self.change.name} made of site {site.name} a map that is negative or not finite.")
        places, keys = self._parts(site, call)
        whole = probabilities(call, places, heads="all")
        key = call.key.float().repeat_interleave(call.query.shape[1] // call.key.shape[1], 1)
        mask = additive(call.mask, call.query.device).expand(*call.query.shape[:3], call.key.shape[2]).clone()
        for row in rows.nonzero().flatten().tolist():
            whole[row][:, _positions(keys, row, whole.shape[2])] = new[row].flatten(2)
            total = whole[row].sum(1, keepdim=True)
            if (total <= 0).any():
                raise ValueError(
                    f"The edit {self.change.name} leaves places of site {site.name} without attention; their sum must be above 0 "
                    f"(to silence an attention, use zero at {site.name.removesuffix('Map')}Out)."
                )
            at = _positions(places, row, call.query.shape[2])
            scores = call.query[row][:, at].float() @ key[row].mT * call.scale
            wanted = (whole[row] / total).log().mT - scores
            there = other[row].any(1)[..., None] if other.shape[1] > 1 else other[row].any((0, 1))[None, :, None]
            mask[row][:, at] = torch.where(there, wanted, mask[row][:, at])
        return mask, rows


# --- small parts ------------------------------------------------------------------------------------


def _tensor(value: Any) -> Tensor:
    """A tensor of a tensor, an array, a store's sample or a number."""
    return value if isinstance(value, Tensor) else torch.as_tensor(np.asarray(value))


def _speaker(model: Any) -> DiffusionModel:
    return model if isinstance(model, DiffusionModel) else DiffusionModel(model)


def _within(positions: Sequence[int], count: int, site: Site) -> list[int]:
    if positions and max(positions) >= count:
        raise ValueError(f"Token {max(positions)} was to be edited, and site {site.name} has {count}, counted from 0.")
    return list(positions)


def _positions(index: Index, row: int, size: int) -> Tensor:
    """The positions that an index means in one row."""
    return torch.arange(size)[index] if isinstance(index, slice) else index[min(row, len(index) - 1)]


def _copied(tensor: Tensor) -> Tensor:
    """A copy in the same order of memory, which decides the last bits of what a later layer makes of it."""
    if any(stride == 0 for stride, size in zip(tensor.stride(), tensor.shape, strict=True) if size > 1):
        return tensor.detach().clone()
    return tensor.new_empty_strided(tensor.shape, tensor.stride()).copy_(tensor.detach())


def _replaced(value: Any, old: Tensor, new: Tensor) -> Any:
    """A module's output with one tensor exchanged wherever it stands: a down block also hands it on as a skip connection."""
    if value is old:
        return new
    return type(value)(_replaced(part, old, new) for part in value) if isinstance(value, list | tuple) else value


@torch.no_grad()
def _text_input(model: Any, change: Change) -> tuple[Tensor, Tensor | None]:
    """What a cross-attention is given of a text: embeddings (1, token, width) and the bias of their mask."""
    text = change.text
    if not isinstance(text, EncodedText):
        text = _speaker(model).encode_text([text])
    if text.mask is None:
        return text.embeddings, None
    network: Any = model.network if isinstance(model, DiffusionModel) else model.transformer
    # PixArt projects the text before its blocks
    return network.caption_projection(text.embeddings), ((1 - text.mask.to(text.embeddings.dtype)) * -10000.0)[:, None]
