"""Loaders, splits, batches and scores, and what they say about bad data."""

import json
import tarfile
from hashlib import sha256
from pathlib import Path
from zipfile import ZipFile

import huggingface_hub
import numpy as np
import pytest
from hora_bench.data.base import Score, balanced, split_by_hash
from hora_bench.data.catalog import find, load_task, plain_of
from hora_bench.data.digits import digits
from hora_bench.data.folders import image_folder as read_folder
from hora_bench.data.images import View, _rgb
from hora_bench.models import load
from hora_spec import HoraError
from PIL import Image


def test_digits_are_split_into_1000_and_797():
    task = digits(28)
    assert [task.size(s) for s in ("train", "val", "test", "train+val")] == [800, 200, 797, 1000]
    batch = task.train_batch("train", np.arange(4), np.random.default_rng(0))
    assert batch["image"].shape == (4, 28, 28, 3)
    assert batch["weight"].tolist() == [1, 1, 1, 1]


@pytest.mark.parametrize("arcname", ["made", "."])
def test_a_folder_and_its_archive_are_the_same_task(arcname, image_folder, tmp_path):
    archive = tmp_path / "made.tar.gz"
    with tarfile.open(archive, "w:gz") as file:
        file.add(image_folder, arcname=arcname)
    one, other = read_folder(image_folder, 16), read_folder(archive, 16)
    for task in (one, other):
        assert (task.name, task.num_classes, task.size("train"), task.size("val")) == ("made", 2, 80, 20)
    indices, rng = np.arange(5), np.random.default_rng(0)
    np.testing.assert_array_equal(
        one.train_batch("train", indices, rng)["image"], other.train_batch("train", indices, rng)["image"]
    )


def test_evaluation_covers_every_example_once_and_scores_them(image_folder):
    task = read_folder(image_folder, 16)
    batches = list(task.eval_batches("test", 8))
    assert [len(batch["label"]) for batch in batches] == [8, 8, 8]
    assert sum(batch["weight"].sum() for batch in batches) == 20
    outputs = np.eye(2)[np.concatenate([batch["label"] for batch in batches])]
    judged = task.judge("test", outputs)
    assert Score.of(judged).accuracy_pct == 100
    assert [one.example for one in judged] == [f"{i}.png" for i in range(100, 120)]
    assert [one.loss for one in judged] == pytest.approx([np.log(1 + np.exp(-1))] * 20)


def test_an_undecodable_image_is_named_and_the_run_goes_on(image_folder):
    (image_folder / "images/3.png").write_bytes(b"no image")
    task = read_folder(image_folder, 16)
    batch = task.train_batch("train", np.arange(6), np.random.default_rng(0))
    assert batch["weight"].tolist() == [1, 1, 1, 0, 1, 1]
    fresh = read_folder(image_folder, 16)  # of a process that goes on after a kill and did not see it
    for looked in (task, fresh):
        (why,) = (found := looked.unreadable("train", np.arange(80))).values()
        assert found.keys() == {"3.png"}
        assert "cannot identify image file '3.png'" in why
    assert fresh.unreadable("train", np.array([0, 1])) == {}


def test_training_images_are_decoded_once_while_there_is_room(image_folder, monkeypatch):
    opened = []
    monkeypatch.setattr("hora_bench.data.images._rgb", lambda image, rgb=_rgb: opened.append(image) or rgb(image))
    rng, indices = np.random.default_rng(0), np.arange(8)
    for room, decoded in ((5 * 16 * 16 * 3, 8 + 3), (2**30, 8)):
        monkeypatch.setattr("hora_bench.data.images.DECODED_BYTES", room)
        task = read_folder(image_folder, 16)
        opened.clear()
        first, second = (task.train_batch("train", indices, rng)["image"] for _ in range(2))
        assert task.unreadable("train", indices) == {}
        assert len(opened) == decoded
        np.testing.assert_array_equal(first, second)


def test_sixteen_bits_become_eight_and_pixels_without_a_range_are_refused(image_folder):
    grey = np.linspace(0, 65535, 144).reshape(12, 12)
    Image.fromarray(grey.astype(np.uint16)).save(image_folder / "images/0.png")
    Image.fromarray((grey / 257).astype(np.uint8)).save(image_folder / "images/1.png")
    Image.fromarray((grey / 65535).astype(np.float32)).save(image_folder / "images/2.png", format="tiff")
    task = read_folder(image_folder, 12)
    batch = task.train_batch("train", np.arange(3), np.random.default_rng(0))
    np.testing.assert_array_equal(batch["image"][0], batch["image"][1])
    assert batch["weight"].tolist() == [1, 1, 0]
    assert "no fixed range: store 8 or 16 bits" in task.unreadable("train", np.arange(3))["2.png"]


def test_above_one_per_cent_of_bad_images_it_stops(image_folder):
    for i in range(3):
        (image_folder / f"images/{i}.png").write_bytes(b"")
    with pytest.raises(HoraError, match="at most 1 % of the images"):
        read_folder(image_folder, 16).train_batch("train", np.arange(6), np.random.default_rng(0))


def test_a_split_that_names_a_missing_file_is_refused(image_folder):
    (image_folder / "images/7.png").unlink()
    with pytest.raises(HoraError, match=r"1 missing, such as .*7\.png"):
        read_folder(image_folder, 16)


def test_vtab_comes_from_its_archive_and_without_one_says_which_file_to_place(
    image_folder, cache, vit_directory, monkeypatch
):
    vit = str(vit_directory)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(HoraError, match=r"HF_HUB_OFFLINE is set: place vtab-1k\.zip in .*downloads"):
        load_task("vtab/svhn", model=vit)
    (cache / "downloads").mkdir()
    with ZipFile(cache / "downloads/vtab-1k.zip", "w") as archive:
        for file in image_folder.rglob("*"):
            archive.write(file, Path("vtab-1k/svhn", file.relative_to(image_folder)))
    task = load_task("vtab/svhn", model=vit, image_size=16)
    assert (task.num_classes, task.size("train"), task.origin["source"]) == (10, 80, "folder svhn")


def test_labels_out_of_range_are_refused(image_folder, vit_directory, tmp_path):
    (image_folder / "val200.txt").write_text("images/80.png 12\n")
    (tmp_path / "svhn").symlink_to(image_folder)
    with pytest.raises(HoraError, match=r"labels must be in \[0, 10\), got 12 in val"):
        load_task("vtab/svhn", model=str(vit_directory), data=tmp_path, image_size=16)


def test_a_line_without_a_label_is_refused(image_folder):
    (image_folder / "test.txt").write_text("images/100.png\n")
    with pytest.raises(HoraError, match="a path and a label"):
        read_folder(image_folder, 16)


def test_fgvc_reads_the_splits_of_vpt_and_crops(image_folder, vit_directory, tmp_path):
    folder = tmp_path / "CUB"
    image_folder.rename(folder)
    for lists in folder.glob("*.txt"):
        lists.unlink()
    for split, part in (("train", range(8)), ("val", range(8, 10)), ("test", range(10, 12))):
        (folder / f"{split}.json").write_text(json.dumps({f"{i}.png": i for i in part}))
    task = load_task("fgvc/CUB", model=str(vit_directory), data=tmp_path, image_size=16)
    assert task.num_classes == 200
    assert task.train_batch("train", np.arange(4), np.random.default_rng(0))["image"].shape == (4, 16, 16, 3)


def save(path, value, size=(12, 9)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((*size, 3), value, np.uint8)).save(path)


@pytest.fixture
def class_folders(tmp_path):
    """Thirty images of cats, twenty of dogs, one deeper than the others, and what a desktop leaves behind."""
    folder = tmp_path / "pets"
    for i in range(30):
        save(folder / "cat" / f"{i}.png", i)
    for i in range(20):
        save(folder / "dog" / ("deep" if i == 0 else ".") / f"{i}.png", 100 + i)
    (folder / "cat" / ".DS_Store").write_bytes(b"")
    (folder / "notes").mkdir()
    (folder / "notes" / "readme.md").write_text("no images")
    return folder


def names(task, part):
    return {one.example for one in task.judge(part, np.zeros((task.size(part), task.num_classes)))}


def test_a_folder_for_each_class_is_split_by_content_alike_in_every_class(class_folders):
    task = read_folder(class_folders, 16)
    assert (task.class_names, task.num_classes) == (("cat", "dog"), 2)
    assert [np.bincount(task.labels(part)).tolist() for part in ("train", "val", "test")] == [[24, 16], [3, 2], [3, 2]]
    assert len(names(task, "train") | names(task, "val") | names(task, "test")) == 50
    judged = task.judge("test", np.eye(2)[task.labels("test")])
    assert {(one.example.split("/")[0], one.answer, one.predicted) for one in judged} == {
        ("cat", "cat", "cat"),
        ("dog", "dog", "dog"),
    }


def test_neither_names_nor_copies_of_files_move_content_between_splits(class_folders):
    before = read_folder(class_folders, 16)
    kept = {sha256((class_folders / name).read_bytes()).digest() for name in names(before, "test")}
    for path in [*class_folders.rglob("*.png")]:
        path.with_name(f"copy-{path.name}").write_bytes(path.read_bytes())
        path.rename(path.with_name(f"z-{path.name}"))
    after = read_folder(class_folders, 16)
    assert {sha256((class_folders / name).read_bytes()).digest() for name in names(after, "test")} == kept
    assert after.size("test") == 2 * before.size("test")


@pytest.mark.parametrize("parts", [("train", "val", "test"), ("train", "test"), ("train", "val")])
def test_splits_with_a_folder_for_each_class_are_kept(parts, tmp_path):
    for part in parts:
        for i in range(20):
            save(tmp_path / part / "ab"[i % 2] / f"{i}.png", 10 * i + parts.index(part))
    task = read_folder(tmp_path, 16)
    sizes = [task.size(part) for part in ("train", "val", "test")]
    assert sizes == ([20, 20, 20] if len(parts) == 3 else [18, 2, 20])
    assert all(name.startswith(parts[-1]) for name in names(task, "test"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: (folder / "dog").rename(folder / "valid"), "got valid as classes: rename them"),
        (lambda folder: save(folder / "train" / "cat" / "1.png", 1), "got train as classes"),
        (lambda folder: (folder / "train800.txt").write_text("cat/1.png 0\n"), r"must hold one val\*\.txt"),
        (lambda folder: [path.unlink() for path in folder.glob("dog/**/*.png")], "got none of them"),
    ],
)
def test_folders_that_could_be_read_in_two_ways_are_refused(change, message, class_folders):
    change(class_folders)
    with pytest.raises(HoraError, match=message):
        read_folder(class_folders, 16)


def test_a_class_that_training_lacks_is_named(tmp_path):
    for name in ("train/a", "train/b", "test/a", "test/c"):
        save(tmp_path / name / "1.png", 1)
    with pytest.raises(HoraError, match="test must have the classes of train, got a difference in b, c"):
        read_folder(tmp_path, 16)


def test_an_empty_split_is_refused(image_folder):
    (image_folder / "val200.txt").write_text("")
    with pytest.raises(HoraError, match="needs examples in every split, got none in val"):
        read_folder(image_folder, 16)


def test_what_datasets_saves_is_read(class_folders, tmp_path):
    datasets = pytest.importorskip("datasets")
    (class_folders / "dog/deep/0.png").rename(class_folders / "dog/0.png")
    settings = {"data_dir": str(class_folders), "cache_dir": str(tmp_path / "cache"), "drop_labels": False}
    stored = datasets.load_dataset("imagefolder", split="train", **settings)
    stored = stored.cast_column("label", datasets.ClassLabel(names=["cat", "dog"]))
    stored.save_to_disk(str(tmp_path / "saved"))
    task, plain = read_folder(tmp_path / "saved", 16), read_folder(class_folders, 16)
    assert task.class_names == plain.class_names
    for part in ("train", "val", "test"):
        assert np.bincount(task.labels(part)).tolist() == np.bincount(plain.labels(part)).tolist()
    assert task.train_batch("train", np.arange(4), np.random.default_rng(0))["weight"].tolist() == [1, 1, 1, 1]


def test_pixels_change_the_digest_and_names_of_files_do_not(image_folder):
    before = read_folder(image_folder, 16).fingerprint()
    (image_folder / "images").rename(image_folder / "pictures")
    for lists in image_folder.glob("*.txt"):
        lists.write_text(lists.read_text().replace("images/", "pictures/"))
    assert read_folder(image_folder, 16).fingerprint() == before
    save(image_folder / "pictures/119.png", 55)
    assert read_folder(image_folder, 16).fingerprint() != before


def test_an_archive_that_changes_is_unpacked_anew(image_folder, tmp_path):
    archive, found = tmp_path / "made.tar", []
    for value in (7, 8):
        save(image_folder / "images/0.png", value)
        with tarfile.open(archive, "w") as file:
            file.add(image_folder, arcname="made")
        found.append((archive.stat().st_size, read_folder(archive, 16).fingerprint()))
    (size, first), (other_size, second) = found
    assert size == other_size
    assert first != second


def test_images_are_normalised_as_the_checkpoint_says(image_folder, tmp_path):
    (tmp_path / "config.json").write_text(
        json.dumps({"pretrained_cfg": {"mean": [0.5, 0.5, 0.5], "std": [0.25, 0.5, 1.0], "interpolation": "bilinear"}})
    )
    view = load.view(str(tmp_path))
    assert view == View((0.5, 0.5, 0.5), (0.25, 0.5, 1.0), "bilinear")
    plain, seen = (read_folder(image_folder, 16, view=one) for one in (View((0, 0, 0), (1, 1, 1)), view))
    images = [task.train_batch("train", np.arange(2), np.random.default_rng(0))["image"] for task in (plain, seen)]
    np.testing.assert_allclose(images[1], (images[0] - 0.5) / np.array([0.25, 0.5, 1.0]), rtol=1e-5)
    assert seen.description()["std"] == [0.25, 0.5, 1.0]


def test_small_classes_are_shared_out_together():
    strata = np.repeat(np.arange(50), 3)
    parts = split_by_hash([str(i) for i in range(150)], strata)
    assert [len(part) for part in parts] == [120, 15, 15]
    assert set(strata[parts[0]]) == set(range(50))


def test_a_limit_is_balanced_and_an_upper_bound():
    strata = np.array([0] * 9 + [1] * 2)
    assert np.bincount(strata[balanced(strata, 6)]).tolist() == [4, 2]
    assert len(balanced(strata, 100)) == 11


@pytest.mark.parametrize("percent", [20, 40])
def test_so_many_labels_are_wrong_and_none_of_the_test(image_task, percent):
    noisy = image_task.wrong(percent / 100)
    assert noisy.name == f"made-wrong{percent}"
    for part in ("train", "val"):
        differ = image_task.labels(part) != noisy.labels(part)
        assert differ.sum() == round(percent / 100 * len(differ))
    assert (image_task.labels("test") == noisy.labels("test")).all()
    assert noisy.fingerprint() != image_task.fingerprint()
    assert plain_of(noisy.name) == "made"


def test_a_folder_whose_name_asks_for_other_labels_is_refused(image_folder, vit_directory):
    """Else `made` would be read in its place, with labels that nobody asked for."""
    for ending in ("-shuffled", "-wrong20"):
        other = image_folder.with_name(f"made{ending}")
        other.mkdir()
        for task, data in ((f"made{ending}", image_folder.parent), (str(other), None)):
            with pytest.raises(HoraError, match=r"with other labels, got .*of that name: rename it"):
                load_task(task, model=str(vit_directory), data=data, image_size=16)


def test_shuffled_labels_keep_images_and_test_labels(image_task):
    shuffled = image_task.shuffled()
    assert shuffled.name == "made-shuffled"
    assert (image_task.labels("test") == shuffled.labels("test")).all()
    assert sorted(image_task.labels("train")) == sorted(shuffled.labels("train"))
    assert (image_task.labels("train") != shuffled.labels("train")).mean() > 0.4


def test_a_task_is_found_by_name_by_path_and_in_a_folder_of_tasks(image_folder, records_file):
    assert [one.name for one in find("digits")] == ["digits"]
    assert len(find("vtab")) == 19
    for named in (find(str(image_folder)), find("made", image_folder.parent)):
        assert [(one.family.name, one.data) for one in named] == [("image-folder", image_folder)]
    assert find(str(records_file))[0].family.name == "records"
    for task, data, message in (
        ("fgvc/CUB", None, r"fgvc reads your own copy.*CUB/train\.json"),
        ("mnist", image_folder, r"which must hold mnist, mnist\.tar\.gz"),
    ):
        with pytest.raises(HoraError, match=message):
            find(task, data)
