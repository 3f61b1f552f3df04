"""Keypoint matching against a plain loop, planted correspondences, drawn twins, and a small SPair-71k."""

import json

import numpy as np
import pytest
import xarray as xr
from PIL import Image

from diffprobe.data import FolderDataset
from diffprobe.data.keypoints import KeypointPair, twin_keypoints
from diffprobe.data.spair import read_spair
from diffprobe.data.twins import FAR, TwinsDataset
from diffprobe.probes.correspondence import correspondence, match


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def array(values, ids=("s", "t")):
    return xr.DataArray(values, dims=("sample", "channel", "y", "x"), coords={"sample": list(ids)})


def pair(source_points, target_points, box=(0.2, 0.2, 0.8, 0.5), size=(200.0, 100.0), **given):
    points = {"source_points": np.array(source_points), "target_points": np.array(target_points)}
    names = {"source": "s", "target": "t", "group": "g", "category": "star"} | given
    return KeypointPair(**points, box=box, size=size, **names)


# --- oracle ---------------------------------------------------------------------------------------


def sampled(maps, x, y):
    """Bilinear value at a fraction of the image, edges repeated."""
    height, width = maps.shape[1:]
    x, y = np.clip(x * width - 0.5, 0, width - 1), np.clip(y * height - 0.5, 0, height - 1)
    x0, y0 = int(np.floor(x)), int(np.floor(y))
    x1, y1 = min(x0 + 1, width - 1), min(y0 + 1, height - 1)
    top = (1 - (x - x0)) * maps[:, y0, x0] + (x - x0) * maps[:, y0, x1]
    low = (1 - (x - x0)) * maps[:, y1, x0] + (x - x0) * maps[:, y1, x1]
    return (1 - (y - y0)) * top + (y - y0) * low


def matched(source, target, point, grid):
    asked, best, place = sampled(source, *point), -np.inf, None
    for row in range(grid):
        for column in range(grid):
            here = ((column + 0.5) / grid, (row + 0.5) / grid)
            found = sampled(target, *here)
            cosine = asked @ found / np.linalg.norm(asked) / np.linalg.norm(found)
            if cosine > best:
                best, place = cosine, here
    return place


def test_matches_agree_with_a_plain_loop():
    source, target = normal(6, 4, 5), normal(6, 3, 7, seed=1)
    points = np.random.default_rng(2).uniform(size=(8, 2))
    expected = [matched(source, target, point, 21) for point in points]
    np.testing.assert_allclose(match(source, target, points, grid=21), expected)


def test_scores_agree_with_a_plain_loop():
    rng = np.random.default_rng(3)
    maps = normal(4, 5, 6, 6)
    ids = list("abcd")
    pairs = [
        pair(rng.uniform(size=(n, 2)), rng.uniform(size=(n, 2)), source=ids[i], target=ids[j], group=str(i), size=(60.0, 90.0))
        for n, i, j in ((3, 0, 1), (5, 1, 2), (2, 3, 0), (4, 2, 0))
    ]
    table = correspondence(array(maps, ids), pairs, alphas=(0.5,), grid=12, standardise=False)
    shares, right, positions = [], [], []
    for p in pairs:
        guesses = [matched(maps[ids.index(p.source)], maps[ids.index(p.target)], q, 12) for q in p.source_points]
        reach = 0.5 * max(0.6 * 60, 0.3 * 90)
        hits = [
            np.hypot((g[0] - t[0]) * 60, (g[1] - t[1]) * 90) <= reach for g, t in zip(guesses, p.target_points, strict=True)
        ]
        same = [
            np.hypot((g[0] - t[0]) * 60, (g[1] - t[1]) * 90) <= reach
            for g, t in zip(p.source_points, p.target_points, strict=True)
        ]
        shares.append(np.mean(hits))
        right += hits
        positions += same
    point, image = table.itertuples()
    assert (point.per, image.per) == ("point", "image")
    assert point.value == pytest.approx(np.mean(right)) and image.value == pytest.approx(np.mean(shares))
    assert point.position == pytest.approx(np.mean(positions))
    assert (point.n, image.n, point.n_groups) == (14, 4, 4)


# --- planted --------------------------------------------------------------------------------------


def shifted(seed=0, count=30, noise=0.3):
    """Each target is its source moved two cells to the right, with noise; points are cell centres."""
    rng = np.random.default_rng(seed)
    values, pairs = [], []
    for number in range(count):
        source = rng.normal(size=(24, 8, 8))
        values += [source, np.roll(source, 2, axis=2) + noise * rng.normal(size=source.shape)]
        cells = rng.integers([0, 0], [6, 8], size=(4, 2))
        points = (cells + 0.5) / 8
        target = points + np.array([2 / 8, 0])
        names = {"source": f"{number}a", "target": f"{number}b", "group": str(number)}
        pairs.append(pair(points, target, box=(0, 0, 1, 1), size=(80.0, 80.0), **names))
    ids = [f"{n}{side}" for n in range(count) for side in "ab"]
    return array(np.stack(values), ids), pairs


def test_a_planted_shift_is_found_and_position_alone_does_not_find_it():
    features, pairs = shifted()
    row = correspondence(features, pairs, grid=24).iloc[0]
    assert row.value > 0.95 and row.low > row.chance + 0.5
    assert row.position == 0 and 0 < row.position_high < 0.15  # Wilson over 30 groups
    assert row.chance == pytest.approx(np.pi * 0.1**2, rel=0.25)  # a disc, cut at the borders


def test_noise_is_at_chance():
    features, pairs = shifted(count=60)
    noise = array(normal(*features.shape, seed=9), features.sample.values)
    row = correspondence(noise, pairs, alphas=(0.2,), grid=24).iloc[0]
    assert row.low < row.chance < row.high


def test_a_massive_channel_is_disarmed_by_standardising():
    features, pairs = shifted(noise=0.1)
    spoiled = features.copy()
    spoiled[:, 0] = 1e3 * normal(60, 8, 8, seed=5)
    raw, standard = (correspondence(spoiled, pairs, grid=16, standardise=s).iloc[0] for s in (False, True))
    assert standard.value > 0.9 > raw.value + 0.3


@pytest.mark.parametrize("level", [0.0, 0.1])
@pytest.mark.parametrize("standardise", [True, False])
def test_constant_features_find_no_place_and_say_so(level, standardise):
    pairs = [
        pair([(0.1, 0.1)], [(0.02, 0.02)], source="a", target="b"),
        pair([(0.7, 0.3)], [(0.02, 0.02)], source="b", target="a"),
    ]
    table = correspondence(
        array(np.full((2, 3, 4, 4), level), list("ab")), pairs, alphas=(0.5,), grid=12, standardise=standardise
    )
    assert table[["value", "low", "high"]].isna().all().all() and table["reason"].str.startswith("2 of 2 points").all()
    assert table["chance"].notna().all()


def test_a_place_of_zeros_is_like_nothing():
    source, target = np.ones((2, 1, 1)), np.full((2, 3, 3), -1.0)
    target[:, 0, 0] = 0
    target[0, 2, 2] = -0.5  # all others point away exactly
    np.testing.assert_allclose(match(source, target, np.array([[0.5, 0.5]]), grid=3), [[2.5 / 3, 2.5 / 3]])


def test_dimensions_tolerances_and_categories_become_rows():
    features, pairs = shifted(count=6)
    both = xr.concat([features, features[:, :, :, ::-1]], "timestep").assign_coords(timestep=[10, 500])
    pairs[0] = pair(
        pairs[0].source_points, pairs[0].target_points, source="0a", target="0b", group="0", category="arrow", size=(80.0, 80.0)
    )
    table = correspondence(both, pairs, alphas=(0.1, 0.3), grid=8, by_category=True)
    assert len(table) == 2 * 2 * 3 * 2  # timesteps, tolerances, categories, per
    assert table.query("per == 'image' and category == 'star'")["n"].tolist() == [5] * 4
    wide = table.pivot_table(index=["timestep", "per", "category"], columns="alpha", values="value")
    assert (wide[0.3] >= wide[0.1]).all()


# --- drawn twins ----------------------------------------------------------------------------------


def test_twin_keypoints_lie_on_the_same_object():
    dataset = TwinsDataset("winoground", 12)
    samples = {dataset[i].id: dataset[i] for i in range(24)}
    pairs = twin_keypoints(dataset)
    assert len(pairs) == 6 * 2 * 2  # every odd item: two objects, both directions
    for p in pairs:
        pixels = [np.asarray(samples[name].load(), np.float64) for name in (p.source, p.target)]
        x, y = (p.target_points[0] * 128).astype(int)
        masks = samples[p.target].masks()
        inside = [k for k, o in enumerate(samples[p.target].objects) if o["shape"] == p.category and masks[k][y, x]]
        assert len(inside) == 1
        y, x = np.nonzero(masks[inside[0]])
        ends = np.array([x.min(), y.min(), x.max() + 1, y.max() + 1]) / 128
        np.testing.assert_allclose(p.box, ends, atol=1.5 / 128)  # the outline's box is the drawn mask's
        for u, v in p.target_points:  # every extremity is on the mask, but for the tip of a needle
            assert np.hypot(x + 0.5 - u * 128, y + 0.5 - v * 128).min() < 2
        # the same colour at the centre of both: a colour of the object, or the background's shade through it
        colours = [
            im[int(q[0, 1] * 128), int(q[0, 0] * 128)] for im, q in zip(pixels, (p.source_points, p.target_points), strict=True)
        ]
        assert np.abs(colours[0] - colours[1]).max() < 130
        # neither turned nor scaled
        np.testing.assert_allclose(p.source_points - p.source_points[0], p.target_points - p.target_points[0], atol=1e-9)


def test_a_distant_view_shrinks_the_points_about_the_image_centre():
    dataset = TwinsDataset("mmvp", 36)
    far = [p for p in twin_keypoints(dataset) if dataset.pair(int(p.group)).pattern == "viewpoint"]
    assert far
    for p in far:
        scale = FAR if dataset.pair(int(p.group)).scenes["ab".index(p.target[-1])].zoom == FAR else 1 / FAR
        np.testing.assert_allclose(p.target_points - 0.5, scale * (p.source_points - 0.5))


def test_twins_whose_objects_stay_give_no_points():
    dataset = TwinsDataset("mmvp", 18)
    patterns = {dataset.pair(int(p.group)).pattern for p in twin_keypoints(dataset)}
    assert patterns <= {"position", "viewpoint"}
    assert "position" in patterns
    assert len(twin_keypoints(dataset, moved=2.0)) == 0


def test_pixels_alone_find_moved_objects():
    """An end-to-end check of geometry: colours of the image as features, far above chance and above position."""
    dataset = TwinsDataset("winoground", 16)
    images = np.stack([np.asarray(dataset[i].load().resize((32, 32), Image.Resampling.BOX), np.float32) for i in range(32)])
    windows = np.pad(images, ((0, 0), (2, 2), (2, 2), (0, 0)), mode="edge")
    shifts = [windows[:, dy : dy + 32, dx : dx + 32] for dy in range(5) for dx in range(5)]
    values = np.concatenate(shifts, axis=-1).transpose(0, 3, 1, 2)
    features = array(values, [dataset[i].id for i in range(32)])
    row = correspondence(features, twin_keypoints(dataset), alphas=(0.2,), grid=64).iloc[0]
    assert row.low > 0.3 > row.chance_box > row.chance
    assert row.position == 0


# --- SPair-71k ------------------------------------------------------------------------------------


@pytest.fixture
def spair(tmp_path):
    """The published layout: two photographs of cats, one of a bus, three pairs."""
    root = tmp_path / "SPair-71k"
    rng = np.random.default_rng(0)
    for name, size in (("cat/2008_1", (60, 40)), ("cat/2008_2", (50, 80)), ("bus/2009_3", (64, 64))):
        path = root / "JPEGImages" / f"{name}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(256, size=(size[1], size[0], 3), dtype=np.uint8)).save(path)

    def write(split, number, category, source, target, sizes, points, box):
        stem = f"{number:06d}-{source}-{target}:{category}"
        annotation = {
            "filename": stem, "pair_id": number, "category": category, "src_imname": f"{source}.jpg", "trg_imname": f"{target}.jpg",
            "src_imsize": [*sizes[0], 3], "trg_imsize": [*sizes[1], 3], "src_bndbox": [2, 2, 30, 30], "trg_bndbox": box,
            "src_kps": points[0], "trg_kps": points[1], "kps_ids": [str(i) for i in range(len(points[0]))],
            "src_pose": "Left", "trg_pose": "Left", "mirror": 0, "viewpoint_variation": 0, "scale_variation": 1, "truncation": 0,
            "occlusion": 0,
        }  # fmt: skip
        path = root / "PairAnnotation" / split / f"{stem}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(annotation))

    cats = ((60, 40), (50, 80))
    write("test", 1, "cat", "2008_1", "2008_2", cats, ([[15, 10], [59, 39]], [[25, 40], [5, 4]]), [10, 20, 40, 70])
    write("test", 2, "cat", "2008_2", "2008_1", cats[::-1], ([[25, 40]], [[15, 10]]), [0, 0, 60, 30])
    write("test", 3, "bus", "2009_3", "2009_3", ((64, 64),) * 2, ([[32, 32]], [[32, 32]]), [0, 0, 64, 32])
    write("trn", 4, "cat", "2008_1", "2008_1", (cats[0],) * 2, ([[1, 1]], [[1, 1]]), [0, 0, 8, 8])
    return root


def test_spair_pairs_name_the_folder_datasets_samples(spair):
    pairs = read_spair(spair)
    ids = {FolderDataset(spair / "JPEGImages")[i].id for i in range(3)}
    assert {p.source for p in pairs} | {p.target for p in pairs} == ids
    first = pairs[0]
    np.testing.assert_allclose(first.source_points, [[15 / 60, 10 / 40], [59 / 60, 39 / 40]])
    np.testing.assert_allclose(first.target_points, [[0.5, 0.5], [0.1, 0.05]])
    assert (first.size, first.category, first.box) == ((50, 80), "cat", (0.2, 0.25, 0.8, 0.875))
    assert first.box_side == 50  # 30 x 50 pixels
    assert [len(read_spair(spair, "test", c)) for c in ("cat", "bus")] == [2, 1]
    assert len(read_spair(spair, "trn")) == 1


@pytest.mark.parametrize("fit", ["squash", "crop", "pad"])
def test_distances_stay_in_the_photographs_pixels_under_every_fit(spair, fit):
    kept = read_spair(spair, resolution=(32, 32), fit=fit)
    cat = next(p for p in kept if p.source == "cat/2008_1.jpg")
    assert cat.box_side == pytest.approx(50)
    # a pixel of the photograph is 1 / size of the model's image
    squashed = read_spair(spair)[0].target_points[0] * (50, 80)
    shown = cat.target_points[0] * cat.size
    centre = np.array(cat.size) / 2
    np.testing.assert_allclose(shown - centre, squashed - [25, 40], atol=1e-9)
    if fit == "crop":  # the points near the corners of both photographs are out of sight
        assert len(cat.source_points) == 1


def test_cropped_points_lie_where_the_image_shows_them(spair):
    """A white dot at a keypoint, photographed through the same crop, is found at the keypoint's fraction."""
    from diffprobe.data.images import fit_image

    for fit in ("squash", "crop", "pad"):
        image = np.zeros((40, 60, 3), np.uint8)
        image[9:11, 14:16] = 255  # centred on x 15, y 10
        shown = np.asarray(fit_image(Image.fromarray(image), (128, 128), fit), np.float64).mean(axis=2)
        shown[shown > 254.5] = 0 if fit == "pad" and shown[0, 0] > 254 else shown[shown > 254.5]
        inner = shown * (shown > 30)
        y, x = np.mgrid[:128, :128] + 0.5
        seen = np.array([np.average(x, weights=inner), np.average(y, weights=inner)]) / 128
        pairs = [p for p in read_spair(spair, "test", "cat", resolution=(128, 128), fit=fit) if p.source == "cat/2008_1.jpg"]
        np.testing.assert_allclose(pairs[0].source_points[0], seen, atol=0.01)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_points_of_turned_photographs_lie_where_the_folder_shows_them(spair, orientation):
    """Points are of the stored pixels; a folder of photographs shows them upright."""
    stored = np.zeros((40, 60, 3), np.uint8)
    stored[9:11, 14:16] = 255
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = spair / "JPEGImages" / "cat" / "2008_1.jpg"
    Image.fromarray(stored).save(path, exif=exif, quality=95)
    shown = np.asarray(FolderDataset(spair / "JPEGImages")[1].load(), np.float64).mean(axis=2)
    y, x = np.mgrid[: shown.shape[0], : shown.shape[1]] + 0.5
    seen = [np.average(axis, weights=shown * (shown > 60)) for axis in (x, y)]
    first, second = read_spair(spair, "test", "cat")
    np.testing.assert_allclose(first.source_points[0] * shown.shape[::-1], seen, atol=0.3)
    np.testing.assert_allclose(second.target_points[0] * shown.shape[::-1], seen, atol=0.3)
    assert second.size == shown.shape[::-1] and second.box_side == 60
    box = np.reshape(second.box, (2, 2)) * second.size
    assert (box[0] <= seen).all() and (seen <= box[1]).all() and np.prod(box[1] - box[0]) == pytest.approx(60 * 30)
    if orientation > 4:  # annotated as shown, which the sizes tell
        for file in (spair / "PairAnnotation" / "test").glob("*.json"):
            swapped = json.loads(file.read_text())
            for side in ("src", "trg"):
                swapped[f"{side}_imsize"] = (
                    [40, 60, 3] if swapped[f"{side}_imname"] == "2008_1.jpg" else swapped[f"{side}_imsize"]
                )
            file.write_text(json.dumps(swapped))
        np.testing.assert_allclose(read_spair(spair, "test", "cat")[0].source_points[0], [15 / 40, 10 / 60])


def test_spair_is_scored_from_features(spair):
    ids = ["bus/2009_3.jpg", "cat/2008_1.jpg", "cat/2008_2.jpg"]
    row = correspondence(array(normal(3, 4, 6, 6), ids), read_spair(spair), grid=24, by_category=True)
    assert row.query("per == 'point'")["n"].tolist() == [4, 1, 3]
    bus = row.query("category == 'bus' and per == 'point'").iloc[0]
    assert bus.value == bus.position == 1  # the same image, the same point


# --- errors ---------------------------------------------------------------------------------------


def test_errors_say_what_was_asked_and_found(spair, tmp_path):
    features, pairs = shifted(count=2)
    with pytest.raises(ValueError, match=r"No pair has both images among the samples: the first pair is 's' and 't'"):
        correspondence(features, [pair([[0.5, 0.5]], [[0.5, 0.5]])])
    with pytest.raises(ValueError, match="there are no pairs"):
        correspondence(features, [])
    with pytest.raises(ValueError, match="x is missing"):
        correspondence(features.mean("x"), pairs)
    with pytest.raises(ValueError, match="Tolerances are positive"):
        correspondence(features, pairs, alphas=(0.0,))
    broken = features.copy()
    broken[0] = np.nan
    with pytest.raises(ValueError, match="1 of 4 samples"):
        correspondence(broken, pairs)
    with pytest.raises(ValueError, match="has no folder PairAnnotation"):
        read_spair(tmp_path)
    with pytest.raises(ValueError, match="'train' is not one of trn, val, test"):
        read_spair(spair, "train")
    with pytest.raises(ValueError, match="holds no pair"):
        read_spair(spair, "val")
    with pytest.raises(ValueError, match="'dog' is not in this split; it has bus, cat"):
        read_spair(spair, category="dog")
    file = sorted((spair / "PairAnnotation" / "trn").glob("*.json"))[0]
    entry = json.loads(file.read_text())
    file.write_text(json.dumps(entry | {"trg_kps": []}))
    with pytest.raises(ValueError, match="1 source points and 0 target points"):
        read_spair(spair, "trn")
    del entry["trg_kps"]
    file.write_text(json.dumps(entry))
    with pytest.raises(ValueError, match="it lacks trg_kps"):
        read_spair(spair, "trn")
    file.write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        read_spair(spair, "trn")


def test_every_bad_annotation_is_listed(spair):
    files = sorted((spair / "PairAnnotation" / "test").glob("*.json"))[:2]
    for file in files:
        file.write_text("{")
    with pytest.raises(ValueError, match=rf"{files[0].name}' is not JSON.*; .*{files[1].name}' is not JSON"):
        read_spair(spair)
