"""SentenceTransformers adds, trains, saves and loads an adapter of HoRA by its own methods."""

import sentence_transformers as st
import torch
from datasets import Dataset
from sentence_transformers.sentence_transformer.losses import CosineSimilarityLoss
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

from .conftest import config

SENTENCES = ["the cat sat", "a dog ran on the road"]


def embedder(base):
    return st.SentenceTransformer(modules=[Transformer(str(base)), Pooling(32)], device="cpu")


def test_an_adapter_is_added_trained_saved_and_loaded(base, tmp_path):
    model = embedder(base)
    before = model.encode(SENTENCES)
    model.add_adapter(config(task_type="FEATURE_EXTRACTION"))
    torch.testing.assert_close(model.encode(SENTENCES), before, rtol=1e-5, atol=1e-5)
    data = Dataset.from_dict({"a": SENTENCES * 2, "b": SENTENCES[::-1] * 2, "score": [0.9, 0.1] * 2})
    args = st.SentenceTransformerTrainingArguments(
        output_dir=str(tmp_path), max_steps=3, learning_rate=0.05, report_to="none", use_cpu=True, save_strategy="no"
    )
    st.SentenceTransformerTrainer(model, args=args, train_dataset=data, loss=CosineSimilarityLoss(model)).train()
    after = model.encode(SENTENCES)
    assert abs(after - before).max() > 1e-3
    model.save_pretrained(str(tmp_path / "adapter"))
    loaded = embedder(base)
    loaded.load_adapter(str(tmp_path / "adapter"))
    torch.testing.assert_close(loaded.encode(SENTENCES), after, rtol=1e-4, atol=1e-5)
