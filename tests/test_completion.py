"""What the shell completes, asked as the shell asks it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from diffprobe.models import load_model
from diffprobe.zoo import WEIGHTS

ASK = """
import sys
sys.argv[0] = "diffprobe"
from diffprobe.cli import main
try:
    main()
finally:
    assert "torch" not in sys.modules, "completing takes no torch"
"""


def completed(words: str) -> list[str]:
    environment = {"COMP_WORDS": words, "COMP_CWORD": str(len(words.split(" ")) - 1), "_DIFFPROBE_COMPLETE": "complete_bash"}
    command = [sys.executable, "-c", "import os; os.environ.update(" + repr(environment) + ")\n" + ASK]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return done.stdout.split()


def test_the_sites_of_an_embedded_model_are_those_that_its_modules_have() -> None:
    found = completed("diffprobe extract --model shapes-sd --sites cross,D-L")
    assert found and {name.removeprefix("cross,") for name in found} == {
        site.name for site in load_model("shapes-sd", "cpu").sites if site.name.startswith("D-L")
    }
    assert (WEIGHTS / "shapes-sd" / "unet").is_dir()


def test_presets_are_completed_for_every_model() -> None:
    assert completed("diffprobe extract --model nowhere/to-be-found --maps c") == ["cross"]


def test_the_sites_of_a_store(tmp_path: Path, tiny_model: object) -> None:
    from diffprobe import extract

    extract(tiny_model, "shapes:1", tmp_path / "s.zarr", sites=["U-L2-R2-Res-Out", "M-Out"], timesteps=[50], progress=False)  # type: ignore[arg-type]
    assert completed(f"diffprobe probe linear {tmp_path / 's.zarr'} --seed 1 --sites U") == ["U-L2-R2-Res-Out"]
    assert completed(f"diffprobe probe linear {tmp_path / 'none.zarr'} --sites U") == []


@pytest.mark.parametrize(
    ("words", "expected"), [("--set language_m", ["language_model="]), ("--arms CLI", ["CLIP"]), ("--arm", ["--arms"])]
)
def test_settings_and_arms_of_the_experiments(words: str, expected: list[str]) -> None:
    assert completed(f"diffprobe reproduce {words}") == expected
