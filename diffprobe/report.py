"""One self-contained page: figures, verdicts, provenance, and a picker of attention maps; opens from a file, offline.

Everything that the page shows (captions, sample ids, file names, numbers) is text of others.  The invariant: it enters
through the template, which escapes it, or through JSON in which ``<``, ``>``, ``&`` and line separators are escaped; and
should that ever fail, the page's policy runs no script but those whose hashes it names, and loads nothing.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import io
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import numpy as np
import pandas as pd
import xarray as xr
from numpy.typing import NDArray
from PIL import Image

from diffprobe.conditioning import NULL
from diffprobe.console import duration_text
from diffprobe.figures import open_with_images, words_of
from diffprobe.plotting import heat_colours, read_rows, read_sidecars
from diffprobe.rundir import write_whole
from diffprobe.stats import holm
from diffprobe.store import NO_WORD_MAPS, StoreError, mean_over_sites, provenance, read_maps, store_info, word_sites

FIRST_ROWS = 20
LARGEST = 20_000_000  # bytes of maps and images in one page; a phone still opens it
_MARKS = {"held": "✓", "not held": "✗", "undecided": "?", "not testable": "-"}
CLAIM_COLUMNS = ("id", "kind", "statement", "verdict", "evidence", "p", "p_holm", "figure")
_NUMBER = r"[-+]?\d+\.\d+"
OPENS_AT = 50  # the timestep of the paper's maps
MEAN = "mean over sites"


class Report(NamedTuple):
    """What a page holds."""

    figures: int
    claims: int
    stores: int
    bytes: int


class _Prompt(NamedTuple):
    """One text that a sample was given: its tokens, and where they stand on the token axis of the maps."""

    conditioning: str
    text: str
    tokens: list[str]
    positions: list[int]


class _Shelf(NamedTuple):
    """The samples of one store that the page shows; maps (sample, conditioning, timestep, head, token, y, x) by site, not yet read."""

    name: str
    tree: xr.DataTree
    rows: list[int]
    ids: list[str]
    images: list[str]
    prompts: list[list[_Prompt]]
    maps: dict[str, xr.DataArray]

    @property
    def bytes(self) -> int:
        """What this store will take in the page: base64 writes three bytes as four letters."""
        tokens = sum(len(prompt.tokens) for sample in self.prompts for prompt in sample)
        cells = sum(height * width + 8 for _, height, width in self.sites) * next(iter(self.maps.values())).sizes["timestep"]
        return sum(map(len, self.images)) + tokens * cells * 4 // 3

    @property
    def sites(self) -> list[tuple[str, int, int]]:
        """Name, height and width of what can be picked: the mean on the finest grid where there are several sites, then each."""
        own = [(site, maps.sizes["y"], maps.sizes["x"]) for site, maps in self.maps.items()]
        mean = (MEAN, max(height for _, height, _ in own), max(width for *_, width in own))
        return [mean, *own] if len(own) > 1 else own


def write_report(
    run: str | Path,
    out: str | Path,
    stores: Sequence[str] = (),
    *,
    samples: int = 12,
    data: str = "",
    max_bytes: int = LARGEST,
) -> Report:
    """Write the page of a folder of figures, and of stores with cross-attention maps.

    Args:
        run: Folder of figures, as `diffprobe reproduce` and `diffprobe plot` write them.
        out: The page.
        stores: Stores to explore: sample, token, site and timestep are picked, and the map lies over the image.
        samples: How many of each store's first samples.
        data: The stores' dataset; the one that each names by default.
        max_bytes: Bound on what the stores take together.

    Raises:
        ValueError: there is nothing to show, a store has no maps, or the maps would take more than `max_bytes`.
    """
    run, out = Path(run), Path(out)
    if not run.is_dir():
        raise ValueError(f"{run} is not a folder of figures; 'diffprobe reproduce --out {run}' makes one.")
    figures = _figures(run)
    if not figures:
        raise ValueError(f"{run} holds no figure (a .png with its .json); 'diffprobe reproduce --out {run}' draws them.")
    shelves = [_shelf(store, samples, data) for store in stores]
    total = sum(shelf.bytes for shelf in shelves)
    if total > max_bytes:
        shown = max(len(shelf.ids) for shelf in shelves)
        fits = int(shown * max_bytes / total)
        raise ValueError(
            f"The maps of {shown} samples would take {total / 1e6:.2f} MB in the page and {max_bytes / 1e6:.2f} are allowed: "
            + (f"about {fits} samples fit (--samples {fits}), or " if fits else "")
            + f"allow more (--max-mb {-(-total // 10**6)})."
        )
    source = Path(__file__).with_name("report.html").read_text(encoding="utf-8")
    template = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    claims = collect_claims(run)
    page = template.from_string(source).render(
        name=run.resolve().name,
        policy=_policy(source),
        figures=figures,
        claims=claims.assign(effect=claims["evidence"].map(effect)).to_dict("records"),
        counts={verdict: int((claims["verdict"] == verdict).sum()) for verdict in _MARKS},
        marks=_MARKS,
        versions=_versions(figures),
        explorer={"colours": _letters(heat_colours()), "stores": [_read_maps(shelf) for shelf in shelves]},
    )
    write_whole(out, page)
    return Report(sum(len(f["pictures"]) for f in figures), len(claims), len(shelves), out.stat().st_size)


def collect_claims(out: Path) -> pd.DataFrame:
    """The claims of every experiment whose figures lie in a folder, by id, the primary statement of each first.

    The p values of all primary statements are one family: where Holm's adjusted p is not below .05, a verdict that its own
    interval gave is undecided.  A statement without a p value, or that could not be tested, is left as it is.

    Returns:
        id, kind ("primary" or "exploratory"), statement, verdict, evidence, p, p_holm (of primaries), figure.
    """
    found: list[dict[str, Any]] = [
        {"p": None, **claim, "kind": "primary" if claim.get("primary") else "exploratory", "figure": name}
        for name, sidecar in read_sidecars(out).items()
        for claim in sidecar.get("config", {}).get("claims", [])
    ]

    def place(claim: Mapping[str, Any]) -> tuple[list[int | str], bool]:
        return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", claim["id"])], not claim.get("primary")

    found.sort(key=place)
    table = pd.DataFrame(found, columns=list(CLAIM_COLUMNS)).astype({"p": float})
    tested = (table["kind"] == "primary") & (table["verdict"] != "not testable")
    table["p_holm"] = holm(table["p"].where(tested))
    table.loc[tested & (table["p_holm"] >= 0.05), "verdict"] = "undecided"
    return table


def effect(evidence: str) -> str:
    """The first number with an interval in a claim's evidence, and how many more there are.

    >>> effect("accuracy +0.12 [+0.02, +0.22], n = 9; shape -0.10 [-0.20, 0.01]"), effect("n = 9")
    ('+0.12 [+0.02, +0.22] and 1 more', '')
    """
    found = re.findall(rf"{_NUMBER} \[{_NUMBER}, {_NUMBER}\]", evidence)
    return "" if not found else found[0] + (f" and {len(found) - 1} more" if found[1:] else "")


def explorable(work: Path) -> list[Path]:
    """The stores below a folder that hold cross-attention maps."""
    found = []
    for path in sorted(work.rglob("*.zarr")):
        with contextlib.suppress(StoreError):
            if any("Cross-Map" in site for site in store_info(path)["request"].get("maps", [])):
                found.append(path)
    return found


def _policy(source: str) -> str:
    """A Content-Security-Policy under which only the template's own scripts and style work, and images inside the page."""
    allowed = [
        f"{tag}-src " + " ".join(f"'sha256-{_letters(hashlib.sha256(text.encode()).digest())}'" for text in found)
        for tag in ("script", "style")
        if (found := re.findall(rf"<{tag}>(.*?)</{tag}>", source, re.DOTALL))
    ]
    return "; ".join(["default-src 'none'; img-src data:", *allowed, "base-uri 'none'; form-action 'none'"])


# --- figures ---------------------------------------------------------------------------------------------


def _figures(run: Path) -> list[dict[str, Any]]:
    """Every figure of a folder: its pictures, first rows and origin; those with verdicts come first.

    An experiment is one figure, and so are all pictures of one store or table.
    """
    sidecars = read_sidecars(run)
    named: dict[str, list[str]] = {}
    for name, found in sidecars.items():
        if "config" in found:  # the other pictures of an experiment have none
            source = "" if "title" in found["config"] else found["config"].get("store", found["config"].get("table", ""))
            named.setdefault(Path(source).name or name, []).append(name)
    figures = []
    for source, (name, *others) in named.items():
        config = sidecars[name]["config"]
        told = {"claims", "title", "figures", "tables", "command", "seconds", "measured_with"}
        pictures = [name, *others] if others else config.get("figures", [name])
        figures.append(
            {
                "name": name,
                "title": config.get(
                    "title", f"Pictures of {source}" if others else sidecars[name].get("title") or sidecars[name]["alt"]
                ),
                "pictures": [
                    {"name": p, "alt": sidecars[p]["alt"], "title": sidecars[p].get("title") or sidecars[p]["alt"]}
                    | ({"table": config["tables"][p]} if p in config.get("tables", {}) else _picture(run / f"{p}.png"))
                    for p in pictures
                    if p in sidecars
                ],
                "command": config.get("command", ""),
                "runtime": duration_text(config["seconds"]) if "seconds" in config else "",
                "settings": {key: _text(value) for key, value in config.items() if key not in told},
                "versions": config.get("measured_with") or sidecars[name].get("versions", {}),
                "claims": config.get("claims", []),
                "rows": [table for part in (name, *others) if (table := _table(run / f"{part}.csv"))],
            }
        )
    return sorted(figures, key=lambda figure: not figure["claims"])


def _picture(path: Path) -> dict[str, Any]:
    """A picture as a data URL, and its size; lossless WebP takes half of what matplotlib's PNG does."""
    buffer = io.BytesIO()
    with Image.open(path) as image:
        image.save(buffer, "WEBP", lossless=True, quality=50, method=2)
        return {"url": _data_url(buffer.getvalue(), "webp"), "width": image.width, "height": image.height}


def _table(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    frame = read_rows(path)
    rows = [[_text(value) for value in row] for row in frame.head(FIRST_ROWS).itertuples(index=False)]
    return {"file": path.name, "columns": list(frame.columns), "rows": rows, "count": len(frame)}


def _text(value: object) -> str:
    """A cell as a person reads it: four digits, nothing for what is missing.

    >>> _text(0.123456), _text(float("nan")), _text(["a", 1]), _text("a")
    ('0.1235', '', '["a", 1]', 'a')
    """
    if isinstance(value, float | np.floating):
        return "" if pd.isna(value) else f"{value:.4g}"
    return json.dumps(value, ensure_ascii=False) if isinstance(value, list | dict) else str(value)


def _versions(figures: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The environments that the figures were measured in, each once, with the figures' names."""
    found: dict[str, list[str]] = {}
    for figure in figures:
        line = ", ".join(f"{package} {version}" for package, version in sorted(figure["versions"].items()))
        found.setdefault(line or "unknown", []).append(figure["name"])
    return [{"packages": line, "figures": names} for line, names in found.items()]


# --- the explorer ----------------------------------------------------------------------------------------


def _shelf(store: str, samples: int, data: str) -> _Shelf:
    """Open a store and find what the page will show of it.

    Raises:
        StoreError: it has no cross-attention maps, or the dataset lacks its samples.
    """
    tree, images, rows, ids = open_with_images(store, data, lambda found: list(range(min(samples, found.sizes["sample"]))))
    sites = word_sites(tree)
    if not sites:
        raise StoreError(NO_WORD_MAPS.format(store))
    maps = {site: tree[site].to_dataset()["maps"] for site in sites}
    first = maps[sites[0]]
    kept = first["token"].values.tolist() if "token" in first.coords else list(range(first.sizes["token"]))
    texts = [c for c in map(str, first["conditioning"].values) if c != NULL] or [NULL]
    prompts = [[_prompt(tree, row, text, kept) for text in texts] for row in rows]
    return _Shelf(Path(store.rstrip("/")).name, tree, rows, ids, [_image(image) for image in images], prompts, maps)


def _prompt(tree: xr.DataTree, row: int, conditioning: str, kept: Sequence[int]) -> _Prompt:
    """A sample's text, and its tokens whose maps were kept, up to the end token and without the padding."""
    prompts = tree["prompts"].to_dataset()
    one = prompts.isel(sample=row, conditioning=prompts["conditioning"].values.tolist().index(conditioning))
    text = str(one["text"].item())
    spans = list(zip(one["token_start"].values.tolist(), one["token_end"].values.tolist(), strict=True))
    words = [position for position, (start, end) in enumerate(spans) if end > start]
    first, last = (words[0], words[-1]) if words else (1, 0)
    positions = [position for position in kept if position <= last + 1]
    tokens = [
        text[slice(*spans[position])] if first <= position <= last else "(start)" if position < first else "(end)"
        for position in positions
    ]
    return _Prompt(conditioning, text, tokens, positions)


def _image(pixels: NDArray[np.uint8]) -> str:
    """An image as a data URL: drawn scenes stay exact, photographs become small."""
    small = max(pixels.shape[:2]) <= 256
    buffer, kind = io.BytesIO(), "png" if small else "jpeg"
    Image.fromarray(pixels).save(buffer, kind, **({} if small else {"quality": 88}))
    return _data_url(buffer.getvalue(), kind)


def _data_url(image: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{_letters(image)}"


def _read_maps(shelf: _Shelf) -> dict[str, Any]:
    """The maps of a store as the page's script reads them.

    For every sample, prompt and site: ``values``, bytes (timestep, token, y, x) from the map's own lowest to its own highest
    value, and ``ends``, these two as float32 (timestep, token, 2).
    """
    blocks = [_blocks(shelf, place) for place in range(len(shelf.prompts[0]))]
    samples = []
    for number, (sample_id, image, own) in enumerate(zip(shelf.ids, shelf.images, shelf.prompts, strict=True)):
        maps = [[_bytes(site[number].swapaxes(0, 1)) for site in block] for block in blocks]
        prompts = [{"conditioning": p.conditioning, "text": p.text, "tokens": p.tokens} for p in own]
        samples.append({"id": sample_id, "image": image, "prompts": prompts, "maps": maps})
    model = Path(provenance(shelf.tree)["request"]["model"])
    timesteps = next(iter(shelf.maps.values()))["timestep"].values.tolist()
    nearest = int(np.argmin(np.abs(np.array(timesteps) - OPENS_AT)))
    first = _told_apart([own[0] for own in shelf.prompts], [maps[:, nearest] for maps in blocks[0][0]])
    return {
        "name": shelf.name,
        "model": model.name if model.is_absolute() else str(model),
        "timesteps": timesteps,
        "sites": [{"name": name, "height": height, "width": width} for name, height, width in shelf.sites],
        "samples": samples,
        "opens": {"sample": first, "timestep": nearest},
    }


def _told_apart(prompts: Sequence[_Prompt], maps: Sequence[NDArray[np.float32]]) -> int:
    """The sample whose words' maps (token, y, x) differ most from each other: the attention that two words do not share."""
    apart = []
    for prompt, own in zip(prompts, maps, strict=True):
        words = [place for place, token in enumerate(prompt.tokens) if token in words_of(prompt.text)]
        shares = own[words] / np.maximum(own[words].sum((1, 2), keepdims=True), np.finfo(np.float32).tiny)
        apart.append(np.abs(shares - shares.mean(0)).sum((1, 2)).mean() if words else 0.0)
    return int(np.argmax(apart))


def _blocks(shelf: _Shelf, place: int) -> list[list[NDArray[np.float32]]]:
    """For each of `_Shelf.sites` and sample the maps (token, timestep, y, x) of its prompt at this place in the list."""
    prompts = [own[place] for own in shelf.prompts]
    wanted = [(row, [position]) for row, prompt in zip(shelf.rows, prompts, strict=True) for position in prompt.positions]
    maps = [read_maps(shelf.tree, site, wanted, prompts[0].conditioning) for site in shelf.maps]
    if len(maps) > 1:
        maps.insert(0, mean_over_sites(maps))
    ends = np.cumsum([len(prompt.positions) for prompt in prompts])
    return [np.split(site.isel(head=0).transpose("row", "timestep", "y", "x").to_numpy(), ends[:-1]) for site in maps]


def _bytes(maps: NDArray[np.float32]) -> dict[str, str]:
    """Maps (timestep, token, y, x), each from its own lowest to its own highest value, in 256 steps."""
    low, high = maps.min((2, 3)), maps.max((2, 3))
    share = (maps - low[..., None, None]) / np.maximum(high - low, np.finfo(np.float32).tiny)[..., None, None]
    ends = np.stack([low, high], -1).astype("<f4")
    return {"values": _letters(np.rint(share * 255).astype(np.uint8)), "ends": _letters(ends)}


def _letters(data: bytes | NDArray[Any]) -> str:
    return base64.b64encode(data if isinstance(data, bytes) else data.tobytes()).decode()
