"""The report page: what is in it, what may not get out of its text, and how it behaves in a browser."""

from __future__ import annotations

import base64
import html.parser
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure
from PIL import Image

from diffprobe.cli import main
from diffprobe.figures import words_of
from diffprobe.plotting import heat_colours, save_figure
from diffprobe.report import explorable, write_report
from diffprobe.store import StoreError, attention_maps, open_store
from experiments.framework import Claim, Experiment, Options, Result

TABLE = {"columns": ["", "VQA"], "rows": [["CLIP", ["51.5", "[46.5, 56.4]", "66.5"]], ["concat", ["50.4"]]], "best": [[0, 0]]}
HOSTILE = "</script><script>alert(1)</script>&\u2028<img src=x onerror=alert(2)>"
ROWS = pd.DataFrame({"what": [HOSTILE, *"abcdefghijklmnopqrstuvwxyz"], "value": np.linspace(0, 1, 27), "n": 7})


def draw(result: Result) -> dict[str, Figure]:
    figures = {}
    for suffix in ("", "zoom", "scores"):
        figures[suffix] = Figure(figsize=(3, 2))
        figures[suffix].subplots().plot(result.rows["value"])
        figures[suffix].suptitle("Nearer" if suffix == "zoom" else "")
    return figures


FAKE = Experiment(
    name="fig9_fake",
    title=f"A figure called {HOSTILE}",
    count=5,
    smoke_count=2,
    measure=lambda options: Result(ROWS, config={"note": HOSTILE}),
    judge=lambda rows: [
        Claim("A2", f"It is said that {HOSTILE}", "held", f"{len(rows)} rows +0.15 [+0.10, +0.20], 0.3 [0.2, 0.4]", 1e-4, True),
        Claim("A10", "Last", "undecided", ""),
        Claim("A1", "First", "not held", "n = 7"),
    ],
    draw=draw,
    alt={"": f"A rising line {HOSTILE}", "zoom": "The same, nearer", "scores": "A table of scores"},
    tables=lambda result: {"scores": TABLE},
)


@pytest.fixture(scope="module")
def figures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of figures: one experiment with verdicts, one plain figure, and files that are no figures."""
    out = tmp_path_factory.mktemp("report") / "figures"
    FAKE.run(Options(seed=3), out)
    for name in ("map_1", "map_2"):
        save_figure(draw(Result(ROWS))[""], out, name, ROWS, {"store": "runs/some.zarr"}, f"Of a store: {name}")
    save_figure(draw(Result(ROWS))[""], out, "plain", ROWS, {"model": "shapes-sd"}, "A plain figure")
    (out / "notes.json").write_text("not JSON")
    (out / "other.json").write_text('{"alt": "a picture that is not there"}')
    return out


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> Path:
    """Cross-attention of four scenes, whose captions are hostile, square and not."""
    from diffprobe.extraction import extract
    from diffprobe.models import load_model

    folder = tmp_path_factory.mktemp("photographs")
    generator = np.random.default_rng(0)
    for number in range(3):
        Image.fromarray(generator.integers(0, 255, (64, 96, 3), dtype=np.uint8)).save(folder / f"{number}.png")
    captions = [f"red star {HOSTILE}", "a red circle left of a star", "a blue circle"]
    lines = [json.dumps({"file": f"{number}.png", "caption": caption}) for number, caption in enumerate(captions)]
    (folder / "captions.jsonl").write_text("\n".join(lines), encoding="utf-8")
    out = tmp_path_factory.mktemp("stores") / "hostile <b>.zarr"
    extract(
        load_model(tiny_folder, "cpu"), str(folder), out, sites="", maps=["U-L1-R1-*-Cross-Map", "U-L2-R1-*-Cross-Map"],
        timesteps=[50, 500], conditionings=["null", "caption", "mismatched"], resolution=(64, 96), progress=False,
    )  # fmt: skip
    return out


@pytest.fixture(scope="module")
def page(figures: Path, store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("page") / "report.html"
    made = write_report(figures, out, [str(store)])
    assert (made.figures, made.claims, made.stores) == (6, 3, 1)
    assert made.bytes == out.stat().st_size
    return out


class Reader(html.parser.HTMLParser):
    """Text, tags and attributes of a page, as a browser's parser would see them."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


# --- what is in it --------------------------------------------------------------------------------


def test_the_page_loads_nothing_and_runs_its_own_scripts(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    seen = Reader(text)
    for tag, attributes in seen.tags:
        for name in ("src", "href", "action", "srcset", "data", "poster"):
            value = attributes.get(name)
            assert value is None or value.startswith(("data:image/", "#")), f"<{tag} {name}> points outside"
        assert not [name for name in attributes if name.startswith("on")]
    assert "url(" not in text
    assert "@import" not in text
    assert [attributes for tag, attributes in seen.tags if tag == "script"] == [
        {},
        {"type": "application/json", "id": "maps"},
        {},
    ]
    policy = next(a["content"] for t, a in seen.tags if t == "meta" and a.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None
    assert re.match(r"default-src 'none'; img-src data:; script-src 'sha256-\S+' 'sha256-\S+'; style-src 'sha256-\S+';", policy)
    assert "unsafe" not in policy


def test_every_text_is_escaped(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert "<script>alert" not in text
    assert "<img src=x" not in text
    inlined = re.search(r'<script type="application/json" id="maps">(.*?)</script>', text, re.DOTALL)
    assert inlined is not None
    assert not set(inlined[1]) & set("<>&\u2028\u2029")
    assert json.loads(inlined[1])["stores"][0]["samples"][0]["prompts"][0]["text"].endswith(HOSTILE)


def test_figures_tables_verdicts_and_origin(page: Path) -> None:
    seen = Reader(page.read_text(encoding="utf-8"))
    text = " ".join(" ".join(seen.texts).split())
    shown = " ".join(HOSTILE.split())
    alts = [FAKE.alt[""], FAKE.alt["zoom"], "Of a store: map_1", "Of a store: map_2", "A plain figure"]
    assert [a["alt"] for t, a in seen.tags if t == "img" and a.get("alt")] == alts
    assert f"A figure called {shown}" in text
    assert "3 claims judged: ✓ 1 held, ✗ 1 not held, ? 1 undecided" in text
    place = [text.index(words) for words in ("✓ held A2 It is said", "✗ not held A1 First", "? undecided A10 Last")]
    assert place == sorted(place)
    assert "Made by diffprobe reproduce fig9_fake --seed 3 in 0 s" in text
    assert "Its rows: the first 20 of 27" in text
    for setting in ("model shapes-sd", "count 5", "seed 3", "commit"):
        assert setting in text
    assert f"numpy {np.__version__}" in text
    assert [text.count(title) for title in ("Nearer", "Pictures of some.zarr")] == [1, 2], "by title; a store's are one figure"


def test_claims_are_lines_with_their_evidence_folded_and_tables_are_no_pictures(page: Path) -> None:
    source = page.read_text(encoding="utf-8")
    lines = re.findall(r'<li class="([a-z-]+)"><details>\s*<summary>(.*?)</summary>(.*?)</details>', source, re.DOTALL)
    assert [verdict for verdict, _, _ in lines] == ["held", "not-held", "undecided"], "the primary statement first"
    summary, evidence = (" ".join("".join(Reader(part).texts).split()) for part in lines[0][1:])
    assert summary.endswith("+0.15 [+0.10, +0.20] and 1 more") and "rows" not in summary
    assert evidence.startswith("A2: 27 rows +0.15 [+0.10, +0.20]") and "p = 0.0001, 0.0001 after Holm." in evidence
    assert 'href="#figure-1"' in lines[0][2]
    table = re.search(r'<table class="scores">(.*?)</table>', source, re.DOTALL)
    assert table is not None
    words = "VQA CLIP 51.5 [46.5, 56.4] 66.5 concat 50.4"
    assert " ".join(" ".join(Reader(table[1]).texts).split()) == f"{FAKE.alt['scores']} {words}"
    assert re.findall(r"<td[^>]*>", table[1]) == ['<td class="best">', "<td>"]


def test_pictures_keep_every_pixel_in_less_room_and_are_decoded_when_near(figures: Path, page: Path) -> None:
    shown = [a for tag, a in Reader(page.read_text(encoding="utf-8")).tags if tag == "img" and a.get("src")]
    files = [figures / f"{name}.png" for name in ("fig9_fake", "fig9_fake_zoom", "map_1", "map_2", "plain")]
    for attributes, path in zip(shown, files, strict=True):
        kind, _, letters = str(attributes["src"]).partition(",")
        kept = Image.open(io.BytesIO(base64.b64decode(letters)))
        assert kind == "data:image/webp;base64"
        np.testing.assert_array_equal(np.asarray(kept.convert("RGB")), np.asarray(Image.open(path).convert("RGB")))
        assert len(letters) * 3 / 4 < path.stat().st_size
        assert (attributes["width"], attributes["height"]) == tuple(map(str, kept.size))
        assert (attributes["loading"], attributes["decoding"]) == ("lazy", "async")


def test_it_opens_on_the_mean_over_sites_of_the_sample_whose_words_differ_most(page: Path, store: Path) -> None:
    inlined = re.search(r'id="maps">(.*?)</script>', page.read_text(encoding="utf-8"), re.DOTALL)
    assert inlined is not None
    shelf, tree = json.loads(inlined[1])["stores"][0], open_store(store)
    assert shelf["sites"][0] == {"name": "mean over sites", "height": 8, "width": 12}
    assert shelf["timesteps"][shelf["opens"]["timestep"]] == 50
    apart = []
    for number, sample in enumerate(shelf["samples"]):
        tokens, text = sample["prompts"][0]["tokens"], sample["prompts"][0]["text"]
        maps = [attention_maps(tree, token=k, timestep=50).isel(sample=number, timestep=0) for k in range(len(tokens))]
        low, high = np.frombuffer(base64.b64decode(sample["maps"][0][0]["ends"]), "<f4").reshape(2, len(tokens), 2)[0].T
        np.testing.assert_allclose(low, [m.min() for m in maps], rtol=1e-5)
        np.testing.assert_allclose(high, [m.max() for m in maps], rtol=1e-5)
        shares = [m / m.sum() for m, token in zip(maps, tokens, strict=True) if token in words_of(text)]
        mean = sum(shares) / len(shares)
        apart.append(sum(float(np.abs(share - mean).sum()) for share in shares) / len(shares))
    assert len(apart) == 3 and shelf["opens"]["sample"] == apart.index(max(apart))


def test_a_folder_without_figures_or_a_store_without_maps(figures: Path, tmp_path: Path, tiny_folder: Path) -> None:
    from diffprobe.extraction import extract

    with pytest.raises(ValueError, match="is not a folder of figures"):
        write_report(tmp_path / "none", tmp_path / "r.html")
    with pytest.raises(ValueError, match="holds no figure"):
        write_report(tmp_path, tmp_path / "r.html")
    extract(str(tiny_folder), "shapes:2", tmp_path / "s.zarr", sites="U-L1-R1-B0-Out", timesteps=[50], progress=False)
    with pytest.raises(StoreError, match="no cross-attention maps"):
        write_report(figures, tmp_path / "r.html", [str(tmp_path / "s.zarr")])
    assert not (tmp_path / "r.html").exists()
    assert explorable(tmp_path) == []


def test_stores_that_can_be_explored_are_found(store: Path) -> None:
    assert explorable(store.parent) == [store]


def test_a_page_without_stores_has_only_the_script_that_enlarges(figures: Path, tmp_path: Path) -> None:
    write_report(figures, tmp_path / "r.html")
    assert re.findall(r"<script[^>]*>", (tmp_path / "r.html").read_text(encoding="utf-8")) == ["<script>"]


def test_size_is_forecast_and_bounded(figures: Path, store: Path, page: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"maps of 3 samples would take (.*) MB in the page and 0\.09 are allowed") as refusal:
        write_report(figures, tmp_path / "r.html", [str(store)], samples=9, max_bytes=90_000)
    forecast = float(re.search(r"take (.*) MB", str(refusal.value))[1]) * 1e6  # type: ignore[index]
    inlined = re.search(r'id="maps">(.*?)</script>', page.read_text(encoding="utf-8"), re.DOTALL)
    assert inlined is not None
    assert forecast == pytest.approx(len(inlined[1]), rel=0.1)
    fits = int(re.search(r"--samples (\d+)", str(refusal.value))[1])  # type: ignore[index]
    assert write_report(figures, tmp_path / "r.html", [str(store)], samples=fits, max_bytes=90_000).stores == 1


def test_report_on_the_command_line(
    figures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["diffprobe", "report", str(figures), "-o", "pages/r.html"])
    with pytest.raises(SystemExit) as stop:
        main()
    assert not stop.value.code
    output = capsys.readouterr().out
    assert "pages/r.html: 6 figures, 3 claims, stores to explore: 0; 0." in output
    assert "With --store" in output and "Next:" not in output, "STORE would have to be known to be typed"
    assert Path("pages/r.html").stat().st_size > 10_000
    monkeypatch.setattr(sys, "argv", ["diffprobe", "report", "nowhere"])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2
    assert capsys.readouterr().err.startswith("diffprobe: nowhere is not a folder of figures; 'diffprobe reproduce")


# --- in a browser ---------------------------------------------------------------------------------

BROWSER = next((found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None)
in_browser = pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine (Debian: apt-get install chromium)")


class Browser:
    """Headless Chromium, spoken to over its debugging pipe: JSON messages that end in a null byte."""

    def __init__(self, url: str, width: int, height: int) -> None:
        assert BROWSER is not None
        read, self._out = os.pipe()
        self._in, write = os.pipe()
        self._profile = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--remote-debugging-pipe"]
        offline = ["--proxy-server=127.0.0.1:9", "--disable-background-networking", "--no-first-run"]
        place = [f"--user-data-dir={self._profile.name}", f"--window-size={width},{height}"]
        program = "import os, sys; os.dup2({}, 3); os.dup2({}, 4); os.execv(sys.argv[1], sys.argv[1:])"
        assert min(read, write) > 4, "file numbers 3 and 4 are the pipe's own"
        self._process = subprocess.Popen(
            [sys.executable, "-c", program.format(read, write), BROWSER, *options, *offline, *place, "about:blank"],
            pass_fds=(read, write), close_fds=True, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(read)
        os.close(write)
        self._number, self._rest, self.events = 0, b"", []
        target = next(t for t in self("Target.getTargets")["targetInfos"] if t["type"] == "page")
        self._session = self("Target.attachToTarget", targetId=target["targetId"], flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self(f"{domain}.enable")
        self("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600)
        self("Page.navigate", url=url)
        while not any(event["method"] == "Page.loadEventFired" for event in self.events):
            self.events.append(self._message())

    _session = ""

    def __call__(self, method: str, **parameters: Any) -> Any:
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        message |= {"sessionId": self._session} if self._session else {}
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._message()
            if answer.get("id") == self._number:
                assert "error" not in answer, answer
                return answer["result"]
            self.events.append(answer)

    def _message(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            part = os.read(self._in, 1 << 20)
            assert part, "the browser has ended"
            self._rest += part
        message, _, self._rest = self._rest.partition(b"\0")
        found: dict[str, Any] = json.loads(message)
        return found

    def ask(self, script: str) -> Any:
        """The value of a JavaScript expression."""
        answer = self("Runtime.evaluate", expression=script, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def press(self, key: str) -> None:
        for kind in ("keyDown", "keyUp"):
            self("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=KEYS[key])

    def pick(self, control: str, value: object) -> None:
        events = "".join(f"x.dispatchEvent(new Event('{kind}', {{bubbles: true}}));" for kind in ("input", "change"))
        self.ask(f"(x => {{ x.value = {json.dumps(value)}; {events} }})(document.getElementById({control!r}))")

    def close(self) -> None:
        self("Browser.close")
        self._process.wait(20)
        os.close(self._in)
        os.close(self._out)
        self._profile.cleanup()


KEYS = {"ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40, "Tab": 9, "Escape": 27, " ": 32}
PLACE = (
    "(x => (x.scrollIntoView({block: 'center'}), (r => [r.x + r.width / 2, r.y + r.height / 2])(x.getBoundingClientRect())))"
)
SHOWN = """(() => {
  const heat = document.getElementById("heat"), image = heat.getContext("2d").getImageData(0, 0, heat.width, heat.height);
  return {said: document.getElementById("said").textContent, low: document.getElementById("low").textContent,
          token: document.querySelector("#tokens input:checked + span").textContent, size: [heat.height, heat.width],
          alpha: [...image.data].filter((_, i) => i % 4 == 3), colour: [...image.data.slice(0, 3)]};
})()"""


@pytest.fixture
def browser(page: Path) -> Iterator[Browser]:
    opened = Browser(page.as_uri(), 1100, 900)
    yield opened
    opened.close()


@in_browser
@pytest.mark.slow
def test_hostile_text_is_shown_and_nothing_is_loaded(browser: Browser) -> None:
    assert browser.ask("document.querySelectorAll('script').length") == 3
    assert browser.ask("document.querySelector('img[src=x]')") is None
    browser.pick("sample", "0")
    assert HOSTILE in browser.ask("document.getElementById('said').textContent")
    assert HOSTILE in browser.ask("document.querySelector('#sample option').textContent")
    assert HOSTILE in browser.ask("document.querySelector('section h2[id=figure-1]').textContent")
    browser.ask("1")
    kinds = {event["method"] for event in browser.events}
    assert "Page.javascriptDialogOpening" not in kinds
    wanted = {
        event["params"]["request"]["url"].split(":")[0]
        for event in browser.events
        if event["method"] == "Network.requestWillBeSent"
    }
    assert wanted <= {"file", "data"}
    faults = [event for event in browser.events if event["method"] in ("Runtime.exceptionThrown", "Log.entryAdded")]
    assert not faults


@in_browser
@pytest.mark.slow
def test_the_policy_refuses_a_script_that_slipped_in(browser: Browser) -> None:
    browser.ask("document.body.insertAdjacentHTML('beforeend', '<img src=x onerror=\"window.harm=1\">')")
    browser.ask("document.body.append(Object.assign(document.createElement('script'), {textContent: 'window.harm=1'}))")
    browser.ask("new Promise(done => setTimeout(done, 200))")
    assert browser.ask("window.harm") is None
    refused = [e["params"]["entry"]["text"] for e in browser.events if e["method"] == "Log.entryAdded"]
    assert any("Content Security Policy" in text for text in refused)


@in_browser
@pytest.mark.slow
def test_the_map_shown_is_the_map_stored(browser: Browser, store: Path) -> None:
    tree = open_store(store)
    browser.pick("sample", "1")
    browser.pick("site", "2")
    browser.pick("timestep", "1")
    browser.ask("document.querySelectorAll('#tokens label')[2].click()")
    shown = browser.ask(SHOWN)
    assert shown["token"] == "red"
    expected = attention_maps(tree, token=2, site="U-L2-R1-B0-Cross-Map", timestep=500).isel(sample=1, timestep=0).to_numpy()
    assert tuple(shown["size"]) == expected.shape == (8, 12)
    share = (expected - expected.min()) / (expected.max() - expected.min())
    np.testing.assert_allclose(np.reshape(shown["alpha"], expected.shape), 76 + 0.7 * 255 * share, atol=1)
    first = heat_colours()[round(float(share[0, 0]) * 255)]
    np.testing.assert_allclose(shown["colour"], first, atol=4)  # the canvas multiplies colours by alpha and back
    assert float(shown["low"]) == pytest.approx(float(expected.min()), abs=6e-4)
    browser.pick("prompt", "1")
    assert browser.ask(SHOWN)["said"].startswith("“circle” in “a blue circle” at U-L2-R1-B0-Cross-Map, timestep 500")


@in_browser
@pytest.mark.slow
def test_keys_reach_and_move_everything(browser: Browser) -> None:
    browser.pick("sample", "1")
    reached = []
    for _ in range(60):
        browser.press("Tab")
        reached.append(browser.ask("document.activeElement.id || document.activeElement.name"))
        if reached[-1] == "stage":
            break
    assert [name for name in reached if name] == ["only-all", "sample", "prompt", "site", "stage"]
    tokens = ["(start)", "a", "red", "circle", "left", "of", "a", "star", "(end)"]
    assert browser.ask("[...document.querySelectorAll('#tokens span')].map(x => x.textContent)") == tokens
    assert browser.ask(SHOWN)["token"] == "star", "the word of the sample before is kept"
    for key, token, timestep in (
        ("ArrowLeft", "a", 50), ("ArrowUp", "a", 500), ("ArrowUp", "a", 500), ("ArrowRight", "star", 500),
        ("ArrowRight", "(end)", 500), ("ArrowRight", "(end)", 500), ("ArrowDown", "(end)", 50),
    ):  # fmt: skip
        browser.press(key)
        shown = browser.ask(SHOWN)
        assert shown["token"] == token
        assert f"timestep {timestep}:" in shown["said"]
    browser.press("Tab")
    browser.press("ArrowRight")  # the tokens are radio buttons with keys of their own, which go round
    assert browser.ask(SHOWN)["token"] == "(start)"
    reached = []
    for _ in range(4):
        browser.press("Tab")
        reached.append(browser.ask("document.activeElement.id"))
    assert reached == ["timestep", "opacity", "grey", "cells"]
    browser.pick("opacity", "30")
    assert browser.ask("document.getElementById('heat').style.opacity") == "0.3"


@in_browser
@pytest.mark.slow
def test_a_figure_is_enlarged_by_click_and_key_and_closed_by_escape_and_click(browser: Browser) -> None:
    is_open = "document.getElementById('large').open"
    x, y = browser.ask(f"{PLACE}(document.querySelector('.enlarge'))")

    def click() -> None:
        for kind in ("mousePressed", "mouseReleased"):
            browser("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    assert not browser.ask(is_open)
    click()
    assert browser.ask(is_open)
    assert browser.ask("document.querySelector('#large img').src === document.querySelector('.enlarge img').src")
    assert browser.ask("document.querySelector('#large p').textContent") == FAKE.alt[""]
    browser.press("Escape")
    assert not browser.ask(is_open)
    browser.press(" ")  # the focus is where it was
    assert browser.ask(is_open)
    click()
    assert not browser.ask(is_open)


@in_browser
@pytest.mark.slow
def test_claims_are_filtered_by_verdict_and_the_page_goes_dark(browser: Browser) -> None:
    browser.ask("document.querySelectorAll('.kind').forEach(x => x.open = true)")
    shown = "[...document.querySelectorAll('.claims li')].filter(x => x.offsetHeight).map(x => x.className)"
    assert browser.ask(shown) == ["held", "not-held", "undecided"]
    browser.ask("document.getElementById('only-not-held').click()")
    assert browser.ask(shown) == ["not-held"]
    colours = "[getComputedStyle(document.body).color, getComputedStyle(document.body).backgroundColor]"
    light = browser.ask(colours)
    browser("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": "dark"}])
    ink, paper = (sum(map(int, re.findall(r"\d+", colour))) for colour in browser.ask(colours))
    assert ink > 600 > 150 > paper and light == ["rgb(28, 28, 28)", "rgb(255, 255, 255)"]


@in_browser
@pytest.mark.slow
def test_a_phone_needs_no_sideways_scrolling(page: Path) -> None:
    browser = Browser(page.as_uri(), 360, 740)
    try:
        assert browser.ask("document.documentElement.scrollWidth") <= 360
        assert browser.ask("document.getElementById('stage').getBoundingClientRect().right") <= 360
        assert browser.ask("getComputedStyle(document.querySelector('.claims .statement')).whiteSpace") == "normal"
        x, y = browser.ask(f"{PLACE}(document.querySelector('.enlarge'))")
        browser("Input.dispatchTouchEvent", type="touchStart", touchPoints=[{"x": x, "y": y}])
        browser("Input.dispatchTouchEvent", type="touchEnd", touchPoints=[])
        assert browser.ask("document.getElementById('large').open"), "a tap enlarges"
        assert browser.ask("document.querySelector('#large img').getBoundingClientRect().width") > 900, "and it can be moved"
    finally:
        browser.close()
