"""Contrastive pretraining of a small CLIP: a vision and a text tower whose embeddings of a matching pair agree."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPVisionConfig, CLIPVisionModel

MAX_SCALE = 100.0  # of the logits; CLIP (Radford et al., 2021) clips it there for stability


class DualTower(nn.Module):
    """Both towers of CLIP with a mean over patches and tokens instead of class and end tokens.

    The mean makes every patch carry what it shows, and patches are what a language model is given later. BatchNorm
    before the projections keeps the embeddings from collapsing into one direction early on.

    Args:
        vision, text: configurations of the towers; `projection_dim` of `vision` is the width of the embeddings (E).
    """

    def __init__(self, vision: CLIPVisionConfig, text: CLIPTextConfig):
        super().__init__()
        self.vision = CLIPVisionModel(vision)
        self.text = CLIPTextModel(text)
        self.vision_head = _head(vision.hidden_size, vision.projection_dim)
        self.text_head = _head(text.hidden_size, vision.projection_dim)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))  # initial temperature of CLIP

    def embed_images(self, pixel_values: Tensor) -> Tensor:
        """Unit vectors `[N, E]` of pictures `[N, 3, H, W]`."""
        patches = self.vision(pixel_values).last_hidden_state[:, 1:].float()  # [N, n, D], without the class token
        return F.normalize(self.vision_head(patches.mean(1)), dim=-1)

    def embed_texts(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Unit vectors `[N, E]` of texts `[N, T]`, padding masked with 0."""
        hidden = self.text(input_ids, attention_mask=attention_mask).last_hidden_state.float()  # [N, T, D]
        mask = attention_mask.unsqueeze(-1)
        return F.normalize(self.text_head((hidden * mask).sum(1) / mask.sum(1)), dim=-1)

    def forward(self, pixel_values: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Mean cross entropy of finding the text of each picture and the picture of each text within the batch."""
        images, texts = self.embed_images(pixel_values), self.embed_texts(input_ids, attention_mask)
        logits = self.logit_scale.exp().clamp(max=MAX_SCALE) * images @ texts.T
        target = torch.arange(len(logits), device=logits.device)
        return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def _head(width: int, embedding: int) -> nn.Module:
    return nn.Sequential(nn.BatchNorm1d(width), nn.Linear(width, embedding, bias=False))


@torch.no_grad()
def recall_at_1(images: Tensor, texts: Tensor) -> float:
    """Share of pictures `[N, E]` whose nearest text of `[N, E]` is their own."""
    return (images @ texts.T).argmax(1).eq(torch.arange(len(images), device=images.device)).float().mean().item()
