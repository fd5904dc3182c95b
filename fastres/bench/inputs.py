"""Input batches: real photographs from a directory, or random pixels."""

from __future__ import annotations

from pathlib import Path

import torch

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp")
# The statistics torchvision's ImageNet weights were trained with.
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)


class BenchError(ValueError):
    """The request cannot be served: the message is one line for the user."""


def photographs(directory: Path | str) -> list[Path]:
    """The images directly inside ``directory``, sorted by name."""
    directory = Path(directory)
    if not directory.is_dir():
        raise BenchError(f"--images: got {str(directory)!r}, expected an existing directory")
    found = sorted(p for p in directory.iterdir() if p.suffix.lower() in SUFFIXES and p.is_file())
    if not found:
        raise BenchError(f"--images: no image ({', '.join(SUFFIXES)}) in {str(directory)!r}")
    return found


def load_photograph(path: Path, size: int) -> torch.Tensor:
    """float32 ``[3, size, size]``: short side resized to ``size``, centre crop, ImageNet normalisation."""
    try:
        from PIL import Image
    except ImportError as error:
        raise BenchError("--images: reading photographs needs the package pillow (pip install pillow)") from error
    try:
        with Image.open(path) as image:
            image = image.convert("RGB")
    except OSError as error:
        raise BenchError(f"--images: {path.name} is not a readable image ({error})") from error
    scale = size / min(image.size)
    width, height = (max(size, round(side * scale)) for side in image.size)
    image = image.resize((width, height), Image.Resampling.BILINEAR)
    left, top = (width - size) // 2, (height - size) // 2
    image = image.crop((left, top, left + size, top + size))
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    pixels = pixels.reshape(size, size, 3).permute(2, 0, 1).float() / 255
    return (pixels - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]


def batch_of(batch: int, size: int, images: Path | str | None, seed: int) -> tuple[torch.Tensor, str]:
    """float32 ``[batch, 3, size, size]`` in channels_last, and where it came from in words."""
    if images is None:
        generator = torch.Generator().manual_seed(seed + 1)
        x = torch.randn(batch, 3, size, size, generator=generator)
        return x.to(memory_format=torch.channels_last), f"random pixels, seed {seed + 1}"
    paths = photographs(images)
    distinct = [load_photograph(path, size) for path in paths[:batch]]
    x = torch.stack([distinct[i % len(distinct)] for i in range(batch)])
    used = ", ".join(path.name for path in paths[:batch])
    return x.to(memory_format=torch.channels_last), f"photographs {used}, repeated to fill the batch"
