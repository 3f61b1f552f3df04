"""One question about one picture: the answer, and where the question's words attended in the diffusion model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import xarray as xr
from PIL import Image
from torch.nn import functional

from diffprobe.conditioning import FUNCTION_WORDS, word_tokens
from diffprobe.data.images import fit_image
from diffprobe.mllm.fusion import DIFFUSION
from diffprobe.mllm.model import FusedMLLM
from diffprobe.mllm.streams import DiffusionEncoder, Picture
from diffprobe.recorder import Recorder


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
