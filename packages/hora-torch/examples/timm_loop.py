"""Fine-tune a timm vision transformer on images of digits in a plain loop: q and v of the fused qkv, k untouched.

The images come with scikit-learn: `python timm_loop.py vit_small_patch14_dinov2.lvd142m out` with a model from the hub.
"""

import sys

import hora_torch
import peft
import timm
import torch
from sklearn.datasets import load_digits
from torch.nn.functional import cross_entropy, interpolate


def main(name: str, output: str, steps: int = 120, size: int = 56, **kwargs: object) -> None:
    """Adapt the timm model `name`; write its adapter to `output`."""
    torch.manual_seed(0)
    base = timm.create_model(name, num_classes=10, img_size=size, **kwargs)
    model = peft.get_peft_model(base, hora_torch.HoraConfig(r=8, modules_to_save=["head"]))
    print(hora_torch.report(model))

    images, labels = (torch.tensor(part) for part in load_digits(return_X_y=True))
    images = interpolate(images.float().view(-1, 1, 8, 8) / 16 - 0.5, size=size).expand(-1, 3, -1, -1)
    train, test = torch.randperm(len(labels)).split([1500, 297])
    optimizer = torch.optim.AdamW([param for param in model.parameters() if param.requires_grad], lr=3e-3)
    for step in range(steps):
        batch = train[torch.randint(len(train), (16,))]
        loss = cross_entropy(model.train()(images[batch]), labels[batch])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 40 == 0:
            print(f"step {step}: loss {loss.item():.3f}")
    with torch.no_grad():
        right = torch.cat([model.eval()(images[part]).argmax(1) == labels[part] for part in test.split(100)])
    print(f"{right.float().mean():.1%} of {len(test)} held-out images right")
    model.save_pretrained(output)


if __name__ == "__main__":
    main(*sys.argv[1:3], pretrained=True)
