"""Data that comes with packages: scikit-learn's digits and Fashion-MNIST."""

import gzip
from typing import Any

import numpy as np

from hora_bench import assets
from hora_bench.data.images import Examples, ImageTask


def digits(image_size: int, **settings: Any) -> ImageTask:
    """scikit-learn's 1797 handwritten digits of 8x8 pixels: 800 to train, 200 to validate, 797 to test."""
    from sklearn.datasets import load_digits

    stored = load_digits()
    images = (stored.images * (255 / 16)).round().astype(np.uint8)
    order = np.random.default_rng(0).permutation(len(images))
    parts = [Examples(list(images[part]), stored.target[part]) for part in np.split(order, [800, 1000])]
    origin = {"source": "scikit-learn load_digits", "licence": "BSD-3-Clause"}
    return ImageTask("digits", 10, *parts, image_size=image_size, origin=origin, **settings)


def fashion_mnist(image_size: int, **settings: Any) -> ImageTask:
    """Fashion-MNIST: 50,000 to train, the last 10,000 of its training set to validate, 10,000 to test."""
    asset = assets.find("fashion-mnist")
    folder = asset.get()
    arrays = {}
    for stem, part in (("train", "train"), ("t10k", "test")):
        for kind, skip in (("images-idx3", 16), ("labels-idx1", 8)):
            with gzip.open(folder / f"{stem}-{kind}-ubyte.gz") as file:
                arrays[part, kind[:6]] = np.frombuffer(file.read()[skip:], np.uint8)
        arrays[part, "images"] = arrays[part, "images"].reshape(-1, 28, 28)
    images, labels = arrays["train", "images"], arrays["train", "labels"].astype(np.int64)
    train, val = (Examples(list(images[p]), labels[p]) for p in (slice(50_000), slice(50_000, None)))
    test = Examples(list(arrays["test", "images"]), arrays["test", "labels"].astype(np.int64))
    origin = dict(asset.origin or {})
    return ImageTask("fashion-mnist", 10, train, val, test, image_size=image_size, origin=origin, **settings)
