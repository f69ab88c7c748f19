"""Fine-tune a timm vision transformer with HoRA in a plain loop: q and v of the fused qkv, k untouched."""

import sys

import hora_torch
import peft
import timm
import torch


def main(name: str, output: str, steps: int = 20, **kwargs: object) -> None:
    """Adapt the timm model `name`; write its adapter to `output`."""
    base = timm.create_model(name, num_classes=10, **kwargs)
    model = peft.get_peft_model(base, hora_torch.HoraConfig(r=8, modules_to_save=["head"]))
    print(hora_torch.report(model))

    size = base.default_cfg["input_size"][-1] if "img_size" not in kwargs else kwargs["img_size"]
    images, labels = torch.randn(16, 3, size, size), torch.randint(0, 10, (16,))  # stand for a data set
    optimizer = torch.optim.AdamW([param for param in model.parameters() if param.requires_grad], lr=1e-3)
    for step in range(steps):
        loss = torch.nn.functional.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step}: loss {loss.item():.3f}")
    model.save_pretrained(output)


if __name__ == "__main__":
    main(*sys.argv[1:3], pretrained=True)
