"""Train a small CIFAR-style ResNet on handwritten digits twice, with and without ``fastres.fuse``, from one seed.

    python examples/train_digits.py [--epochs 8] [--blocks 1] [--out digits.png]

The data are the 1797 scanned 8x8 digits that scikit-learn carries (UCI, Alpaydin and Kaynak 1998). Both runs
see the same initial weights and the same batches; the two loss curves and accuracies must agree within the
noise of float32 rounding. Less than a minute on two cores.
"""

from __future__ import annotations

import argparse
import sys
import time

import torch
from torch import nn
from torch.nn import functional as F

import fastres


class DigitResNet(nn.Module):
    """Three stages of width 16, 32, 64 on torchvision's BasicBlock: ``6 * blocks + 2`` layers."""

    def __init__(self, blocks: int = 1):
        super().__init__()
        from torchvision.models.resnet import BasicBlock

        self.conv1 = nn.Conv2d(1, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.relu = nn.ReLU(inplace=True)
        layers, inputs = [], 16
        for stage, width in enumerate((16, 32, 64)):
            for i in range(blocks):
                stride = 2 if stage and not i else 1
                down = None
                if stride != 1:
                    down = nn.Sequential(nn.Conv2d(inputs, width, 1, stride, bias=False), nn.BatchNorm2d(width))
                layers.append(BasicBlock(inputs, width, stride, down))
                inputs = width
        self.layers = nn.Sequential(*layers)
        self.fc = nn.Linear(inputs, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.layers(self.relu(self.bn1(self.conv1(x))))
        return self.fc(x.mean((2, 3)))


def digits(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Training images, training labels, test images, test labels: ``[n, 1, 8, 8]`` normalised, 1437 and 360."""
    from sklearn.datasets import load_digits

    data = load_digits()
    images = torch.from_numpy(data.images).float()[:, None] / 16
    labels = torch.from_numpy(data.target)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    images = (images[order] - 0.305) / 0.376
    images = images.to(memory_format=torch.channels_last)
    return images[:1437], labels[order][:1437], images[1437:], labels[order][1437:]


def train(fuse: bool, epochs: int, blocks: int = 1, seed: int = 0, batch: int = 64) -> tuple[list[float], float, float]:
    """Loss of every step, accuracy on the test images, seconds."""
    x, y, test_x, test_y = digits(seed)
    torch.manual_seed(seed)
    model = DigitResNet(blocks).to(memory_format=torch.channels_last)
    if fuse:
        model = fastres.fuse(model)
    steps = epochs * (len(x) // batch)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    shuffle = torch.Generator().manual_seed(seed + 1)
    losses: list[float] = []
    start = time.perf_counter()
    model.train()
    for _ in range(epochs):
        order = torch.randperm(len(x), generator=shuffle)
        for rows in order[: len(order) // batch * batch].split(batch):
            loss = F.cross_entropy(model(x[rows]), y[rows])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
    seconds = time.perf_counter() - start
    model.eval()
    with torch.inference_mode():
        accuracy = (model(test_x).argmax(1) == test_y).double().mean().item()
    return losses, accuracy, seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--blocks", type=int, default=1, help="blocks per stage: 1 makes 8 layers, 2 make 14")
    parser.add_argument("--out", default="digits.png", help="where the plot of both loss curves goes")
    arguments = parser.parse_args()
    if min(arguments.epochs, arguments.blocks) < 1:
        parser.error("--epochs and --blocks: expected at least 1")

    torch.set_num_threads(1)  # 8x8 pixels: a second thread costs more than it does
    results = {}
    for name, fuse in (("PyTorch", False), ("PyTorch + fastres.fuse", True)):
        results[name] = train(fuse, arguments.epochs, arguments.blocks)
        losses, accuracy, seconds = results[name]
        print(f"{name:24s} final loss {losses[-1]:.4f}   test accuracy {accuracy:.2%}   {seconds:.1f} s")

    from fastres import doctor, figures

    versions = doctor.versions()
    path = figures.loss_curves(
        {f"{name}: accuracy {accuracy:.2%}": losses for name, (losses, accuracy, _) in results.items()},
        arguments.out,
        title="Handwritten digits, with and without fuse",
        detail=f"ResNet of {6 * arguments.blocks + 2} layers, batch 64, fp32, same seed",
        caption=f"scikit-learn digits, 1437 training and 360 test images. {doctor.cpu()['name']}, torch "
        f"{versions['torch']}, fastres {versions['fastres']}.\npython {' '.join(sys.argv)}",
    )
    print(f"loss curves: {path}")


if __name__ == "__main__":
    main()
