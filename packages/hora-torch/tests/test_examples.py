"""The examples run, on tiny models."""

import importlib.util
import pydoc_data.topics
import sys
from pathlib import Path

import hora_spec
import peft
import pytest
import tokenizers
import torch
import transformers
from huggingface_hub import constants, hf_api

from .fake_hub import hub

TEMPLATE = "/{repo_id}/resolve/{revision}/{filename}"
EXAMPLES = Path(__file__).parent.parent / "examples"


def example(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def base(families, tmp_path):
    """Directory of a tiny model and a tokenizer of letters, as they lie on the hub."""
    model = families["llama"].model()
    model.save_pretrained(tmp_path / "base")
    letters = {letter: index for index, letter in enumerate("?etaoinshrdlu"[: model.config.vocab_size])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(letters, unk_token="?"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="?")
    fast.save_pretrained(tmp_path / "base")
    return str(tmp_path / "base")


@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning")  # torch without accelerator
def test_the_trainer_example(base, families, tmp_path, capsys, monkeypatch):
    topics = {"topic": 300 * "the quick brown fox and the lazy dog "}
    monkeypatch.setattr(pydoc_data.topics, "topics", topics)
    example("llama_trainer").main(base, str(tmp_path / "out"), steps=2)
    printed = capsys.readouterr().out
    assert "model.layers.0.self_attn and 1 more" in printed
    assert "loss on held-out text" in printed
    assert len(hora_spec.load_adapter(tmp_path / "out/adapter").layers) == 2
    lora = peft.PeftModel.from_pretrained(families["llama"].model(), tmp_path / "out/lora").eval()
    merged = type(families["llama"].model()).from_pretrained(tmp_path / "out/merged").eval()
    with torch.no_grad():
        inputs = families["llama"].inputs()
        torch.testing.assert_close(lora(**inputs).logits, merged(**inputs).logits, rtol=1e-4, atol=1e-5)


def test_the_adapters_of_the_example_each_know_their_own(base, capsys):
    example("several_adapters").main(base, steps=3)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["french", "latin", "both", "one"]


def test_the_timm_example(tmp_path, capsys):
    pytest.importorskip("timm")
    pytest.importorskip("sklearn")
    sizes = {"patch_size": 16, "embed_dim": 32, "depth": 2, "num_heads": 4}
    example("timm_loop").main("vit_tiny_patch16_224", str(tmp_path), steps=2, size=32, **sizes)
    assert "q 4x8x32, v 4x8x32" in capsys.readouterr().out
    adapter = hora_spec.load_adapter(tmp_path)
    assert list(adapter.layers) == ["blocks.0.attn", "blocks.1.attn"]
    assert sorted(adapter.modules) == ["head.bias", "head.weight"]


def test_the_few_shot_example_compares_equal_numbers_of_parameters(capsys):
    pytest.importorskip("timm")
    pytest.importorskip("sklearn")
    sizes = {"img_size": 32, "patch_size": 16, "embed_dim": 32, "depth": 2, "num_heads": 4}
    example("joint_few_shot").main("vit_tiny_patch16_224", steps=2, **sizes)
    lora, joint = capsys.readouterr().out.splitlines()
    assert lora.startswith("LoRA")
    assert joint.startswith("joint A")
    assert lora.split(":")[1].split()[0] == joint.split(":")[1].split()[0]


def test_the_hub_example_pushes_and_loads_by_name(base, tmp_path, monkeypatch, capsys):
    """With huggingface_hub as it is, and a server of the test's own in place of the hub."""
    with hub() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + TEMPLATE)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(hf_api.api, "endpoint", server.url)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setenv("HF_TOKEN", "hf_token")
        example("hub").main(base, "somebody/adapter", steps=2)
        files = server.files["somebody/adapter"]
    assert capsys.readouterr().out.endswith("by way of somebody/adapter: logits differ by 0e+00\n")
    assert sorted(files) == ["README.md", "adapter_config.json", "adapter_model.safetensors"]
    (tmp_path / "pushed").mkdir()
    for name, content in files.items():
        (tmp_path / "pushed" / name).write_bytes(content)
    assert len(hora_spec.load_adapter(tmp_path / "pushed").layers) == 2


STAND_IN = """#!{python}
import http.server, json, pathlib, sys
options = dict(zip(sys.argv[3:], sys.argv[4:]))
name, _, place = options["--lora-modules"].partition("=")
config = json.loads(pathlib.Path(place, "adapter_config.json").read_text())
assert config["peft_type"] == "LORA" and config["r"] <= int(options["--max-lora-rank"])
assert pathlib.Path(place, "adapter_model.safetensors").exists()
assert pathlib.Path(options["--model"], "config.json").exists()

class Handler(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        known = asked["model"] in (options["--served-model-name"], name) and self.path == "/v1/completions"
        self.send_response(200 if known else 404)
        self.end_headers()
        self.wfile.write(json.dumps(dict(choices=[dict(text=asked["model"])])).encode())

server = http.server.HTTPServer(("127.0.0.1", int(options["--port"])), Handler)
print("startup complete", flush=True)
server.serve_forever()
"""


def test_the_vllm_example_hands_over_what_the_server_loads(base, tmp_path, monkeypatch, capsys):
    """A stand-in for the server: vLLM itself computes with such exports in `nox -s serving`."""
    with hub() as free:
        port = str(free.server_port)
    stand_in = tmp_path / "python"
    stand_in.write_text(STAND_IN.replace("{python}", sys.executable))
    stand_in.chmod(0o755)
    module = example("vllm_server")
    monkeypatch.setattr(module, "PORT", port)
    module.main(base, str(tmp_path / "lora"), str(stand_in), steps=1)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == ["base", "hora"]
    assert lines[1].endswith("-> 'hora'")
