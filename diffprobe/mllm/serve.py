"""A page in the browser: ask a fused model about an image, and see what the question's words did (Gradio).

The invariant: the answer beside it is of the same question about the same image; only the diffusion model's prompt is another.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from PIL import Image

from diffprobe.data.images import fit_image
from diffprobe.mllm.chat import question_attention
from diffprobe.mllm.fusion import DIFFUSION
from diffprobe.mllm.model import FusedMLLM
from diffprobe.mllm.streams import DiffusionEncoder
from diffprobe.plotting import overlay
from diffprobe.rundir import optional

IRRELEVANT = "Which fruit lies in the bowl?"
SHOWN = 320  # pixels on a side of a map that is shown, at least
Shown = list[tuple[Image.Image, str]]  # pictures with their captions
ABOUT = (
    "The diffusion model reads the question as its prompt, so the image is seen under it. Beside the answer stands the one under an "
    "irrelevant prompt: where both are alike, the prompt was not what decided. A map shows where a word attends, from its lowest to "
    "its highest value."
)


def reply(
    model: FusedMLLM, image: Image.Image | None, question: str, irrelevant: str = IRRELEVANT, max_new_tokens: int = 64
) -> tuple[str, str, Shown, str]:
    """The answer, the answer under an irrelevant prompt, each word's map over the image, and what else there is to say.

    Raises:
        ValueError: there is no image or no question.
    """
    if image is None or not question.strip():
        raise ValueError("An image and a question are needed: give both, then ask.")
    prompts = [question, irrelevant]
    answer, other = model.answer([[image]] * 2, [question] * 2, prompts=prompts, max_new_tokens=max_new_tokens)
    encoder = model.streams.encoders.get(DIFFUSION)
    if not isinstance(encoder, DiffusionEncoder) or model.config.guidance == 0:
        return answer, other, [], "This model never reads the prompt, so both answers are one."
    try:
        heat = question_attention(model, image, question)
    except ValueError as error:
        return answer, other, [], str(error)
    height, width = encoder.model.size
    scale = -(-SHOWN // min(height, width))
    seen = fit_image(image, (scale * height, scale * width), encoder.fit)  # as the diffusion model sees it
    return answer, other, [(overlay(seen, heat.sel(word=word)), str(word)) for word in heat["word"].values], ""


def library() -> Any:
    """Gradio.

    Raises:
        ValueError: it is not installed.
    """
    return optional("gradio", "The page takes Gradio: pip install 'diffprobe[serve]'")


def build_app(model: FusedMLLM, max_new_tokens: int = 64) -> Any:
    """The page, a `gradio.Blocks`; its one API is ``/ask``: image, question and irrelevant prompt in, what `reply` gives out.

    Raises:
        ValueError: Gradio is not installed.
    """
    gradio = library()

    def ask(image: Image.Image | None, question: str, irrelevant: str) -> tuple[str, str, Shown, str]:
        try:
            return reply(model, image, question, irrelevant, max_new_tokens)
        except ValueError as error:
            raise gradio.Error(str(error), print_exception=False) from error

    config = model.config
    with gradio.Blocks(title="diffprobe", analytics_enabled=False) as app:
        gradio.Markdown(f"## {config.language_model}, {config.fusion}\n\n{ABOUT}")
        with gradio.Row():
            image = gradio.Image(type="pil", image_mode=None, sources=["upload", "clipboard"], label="Image", height=SHOWN)
            with gradio.Column():
                question = gradio.Textbox(label="Question", placeholder="Is there a red star?", autofocus=True)
                irrelevant = gradio.Textbox(label="Irrelevant prompt", value=IRRELEVANT)
                button = gradio.Button("Ask", variant="primary")
        with gradio.Row():
            answer = gradio.Textbox(label="Answer", interactive=False)
            other = gradio.Textbox(label="Answer under the irrelevant prompt", interactive=False)
        maps = gradio.Gallery(label="Where the question's words attend", columns=4, format="png", object_fit="contain")
        note = gradio.Markdown()
        gradio.on(
            [button.click, question.submit], ask, [image, question, irrelevant], [answer, other, maps, note], api_name="ask"
        )
    return app


def serve(
    model: FusedMLLM, host: str = "127.0.0.1", port: int = 7860, max_new_tokens: int = 64,
    tell: Callable[[str], None] = print,
) -> None:  # fmt: skip
    """Show the page until the process is interrupted; nothing leaves this machine.

    Raises:
        ValueError: Gradio is not installed.
        OSError: the port is taken.
    """
    app = build_app(model, max_new_tokens)
    app.launch(
        server_name=host, server_port=port, share=False, quiet=True, prevent_thread_lock=True, ssr_mode=False,
        footer_links=["api"],
    )  # fmt: skip
    try:
        tell(f"The page is at {app.local_url}; Ctrl-C ends it.")
        threading.Event().wait()
    finally:
        app.close(verbose=False)
