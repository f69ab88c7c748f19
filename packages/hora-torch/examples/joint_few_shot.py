"""Few-shot images: a fixed A, computed once for all heads, at twice the rank, beside LoRA at equal parameters."""

import sys

import hora_torch
import peft
import timm
import torch
from hora_spec import PRESETS
from sklearn.datasets import load_digits
from torch.nn.functional import cross_entropy, interpolate


def main(name: str, steps: int = 100, lr: float = 3e-3, **kwargs: object) -> None:
    """Adapt the timm model `name` to ten of each digit, both ways."""
    images, labels = (torch.tensor(part) for part in load_digits(return_X_y=True))
    images = interpolate(images.float().view(-1, 1, 8, 8) / 16 - 0.5, size=kwargs["img_size"]).expand(-1, 3, -1, -1)
    chosen = torch.cat([(labels == digit).nonzero()[:10, 0] for digit in range(10)])
    rest = torch.ones(len(labels), dtype=torch.bool).index_fill(0, chosen, False)
    for label, config in (
        ("LoRA", {"r": 8, **PRESETS["lora"].fields}),
        ("joint A", {"r": 16, **PRESETS["joint"].fields}),
    ):
        torch.manual_seed(0)
        base = timm.create_model(name, num_classes=10, **kwargs)
        model = peft.get_peft_model(base, hora_torch.HoraConfig(modules_to_save=["head"], **config))
        batches = [(images[part], labels[part]) for part in chosen[torch.randperm(100)].split(25)]
        if label == "joint A":
            hora_torch.joint_a(model, batches, lambda model, batch: cross_entropy(model(batch[0]), batch[1]))
        params = [param for param in model.parameters() if param.requires_grad]
        optimizer = torch.optim.AdamW(params, lr=lr)
        for step in range(steps):
            x, y = batches[step % len(batches)]
            cross_entropy(model.train()(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
        with torch.no_grad():
            found = torch.cat([model.eval()(part).argmax(1) for part in images[rest].split(200)])
        accuracy = (found == labels[rest]).float().mean()
        print(f"{label}: {sum(param.numel() for param in params):,} parameters, {accuracy:.1%} of {len(found)} right")


if __name__ == "__main__":
    main(sys.argv[1], pretrained=True, img_size=42)
