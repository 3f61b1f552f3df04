"""Commands that measure what is in a store, or in a model: probes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from diffprobe.cli import options as shared
from diffprobe.cli.entry import probe_app
from diffprobe.cli.options import completes, option, say, say_next, several, show

if TYPE_CHECKING:
    import pandas as pd
    import xarray as xr

Pooling = Literal["mean", "flatten", "patches"]
Metric = Literal["cosine", "euclidean", "manhattan"]
LABEL_HELP = "Labels to read; 'mask:shape' is what covers each patch. 'diffprobe info' names the store's."
LABELS = several([], LABEL_HELP, "--label", show_default="the only one")
LABEL_FILE = option(None, "Labels by id or file (CSV, JSON lines, Parquet), joined to the store's.", "--labels", metavar="FILE")
SPLIT = option("", "A label that says train, validation or test, in place of a drawn split.", metavar="LABEL")
COMPLETED = {"autocompletion": completes(shared.stored_sites)}
SITES = several([], "Sites by name; all that can be measured by default.", **COMPLETED)
CONDITIONINGS = several([], "Conditionings; all by default.", "--conditioning")
POOL = option("mean", "Average the places, lay them side by side, or read each on its own.")
TABLE_OUT = option("", "The table (CSV), a path or an fsspec URL.", "--out", "-o", show_default="beside the store")
PROBE_SEED = option(0, "Seed of split, control labels and bootstrap.")
SEED = option(0, "Seed of the bootstrap and of every other draw.")
JOBS = option(-1, "Worker processes, one thread each; -1 is one a core.")
CROSS_FIT = option(False, "Each fold is the test fold once: five times the work and the test rows.", "--cross-fit")
BENCHMARKS = (
    "shapes-mmvp:N, shapes-winoground:N, or mmvp-vlm, winoground, sugarcrepe with :FOLDER_OR_ID "
    "(sugarcrepe:FOLDER?images=COCO_FOLDER)."
)
MEASURES = "cosine, cosine_standardised, cka, cka_biased, mutual_knn; cosines for pairs, CKA else by default."
SCORES = ["attention_lse_paper", "attention_lse_discffusion", "denoising_loss", "denoising_loss_normalised"]
IMAGES = option("", "The dataset, to show its images; the store's own by default.", "--data", "-d")
TIMESTEP = option(None, "The store's first by default.")


def _probe(
    name: str, probe: Callable[..., Any], options: dict[str, Any], *, lazy: bool = False, scan: Any = None, store: str = shared.STORE,
    label: list[str] = LABELS, sites: list[str] = SITES, conditioning: list[str] = CONDITIONINGS, pool: Pooling = POOL,
    labels: Path | None = LABEL_FILE, split: str = SPLIT, out: str = TABLE_OUT,
) -> None:  # fmt: skip
    """Probe a store for labels of samples and of patches, save the table and its origin, show the best rows."""
    import pandas as pd

    from diffprobe.probes.fitting import probe_table, save_table
    from diffprobe.probes.labels import PREFIX, only_label, with_labels, with_mask_labels
    from diffprobe.probes.task import pool_features
    from diffprobe.rundir import file_digest
    from diffprobe.store import features, open_store, provenance, site_names

    tree = open_store(store)
    if labels is not None:
        tree = with_labels(tree, labels)
    target = shared.table_place(out, store, name)
    label = label or [only_label(tree, [split])]
    names = sites or [n for n in site_names(tree) if "features" in tree[n].data_vars]
    masks = [x for x in label if x.startswith(PREFIX)]
    frames = []
    kinds: list[tuple[list[str], Any]] = [([x for x in label if x not in masks], pool), (masks, "patches")]
    options |= {"split": split} if split else {}
    for read, pooling in kinds:
        if not read:
            continue

        def get(site: str, read: list[str] = read, pooling: Any = pooling) -> xr.DataArray:
            found: xr.DataArray = features(tree, site, conditioning=conditioning or None)
            for one in read if pooling == "patches" else []:
                found = with_mask_labels(found, tree, one) if one in masks else found
            return found if lazy else pool_features(found, pooling).compute()

        frames.append((scan or probe_table)(get, names, read, probe, pool=pooling, **options))
    frame = pd.concat(frames, ignore_index=True)
    asked = {"probe": name, "label": ",".join(label), "sites": names, "conditioning": ",".join(conditioning), "pool": pool}
    asked |= {"labels": labels.name, "labels_sha256": file_digest(labels.expanduser())} if labels is not None else {}
    save_table(frame, target, store, provenance(tree), asked | options)
    columns = {"label": "{label}", "conditioning": "{conditioning}", "best site": "{site}", "timestep": "{timestep}",
               "score": "{value:.3f}", **shared.INTERVAL, "chance": "{chance:.3f}", "control": "{control_value:.3f}",
               "n test": "{n_test}"}  # fmt: skip
    if scan:
        _show_scan(frame)
    else:
        show(shared.best(frame, ["label", "conditioning"]), columns)
    say(f"{len(frame)} probes in {target}")
    say_next(["plot", "probe", target])


def _show_scan(frame: pd.DataFrame) -> None:
    """The best cell of each label and conditioning, and what was chosen on some samples as others judge it."""
    columns = {"label": "{label}", "conditioning": "{conditioning}", "best site": "{site}", "timestep": "{timestep}",
               "chosen": "{chosen} of 5", "held out": "{held_out:.3f}", "95% interval": "{held_out_low:.3f}-{held_out_high:.3f}",
               "chance": "{chance:.3f}", "its own score": "{value:.3f}"}  # fmt: skip
    show(frame[frame["bold"]], columns)
    say(
        "Held out: each fifth of the samples judges the site that the others chose. A site's own score had a part in its choice."
    )


@probe_app.command("scan")
@shared.takes(_probe)
def probe_scan(
    of: Literal["probe", "localization"] = option("probe", "Labels read from features, or words' maps scored against masks."),
    data: str = option("", "The dataset, for masks; the store's own by default.", "--data", "-d"),
    score: str = option("auc", "Of localization: pointing, mass, lift, iou_fixed, auc, ap, nss."),
    roles: list[str] = several(["noun"], "Of words: noun, colour, phrase, background."),
    penalties: list[float] = several([0.1, 1, 10, 100, 1000], "Strengths of the squared norm to choose from."),
    seed: int = PROBE_SEED,
    jobs: int = JOBS,
    **asked: Any,
) -> None:
    """Find the best site and noise level for labels or for localization; what chose them never judges them."""
    from diffprobe.probes.fitting import save_table
    from diffprobe.probes.linear import fit_probe
    from diffprobe.probes.scan import scan_maps, scan_probes
    from diffprobe.store import open_store, provenance

    if of == "probe":
        return _probe("scan", fit_probe, {"penalties": penalties, "seed": seed, "n_jobs": jobs}, scan=scan_probes, **asked)
    tree, store = open_store(asked["store"]), asked["store"]
    target = shared.table_place(asked["out"], store, "scan-localization")
    options: dict[str, Any] = {
        "sites": asked["sites"] or None,
        "conditioning": ",".join(asked["conditioning"]) or "caption",
        "roles": roles,
    }
    frame = scan_maps(tree, data or None, score=score, seed=seed, **options)
    save_table(frame, target, store, provenance(tree), {"probe": "scan", "of": of, "score": score, "seed": seed, **options})
    _show_scan(frame)
    say(f"{len(frame)} cells in {target}")
    say_next(["plot", "probe", target])
    return None


@probe_app.command("linear")
@shared.takes(_probe)
def probe_linear(
    seed: int = PROBE_SEED,
    jobs: int = JOBS,
    penalties: list[float] = several([0.1, 1, 10, 100, 1000], "Strengths of the squared norm to choose from."),
    cross_fit: bool = CROSS_FIT,
    streaming: bool = option(False, "Ridge in two passes over the store, for those larger than memory.", "--streaming"),
    device: str | None = option(None, "Fit on this torch device, such as cuda (SCIPY_ARRAY_API=1 must be set)."),
    **asked: Any,
) -> None:
    """Fit a linear probe per site, timestep and conditioning, with its control task."""
    from diffprobe.probes.linear import fit_probe
    from diffprobe.probes.streaming import stream_probe

    options: dict[str, Any] = {"penalties": penalties, "seed": seed}
    if streaming and (device or cross_fit):
        raise ValueError("--streaming goes with neither --device nor --cross-fit.")
    if not streaming:
        # A GPU is not shared out between processes.
        options |= {"cross_fit": cross_fit, "device": device, "n_jobs": 1 if device else jobs}
    _probe("linear", stream_probe if streaming else fit_probe, options, lazy=streaming, **asked)


@probe_app.command("knn")
@shared.takes(_probe)
def probe_knn(
    seed: int = PROBE_SEED,
    jobs: int = JOBS,
    k: list[int] = several([5, 20], "Numbers of neighbours to choose from.", "--k", "-k"),
    metric: Metric = option("cosine", "Distance between features standardised per channel."),
    cross_fit: bool = CROSS_FIT,
    **asked: Any,
) -> None:
    """Read labels off the nearest neighbours per site, timestep and conditioning, with its control task."""
    from diffprobe.probes.knn import knn_probe

    options = {"k": k, "metric": metric, "seed": seed, "cross_fit": cross_fit, "n_jobs": jobs}
    _probe("knn", knn_probe, options, **asked)


@probe_app.command("sae")
def probe_sae(
    store: str = shared.STORE,
    site: str = option("", "The site; the store's first by default."),
    timestep: int | None = TIMESTEP,
    conditioning: str = option("", "The store's first by default.", "--conditioning", "-c"),
    sae: Path | None = option(None, "Score this one (cfg.json, sae.safetensors) in place of training."),
    latents: int = option(0, "Latents; 0 is --expansion times the channels.", min=0),
    expansion: int = option(4, "Latents for each channel.", min=1),
    k: int = option(16, "Latents that a token uses.", "--k", "-k", min=1),
    epochs: int = option(20, "Passes over the training samples.", min=1),
    learning_rate: float = option(1e-3, "Of Adam."),
    batch: int = option(1024, "Tokens of a step.", min=1),
    draw: int = option(6, "Latents whose top images are drawn; 0 for none.", min=0),
    data: str = IMAGES,
    out: str = option("", "Folder for the autoencoder, its scores and the figure.", "--out", "-o", show_default="STORE.sae"),
    device: str | None = shared.DEVICE,
    seed: int = option(0, "Seed of split, order, first weights and bootstrap."),
) -> None:
    """Train a sparse autoencoder (TopK, AuxK) on a site's tokens; scores beside random directions.

    A fifth of the samples is kept for the scores. The files are those of EleutherAI's sparsify.
    """
    import numpy as np
    import torch

    from diffprobe.console import Console
    from diffprobe.probes import sae as coders
    from diffprobe.probes.fitting import save_table
    from diffprobe.rundir import is_remote
    from diffprobe.store import features, open_store, provenance, site_names
    from diffprobe.torch import StoreStream

    folder = Path(out or f"{Path(store).name if is_remote(store) else store.rstrip('/')}.sae")
    if sae is None and (folder / "cfg.json").exists():
        raise ValueError(f"{folder} has an autoencoder; give another --out, or score that one with --sae {folder}.")
    tree = open_store(store)
    names = [n for n in site_names(tree) if "features" in tree[n].data_vars]
    request = provenance(tree)["request"]
    site = site or (names or [""])[0]
    chosen: Any = {
        "timestep": request["timesteps"][0] if timestep is None else timestep,
        "conditioning": conditioning or request["conditionings"][0],
    }
    array = features(tree, site, **chosen)
    ids = tree.to_dataset()["sample"].values.astype(str)
    if len(ids) < 5:
        raise ValueError(f"{store} has {len(ids)} complete samples; five are needed to train on some and score others.")
    test, train = np.split(np.random.default_rng(seed).permutation(ids), [max(1, len(ids) // 5)])
    stream = lambda samples, **more: StoreStream(  # noqa: E731
        store, site, rows="tokens", samples=samples.tolist(), seed=seed, **{"batch_size": batch, **chosen, **more}
    )
    if sae is None:
        config = coders.SparseConfig(array.sizes["channel"], latents, expansion, k)
        settings = coders.SparseTraining(epochs, learning_rate, seed=seed)
        where = device or ("cuda" if torch.cuda.is_available() else "cpu")
        with Console(stderr=True).progress("train", "epochs", epochs) as advance:
            coder = coders.train_sae(config, stream(train), settings, where, advance)
        coders.save_sae(coder, folder)
    else:
        coder = coders.load_sae(sae)
    if coder.config.d_in != array.sizes["channel"]:
        raise ValueError(f"{sae} is of {coder.config.d_in} channels, and {site} has {array.sizes['channel']}.")
    seen = torch.cat([part["features"] for part, _ in zip(stream(train, batch_size=4096), range(16), strict=False)])
    both = {"trained": coder, "random directions": coders.random_directions(coder.config, seen, seed + 1)}
    frame = coders.score_sae(both, stream(test, shuffle=False), seed=seed).assign(site=site, **chosen)
    options = {
        "probe": "sae",
        "site": site,
        **chosen,
        "sae": str(sae or folder),
        "epochs": epochs,
        "batch": batch,
        "seed": seed,
    }
    save_table(frame, str(folder / "scores.csv"), store, provenance(tree), options)
    columns = {"score": "{score}", "coder": "{coder}", "value": "{value:.3f}", **shared.INTERVAL}
    columns |= {"samples": "{n}", "tokens": "{tokens}"}
    show(frame.sort_values(["score", "coder"], ascending=[True, False], kind="stable"), columns)
    say(f"Autoencoder in {sae or folder}, scores in {folder / 'scores.csv'}")
    if draw and {"y", "x"} <= set(array.dims):
        from diffprobe.latents import choose_latents, latent_figure

        grid = (array.sizes["y"], array.sizes["x"])
        every = stream(ids, shuffle=False, batch_size=16 * grid[0] * grid[1])
        activations = lambda: coders.latent_activations(coder, every, grid[0] * grid[1])  # noqa: E731
        drawn = choose_latents(activations, draw)
        say(f"Figure {latent_figure(store, data, activations, every.ids, grid, drawn, folder, options)}")
    say_next(["probe", "sae", store, "--sae", str(sae or folder), "--site", site, "--out", f"{folder}.again"])


@probe_app.command("alignment")
def probe_alignment(
    model: str = shared.MODEL,
    data: str = option("shapes-mmvp:45", BENCHMARKS, "--data", "-d"),
    scores: list[str] = several(SCORES, "Also pooled_cosine and clip_cosine; 'all' is every one."),
    timesteps: list[int] = several([189, 389, 589, 789, 989], "Noise levels.", "--timesteps", "-t"),
    draws: int = option(3, "Noise tensors at each timestep.", min=1),
    clip: str = option("shapes-clip", "Folder, hub id or embedded name of a CLIP model, for clip_cosine."),
    site: str = option("U-L2-R1-B0-Cross-Q", "Site of pooled_cosine."),
    train: str = option("shapes:600", "Captioned dataset that pooled_cosine learns from."),
    baseline: str = option("", "A score that the others are compared with, item by item."),
    out: Path = option(
        Path("runs/alignment.nc"), "Scores (NetCDF), from which a stopped run goes on; and a table.", "--out", "-o"
    ),
    batch_rows: int = shared.BATCH_ROWS,
    seed: int = SEED,
    revision: str | None = shared.REVISION,
    allow_pickle: bool = shared.ALLOW_PICKLE,
    variant: str | None = shared.VARIANT,
    lora: list[str] = shared.LORA,
    config: str | None = shared.CONFIG,
    device: str | None = shared.DEVICE,
    dtype: str = option("auto", "float32, float16, bfloat16; auto is float32 on a CPU, else bfloat16."),
) -> None:
    """Match images with texts by the model's own scores, by a benchmark's strict protocol."""
    from diffprobe.data.benchmarks import load_benchmark
    from diffprobe.matching import alignment_score
    from diffprobe.models import load_model
    from diffprobe.probes.alignment import SCORES, alignment_table, compare_scores
    from diffprobe.rundir import write_whole

    names = list(SCORES) if scores == ["all"] else scores
    if baseline and baseline not in names:
        raise ValueError(f"--baseline {baseline!r} is not one of the scores {', '.join(names)}.")
    benchmark = load_benchmark(data)  # before the model: a slip in the spec should not cost a minute
    loaded = load_model(
        model, device, dtype, revision, use_safetensors=not allow_pickle, variant=variant, loras=lora, config=config
    )
    found = alignment_score(
        loaded, benchmark, scores=names, timesteps=timesteps, draws=draws, seed=seed,
        batch_rows=batch_rows, site=site, train=train, clip=clip, out=out,
    )  # fmt: skip
    frame = alignment_table(found, found.attrs["protocol"], seed=seed)
    target = out.with_suffix(".csv")
    write_whole(target, frame.to_csv(index=False))
    columns = {"score": "{score}", "metric": "{metric}", "share right": "{value:.3f}", **shared.INTERVAL}
    show(frame[frame["pattern"] == "all"], columns | {"chance": "{chance:.3f}", "n": "{n}"})
    if baseline:
        for row in compare_scores(found, found.attrs["protocol"], baseline, seed=seed).to_dict("records"):
            say(
                f"{row['score']} - {baseline}, {row['metric']}: {row['value']:+.3f} [{row['low']:+.3f}, {row['high']:+.3f}], "
                f"p = {row['p']:.2g}, {row['p_holm']:.2g} after Holm",
            )
    say(f"Scores in {out}, every pattern in {target}")


@probe_app.command("causal")
def probe_causal(
    model: str = shared.MODEL,
    attribute: str = option("colour", "Pattern of drawn twins: colour, state, structure, orientation, text."),
    sites: list[str] = several(["blocks"], "Sites with a (y, x) grid; the last block, where the logit is followed, is added."),
    timesteps: list[int] = several([50, 250, 500], "Noise levels.", "--timesteps", "-t"),
    pairs: int = option(16, "Twins that are patched.", min=2),
    train_pairs: int = option(120, "Other twins, for the linear probes.", min=20),
    out: str = option("runs/causal.csv", "The table (CSV).", "--out", "-o"),
    batch_rows: int = shared.BATCH_ROWS,
    seed: int = SEED,
    revision: str | None = shared.REVISION,
    device: str | None = shared.DEVICE,
) -> None:
    """Patch one twin's activation into the other's pass: where an attribute is used, beside where a probe reads it."""
    from diffprobe.models import load_model
    from diffprobe.patching import causal_map
    from diffprobe.probes.fitting import save_table

    target = shared.table_place(out, "", "causal")
    loaded = load_model(model, device, "auto", revision)
    found = causal_map(
        loaded, attribute, sites, timesteps, pairs=pairs, train_pairs=train_pairs, seed=seed, batch_rows=batch_rows
    )
    request = {"model": loaded.model_id, "revision": revision, "weights": loaded.weights_hash()}
    request |= {"dataset": f"twins {attribute}"}
    options = {"probe": "causal", "attribute": attribute, "sites": sites, "timesteps": timesteps, "pairs": pairs,
               "train_pairs": train_pairs, "seed": seed, "agreement": found.agreement}  # fmt: skip
    save_table(found.table, target, "", {"request": request}, options)
    columns = {"what": "{label}", "best site": "{site}", "timestep": "{timestep}", "score": "{score}", "value": "{value:.3f}",
               **shared.INTERVAL, "control": "{control_value:.3f}", "n": "{n}"}  # fmt: skip
    show(shared.best(found.table, ["label"]), columns)
    for outcome, row in found.agreement.items():
        say(
            f"Rank correlation of the patch's effect on the {outcome} with the probe's accuracy, over {row['n']} cells: "
            f"{row['value']:+.2f} [{row['low']:+.2f}, {row['high']:+.2f}]"
        )
    say(f"{len(found.table)} cells in {target}")
    say_next(["plot", "probe", target])


@probe_app.command("sinks")
def probe_sinks(
    model: str = shared.MODEL,
    data: str = option("shapes:16?split=test", "Images with captions.", "--data", "-d"),
    maps: list[str] = several(["words"], "Map sites: all that text takes part in; 'self' shows which places are sinks."),
    timesteps: list[int] = several([50, 250, 500], "Noise levels.", "--timesteps", "-t"),
    conditioning: list[str] = several(["caption"], "As for extract.", "--conditioning", "-c"),
    draws: int = option(1, "Noise tensors at each timestep.", min=1),
    resolution: int | None = option(None, "Image side in pixels; the model's own by default."),
    out: str = option("runs/sinks.csv", "The table (CSV).", "--out", "-o"),
    batch_rows: int = option(4, "Rows of one forward pass of the diffusion model.", min=1),
    seed: int = SEED,
    revision: str | None = shared.REVISION,
    device: str | None = shared.DEVICE,
    dtype: str = option("auto", "float32, float16, bfloat16; auto is float32 on a CPU, else bfloat16."),
) -> None:
    """Which share of the image's attention goes to start, words, end, padding and image, by block and noise level."""
    from diffprobe.models import load_model
    from diffprobe.probes.fitting import save_table
    from diffprobe.sinks import attention_mass

    target = shared.table_place(out, "", "sinks")
    loaded = load_model(model, device, dtype, revision)
    options: dict[str, Any] = {"maps": maps, "conditionings": conditioning, "draws": draws, "seed": seed}
    size = (resolution,) * 2 if resolution else None
    frame = attention_mass(loaded, data, timesteps, size=size, batch_rows=batch_rows, **options)
    request = {"model": loaded.model_id, "revision": revision, "weights": loaded.weights_hash(), "dataset": data}
    kept = {"request": request, "random_weights": loaded.random_weights}
    save_table(frame, target, "", kept, {"probe": "sinks", "timesteps": timesteps, "size": size, **options})
    columns = {"class": "{label}", "conditioning": "{conditioning}", "most at": "{site}", "timestep": "{timestep}",
               "share": "{value:.3f}", **shared.INTERVAL, "even": "{chance:.3f}", "strongest key": "{peak:.1f} x even"}  # fmt: skip
    show(shared.best(frame, ["label", "conditioning"]), columns)
    say(f"{len(frame)} shares in {target}")
    say_next(["plot", "probe", target])


@probe_app.command("similarity")
def probe_similarity(
    store: str = shared.STORE,
    between: str = option("conditioning", "pair (images a, b), conditioning, guidance, timestep, site, store (with --other)."),
    other: str = option("", "A second store of the same samples, of another model or encoder."),
    measures: list[str] = several([], MEASURES),
    sites: list[str] = SITES,
    guidance: list[float] = several([1, 1.5, 4, 7], "Scales s to compare with f_u."),
    conditioning: str = option("caption", "f_c of the guidance."),
    groups: str = option("", "A label of samples that belong together, such as pair."),
    labels: Path | None = LABEL_FILE,
    pool: Pooling = option("flatten", "A row is the whole map (flatten) or its mean."),
    k: int = option(10, "Neighbours of mutual_knn.", "--k", "-k"),
    out: str = TABLE_OUT,
    seed: int = SEED,
) -> None:
    """Compare features: cosine, CKA, mutual neighbours, each with interval and chance."""
    from diffprobe.probes.fitting import save_table
    from diffprobe.probes.labels import with_labels
    from diffprobe.probes.similarity import store_similarity
    from diffprobe.store import open_store, provenance

    tree = open_store(store) if labels is None else with_labels(open_store(store), labels)
    target = shared.table_place(out, store, f"similarity-{between}")
    options: dict[str, Any] = {"sites": sites, "conditioning": conditioning, "guidance": guidance, "groups": groups or None,
                               "measures": measures, "pool": pool, "k": k, "seed": seed}  # fmt: skip
    frame = store_similarity(tree, between, other=open_store(other) if other else None, **options)
    origin = provenance(tree)
    save_table(frame, target, store, origin, {"probe": "similarity", "between": between, "other": other, **options})
    for reason, rows in frame[frame["reason"] != ""].groupby("reason", sort=False):
        say(f"  {len(rows)} without a value: {reason}")
    say(f"{len(frame)} comparisons of {frame['n'].max()} samples in {target}")
    say_next(["plot", "similarity", target])


@probe_app.command("correspondence")
def probe_correspondence(
    store: str = shared.STORE,
    spair: Path | None = option(None, "The folder SPair-71k, for a store of its JPEGImages (--fit squash); else its twins."),
    split: str = option("test", "Of SPair-71k: trn, val, test."),
    alpha: list[float] = several([0.1], "Tolerances, in larger sides of the object's box."),
    sites: list[str] = SITES,
    conditioning: list[str] = CONDITIONINGS,
    grid: int = option(96, "Rows of the upsampled target map."),
    raw: bool = option(False, "Cosines of raw features, not standardised per channel.", "--raw"),
    by_category: bool = option(False, "Rows for each category too.", "--by-category"),
    out: str = TABLE_OUT,
    seed: int = SEED,
) -> None:
    """Find keypoints of one image in another by their features: PCK per point and per image, with chance."""
    import pandas as pd

    from diffprobe.data import TwinsDataset, load_dataset
    from diffprobe.data.keypoints import twin_keypoints
    from diffprobe.data.spair import read_spair
    from diffprobe.probes.correspondence import correspondence
    from diffprobe.probes.fitting import save_table
    from diffprobe.store import features, open_store, provenance, site_names

    tree = open_store(store)
    target = shared.table_place(out, store, "correspondence")
    origin = provenance(tree)
    request = origin["request"]
    if spair is not None:
        pairs = read_spair(spair, split, resolution=tuple(request["resolution"]), fit=request["fit"])
    else:
        dataset = load_dataset(origin["data"])
        if not isinstance(dataset, TwinsDataset):
            raise ValueError(
                f"Keypoints are known for drawn twins (shapes-winoground:N, shapes-mmvp:N) and SPair-71k; this store holds "
                f"{origin['data']!r}. Extract twins, or give --spair."
            )
        pairs = twin_keypoints(dataset)
    names = sites or [n for n in site_names(tree) if {"y", "x"} <= set(getattr(tree[n].get("features"), "dims", ()))]
    options: dict[str, Any] = {"alphas": alpha, "grid": grid, "standardise": not raw, "seed": seed}
    frames = [
        correspondence(features(tree, name, conditioning=conditioning or None), pairs, by_category=by_category, **options)
        .assign(site=name)
        for name in names
    ]  # fmt: skip
    if not frames:
        raise ValueError(f"{store} has no site with a (y, x) grid; record one with --reduce none.")
    frame = pd.concat(frames, ignore_index=True)
    asked = {"probe": "correspondence", "split": split if spair else "", "sites": names, **options}
    save_table(frame, target, store, origin, asked)
    columns = {"site": "{site}", "timestep": "{timestep}", "conditioning": "{conditioning}", "alpha": "{alpha:g}",
               "PCK": "{value:.3f}", **shared.INTERVAL, "chance": "{chance:.3f}", "in the box": "{chance_box:.3f}",
               "same place": "{position:.3f}", "n": "{n}"}  # fmt: skip
    points = frame[(frame["per"] == "point") & (frame["category"] == "all")].sort_values("value", ascending=False)
    show(points.head(10), columns)
    say(f"{len(frame)} scores of {len(pairs)} pairs in {target}")


@probe_app.command("localization")
def probe_localization(
    store: str = shared.STORE,
    of: str = option("attention", "attention (of a caption's words), or difference (|f_c - f_u| of a text)."),
    conditioning: list[str] = several([], "Whose words are scored; for differences captions and questions, all by default."),
    data: str = option("", "The dataset, for its masks; the store's own by default.", "--data", "-d"),
    sites: list[str] = SITES,
    timesteps: list[int] = several([], "All by default.", "--timesteps", "-t"),
    roles: list[str] = several(["noun"], "Of words: noun, colour, phrase, background."),
    by_head: bool = option(False, "Each head beside their mean (of a store with --heads all).", "--by-head"),
    out: str = TABLE_OUT,
    seed: int = SEED,
) -> None:
    """Score maps against masks: pointing game, mass, IoU, ROC-AUC, AP, NSS, each with interval, chance and controls."""
    from diffprobe.probes.fitting import save_table
    from diffprobe.probes.grounding import attention_localization, difference_localization
    from diffprobe.store import open_store, provenance

    tree = open_store(store)
    target = shared.table_place(out, store, f"localization-{of}")
    options: dict[str, Any] = {"sites": sites or None, "timesteps": timesteps or None, "seed": seed}
    if of == "attention":
        options |= {"conditioning": ",".join(conditioning) or "caption", "roles": roles, "by_head": by_head}
        frame = attention_localization(tree, data or None, **options)
    elif of == "difference":
        options |= {"conditionings": conditioning or None}
        frame = difference_localization(tree, data or None, **options)
    else:
        raise ValueError(f"--of {of!r} is not one of attention, difference.")
    origin = provenance(tree)
    save_table(
        frame, target, store, origin, {"probe": "localization", "of": of, "left_out": frame.attrs["left_out"], **options}
    )
    _show_localization(frame)
    for reason, number in frame.attrs["left_out"].items():
        say(f"  left out: {number} {reason}")
    say(f"{len(frame)} scores in {target}")
    say_next(["plot", "localization", target])


def _show_localization(frame: pd.DataFrame) -> None:
    """The best cell of a few scores, with chance and the lead over the control of another word or text."""
    own = str(frame["map"].iloc[0])
    by, control = ("role", "wrong word") if own == "word" else ("conditioning", "other text")
    cell = [by, "score", "site", "timestep", *(["head"] if "head" in frame else [])]
    leads = frame[frame["map"] == control].set_index(cell)[["lead", "lead_low", "lead_high"]]
    mine = frame[(frame["map"] == own) & frame["score"].isin(["pointing", "iou_tuned", "auc"]) & frame["value"].notna()]
    rows = shared.best(mine, [by, "score"])
    for row in rows:
        lead = leads.loc[tuple(row[name] for name in cell)]
        compared = "{lead:+.3f} [{lead_low:+.3f}, {lead_high:+.3f}]" if lead.notna().all() else "none to compare"
        row["over"] = compared.format(**lead)
    columns = {by: f"{{{by}}}", "score": "{score}", "best site": "{site}", "timestep": "{timestep}", "value": "{value:.3f}"}
    show(rows, columns | shared.INTERVAL | {"chance": "{chance:.3f}", f"lead over {control}": "{over}", "n": "{n}"})
