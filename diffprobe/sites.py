"""Names of the places in a network that can be recorded.

A site has a path in the library's own module tree, a short paper name (Meng et al. 2024, "Not All Diffusion Model
Activations Have Been Evaluated as Discriminative Features") and a kind.  ``U-L1-R1-B0-Cross-Q`` is the query of the
cross-attention in transformer block 0 of the second attention of up block 1.

Blocks of a transformer are ``T-B3``, single-stream blocks, in which image and text are one sequence, ``S-B3``; other lists of blocks
are called as the network calls them, ``Noise-Refiner-B0``.  Their attentions are Self, Cross, or Joint, where image and text attend to both.
Names come from a network's structure, so they exist for classes that nobody listed.

A transformer block's first attention is its self-attention, its second the cross-attention.  Where a network's config turns
that round, the name says which attention it is: ``Cross1``, ``Self2``.
"""

from __future__ import annotations

import difflib
import inspect
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

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
    "blocks": ("[DU]-L?-Out", "M-Out", "[TS]-B?-Out", "[TS]-B??-Out"),
    "cross": ("*-Cross*-Map",),
    "self": ("*-Self*-Map",),
    "joint": ("*-Joint-Map",),
    "words": ("*-Cross*-Map", "*-Joint-Map"),
}
PREDICTION = "Noise"
LATENT = "Noised-Latent"

_EITHER = ("blocks", "words")  # presets whose globs are alternatives, for no model has both a mid block and T-B0
_CROSSING = {"attn1": False, "attn2": True}
_PARTS = {"to_q": ("Q", "query"), "to_k": ("K", "key"), "to_v": ("V", "value")}
_PARTS |= {"to_query": _PARTS["to_q"], "to_key": _PARTS["to_k"], "to_value": _PARTS["to_v"]}
# Maps of a joint attention: of image places over text tokens, part of a softmax over all keys; the same over the text alone; of text
# tokens over the image; the text's whole mass; inner products of the outputs.
JOINT_MAPS = {"Map": "map", "Text-Map": "text_map", "Back-Map": "back_map", "Mass-Map": "mass_map", "Output-Map": "output_map"}
_UNET_PATH = re.compile(
    r"(?:(down|up)_blocks\.(\d+)|(mid_block))(?:\.(attentions|resnets)\.(\d+)(?:\.transformer_blocks\.(\d+))?)?(?:\.|$)"
)


@dataclass(frozen=True)
class Site:
    """One recordable place.

    Attributes:
        name: paper name, unique in a model and the name of its group in a store.
        path: dotted module path, followed by ``.map`` or another of `JOINT_MAPS`, ``.input`` or ``.text`` where the site is not the
            module's output; the noised latent and the predicted noise have an empty path.
        kind: input, block, resnet, transformer_block, modulated, {self,cross,joint}_{query,key,value,output,map},
            joint_{text,back,mass,output}_map, text_output, prediction, or an encoder's layer.
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
        aside = self.is_map or self.kind in ("modulated", "text_output")
        return self.path.rpartition(".")[0] if aside else self.path

    @property
    def over_tokens(self) -> bool:
        """Whether the last axis runs over prompt tokens, not over places in the image."""
        return self.kind in ("cross_key", "cross_value", "text_output")


def _prefix(path: str) -> tuple[str, str, str]:
    """Paper prefix, anchor path and what is left of a module path.

    >>> _prefix("up_blocks.1.attentions.2.transformer_blocks.0.attn2.to_q")
    ('U-L1-R2-B0', 'up_blocks.1.attentions.2', 'attn2.to_q')
    """
    match = _UNET_PATH.match(path)
    if match is None:
        return "", "", path
    side, level, middle, group, number, block = match.groups()
    words = ["M" if middle else side[0].upper()]
    words += [f"L{level}"] if level is not None else []
    words += [f"R{number}"] if number is not None else []
    words += [f"B{block}"] if block is not None else []
    anchor = path[: match.end(5)] if group else path[: match.end(3) if middle else match.end(2)]
    return "-".join(words), anchor, path[match.end() :]


def describe(path: str, crossing: Mapping[str, bool] | None = None) -> list[Site]:
    """The sites of one module path of a UNet; none where a module of that path is not recordable.

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
    """Every site of a UNet, from the paths of its modules, in module order; `crossing` as for `describe`.

    The noised latent, which goes in, comes first; the predicted noise, which comes out, last.

    >>> [site.name for site in list_sites(["mid_block", "up_blocks.1.resnets.0", "up_blocks.1.resnets.0.conv1"])]
    ['Noised-Latent', 'M-Out', 'U-L1-R0-Res-Out', 'Noise']
    """
    found = [site for path in module_paths if path for site in describe(path, crossing)]
    return [Site(LATENT, "", "input", ""), *found, *describe("")]


def transformer_sites(modules: Mapping[str, Any]) -> list[Site]:
    """Every site of a transformer, from its modules by path, in module order.

    A block is a list's item that holds an attention.  Its attention is Cross where it says so, Joint where it also projects
    the text or its block is given text and has no cross-attention, else Self.
    """
    attentions = {path: modules[path] for path in attentions_of(modules) if _BLOCK.match(path)}
    blocks: dict[str, dict[str, Any]] = {}
    for path, attention in attentions.items():
        blocks.setdefault(_BLOCK.match(path)[1], {})[path] = attention  # type: ignore[index]
    found, taken = [], dict[str, str]()
    for block, inside in blocks.items():
        path, _, number = block.rpartition(".")
        roles = _roles(modules[block], inside, path)
        letter = _letter(modules[block], roles, path)
        if taken.setdefault(letter, path) != path:
            letter = _title(path)
            taken[letter] = path
        prefix = f"{letter}-B{number}"
        if _TEXT_ONLY.search(path):
            found.append(Site(f"{prefix}-Out", f"{block}.text", "text_output", ""))
            continue
        found.append(Site(f"{prefix}-Out", block, "transformer_block", ""))
        asked = any(role == "Joint" and not _gives_keys_alone(modules, attention) for attention, role in roles.items())
        if asked and not getattr(modules[block], "context_pre_only", False):
            found.append(Site(f"{prefix}-Text-Out", f"{block}.text", "text_output", ""))
        seen: dict[str, int] = {}
        for attention, role in roles.items():
            seen[role] = seen.get(role, 0) + 1
            name = f"{prefix}-{role}{seen[role] if seen[role] > 1 else ''}"
            kind, parts = role.lower(), [p for p in _PARTS if f"{attention}.{p}" in modules]
            if role != "Cross" and not any(site.name == f"{prefix}-Mod" for site in found[-20:]):
                entry = f"{attention}.{parts[0]}" if parts else attention
                found.append(Site(f"{prefix}-Mod", f"{entry}.input", "modulated", ""))
            found.append(Site(f"{name}-Out", attention, f"{kind}_output", ""))
            if not is_linear(modules[attention]):
                forms = JOINT_MAPS if role == "Joint" else {"Map": "map"}
                if role == "Joint" and _gives_keys_alone(modules, attention):
                    forms = {form: end for form, end in forms.items() if form not in ("Back-Map", "Output-Map")}
                found += [Site(f"{name}-{form}", f"{attention}.{end}", f"{kind}_{end}", "") for form, end in forms.items()]
            for part in parts:
                found.append(Site(f"{name}-{_PARTS[part][0]}", f"{attention}.{part}", f"{kind}_{_PARTS[part][1]}", ""))
    return [Site(LATENT, "", "input", ""), *found, *describe("")]


_BLOCK = re.compile(r"(.*?[^.\d]\.\d+)\.[^.]*[^.\d].*$")
_TEXT_ONLY = re.compile(r"text|caption|token|llm")  # lists of blocks that see no image, by name; the pass checks it


def attentions_of(modules: Mapping[str, Any]) -> list[str]:
    """Paths of a network's attention modules; where one holds another, of the inner one."""
    every = [path for path, m in modules.items() if hasattr(m, "processor") or type(m).__name__.endswith("Attention")]
    return [path for path in every if not any(other.startswith(f"{path}.") for other in every)]


def _gives_keys_alone(modules: Mapping[str, Any], attention: str) -> bool:
    """Whether the text is attended to and does not attend itself (PRX, Nucleus), by which projections of it there are."""
    own = [path.removeprefix(f"{attention}.") for path in modules if path.startswith(f"{attention}.")]
    text = [name for name in own if name.startswith(("add_", "txt_")) and name.endswith("_proj")]
    return bool(text) and not any("q" in name for name in text)


def is_linear(attention: Any) -> bool:
    """Whether an attention has no softmax, and so no map."""
    return "Linear" in type(getattr(attention, "processor", None)).__name__ + type(attention).__name__


def _title(path: str) -> str:
    """``context_embedder.token_refiner.refiner_blocks`` as ``Refiner``: the list's own name without "blocks" or "layers"."""
    words = [word for word in path.rpartition(".")[2].split("_") if word not in ("blocks", "layers", "block")]
    return "-".join(word.title() for word in words or re.split(r"[._]", path))


def _takes_text(block: Any) -> bool:
    return any("encoder_hidden_states" in name for name in inspect.signature(block.forward).parameters)


def _roles(block: Any, inside: Mapping[str, Any], path: str) -> dict[str, str]:
    """Whether each attention of a block is Self, Cross or Joint."""
    paired = hasattr(block, "attn1") and _takes_text(block)  # then the second of the pair crosses, as in every such class
    crossing = {
        name: bool(getattr(attention, "is_cross_attention", paired and name.endswith("attn2")))
        or "cross" in name.rpartition(".")[2].lower()
        for name, attention in inside.items()
    }
    could_cross = getattr(block, "attn2", 0) is None or any(crossing.values())
    joins = not could_cross and "refiner" not in path and (_takes_text(block) or len(inside) == 1)
    roles = {}
    for number, (name, attention) in enumerate(inside.items()):
        projects = any(getattr(attention, part, None) is not None for part in ("add_q_proj", "to_q_t"))
        roles[name] = "Cross" if crossing[name] else "Joint" if projects or (joins and number == 0) else "Self"
    return roles


def _letter(block: Any, roles: Mapping[str, str], path: str) -> str:
    if "refiner" in path or "." in path or _TEXT_ONLY.search(path):
        return _title(path)
    single = "single" in path or (list(roles.values()) == ["Joint"] and not _takes_text(block))
    return "S" if single else "T"


def select_sites(available: Sequence[Site], patterns: str | Iterable[str]) -> list[Site]:
    """The sites that any of the patterns names, in the model's order, each once.

    A pattern is an exact path, a paper name, a glob over either (case counts), or a preset: paper, blocks,
    cross, self, joint, words.  In one text, several are parted by commas.

    Raises:
        ValueError: a pattern matches nothing; the message names the nearest sites.
    """
    chosen: set[str] = set()
    patterns = [part.strip() for part in patterns.split(",")] if isinstance(patterns, str) else list(patterns)
    for given in patterns:
        found = {pattern: _hits(available, pattern) for pattern in PRESETS.get(given, (given,))}
        missing = [pattern for pattern, names in found.items() if not names]
        if missing and (given not in _EITHER or len(missing) == len(found)):
            refuse_unet_sites([site.name for site in available], given, missing)
            raise ValueError(_nothing_matched(available, given, missing[0]))
        chosen = chosen.union(*found.values())
    return [site for site in available if site.name in chosen]


class NotApplicableError(ValueError):
    """A place of a UNet was asked for in a transformer, which has none like it."""


def same_depth(available: Iterable[str], name: str) -> str | None:
    """The block of a transformer that is as deep among its blocks as a UNet's level among four down, a middle and four up.

    None where the name is not of a UNet, or the sites are not of a transformer.

    >>> blocks = [f"T-B{n}-Out" for n in range(24)]
    >>> same_depth(blocks, "U-L1-R1-B0-Cross-Q"), same_depth(blocks, "T-B3")
    ('T-B17-Out', None)
    """
    match = re.match(r"(?:([DU])-L([0-3])|M)(?:-|$)", name)
    there = [site for site in available if re.fullmatch(r"[TS]-B\d+-Out", site)]
    if match is None or not there:
        return None
    side, level = match.groups()
    stage = 4 if side is None else int(level) + (5 if side == "U" else 0)
    return there[int((stage + 0.5) / 9 * len(there))]


def refuse_unet_sites(available: Sequence[str], given: str, names: Sequence[str]) -> None:
    """Raise NotApplicableError where names are a UNet's and the sites that there are a transformer's; it says which are as deep.

    Args:
        given: what was typed: a name, or the preset that stands for the names.
    """
    deep = list(dict.fromkeys(block for name in names if (block := same_depth(available, name))))
    if deep:
        what = f"{given!r} names places" if len(names) > 1 else f"Site {given!r} is a place"
        raise NotApplicableError(
            f"{what} of a UNet, so it is not applicable to this transformer. Nearest by relative depth, which are other places: "
            f"--sites {','.join(deep)}."
        )


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
