import pytest
import torch

from model import MultiModalModel
from model.projector import build_projector
from tests.model.toy import PLACEHOLDER, pictures, prompt

TEXT = [5, 17, 200, 41, 9, 88]


def _batch(model: MultiModalModel) -> dict:
    """Three rows of unequal pictures and text: two pictures, one, none; padded on the right."""
    rows = [
        prompt(model, [3], 1, [7, 8], 1, [9, 10, 11]),
        prompt(model, [4, 4], 1, [12, 13, 14, 15, 16]),
        prompt(model, TEXT),
    ]
    length = max(map(len, rows))
    batch = {
        "input_ids": torch.tensor([row + [0] * (length - len(row)) for row in rows]),
        "attention_mask": torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows]),
        "labels": torch.full((len(rows), length), -100),
        "pixel_values": pictures(3),
        "view_counts": torch.tensor([2, 1, 0]),
    }
    for row, (ids, supervised) in enumerate(zip(rows, (3, 4, 2), strict=True)):
        batch["labels"][row, len(ids) - supervised : len(ids)] = torch.tensor(ids[-supervised:])
    return batch


def _single(batch: dict, row: int) -> dict:
    """One row of the batch with its own pictures."""
    counts = batch["view_counts"].tolist()
    start = sum(counts[:row])
    single = {key: value[row : row + 1] for key, value in batch.items() if key != "pixel_values"}
    if counts[row]:
        single["pixel_values"] = batch["pixel_values"][start : start + counts[row]]
    return single


def _gradients(model: MultiModalModel, *batches: dict, **kwargs) -> dict:
    model.zero_grad()
    for batch in batches:
        model(**batch, **kwargs).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


def _assert_equal(ours: dict, expected: dict, atol: float = 2e-6) -> None:
    assert ours.keys() == expected.keys()
    for name, grad in expected.items():
        torch.testing.assert_close(ours[name], grad, atol=atol, rtol=1e-4, msg=name)


def test_loss_and_gradients_equal_those_of_full_logits(make_model):
    model = make_model(position_embedding=True).train()
    batch = _batch(model)
    labels = batch["labels"]
    loss = model(**batch).loss
    gradients = _gradients(model, batch)

    model.zero_grad()
    logits = model(**{key: value for key, value in batch.items() if key != "labels"}).logits
    naive = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
    naive.backward()
    torch.testing.assert_close(loss, naive, atol=1e-6, rtol=1e-6)
    assert "projector.position_embedding" in gradients
    _assert_equal(gradients, {name: p.grad for name, p in model.named_parameters() if p.requires_grad})


@pytest.mark.parametrize("checkpointing", [False, True])
def test_micro_batches_give_the_gradient_of_one_batch(make_model, checkpointing):
    """Micro-batches without pictures and without supervised tokens included."""
    model = make_model().train()
    batch = _batch(model)
    batch["labels"][1] = -100
    whole = _gradients(model, batch)
    items = int((batch["labels"][:, 1:] != -100).sum())
    if checkpointing:
        model.activation_checkpointing_enable()
    rows = [_single(batch, row) for row in range(3)]
    assert [("pixel_values" in row) for row in rows] == [True, True, False]
    assert model(**rows[1], num_items_in_batch=items).loss == 0
    _assert_equal(_gradients(model, *rows, num_items_in_batch=torch.tensor(items)), whole)


def test_rows_do_not_see_each_other(make_model):
    model = make_model()
    batch = _batch(model)
    del batch["labels"]
    logits = model(**batch).logits
    for row in range(3):
        length = int(batch["attention_mask"][row].sum())
        single = _single(batch, row)
        single["input_ids"] = single["input_ids"][:, :length]
        del single["attention_mask"]
        torch.testing.assert_close(logits[row, :length], model(**single).logits[0], atol=2e-4, rtol=0)


def test_features_instead_of_pixel_values(make_model):
    model = make_model()
    batch = _batch(model)
    features = model.encode_images(batch["pixel_values"])
    assert features.shape == (3 * model.encoder.num_features, model.language_model.config.hidden_size)
    loss = model(**batch).loss
    pixel_values = batch.pop("pixel_values")
    assert torch.equal(model(**batch, features=features).loss, loss)
    with pytest.raises(ValueError, match="give one of pixel_values, vision and features, not several"):
        model(**batch, features=features, pixel_values=pixel_values)


def test_vision_instead_of_pixel_values_without_the_encoder(make_model):
    model = make_model(position_embedding=True)
    torch.nn.init.normal_(model.projector.position_embedding)
    batch = _batch(model)
    loss = model(**batch).loss
    vision = model.encoder(batch.pop("pixel_values"))
    model.encoder.forward = None
    assert torch.equal(model(**batch, vision=vision).loss, loss)
    with pytest.raises(ValueError, match="give one of pixel_values, vision and features, not several"):
        model(**batch, features=vision, vision=vision)
    model.encoder.requires_grad_(True)
    with pytest.raises(ValueError, match="the encoder is trained: give pixel_values"):
        model(**batch, vision=vision)


@pytest.mark.parametrize("training", [False, True])
def test_wrong_placeholders_name_the_row(make_model, training):
    model = make_model().train(training)
    n = model.encoder.num_features
    batch = _batch(model)
    first = (batch["input_ids"][1] == PLACEHOLDER).nonzero()[0, 0]
    batch["input_ids"][1, first] = 7
    with pytest.raises(ValueError, match=f"row 1 has {n - 1} placeholders for {n} feature"):
        model(**batch)
    batch = _batch(model)
    del batch["pixel_values"]
    with pytest.raises(ValueError, match="placeholders"):
        model(**batch)


def test_a_batch_without_pictures_gives_the_projector_zero_gradients(make_model):
    """Every trained parameter takes part in every step, as DistributedDataParallel demands."""
    model = make_model(position_embedding=True).train()
    gradients = _gradients(model, _single(_batch(model), 2))
    projector = {name: grad for name, grad in gradients.items() if name.startswith("projector.")}
    assert len(projector) == 5
    assert not any(grad.any() for grad in projector.values())
    assert any(grad.any() for grad in gradients.values())


def test_only_the_projector_learns_without_lora(make_model):
    model = make_model(lora=False).train()
    model.gradient_checkpointing_enable()
    batch = _batch(model)
    gradients = _gradients(model, batch)
    assert all(name.startswith("projector.") and grad.any() for name, grad in gradients.items())
    model.activation_checkpointing_disable()
    _assert_equal(_gradients(model, batch), gradients)
    assert model(**_single(batch, 2)).loss.requires_grad


def test_gradient_checkpointing_recomputes_layers(make_model):
    model = make_model().train()
    batch = _batch(model)
    calls = []
    model.language_model.transformer.h[1].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    _gradients(model, batch)
    assert len(calls) == 1
    model.gradient_checkpointing_enable({"use_reentrant": False})
    _gradients(model, batch)
    assert len(calls) == 3


def test_training_leaves_everything_frozen_untouched(make_model):
    model = make_model().train()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1)
    for _ in range(2):
        model(**_batch(model)).loss.backward()
        optimizer.step()
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {name for name in before if name.startswith("projector.") or ".lora_" in name}
    assert not model.encoder.training


@pytest.mark.parametrize("autocast", [False, True])
def test_masters_are_float32_on_a_bfloat16_base(make_model, autocast):
    model = make_model(dtype=torch.bfloat16, position_embedding=True).train()
    dtypes = {(name.startswith("projector.") or ".lora_" in name, p.dtype) for name, p in model.named_parameters()}
    assert dtypes == {(True, torch.float32), (False, torch.bfloat16)}
    batch = _batch(model)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        assert model.encode_images(batch["pixel_values"]).dtype == torch.bfloat16
        loss = model(**batch).loss
    assert loss.dtype == torch.float32
    loss.backward()
    reference = make_model(position_embedding=True).train()
    torch.testing.assert_close(loss, reference(**batch).loss, atol=0.1, rtol=0)
    assert all(p.grad.dtype == torch.float32 for p in model.parameters() if p.requires_grad)


def test_constructor_freezes_what_it_is_given(make_model):
    given = make_model()
    given.encoder.requires_grad_(True)
    decoder = given.merge().language_model.requires_grad_(True)
    projector = build_projector(**given.projector.spec)
    model = MultiModalModel(given.encoder, projector, decoder, PLACEHOLDER)
    assert {name.partition(".")[0] for name, p in model.named_parameters() if p.requires_grad} == {"projector"}


def test_merge_keeps_the_logits(make_model):
    model = make_model()
    batch = _batch(model)
    del batch["labels"]
    before = model(**batch).logits
    decoder = model.language_model
    model.merge()
    assert model.decoder is decoder and not any(".lora_" in name for name, _ in model.named_parameters())
    torch.testing.assert_close(model(**batch).logits, before, atol=1e-4, rtol=0)
    assert model.merge().decoder is decoder
