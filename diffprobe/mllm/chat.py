"""Questions about pictures, one after the other, and where a question's words attended in the diffusion model."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
import xarray as xr
from PIL import Image
from torch.nn import functional

from diffprobe.conditioning import FUNCTION_WORDS, word_tokens
from diffprobe.data.images import fit_image, read_image
from diffprobe.data.samples import did_you_mean
from diffprobe.mllm.config import GREEDY, Sampling
from diffprobe.mllm.fusion import DIFFUSION
from diffprobe.mllm.language import Turn
from diffprobe.mllm.model import FusedMLLM
from diffprobe.mllm.streams import DiffusionEncoder, Picture
from diffprobe.recorder import Recorder


class Chat:
    """A conversation about images.

    What was said stands in the language model's input before each question, whose own words are the diffusion model's prompt: the
    images are seen anew in every turn.  The oldest turns are forgotten where the language model cannot read all.

    Args:
        images: as for `FusedMLLM.answer`.
        sampling: how each answer is chosen.

    Attributes:
        turns: what was said and is remembered.
        forgotten: turns that were too long to be remembered.
    """

    def __init__(
        self, model: FusedMLLM, images: Sequence[Image.Image], sampling: Sampling = GREEDY, max_new_tokens: int = 64
    ) -> None:
        self.model, self.images, self.sampling, self.max_new_tokens = model, list(images), sampling, max_new_tokens
        self.turns: list[Turn] = []
        self.forgotten = 0

    def ask(self, question: str) -> str:
        """The answer, which is remembered."""
        language = self.model.language
        room = getattr(language.model.config.get_text_config(), "max_position_embeddings", None)
        while self.turns and room is not None:
            read = sum(map(len, language.prompt(question, bool(self.images), self.turns)))
            if read + len(self.images) * self.model.soft_tokens + self.max_new_tokens <= room:
                break
            del self.turns[0]
            self.forgotten += 1
        (answer,) = self.model.answer(
            [self.images], [question], max_new_tokens=self.max_new_tokens, histories=[self.turns], sampling=self.sampling
        )
        self.turns.append((question, answer))
        return answer

    def reset(self, images: Sequence[Image.Image] | None = None) -> None:
        """Forget what was said, and look at other images if they are given."""
        self.images = self.images if images is None else list(images)
        self.turns, self.forgotten = [], 0


CUT = "The diffusion model's text encoder could not take the whole question; it was cut."
COMMANDS = {
    "/image FILE ...": "look at other images, and forget what was said",
    "/reset": "forget what was said",
    "/attention NAME.png": "draw where the last question's words attended over the first image",
    "/help": "show these commands",
    "/quit": "end, as Ctrl-D does",
}


def converse(chat: Chat, lines: Iterable[str], tell: Callable[[str], None]) -> None:
    """Answer each line; those that begin with a slash are `COMMANDS`.  A mistake is told, and the conversation goes on."""
    for line in map(str.strip, lines):
        try:
            if line == "/quit":
                break
            if line.startswith("/"):
                tell(_command(chat, *shlex.split(line)))
            elif line:
                before = chat.forgotten, chat.model.cut_prompts
                tell(chat.ask(line))
                if chat.forgotten > before[0]:
                    tell(f"(The first {chat.forgotten} turns are forgotten: the language model cannot read more at once.)")
                if chat.model.cut_prompts > before[1]:
                    tell(CUT)
        except (ValueError, OSError) as error:
            tell(str(error))


def _command(chat: Chat, name: str, *files: str) -> str:
    """Do what a command says; what there is to tell."""
    if name == "/image" and files:
        chat.reset([read_image(Path(file)) for file in files])
        return f"Looking at {', '.join(files)}."
    if name == "/reset" and not files:
        chat.reset()
        return "Forgotten."
    if name == "/attention" and len(files) == 1:
        if not chat.turns:
            raise ValueError("Nothing was asked yet; ask first, then draw.")
        return f"Drew {save_attention(chat.model, chat.images[0], *chat.turns[-1], files[0])}"
    known = [command.split()[0] for command in COMMANDS]
    wrong = (
        "" if name == "/help" else f"{' '.join([name, *files])!r} cannot be done.{did_you_mean(name, set(known) - {name})}\n"
    )
    return wrong + "\n".join(f"{command:<20} {what}" for command, what in COMMANDS.items())


def question_attention(
    model: FusedMLLM, image: Image.Image, question: str, maps: str | Sequence[str] = "cross"
) -> xr.DataArray:
    """Cross-attention of the question's words over the picture: dims (word, y, x), averaged over heads, tokens and sites.

    Maps of different sizes are enlarged to the largest; each sums to one over its places first, so that none outweighs the
    others.  The picture is seen as the model sees it, noise included.

    Args:
        maps: sites of maps; all cross-attention by default.

    Raises:
        ValueError: the model has no diffusion model, or the question no word that says something.
    """
    encoder = model.streams.encoders.get(DIFFUSION)
    if not isinstance(encoder, DiffusionEncoder) or encoder.control:
        raise ValueError(f"Fusion {model.config.fusion!r} has no diffusion model, so no word of the question attends anywhere.")
    text = encoder.model.encode_text([question])
    spans = [(int(start), int(end)) for start, end in text.spans[0].tolist()]
    named = dict.fromkeys(word.strip("?!.,;:\"'()") for word in question.split())
    places = {word: word_tokens(question, word, spans) for word in named if word and word.lower() not in FUNCTION_WORDS}
    places = {word: found for word, found in places.items() if found}
    if not places:
        raise ValueError(f"The question {question!r} has no word that the diffusion model's text encoder was given whole.")
    recorded = encoder.record(Recorder(encoder.model, maps=maps, stop_early=True), [Picture.of(image)], [question])
    tokens = [tensor[0, 0].float() for tensor in recorded.values()]  # (token, y, x); heads are averaged already
    size = (max(x.shape[-2] for x in tokens), max(x.shape[-1] for x in tokens))
    heat = []
    for found in places.values():
        one = [x[found].mean(0) for x in tokens]
        large = [
            functional.interpolate((x / x.sum())[None, None], size, mode="bilinear", align_corners=False)[0, 0] for x in one
        ]
        heat.append(torch.stack([x / x.sum() for x in large]).mean(0))
    return xr.DataArray(
        torch.stack(heat).cpu().numpy(), dims=("word", "y", "x"), coords={"word": np.array(list(places), dtype=object)}
    )


def save_attention(model: FusedMLLM, image: Image.Image, question: str, answer: str, out: str | Path) -> Path:
    """Draw `question_attention` over the picture: NAME.png, .pdf, .csv and .json.

    Args:
        out: the picture's path; its suffix is ignored.
    """
    from diffprobe.figures import plot_heatmaps
    from diffprobe.plotting import save_figure

    heat, path = question_attention(model, image, question), Path(out)
    encoder = model.streams.encoders[DIFFUSION]
    assert isinstance(encoder, DiffusionEncoder)
    shown = np.asarray(fit_image(image.convert("RGB"), encoder.model.size, encoder.fit))
    figure = plot_heatmaps(shown, heat, title=f"{question} {answer}")
    rows = heat.to_dataframe(name="attention").reset_index()
    about = {"question": question, "answer": answer, "timestep": encoder.timestep, "model": model.config.diffusion}
    alt = f"Where the words of the question '{question}' attend over the picture; the model answers '{answer}'."
    return save_figure(figure, path.parent, path.stem, rows, about, alt)["png"]
