"""tunix's PeftTrainer on real text: SmolLM2 loaded by tunix, its attention adapted, the adapter saved as PEFT's files.

`python tunix_trainer.py BASE out`: the directory of a LLaMA as it lies on the hub. The text comes with Python.
"""

import json
import sys
from pathlib import Path
from pydoc_data.topics import topics

import hora_jax
import jax.numpy as jnp
import optax
from hora_jax.nnx import HoraModel
from hora_spec import AdapterSpec
from tokenizers import Tokenizer
from tunix.models.llama3 import model, params
from tunix.sft.peft_trainer import PeftTrainer, TrainingConfig

NAMES = ("num_hidden_layers", "vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "head_dim")


def main(base: str, output: str, steps: int = 8, length: int = 64) -> None:
    read = json.loads(Path(base, "config.json").read_text())
    rest = {"num_kv_heads": read["num_key_value_heads"], "rope_theta": int(read["rope_parameters"]["rope_theta"])}
    rest |= {"norm_eps": read["rms_norm_eps"], "weight_tying": read["tie_word_embeddings"]}
    config = model.ModelConfig(*(read[name] for name in NAMES), **rest)
    model.apply_rope.__defaults__ = (rest["rope_theta"],)  # tunix 0.1.7 takes 1,000,000 for every model
    loaded = params.create_model_from_safe_tensors(base, config)
    plan = hora_jax.make_plan(loaded, AdapterSpec(rank=8), hora_jax.presets.tunix())
    adapted = HoraModel(loaded, plan, hora_jax.init(plan))

    tokens = jnp.array(Tokenizer.from_file(f"{base}/tokenizer.json").encode("\n".join(topics.values())[:50_000]).ids)
    rows = tokens[: len(tokens) // (4 * length) * 4 * length].reshape(-1, 4, length)
    ones, mask = jnp.ones((4, length), int), jnp.tril(jnp.ones((4, length, length), bool))
    given = {"input_mask": ones, "positions": jnp.cumsum(ones, 1) - 1, "attention_mask": mask}
    settings = TrainingConfig(
        eval_every_n_steps=100, max_steps=steps, checkpoint_root_directory=f"{output}/checkpoints"
    )
    trainer = PeftTrainer(adapted, optax.adamw(1e-3), settings)

    def loss():
        found = adapted(rows[-1], given["positions"], None, mask)[0][:, :-1]
        return optax.softmax_cross_entropy_with_integer_labels(found, rows[-1][:, 1:]).mean()

    before = loss()
    trainer.train([{"input_tokens": batch, **given} for batch in rows[:steps]])
    trainer.close()
    print(f"loss on held-out text: {before:.3f} before, {loss():.3f} after {steps} steps")
    hora_jax.save_adapter(f"{output}/adapter", plan, adapted.adapter())


if __name__ == "__main__":
    main(sys.argv[1], str(Path(sys.argv[2]).absolute()))
