"""`diffprobe mllm`: train, go on, judge and ask; mistakes as one sentence with exit code 2."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from diffprobe.data import ShapesDataset
from docs import pages


def test_train_judge_and_ask(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Callable[..., tuple[int, str, str]],
    follow: Callable[[str], list[str]],
) -> None:  # fmt: skip
    def mllm(*arguments: str | Path) -> tuple[int, str, str]:
        return run("mllm", *arguments)

    out = tmp_path / "fused"
    small = ("--captions", "shapes-captions:8", "--instructions", "shapes-instruct:8", "--batch", "4,4", "--grid", "3")
    train = ("train", "-o", out, "-m", tiny_folder, "--device", "cpu", *small)
    code, said, _ = mllm(*train, "--steps", "1,2", "--dry-run")
    assert code == 0 and "stage 2, shapes-instruct-0: 2 steps of" in said and not out.exists()
    code, said, _ = mllm(*train, "--steps", "1,2")
    assert code == 0 and "stage 2  step 2 of 2" in said
    monkeypatch.setattr("diffprobe.mllm.judging.DRAWN", ("shapes-mmvp:3",))
    assert "shapes-mmvp-0" in follow(said)[0]
    code, _, errors = mllm(*train, "--steps", "1,3")
    assert code == 2 and "steps: the store has 2, you ask for 3" in errors and errors.count("\n") == 1
    code, said, _ = mllm("eval", out, "-b", "shapes-mmvp:9", "--conditions", "own,text", "--max-new-tokens", "2")
    scores = pd.read_csv(out / "eval" / "scores.csv")
    assert code == 0 and scores["condition"].tolist() == ["own", "own", "text", "text"] and "shapes-mmvp-0" in said
    points = pd.DataFrame({"condition": "own", "id": ["a", "b"], "category": "conv", "question": "?", "output": ["x", "y"],
                           "reference_points": 8, "output_points": [8, 4]})  # fmt: skip
    points.to_csv(tmp_path / "to_judge.csv", index=False)
    code, said, _ = mllm("score", tmp_path / "to_judge.csv")
    assert code == 0 and "0.750" in said and pd.read_csv(tmp_path / "judged_scores.csv")["value"].tolist() == [0.75, 0.75]
    ShapesDataset(1)[0].load().save(tmp_path / "scene.png")
    code, said, _ = mllm("chat", out, tmp_path / "scene.png", "Is there a red star?", "--attention", tmp_path / "heat.png")
    assert code == 0 and (tmp_path / "heat.png").is_file() and "Drew" in said

    for arguments, message in (
        (("eval", tmp_path / "absent"), "holds no fused model"),
        (("eval", out, "-b", "shapes-mmvp"), "shapes-mmvp"),
        (("eval", out, "-b", "shapes-mmvp:9", "--conditions", "seen"), "'seen' is not one of own"),
        (("chat", out, tmp_path / "absent.png", "?"), "does not exist"),
        (("score", tmp_path / "absent.csv"), "absent.csv"),
        ((*train, "--fusion", "sum"), "'sum' is not one of clip"),
        ((*train, "--tune", "some"), "--tune full, lora or none"),
        ((*train, "--template", "vicuna"), "Template 'vicuna' is not one of v1, plain"),
        ((*train, "--template", "chatml,v1"), "template is one of '', 'v1', 'plain'; got 'chatml'"),
        ((*train, "--steps", "3"), "--steps takes one number for each of the two stages"),
        (("train", "-o", out, "--captions", "talk:3"), "names no conversations"),
        ((*train, "--sites", "U-L9*"), "matches none of"),
    ):
        code, _, errors = mllm(*arguments)
        assert code == 2 and message in errors and errors.count("\n") == 1, (arguments, errors)


def test_an_options_default_is_that_of_what_it_sets() -> None:
    """Options and fields are written twice, for `--help` imports no torch; they may not come to differ."""
    from diffprobe.extraction import extract
    from diffprobe.matching import alignment_score
    from diffprobe.mllm.config import Sampling
    from diffprobe.mllm.judging import judge_all
    from diffprobe.mllm.leakage import Settings
    from diffprobe.mllm.model import FusedConfig

    def listed(value: Any) -> list[Any]:
        return list(value) if isinstance(value, tuple | list) else [value]

    commands = dict(pages.commands())
    for words, target, others in (
        (("extract",), extract, {"resolution"}),
        (("leakage", "run"), Settings, {"model", "data"}),  # those of a store where there is one
        (("mllm", "train"), FusedConfig, {"template"}),  # of two stages
        (("mllm", "eval"), judge_all, set()),
        (("mllm", "chat"), Sampling, set()),
        (("probe", "alignment"), alignment_score, {"data", "model", "out"}),
    ):
        options = {name: one.default.default for name, one in inspect.signature(commands[words]).parameters.items()}
        fields = {name: one.default for name, one in inspect.signature(target).parameters.items()}
        shared = {name for name in options.keys() & fields.keys() - others if fields[name] is not inspect.Parameter.empty}
        assert len(shared) >= 3
        assert {name: listed(options[name]) for name in shared} == {name: listed(fields[name]) for name in shared}, words
