import base64
from pathlib import Path

import pytest
import torch

from model import MultiModalModel
from model.lora import add_lora
from model.projector import build_projector
from qwen import MultimodalQWenLMHeadModel, QWenTokenizer
from tests.model.toy import PLACEHOLDER
from visual import build_encoder

GOLDEN = Path(__file__).parents[1] / "data" / "golden"


@pytest.fixture
def legacy_model():
    """The recorded model of golden case f, `legacy_model("siglip" | "clip")`, in eval mode."""

    def build(kind: str, dtype: torch.dtype = torch.float32) -> MultiModalModel:
        folder = GOLDEN / f"f_{kind}"
        return MultiModalModel.from_pretrained(
            folder / "saved",
            decoder=GOLDEN / "llm",
            encoder=folder / "vision",
            dtype=dtype,
            placeholder_id=PLACEHOLDER,
        )

    return build


@pytest.fixture
def make_model():
    """A fresh model on the golden decoder and encoders, LoRA B not zero; `make_model(lora=False)` has no adapter."""

    def build(
        kind: str = "siglip",
        lora: bool = True,
        dtype: torch.dtype = torch.float32,
        position_embedding: bool = False,
        seed: int = 0,
    ) -> MultiModalModel:
        torch.manual_seed(seed)
        encoder = build_encoder(kind, str(GOLDEN / f"f_{kind}" / "vision"), dtype=dtype)
        decoder = MultimodalQWenLMHeadModel.from_pretrained(GOLDEN / "llm", dtype=dtype)
        projector = build_projector(
            "mlp",
            encoder.width,
            decoder.config.hidden_size,
            num_features=encoder.num_features,
            position_embedding=position_embedding,
            init_std=0.1,
        )
        if lora:
            decoder = add_lora(decoder, r=4, alpha=8, targets=["c_attn", "w1", "w2"])
            for name, parameter in decoder.named_parameters():
                if ".lora_B." in name:
                    torch.nn.init.normal_(parameter, std=0.1)
        return MultiModalModel(encoder, projector, decoder, PLACEHOLDER).eval()

    return build


@pytest.fixture
def small_tokenizer(tmp_path) -> QWenTokenizer:
    """A tokenizer of single bytes."""
    ranks = "".join(f"{base64.b64encode(bytes([byte])).decode()} {byte}\n" for byte in range(256))
    (tmp_path / "qwen.tiktoken").write_text(ranks)
    return QWenTokenizer.from_pretrained(tmp_path)
