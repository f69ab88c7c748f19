"""Loaders, splits, batches and scores, and what they say about bad data."""

import json
import tarfile
from pathlib import Path
from zipfile import ZipFile

import huggingface_hub
import numpy as np
import pytest
from hora_bench.commands.run import load_task
from hora_bench.models import load
from hora_bench.tasks.commonsense_data import TASKS, record
from hora_bench.tasks.image_sources import digits, fgvc, vtab
from hora_bench.tasks.image_sources import image_folder as read_folder
from hora_bench.tasks.images import _rgb
from hora_bench.tasks.text import CUTOFF, answer_in, by_length, commonsense, read_records
from hora_bench.tasks.text import records_file as read_file
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
    assert task.score("test", outputs).accuracy_pct == 100


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
    monkeypatch.setattr("hora_bench.tasks.images._rgb", lambda image, rgb=_rgb: opened.append(image) or rgb(image))
    rng, indices = np.random.default_rng(0), np.arange(8)
    for room, decoded in ((5 * 16 * 16 * 3, 8 + 3), (2**30, 8)):
        monkeypatch.setattr("hora_bench.tasks.images.DECODED_BYTES", room)
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


def test_vtab_comes_from_its_archive_and_without_one_says_which_file_to_place(image_folder, cache, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(HoraError, match=r"HF_HUB_OFFLINE is set: place vtab-1k\.zip in .*downloads"):
        load_task("vtab/svhn", None, "")
    (cache / "downloads").mkdir()
    with ZipFile(cache / "downloads/vtab-1k.zip", "w") as archive:
        for file in image_folder.rglob("*"):
            archive.write(file, Path("vtab-1k/svhn", file.relative_to(image_folder)))
    task = load_task("vtab/svhn", None, "", image_size=16)
    assert (task.num_classes, task.size("train"), task.origin["source"]) == (10, 80, "folder svhn in VTAB-1K layout")


def test_labels_out_of_range_are_refused(image_folder, tmp_path):
    (image_folder / "val200.txt").write_text("images/80.png 12\n")
    (tmp_path / "svhn").symlink_to(image_folder)
    with pytest.raises(HoraError, match=r"labels must be in \[0, 10\), got 12 in val"):
        vtab("svhn", tmp_path, 16)


def test_a_line_without_a_label_is_refused(image_folder):
    (image_folder / "test.txt").write_text("images/100.png\n")
    with pytest.raises(HoraError, match="a path and a label"):
        read_folder(image_folder, 16)


def test_fgvc_reads_the_splits_of_vpt_and_crops(image_folder, tmp_path):
    folder = tmp_path / "CUB"
    image_folder.rename(folder)
    for split, part in (("train", range(8)), ("val", range(8, 10)), ("test", range(10, 12))):
        (folder / f"{split}.json").write_text(json.dumps({f"{i}.png": i for i in part}))
    task = fgvc("CUB", tmp_path, 16)
    assert task.num_classes == 200
    assert task.train_batch("train", np.arange(4), np.random.default_rng(0))["image"].shape == (4, 16, 16, 3)


def test_records_become_prompts_and_options(records_file, llama_directory):
    tokenizer = load.tokenizer(str(llama_directory))
    task = read_file(records_file, tokenizer)
    assert [task.size(s) for s in ("train", "val", "test")] == [16, 2, 2]
    batch = task.train_batch("train", np.arange(4), np.random.default_rng(0))
    picked = np.take_along_axis(batch["tokens"], batch["at"] + 1, axis=1)
    np.testing.assert_array_equal(picked[batch["weight"] == 1], batch["label"][batch["weight"] == 1])
    assert batch["tokens"].shape[1] <= CUTOFF
    rows = sum(len(record.options) for record in task.records("test"))
    outputs = np.concatenate([batch["weight"].sum(1) for batch in task.eval_batches("test", 4)])
    assert len(outputs) >= rows


def test_the_most_likely_option_is_the_answer(records_file, llama_directory):
    task = read_file(records_file, load.tokenizer(str(llama_directory)))
    right = [float(option == record.answer) for record in task.records("test") for option in record.options]
    assert task.score("test", np.array(right)).accuracy_pct == 100
    assert task.score("test", -np.array(right)).accuracy_pct < 100


def test_the_first_answer_pattern_counts_and_none_is_wrong(records_file):
    first = read_records(records_file, "made")[1]
    assert answer_in("the correct answer is true, not false", first) == "true"
    assert answer_in("I do not know", first) is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"answer": "maybe"}, "must answer with one of"),
        ({"answer": "answer5"}, "one of its options"),
        ({"answer": 5}, "must answer with one of"),
        ({"instruction": None}, None),
    ],
)
def test_records_without_the_answer_pattern_are_named(records_file, change, message):
    rows = [json.loads(line) for line in records_file.read_text().splitlines()]
    rows[2] |= change
    if message is None:
        del rows[2]["instruction"]
    records_file.write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(HoraError, match=message or "must have instruction") as error:
        read_records(records_file, "made")
    assert "record 3" in str(error.value)


def test_a_line_that_is_no_json_object_is_named(records_file):
    lines = records_file.read_text().splitlines()
    for broken in ("{broken", "17", '{"instruction": "\xe9"}'):
        records_file.write_text("\n".join([*lines[:4], broken, *lines[4:]]), encoding="latin-1")
        with pytest.raises(HoraError, match=r"record 5 of made\.jsonl must be one JSON object"):
            read_records(records_file, "made")
    with pytest.raises(HoraError, match="does not exist"):
        read_records(records_file.parent / "none.jsonl", "made")


def test_scores_are_judged_in_the_order_of_the_batches(records_file, llama_directory):
    task = read_file(records_file, load.tokenizer(str(llama_directory)))
    task.test = read_records(records_file, "made")[2:4]
    records = task.records("test")
    assert by_length(records) == [1, 0]
    right = [float(option == records[i].answer) for i in (1, 0) for option in records[i].options]
    assert task.score("test", np.array(right)).accuracy_pct == 100


DOCUMENTS = {
    "boolq": {"query": "A passage.\nQuestion: is it?\nAnswer:", "choices": ["yes", "no"], "gold": 1},
    "piqa": {"goal": "To cut,", "choices": ["use a knife", "use a spoon"], "gold": 0},
    "social_i_qa": {"query": "Question: They met. Why?\nAnswer:", "choices": ["a", "b", "c"], "gold": 2},
    "hellaswag": {"query": "Topic: He", "choices": ["w", "x", "y", "z"], "gold": 3},
    "winogrande": {"sentence": "The _ is.", "option1": "cup", "option2": "jug", "gold": 1},
    "ARC-Easy": {"query": "Question: Which?\nAnswer:", "choices": ["w", "x", "y", "z"], "gold": 0},
    "ARC-Challenge": {"query": "Question: Which?\nAnswer:", "choices": ["w", "x", "y", "z"], "gold": 1},
    "openbookqa": {"query": "Question: The sun\nAnswer:", "choices": ["w", "x", "y", "z"], "gold": 2},
}


def test_documents_become_records_of_llm_adapters():
    records = {task: record(task, DOCUMENTS[task]) for task in TASKS}
    assert {task: r["answer"] for task, r in records.items()} == {
        "boolq": "false",
        "piqa": "solution1",
        "social_i_qa": "answer3",
        "hellaswag": "ending4",
        "winogrande": "option2",
        "ARC-Easy": "answer1",
        "ARC-Challenge": "answer2",
        "openbookqa": "answer3",
    }
    assert records["boolq"]["instruction"] == (
        "Please answer the following question with true or false, question: is it?\n\nAnswer format: true/false"
    )
    assert records["winogrande"]["instruction"].endswith("Option1: cup Option2: jug Answer format: option1/option2")
    assert records["piqa"]["instruction"].endswith(
        "To cut,\n\nSolution1: use a knife\n\nSolution2: use a spoon\n\nAnswer format: solution1/solution2"
    )


def test_a_limit_takes_equally_many_of_each_task(llama_directory, tmp_path):
    for task in TASKS:
        (tmp_path / task).mkdir()
        lines = "\n".join(json.dumps(record(task, DOCUMENTS[task])) for _ in range(30))
        for split in ("train", "test"):
            (tmp_path / task / f"{split}.jsonl").write_text(lines)
    task = commonsense(load.tokenizer(str(llama_directory)), limit=16, folder=tmp_path)
    assert task.size("train+val") == 16
    assert task.size("test") == 16
    assert set(task.labels("test")) == set(TASKS)
