"""What people type and what files hold, at its worst: one sentence and exit code 2, and nothing is lost."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from diffprobe import cli
from diffprobe.cli.options import numbers
from diffprobe.conditioning import check_conditioning
from diffprobe.data import load_dataset
from diffprobe.data.benchmarks import load_benchmark
from diffprobe.data.labels import label_arrays
from diffprobe.extraction import _check_arguments, extract
from diffprobe.models import DiffusionModel
from diffprobe.sites import select_sites
from diffprobe.store import attention_maps, open_store, store_info
from diffprobe.units import parse_reduce

GOLDEN = Path(__file__).parent / "golden" / "v1.zarr"
SHORT = settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
TEXT = st.text(max_size=30)
Fails = Callable[..., str]


@pytest.fixture
def fails(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Fails:
    """`fails(*arguments)`: the one sentence of a command that ends with exit code 2."""

    def call(*arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", ["diffprobe", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            cli.main()
        errors = capsys.readouterr().err
        said = [line for line in errors.splitlines() if line.startswith("diffprobe: ")]
        assert (stop.value.code, len(said)) == (2, 1) and "Traceback" not in errors, (arguments, errors)
        return said[0]

    return call


def refused_or(call: Callable[[], Any]) -> Any:
    """What a call gives; None where it refused in words."""
    try:
        return call()
    except (ValueError, OSError) as error:  # an OSError: a name that is too long for a file
        assert str(error)
        return None


# --- texts that people type -------------------------------------------------------------------------


@SHORT
@given(pattern=TEXT | st.text("UDLRB-0123456789*?[]!.", max_size=20))
def test_site_patterns(tiny_model: DiffusionModel, pattern: str) -> None:
    chosen = refused_or(lambda: select_sites(tiny_model.sites, pattern))
    assert chosen is None or (chosen and set(chosen) <= set(tiny_model.sites))


@SHORT
@given(text=TEXT | st.lists(st.integers(-(10**30), 10**30), max_size=4).map(lambda numbers: ",".join(map(str, numbers))))
def test_timesteps(tiny_model: DiffusionModel, text: str) -> None:
    def checked() -> list[int]:
        steps = numbers([text], int, "--timesteps")
        _check_arguments(steps, ["null"], [], 1, "float16", "raise", "mean")
        for step in steps:
            tiny_model.check_timestep(step)
        return steps

    steps = refused_or(checked)
    assert steps is None or (steps and all(0 <= step < 1000 for step in steps) and len(set(steps)) == len(steps))


@SHORT
@given(
    text=TEXT
    | st.tuples(st.sampled_from(["shapes:", "shapes-mmvp:", "blank:", "coco:", "voc:", "refcoco:"]), TEXT).map("".join)
)
def test_specs_reductions_and_conditionings(tiny_model: DiffusionModel, text: str) -> None:
    for call in (load_dataset, load_benchmark, check_conditioning, lambda rule: parse_reduce(rule, tiny_model.sites[:3])):
        refused_or(lambda call=call: call(text))  # type: ignore[misc]


@SHORT
@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=200))
def test_any_prompt_has_tokens_that_stand_in_it(tiny_model: DiffusionModel, text: str) -> None:
    ids, spans, lengths = tiny_model.tokens([text, None])
    assert ids.shape == (2, tiny_model.prompt_tokens) and lengths[1] == 2
    assert all(0 <= start <= end <= len(text) for start, end in spans[0].tolist())


# --- texts that files hold --------------------------------------------------------------------------

CAPTIONS = [
    "a red star", "a " * 5000, "نجمة حمراء إلى اليسار", "שלום \u202eabc\u202c star", "a\x00red\x07star\x1b[31m\x7f", "e\u0301toile\u200d🌟🏳️‍🌈",
    "<b>star</b> & 'quotes\"", "\u2028star\u2029",
]  # fmt: skip


def photographs(folder: Path, captions: list[dict[str, Any]]) -> Path:
    folder.mkdir()
    for number, entry in enumerate(captions):
        Image.fromarray(np.full((20, 20, 3), 20 * number, np.uint8)).save(folder / f"{number}.png")
        entry.setdefault("file", f"{number}.png")
    (folder / "captions.jsonl").write_text("\n".join(json.dumps(entry) for entry in captions), encoding="utf-8")
    return folder


def test_prompts_of_every_kind_are_recorded_and_read_back(tiny_model: DiffusionModel, tmp_path: Path) -> None:
    folder = photographs(tmp_path / "photos", [{"caption": text} for text in CAPTIONS])
    conditionings = ("null", "caption", "mismatched", "fixed:", "words")
    summary = extract(
        tiny_model, str(folder), tmp_path / "s.zarr", sites=(), maps="U-L1-R1-B0-Cross-Map", timesteps=[50],
        conditionings=conditionings, batch_rows=8, progress=False,
    )  # fmt: skip
    assert summary.complete == len(CAPTIONS)
    assert summary.forecast is not None and summary.forecast.truncated_prompts >= 1
    tree = open_store(tmp_path / "s.zarr")
    stored = tree["prompts"].to_dataset()["text"].sel(conditioning="caption").values.tolist()
    assert stored == [text.strip() for text in CAPTIONS]
    assert attention_maps(tree, "star").sizes["sample"] >= 3


def test_half_a_surrogate_pair_is_named(fails: Fails, tiny_folder: Path, tmp_path: Path) -> None:
    command = ("extract", "--model", tiny_folder, "--out", tmp_path / "s.zarr", "--data")
    for number, (entry, words) in enumerate(
        [({"caption": "a \ud800 star"}, "The caption 0 of sample '0.png' is no Unicode text"),
         ({"caption": "a star", "mood": "\udcff"}, "The label 'mood' of sample '0.png' is no Unicode text")]
    ):  # fmt: skip
        folder = photographs(tmp_path / f"photos{number}", [entry, {"caption": "b"}])
        assert words in fails(*command, folder)
    assert "A conditioning is no Unicode text" in fails(*command, "shapes:2", "-c", "fixed:\udcff")
    assert not (tmp_path / "s.zarr").exists()


LABEL = (
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(st.characters(exclude_categories=["Cs"]))
)


@SHORT
@given(rows=st.lists(st.dictionaries(st.sampled_from("abc"), LABEL, max_size=3), min_size=1, max_size=8))
def test_labels_with_gaps(rows: list[dict[str, Any]]) -> None:
    arrays = label_arrays(rows)
    assert arrays.keys() == {name for row in rows for name in row}
    for name, values in arrays.items():
        assert len(values) == len(rows)
        for row, value in zip(rows, values.tolist(), strict=True):
            given_value = row.get(name)
            numbers = all(v is None or isinstance(v, int | float) for v in (other.get(name) for other in rows))
            if (
                given_value is None
                or str(given_value).strip() == ""
                or given_value != given_value
                or (numbers and abs(given_value) == np.inf)
            ):
                assert value == "" or np.isnan(value)
            elif values.dtype == object:
                assert value in ("", str(given_value))
            else:
                np.testing.assert_allclose(value, float(given_value), rtol=1e-12)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([1, None, 3], [1, np.nan, 3]), ([1, float("nan"), "", 3], [1, np.nan, np.nan, 3]), ([1.5, float("inf"), "NA"], [1.5, np.nan, np.nan]),
        (["cat", None, float("nan"), ""], ["cat", "", "", ""]), (["cat", "none"], ["cat", "none"]), ([1, 2], [1, 2]), ([None, None], [np.nan] * 2),
        ([np.float64("nan"), np.int64(3)], [np.nan, 3]), ([np.str_("a"), None], ["a", ""]),
    ],
)  # fmt: skip
def test_missing_labels_of_a_users_own_dataset(values: list[Any], expected: list[Any]) -> None:
    found = label_arrays([{"mood": value} for value in values])["mood"].tolist()
    assert len(found) == len(expected)
    assert all(a == b or (a != a and b != b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("name", ["timestep", "sample", "prompts", "", " ", "a/b", "..", ".hidden", "__x", "zarr.json", "y"])
def test_names_that_no_label_can_have(name: str) -> None:
    with pytest.raises(ValueError, match="A label cannot be called"):
        label_arrays([{name: 1}])


def test_a_labels_file_with_gaps(tiny_model: DiffusionModel, tmp_path: Path) -> None:
    entries = [{"mood": "glad", "size": 1}, {"size": 2.5}, {"mood": 3, "count": 2**80}, {}]
    folder = photographs(tmp_path / "photos", entries)
    extract(
        tiny_model,
        str(folder),
        tmp_path / "s.zarr",
        sites="Noised-Latent",
        timesteps=[0],
        conditionings=["null"],
        progress=False,
    )
    tree = open_store(tmp_path / "s.zarr")
    assert tree["mood"].values.tolist() == ["glad", "", "3", ""]
    np.testing.assert_array_equal(tree["size"].values, [1, 2.5, np.nan, np.nan])


# --- what models bring along ------------------------------------------------------------------------


@pytest.mark.parametrize("part", ["unet", "text_encoder"])
def test_weights_that_are_cut_off(model_folder: Callable[[str], Path], fails: Fails, tmp_path: Path, part: str) -> None:
    shutil.copytree(model_folder("sd1"), tmp_path / "sd")
    weights = next((tmp_path / "sd" / part).glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
    said = fails("extract", "--model", tmp_path / "sd", "--data", "shapes:2", "--out", tmp_path / "x.zarr")
    assert "could not be read" in said and not (tmp_path / "x.zarr").exists()


def test_language_models_and_encoders_that_are_cut_off(fresh_language: Callable[..., Any], tmp_path: Path) -> None:
    from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

    from diffprobe.encoders import load_extractor
    from diffprobe.mllm.language import load_language_model

    language = fresh_language()
    language.model.save_pretrained(tmp_path / "lm")
    language.tokenizer.save_pretrained(tmp_path / "lm")
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 32}
    CLIPVisionModel(CLIPVisionConfig(**sizes, patch_size=16)).save_pretrained(tmp_path / "clip")
    CLIPImageProcessor().save_pretrained(tmp_path / "clip")
    for weights in tmp_path.glob("*/*.safetensors"):
        weights.write_bytes(weights.read_bytes()[:-9])
    with pytest.raises(ValueError, match=r"No language model at .*lm'.*incomplete metadata"):
        load_language_model(tmp_path / "lm", "cpu")
    with pytest.raises(ValueError, match=r"vision encoder at .*clip' could not be read: .*incomplete metadata"):
        load_extractor(str(tmp_path / "clip"), "cpu")


@pytest.mark.parametrize("template", [
    "{% for i in range(10**9) %}x{% endfor %}", "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "{{ 1/0 }}", "{{ messages.a.b }}", "{% for",
    "{{ raise_exception('no') }}",
])  # fmt: skip
def test_chat_templates_that_cannot_be_filled(fresh_language: Callable[..., Any], template: str) -> None:
    language = fresh_language()
    language.tokenizer.chat_template = template
    for call in (lambda: language.prompt("Is it red?"), lambda: language.answers([("Is it red?", "yes"), ("Where?", "left")])):
        with pytest.raises(ValueError, match="chat template of tiny cannot be filled"):
            call()


# --- the command line -------------------------------------------------------------------------------


def test_mistakes_that_libraries_would_answer_with_a_traceback(fails: Fails, tiny_folder: Path, tmp_path: Path) -> None:
    extract = ("extract", "--model", tiny_folder, "--data", "shapes:2", "--out", tmp_path / "x.zarr")
    broken = tmp_path / "broken.zarr"
    broken.mkdir()
    (broken / "zarr.json").write_text('{"zarr_format": 3, "node_type": "group", "attributes": 7}')
    for arguments, words in (
        ((*extract, "--device", "cuda:99"), "Device 'cuda:99' cannot be used here; torch"),
        ((*extract, "--device", "toaster"), "Device 'toaster' cannot be used here; torch"),
        ((*extract, "--device", "meta"), "Device 'meta' cannot be used here; torch"),
        ((*extract, "--guidance", "nan"), "Guidance scales must be finite"),
        ((*extract, "--guidance", "inf,1"), "Guidance scales must be finite"),
        ((*extract, "--resolution", "-64"), "sides must be multiples of"),
        ((*extract, "--timesteps", ""), "Timesteps must be given"),
        ((*extract, "--timesteps", "10,,10"), "each once"),
        ((*extract, "--conditioning", "caption:\x1b[31m"), "has no caption"),
        ((*extract[:-1], "nosuch://a/b.zarr"), "nosuch"),
        ((*extract[:-1], "a\0b.zarr"), "null byte"),
        ((*extract[:4], "~nobody-is-called-so/x", *extract[5:]), "no such user"),
        ((*extract[:4], "coco:~nobody-is-called-so/x?images=y", *extract[5:]), "no such user"),
        (("info", tmp_path / ("x" * 300)), "File name too long"),
        (("info", "x\0y"), "is not a diffprobe store"),
        (("verify", tiny_folder), "is not a diffprobe store"),
        ((*extract[:-1], broken), "its zarr.json is damaged"),
        (("info", broken), "its zarr.json is damaged"),
    ):
        assert words in fails(*arguments), arguments
    assert not (tmp_path / "x.zarr").exists()


@pytest.mark.parametrize(
    ("change", "command", "words"),
    [
        (lambda kept: kept.pop("request"), ("info",), "the attribute 'request' is None"),
        (lambda kept: kept["request"].pop("model"), ("info",), "the attribute 'model' is missing"),
        (lambda kept: kept.pop("versions"), ("info",), "the attribute 'versions' is missing"),
        (lambda kept: kept.update(unit_samples=0), ("verify",), "the attribute 'unit_samples' is 0"),
        (lambda kept: kept.update(unit_samples=5), ("verify",), "do not fit"),
        (lambda kept: kept["request"].update(timesteps="all"), ("info",), "'timesteps' of the request is 'all'"),
        (lambda kept: kept.update(data=None), ("plot", "pca"), "the attribute 'data' is None"),
        (lambda kept: kept["request"].pop("revision"), ("repair",), "the attribute 'revision' is missing"),
        (lambda kept: kept["request"].update(model="nobody/nothing"), ("repair",), "No model at 'nobody/nothing'"),
    ],
)
def test_stores_edited_by_hand(
    fails: Fails, tmp_path: Path, change: Callable[[dict[str, Any]], None], command: tuple[str, ...], words: str
) -> None:
    path = tmp_path / "s.zarr"
    for file in GOLDEN.rglob("*"):
        if file.is_file():
            (path / file.relative_to(GOLDEN)).parent.mkdir(parents=True, exist_ok=True)
            (path / file.relative_to(GOLDEN)).write_bytes(file.read_bytes())
    edited = json.loads((path / "zarr.json").read_text(encoding="utf-8"))
    change(edited["attributes"]["diffprobe"])
    (path / "zarr.json").write_text(json.dumps(edited), encoding="utf-8")
    assert words in fails(*command, path)


def test_a_file_name_that_is_no_text_can_be_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfdbinary: Any) -> None:
    name = b"a\xff.zarr".decode("utf-8", "surrogateescape")
    for file in GOLDEN.rglob("*"):
        if file.is_file():
            (tmp_path / name / file.relative_to(GOLDEN)).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name / file.relative_to(GOLDEN)).write_bytes(file.read_bytes())
    assert store_info(tmp_path / name)["samples"] == 7
    monkeypatch.setattr(sys, "argv", ["diffprobe", "info", str(tmp_path / name)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert not stop.value.code
