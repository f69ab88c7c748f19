"""Records and the commonsense tasks: what is trained, what is scored, and what no score would be worth."""

import json

import numpy as np
import pytest
from hora_bench.data.base import Score
from hora_bench.data.commonsense import DEVIATIONS, TASKS, commonsense, fields
from hora_bench.data.records import CUTOFF, TextTask, by_length, prompt_of, read_records, records_task
from hora_bench.models import load
from hora_spec import HoraError


def written(path, *records):
    path.write_text("\n".join(map(json.dumps, records)) + "\n")
    return path


def test_records_become_prompts_and_options(records_file, llama_directory):
    tokenizer = load.tokenizer(str(llama_directory))
    task = records_task(records_file, tokenizer)
    assert [task.size(s) for s in ("train", "val", "test")] == [16, 2, 2]
    batch = task.train_batch("train", np.arange(4), np.random.default_rng(0))
    picked = np.take_along_axis(batch["tokens"], batch["at"] + 1, axis=1)
    np.testing.assert_array_equal(picked[batch["weight"] == 1], batch["label"][batch["weight"] == 1])
    assert batch["tokens"].shape[1] <= CUTOFF
    rows = sum(len(record.options) for record in task.records("test"))
    outputs = np.concatenate([batch["weight"].sum(1) for batch in task.eval_batches("test", 4)])
    assert len(outputs) >= rows


def test_the_most_likely_option_is_the_answer(records_file, llama_directory):
    task = records_task(records_file, load.tokenizer(str(llama_directory)))
    records = task.records("test")
    right = [float(option == records[i].answer) for i in by_length(records) for option in records[i].options]
    assert Score.of(task.judge("test", np.array(right))).accuracy_pct == 100
    assert Score.of(task.judge("test", -np.array(right))).accuracy_pct == 0


def test_the_first_answer_pattern_counts_and_none_is_wrong(records_file):
    first = read_records(records_file)[1]
    assert first.answer_in("the correct answer is true, not false") == "true"
    assert first.answer_in("I do not know") is None
    assert first.answer_in("that is untrue") is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"answer": "maybe"}, "one of its options"),
        ({"answer": "answer5"}, "one of its options"),
        ({"answer": 5}, "must have text in answer, got 5"),
        ({"instruction": None}, "must have instruction"),
        ({"answer": None, "output": None}, "must have instruction, and answer or output"),
        ({"output": "I would not know"}, "must hold its answer in its output"),
        ({"instruction": "question ?\n\nAnswer format: answer1", "answer": "answer1"}, "any model is right"),
        ({"options": ["answer1"], "answer": "answer1"}, "any model is right"),
        ({"options": ["answer1", "answer1"], "answer": "answer1"}, "two different options"),
        ({"options": "answer1/answer2"}, "list its options as texts"),
    ],
)
def test_records_that_cannot_be_scored_are_named(records_file, change, message):
    rows = [json.loads(line) for line in records_file.read_text().splitlines()]
    rows[2] |= change
    with pytest.raises(HoraError, match=message) as error:
        read_records(written(records_file, *rows))
    assert "record 3" in str(error.value)


def test_a_line_that_is_no_json_object_is_named(records_file):
    lines = records_file.read_text().splitlines()
    for broken in ("{broken", "17", '{"instruction": "\xe9"}'):
        records_file.write_text("\n".join([*lines[:4], broken, *lines[4:]]), encoding="latin-1")
        with pytest.raises(HoraError, match=r"record 5 of made\.jsonl must be one JSON object"):
            read_records(records_file)
    with pytest.raises(HoraError, match=r"got \['label', 'text'\]: run it as sentences"):
        read_records(written(records_file, {"text": "a film", "label": 1}))
    with pytest.raises(HoraError, match="does not exist"):
        read_records(records_file.parent / "none.jsonl")


def test_scores_are_judged_in_the_order_of_the_batches(records_file, llama_directory):
    task = records_task(records_file, load.tokenizer(str(llama_directory)))
    task.test = read_records(records_file)[2:4]
    records = task.records("test")
    assert by_length(records) == [1, 0]
    right = [float(option == records[i].answer) for i in (1, 0) for option in records[i].options]
    assert Score.of(task.judge("test", np.array(right))).accuracy_pct == 100


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
    records = {task: fields(task, DOCUMENTS[task]) for task in TASKS}
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


@pytest.fixture
def commonsense_folder(tmp_path):
    """Thirty different records of each task."""
    for task in TASKS:
        (tmp_path / task).mkdir()
        for split in ("train", "test"):
            rows = [fields(task, DOCUMENTS[task]) for _ in range(30)]
            rows = [{**row, "instruction": f"{i}. {row['instruction']}"} for i, row in enumerate(rows)]
            written(tmp_path / task / f"{split}.jsonl", *rows)
    return tmp_path


def test_a_limit_takes_equally_many_of_each_task(llama_directory, commonsense_folder):
    task = commonsense(load.tokenizer(str(llama_directory)), folder=commonsense_folder)
    assert [task.size(part) for part in ("train", "val", "test")] == [120, 120, 240]
    few = task.cut(16)
    assert [few.size(part) for part in ("train", "val", "test")] == [16, 16, 16]
    for part in ("train", "test"):
        assert dict(zip(*np.unique(few.labels(part), return_counts=True), strict=True)) == dict.fromkeys(TASKS, 2)
    with pytest.raises(HoraError, match="at least one example of each of 8 classes, got 7"):
        task.cut(7)


def test_a_commonsense_task_alone_has_its_own_records_and_all_of_the_validation(llama_directory, commonsense_folder):
    name, row = "openbookqa", fields("openbookqa", DOCUMENTS["openbookqa"])
    rows = [{**row, "instruction": f"{i}. {row['instruction']}"} for i in range(150)]
    written(commonsense_folder / name / "train.jsonl", *rows)
    task = commonsense(load.tokenizer(str(llama_directory)), folder=commonsense_folder, member=name)
    assert task.name == f"commonsense/{name}"
    assert {record.group for part in ("train", "val", "test") for record in task.records(part)} == {name}
    assert [task.size(part) for part in ("train", "val", "test")] == [30, 120, 30]


def test_commonsense_has_the_prompt_and_the_patterns_of_llm_adapters_and_lists_what_differs(
    llama_directory, commonsense_folder
):
    task = commonsense(load.tokenizer(str(llama_directory)), folder=commonsense_folder)
    record = next(record for record in task.test if record.group == "ARC-Easy")
    lines = record.prompt.split("\n")
    assert lines[0].endswith("completes the request.  ")  # two spaces at the end, as there
    assert lines[2] == 16 * " " + "### Instruction:"
    assert lines[3].startswith(16 * " ")
    assert lines[-3:] == [16 * " ", 16 * " " + "### Response:", 16 * " "]
    assert record.answer_in("the correct answer is answer5") == "answer5"  # though it is none of four options
    assert task.description()["deviations_from_llm_adapters"] == list(DEVIATIONS)


def test_an_input_stands_in_the_prompt_and_is_no_option(tmp_path, llama_directory):
    record = {"instruction": "Is it so?\n\nAnswer format: yes/no", "input": "A/B\nC/D", "answer": "yes"}
    (read,) = read_records(written(tmp_path / "one.jsonl", record))
    assert read.options == ("yes", "no")
    assert read.prompt == prompt_of(record["instruction"], record["input"])
    assert "### Input:\nA/B\nC/D\n\n### Response:\n" in read.prompt


@pytest.mark.parametrize(
    ("answer", "options"), [("Rome", ["Paris", "Rome"]), ("+1", ["+1", "-1"]), ("b c", ["a", "b c"])]
)
def test_any_answer_may_be_given(answer, options, tmp_path):
    record = {"instruction": "Which?", "output": f"It is {answer}.", "answer": answer, "options": options}
    (read,) = read_records(written(tmp_path / "one.jsonl", record))
    assert [read.response(option) for option in options] == [f"It is {option}." for option in options]
    assert read.answer_in(f"It is {answer}.") == answer


def test_the_output_is_what_is_trained(tmp_path, llama_directory):
    tokenizer = load.tokenizer(str(llama_directory))
    rows = [
        {"instruction": f"question {i}", "output": "answer is true .", "answer": "true", "options": ["true", "false"]}
        for i in range(20)
    ]
    task = records_task(written(tmp_path / "many.jsonl", *rows), tokenizer)
    batch = task.train_batch("train", np.arange(1), np.random.default_rng(0))
    assert tokenizer.decode(batch["label"][0][batch["weight"][0] == 1]) == "answer is true . </s>"


def test_words_around_the_answer_that_could_tell_it_are_refused_by_likelihood(records_file, llama_directory):
    rows = [json.loads(line) for line in records_file.read_text().splitlines()]
    for row in rows:
        row["output"] = f"since {row['answer']} is so, {row['output']}"
    with pytest.raises(HoraError, match=r"must say around its answer what the others say.*it could tell the answer"):
        records_task(written(records_file, *rows), load.tokenizer(str(llama_directory)))
    assert records_task(records_file, load.tokenizer(str(llama_directory)), scoring="generation").size("test")


def test_records_without_options_are_written_and_compared_as_a_whole(tmp_path, llama_directory):
    tokenizer = load.tokenizer(str(llama_directory))
    rows = [{"instruction": f"question {i}", "output": "the answer"} for i in range(20)]
    path = written(tmp_path / "free.jsonl", *rows)
    with pytest.raises(HoraError, match=r"must state its options.*--scoring generation"):
        records_task(path, tokenizer)
    task = records_task(path, tokenizer, scoring="generation")
    judged = task.judge("test", -np.arange(2.0), [" the answer ", "the answer is"])
    assert [one.right for one in judged] == [True, False]


def test_records_are_split_by_what_they_say(records_file, llama_directory):
    tokenizer, rows = load.tokenizer(str(llama_directory)), records_file.read_text().splitlines()
    many = [row.replace("question", f"question {i} of") for i, row in enumerate(rows * 5)]
    parts = []
    for order in (many, many[::-1], [*many, *many]):
        records_file.write_text("\n".join(order))
        task = records_task(records_file, tokenizer)
        parts.append([{record.prompt for record in task.records(part)} for part in ("train", "val", "test")])
    assert parts[0] == parts[1] == parts[2]
    train, val, test = parts[0]
    assert len(train | val | test) == len(train) + len(val) + len(test)
    answers = {record.answer for record in task.test}
    assert answers == {record.answer for record in task.train}


def test_a_folder_of_records_keeps_its_splits(records_file, tmp_path, llama_directory):
    lines = records_file.read_text().splitlines(keepends=True)
    folder = tmp_path / "split"
    folder.mkdir()
    for part, own in (("train", lines[:12]), ("val", lines[12:16]), ("test", lines[16:])):
        (folder / f"{part}.jsonl").write_text("".join(own))
    task = records_task(folder, load.tokenizer(str(llama_directory)))
    assert [task.size(part) for part in ("train", "val", "test")] == [12, 4, 4]
    assert isinstance(task, TextTask)
