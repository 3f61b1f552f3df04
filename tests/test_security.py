"""What comes from elsewhere (weights, datasets, stores, texts) is data: it runs no code, leaves no folder, and learns no secret."""

from __future__ import annotations

import ast
import html.parser
import json
import os
import pickle
import shutil
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numcodecs
import numpy as np
import pandas as pd
import pytest
import torch
from packaging.requirements import Requirement
from PIL import Image

from diffprobe import cli
from diffprobe.data.benchmarks import load_benchmark
from diffprobe.encoders import load_extractor
from diffprobe.mllm.config import TrainConfig
from diffprobe.mllm.language import load_language_model
from diffprobe.mllm.train import Captioned, train_projector
from diffprobe.models import load_model
from diffprobe.report import write_report

ROOT = Path(__file__).parent.parent
SOURCES = sorted(path for folder in ("diffprobe", "experiments", "benchmarks") for path in (ROOT / folder).rglob("*.py"))

# --- the source ------------------------------------------------------------------------------------

BANNED_MODULES = {"pickle", "dill", "cloudpickle", "shelve", "marshal"}
BANNED_CALLS = {"eval", "exec", "read_pickle", "extractall", "unpack_archive", "system", "popen", "load_module"}
NEEDED = {("torch", "load"): ("weights_only", True), ("np", "load"): ("allow_pickle", False)}


def dangers(source: str) -> list[str]:
    """What in a source could run code that comes with data, as "line: what".

    `from_pretrained` of an Auto class or of DiffusionPipeline must say trust_remote_code=False: left out, transformers asks.
    """
    found = []
    for node in ast.walk(ast.parse(source)):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and [alias.name for alias in node.names] != ["UnpicklingError"]:
            names = [str(node.module)]
        found += [f"{node.lineno}: imports {name}" for name in names if name.split(".")[0] in BANNED_MODULES]
        if not isinstance(node, ast.Call):
            continue
        called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        owner = getattr(node.func.value, "id", "") if isinstance(node.func, ast.Attribute) else ""
        said = {word.arg: word.value.value for word in node.keywords if isinstance(word.value, ast.Constant)}
        if called in BANNED_CALLS and not (
            called == "eval" and isinstance(node.func, ast.Attribute)
        ):  # module.eval() is torch's
            found.append(f"{node.lineno}: calls {called}")
        if (owner, called) in NEEDED:
            word, value = NEEDED[owner, called]
            if said.get(word) is not value:
                found.append(f"{node.lineno}: {owner}.{called} without {word}={value}")
        if said.get("shell") or said.get("trust_remote_code"):
            found.append(f"{node.lineno}: shell or trust_remote_code is on")
        remote = called == "from_pretrained" and (
            (owner.startswith("Auto") and owner != "AutoencoderKL") or owner == "DiffusionPipeline"
        )
        if remote and said.get("trust_remote_code") is not False:
            found.append(f"{node.lineno}: {owner}.from_pretrained without trust_remote_code=False")
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_source_loads_code_with_data(path: Path) -> None:
    assert dangers(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "line",
    [
        "import pickle", "from pickle import loads", "torch.load(path)", "torch.load(path, weights_only=False)", "np.load(path)",
        "np.load(path, allow_pickle=True)", "pd.read_pickle(path)", "eval(text)", "archive.extractall()", "run(x, shell=True)",
        "AutoModel.from_pretrained(x)", "AutoModel.from_pretrained(x, trust_remote_code=True)",
        "DiffusionPipeline.from_pretrained(x, use_safetensors=True)", "os.system(text)",
    ],
)  # fmt: skip
def test_the_search_finds_what_it_looks_for(line: str) -> None:
    assert dangers(line)


# --- results appear whole --------------------------------------------------------------------------

WRITES = {"write_text", "write_bytes", "to_csv", "to_json", "to_netcdf", "savefig", "savez", "savez_compressed", "save_file", "save_pretrained"}  # fmt: skip
IN_PLACE = {  # by function what may be written so: parts of a folder that is renamed, or whose last file says that all is there
    "content_digests": "write_text", "fetch": "save_pretrained", "save_pretrained": "save_pretrained",
    "train_stage": "save_pretrained", "write_auto_files": "save_pretrained",
}  # fmt: skip


def in_place(source: str) -> list[str]:
    """What in a source writes a file where it will stand, so that a full disk leaves half of it, as "line: what".

    Not so written is what stands in a `with` that has a `whole_file` or a `whole_folder`, and a text that `write_whole` is given.
    """
    found: list[str] = []

    def look(node: ast.AST, function: str, whole: bool) -> None:
        if isinstance(node, ast.FunctionDef):
            function, whole = node.name, False
        if isinstance(node, ast.With):
            whole = whole or any(
                isinstance(part, ast.Name) and part.id in ("whole_file", "whole_folder") for part in ast.walk(node)
            )
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute | ast.Name):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else node.func.id
            owner = getattr(getattr(node.func, "value", None), "id", "")
            opened = called == "open" and any(isinstance(a, ast.Constant) and str(a.value)[:1] in "wx" for a in node.args)
            kept = (called in WRITES and (called != "to_csv" or bool(node.args))) or (owner, called) == ("torch", "save")
            if (opened or kept) and not whole and IN_PLACE.get(function) != called:
                found.append(f"{node.lineno}: {called} in {function}")
        for child in ast.iter_child_nodes(node):
            look(child, function, whole)

    look(ast.parse(source), "", False)
    return found


@pytest.mark.parametrize("path", sorted((ROOT / "diffprobe").rglob("*.py")), ids=lambda path: str(path.relative_to(ROOT)))
def test_no_result_is_written_in_place(path: Path) -> None:
    assert in_place(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "line",
    [
        "frame.to_csv(path, index=False)", "path.write_text(page)", "figure.savefig(path)", "np.savez(path, a=a)", "torch.save(held, path)",
        "with path.open('w') as file:\n    file.write(text)", "save_file(weights, path)", "table.to_netcdf(path)",
        "def f():\n    with whole_file(a) as beside:\n        beside.write_text(x)\n    b.write_text(x)",
    ],
)  # fmt: skip
def test_the_search_finds_what_is_written_in_place(line: str) -> None:
    assert len(in_place(line)) == 1
    assert (
        in_place("with whole_file(path) as beside:\n    frame.to_csv(beside)\nwrite_whole(path, frame.to_csv(index=False))")
        == []
    )


# --- weights and configs ---------------------------------------------------------------------------


class Evil:
    """Unpickling this makes a folder."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.mark),)


@pytest.fixture
def mark(tmp_path: Path) -> Iterator[Path]:
    """A folder that only foreign code would make."""
    yield tmp_path / "foreign-code-ran"
    assert not (tmp_path / "foreign-code-ran").exists()


def test_the_pickle_is_really_dangerous(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Evil(tmp_path / "made")))
    assert (tmp_path / "made").is_dir()


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_a_pipeline_in_pickles_is_refused(tiny_folder: Path, tmp_path: Path, mark: Path, part: str) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_folder, folder)
    weights = next((folder / part).glob("*.safetensors"))
    weights.unlink()
    name = "pytorch_model.bin" if part == "text_encoder" else "diffusion_pytorch_model.bin"
    (folder / part / name).write_bytes(pickle.dumps({"weight": Evil(mark)}, protocol=2))
    with pytest.raises(ValueError, match="could not be read"):
        load_model(folder, "cpu")
    with pytest.raises(
        (ValueError, RuntimeError, pickle.UnpicklingError)
    ):  # even where pickles are allowed, only tensors are read
        load_model(folder, "cpu", use_safetensors=False)


def test_a_checkpoint_that_is_a_pickle_is_refused(language: Any, tmp_path: Path, mark: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoint.pt").write_bytes(pickle.dumps(Evil(mark), protocol=2))
    data = Captioned(torch.randn(8, 2, 6), ["a star"] * 8)
    for content in (None, b"", b"PK\x03\x04 cut off"):
        if content is not None:
            (tmp_path / "run" / "checkpoint.pt").write_bytes(content)
        with pytest.raises(ValueError, match=r"checkpoint\.pt is no checkpoint of a training, or is damaged; remove it"):
            train_projector(language(), data, data, tmp_path / "run", TrainConfig(steps=1, batch=8))


def test_code_that_comes_with_a_model_is_not_run(tiny_folder: Path, tmp_path: Path, mark: Path) -> None:
    code = f"import os\nos.mkdir({str(mark)!r})\nclass Foreign: pass\n"
    folder = tmp_path / "remote"
    folder.mkdir()
    (folder / "foreign.py").write_text(code)
    classes = dict.fromkeys(("AutoConfig", "AutoModel", "AutoModelForCausalLM", "AutoTokenizer"), "foreign.Foreign")
    (folder / "config.json").write_text(json.dumps({"model_type": "foreign", "auto_map": classes}))
    (folder / "tokenizer_config.json").write_text(json.dumps({"auto_map": {"AutoTokenizer": ["foreign.Foreign", None]}}))
    (folder / "preprocessor_config.json").write_text("{}")
    for load in (load_extractor, load_language_model):
        with pytest.raises(ValueError, match=r"No model at|No language model at"):
            load(folder, "cpu")  # type: ignore[operator]
    pipeline = tmp_path / "pipeline"
    shutil.copytree(tiny_folder, pipeline)
    index = json.loads((pipeline / "model_index.json").read_text())
    (pipeline / "foreign.py").write_text(code)
    (pipeline / "unet" / "foreign.py").write_text(code)
    for change in ({"_class_name": ["foreign", "Foreign"]}, {"unet": ["foreign", "Foreign"]}):
        (pipeline / "model_index.json").write_text(json.dumps(index | change))
        with pytest.raises(ValueError, match=r"not supported|could not be read|remote code"):
            load_model(pipeline, "cpu")


# --- archives, pages, secrets ----------------------------------------------------------------------


def test_an_archive_is_read_and_never_unpacked(tmp_path: Path) -> None:
    """Entries with .. and absolute names are only ever names; nothing appears on the disk."""
    data = tmp_path / "benchmark" / "data"
    data.mkdir(parents=True)
    row = {"id": 0, "image_0": "a", "image_1": "b", "caption_0": "x", "caption_1": "y", "tag": "", "secondary_tag": "", "num_main_preds": 1,
           "collapsed_tag": "Object"}  # fmt: skip
    (data / "examples.jsonl").write_text(json.dumps(row))
    Image.new("RGB", (8, 8)).save(tmp_path / "picture.png")
    with zipfile.ZipFile(data / "images.zip", "w") as archive:
        archive.write(tmp_path / "picture.png", "../../../a.png")
        archive.write(tmp_path / "picture.png", str(tmp_path / "absolute" / "b.png"))
    before = sorted(tmp_path.rglob("*"))
    item = load_benchmark(f"winoground:{tmp_path / 'benchmark'}").items[0]
    assert [np.asarray(load()).shape for load in item.images] == [(8, 8, 3)] * 2
    assert sorted(tmp_path.rglob("*")) == before


HOSTILE = "</td></script><script>alert(1)</script><img src=x onerror=alert(2)>\"'&\u2028"


def hostile(value: Any) -> Any:
    """The same JSON with a script in every text, numbers left alone."""
    if isinstance(value, dict):
        return {key: hostile(one) for key, one in value.items()}
    return (
        [hostile(one) for one in value] if isinstance(value, list) else f"{value}{HOSTILE}" if isinstance(value, str) else value
    )


class Tags(html.parser.HTMLParser):
    """The tags that a browser's parser sees."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.seen: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))


def test_no_field_of_a_figure_gets_out_of_its_place(tmp_path: Path) -> None:
    """A folder of figures from elsewhere, with a script in its every text: names, titles, settings, claims, rows, versions."""
    run = tmp_path / f"run{HOSTILE.replace('/', '')}"
    run.mkdir()
    name = f"figure{HOSTILE.replace('/', '')}"
    sidecar = {
        "alt": "a", "versions": {f"torch{HOSTILE}": "2"},
        "config": hostile({
            "title": "t", "command": "c", "commit": "c", "model": "m", "data": "d", "note": "n", "nested": [{"a": "b"}], "seed": 0, "count": 1,
            "measured_with": {"numpy": "2"}, "claims": [{"id": "A1", "statement": "s", "verdict": "held", "evidence": "e"}],
        }) | {"figures": [name], f"key{HOSTILE}": 1, "seconds": 3.0},
    }  # fmt: skip
    (run / f"{name}.json").write_text(json.dumps(sidecar | {"alt": f"alt{HOSTILE}"}), encoding="utf-8")
    Image.new("RGB", (4, 4)).save(run / f"{name}.png")
    pd.DataFrame({f"column{HOSTILE}": [HOSTILE, HOSTILE]}).to_csv(run / f"{name}.csv", index=False)
    write_report(run, tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    seen = Tags(page).seen
    assert page.count("alert(1)") > 15, "the texts are shown"
    assert "<script>alert" not in page and [attributes for tag, attributes in seen if tag == "script"] == [{}]
    images = [attributes for tag, attributes in seen if tag == "img"]
    assert len(images) == 1 and str(images[0]["src"]).startswith("data:image/webp;base64,")
    assert set(images[0]) == {"src", "alt", "width", "height", "loading", "decoding"}
    assert not [attributes for _, attributes in seen for key in attributes if key.startswith("on")]


def test_a_hub_token_is_written_nowhere(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    token = "hf_thisIsASecretThatNobodyMayRead"
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_API_TOKEN"):
        monkeypatch.setenv(name, token)
    store = tmp_path / "s.zarr"
    for command in (
        ("extract", "--model", tiny_folder, "--data", "shapes:20?objects=1", "--sites", "U-L2-R2-Res-Out", "--maps", "U-L2-R1-B0-Cross-Map", "-t", "50", "-o", store),
        ("info", store),
        ("probe", "linear", store, "--label", "size", "--conditioning", "null", "--jobs", "1", "--out", tmp_path / "table.csv"),
        ("plot", "pca", store, "--count", "2", "--out", tmp_path / "figures"),
        ("report", tmp_path / "figures", "--store", store, "--samples", "1", "--out", tmp_path / "report.html"),
        ("doctor",),
    ):  # fmt: skip
        monkeypatch.setattr(sys, "argv", ["diffprobe", *map(str, command)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        assert not stop.value.code, command
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(written) > 40
    assert not [path for path in written if token.encode() in path.read_bytes()]
    said = capfd.readouterr()
    assert token not in said.out + said.err


def test_numcodecs_of_here_and_of_every_version_allowed_does_not_unpickle(mark: Path) -> None:
    """A Zarr object can name its filter "pickle"; stores are opened in format 3, and this is the second wall."""
    with pytest.raises(Exception, match="disabled"):
        numcodecs.get_codec({"id": "pickle"}).decode(pickle.dumps(np.array([Evil(mark)], object)))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    (floor,) = [Requirement(line) for line in project["dependencies"] if line.startswith("numcodecs")]
    assert floor.specifier.contains(numcodecs.__version__)
    assert not any(floor.specifier.contains(version) for version in ("0.15.1", "0.16.5"))  # they unpickle
