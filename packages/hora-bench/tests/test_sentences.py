"""Sentences: what is read and refused, what is cut and says so, and an encoder that every method adapts alike."""

import json

import numpy as np
import peft
import pytest
import torch
import transformers
from hora_bench import backends, cli, methods
from hora_bench import run as runs
from hora_bench.backends.torch_methods import prepare
from hora_bench.choices import choices
from hora_bench.data.catalog import find
from hora_bench.data.sentences import GLUE, GLUE_SHARES, read_sentences, rebuild, sentence_task
from hora_bench.experiments.files import SHIPPED
from hora_bench.experiments.signal.run import signal
from hora_bench.experiments.similarity.run import similarity
from hora_bench.models import load
from hora_bench.models.encoder import SentenceClassifier
from hora_bench.recipe import head_init
from hora_bench.request import FINAL, request
from hora_bench.setting import Setting, read_setting
from hora_bench.sweep import Sweep
from hora_spec import HoraError
from pydantic import ValidationError
from tokenizers import Tokenizer, models, pre_tokenizers, processors

WORDS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "fine", "poor", "film", "with", "no", "plot", "at", "all")
SIZES = {"vocab_size": len(WORDS), "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
RANKED = {"lora", "dora", "eva", "lora-ga"}


@pytest.fixture(scope="session")
def bert_directory(tmp_path_factory):
    """A random BERT with dropout and a pooler, as checkpoints have them, and a tokenizer of whole words."""
    directory = tmp_path_factory.mktemp("bert")
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    backend.enable_padding(length=64)  # as MiniLM's file asks for
    backend.enable_truncation(8)
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, model_max_length=24, **special)
    tokenizer.save_pretrained(directory)
    torch.manual_seed(0)
    model = transformers.BertModel(transformers.BertConfig(**SIZES, num_attention_heads=4))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(directory)
    return directory


def rows(count):
    return [
        {"text": f"a {('poor', 'fine')[i % 2]} film {i} " + "at all " * (i % 5), "label": i % 2} for i in range(count)
    ]


def written(path, *lines):
    path.write_text("\n".join(map(json.dumps, lines)) + "\n")
    return path


@pytest.fixture
def sentences(tmp_path, bert_directory):
    return sentence_task(written(tmp_path / "films.jsonl", *rows(40)), load.tokenizer(str(bert_directory)))


def asked(directory, **changes):
    settings = {"task": "films", "model": str(directory), "image_size_px": None, "batch_size": 8, "steps": 4}
    return request(**{**settings, "warmup_steps": 1, "learning_rate": 1e-2, **FINAL, **changes})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"text": None}, "must have text"),
        ({"text": " "}, "must have text"),
        ({"text_pair": 3}, "text_pair that is text, got .* and 3"),
        ({"label": None}, "must have a label"),
        ({"label": True}, "a whole number, got True"),
        ({"label": 0.5}, "a whole number, got 0.5"),
        ({"sentence2": "more"}, "has the fields text, text_pair, label, got sentence2"),
    ],
)
def test_sentences_that_cannot_be_learned_are_named(tmp_path, change, message):
    lines = rows(12)
    lines[2] |= change
    with pytest.raises(HoraError, match=message) as error:
        read_sentences(written(tmp_path / "films.jsonl", *lines))
    assert "record 3 of films.jsonl" in str(error.value)


@pytest.mark.parametrize(
    ("train", "test", "message"),
    [
        ([0, 0, 0], [0], "needs at least two classes, got '0'"),
        ([0, 1, 0], [2], r"every class is learned from sentences in train, got none of \['2'\]"),
    ],
)
def test_classes_that_cannot_be_learned_are_refused(train, test, message, tmp_path, bert_directory):
    for part, labels in {"train": train, "val": train[:1], "test": test}.items():
        written(tmp_path / f"{part}.jsonl", *({"text": f"film {i}", "label": own} for i, own in enumerate(labels)))
    with pytest.raises(HoraError, match=message):
        sentence_task(tmp_path, load.tokenizer(str(bert_directory)))


def test_a_split_does_not_depend_on_the_order_and_keeps_copies_together(tmp_path, bert_directory):
    tokenizer, lines = load.tokenizer(str(bert_directory)), rows(60)
    parts = []
    for order in (lines, lines[::-1], lines * 2):
        task = sentence_task(written(tmp_path / "films.jsonl", *order), tokenizer, shares=GLUE_SHARES)
        parts.append([{one.text for one in task.sentences(part)} for part in ("train", "val", "test")])
        assert {*task.labels("test")} == {0, 1}
    assert parts[0] == parts[1] == parts[2]
    assert [len(part) for part in parts[0]] == [18, 12, 30]
    assert not parts[0][0] & parts[0][2]


def test_what_is_too_long_is_cut_and_the_result_says_how_many(tmp_path, bert_directory, capsys):
    lines = rows(40)
    for i in (3, 7):
        lines[i]["text"] += " plot" * 40
    task = sentence_task(written(tmp_path / "films.jsonl", *lines), load.tokenizer(str(bert_directory)))
    seen = [
        len(row) for part in ("train", "val", "test") for row in task.train_batch(part, np.arange(1), None)["tokens"]
    ]
    assert max(seen) <= task.cutoff == 24  # the file of the tokenizer says 8, and pads to 64
    assert (task.description()["cutoff_tokens"], task.description()["cut_count"]) == (24, 2)
    command = ["run", "sentences", tmp_path / "films.jsonl", "--model", bert_directory, "--steps", 1]
    cli.app([str(part) for part in (*command, "--out", tmp_path / "out")], standalone_mode=False)
    assert "2 sentences of all splits were cut at 24 tokens" in capsys.readouterr().out


def test_a_pair_is_read_as_two(tmp_path, bert_directory):
    lines = [{**row, "text_pair": "no plot"} for row in rows(12)]
    task = sentence_task(written(tmp_path / "pairs.jsonl", *lines), load.tokenizer(str(bert_directory)))
    batch = task.train_batch("train", np.arange(2), np.random.default_rng(0))
    ids = [WORDS[token] for token in batch["tokens"][0][batch["types"][0] == 1]]
    assert ids == ["no", "plot", "[SEP]"]
    assert (batch["tokens"][batch["valid"] == 0] == 0).all()


def test_rows_are_judged_in_the_order_of_the_batches(sentences):
    batches = [*sentences.eval_batches("train", 7)]
    assert {len(batch["label"]) for batch in batches} == {7}
    labels = np.concatenate([batch["label"] for batch in batches])
    assert sum(batch["weight"].sum() for batch in batches) == sentences.size("train")
    judged = sentences.judge("train", 9.0 * np.eye(2)[labels])
    assert all(one.right for one in judged)
    assert [one.answer for one in judged] == [one.label for one in sentences.train]


def test_padding_changes_no_output_and_there_is_no_dropout(sentences, bert_directory):
    model = load.sentence_classifier(str(bert_directory), head_init(32, 2, 0)).train()
    (short,) = sentences.eval_batches("val", sentences.size("val"))
    given = [torch.from_numpy(short[name]) for name in ("tokens", "valid", "types")]
    longer = [torch.nn.functional.pad(part, (0, 5)) for part in given]
    with torch.no_grad():
        first, second, padded = model(*given), model(*given), model(*longer)
    assert torch.equal(first, second)
    torch.testing.assert_close(padded, first, rtol=1e-5, atol=1e-6)
    alone = [part[:1, : int(given[1][0].sum())] for part in given]
    with torch.no_grad():
        hidden = model.encoder(input_ids=alone[0].long()).last_hidden_state.mean(1)
        torch.testing.assert_close(model.head(hidden), first[:1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", [one.name for one in methods.METHODS])
def test_a_step_changes_q_and_v_and_a_head_that_all_methods_start_alike(name, sentences, bert_directory):
    options = {"rank": 2} if methods.find(name).family in RANKED | {"hora"} else {}
    learner = backends.build(asked(bert_directory, method=name, options=options), sentences)
    kernel, bias = head_init(32, 2, 0)
    trained = {key: value.detach().clone() for key, value in learner.trained.items()}
    head = {key.rpartition(".")[2]: value for key, value in trained.items() if "head." in key}
    np.testing.assert_array_equal(head["weight"].numpy().T, kernel)
    np.testing.assert_array_equal(head["bias"].numpy(), bias)
    batch = sentences.train_batch("train", np.arange(8), np.random.default_rng(0))
    for step in range(2):  # VeRA's and LoRA's first step moves one factor of two
        learner.step(batch, 1e-2, step)
    outputs = learner.outputs(batch)
    base = load.sentence_classifier(str(bert_directory), (kernel, bias)).state_dict()
    merged = learner.model.merge_and_unload() if hasattr(learner.model, "peft_config") else learner.model
    changed = {key for key, value in merged.state_dict().items() if not torch.equal(value, base[key])}
    layers = {f"encoder.encoder.layer.{i}.attention.self.{part}.weight" for i in (0, 1) for part in ("query", "value")}
    own = {"head.weight", "head.bias"}
    if name == "full":
        assert own | layers < changed <= {*trained}
    else:
        assert changed == own | (set() if name == "linear-probe" else layers)
    with torch.no_grad():
        again = merged.eval()(*(torch.from_numpy(batch[part]) for part in ("tokens", "valid", "types"))).numpy()
    np.testing.assert_allclose(again, outputs, atol=1e-5)


def test_a_run_that_was_stopped_ends_where_a_whole_one_does(sentences, bert_directory, tmp_path):
    wanted = asked(bert_directory, method="hora-joint", options={"rank": 2})

    def stopped(stage, done, total, loss):
        if (stage, done) in {("train", 2), ("score", 4)}:
            raise KeyboardInterrupt

    whole = runs.run(wanted, sentences, tmp_path / "whole", command="test")
    with pytest.raises(KeyboardInterrupt):
        runs.run(wanted, sentences, tmp_path / "cut", command="test", progress=stopped, every_s=0)
    resumed = runs.run(wanted, sentences, tmp_path / "cut", command="test", every_s=0)
    assert resumed.loss == whole.loss
    assert resumed.scores == whole.scores
    assert runs.run(wanted, sentences, tmp_path / "cut", command="again") == resumed  # found, not made again
    lines = (tmp_path / "cut" / resumed.name / "predictions.jsonl").read_text().splitlines()
    assert len(lines) == sentences.size("test")


@pytest.mark.parametrize("method", ["hora", "lora"])
def test_a_saved_adapter_on_its_encoder_says_what_the_result_says(method, sentences, bert_directory, tmp_path):
    result = runs.run(asked(bert_directory, method=method, options={"rank": 2}), sentences, tmp_path, command="test")
    base = load.sentence_classifier(str(bert_directory), head_init(32, 2, 7))  # another head than it was trained with
    model = peft.PeftModel.from_pretrained(base, tmp_path / result.name / "adapter").eval()
    (batch,) = sentences.eval_batches("test", sentences.size("test"))
    with torch.no_grad():
        outputs = model(*(torch.from_numpy(batch[part]) for part in ("tokens", "valid", "types"))).numpy()
    lines = (tmp_path / result.name / "predictions.jsonl").read_text().splitlines()
    losses = [json.loads(line)["loss"] for line in lines]
    np.testing.assert_allclose([one.loss for one in sentences.judge("test", outputs)], losses, atol=1e-5)


def test_what_does_not_fit_sentences_is_refused_before_anything_runs(
    sentences, bert_directory, llama_directory, tmp_path
):
    with pytest.raises(ValidationError, match="on torch, got --backend jax: pass --backend torch"):
        asked(bert_directory, backend="jax")
    for changes in ({"image_size_px": 32}, {"scoring": "log-likelihood"}):
        with pytest.raises(HoraError, match="and sentences neither"):
            runs.run(asked(bert_directory, **changes), sentences, tmp_path, command="test")
    with pytest.raises(HoraError, match=r"classified by encoders, got .*, a llama: pass --model minilm"):
        backends.build(asked(llama_directory), sentences)
    with pytest.raises(HoraError, match=r"has all its weights in the checkpoint, got .* without cls\.predictions"):
        load.causal_lm(str(bert_directory))


def test_a_fused_weight_is_not_adapted_whole_by_a_peer():
    config = transformers.GPTNeoXConfig(**SIZES, num_attention_heads=4)
    with pytest.raises(HoraError, match=r"adapts whole maps, Q and V as HoRA does, got .*query_key_value"):
        prepare(transformers.GPTNeoXForCausalLM(config), methods.find("lora"), seed=0)


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ('tasks = ["glue-val/sst2", "digits"]', "the tasks of a file are of one kind, got images, sentences"),
        ('tasks = ["glue-val/sst2"]\n[request]\nimage_size_px = 56', "image_size_px belongs to images"),
    ],
)
def test_a_file_about_sentences_has_no_image_size(request_, message, tmp_path):
    path = tmp_path / "text.toml"
    path.write_text(f"[vary]\n{request_}\n")
    with pytest.raises(HoraError, match=message):
        read_setting(path, quick=None, data=None)
    path.write_text('[request]\ntask = "commonsense/openbookqa"\n')
    setting = read_setting(path, quick=None, data=None)
    assert (setting.base.kind, setting.base.scoring) == ("text", "log-likelihood")


@pytest.mark.parametrize(
    ("experiment", "varied"), [(similarity, {"methods": ["hora"]}), (signal, {"methods": ["hora"]})]
)
def test_what_looks_into_vision_transformers_is_refused_for_text(experiment, varied):
    for kind in ({}, {"scoring": "log-likelihood"}):
        with pytest.raises(HoraError, match=r"looks into vision transformers, got a task of (sentences|text)"):
            experiment(Setting(asked("minilm", **kind)), **varied)


def encoder(**sizes):
    config = transformers.BertConfig(**{**SIZES, **sizes}, num_attention_heads=12)
    return SentenceClassifier(transformers.BertModel(config, add_pooling_layer=False), head_init(384, 2, 0))


SMOLLM = {
    "hidden_size": 576,
    "num_hidden_layers": 1,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "tie_word_embeddings": True,
    "model_type": "llama",
}
SHAPES = {  # of one layer of each model
    "text": lambda: encoder(hidden_size=384, num_hidden_layers=1),
    "text-commonsense": lambda: load.abstract_causal_lm(
        {**SIZES, **SMOLLM, "hidden_size": 576, "num_hidden_layers": 1}
    ),
}


@pytest.mark.parametrize("file", SHAPES)
def test_the_files_about_text_compare_at_equal_trained_parameters(file):
    setting, counts = read_setting(SHIPPED / f"{file}.toml", quick=None, data=None), {}
    for choice in choices(setting.base, Sweep.of(setting.vary)):
        method = methods.find(choice.request.method).configured(choice.request.options)
        with torch.device("meta"):
            model = prepare(SHAPES[file](), method, seed=0)
        named = [(name, p.numel()) for name, p in model.named_parameters() if p.requires_grad and "head." not in name]
        counts[choice.value] = sum(count for _, count in named)
    assert set(counts) >= {"lora", "joint", "default"}
    assert max(counts.values()) <= 1.01 * min(counts.values()), counts


def test_what_datasets_saved_becomes_lines_that_are_read(tmp_path, bert_directory):
    pa = pytest.importorskip("pyarrow")
    stored = {"sentence1": ["a film", "no film"], "label": [1, 0], "idx": [0, 1]}
    for name in GLUE:
        folder = tmp_path / "source" / name / "validation"
        folder.mkdir(parents=True)
        text = {"dtype": "string", "_type": "Value"}
        features = {"sentence1": text, "label": {"names": ["bad", "good"]}, "idx": {"dtype": "int32", "_type": "Value"}}
        features["label"]["_type"] = "ClassLabel"
        (folder / "dataset_info.json").write_text(json.dumps({"features": features}))
        table = pa.table(stored)
        with pa.ipc.new_stream(folder / "data-00000-of-00001.arrow", table.schema) as stream:
            stream.write_table(table)
    assert rebuild(tmp_path / "source", tmp_path) == {f"{name}_sentences": 2.0 for name in GLUE}
    assert [(one.text, one.label) for one in read_sentences(tmp_path / "sst2.jsonl")] == [
        ("a film", "good"),
        ("no film", "bad"),
    ]


def test_names_of_suites_and_of_tasks_that_are_wholes():
    assert [one.name for one in find("glue-val")] == [f"glue-val/{name}" for name in GLUE]
    assert [one.name for one in find("commonsense")] == ["commonsense"]
    assert [one.name for one in find("commonsense/piqa")] == ["commonsense/piqa"]


def test_a_run_is_planned_without_weights(bert_directory, capsys):
    command = ["run", "glue-val/sst2", "--dry-run", "--model", bert_directory, "--method", "hora,lora"]
    cli.app([str(part) for part in command], standalone_mode=False)
    text = capsys.readouterr().out
    assert text.count("counted by torch") == 2
