"""Counted operations of a training step against those that torch counts as they are done."""

from contextlib import nullcontext

import pytest
import torch
from peft.tuners.lora import LoraLayer
from torch.utils.flop_counter import FlopCounterMode

from build import build_model
from config import EncoderConfig, LoraConfig, ModelConfig
from dataset.collator import Collator
from model.flops import TrainingFlops, attention_windows, causal_pairs, sample_lengths
from tests import conftest
from tests.model.families import FAMILIES, make_decoder

LENGTH = 40


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    """`build(family, tune, ...)`: a small model in training mode; families are made once."""
    root = tmp_path_factory.mktemp("flops")
    conftest.make_encoder(root / "encoder")

    def made(family: str, tune: str = "lora", lora: dict | None = None, **settings):
        folder = root / family
        if not folder.exists():
            conftest.make_decoder(folder) if family == "qwen" else make_decoder(family, folder)
        torch.manual_seed(0)
        config = ModelConfig(
            decoder=str(folder), tune=tune, encoder=EncoderConfig(kind="clip", path=str(root / "encoder")),
            lora=LoraConfig(**{"r": 4, "dropout": 0.0, **(lora or {})}), attn_implementation="eager", **settings,
        )  # fmt: skip
        model = build_model(config)
        model.language_model.set_experts_implementation("eager")  # torch doesn't count the grouped product of others
        return model.train()

    return made


def batch_of(model, rows: int = 2) -> dict[str, torch.Tensor]:
    """Rows of equal length with a picture each; the second half of a row is supervised."""
    count = model.media.num_features
    ids = torch.arange(rows * LENGTH).reshape(rows, LENGTH) % 100 + 3
    ids[:, 1 : 1 + count] = model.placeholder_id
    labels = ids.clone()
    labels[:, : LENGTH // 2] = -100
    return {
        "input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels,
        "view_counts": torch.ones(rows, dtype=torch.long),
        "pixel_values": torch.randn(rows, 3, *model.encoder.image_size), "view_features": torch.full((rows,), count),
    }  # fmt: skip


class NoTracker(nullcontext):
    parents = {"Global"}


def counted_by_torch(model, batch) -> int:
    counter = FlopCounterMode(display=False)
    # Its hooks on modules, for sums by module, can't be within the loss, which makes gradients in its forward pass.
    counter.mod_tracker = NoTracker()
    with counter:
        model(**batch).loss.backward()
    return counter.get_total_flops()


def expected(model, batch) -> float:
    """Ours, with the pairs of positions that eager attention computes in vain."""
    rows, length = batch["input_ids"].shape
    views = len(batch["pixel_values"]) if "pixel_values" in batch else 0
    supervised = int((batch["labels"][:, 1:] != -100).sum())
    parts = TrainingFlops(model)([length] * rows, supervised, rows * model.media.num_features, views)
    assert TrainingFlops(model).of_batch(batch) == sum(parts.values())
    return sum(parts.values()) + parts["attention"] * (2 * length / (length + 1) - 1)


@pytest.mark.parametrize("tune", ["projector", "lora", "decoder", "all"])
@pytest.mark.parametrize("family", ["qwen", "qwen2", "gpt2", "qwen2_moe"])
def test_as_many_as_torch_counts(build, family, tune):
    model = build(family, tune)
    batch = batch_of(model)
    assert expected(model, batch) == pytest.approx(counted_by_torch(model, batch), rel=1e-3)


@pytest.mark.parametrize("family", ["qwen2-tied", "qwen3", "llama", "phi", "phi3", "gemma", "qwen3_moe", "mixtral"])
def test_other_families(build, family):
    model = build(family)
    batch = batch_of(model)
    assert expected(model, batch) == pytest.approx(counted_by_torch(model, batch), rel=1e-3)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_dora(build, dropout):
    model = build("qwen2", lora={"dora": True, "dropout": dropout})
    batch = batch_of(model)
    # peft multiplies A by an identity matrix first: r * in * in for each adapted matrix.
    layers = [module for module in model.decoder.modules() if isinstance(module, LoraLayer)]
    in_vain = sum(2 * 4 * layer.in_features**2 for layer in layers)
    assert len(layers) == 2 * 7
    assert expected(model, batch) + in_vain == pytest.approx(counted_by_torch(model, batch), rel=1e-3)


def test_lora_on_experts(build):
    targets = ["q_proj", "experts.gate_up_proj", "experts.down_proj"]
    model = build("qwen3_moe", lora={"targets": targets})
    batch = batch_of(model)
    # peft multiplies the matrices of an expert's adapter twice: 2 * r * in * out in vain, in two blocks.
    in_vain = 2 * 2 * 4 * 4 * (32 * 32 + 32 * 16)
    assert expected(model, batch) + in_vain == pytest.approx(counted_by_torch(model, batch), rel=1e-3)


def test_parts_by_hand(build):
    """Qwen2: 32 wide, 4 heads of 8 with 2 for keys and values, MLP of 64, two blocks, 4 features per picture."""
    model = build("qwen2")
    flops = TrainingFlops(model)
    block = 32 * 32 + 2 * 32 * 16 + 32 * 32 + 3 * 32 * 64
    lora = 4 * (2 * (32 + 32) + 2 * (32 + 16) + 3 * (32 + 64))
    vocabulary = model.language_model.config.vocab_size
    assert flops([10, 3], supervised=5, features=4, views=0) == {
        "decoder": 13 * 2 * 4 * block,
        "lora": 13 * 2 * 6 * lora,
        "attention": 2 * 3 * 2 * (55 + 6) * 4 * 16,
        "head": 5 * 4 * 32 * vocabulary,
        "projector": 4 * (4 * 16 * 32 + 6 * 32 * 32),
        "encoder": 0,
    }
    assert TrainingFlops(build("qwen2", "decoder"))([1], 1)["head"] == 6 * 32 * vocabulary
    assert TrainingFlops(build("qwen2", "projector"))([13], 0)["lora"] == 0


def test_experts_that_a_token_meets_and_no_others(build):
    """Mixtral: two of four experts of 3 * 32 * 64, and a router."""
    per_token = TrainingFlops(build("mixtral")).per_token["decoder"]
    assert per_token == 2 * 4 * (32 * 32 + 2 * 32 * 16 + 32 * 32 + 4 * 32 + 2 * 3 * 32 * 64)


def test_packed_batch_counts_as_padded(build):
    model = build("qwen2")
    samples = [
        {"input_ids": ids, "labels": [-100, *ids[1:]], "pixel_values": None, "view_features": []}
        for ids in ([5, 6, 7], [8, 9], [5, 6, 7, 8, 9, 10])
    ]
    padded, packed = (Collator(0, packing=packing)(samples) for packing in (False, True))
    assert sample_lengths(padded) == sample_lengths(packed) == [3, 2, 6]
    flops = TrainingFlops(model)
    assert flops.of_batch(padded) == flops.of_batch(packed) == sum(flops([3, 2, 6], 8).values())


def test_cached_features_spare_the_encoder(build):
    model = build("qwen2")
    batch, flops = batch_of(model), TrainingFlops(model)
    whole = flops.of_batch(batch)
    batch["vision"] = model.encoder(batch.pop("pixel_values"))
    assert whole - flops.of_batch(batch) == 2 * flops.per_view > 0
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        model.encoder(torch.zeros(3, 3, *model.encoder.image_size))
    assert 3 * flops.per_view == counter.get_total_flops()


def test_pairs_within_a_window():
    for window in (None, 1, 4, 9, 20):
        for length in (1, 5, 9, 30):
            reach = window or length
            assert causal_pairs(length, window) == sum(min(i + 1, reach) for i in range(length))
    assert attention_windows(FAMILIES["mistral"]()) == [20, 20] and attention_windows(FAMILIES["qwen2"]()) == [None] * 2
    assert set(attention_windows(FAMILIES["gemma2"]())) == {20, None}


def test_what_is_not_known_is_refused(build, monkeypatch):
    model = build("qwen3_moe")
    monkeypatch.setattr("model.flops.EXPERTS_PER_TOKEN", ())
    with pytest.raises(ValueError, match=r"no count of operations for gate_up_proj \[4, 32, 32\] of a Qwen3MoeExperts"):
        TrainingFlops(model)
    model = build("qwen2")
    model.language_model.config.layer_types = ["full_attention", "mamba"]
    with pytest.raises(ValueError, match="no count of operations for blocks of type mamba"):
        TrainingFlops(model)
