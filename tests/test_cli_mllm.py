"""`diffprobe mllm`: train, go on, judge and ask; mistakes as one sentence with exit code 2."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest

from diffprobe.cli import main
from diffprobe.data import ShapesDataset


def test_train_judge_and_ask(
    tiny_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    follow: Callable[[str], list[str]],
) -> None:
    def run(*arguments: str | Path) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["diffprobe", "mllm", *map(str, arguments)])
        try:
            main()
            code = 0
        except SystemExit as stop:
            code = int(stop.code or 0)
        return code, *capsys.readouterr()

    out = tmp_path / "fused"
    small = ("--captions", "shapes-captions:8", "--instructions", "shapes-instruct:8", "--batch", "4,4", "--grid", "3")
    train = ("train", "-o", out, "-m", tiny_folder, "--device", "cpu", *small)
    code, said, _ = run(*train, "--steps", "1,2", "--dry-run")
    assert code == 0 and "stage 2, shapes-instruct-0: 2 steps of" in said and not out.exists()
    code, said, _ = run(*train, "--steps", "1,2")
    assert code == 0 and "stage 2  step 2 of 2" in said
    monkeypatch.setattr("diffprobe.mllm.judging.DRAWN", ("shapes-mmvp:3",))
    assert "shapes-mmvp-0" in follow(said)[0]
    code, _, errors = run(*train, "--steps", "1,3")
    assert code == 2 and "steps: the store has 2, you ask for 3" in errors and errors.count("\n") == 1
    code, said, _ = run("eval", out, "-b", "shapes-mmvp:9", "--conditions", "own,text", "--max-new-tokens", "2")
    scores = pd.read_csv(out / "eval" / "scores.csv")
    assert code == 0 and scores["condition"].tolist() == ["own", "own", "text", "text"] and "shapes-mmvp-0" in said
    points = pd.DataFrame({"condition": "own", "id": ["a", "b"], "category": "conv", "question": "?", "output": ["x", "y"],
                           "reference_points": 8, "output_points": [8, 4]})  # fmt: skip
    points.to_csv(tmp_path / "to_judge.csv", index=False)
    code, said, _ = run("score", tmp_path / "to_judge.csv")
    assert code == 0 and "0.750" in said and pd.read_csv(tmp_path / "judged_scores.csv")["value"].tolist() == [0.75, 0.75]
    ShapesDataset(1)[0].load().save(tmp_path / "scene.png")
    code, said, _ = run("chat", out, tmp_path / "scene.png", "Is there a red star?", "--attention", tmp_path / "heat.png")
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
        code, _, errors = run(*arguments)
        assert code == 2 and message in errors and errors.count("\n") == 1, (arguments, errors)
