"""The recipe that made the embedded ``shapes-sd``: autoencoder, text tower, then UNet and text tower together.

Three stages, each resumable from its last checkpoint and seeded:

1. `train_vae`: an `AutoencoderKL` with a factor of four on 96 px drawings.
2. `train_text`: the text tower learns to say, from the caption alone, what lies in each cell of a 6 x 6 grid and on
   which side of the other object. The head is thrown away; what stays is a tower that tells "a left of b" from
   "b left of a", learnt in minutes where the denoising loss would need hours.
3. `train_unet`: noise prediction, the text tower trained along, 10% empty prompts, moving-average weights.

`diffprobe zoo train` runs them; ``torchrun`` or ``accelerate launch`` spread stage 3 over processes (one thread each: two
threads that wait for each other are slowed by any neighbour, two processes are not).
"""

from __future__ import annotations

import csv
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from diffprobe.data import shapes

SIDE = 96
STYLE_WEIGHTS = {"relation": 0.35, "full": 0.22, "place": 0.15, "list": 0.1, "count": 0.06, "web": 0.07, "partial": 0.05}
QUESTION_WORDS = (
    "is there what which how many are colour shape size fill the object objects on it does point larger smaller than "
    "or same yes no nothing up down left right letter of in this picture photo image an at between both more fewer"
)


@dataclass(frozen=True)
class Config:
    """Everything that decides the weights."""

    seed: int = 0
    start: Path | None = None  # a pipeline's folder: its weights are trained further, instead of random ones
    scenes: int = 30_000
    vae_steps: int = 2300
    vae_batch: int = 8
    text_steps: int = 1200
    text_batch: int = 64
    text_relation_steps: int = 250
    unet_steps: int = 5450
    unet_batch: int = 32
    unet_bfloat16: bool = True  # the forward pass; weights and their averages stay float32
    unet_lr: float = 8e-4
    text_lr: float = 2e-4
    decay_share: float = 0.25
    empty_prompts: float = 0.1
    save_every: int = 100


# --- data -----------------------------------------------------------------------------------------


def train_scene(index: int, seed: int) -> shapes.Scene:
    """Training scene `index`; every second one has two objects, so that relations get their share."""
    return shapes.random_scene(seed, index, "train", n_objects=2 if index % 2 else None)


def drawn(scene: shapes.Scene) -> np.ndarray:
    """The scene at the model's resolution (3, y, x) in [-1, 1], resized as the pipeline's preprocessor does."""
    image = Image.fromarray(shapes.render(scene)[0]).resize((SIDE, SIDE), Image.Resampling.LANCZOS)
    return (np.asarray(image, np.float32) / 127.5 - 1).transpose(2, 0, 1)


def random_caption(scene: shapes.Scene, rng: np.random.Generator) -> str:
    """A caption of a random style that names the objects in a random order."""
    style = str(rng.choice(list(STYLE_WEIGHTS), p=np.array(list(STYLE_WEIGHTS.values()))))
    return shapes.caption(scene, style, [int(i) for i in rng.permutation(len(scene.objects))]).text


# --- stage 0: words -------------------------------------------------------------------------------


def build_tokenizer(config: Config) -> CLIPTokenizer:
    """A CLIP byte-pair tokenizer over the world's words; any other text falls apart into bytes, none is lost.

    As in Stable Diffusion 2, prompts are padded with "!" (token 0).
    """
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

    blank = CLIPTokenizer()
    learner = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    learner.normalizer = normalizers.Lowercase()
    learner.pre_tokenizer = blank.backend_tokenizer.pre_tokenizer
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=1200, initial_alphabet=alphabet, end_of_word_suffix="</w>", show_progress=False)
    rng = np.random.default_rng(config.seed)
    texts = [random_caption(train_scene(i, config.seed), rng) for i in range(3000)] + [QUESTION_WORDS] * 30
    learner.train_from_iterator(texts, trainer)
    merges = [tuple(pair) for pair in json.loads(learner.to_str())["model"]["merges"]]
    letters = sorted(alphabet, key=ord)  # "!" comes first, as in CLIP's own vocabulary
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), *("".join(pair) for pair in merges)]
    tokens = [*dict.fromkeys(tokens), "<|startoftext|>", "<|endoftext|>"]
    vocab = {token: number for number, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocab, merges=merges, pad_token="!", model_max_length=77)


def tokenize(tokenizer: CLIPTokenizer, texts: list[str]) -> Tensor:
    return tokenizer(texts, padding="max_length", truncation=True, max_length=77, return_tensors="pt").input_ids


def build_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer), hidden_size=128, intermediate_size=384, num_hidden_layers=4, num_attention_heads=4,
            projection_dim=128, hidden_act="gelu", max_position_embeddings=77,
            bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        )
    )  # fmt: skip


# --- checkpoints ----------------------------------------------------------------------------------


class Progress:
    """Checkpoints and the loss curve of one stage, in one folder; a stage that was cut off goes on from here."""

    def __init__(
        self,
        folder: Path,
        stage: str,
        modules: Mapping[str, nn.Module | torch.optim.Optimizer],
        optimizer: torch.optim.Optimizer,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.curve = folder / f"{stage}_loss.csv"
        self.state = folder / f"{stage}.pt"
        self.modules, self.optimizer = modules, optimizer
        self.step, self.seconds, self._since = 0, 0.0, time.perf_counter()
        if self.state.exists():
            saved = torch.load(self.state, weights_only=True)
            for name, module in modules.items():
                module.load_state_dict(saved[name])
            optimizer.load_state_dict(saved["optimizer"])
            self.step, self.seconds = saved["step"], saved["seconds"]

    def save(self) -> None:
        now = time.perf_counter()
        self.seconds, self._since = self.seconds + now - self._since, now
        state = {name: module.state_dict() for name, module in self.modules.items()}
        partial = self.state.with_suffix(".partial")
        torch.save({**state, "optimizer": self.optimizer.state_dict(), "step": self.step, "seconds": self.seconds}, partial)
        partial.rename(self.state)

    def log(self, losses: dict[str, float], total: int) -> None:
        is_new = not self.curve.exists()
        with self.curve.open("a", newline="") as file:
            writer = csv.writer(file)
            if is_new:
                writer.writerow(["step", *losses])
            writer.writerow([self.step, *(f"{v:.5f}" for v in losses.values())])
        spent = self.seconds + time.perf_counter() - self._since
        values = "  ".join(f"{k} {v:.4f}" for k, v in losses.items())
        print(f"step {self.step}/{total}  {values}  {spent:.0f} s", flush=True)


def batches(count: int, size: int, seed: int, start: int, rank: int = 0, ranks: int = 1) -> Iterator[np.ndarray]:
    """Endless batches of indices below `count`; batch number `start` is the same wherever training resumed."""
    step = start
    while True:
        rng = np.random.default_rng([seed, step])
        yield rng.integers(count, size=size)[rank::ranks]
        step += 1


def start_from(module: nn.Module, config: Config, part: str) -> nn.Module:
    """Give the module the weights of the same part of the pipeline in `config.start`, if there is one."""
    if config.start is not None:
        module.load_state_dict(type(module).from_pretrained(config.start / part).float().state_dict())  # type: ignore[attr-defined]
    return module


# --- stage 1: autoencoder -------------------------------------------------------------------------


def build_vae() -> AutoencoderKL:
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3, block_out_channels=(16, 32, 64),
        layers_per_block=1, latent_channels=4, norm_num_groups=8, sample_size=SIDE, mid_block_add_attention=False,
    )  # fmt: skip
    # Born certain: with the usual unit variance the first thing a short training learns is to give channels up.
    nn.init.constant_(vae.quant_conv.bias[4:].data, -6.0)
    return vae


def train_vae(config: Config, folder: Path) -> AutoencoderKL:
    """Absolute plus squared error, coloured pixels counting more, plus a faint KL term; then the latents' scale is measured and written into the config."""
    torch.manual_seed(config.seed)
    vae = build_vae()
    start_from(vae, config, "vae")
    optimizer = torch.optim.AdamW(vae.parameters(), lr=2e-3, betas=(0.9, 0.95), weight_decay=1e-4)
    progress = Progress(folder, "vae", {"vae": vae}, optimizer)
    vae.train()
    for indices in batches(config.scenes, config.vae_batch, config.seed, progress.step):
        if progress.step >= config.vae_steps:
            break
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * min(1, progress.step / 50) * (0.5 + 0.5 * math.cos(math.pi * progress.step / config.vae_steps))
        pixels = torch.from_numpy(np.stack([drawn(train_scene(int(i), config.seed)) for i in indices]))
        posterior = vae.encode(pixels).latent_dist
        torch.manual_seed(config.seed + progress.step)  # the draw belongs to the step, or a resumed run would differ
        decoded = vae.decode(posterior.sample()).sample
        error = functional.mse_loss(decoded, pixels)
        # Objects are small and backgrounds grey: unweighted, a short training draws everything in grey.
        weight = 1 + 4 * (pixels.amax(1, keepdim=True) - pixels.amin(1, keepdim=True))
        difference = decoded - pixels
        loss = (weight * (difference.square() + 0.3 * difference.abs())).mean() + 1e-8 * posterior.kl().mean()
        loss.backward()
        nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        progress.step += 1
        if progress.step % 25 == 0:
            progress.log({"psnr": 10 * math.log10(4 / error.item()), "kl": posterior.kl().mean().item()}, config.vae_steps)
        if progress.step % config.save_every == 0 or progress.step == config.vae_steps:
            progress.save()
    vae.eval()
    with torch.no_grad():
        pixels = torch.from_numpy(np.stack([drawn(train_scene(i, config.seed)) for i in range(256)]))
        vae.register_to_config(scaling_factor=round(1 / vae.encode(pixels).latent_dist.mean.std().item(), 5))
    vae.save_pretrained(folder / "vae")
    return vae


def encode_scenes(vae: AutoencoderKL, config: Config, folder: Path, accelerator: Accelerator) -> Tensor:
    """Scaled latent means (scene, 4, y, x) in float16 of the training scenes, encoded once and kept; a share a process."""
    ranks = accelerator.num_processes
    paths = [folder / f"latents_{config.scenes}_{rank + 1}of{ranks}.safetensors" for rank in range(ranks)]
    mine = paths[accelerator.process_index]
    if not mine.exists():
        rows = []
        scenes = np.array_split(np.arange(config.scenes), ranks)[accelerator.process_index]
        with torch.no_grad():
            for indices in np.array_split(scenes, -(-len(scenes) // 16)):
                pixels = torch.from_numpy(np.stack([drawn(train_scene(int(i), config.seed)) for i in indices]))
                latents = vae.encode(pixels.to(accelerator.device)).latent_dist.mean * vae.config.scaling_factor
                rows.append(latents.half().cpu())
        save_file({"latents": torch.cat(rows).contiguous()}, mine)
    accelerator.wait_for_everyone()
    return torch.cat([load_file(path)["latents"] for path in paths])


# --- stage 2: text tower --------------------------------------------------------------------------


class LayoutHead(nn.Module):
    """Reads out of a caption what stands where. Thrown away after training.

    Two kinds of questions: each cell of a 6 x 6 grid (its colour, shape, fill and size, or nothing), and each side
    of a scene of two (the colour and shape of the object on the left, on the right, above, below).  The grid
    teaches the words; its answers stay vague where a caption does, and alone it left the tower unable to tell
    "a left of b" from "b left of a".  The sides are certain, and teach that within minutes.
    """

    FACTORS = (
        ("colour", tuple(shapes.COLOURS)),
        ("shape", shapes.SHAPES),
        ("fill", shapes.FILLS),
        ("size", tuple(shapes.SIZES)),
    )
    CELLS = 6
    SIDES = ("left of", "right of", "above", "below")

    def __init__(self, width: int = 128) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.randn(self.CELLS**2 + len(self.SIDES), width) * 0.5)
        layer = nn.TransformerDecoderLayer(width, 4, 256, dropout=0.0, batch_first=True, norm_first=True, activation="gelu")
        self.decoder = nn.TransformerDecoder(layer, 2)
        self.heads = nn.ModuleList(nn.Linear(width, len(values) + 1) for _, values in self.FACTORS)

    def forward(self, text: Tensor) -> list[Tensor]:
        """(text, token, width) -> for each factor, logits (text, query, class)."""
        answers = self.decoder(self.queries.expand(len(text), -1, -1), text)
        return [head(answers) for head in self.heads]

    @classmethod
    def target(cls, scene: shapes.Scene) -> np.ndarray:
        """(factor, query) class numbers; 0 is an empty cell, -100 what the caption cannot say."""
        grid = np.zeros((len(cls.FACTORS), cls.CELLS, cls.CELLS), np.int64)
        sides = np.full((len(cls.FACTORS), len(cls.SIDES)), -100)
        centres = (np.arange(cls.CELLS) + 0.5) / cls.CELLS
        for obj in scene.objects:
            inside = np.maximum(np.abs(centres[None, :] - obj.x), np.abs(centres[:, None] - obj.y)) < max(obj.radius, 0.09)
            for row, (name, values) in enumerate(cls.FACTORS):
                grid[row][inside] = list(values).index(getattr(obj, name)) + 1
        if len(scene.objects) == 2:
            for one, other in (scene.objects, scene.objects[::-1]):
                where = shapes.relation(one, other)
                if where is not None:
                    for row, (name, values) in enumerate(cls.FACTORS[:2]):
                        sides[row, cls.SIDES.index(where)] = list(values).index(getattr(one, name)) + 1
        return np.concatenate([grid.reshape(len(cls.FACTORS), -1), sides], 1)


def train_text(config: Config, folder: Path) -> tuple[CLIPTokenizer, CLIPTextModel]:
    """The tower learns from captions alone; the accuracy logged is that of the sides, on the batch just seen."""
    torch.manual_seed(config.seed + 1)
    known = config.start and CLIPTokenizer.from_pretrained(config.start / "tokenizer")
    tokenizer = known or build_tokenizer(config)
    tokenizer.save_pretrained(folder / "tokenizer")
    tower, head = build_text_encoder(tokenizer), LayoutHead()
    start_from(tower, config, "text_encoder")
    parameters = [*tower.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, betas=(0.9, 0.98), weight_decay=0.01)
    progress = Progress(folder, "text", {"tower": tower, "head": head}, optimizer)
    weights = torch.tensor([0.2])
    cells = LayoutHead.CELLS**2
    for indices in batches(config.scenes * 10, config.text_batch, config.seed + 1, progress.step):
        if progress.step >= config.text_steps:
            break
        for group in optimizer.param_groups:
            group["lr"] = (
                1e-3 * min(1, progress.step / 100) * (0.5 + 0.5 * math.cos(math.pi * progress.step / config.text_steps))
            )
        rng = np.random.default_rng([config.seed, 1, progress.step])
        # Alone, relations are learnt in a hundred steps; among all else, not in a thousand.
        if progress.step < config.text_relation_steps:
            scenes = [shapes.random_scene(config.seed, int(i), "train", n_objects=2) for i in indices]
            captions = [shapes.caption(s, "relation", [int(i) for i in rng.permutation(2)]).text for s in scenes]
        else:
            scenes = [train_scene(int(i), config.seed) for i in indices]
            captions = [random_caption(scene, rng) for scene in scenes]
        tokens = tokenize(tokenizer, captions)
        longest = int((tokens != tokenizer.pad_token_id).sum(1).max())
        tokens = tokens[:, : longest + int(rng.integers(0, 9))]  # a few pads are enough: the tower looks backwards only
        target = torch.from_numpy(np.stack([LayoutHead.target(scene) for scene in scenes]))
        said = torch.tensor([any(f" {side} " in text for side in LayoutHead.SIDES) for text in captions])
        target[~said, :, cells:] = -100
        losses, right = [], []
        for row, logits in enumerate(head(tower(tokens).last_hidden_state)):
            class_weights = torch.cat([weights, torch.ones(logits.shape[-1] - 1)])
            losses.append(
                functional.cross_entropy(logits[:, :cells].transpose(1, 2), target[:, row, :cells], weight=class_weights)
            )
            asked = target[:, row, cells:] != -100
            if asked.any():
                answers, truth = logits[:, cells:][asked], target[:, row, cells:][asked]
                losses.append(functional.cross_entropy(answers, truth))
                right.append((answers.argmax(-1) == truth).float().mean().item())
        loss = torch.stack(losses).sum()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        progress.step += 1
        if progress.step % 25 == 0:
            progress.log({"loss": loss.item(), "sides_accuracy": float(np.mean(right))}, config.text_steps)
        if progress.step % config.save_every == 0 or progress.step == config.text_steps:
            progress.save()
    tower.save_pretrained(folder / "text_encoder")
    return tokenizer, tower


# --- stage 3: UNet --------------------------------------------------------------------------------


def build_unet() -> UNet2DConditionModel:
    """Stable Diffusion 2.1's topology with narrow widths; heads are 32 wide and grow in number with the channels."""
    return UNet2DConditionModel(
        sample_size=SIDE // 4, in_channels=4, out_channels=4, block_out_channels=(32, 64, 96, 96), layers_per_block=2,
        down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",), up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
        cross_attention_dim=128, attention_head_dim=(1, 2, 3, 3), use_linear_projection=True, norm_num_groups=8,
    )  # fmt: skip


def build_scheduler() -> DDIMScheduler:
    return DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type="epsilon",
        clip_sample=False, set_alpha_to_one=False, steps_offset=1,
    )  # fmt: skip


class Denoiser(nn.Module):
    """UNet and text tower as one module, so that one optimizer and one wrapper see both."""

    def __init__(self, unet: UNet2DConditionModel, tower: CLIPTextModel) -> None:
        super().__init__()
        self.unet, self.tower = unet, tower

    def forward(self, latents: Tensor, timesteps: Tensor, tokens: Tensor) -> Tensor:
        return self.unet(latents, timesteps, self.tower(tokens).last_hidden_state).sample


def learning_rate_share(step: int, total: int, decay_share: float) -> float:
    """Warm up, stay, then fall to zero: a run that is made longer goes on from the flat part.

    >>> [learning_rate_share(step, 1000, 0.2) for step in (0, 50, 100, 800, 900)]
    [0.0, 0.5, 1.0, 1.0, 0.5]
    """
    return min(1.0, step / 100, (total - step) / max(1.0, total * decay_share))


def train_unet(config: Config, folder: Path) -> None:
    """Minutes on a GPU, hours on two cores.

    The loss is the noise's squared error over alpha-bar, at most five times: for a given step that is the error of
    the velocity, which makes the steps count where the prompt decides what appears.
    """
    # without cpu=True, processes on CPUs do not find each other
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    torch.manual_seed(config.seed + 2)
    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    vae = AutoencoderKL.from_pretrained(folder / "vae").eval()
    latents = encode_scenes(vae.to(accelerator.device), config, folder, accelerator)
    model = Denoiser(build_unet(), CLIPTextModel.from_pretrained(folder / "text_encoder"))
    start_from(model.unet, config, "unet")
    average = Denoiser(build_unet(), CLIPTextModel.from_pretrained(folder / "text_encoder")).requires_grad_(False)
    average.load_state_dict(model.state_dict())
    groups = [
        {"params": model.unet.parameters(), "peak": config.unet_lr},
        {"params": model.tower.parameters(), "peak": config.text_lr},
    ]
    optimizer = torch.optim.AdamW(groups, lr=config.unet_lr, betas=(0.9, 0.99), weight_decay=0.01)
    progress = Progress(folder, "unet", {"model": model, "average": average}, optimizer)
    average.to(accelerator.device)
    wrapped, optimizer = accelerator.prepare(model, optimizer)
    alphas = build_scheduler().alphas_cumprod.to(accelerator.device)
    rank, ranks = accelerator.process_index, accelerator.num_processes
    history: list[float] = []
    for indices in batches(config.scenes, config.unet_batch, config.seed + 2, progress.step, rank, ranks):
        if progress.step >= config.unet_steps:
            break
        share = learning_rate_share(progress.step, config.unet_steps, config.decay_share)
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * share
        rng = np.random.default_rng([config.seed, 2, progress.step, rank])
        texts = [
            "" if rng.random() < config.empty_prompts else random_caption(train_scene(int(i), config.seed), rng)
            for i in indices
        ]
        clean = latents[torch.from_numpy(indices)].float().to(accelerator.device)
        noise = torch.from_numpy(rng.standard_normal(clean.shape, np.float32)).to(accelerator.device)
        timesteps = torch.from_numpy(rng.integers(1000, size=len(indices))).to(accelerator.device)
        alpha = alphas[timesteps].view(-1, 1, 1, 1)
        noised = alpha.sqrt() * clean + (1 - alpha).sqrt() * noise
        with torch.autocast(accelerator.device.type, torch.bfloat16, enabled=config.unet_bfloat16):
            predicted = wrapped(noised, timesteps, tokenize(tokenizer, texts).to(accelerator.device))
        error = (predicted.float() - noise).square().mean((1, 2, 3))
        loss = (error * (1 / alpha.flatten()).clamp(max=5.0)).mean()
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(wrapped.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        progress.step += 1
        decay = min(0.9995, 1 - 1 / (10 + progress.step / 5))
        with torch.no_grad():
            torch._foreach_lerp_(list(average.parameters()), [p.detach() for p in model.parameters()], 1 - decay)
        history.append(error.mean().item())
        if progress.step % 25 == 0 and accelerator.is_main_process:
            progress.log({"noise_mse": float(np.mean(history[-25:]))}, config.unet_steps)
        if (progress.step % config.save_every == 0 or progress.step == config.unet_steps) and accelerator.is_main_process:
            progress.save()
    if accelerator.is_main_process:
        export(folder, folder / "shapes-sd", average)


# --- packing --------------------------------------------------------------------------------------


def export(folder: Path, target: Path, denoiser: Denoiser | None = None) -> None:
    """Write the pipeline, float16 and safetensors, in diffusers' folder layout, from the newest averaged weights."""
    if denoiser is None:
        denoiser = Denoiser(build_unet(), CLIPTextModel.from_pretrained(folder / "text_encoder"))
        denoiser.load_state_dict(torch.load(folder / "unet.pt", weights_only=True)["average"])
    pipeline = StableDiffusionPipeline(
        vae=AutoencoderKL.from_pretrained(folder / "vae"),
        text_encoder=denoiser.tower,
        tokenizer=CLIPTokenizer.from_pretrained(folder / "tokenizer"),
        unet=denoiser.unet,
        scheduler=build_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.to(torch.float16).save_pretrained(target, safe_serialization=True)
    forget_origin(target)


def forget_origin(target: Path) -> None:
    """Take the folder that it was trained in out of every JSON file of a model: where that was is nobody's business."""
    for path in target.rglob("*.json"):
        found = json.loads(path.read_text(encoding="utf-8"))
        if found.pop("_name_or_path", found.pop("name_or_path", None)) is not None:
            path.write_text(json.dumps(found, indent=2, sort_keys=True) + "\n", encoding="utf-8")


STAGES: dict[str, Callable[[Config, Path], object]] = {"vae": train_vae, "text": train_text, "unet": train_unet}
