"""Tiny random-weight pipelines of every supported family, built from config, offline.

Each has the topology of the real thing (so that every path exists) and a few channels (so that a forward pass takes
milliseconds).  Query and key weights are enlarged: freshly drawn ones give nearly even attention maps, in which a swapped
axis or head could not be seen.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"
os.environ["DIFFUSERS_VERBOSITY"] = "error"
os.environ.setdefault("OMP_NUM_THREADS", "1")

from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import jaxtyping
import pytest

# On the torch side, where axes have no names, every shape in a signature is checked in every test.
CHECKED = ("edit", "forward", "knockout", "matching", "models", "noise", "prompts", "recorder", "sites", "tap", "tokens")
CHECKED_MLLM = ("config", "fusion", "language", "model", "projector", "stages", "streams", "train")
jaxtyping.install_import_hook(
    [f"diffprobe.{name}" for name in CHECKED] + [f"diffprobe.mllm.{name}" for name in CHECKED_MLLM], "beartype.beartype"
)

FAMILIES = ("sd1", "sd2", "sd2v", "sdxl", "pixart")
CLIP_WORDS = ("a", "an", "red", "blue", "circle", "on", "the", "left", "of")
T5_PIECES = ("▁a", "▁red", "▁blue", "▁circle", "▁st", "ar", "▁on", "▁the", "▁left", "▁of")


def clip_tokenizer(pad_token: str) -> Any:
    """Byte-pair tokenizer that knows a few words; "star" is two sub-tokens, all else is letters. "!" is number 0."""
    from tokenizers import pre_tokenizers
    from transformers import CLIPTokenizer

    merges = [("s", "t"), ("a", "r</w>")]
    for word in CLIP_WORDS:
        pieces = [*word[:-1], f"{word[-1]}</w>"]
        while len(pieces) > 1:
            merges.append((pieces[0], pieces[1]))
            pieces = [pieces[0] + pieces[1], *pieces[2:]]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet(), key=ord)
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), *("".join(pair) for pair in merges)]
    tokens = [*dict.fromkeys(tokens), "<|startoftext|>", "<|endoftext|>"]
    vocab = {token: number for number, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocab, merges=list(dict.fromkeys(merges)), pad_token=pad_token, model_max_length=77)


def t5_tokenizer() -> Any:
    from transformers import T5Tokenizer

    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    letters = [(letter, -9.0) for letter in "▁abcdefghijklmnopqrstuvwxyz0123456789,.!?"]
    return T5Tokenizer(vocab=[*special, *letters, *((piece, -2.0) for piece in T5_PIECES)], extra_ids=0, model_max_length=512)


def clip_encoder(tokenizer: Any, with_projection: bool = False) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        projection_dim=16, max_position_embeddings=77, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    return CLIPTextModelWithProjection(config) if with_projection else CLIPTextModel(config)


def build_pipeline(family: str, **network_options: Any) -> Any:
    """A fresh pipeline; the same family always has the same weights."""
    import diffusers
    import torch

    torch.manual_seed(FAMILIES.index(family))
    parts: dict[str, Any] = {
        "vae": diffusers.AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, block_out_channels=(8, 8),
            layers_per_block=1, latent_channels=4, norm_num_groups=4, sample_size=16,
            scaling_factor=0.13025 if family == "sdxl" else 0.18215,
        )
    }  # fmt: skip
    schedule = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
    unet: dict[str, Any] = {"sample_size": 8, "layers_per_block": 2, "norm_num_groups": 4, "cross_attention_dim": 16}
    if family == "pixart":
        from transformers import T5Config, T5EncoderModel

        parts["tokenizer"] = t5_tokenizer()
        parts["text_encoder"] = T5EncoderModel(
            T5Config(vocab_size=len(parts["tokenizer"]), d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
        )
        options = {"num_layers": 2, "sample_size": 8, "use_additional_conditions": False} | network_options
        network = parts["transformer"] = diffusers.PixArtTransformer2DModel(
            num_attention_heads=3, attention_head_dim=8, in_channels=4, out_channels=8, cross_attention_dim=24,
            caption_channels=16, **options,
        )  # fmt: skip
        parts["scheduler"] = diffusers.DPMSolverMultistepScheduler(beta_start=0.0001, beta_end=0.02, solver_order=2)
        pipeline = diffusers.PixArtAlphaPipeline(**parts)
    elif family == "sdxl":
        parts |= {"tokenizer": clip_tokenizer("<|endoftext|>"), "tokenizer_2": clip_tokenizer("!")}
        parts |= {"text_encoder": clip_encoder(parts["tokenizer"])}
        parts |= {"text_encoder_2": clip_encoder(parts["tokenizer_2"], with_projection=True)}
        options = unet | {"cross_attention_dim": 32, "attention_head_dim": (1, 2, 2)} | network_options
        network = parts["unet"] = diffusers.UNet2DConditionModel(
            block_out_channels=(8, 16, 16), down_block_types=("DownBlock2D",) + ("CrossAttnDownBlock2D",) * 2,
            up_block_types=("CrossAttnUpBlock2D",) * 2 + ("UpBlock2D",), transformer_layers_per_block=(1, 1, 2),
            use_linear_projection=True, addition_embed_type="text_time", addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=6 * 8 + 16, **options,
        )  # fmt: skip
        parts["scheduler"] = diffusers.EulerDiscreteScheduler(**schedule, timestep_spacing="leading")
        pipeline = diffusers.StableDiffusionXLPipeline(**parts, force_zeros_for_empty_prompt=True, add_watermarker=False)
    else:
        parts["tokenizer"] = clip_tokenizer("<|endoftext|>" if family == "sd1" else "!")
        parts["text_encoder"] = clip_encoder(parts["tokenizer"])
        heads = (
            {"attention_head_dim": 2}
            if family == "sd1"
            else {"attention_head_dim": (1, 2, 2, 2), "use_linear_projection": True}
        )
        network = parts["unet"] = diffusers.UNet2DConditionModel(
            block_out_channels=(8, 16, 16, 16), down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
            up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3, upcast_attention=family == "sd2v",
            **(unet | heads | network_options),
        )  # fmt: skip
        if family == "sd1":
            parts["scheduler"] = diffusers.PNDMScheduler(**schedule, skip_prk_steps=True)
        else:
            prediction = "v_prediction" if family == "sd2v" else "epsilon"
            parts["scheduler"] = diffusers.DDIMScheduler(**schedule, clip_sample=False, prediction_type=prediction)
        pipeline = diffusers.StableDiffusionPipeline(
            **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
        )
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if name.endswith(("to_q.weight", "to_k.weight")):
                parameter.mul_(4)
    for part in parts.values():
        if isinstance(part, torch.nn.Module):
            part.eval().requires_grad_(False)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def pytest_configure(config: pytest.Config) -> None:
    """Warnings of diffusers' own calls into its neighbours."""
    np_array = "ignore:__array__ implementation doesn't accept a copy:DeprecationWarning"  # schedulers call np.array(tensor)
    hub = "ignore:The .local_dir_use_symlinks. argument is deprecated:UserWarning"
    for line in (np_array, hub):
        config.addinivalue_line("filterwarnings", line)


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def fresh_pipeline() -> Callable[..., Any]:
    """`fresh_pipeline(family, **network_options)`: a pipeline that a test may change."""
    return build_pipeline


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`model_folder(family)`: the tiny pipeline saved as diffusers saves it; for reading only."""

    @cache
    def saved(family: str) -> Path:
        folder = tmp_path_factory.mktemp("models") / family
        build_pipeline(family).save_pretrained(folder)
        return folder

    return saved


@pytest.fixture(scope="session")
def tiny() -> Callable[[str], Any]:
    """`tiny(family)`: one shared `DiffusionModel`, not to be changed."""
    from diffprobe.models import DiffusionModel

    return cache(lambda family: DiffusionModel(build_pipeline(family), model_id=f"tiny-{family}"))


@pytest.fixture(scope="session", params=FAMILIES)
def model(request: pytest.FixtureRequest, tiny: Callable[[str], Any]) -> Any:
    """The shared tiny model of each family in turn."""
    return tiny(request.param)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved Stable Diffusion of the drawn world's own words, with the topology of 2.1 and 64 px images."""
    import torch
    from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel

    from recipes import sd

    torch.manual_seed(0)
    tokenizer = sd.build_tokenizer(sd.Config())
    unet = UNet2DConditionModel(
        sample_size=16, in_channels=4, out_channels=4, block_out_channels=(8, 16, 16, 16), layers_per_block=2, norm_num_groups=4,
        down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",), up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
        cross_attention_dim=128, attention_head_dim=(1, 2, 2, 2), use_linear_projection=True,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("models") / "tiny-shapes-sd"
    StableDiffusionPipeline(
        vae=sd.build_vae(), text_encoder=sd.build_text_encoder(tokenizer), tokenizer=tokenizer, unet=unet,
        scheduler=DDIMScheduler.from_config(sd.build_scheduler().config, prediction_type="epsilon"), safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    ).save_pretrained(folder)  # fmt: skip
    return folder


@pytest.fixture(scope="session")
def tiny_model(tiny_folder: Path) -> Any:
    """The same, loaded as any other model."""
    from diffprobe.models import load_model

    return load_model(tiny_folder, "cpu")


LANGUAGE_TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def byte_spelling(special: tuple[str, ...], words: tuple[str, ...]) -> Any:
    """A tokenizer that spells any text in bytes and some words as a whole; special tokens have the first numbers."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    vocab = {token: number for number, token in enumerate([*special, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    merges = []
    for word in words:
        for cut in range(1, len(word)):
            merges.append((word[:cut], word[cut]))
            vocab.setdefault(word[: cut + 1], len(vocab))
    spelling = Tokenizer(models.BPE(vocab=vocab, merges=list(dict.fromkeys(merges))))
    spelling.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    spelling.decoder = decoders.ByteLevel()
    return spelling


def build_language(words: tuple[str, ...] = (), width: int = 32) -> Any:
    """A language model of random weights that spells any text in bytes, and some words as a whole.

    Its padding token is its end token, as SmolLM2's.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    from diffprobe.mllm.language import LanguageModel

    spelling = byte_spelling(("<|end|>", "<|user|>", "<|assistant|>"), words)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=spelling, eos_token="<|end|>", pad_token="<|end|>", extra_special_tokens=["<|user|>", "<|assistant|>"]
    )
    tokenizer.chat_template = LANGUAGE_TEMPLATE
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=spelling.get_vocab_size(), hidden_size=width, intermediate_size=2 * width, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, tie_word_embeddings=True, initializer_range=0.2, eos_token_id=0,
        pad_token_id=0,
    )  # fmt: skip
    return LanguageModel(LlamaForCausalLM(config), tokenizer, "tiny")


@pytest.fixture(scope="session")
def language() -> Callable[..., Any]:
    """`language(words, width)`: one shared frozen language model for each choice."""
    return cache(build_language)


@pytest.fixture(scope="session")
def fresh_language() -> Callable[..., Any]:
    """`fresh_language(words, width)`: a language model that a test may train."""
    return build_language


Run = Callable[..., tuple[int, str, str]]


def typed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: str | Path) -> tuple[int, str, str]:
    """Exit code, output and errors of a command line in this process."""
    from diffprobe.cli import main

    monkeypatch.setattr(sys, "argv", ["diffprobe", *map(str, words)])
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main()
    return int(stop.value.code or 0), *capsys.readouterr()


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """`run("info", store)`: exit code, output and errors of a command."""
    return partial(typed, monkeypatch, capsys)


@pytest.fixture
def output(run: Run) -> Callable[..., str]:
    """`output("info", store)`: what a command that ends well says."""

    def found(*words: str | Path) -> str:
        code, said, errors = run(*words)
        assert code == 0, errors
        return said

    return found


@pytest.fixture
def suggested() -> Callable[[str], list[list[str]]]:
    """The commands after "Next:", each as its words behind ``diffprobe``, as a shell would take them apart."""

    def found(output: str) -> list[list[str]]:
        lines = [shlex.split(line) for line in output.partition("Next:\n")[2].splitlines() if line.startswith("  ")]
        assert lines, output
        assert all(words[0] == "diffprobe" and not any(word.isupper() for word in words) for words in lines), lines
        return [words[1:] for words in lines]

    return found


@pytest.fixture
def follow(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], suggested: Callable[[str], list[list[str]]], tmp_path: Path
) -> Callable[[str], list[str]]:  # fmt: skip
    """Types what a command suggests next, each of which must run as it stands; gives their outputs."""

    def follow(output: str) -> list[str]:
        monkeypatch.chdir(tmp_path)
        outputs = []
        for words in suggested(output):
            code, said, errors = typed(monkeypatch, capsys, *words)
            assert code == 0, (words, errors)
            outputs.append(said)
        return outputs

    return follow


@pytest.fixture(scope="session")
def launch() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run a program in several gloo processes: (where to write it, its text, how many)."""

    def call(script: Path, text: str, count: int) -> subprocess.CompletedProcess[str]:
        script.write_text(text, encoding="utf-8")
        command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={count}", "--master-port=0",
                   "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0", str(script)]  # fmt: skip
        return subprocess.run(command, capture_output=True, text=True, timeout=500)

    return call
