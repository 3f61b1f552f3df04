"""shapes-sd, a Stable Diffusion of the drawn world: autoencoder, text tower, UNet, one after the other.

1. `train_vae`: an `AutoencoderKL` with a factor of four on 64 px drawings.
2. `train_text`: the text tower learns to say, from the caption alone, what lies in each cell of a 6 x 6 grid and on
   which side of the other object.  The head is thrown away; what stays is a tower that tells "a left of b" from
   "b left of a", learnt in minutes where the denoising loss would need hours.
3. `train_unet`: velocity prediction with the text tower frozen, 10% empty prompts, averaged weights.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from diffprobe.data import shapes
from recipes.common import (
    GROUP,
    RELATION,
    SIDE,
    Batches,
    Optimizers,
    Plan,
    drawn_batch,
    random_caption,
    step_rng,
    train,
    train_scene,
)

QUESTION_WORDS = (
    "is there what which how many are colour shape size fill the object objects on it does point larger smaller than "
    "or same yes no nothing up down left right letter of in this picture photo image an at between both more fewer"
)
WIDTH = 128  # of the text tower


@dataclass(frozen=True)
class Config:
    """Everything that decides the weights."""

    seed: int = 0
    start: str = ""  # a pipeline's folder whose autoencoder and text tower are taken, and whose UNet is trained further
    scenes: int = 48_000  # whose latents the UNet is trained on
    vae: Plan = field(default_factory=lambda: Plan(steps=1800))
    vae_batch: int = 16
    vae_muon_peak: float = 3e-3
    text: Plan = field(default_factory=lambda: Plan(steps=1500))
    text_batch: int = 64
    text_muon_peak: float = 2e-3
    text_relation_steps: int = 250
    words_alone: float = 0.7  # of the batches the head sees no token after the last word
    unet: Plan = field(default_factory=lambda: Plan(steps=30_000))
    unet_batch: int = 64
    unet_peak: float = 8e-4
    unet_muon_peak: float = 2e-3
    empty_prompts: float = 0.1
    high_noise: float = 0.6  # of the timesteps are drawn where the prompt decides what appears; the others evenly


def autocast(device: str) -> torch.autocast:
    return torch.autocast(device.split(":")[0], torch.bfloat16)


# --- words ----------------------------------------------------------------------------------------


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
    """(text, 77) token numbers."""
    return tokenizer(texts, padding="max_length", truncation=True, max_length=77, return_tensors="pt").input_ids


def build_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer), hidden_size=WIDTH, intermediate_size=3 * WIDTH, num_hidden_layers=4,
            num_attention_heads=4, projection_dim=WIDTH, hidden_act="gelu", max_position_embeddings=77,
            bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        )
    )  # fmt: skip


# --- stage 1: autoencoder -------------------------------------------------------------------------


def build_vae() -> AutoencoderKL:
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3, block_out_channels=(24, 48, 64),
        layers_per_block=1, latent_channels=4, norm_num_groups=8, sample_size=SIDE, mid_block_add_attention=False,
    )  # fmt: skip
    # Born certain: with the usual unit variance the first thing a short training learns is to give channels up.
    nn.init.constant_(vae.quant_conv.bias[4:].data, -6.0)
    return vae


def train_vae(config: Config, folder: Path) -> AutoencoderKL:
    """Absolute plus squared error, coloured pixels counting more, plus a faint KL term; then the latents' scale is measured
    and written into the config."""
    torch.manual_seed(config.seed)
    device = config.vae.device
    vae = build_vae().to(device).train()

    def batch_of(step: int) -> dict[str, Tensor]:
        rng = step_rng(config.seed, 0, step)
        scenes = [train_scene(int(i), config.seed) for i in rng.integers(10**7, size=config.vae_batch)]
        noise = rng.standard_normal((config.vae_batch, 4, SIDE // 4, SIDE // 4), np.float32)
        return {"pixels": drawn_batch(scenes), "noise": torch.from_numpy(noise)}

    def loss_of(batch: dict[str, Tensor], done: float) -> tuple[Tensor, dict[str, Tensor]]:
        pixels = batch["pixels"]
        with autocast(device):
            posterior = vae.encode(pixels).latent_dist
            decoded = vae.decode(posterior.mean + posterior.std * batch["noise"]).sample
        difference = decoded.float() - pixels
        # Unweighted, a short training draws everything in the background's grey.
        weight = 1 + 4 * (pixels.amax(1, keepdim=True) - pixels.amin(1, keepdim=True))
        # Edges are where letters are told apart: neighbours must differ as they do in the drawing.
        edges = difference.diff(dim=-1).abs().mean() + difference.diff(dim=-2).abs().mean()
        kl = posterior.kl().mean()
        loss = (weight * (difference.square() + 0.3 * difference.abs())).mean() + edges + 1e-8 * kl
        return loss, {"psnr": 10 * torch.log10(4 / difference.square().mean()), "kl": kl}

    train(
        "vae",
        folder,
        config.vae,
        {"vae": vae},
        Optimizers(vae, 2e-3, config.vae_muon_peak, outer=("conv_in", "conv_out", "quant_conv")),
        batch_of,
        loss_of,
    )
    vae.eval()
    with torch.no_grad():
        pixels = drawn_batch([train_scene(i, config.seed) for i in range(256)]).to(device)
        vae.register_to_config(scaling_factor=round(1 / vae.encode(pixels).latent_dist.mean.std().item(), 5))
    vae.save_pretrained(folder / "vae")
    return vae


def encode_scenes(vae: AutoencoderKL, config: Config, folder: Path) -> Tensor:
    """Scaled latent means (scene, 4, y, x) in float16 of the training scenes, encoded once and kept."""
    path = folder / f"latents_{config.scenes}.safetensors"
    if not path.exists():
        device, size = config.unet.device, 64

        def batch_of(number: int) -> Tensor:
            return drawn_batch([train_scene(number * size + i, config.seed) for i in range(size)])

        loader = DataLoader(Batches(batch_of, config.scenes // size), batch_size=None, num_workers=config.unet.workers)
        with torch.no_grad():
            rows = [(vae.encode(p.to(device)).latent_dist.mean * vae.config.scaling_factor).half().cpu() for p in loader]
        save_file({"latents": torch.cat(rows).contiguous()}, path)
    return load_file(path)["latents"]


# --- stage 2: text tower --------------------------------------------------------------------------


class LayoutHead(nn.Module):
    """Reads out of a caption what stands where.  Thrown away after training.

    Two kinds of questions: each cell of a 6 x 6 grid (its colour, shape, fill and size, or nothing), and each side
    of a scene of two (the colour and shape of the object on the left, on the right, above, below).  The grid
    teaches the words; its answers stay vague where a caption does, and alone it left the tower unable to tell
    "a left of b" from "b left of a".  The sides are certain, and teach that within minutes.
    """

    FACTORS = tuple((name, shapes.ATTRIBUTES[name]) for name in ("colour", "shape", "fill", "size"))
    CELLS = 6
    SIDES = ("left of", "right of", "above", "below")

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.randn(self.CELLS**2 + len(self.SIDES), width) * 0.5)
        layer = nn.TransformerDecoderLayer(width, 4, 256, dropout=0.0, batch_first=True, norm_first=True, activation="gelu")
        self.decoder = nn.TransformerDecoder(layer, 2)
        self.heads = nn.ModuleList(nn.Linear(width, len(values) + 1) for _, values in self.FACTORS)

    def forward(self, text: Tensor, hidden: Tensor) -> list[Tensor]:
        """(text, token, width), (text, token) of what it may not look at -> for each factor, logits (text, query, class)."""
        answers = self.decoder(self.queries.expand(len(text), -1, -1), text, memory_key_padding_mask=hidden)
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
    device = config.text.device
    kept = folder / "tokenizer"
    if not kept.exists():  # learning the same words again can number them otherwise
        build_tokenizer(config).save_pretrained(kept)
    tokenizer = CLIPTokenizer.from_pretrained(kept)
    tower, head = build_text_encoder(tokenizer).to(device), LayoutHead().to(device)
    both = nn.ModuleDict({"tower": tower, "head": head})
    cells = LayoutHead.CELLS**2

    def batch_of(step: int) -> dict[str, Tensor]:
        rng = step_rng(config.seed, 1, step)
        indices = [int(i) for i in rng.integers(10**7, size=config.text_batch)]
        # Alone, relations are learnt in a hundred steps; among all else, not in a thousand.
        if step < config.text_relation_steps:
            scenes = [shapes.random_scene(config.seed, i, "train", n_objects=2) for i in indices]
            captions = [shapes.caption(s, "relation", [int(i) for i in rng.permutation(2)]).text for s in scenes]
        else:
            scenes = [train_scene(i, config.seed) for i in indices]
            captions = [random_caption(scene, rng) for scene in scenes]
        tokens = tokenize(tokenizer, captions)
        longest = int((tokens != tokenizer.pad_token_id).sum(1).max())
        # The tower looks backwards only, so a few pads are enough; now and then all of them, so that each place is learnt.
        kept = 77 if rng.random() < 0.2 else longest + int(rng.integers(0, 9))
        target = torch.from_numpy(np.stack([LayoutHead.target(scene) for scene in scenes]))
        said = torch.tensor([any(f" {side} " in text for side in LayoutHead.SIDES) for text in captions])
        target[~said, :, cells:] = -100
        # Mostly the head reads the words alone: what it may read in the end and padding tokens, the words need not hold.
        after_words = (tokens[:, :kept] == tokenizer.eos_token_id).cumsum(1) > 0
        return {"tokens": tokens[:, :kept], "target": target, "hidden": after_words & (rng.random() < config.words_alone)}

    def loss_of(batch: dict[str, Tensor], done: float) -> tuple[Tensor, dict[str, Tensor]]:
        target = batch["target"]
        losses, right = [], []
        for row, logits in enumerate(head(tower(batch["tokens"]).last_hidden_state, batch["hidden"])):
            class_weights = torch.ones(logits.shape[-1], device=device)
            class_weights[0] = 0.2
            losses.append(
                functional.cross_entropy(logits[:, :cells].transpose(1, 2), target[:, row, :cells], weight=class_weights)
            )
            asked = target[:, row, cells:] != -100
            if asked.any():
                answers, truth = logits[:, cells:][asked], target[:, row, cells:][asked]
                losses.append(functional.cross_entropy(answers, truth))
                right.append((answers.argmax(-1) == truth).float().mean())
        loss = torch.stack(losses).sum()
        return loss, {"loss": loss, "sides_accuracy": torch.stack(right).mean() if right else loss * 0}

    optimizers = Optimizers(both, 1e-3, config.text_muon_peak, outer=("embedding", "heads", "queries"))
    train("text", folder, config.text, {"tower": tower, "head": head}, optimizers, batch_of, loss_of)
    tower.save_pretrained(folder / "text_encoder")
    return tokenizer, tower


# --- stage 3: UNet --------------------------------------------------------------------------------


def build_unet() -> UNet2DConditionModel:
    """Stable Diffusion's topology with three levels and narrow widths; attention, with text, at every level.

    The paper's six sites all exist: D-L2 is the lowest level (4 x 4 places), U-L1 has 8 x 8, U-L2 16 x 16.
    """
    return UNet2DConditionModel(
        sample_size=SIDE // 4, in_channels=4, out_channels=4, block_out_channels=(48, 96, 160), layers_per_block=(2, 2, 1),
        down_block_types=("CrossAttnDownBlock2D",) * 3, up_block_types=("CrossAttnUpBlock2D",) * 3,
        cross_attention_dim=WIDTH, attention_head_dim=(1, 3, 5), use_linear_projection=True, norm_num_groups=8,
    )  # fmt: skip


def build_scheduler() -> DDIMScheduler:
    return DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type="v_prediction",
        clip_sample=False, set_alpha_to_one=False, steps_offset=1,
    )  # fmt: skip


def draw_timesteps(rng: np.random.Generator, count: int, high_noise: float) -> np.ndarray:
    """Timesteps from 0 to 999: some even, some logit-normal with the middle at 700."""
    biased = 1000 / (1 + np.exp(-rng.normal(0.85, 1.0, count)))
    even = rng.uniform(0, 1000, count)
    return np.where(rng.random(count) < high_noise, biased, even).astype(np.int64).clip(0, 999)


def train_unet(config: Config, folder: Path) -> UNet2DConditionModel:
    """Hours on two cores, minutes on a GPU; the averaged UNet.

    A scene of two objects and the same one mirrored come with the same noise and timestep and with captions that differ in
    the relation alone, so that what tells them apart is what the prompt says.
    """
    torch.manual_seed(config.seed + 2)
    plan = config.unet
    for part in ("vae", "text_encoder", "tokenizer") if config.start else ():
        shutil.copytree(Path(config.start) / part, folder / part, dirs_exist_ok=True)
    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    vae = AutoencoderKL.from_pretrained(folder / "vae").float().to(plan.device).eval()
    latents = encode_scenes(vae, config, folder).to(plan.device)
    tower = CLIPTextModel.from_pretrained(folder / "text_encoder").float().to(plan.device).eval().requires_grad_(False)
    unet, average = build_unet().to(plan.device), build_unet().to(plan.device).requires_grad_(False)
    if config.start:
        unet.load_state_dict(UNet2DConditionModel.from_pretrained(Path(config.start) / "unet").float().state_dict())
    average.load_state_dict(unet.state_dict())
    forward: Callable[..., tuple[Tensor]] = unet
    if plan.device == "cpu":
        unet.set_attn_processor(AttnProcessor())  # on CPUs the backward pass of the fused attention is slower than its formula
    else:
        forward = torch.compile(unet)
    alphas = build_scheduler().alphas_cumprod.to(plan.device)
    groups = config.unet_batch // GROUP

    def batch_of(step: int) -> dict[str, Tensor]:
        rng = step_rng(config.seed, 2, step)
        indices = (rng.integers(len(latents) // GROUP, size=groups)[:, None] * GROUP + np.arange(GROUP)).ravel()
        timesteps = draw_timesteps(rng, len(indices), config.high_noise)
        timesteps[GROUP - 1 :: GROUP] = timesteps[RELATION::GROUP]
        texts = []
        for row, index in enumerate(indices):
            # a mirrored scene is described by the same throws of the dice
            own = np.random.default_rng([config.seed, 3, step, row - GROUP + 1 + RELATION if row % GROUP == GROUP - 1 else row])
            empty = own.random() < config.empty_prompts
            texts.append("" if empty else random_caption(train_scene(int(index), config.seed), own))
        return {
            "indices": torch.from_numpy(indices),
            "timesteps": torch.from_numpy(timesteps),
            "tokens": tokenize(tokenizer, texts),
            "seed": torch.tensor(int(rng.integers(2**62))),
        }

    def loss_of(batch: dict[str, Tensor], done: float) -> tuple[Tensor, dict[str, Tensor]]:
        clean = latents[batch["indices"]].float()
        generator = torch.Generator(plan.device).manual_seed(int(batch["seed"]))
        noise = torch.randn(clean.shape, generator=generator, device=plan.device)
        noise[GROUP - 1 :: GROUP] = noise[RELATION::GROUP]
        alpha = alphas[batch["timesteps"]].view(-1, 1, 1, 1)
        noised = alpha.sqrt() * clean + (1 - alpha).sqrt() * noise
        velocity = alpha.sqrt() * noise - (1 - alpha).sqrt() * clean
        with autocast(plan.device):
            with torch.no_grad():
                text = tower(batch["tokens"]).last_hidden_state
            predicted = forward(noised, batch["timesteps"], text, return_dict=False)[0]
        loss = functional.mse_loss(predicted.float(), velocity)
        return loss, {"velocity_mse": loss}

    def after(step: int) -> None:
        decay = min(0.9995, 1 - 1 / (10 + step / 5))
        with torch.no_grad():
            torch._foreach_lerp_(list(average.parameters()), [p.detach() for p in unet.parameters()], 1 - decay)

    optimizers = Optimizers(
        unet, config.unet_peak, config.unet_muon_peak, outer=("conv_in", "conv_out", "time_embedding", "time_emb_proj")
    )
    train("unet", folder, plan, {"unet": unet, "average": average}, optimizers, batch_of, loss_of, after)
    export(folder, folder / "shapes-sd", average)
    return average


# --- packing --------------------------------------------------------------------------------------


def export(folder: Path, target: Path, unet: UNet2DConditionModel | None = None) -> None:
    """Write the pipeline, float16 and safetensors, in diffusers' folder layout, from the newest averaged weights."""
    if unet is None:
        unet = build_unet()
        unet.load_state_dict(torch.load(folder / "unet.pt", weights_only=True, map_location="cpu")["average"])
    pipeline = StableDiffusionPipeline(
        vae=AutoencoderKL.from_pretrained(folder / "vae"),
        text_encoder=CLIPTextModel.from_pretrained(folder / "text_encoder"),
        tokenizer=CLIPTokenizer.from_pretrained(folder / "tokenizer"),
        unet=unet,
        scheduler=build_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.to("cpu", torch.float16).save_pretrained(target, safe_serialization=True, max_shard_size="12MB")
    forget_origin(target)


def forget_origin(target: Path) -> None:
    """Take the folder that it was trained in out of every JSON file of a model."""
    for path in target.rglob("*.json"):
        found = json.loads(path.read_text(encoding="utf-8"))
        if found.pop("_name_or_path", found.pop("name_or_path", None)) is not None:
            path.write_text(json.dumps(found, indent=2, sort_keys=True) + "\n", encoding="utf-8")
