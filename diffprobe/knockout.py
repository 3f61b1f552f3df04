"""Cut chosen routes by which a prompt's text reaches the features, while the network runs.

A knock-out is ``WHAT`` or ``WHAT@WHERE``:

- WHAT ``start``, ``eos_and_padding`` (end and padding tokens) or ``content`` (words that are not function words): the cross-attention
  gives these tokens no probability, and the others share it;
- WHAT ``empty``: the cross-attention is given the pipeline's unconditional input instead of the prompt;
- WHERE ``first:K`` (the first K cross-attentions in the order in which they run), ``last:K``, or a glob over their module
  paths; all of them by default.

A knock-out is an `Edit` of the cross-attentions' maps (`scale_token` by 0) or of their text (`swap_prompt`), for one forward pass.
The invariant is the edit's: a row in which nothing is cut has the same bits as without a knock-out.  SDXL's pooled text, which goes in
beside the timestep, is not cut.
"""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from diffprobe.conditioning import FORMER, content_tokens, former
from diffprobe.edit import Edit, scale_token, swap_prompt
from diffprobe.models import DiffusionModel, Network
from diffprobe.prompts import EncodedText

PARTS = ("start", "eos_and_padding", "content", "empty")


class Knockout(NamedTuple):
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

    Raises:
        ValueError: the knock-out cannot be read, or fits no cross-attention of the model.
    """

    def __init__(self, model: DiffusionModel, knockout: str | Knockout) -> None:
        super().__init__(model.pipeline, model.model_id, model.revision, model.random_weights)
        self.knockout = parse_knockout(knockout) if isinstance(knockout, str) else knockout
        self.attentions = chosen_attentions(self.network, self.knockout.where)
        self._maps = [f"{path}.map" for path in self.attentions]
        self._null = self.encode_text([None]) if self.knockout.what == "empty" else None

    def weights_hash(self, portable: bool = False) -> str:
        return f"{super().weights_hash(portable)} without {former(str(self.knockout))}"

    def denoise(
        self, noised: Float[Tensor, "row channel y x"], timesteps: Int[Tensor, " row"], text: EncodedText
    ) -> Float[Tensor, "row channel y x"] | None:
        """As `DiffusionModel.denoise`, with the route cut in every row."""
        if self._null is not None:
            with Edit(self, self._maps, swap_prompt(self._null)):
                return super().denoise(noised, timesteps, text)
        cut = self.cut_tokens(text)
        if not cut.any():
            return super().denoise(noised, timesteps, text)
        seen = torch.ones_like(cut) if text.mask is None else text.mask.cpu().bool()
        if not (seen & ~cut).any(1).all():
            raise ValueError(f"The knock-out {self.knockout} leaves some prompt without any token to attend to.")
        with Edit(self, self._maps, scale_token(cut, 0.0)):
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
