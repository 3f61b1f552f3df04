"""Cut chosen routes by which a prompt's text reaches the features, while the network runs.

A knock-out is ``WHAT`` or ``WHAT@WHERE``:

- WHAT ``start``, ``eos_and_padding`` (end and padding tokens) or ``content`` (words that are not function words): the cross-attention
  gives these tokens no probability, and the others share it;
- WHAT ``empty``: the cross-attention is given the pipeline's unconditional input instead of the prompt;
- WHERE ``first:K`` (the first K cross-attentions in the order in which they run), ``last:K``, or a glob over their module
  paths; all of them by default.

The invariant: a row in which nothing is cut is computed by the very same operations as without a knock-out, bit for bit.
Modules are hooked for one forward pass only; nothing is replaced.  SDXL's pooled text, which goes in beside the timestep, is not
cut.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from diffprobe.conditioning import FORMER, content_tokens, former
from diffprobe.models import DiffusionModel, Network
from diffprobe.prompts import EncodedText

PARTS = ("start", "eos_and_padding", "content", "empty")


@dataclass(frozen=True)
class Knockout:
    """What is cut, and in which cross-attentions; ``str()`` gives the text that `parse_knockout` takes."""

    what: str
    where: str = "*"

    def __str__(self) -> str:
        return self.what if self.where == "*" else f"{self.what}@{self.where}"


def parse_knockout(text: str) -> Knockout:
    """
    >>> parse_knockout("empty@first:3")
    Knockout(what='empty', where='first:3')
    >>> parse_knockout("verbs")
    Traceback (most recent call last):
    ValueError: Knock-out 'verbs' cuts none of start, eos_and_padding, content, empty; write for example content@up_blocks.1*.
    """
    what, _, where = text.partition("@")
    what = FORMER.get(what, what)
    if what not in PARTS:
        raise ValueError(f"Knock-out {text!r} cuts none of {', '.join(PARTS)}; write for example content@up_blocks.1*.")
    return Knockout(what, where or "*")


def cross_attentions(network: Network) -> dict[str, nn.Module]:
    """The network's cross-attentions by path, in the order in which they run."""
    stages = ("down_blocks", "mid_block", "up_blocks", "transformer_blocks")
    found = {path: module for path, module in network.named_modules() if getattr(module, "is_cross_attention", False)}
    return dict(sorted(found.items(), key=lambda item: stages.index(item[0].partition(".")[0])))


def chosen_attentions(network: Network, where: str) -> dict[str, nn.Module]:
    """Those of `cross_attentions` that a knock-out's WHERE names.

    Raises:
        ValueError: none does; the message lists them.
    """
    every = cross_attentions(network)
    kind, _, number = where.partition(":")
    if kind in ("first", "last") and number.isdigit() and 0 < int(number) <= len(every):
        paths = list(every)[: int(number)] if kind == "first" else list(every)[-int(number) :]
    else:
        paths = [path for path in every if fnmatchcase(path, where)]
    if not paths:
        raise ValueError(f"{where!r} names none of the {len(every)} cross-attentions: {', '.join(every)}.")
    return {path: every[path] for path in paths}


class KnockedOut(DiffusionModel):
    """A model whose every denoising call has a route cut; it shares the pipeline with the model that it is made from.

    Its `weights_hash` names the knock-out, so a store that was recorded with it cannot be taken for one without.

    Args:
        model: stays as it is.
        knockout: as the module's docstring says.

    Raises:
        ValueError: the knock-out cannot be read, or fits no cross-attention of the model.
    """

    def __init__(self, model: DiffusionModel, knockout: str | Knockout) -> None:
        super().__init__(model.pipeline, model.model_id, model.revision, model.random_weights)
        self.knockout = parse_knockout(knockout) if isinstance(knockout, str) else knockout
        self.attentions = chosen_attentions(self.network, self.knockout.where)
        self._null = self._null_input() if self.knockout.what == "empty" else None

    def weights_hash(self, portable: bool = False) -> str:
        return f"{super().weights_hash(portable)} without {former(str(self.knockout))}"

    def denoise(
        self, noised: Float[Tensor, "row channel y x"], timesteps: Int[Tensor, " row"], text: EncodedText
    ) -> Float[Tensor, "row channel y x"] | None:
        """As `DiffusionModel.denoise`, with the route cut in every row."""
        with self._cut(text):
            return super().denoise(noised, timesteps, text)

    def cut_tokens(self, text: EncodedText) -> Bool[Tensor, "prompt token"]:
        """Which tokens of each prompt the knock-out names; none for ``empty``."""
        spelled, special = text.spans[..., 1] > text.spans[..., 0], self.special_tokens()
        cut = torch.zeros_like(spelled)
        if self.knockout.what == "start":  # which T5 has not
            cut[:, 0] = text.ids[:, 0] == special.get("start", -1)
        if self.knockout.what == "eos_and_padding":  # from the first end token on that nobody typed
            cut = ((text.ids == special.get("end", special.get("padding"))) & ~spelled).cumsum(1).bool()
        if self.knockout.what == "content":
            for row, (numbers, spans) in enumerate(zip(text.ids.tolist(), text.spans.tolist(), strict=True)):
                tokens = self.pipeline.tokenizer.convert_ids_to_tokens(numbers)
                cut[row, content_tokens(tokens, spans)] = True
        return cut

    @torch.no_grad()
    def _null_input(self) -> tuple[Tensor, Tensor | None]:
        """What a cross-attention is given without a prompt: embeddings (1, token, width) and the bias of their mask."""
        null = self.encode_text([None])
        if null.mask is None:
            return null.embeddings, None
        projected = self.network.caption_projection(null.embeddings)  # PixArt projects the text before its blocks
        return projected, ((1 - null.mask.to(projected.dtype)) * -10000.0)[:, None]

    @contextlib.contextmanager
    def _cut(self, text: EncodedText) -> Iterator[None]:
        if self._null is not None:
            hook = partial(_give, *self._null)
        else:
            cut = self.cut_tokens(text)
            if not cut.any():
                yield
                return
            seen = torch.ones_like(cut) if text.mask is None else text.mask.cpu().bool()
            if not (seen & ~cut).any(1).all():
                raise ValueError(f"The knock-out {self.knockout} leaves some prompt without any token to attend to.")
            hook = partial(_hide, cut)
        handles = [m.register_forward_pre_hook(hook, with_kwargs=True) for m in self.attentions.values()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def _hide(
    cut: Tensor, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Before a cross-attention: the lowest bias on the tokens that are cut, on top of the mask that was there."""
    hidden = args[0] if args else kwargs["hidden_states"]
    bias = torch.zeros(cut.shape, dtype=hidden.dtype, device=hidden.device)
    bias.masked_fill_(cut.to(hidden.device), torch.finfo(hidden.dtype).min)
    there = kwargs.get("attention_mask")
    return args, {**kwargs, "attention_mask": bias[:, None] if there is None else torch.minimum(there, bias[:, None])}


def _give(
    embeddings: Tensor, bias: Tensor | None, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Before a cross-attention: one text for all rows, with its own mask where the family masks."""
    rows = len(args[0] if args else kwargs["hidden_states"])
    given = {"encoder_hidden_states": embeddings.expand(rows, -1, -1)}
    return args, {**kwargs, **given} | ({} if bias is None else {"attention_mask": bias.expand(rows, -1, -1)})
