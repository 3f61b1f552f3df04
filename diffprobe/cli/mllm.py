"""Commands around language models: the leakage audit and the fused model."""

from __future__ import annotations

import contextlib
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffprobe.cli import options as shared
from diffprobe.cli.entry import leakage_app, mllm_app
from diffprobe.cli.options import argument, completes, option, say, say_next, several, show

if TYPE_CHECKING:
    import pandas as pd

SITE = "U-L1-R1-B0-Cross-Q"
MODEL = "Diffusion model: hub id, folder, or embedded name."
TEMPLATE = "How the language model is spoken to: its own chat template when empty, v1 for Vicuna"
ARMS = (
    "BASE[+dropNN][/MITIGATION]; BASE: U no prompt, M own caption, X mismatched, Q question; "
    "MITIGATION: centred, gated, erased, or a knock-out."
)
BENCHMARKS = "shapes-vqa:N, shapes-mmvp:N, KIND:SOURCE, jsonl:FILE?images=FOLDER, ...; may be repeated."
CONDITIONS = "own, and without looking blank, text; unprompted and irrelevant test what the prompt does."
RUN = argument(..., "A folder that 'diffprobe mllm train' filled.", "RUN")


@leakage_app.command("run")
@shared.in_panels(
    what="data test arms sites timesteps guidance seeds conditions knockouts request candidates ranked seed",
    where="out",
    how="model language_model language_dtype template steps batch learning_rate grid batch_rows device",
    start="dry_run",
)
def leakage_run(
    out: Path = option(..., "The run's folder. The same command goes on where it was cut off.", "--out", "-o"),
    store: list[str] = argument([], "Stores of training images, whose features are used where they fit.", "[STORE]..."),
    model: str = option("", MODEL, "--model", "-m", show_default="the store's, else shapes-sd"),
    data: str = option("", "To train on.", "--data", "-d", show_default="the store's, else shapes:1500?split=train"),
    test: str = option("shapes:100?split=test", "Held-out images, with several captions each."),
    language_model: str = shared.LANGUAGE_MODEL,
    language_dtype: str = option("auto", "float32, bfloat16, float16; auto is float32 on a CPU, else bfloat16."),
    template: str = option("", f"{TEMPLATE}."),
    arms: list[str] = several(["U", "M", "M+drop30"], ARMS),
    sites: list[str] = several([SITE], "Names, paths or globs."),
    timesteps: list[int] = several([50], "Training timesteps.", "--timesteps", "-t"),
    guidance: list[float] = several([1, 1.5, 4], "s of f_u + s (f_c - f_u)."),
    seeds: int = option(3, "Projectors of each kind; fewer than 3 say little of other projectors.", min=1),
    conditions: list[str] = several([], "Test conditions; all of them when empty."),
    knockouts: list[str] = several([], "Routes cut at test time: start, eos_and_padding, content, empty[@first:K|@GLOB]."),
    request: str = option("Describe the image.", "What the language model is asked."),
    steps: int = option(400, "Training steps of a projector.", min=1),
    batch: int = option(32, "Images of a step.", min=1),
    learning_rate: float = option(0.001, "The highest; it falls to zero along a cosine.", min=0),
    grid: int = option(6, "Tokens on a side of an image.", min=1),
    candidates: int = option(100, "Texts that the fed one is ranked among.", min=2),
    ranked: int = option(64, "Test images for which it is ranked; 0 for none.", min=0),
    seed: int = option(0, "Seed of the features' noise."),
    batch_rows: int = shared.BATCH_ROWS,
    device: str | None = shared.DEVICE,
    dry_run: bool = shared.DRY_RUN,
) -> None:
    """Train projectors into a frozen language model, and let them describe images whose features were given other texts."""
    options = locals()
    from diffprobe.mllm.leakage import Settings
    from diffprobe.mllm.leakage_run import run as start
    from diffprobe.mllm.verdict import CONDITIONS as EVERY
    from diffprobe.store import store_info

    origin = store_info(store[0]) if store else {}
    settings = shared.configured(
        Settings,
        options,
        model=model or (origin["request"]["model"] if store else "shapes-sd"),
        data=data or (origin["data"] if store else "shapes:1500?split=train"),
        noise_seed=origin["request"]["seed"] if store else seed,
    )
    start(
        out, settings, arms=arms, sites=sites, timesteps=timesteps, guidance=guidance, seeds=seeds,
        conditions=conditions or EVERY, knockouts=knockouts, stores=store, device=device, dry_run=dry_run, tell=say,
    )  # fmt: skip
    if not dry_run and shared.is_first_process():
        say_next(["leakage", "report", str(out)])


@leakage_app.command("audit")
def leakage_audit(
    features: str = argument(..., "A store, or an .npz with the arrays features (sample, ...) and ids.", "FEATURES"),
    captions: Path | None = option(None, "What the model was told, by id: CSV, JSON lines, Parquet; a store has it."),
    null: Path | None = option(None, "An .npz of the same samples' features without a prompt; a store may have them."),
    sites: list[str] = several(
        [], "Sites of a store; all that have features by default.", autocompletion=completes(shared.stored_sites)
    ),
    conditioning: list[str] = several([], "Conditionings of a store; all with a text by default."),
    permutations: int = option(199, "Of texts over samples.", min=1),
    out: str = option("", "The table (CSV).", "--out", "-o", show_default="beside the features"),
    seed: int = option(0, "Of folds, permutations and bootstrap."),
) -> None:
    """What of its prompt can be read off features from anywhere, by linear readers: no model, weaker evidence than a run."""
    import pandas as pd

    from diffprobe.mllm.audit import WEAKER, audit, cells_of_file, cells_of_store
    from diffprobe.rundir import write_whole

    target = shared.table_place(out, features, "audit")
    cells = (
        cells_of_file(features, captions, null) if features.endswith(".npz") else cells_of_store(features, sites, conditioning)
    )
    frames = []
    for place, values, texts, reference in cells:
        frames.append(audit(values, texts, reference, n_permutations=permutations, seed=seed).assign(**place))
    frame = pd.concat(frames, ignore_index=True)
    write_whole(target, frame.to_csv(index=False))
    places = {name: f"{{{name}}}" for name in ("site", "timestep", "conditioning") if name in frame}
    ranks = [{str(name): value for name, value in row.items()} for row in frame[frame["kind"] == "rank"].to_dict("records")]
    for row in ranks:
        row["adds"] = (
            "" if pd.isna(row.get("gain")) else f"{row['gain']:+.3f} [{row['gain_low']:+.3f}, {row['gain_high']:+.3f}]"
        )
    columns = {
        "own text's rank": "{value:.3f}",
        **shared.INTERVAL,
        "chance": "{chance:.1f}",
        "permuted": "{control:.3f}",
        "p": "{p:.3g}",
    }
    show(ranks, {**places, **columns, "over no prompt": "{adds}", "n": "{n}"})
    found = frame[(frame["kind"] != "rank") & (frame["p"] < 0.05)].sort_values("value", ascending=False)
    named = list(dict.fromkeys(found["name"]))
    say(
        f"{len(named)} words can be read ({', '.join(named[:8]) or 'none'}); every word's area under the ROC curve is in {target}"
    )
    say("Under an image's own caption they may be seen in the image; under another's ('mismatched') they are the prompt's.")
    say(WEAKER)


@leakage_app.command("report")
def leakage_report(
    run: Path = argument(..., "A folder that 'diffprobe leakage run' filled.", "RUN"),
    out: Path | None = option(None, "Folder for tables and figures.", "--out", "-o", show_default="RUN/report"),
    n_examples: int = option(2, "Images whose texts are shown side by side.", "--examples", min=1),
    metrics: list[str] = several([], "Of caption recovery: cider_d, bleu, rouge_l, content_f1, exact, substring, minilm."),
) -> None:
    """The verdict in a sentence, scores, caption recovery, examples and figures, from the kept files; needs no torch."""
    from diffprobe.mllm.leakage import leakage_report as judge
    from diffprobe.mllm.leakage import save_report

    found = judge(run, n_examples=n_examples, metrics=metrics or None)
    for line in found.sentences:
        say(line)
    cell = {"": "{control}", "arm": "{arm}", "site": "{site}", "t": "{timestep}", "s": "{guidance}", "condition": "{condition}"}
    columns = {"leak": "{leak}", "sight": "{sight}", "CIDEr-D fed": "{fed}", "CIDEr-D image": "{references}"}
    say()
    show(found.summary(), cell | columns)
    recovered = found.recovered()
    say("\nRecovery of captions", style="bold")
    scored = {name: f"{{{name}}}" for name in recovered.columns[8:]}
    show(recovered, {**cell, "against": "{score}", "n": "{n}", **scored})
    for row in found.examples.to_dict("records"):
        say(f"\n{row.pop('condition')}, {row.pop('sample')}", style="bold")
        for name, text in row.items():
            say(f"  {name:<28} {text}")
    paths = save_report(found, out or run / "report")
    say("\nTables and pictures:")
    for path in paths:
        say(f"  {path}")


@mllm_app.command("train")
@shared.in_panels(
    what="captions instructions language_model template encoder model fusion sites timestep guidance grid merge seed",
    where="out cache checkpoint_every",
    how="tune recipe steps batch learning_rate accumulate checkpointing precision device",
    start="dry_run force",
)
def mllm_train(
    out: Path = option(..., "Folder of the model. The same command goes on where it was cut off.", "--out", "-o"),
    captions: str = option(
        "shapes-details:3000", "Stage 1: shapes-details:N, shapes-captions:N, or llava:FILE.json?images=FOLDER."
    ),
    instructions: str = option("shapes-instruct:6000", "Stage 2: shapes-instruct:N, or llava:FILE.json?images=FOLDER."),
    language_model: str = shared.LANGUAGE_MODEL,
    template: list[str] = several([], f"{TEMPLATE}; plain,v1 are those of LLaVA's two stages."),
    encoder: str = option("shapes-clip", "CLIP: hub id, folder or embedded name."),
    model: str = option("shapes-sd", MODEL, "--model", "-m"),
    fusion: str = option("cross_attention", "clip, diffusion, concat, sequence, interleave or cross_attention."),
    sites: list[str] = several([SITE], "Of the diffusion model: names, paths or globs."),
    timestep: int = option(50, "Of the noise on the image.", "--timestep", "-t", min=0),
    guidance: float = option(4.0, "s of f_u + s (f_c - f_u); 0 never reads the question."),
    grid: int = option(8, "Tokens on a side of an image.", min=1),
    merge: str = option("mean", "Places of a token: mean, or stack (side by side)."),
    tune: str = option("full", "Of the language model in stage 2: full, lora or none."),
    recipe: str = option("", "llava, or small for the embedded models.", show_default="small for shapes-lm, else llava"),
    steps: list[int] = several([], "Of stages 1 and 2, such as 300,600; the recipe's when empty."),
    batch: list[int] = several([], "Of stages 1 and 2, likewise."),
    learning_rate: list[float] = several([], "Of stages 1 and 2, likewise."),
    accumulate: int = option(1, "Forward passes that share a step.", min=1),
    checkpointing: bool = option(False, "Save memory: activations are computed twice.", "--checkpointing"),
    precision: str = option("", "no (float32), bf16 (autocast), or auto: bf16 on a GPU.", show_default="the recipe's"),
    cache: bool = option(True, "Keep what the encoders saw in OUT/features."),
    seed: int = option(0, "Seed of the first weights and the order."),
    device: str | None = shared.DEVICE,
    checkpoint_every: int | None = option(None, "Steps between two checkpoints.", min=1, show_default="the recipe's"),
    dry_run: bool = shared.DRY_RUN,
    force: bool = shared.FORCE,
) -> None:
    """Two stages: the fusion on captions, with no prompt; then the language model too, on questions that are the prompt."""
    options = locals()
    from dataclasses import replace

    from diffprobe.data.conversations import load_conversations
    from diffprobe.mllm.config import RECIPES, FusedConfig
    from diffprobe.mllm.model import FusedMLLM
    from diffprobe.mllm.stages import train_fused
    from diffprobe.mllm.streams import FeatureCache

    recipe = recipe or ("small" if language_model == "shapes-lm" else "llava")
    if recipe not in RECIPES or tune not in ("full", "lora", "none"):
        raise ValueError(f"--recipe is {' or '.join(RECIPES)} and --tune full, lora or none; got {recipe!r} and {tune!r}.")
    changes: list[dict[str, Any]] = [{"seed": seed, "accumulate": accumulate, "checkpointing": checkpointing} for _ in range(2)]
    for name in ("steps", "batch", "learning_rate"):
        values = options[name]
        if len(values) not in (0, 2):
            given = ",".join(map(str, values))
            raise ValueError(f"--{name.replace('_', '-')} takes one number for each of the two stages; got {given!r}.")
        for change, value in zip(changes, values, strict=False):
            change[name] = value
    changes[1]["tune"] = "" if tune == "none" else tune
    *before, spoken = template or [""]
    changes[0]["template"] = before[0] if before else ""
    for name, value in (("precision", precision), ("evaluate_every", checkpoint_every)):
        changes = [change | ({name: value} if value else {}) for change in changes]
    first, second = (replace(stage, **change) for stage, change in zip(RECIPES[recipe], changes, strict=True))
    config = shared.configured(FusedConfig, options, template=spoken, diffusion=model, sites=tuple(sites))
    data = load_conversations(captions), load_conversations(instructions)
    fused = FusedMLLM.build(config, device, cache=FeatureCache(out / "features") if cache else None)
    speaks = shared.is_first_process()
    tell = say if speaks else lambda line: None
    train_fused(fused, *data, out, (first, second), dry_run=dry_run, force=force, log=tell)
    if speaks and not dry_run:
        say_next(["mllm", "eval", str(out)])
        say(f"'diffprobe mllm chat {shlex.quote(str(out))} IMAGE QUESTION' asks about a picture of yours.")


@mllm_app.command("eval")
def mllm_eval(
    run: Path = RUN,
    benchmark: list[str] = option([], BENCHMARKS, "--benchmark", "-b", show_default="the four drawn ones"),
    conditions: list[str] = several(["own", "blank", "text"], CONDITIONS),
    out: Path | None = option(None, "Folder for the tables.", "--out", "-o", show_default="RUN/eval"),
    batch: int = option(32, "Questions answered together.", min=1),
    max_new_tokens: int = option(32, "Of an answer.", min=1),
    device: str | None = shared.DEVICE,
) -> None:
    """Answer benchmarks; scores with intervals, beside chance and two blind baselines."""
    from diffprobe.data.question_benchmarks import load_questions
    from diffprobe.mllm.judging import DRAWN, judge_all
    from diffprobe.mllm.model import FusedMLLM

    benchmarks = [load_questions(spec) for spec in benchmark or DRAWN]
    model = FusedMLLM.from_pretrained(run, device)
    folder = out or run / "eval"
    scores = judge_all(model, benchmarks, folder, conditions, batch=batch, max_new_tokens=max_new_tokens, tell=say)
    if len(scores):
        _show_scores(scores)
    if model.cut_prompts:
        say(f"{model.cut_prompts} questions were longer than the diffusion model's text encoder takes, and were cut.")
    say("\nWritten: " + ", ".join(str(folder / name) for name in ("scores.csv", "answers.csv")[not len(scores) :]))


@mllm_app.command("score")
def mllm_score(
    judged: Path = argument(..., "The to_judge.csv of 'mllm eval', its points filled in.", "FILE"),
) -> None:
    """Scores of LLaVA-Bench from the points that a judge gave; they are written to judged_scores.csv beside the file."""
    from diffprobe.mllm.judging import score_judged
    from diffprobe.rundir import write_whole

    scores = score_judged(judged)
    _show_scores(scores)
    out = judged.with_name("judged_scores.csv")
    write_whole(out, scores.to_csv(index=False, lineterminator="\n"))
    say(f"\nWritten: {out}")


def _show_scores(scores: pd.DataFrame) -> None:
    columns = {"benchmark": "{benchmark}", "score": "{score}", "group": "{group}", "shown": "{condition}",
               "value": "{value:.3f}", "95% interval": "[{low:.3f}, {high:.3f}]", "chance": "{chance:.3f}", "n": "{n}",
               "unread": "{unparsed}"}  # fmt: skip
    show(scores, columns)


@mllm_app.command("chat")
@shared.in_panels(what="more attention", how="temperature top_p seed max_new_tokens device")
def mllm_chat(
    run: Path = RUN,
    image: Path = argument(..., "A photograph or drawing.", "IMAGE"),
    question: str = argument("", "What to ask about it; without one, a conversation begins.", "[QUESTION]"),
    more: list[Path] = option([], "More images, after the first. May be repeated.", "--image"),
    attention: Path | None = option(None, "Draw where the question's words attend over the first image: NAME.png."),
    temperature: float = option(0.0, "Draw tokens from softmax(logits / temperature); 0 takes the likeliest."),
    top_p: float = option(1.0, "Draw among the fewest tokens that have this share together."),
    seed: int = option(0, "Of the draws."),
    max_new_tokens: int = option(64, "Of an answer.", min=1),
    device: str | None = shared.DEVICE,
) -> None:
    """Answer questions about images, one after the other, and show where the attention went."""
    from diffprobe.data.images import read_image
    from diffprobe.mllm.chat import CUT, Chat, converse, save_attention
    from diffprobe.mllm.config import Sampling
    from diffprobe.mllm.model import FusedMLLM

    sampling = Sampling(temperature, top_p, seed)
    if attention and not question:
        raise ValueError("--attention draws the words of one QUESTION; in a conversation, type /attention NAME.png.")
    images = [read_image(path) for path in (image, *more)]
    model = FusedMLLM.from_pretrained(run, device)
    chat = Chat(model, images, sampling, max_new_tokens)
    if not question:
        converse(chat, _typed_lines(), say)
        return
    answer = chat.ask(question)
    say(answer)
    if model.cut_prompts:
        say(CUT)
    if attention:
        say(f"Drew {save_attention(model, images[0], question, answer, attention)}")


@mllm_app.command("serve")
def mllm_serve(
    run: Path = RUN,
    host: str = option("127.0.0.1", "Address that listens; 0.0.0.0 lets other machines in."),
    port: int = option(7860, "Of the page.", min=1, max=65535),
    max_new_tokens: int = option(64, "Of an answer.", min=1),
    device: str | None = shared.DEVICE,
) -> None:
    """A page in the browser: upload, ask, see the attention, and the answer under an irrelevant prompt beside it."""
    from diffprobe.mllm.model import FusedMLLM
    from diffprobe.mllm.serve import library, serve

    library()  # before the model is loaded, which takes a while
    serve(FusedMLLM.from_pretrained(run, device), host, port, max_new_tokens, say)


def _typed_lines() -> Iterator[str]:
    """What a person types, after a prompt and with the keys of readline, or the lines of a pipe."""
    if not sys.stdin.isatty():
        yield from sys.stdin
        return
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401
    say("Ask about the image. /help shows what else can be typed.")
    with contextlib.suppress(EOFError):
        while True:
            yield input("> ")
