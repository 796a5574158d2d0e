"""Small models of which it is known where they look: features say how red the patches of a picture are."""

from functools import partial

import torch
from PIL import Image, ImageDraw
from torch import Tensor, nn
from transformers import CLIPImageProcessor, PreTrainedConfig, Qwen2Config, SiglipImageProcessor

from model import MultiModalModel
from model.decoder import decoder_class
from model.projector import build_projector
from visual.encoder import VisionEncoder
from visual.media import Media
from visual.pretrained import load_processor

PLACEHOLDER, SIDE, PATCH = 90, 32, 8  # pixels
RED, BLUE = (230, 20, 30), (30, 40, 220)
DECODER = Qwen2Config(
    vocab_size=100, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
    intermediate_size=64, max_position_embeddings=512, initializer_range=0.3,
)  # fmt: skip


def redness(backbone: nn.Linear, pixel_values: Tensor) -> Tensor:
    """[N, 3, 32, 32] -> [N, 4, 4, D]; what is less than half red counts as nothing."""
    red = pixel_values[:, :1] - pixel_values[:, 1:].mean(1, keepdim=True)
    return backbone(torch.nn.functional.avg_pool2d(red, PATCH).permute(0, 2, 3, 1).sub(0.5).relu())


def make_model(folder, squash: bool = False, config: PreTrainedConfig = DECODER, shuffle: int = 1, **media):
    """A model that sees red; its preprocessing cuts out the middle, or squashes, as `folder` then says."""
    if squash:
        SiglipImageProcessor(size={"height": SIDE, "width": SIDE}).save_pretrained(folder)
    else:
        CLIPImageProcessor(
            size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}, image_mean=[0.4, 0.5, 0.3]
        ).save_pretrained(folder)
    torch.manual_seed(0)
    encoder = VisionEncoder(nn.Linear(1, 6), redness, (SIDE, SIDE), partial(load_processor, str(folder)))
    decoder = decoder_class(config)(config)
    for parameter in decoder.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    projector = build_projector("mlp", 6, config.hidden_size, pixel_shuffle=shuffle, init_std=1.5)
    media = Media(encoder, **media, pixel_shuffle=shuffle)
    return MultiModalModel(encoder, projector, decoder, PLACEHOLDER, media=media).eval()


def prompt_of(*counts: int) -> list[int]:
    """A prompt that shows pictures of so many features."""
    ids = [5, 17]
    for number, count in enumerate(counts):
        ids += [PLACEHOLDER] * count + [30 + number]
    return [*ids, 41, 9]


def picture(size: tuple[int, int], box: tuple[int, int, int, int], colour=RED) -> Image.Image:
    """Blue, and a rectangle (left, top, right, bottom; the last two excluded)."""
    image = Image.new("RGB", size, BLUE)
    ImageDraw.Draw(image).rectangle((box[0], box[1], box[2] - 1, box[3] - 1), fill=colour)
    return image


def telling_answer(model: MultiModalModel, prompt: list[int], shown: Tensor, other: Tensor) -> list[int]:
    """A token that features `shown` [M, H] make likelier than `other` do, more than they do any other token."""
    with torch.no_grad():
        logits = [model(torch.tensor([prompt]), features=one).logits[0, -1].log_softmax(-1) for one in (shown, other)]
    return [int((logits[0] - logits[1]).argmax())]


def noise(count: int, seed: int = 0) -> Tensor:
    """`[count, 3, 32, 32]` pixels, red enough to be seen, and more so in some patches than in others."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.rand(count, 3, SIDE, SIDE, generator=generator)
    red = torch.rand(count, SIDE // PATCH, SIDE // PATCH, generator=generator)
    pixels[:, 0] += 0.5 + 2 * red.repeat_interleave(PATCH, 1).repeat_interleave(PATCH, 2)
    return pixels
