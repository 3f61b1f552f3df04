"""Annotated photographs: COCO, RefCOCO and VOC in their published layouts, and what is refused."""

from __future__ import annotations

import json
import shutil
import sys
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from skimage.draw import polygon as draw_polygon

from diffprobe.data import AnnotatedDataset, ImageError, VocDataset, coco_dataset, iterate, load_dataset, refcoco_dataset
from diffprobe.data.annotations import VOC_CLASSES
from diffprobe.data.categories import category_spans, listing, plural_forms
from diffprobe.data.segmentations import decode_masks

HEIGHT, WIDTH = 24, 32
SQUARE = [2.0, 3.0, 10.0, 3.0, 10.0, 11.0, 2.0, 11.0]  # x, y pairs: columns 2-9, rows 3-10


def runs(mask: np.ndarray) -> dict[str, Any]:
    """COCO's uncompressed run lengths: column by column, zeros first."""
    flat = mask.T.ravel().astype(int)
    edges = np.flatnonzero(np.diff(flat)) + 1
    counts = np.diff([0, *edges, flat.size]).tolist()
    return {"size": list(mask.shape), "counts": [0, *counts] if flat[0] else counts}


def crowd() -> np.ndarray:
    mask = np.zeros((HEIGHT, WIDTH), bool)
    mask[5:9, 20:30] = mask[0, 0] = True
    return mask


def instances() -> dict[str, Any]:
    """The keys of instances_val2017.json, with ids out of order as there."""
    images = [
        {"license": 4, "file_name": name, "coco_url": "", "height": HEIGHT, "width": WIDTH, "date_captured": "", "flickr_url": "", "id": number}
        for name, number in (("000000000785.jpg", 785), ("000000000139.jpg", 139))
    ]  # fmt: skip
    annotation = lambda number, image, category, segmentation, iscrowd=0: {  # noqa: E731
        "segmentation": segmentation, "area": 64.0, "iscrowd": iscrowd, "image_id": image, "bbox": [2.0, 3.0, 8.0, 8.0],
        "category_id": category, "id": number,
    }  # fmt: skip
    return {
        "info": {"description": "COCO 2017 Dataset"}, "licenses": [], "images": images,
        "annotations": [
            annotation(1, 139, 18, [SQUARE]), annotation(2, 139, 1, runs(crowd()), 1),
            annotation(3, 139, 18, [SQUARE[:6], [20, 1, 24, 1, 24, 5]]), annotation(4, 785, 58, [SQUARE]),
        ],
        "categories": [
            {"supercategory": "person", "id": 1, "name": "person"}, {"supercategory": "animal", "id": 18, "name": "dog"},
            {"supercategory": "food", "id": 58, "name": "hot dog"},
        ],
    }  # fmt: skip


def captions() -> dict[str, Any]:
    rows = [(139, 1, "Two dogs  and a person near\na dog."), (785, 2, "A hot dog."), (139, 3, "People. ")]
    return {
        "info": {},
        "licenses": [],
        "images": [],
        "annotations": [{"image_id": image, "id": number, "caption": text} for image, number, text in rows],
    }


@pytest.fixture
def coco(tmp_path: Path) -> Path:
    folder = tmp_path / "val2017"
    folder.mkdir()
    for name in ("000000000139.jpg", "000000000785.jpg"):
        Image.new("RGB", (WIDTH, HEIGHT), "grey").save(folder / name)
    (tmp_path / "instances.json").write_text(json.dumps(instances()))
    (tmp_path / "captions.json").write_text(json.dumps(captions()))
    return tmp_path


def edited(folder: Path, change: Callable[[dict[str, Any]], object], name: str = "instances.json") -> Path:
    data = json.loads((folder / name).read_text())
    change(data)
    path = folder / f"edited-{name}"
    path.write_text(json.dumps(data))
    return path


def test_coco_samples_by_id_with_masks_captions_and_spans(coco: Path) -> None:
    dataset = coco_dataset(coco / "instances.json", coco / "val2017", coco / "captions.json")
    assert [s.id for s in iterate(dataset)] == ["000000000139.jpg", "000000000785.jpg"]
    sample = dataset[0]
    assert sample.load().size == (WIDTH, HEIGHT)
    assert [o["category"] for o in sample.objects] == ["dog", "person", "dog"]
    assert [c.text for c in sample.captions] == ["Two dogs and a person near a dog.", "People."]
    assert [(w, s.objects) for w, s in sample.captions[0].words()] == [("dogs", (0, 2)), ("person", (1,)), ("dog", (0, 2))]
    assert [(w, s.objects) for w, s in sample.captions[1].words()] == [("People", (1,))]
    assert [(w, s.objects) for w, s in dataset[1].captions[0].words()] == [("hot dog", (0,))]
    assert isinstance(dataset, AnnotatedDataset) and len(dataset) == 2
    with pytest.raises(IndexError):
        dataset[2]


def test_masks_of_polygons_and_runs_agree_with_another_rasteriser(coco: Path) -> None:
    masks = coco_dataset(coco / "instances.json", coco / "val2017")[0].masks()
    assert masks.shape == (3, HEIGHT, WIDTH) and masks.dtype == bool
    expected = np.zeros((HEIGHT, WIDTH), bool)
    expected[3:11, 2:10] = True
    np.testing.assert_array_equal(masks[0], expected)
    np.testing.assert_array_equal(masks[1], crowd())
    two = np.zeros((HEIGHT, WIDTH), bool)
    for xy in (SQUARE[:6], [20, 1, 24, 1, 24, 5]):
        two[draw_polygon(np.array(xy[1::2]) - 0.5, np.array(xy[::2]) - 0.5, (HEIGHT, WIDTH))] = True
    assert (masks[2] ^ two).sum() <= 12, "the same but for pixels on the slanted edges"
    assert masks[2].sum() > 25


def test_compressed_runs_are_read_and_broken_ones_refused() -> None:
    from pycocotools import mask as coco_mask

    text = coco_mask.encode(np.asfortranarray(crowd().astype(np.uint8)))["counts"].decode()
    found = decode_masks([{"size": [HEIGHT, WIDTH], "counts": text}, []], (HEIGHT, WIDTH), "x")
    np.testing.assert_array_equal(found[0], crowd())
    assert not found[1].any(), "no segmentation, empty mask"
    rng = np.random.default_rng(0)
    for mask in (rng.random((HEIGHT, WIDTH)) < 0.5, np.ones((HEIGHT, WIDTH)), np.zeros((HEIGHT, WIDTH)), np.eye(HEIGHT, WIDTH)):
        packed = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))["counts"]
        for counts in (packed, packed.decode()):
            found = decode_masks([{"size": [HEIGHT, WIDTH], "counts": counts}], (HEIGHT, WIDTH), "x")
            np.testing.assert_array_equal(found[0], mask)
    for broken in (
        text + "zzzzPPPP9",
        text[:-1],
        text[:-3],
        "",
        "zzzz",
        "\xe9",
        "a",
    ):  # the decoder fills such with stray memory
        with pytest.raises(ValueError, match=r"RLE|runs of .* pixels; its image has 768"):
            decode_masks([{"size": [HEIGHT, WIDTH], "counts": broken}], (HEIGHT, WIDTH), "x")


@pytest.mark.parametrize(
    ("segmentation", "message"),
    [
        ({"size": [9, 9], "counts": [81]}, r"size \[9, 9\]; its image has \[24, 32\]"),
        ({"size": [HEIGHT, WIDTH], "counts": [5, 5]}, "runs of 10 pixels; its image has 768"),
        ({"size": [HEIGHT, WIDTH]}, "has no counts"),
        ([[1, 2, 3, 4]], "at least three x, y pairs"),
        ([[1, 2, 3, 4, float("nan"), 4]], "at least three x, y pairs"),
        ([[1, 2, 1e9, 4, 5, 6]], "reaches from 1 to 1e"),
    ],
)
def test_segmentations_that_do_not_fit_are_refused(segmentation: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        decode_masks([segmentation], (HEIGHT, WIDTH), "x")


def test_without_captions_an_image_is_described_by_what_is_in_it(coco: Path) -> None:
    dataset = coco_dataset(coco / "instances.json", coco / "val2017")
    assert dataset[0].captions[0].text == "a photo of dogs and a person"
    assert [(w, s.objects) for w, s in dataset[0].captions[0].words()] == [("dogs", (0, 2)), ("person", (1,))]
    assert listing({}).text == "a photo" and listing({"person": (0, 1)}).text == "a photo of people"


@pytest.mark.parametrize(
    ("name", "forms"),
    [("knife", ("knife", "knives")), ("sheep", ("sheep",)), ("baby", ("baby", "babies")), ("toy", ("toy", "toys")),
     ("couch", ("couch", "couches")), ("traffic light", ("traffic light", "traffic lights"))],
)  # fmt: skip
def test_plurals(name: str, forms: tuple[str, ...]) -> None:
    assert plural_forms(name) == forms


def test_names_inside_words_are_not_matched() -> None:
    assert category_spans("a catalogue of carts", {"cat": (0,), "car": (1,)}) == ()
    assert category_spans("anything", {}) == ()


def test_the_spec_makes_the_same_dataset_again_and_limit_takes_the_first(coco: Path) -> None:
    spec = f"coco:{coco}/instances.json?images={coco}/val2017&captions={coco}/captions.json"
    dataset = load_dataset(spec)
    again = load_dataset(dataset.spec)
    assert again.fingerprint() == dataset.fingerprint() and again[0].captions == dataset[0].captions
    few = load_dataset(f"{spec}&limit=1")
    assert [s.id for s in iterate(few)] == ["000000000139.jpg"] and len(load_dataset(few.spec)) == 1
    assert few.fingerprint() != dataset.fingerprint()
    other = edited(coco, lambda d: d["annotations"][0].update(segmentation=[SQUARE[:6]]))
    assert (
        coco_dataset(other, coco / "val2017").fingerprint()
        != coco_dataset(coco / "instances.json", coco / "val2017").fingerprint()
    )


def test_every_bad_segmentation_is_listed_before_anything_is_read(coco: Path) -> None:
    def spoil(data: dict[str, Any]) -> None:
        data["annotations"][0]["segmentation"] = [[1, 2, 3, 4]]
        data["annotations"][3]["segmentation"] = {"size": [9, 9], "counts": [81]}

    with pytest.raises(
        ValueError, match=r"2 entries of the segmentations.*polygon of 000000000139\.jpg.*mask of 000000000785\.jpg"
    ):
        coco_dataset(edited(coco, spoil), coco / "val2017")
    assert (
        len(coco_dataset(edited(coco, lambda d: d["annotations"][3].update(segmentation="x")), coco / "val2017", limit=1)) == 1
    )
    for wrong in ("x", 7, [3], ["x"], {"size": 3, "counts": "a"}, {"size": [HEIGHT, WIDTH], "counts": "zzzz"}):
        with pytest.raises(ValueError, match=r"A (polygon|mask) of 000000000785\.jpg"):
            coco_dataset(edited(coco, lambda d: d["annotations"][3].update(segmentation=wrong)), coco / "val2017")  # noqa: B023


def test_every_bad_entry_of_a_file_is_listed(coco: Path) -> None:
    def spoil(data: dict[str, Any]) -> None:
        data["images"][0].update(height="24", file_name="../x.jpg")
        data["annotations"][0].update(category_id=99)
        data["annotations"][1].update(image_id=None)

    with pytest.raises(ValueError, match="height is '24'") as found:
        coco_dataset(edited(coco, spoil), coco / "val2017")
    for fault in ("leaves the folder of images", "category 99; one of them is not listed", "image_id is None where int"):
        assert fault in str(found.value)
    rows = [{**ref, "ann_id": wrong} for ref, wrong in zip(refs(), (99, "7"), strict=False)]
    (coco / "refs.json").write_text(json.dumps(rows))
    with pytest.raises(ValueError, match=r"names annotation 99 .*; .*ann_id is '7' where int was expected"):
        refcoco_dataset(coco / "refs.json", coco / "val2017", coco / "instances.json")


def test_run_lengths_need_no_pycocotools(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pycocotools.mask", None)
    assert decode_masks([{"size": [1, 3], "counts": [1, 2]}], (1, 3), "x").tolist() == [[[False, True, True]]]
    with pytest.raises(ValueError, match="COCO's polygons need pycocotools"):
        decode_masks([[[0, 0, 2, 0, 2, 2]]], (3, 3), "x")


def test_every_absent_image_is_listed(coco: Path) -> None:
    for path in (coco / "val2017").iterdir():
        path.unlink()
    with pytest.raises(ValueError, match=r"2 of the 2 annotated images.*'000000000139\.jpg'; '000000000785\.jpg'"):
        coco_dataset(coco / "instances.json", coco / "val2017")
    (coco / "val2017" / "000000000139.jpg").symlink_to(coco / "val2017" / "000000000139.jpg")  # a link to itself
    with pytest.raises(ValueError, match="2 of the 2"):
        coco_dataset(coco / "instances.json", coco / "val2017")


def test_accents_of_names_and_pictures_of_the_same_size(coco: Path) -> None:
    composed, decomposed = (unicodedata.normalize(form, "caf\xe9.bmp") for form in ("NFC", "NFD"))
    path = edited(coco, lambda d: d["images"][0].update(file_name=composed))
    Image.new("RGB", (WIDTH, HEIGHT), "red").save(coco / "val2017" / decomposed)
    dataset = coco_dataset(path, coco / "val2017")
    before = dataset.fingerprint()
    assert dataset[1].load().getpixel((0, 0)) == (255, 0, 0)
    Image.new("RGB", (WIDTH, HEIGHT), "blue").save(coco / "val2017" / decomposed)
    assert coco_dataset(path, coco / "val2017").fingerprint() != before


@pytest.mark.parametrize(("name", "text", "words"), [
    ("Dog", "a dog and DOGS", ["dog", "DOGS"]), ("Person", "People and a person", ["People", "person"]),
    ("TV", "Two tvs", ["tvs"]), ("disk", "a di\u017fk, a dis\u212a", ["di\u017fk", "dis\u212a"]), ("igloo", "\u0130gloo", ["\u0130gloo"]),
    (" ", "a b", []), ("BUS", "buses", ["buses"]),
])  # fmt: skip
def test_categories_match_whatever_their_case(name: str, text: str, words: list[str]) -> None:
    assert [text[s.start : s.end] for s in category_spans(text, {name: (0,)})] == words
    assert listing({"Person": (0, 1)}).text == "a photo of people"


@pytest.mark.parametrize("name", ["../secret.jpg", "/etc/passwd", "a/../../x.jpg", "C:\\x.jpg", "..\\x.jpg"])
def test_names_that_leave_the_folder_are_refused(coco: Path, name: str) -> None:
    path = edited(coco, lambda d: d["images"][0].update(file_name=name))
    with pytest.raises(ValueError, match="leaves the folder of images"):
        coco_dataset(path, coco / "val2017")


def test_links_out_of_the_folder_are_refused(coco: Path) -> None:
    Image.new("RGB", (WIDTH, HEIGHT)).save(coco / "secret.jpg")
    (coco / "val2017" / "000000000139.jpg").unlink()
    (coco / "val2017" / "000000000139.jpg").symlink_to(coco / "secret.jpg")
    with pytest.raises(ValueError, match=r"is a link to .*, outside the folder"):
        coco_dataset(coco / "instances.json", coco / "val2017")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.pop("categories"), "has no list 'categories'; it has info, licenses"),
        (lambda d: d["annotations"][0].update(category_id=99), "image 139 and category 99; one of them is not listed"),
        (lambda d: d["annotations"][0].update(image_id="139"), "image_id is '139' where int was expected"),
        (lambda d: d["images"][0].update(id=139), "an image id occurs twice"),
        (lambda d: d["images"][0].update(file_name="gone.jpg"), "1 of the 2 annotated images are not in .*'gone.jpg'.*limit=N"),
        (lambda d: d.update(images=[], annotations=[]), "holds no samples"),
    ],
)
def test_files_that_are_not_coco_are_refused(coco: Path, change: Callable[[dict[str, Any]], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        coco_dataset(edited(coco, change), coco / "val2017")


def test_wrong_files_are_named(coco: Path) -> None:
    (coco / "list.json").write_text("[]")
    (coco / "broken.json").write_text("{")
    (coco / "deep.json").write_text("[" * 100_000)
    for name, message in (
        ("list.json", "holds a list where a dict"),
        ("broken.json", "is not JSON"),
        ("no.json", "does not exist"),
        ("deep.json", "nested too deep"),
    ):
        with pytest.raises(ValueError, match=message):
            coco_dataset(coco / name, coco / "val2017")
    with pytest.raises(ValueError, match=r"captions_\*\.json"):
        coco_dataset(coco / "instances.json", coco / "val2017", coco / "instances.json")
    with pytest.raises(ValueError, match=r"folder of images '.*nowhere' does not exist"):
        coco_dataset(coco / "instances.json", coco / "nowhere")


def test_an_image_of_another_size_is_not_used(coco: Path) -> None:
    Image.new("RGB", (HEIGHT, WIDTH)).save(coco / "val2017" / "000000000139.jpg")
    with pytest.raises(ImageError, match="has 24 x 32 pixels, its annotations are for 32 x 24"):
        coco_dataset(coco / "instances.json", coco / "val2017")[0].load()


ORIENTATIONS = range(1, 9)


def save_turned(path: Path, orientation: int, marked: np.ndarray) -> None:
    """A photograph whose stored pixels are red where the mask is, with a note that viewers turn it by."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(np.where(marked[..., None], (255, 0, 0), (0, 0, 0)).astype(np.uint8)).save(
        path, exif=exif, quality=95, subsampling=0
    )


def overlap(image: Image.Image, mask: np.ndarray) -> float:
    red = np.asarray(image)[..., 0] > 127
    return float((red & mask).sum() / (red | mask).sum())


@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_masks_cover_the_stored_pixels_of_turned_photographs(coco: Path, voc: Path, orientation: int) -> None:
    mask = coco_dataset(coco / "instances.json", coco / "val2017")[0].masks()[0]
    save_turned(coco / "val2017" / "000000000139.jpg", orientation, mask)
    (coco / "refs.json").write_text(json.dumps(refs()))
    for dataset in (
        coco_dataset(coco / "instances.json", coco / "val2017"),
        refcoco_dataset(coco / "refs.json", coco / "val2017", coco / "instances.json"),
    ):
        assert overlap(dataset[0].load(), dataset[0].masks()[0]) > 0.95
    save_turned(voc / "JPEGImages" / "2007_000033.jpg", orientation, VocDataset(voc)[0].masks()[0])
    assert overlap(VocDataset(voc)[0].load(), VocDataset(voc)[0].masks()[0]) > 0.9


def test_annotations_that_fit_only_the_upright_image_are_of_it(coco: Path) -> None:
    mask = coco_dataset(coco / "instances.json", coco / "val2017")[0].masks()[0]
    save_turned(coco / "val2017" / "000000000139.jpg", 6, np.rot90(mask))  # turned clockwise, the mask again
    sample = coco_dataset(coco / "instances.json", coco / "val2017")[0]
    assert overlap(sample.load(), sample.masks()[0]) > 0.95


# --- RefCOCO --------------------------------------------------------------------------------------


def refs() -> list[dict[str, Any]]:
    """Rows of refs(unc).p: file names carry the annotation and are not those of the images."""
    row = lambda number, annotation, split, texts: {  # noqa: E731
        "sent_ids": [number], "file_name": f"COCO_train2014_000000000139_{annotation}.jpg", "ann_id": annotation, "ref_id": number,
        "image_id": 139, "split": split, "category_id": 18,
        "sentences": [{"tokens": t.split(), "raw": t.upper(), "sent_id": k, "sent": t} for k, t in enumerate(texts)],
    }  # fmt: skip
    return [row(7, 1, "val", ["the left dog", "brown one"]), row(8, 3, "train", ["right dog"])]


def test_refcoco_one_sample_a_ref_with_instances(coco: Path) -> None:
    (coco / "refs.json").write_text(json.dumps(refs()))
    dataset = refcoco_dataset(coco / "refs.json", coco / "val2017", coco / "instances.json", split="val")
    assert [s.id for s in iterate(dataset)] == ["000000000139-7"]
    sample = dataset[0]
    assert [c.text for c in sample.captions] == ["the left dog", "brown one"]
    assert [(w, s.objects) for w, s in sample.captions[0].words("phrase")] == [("the left dog", (0,))]
    assert [w for w, _ in sample.captions[0].words()] == ["dog"] and not sample.captions[1].words()
    assert sample.labels == {"image": "000000000139.jpg", "split": "val", "category": "dog"}
    assert sample.masks().sum() == 64 and sample.load().size == (WIDTH, HEIGHT)
    both = load_dataset(f"refcoco:{coco}/refs.json?images={coco}/val2017&instances={coco}/instances.json")
    assert len(both) == 2 and load_dataset(both.spec).fingerprint() == both.fingerprint()
    with pytest.raises(ValueError, match="no split 'testA'; it has train, val"):
        refcoco_dataset(coco / "refs.json", coco / "val2017", coco / "instances.json", split="testA")


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_refcoco_in_the_columns_of_the_hub(coco: Path, suffix: str) -> None:
    data = instances()
    image = next(i for i in data["images"] if i["id"] == 139)
    rows = []
    for ref in refs():
        annotation = next(a for a in data["annotations"] if a["id"] == ref["ann_id"])
        rows.append(
            {
                **ref, "raw_anns": json.dumps(annotation), "raw_image_info": json.dumps(image), "raw_sentences": json.dumps(ref["sentences"]),
                "image_path": "coco/train2014/000000000139.jpg", "bbox": [2.0, 3.0, 10.0, 11.0], "captions": ["the left dog"],
                "global_image_id": "coco.139", "anns_id": f"coco.{ref['ann_id']}",
            }
        )  # fmt: skip
    path = coco / f"refs.{suffix}"
    if suffix == "jsonl":
        path.write_text("\n".join(map(json.dumps, rows)))
    else:
        pd.DataFrame(rows).to_parquet(path)
    dataset = refcoco_dataset(path, coco / "val2017")
    assert [s.id for s in iterate(dataset)] == ["000000000139-7", "000000000139-8"]
    assert dataset[0].captions[1].text == "brown one" and dataset[0].masks().sum() == 64
    assert dataset.fingerprint() == refcoco_dataset(path, coco / "val2017").fingerprint()


def test_pickles_are_never_opened(coco: Path) -> None:
    path = coco / "refs(unc).p"
    path.write_bytes(b"cos\nsystem\n(S'touch " + str(coco / "ran").encode() + b"'\ntR.")  # runs a command when loaded
    with pytest.raises(ValueError, match=r"refs\(unc\)\.p' is a pickle.*as\s+JSON"):
        load_dataset(f"refcoco:{path}?images={coco}/val2017")
    assert not (coco / "ran").exists()


def test_refs_without_masks_ask_for_instances(coco: Path) -> None:
    (coco / "refs.json").write_text(json.dumps(refs()))
    with pytest.raises(ValueError, match=r"give RefCOCO's instances\.json as instances=FILE"):
        refcoco_dataset(coco / "refs.json", coco / "val2017")
    for wrong in (
        {"raw_anns": "[" * 100_000},
        {"raw_anns": "["},
        {"raw_anns": "3"},
        {"raw_anns": None},
        {"sentences": [3]},
        {"sentences": 3},
    ):
        row = refs()[0] | {
            "raw_anns": json.dumps(instances()["annotations"][0]),
            "raw_image_info": json.dumps(instances()["images"][1]),
        }
        (coco / "row.json").write_text(json.dumps([row | wrong]))
        with pytest.raises(ValueError, match=r"row\.json"):
            refcoco_dataset(coco / "row.json", coco / "val2017")
    (coco / "rows.json").write_text('[{"text": "x"}]')
    with pytest.raises(ValueError, match="a row has no sentences"):
        refcoco_dataset(coco / "rows.json", coco / "val2017")
    (coco / "refs.json").write_text(json.dumps([{**refs()[0], "ann_id": 99}]))
    with pytest.raises(ValueError, match=r"annotation 99 of image 139, which '.*instances\.json' does not have"):
        refcoco_dataset(coco / "refs.json", coco / "val2017", coco / "instances.json")


# --- VOC ------------------------------------------------------------------------------------------


def save_indexed(values: np.ndarray, path: Path) -> None:
    image = Image.new("P", values.shape[::-1])
    image.putdata(values.astype(np.uint8).ravel().tolist())
    image.putpalette([k for index in range(256) for k in (index, 255 - index, 7)])
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)


@pytest.fixture
def voc(tmp_path: Path) -> Path:
    root = tmp_path / "VOC2012"
    (root / "ImageSets" / "Segmentation").mkdir(parents=True)
    (root / "ImageSets" / "Segmentation" / "val.txt").write_text("2007_000033\n2007_000042\n")
    (root / "ImageSets" / "Segmentation" / "train.txt").write_text("2007_000042\n")
    objects, classes = np.zeros((2, HEIGHT, WIDTH), int)
    objects[2:8, 2:8], classes[2:8, 2:8] = 1, VOC_CLASSES.index("diningtable")
    objects[12:18, 2:8], classes[12:18, 2:8] = 2, VOC_CLASSES.index("person")
    objects[12:18, 20:28], classes[12:18, 20:28] = 3, VOC_CLASSES.index("person")
    objects[1, 1:9] = classes[1, 1:9] = 255
    for name, keep in (("2007_000033", True), ("2007_000042", False)):
        (root / "JPEGImages").mkdir(exist_ok=True)
        Image.new("RGB", (WIDTH, HEIGHT)).save(root / "JPEGImages" / f"{name}.jpg")
        save_indexed(objects * keep, root / "SegmentationObject" / f"{name}.png")
        save_indexed(classes * keep, root / "SegmentationClass" / f"{name}.png")
    return root


def test_voc_instances_classes_and_captions(voc: Path) -> None:
    dataset = load_dataset(f"voc:{voc}")
    assert isinstance(dataset, VocDataset) and [s.id for s in iterate(dataset)] == ["2007_000033", "2007_000042"]
    sample = dataset[0]
    assert [o["category"] for o in sample.objects] == ["diningtable", "person", "person"]
    assert sample.masks().sum((1, 2)).tolist() == [36, 36, 48], "void pixels belong to nothing"
    assert sample.captions[0].text == "a photo of a dining table and people"
    assert [(w, s.objects) for w, s in sample.captions[0].words()] == [("dining table", (0,)), ("people", (1, 2))]
    assert dataset[1].masks().shape == (0, HEIGHT, WIDTH) and dataset[1].captions[0].text == "a photo"
    assert len(load_dataset(f"voc:{voc}?split=train")) == 1 and len(load_dataset(f"voc:{voc}?limit=1")) == 1
    again = load_dataset(dataset.spec)
    assert (
        (again.name, again.fingerprint()) == (dataset.name, dataset.fingerprint()) == ("voc-VOC2012-val", again.fingerprint())
    )
    assert sample.load().size == (WIDTH, HEIGHT)


def test_voc_folders_that_are_not(voc: Path) -> None:
    with pytest.raises(ValueError, match="no split 'test'; it has train, val"):
        VocDataset(voc, "test")
    with pytest.raises(ValueError, match="name the folder VOC2012 itself"):
        VocDataset(voc.parent)
    (voc / "ImageSets" / "Segmentation" / "bad.txt").write_text("../../x\n")
    with pytest.raises(ValueError, match="leaves the folder of images"):
        VocDataset(voc, "bad")
    Image.new("RGB", (WIDTH, HEIGHT)).save(voc / "SegmentationObject" / "2007_000033.png")
    with pytest.raises(ImageError, match="VOC's are indexed PNGs"):
        VocDataset(voc)[0]
    (voc / "SegmentationClass" / "2007_000033.png").unlink()
    with pytest.raises(ValueError, match=r"1 file\(s\) that the split val lists are not in the folder.*2007_000033\.png"):
        VocDataset(voc)


# --- the command line's words ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["R&D", "what?", "a#1", "100%", "50%25", "a,b", "x?limit=1&split=no", "a=b", "caf\u00e9 au lait", "%41"]
)
def test_a_path_may_hold_what_a_spec_is_made_of(coco: Path, voc: Path, tmp_path: Path, name: str) -> None:
    place = tmp_path / "odd" / name
    shutil.copytree(coco, place)
    (tmp_path / "voc").mkdir()
    shutil.copytree(voc, tmp_path / "voc" / name)
    given = [
        coco_dataset(place / "instances.json", place / "val2017", place / "captions.json", 1),
        VocDataset(tmp_path / "voc" / name, "train"),
        VocDataset(tmp_path / "voc" / name, "val", 1),
    ]
    for dataset in given:
        for spec in (dataset.spec, f"blank:{dataset.spec}"):
            again = load_dataset(spec)
            assert again.spec == spec and [s.id for s in iterate(again)] == [s.id for s in iterate(dataset)]
        assert "," not in dataset.spec, "specs are parted by commas"
        assert load_dataset(dataset.spec).fingerprint() == dataset.fingerprint()


def test_a_path_with_a_question_mark_or_ampersand_can_be_typed(coco: Path, tmp_path: Path) -> None:
    for name in ("R&D", "what?", "R&D?", "100%"):
        place = tmp_path / name
        shutil.copytree(coco, place)
        spec = f"coco:{place}/instances.json?images={place}/val2017&limit=1"
        assert len(load_dataset(spec)) == 1
        assert len(load_dataset(spec.replace("%", "%25").replace("&D", "%26D").replace("?/", "%3F/"))) == 1


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("coco", r"does not say where; write for example 'coco:INSTANCES\.json\?images=FOLDER'"),
        ("coco:x.json", "does not say where the images are; add images=FOLDER"),
        ("coco:x.json?image=y", r"unknown option 'image'; coco takes images, captions, limit\. Did you mean 'images'"),
        ("coco:x.json?images=y&limit=0", "limit is '0'"),
        ("voc:nowhere", "has no split 'val'"),
    ],
)
def test_specs_that_do_not_work_say_how_they_would(spec: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_dataset(spec)
