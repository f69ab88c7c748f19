"""Cosine similarity between heads, and the spectrum of an update, from factors alone.

einsum legend: h and g head, k head_dim, d embed, r and s rank.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from hora_spec import AdapterSpec, Factors, LayerShape, generated_share, init_params, reference
from jaxtyping import Float


def cosines_of_b(factors: Factors) -> Float[np.ndarray, "heads heads"]:
    """Cosine similarity of ``B_h`` and ``B_g``, flattened: what readers of the paper ask for.

    It depends on the basis that A sets: with an A per head, B of different heads are coordinates in different bases.
    `cosines_of_delta` does not.
    """
    flat = factors.b.reshape(len(factors.b), -1)
    return _cosines(flat @ flat.T)


def cosines_of_delta(factors: Factors) -> Float[np.ndarray, "heads heads"]:
    """Cosine similarity of the updates ``B_h A_h`` and ``B_g A_g`` of two heads, whatever the basis."""
    a, b = factors
    per_head = a if a.ndim == 3 else np.broadcast_to(a, (len(b), *a.shape))
    grams = np.einsum("hrd,gsd->hgrs", per_head, per_head)
    return _cosines(np.einsum("hkr,gks,hgrs->hg", b, b, grams, optimize=True))


def singular_values(factors: Factors) -> Float[np.ndarray, " values"]:
    """Singular values of the stacked update, descending: ``rank`` of them, ``heads * rank`` with an A per head."""
    a, b = factors
    if a.ndim == 3:
        rows = np.einsum("hkr,hrd->hkd", b, a).reshape(-1, a.shape[-1])
        return np.linalg.svd(rows, compute_uv=False)[: a.shape[0] * a.shape[1]]
    return np.linalg.svd(np.linalg.qr(b.reshape(-1, b.shape[-1]))[1] @ np.linalg.qr(a.T)[1].T, compute_uv=False)


def participation_ratio(values: Float[np.ndarray, " values"]) -> float:
    """How many directions carry the update: ``(sum s^2)^2 / sum s^4``, 1 for one, all for equal; 0 for none."""
    energy = values**2
    return float(energy.sum() ** 2 / np.sum(energy**2)) if energy.any() else 0.0


def measure(factors: Factors) -> dict[str, Any]:
    """Similarities and spectrum of one projection as JSON values, rounded to four digits."""
    of_b, of_delta = cosines_of_b(factors), cosines_of_delta(factors)
    values = singular_values(factors)
    return {
        "participation_ratio": round(participation_ratio(values), 4),
        "mean_cosine_b": round(float(off_diagonal(of_b).mean()), 4),
        "mean_cosine_delta": round(float(off_diagonal(of_delta).mean()), 4),
        "singular_values": [float(f"{value:.4g}") for value in values],
        "cosines_b": of_b.round(4).tolist(),
        "cosines_delta": of_delta.round(4).tolist(),
    }


def start(spec: AdapterSpec, layer: LayerShape, *, draws: int = 10, seed: int = 0) -> dict[str, float]:
    """Directions that a parametrisation favours before training has moved it.

    Every method starts at a zero update. What a first step with random signs would make of it is the update with the
    last layer of B, or a free B, drawn from a normal distribution and everything else as initialised.

    Returns
    -------
    dict
        ``participation_ratio`` of the update and ``mean_cosine_of_columns`` of B, means over projections and draws.
    """
    ratios, cosines = [], []
    for draw in range(draws):
        rng = np.random.default_rng([seed, draw])
        params = {
            key: rng.normal(size=value.shape) if key.startswith(("b_out.", "b.")) else value
            for key, value in init_params(spec, layer, seed + draw, "start").items()
        }
        for found in reference.factors(spec, layer, params).values():
            ratios.append(participation_ratio(singular_values(found)))
            columns = found.b.reshape(-1, spec.rank).T
            cosines.append(off_diagonal(_cosines(columns @ columns.T)).mean())
    return {
        "participation_ratio": round(float(np.mean(ratios)), 3),
        "mean_cosine_of_columns": round(float(np.mean(cosines)), 3),
    }


def off_diagonal(matrix: Float[np.ndarray, "n n"]) -> Float[np.ndarray, " pairs"]:
    """What is said of two different heads."""
    return matrix[~np.eye(len(matrix), dtype=bool)]


def _cosines(gram: Float[np.ndarray, "n n"]) -> Float[np.ndarray, "n n"]:
    """Gram matrix to cosines; zero vectors are alike to nothing."""
    norms = np.sqrt(np.diag(gram))
    return gram / np.maximum(np.outer(norms, norms), np.finfo(float).tiny)


def factors_of(model: Any) -> dict[tuple[int, str], Factors]:
    """Factors of every layer and projection of a timm ViT adapted by hora-torch or by PEFT's LoRA.

    Returns
    -------
    dict
        ``(layer, "q" or "v")`` to ``Factors(a, b)``; LoRA's B is split into heads.
    """
    import torch
    from hora_torch.hypernet import HoraHypernet
    from peft.tuners.lora import LoraLayer

    found, heads = {}, model.get_base_model().blocks[0].attn.num_heads
    with torch.no_grad():
        for name, module in model.named_modules():
            if isinstance(module, HoraHypernet):
                made = module()
            elif isinstance(module, LoraLayer):
                b = module.lora_B["default"].weight.unflatten(0, (heads, -1))
                made = {name.rpartition(".")[2]: Factors(module.lora_A["default"].weight, b)}
            else:
                continue
            layer = int(name.partition("blocks.")[2].partition(".")[0])
            for projection, factors in made.items():
                found[layer, projection] = Factors(*(torch.as_tensor(factor).numpy().copy() for factor in factors))
    return found


def shares_of(model: Any) -> dict[tuple[int, str], float]:
    """Part of B that is generated, of every layer and projection whose heads have a free part as well (spec G8).

    Returns
    -------
    dict
        ``(layer, "q" or "v")`` to a number in [0, 1]; empty for methods without a residual.
    """
    from hora_torch.hypernet import HoraHypernet

    found = {}
    for name, module in model.named_modules():
        if isinstance(module, HoraHypernet) and module.spec.residual:
            params = {key: param.detach().cpu().numpy() for key, param in module.params().items()}
            layer = int(name.partition("blocks.")[2].partition(".")[0])
            found |= {(layer, p): share for p, share in generated_share(module.spec, module.layer, params).items()}
    return found
