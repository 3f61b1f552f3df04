"""Names of the places in a network that can be recorded.

A site has a path in the library's own module tree, a short paper name (Meng et al. 2024, "Not All Diffusion Model
Activations Have Been Evaluated as Discriminative Features") and a kind.  ``U-L1-R1-B0-Cross-Q`` is the query of the
cross-attention in transformer block 0 of the second attention of up block 1.  Transformers without a UNet have
names that begin with T: ``T-B3-Cross-Q``.

A transformer block's first attention is its self-attention, its second the cross-attention.  Where a network's config turns
that round, the name says which attention it is: ``Cross1``, ``Self2``.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

PAPER_SITES = (
    "D-L2-R0-B0-Cross-Q",
    "U-L1-R1-B0-Cross-Q",
    "U-L1-R1-B0-Out",
    "U-L1-R2-B0-Cross-Q",
    "U-L2-R1-B0-Cross-Q",
    "U-L2-R2-Res-Out",
)
PRESETS: dict[str, tuple[str, ...]] = {
    "paper": PAPER_SITES,
    "blocks": ("[DU]-L?-Out", "M-Out", "T-B?-Out", "T-B??-Out"),
    "cross": ("*-Cross*-Map",),
    "self": ("*-Self*-Map",),
}
PREDICTION = "Noise"
LATENT = "Noised-Latent"

_CROSSING = {"attn1": False, "attn2": True}
_PARTS = {"to_q": ("Q", "query"), "to_k": ("K", "key"), "to_v": ("V", "value")}
_UNET_PATH = re.compile(
    r"(?:(down|up)_blocks\.(\d+)|(mid_block))(?:\.(attentions|resnets)\.(\d+)(?:\.transformer_blocks\.(\d+))?)?(?:\.|$)"
)
_TRANSFORMER_PATH = re.compile(r"transformer_blocks\.(\d+)(?:\.|$)")


@dataclass(frozen=True)
class Site:
    """One recordable place.

    Attributes:
        name: paper name, unique in a model and the name of its group in a store.
        path: dotted module path; maps end in ``.map``, the noised latent and the predicted noise have an empty path.
        kind: input, block, resnet, transformer_block, {self,cross}_{query,key,value,output,map}, prediction, or an
            encoder's layer.
        anchor: path of the module whose four-dimensional input gives the (y, x) of a token sequence.
    """

    name: str
    path: str
    kind: str
    anchor: str

    @property
    def is_map(self) -> bool:
        return self.kind.endswith("_map")

    @property
    def module_path(self) -> str:
        """The module whose forward pass yields this site."""
        return self.path.removesuffix(".map") if self.is_map else self.path

    @property
    def over_tokens(self) -> bool:
        """Whether the last axis runs over prompt tokens, not over places in the image."""
        return self.kind in ("cross_key", "cross_value")


def _prefix(path: str) -> tuple[str, str, str]:
    """Paper prefix, anchor path and what is left of a module path.

    >>> _prefix("up_blocks.1.attentions.2.transformer_blocks.0.attn2.to_q")
    ('U-L1-R2-B0', 'up_blocks.1.attentions.2', 'attn2.to_q')
    >>> _prefix("transformer_blocks.3.attn2")
    ('T-B3', '', 'attn2')
    """
    match = _UNET_PATH.match(path)
    if match is None:
        match = _TRANSFORMER_PATH.match(path)
        return (f"T-B{match[1]}", "", path[match.end() :]) if match else ("", "", path)
    side, level, middle, group, number, block = match.groups()
    words = ["M" if middle else side[0].upper()]
    words += [f"L{level}"] if level is not None else []
    words += [f"R{number}"] if number is not None else []
    words += [f"B{block}"] if block is not None else []
    anchor = path[: match.end(5)] if group else path[: match.end(3) if middle else match.end(2)]
    return "-".join(words), anchor, path[match.end() :]


def describe(path: str, crossing: Mapping[str, bool] | None = None) -> list[Site]:
    """The sites of one module path; none where a module of that path is not recordable.

    Args:
        crossing: of attentions by their path, whether they attend to the prompt; by default the second of a block does.

    >>> [site.name for site in describe("up_blocks.1.attentions.1.transformer_blocks.0.attn2")]
    ['U-L1-R1-B0-Cross-Out', 'U-L1-R1-B0-Cross-Map']
    >>> describe("up_blocks.2.resnets.2")[0].name
    'U-L2-R2-Res-Out'
    """
    if path == "":
        return [Site(PREDICTION, "", "prediction", "")]
    prefix, anchor, rest = _prefix(path)
    if not prefix:
        return []
    if rest == "":
        if ".resnets." in path:
            return [Site(f"{prefix}-Res-Out", path, "resnet", anchor)]
        if "transformer_blocks." in path:
            return [Site(f"{prefix}-Out", path, "transformer_block", anchor)]
        return [] if ".attentions." in path else [Site(f"{prefix}-Out", path, "block", anchor)]
    attention, _, part = rest.partition(".")
    if attention not in _CROSSING or "transformer_blocks." not in path:
        return []
    crosses = (crossing or {}).get(path.removesuffix(f".{part}"), _CROSSING[attention])
    word, number = ("Cross" if crosses else "Self"), ("" if crosses == _CROSSING[attention] else attention[-1])
    if part in _PARTS:
        letter, kind = _PARTS[part]
        return [Site(f"{prefix}-{word}{number}-{letter}", path, f"{word.lower()}_{kind}", anchor)]
    if part == "":
        return [
            Site(f"{prefix}-{word}{number}-Out", path, f"{word.lower()}_output", anchor),
            Site(f"{prefix}-{word}{number}-Map", f"{path}.map", f"{word.lower()}_map", anchor),
        ]
    return []


def list_sites(module_paths: Iterable[str], crossing: Mapping[str, bool] | None = None) -> list[Site]:
    """Every site of a network, from the paths of its modules, in module order; `crossing` as for `describe`.

    The noised latent, which goes in, comes first; the predicted noise, which comes out, last.

    >>> [site.name for site in list_sites(["mid_block", "up_blocks.1.resnets.0", "up_blocks.1.resnets.0.conv1"])]
    ['Noised-Latent', 'M-Out', 'U-L1-R0-Res-Out', 'Noise']
    """
    found = [site for path in module_paths if path for site in describe(path, crossing)]
    return [Site(LATENT, "", "input", ""), *found, *describe("")]


def select_sites(available: Sequence[Site], patterns: str | Iterable[str]) -> list[Site]:
    """The sites that any of the patterns names, in the model's order, each once.

    A pattern is an exact path, a paper name, a glob over either (case counts), or a preset: paper, blocks,
    cross, self.  In one text, several are parted by commas.

    Raises:
        ValueError: a pattern matches nothing; the message names the nearest sites.
    """
    chosen: set[str] = set()
    patterns = [part.strip() for part in patterns.split(",")] if isinstance(patterns, str) else list(patterns)
    for given in patterns:
        found = {pattern: _hits(available, pattern) for pattern in PRESETS.get(given, (given,))}
        # The globs of "blocks" are alternatives, for no model has both a mid block and T-B0; of "paper" each must be there.
        missing = [pattern for pattern, names in found.items() if not names]
        if missing and (given != "blocks" or len(missing) == len(found)):
            raise ValueError(_nothing_matched(available, given, missing[0]))
        chosen = chosen.union(*found.values())
    return [site for site in available if site.name in chosen]


def _hits(available: Sequence[Site], pattern: str) -> set[str]:
    """Names of the sites that a pattern means: an exact name or path first, else a glob over either."""
    exact = {s.name for s in available if pattern and pattern in (s.name, s.path)}
    return exact or {s.name for s in available if fnmatchcase(s.name, pattern) or (s.path and fnmatchcase(s.path, pattern))}


def _nothing_matched(available: Sequence[Site], given: str, pattern: str) -> str:
    names = [s.name for s in available] + [s.path for s in available if s.path]
    near = difflib.get_close_matches(pattern, names, n=3, cutoff=0.4)
    asked = f"Site {given!r}" if given == pattern else f"Site {pattern!r} of the preset {given!r}"
    hint = f" Nearest: {', '.join(near)}." if near else ""
    return f"{asked} matches none of this model's {len(available)} sites.{hint} 'diffprobe sites MODEL' lists them all."
