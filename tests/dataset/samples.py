"""What several tests of this room build their cases from."""

from pathlib import Path

import torch

GOLDEN = Path(__file__).parents[1] / "data" / "golden"
SHARED = Path(__file__).resolve().parents[3] / "shared"  # beside the repository; tests that need it skip without it


class Pixels:
    """Stands for an encoder's preprocessing: an image becomes [3, 2, 2] filled with its first pixel."""

    def __call__(self, images):
        return torch.stack([torch.tensor(image.getpixel((0, 0))).view(3, 1, 1).expand(3, 2, 2) for image in images])


def record(*contents: str, images: tuple[str, ...] = (), name: str = "r", **fields) -> dict:
    """Turns of user and assistant, the user's first."""
    messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)]
    return {"id": name, "source": "test", "images": list(images), "messages": messages, **fields}
