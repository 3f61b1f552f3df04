"""Attention by token class, against the eager formula in float64 with positions and classes that are known by hand."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from diffprobe.data import load_dataset
from diffprobe.models import DiffusionModel
from diffprobe.sinks import CLASSES, attention_mass, special_tokens, token_classes
from tests.pipelines import family_pipeline
from tests.test_families import exact, left_over, seen_calls

SIZE = (16, 32)
DATA = load_dataset("shapes:1?split=test")
CAPTION = DATA[0].captions[0].text


def by_hand(tokenizer: Any, text: str, length: int, **options: Any) -> list[str]:
    """Classes of a text padded by its tokenizer, from what the tokenizer itself says of its special tokens."""
    made = tokenizer(text, padding="max_length", max_length=length, return_special_tokens_mask=True, **options)
    kinds = ["words" if not special else "" for special in made.special_tokens_mask]
    last = length - 1 - kinds[::-1].index("words")
    for place, kind in enumerate(kinds):
        if not kind:
            kinds[place] = "start" if place < last else "end" if place == last + 1 else "padding"
    return kinds


def expected(name: str, model: DiffusionModel, keys: int) -> tuple[slice, list[str]]:
    """The queries that are places of the image, and the class of each key, in the order in which the family's own code joins them."""
    pipeline, places = model.pipeline, 32  # of 16 x 32 pixels
    if name == "sd2":
        return slice(None), by_hand(pipeline.tokenizer, CAPTION, 77)
    if name == "sd3":
        texts = by_hand(pipeline.tokenizer, CAPTION, 77) + by_hand(pipeline.tokenizer_3, CAPTION, 256)
        return slice(0, places), ["image"] * places + texts
    if name == "flux":
        return slice(512, None), by_hand(pipeline.tokenizer_2, CAPTION, 512) + ["image"] * places
    if name == "aura-flow":
        return slice(264, None), ["other"] * 8 + by_hand(pipeline.tokenizer, CAPTION.lower(), 256) + ["image"] * places
    # A chat template stands around the prompt; the network pads its text to a multiple of 32.
    asked = pipeline.tokenizer.apply_chat_template(
        [{"role": "user", "content": CAPTION}], tokenize=False, add_generation_prompt=True
    )
    made = pipeline.tokenizer(asked, return_offsets_mapping=True)
    start = asked.index(CAPTION)
    kinds = ["words" if start <= a and b <= start + len(CAPTION) and b > a else "template" for a, b in made.offset_mapping]
    kinds = [
        "end" if number == pipeline.tokenizer.eos_token_id else kind for number, kind in zip(made.input_ids, kinds, strict=True)
    ]
    return slice(0, places), ["image"] * places + kinds + ["other"] * (keys - places - len(kinds))


@pytest.mark.parametrize("name", ["sd2", "sd3", "flux", "aura-flow", "z-image"])
def test_shares_are_those_of_the_formula(name: str, tiny: Callable[[str], DiffusionModel]) -> None:
    model = tiny(name) if name == "sd2" else DiffusionModel(family_pipeline(name), name)
    before, given = left_over(model.network), dict[str, Any]()
    hook = model.network.register_forward_pre_hook(
        lambda _, args, kwargs: given.update(args=args, kwargs=kwargs), with_kwargs=True
    )
    found = attention_mass(model, DATA, [300], size=SIZE, progress=False)
    hook.remove()
    assert left_over(model.network) == before
    with seen_calls(model.network) as calls, torch.no_grad():
        model.network(*given["args"], **given["kwargs"])
    sums = found.groupby("site")["value"].sum()
    np.testing.assert_allclose(sums, 1, atol=1e-5)
    paths = {site.name: site.module_path for site in model.sites}
    most = 0.0
    for site, rows in found.groupby("site"):
        call = calls[paths[str(site)]]
        queries, kinds = expected(name, model, call["key"].shape[2])
        mass = exact(call)[0, :, queries].mean((0, 1)).numpy()
        assert len(kinds) == len(mass)
        for row in rows.to_dict("records"):
            own = mass[[kind == row["label"] for kind in kinds]]
            assert row["keys"] == len(own) and row["chance"] == pytest.approx(len(own) / len(mass))
            assert row["value"] == pytest.approx(own.sum(), abs=2e-6)
            assert row["peak"] == pytest.approx(own.max(initial=0) * len(mass), abs=1e-4)
            most = max(most, abs(row["value"] - row["chance"]))
    assert most > 0.01, "attention that is even everywhere would hide a class that was taken for another"


def test_the_unconditional_input_has_no_words(tiny: Callable[[str], DiffusionModel]) -> None:
    found = attention_mass(
        tiny("sd2"), DATA, [300], conditionings=["null", "caption"], maps="words,self", size=SIZE, progress=False
    )
    keys = found[found["site"].str.contains("Cross")].groupby(["conditioning", "label"])["keys"].mean()
    assert keys["null", "words"] == 0 and keys["null", "start"] == keys["null", "end"] == 1 and keys["null", "padding"] == 75
    alone = found[found["site"].str.contains("Self") & (found["label"] == "image")]
    assert (alone["value"] - 1).abs().max() < 1e-5 and (alone["peak"] > 1).all() and (alone["chance"] == 1).all()


def test_draws_and_images_are_means(tiny: Callable[[str], DiffusionModel]) -> None:
    two = load_dataset("shapes:2?split=test")
    model = tiny("sd2")
    whole = attention_mass(model, two, [100, 500], draws=2, size=SIZE, batch_rows=3, progress=False)
    alone = attention_mass(model, DATA, [500], draws=1, size=SIZE, progress=False)
    assert (whole["n"] == 2).all() and whole["low"].notna().all() and alone["low"].isna().all()
    assert (whole["low"] <= whole["value"] + 1e-9).all() and (whole["value"] <= whole["high"] + 1e-9).all()
    assert not np.allclose(whole[whole["timestep"] == 500]["value"], alone["value"], atol=1e-6)


@pytest.mark.parametrize("name", ["kolors", "qwen-image", "sana"])
def test_every_text_token_has_a_class(name: str) -> None:
    model = DiffusionModel(family_pipeline(name), name)
    text = model.encode_text([CAPTION])
    (kinds,) = token_classes(text, special_tokens(model.pipeline))
    assert len(kinds) == text.ids.shape[1] and set(kinds) <= set(CLASSES) and "words" in kinds
    if text.mask is not None:
        assert [kind for kind, seen in zip(kinds, text.mask[0], strict=True) if not seen] == ["padding"] * int(
            (text.mask == 0).sum()
        )


def test_a_table_and_its_figure(tiny_folder: Path, tmp_path: Path, output: Callable[..., str]) -> None:
    table = str(tmp_path / "sinks.csv")
    said = output(
        "probe", "sinks", "--model", str(tiny_folder), "--data", "shapes:3?split=test", "--timesteps", "50,500", "--out", table
    )
    assert f"plot probe {table}" in said and "start" in said
    frame = pd.read_csv(table)
    assert set(frame["label"]) == {"start", "words", "end", "padding"} and set(frame["timestep"]) == {50, 500}
    assert "Drew" in output("plot", "probe", table, "--out", str(tmp_path / "figures"))
    assert (tmp_path / "figures" / "sinks.png").stat().st_size > 10_000
