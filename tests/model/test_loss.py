"""The chunked loss equals the naive loss over all positions, in value and gradient."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from model import loss as loss_module
from model.loss import supervised_cross_entropy

B, T, H, V = 3, 11, 16, 97


def _naive(hidden, head, labels, num_items=None):
    logits = head(hidden).float()
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100, reduction="sum")
    return loss / (num_items or max(int((labels[:, 1:] != -100).sum()), 1))


def _inputs(seed=0, supervised=0.4):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(B, T, H, generator=generator)
    labels = torch.randint(0, V, (B, T), generator=generator)
    labels[torch.rand(B, T, generator=generator) >= supervised] = -100
    return hidden, labels


def _head(bias=False, seed=1):
    torch.manual_seed(seed)
    return nn.Linear(H, V, bias=bias)


def _value_and_grads(function, hidden, head, labels, **kwargs):
    hidden = hidden.clone().requires_grad_()
    head.zero_grad()
    loss = function(hidden, head, labels, **kwargs)
    loss.backward()
    return loss.detach(), hidden.grad, [None if p.grad is None else p.grad.clone() for p in head.parameters()]


@pytest.mark.parametrize("chunk_tokens", [1, 4, 256])
@pytest.mark.parametrize("num_items", [None, 50])
@pytest.mark.parametrize("trainable", [False, True])
def test_equals_naive(chunk_tokens, num_items, trainable):
    hidden, labels = _inputs()
    head = _head(bias=True).requires_grad_(trainable)
    loss, grad, head_grads = _value_and_grads(
        supervised_cross_entropy, hidden, head, labels, num_items=num_items, chunk_tokens=chunk_tokens
    )
    naive_loss, naive_grad, naive_head_grads = _value_and_grads(_naive, hidden, head, labels, num_items=num_items)
    torch.testing.assert_close(loss, naive_loss, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(grad, naive_grad, atol=1e-6, rtol=0)
    assert [g is None for g in head_grads] == [not trainable] * 2
    for ours, naive in zip(head_grads, naive_head_grads, strict=True):
        if trainable:
            torch.testing.assert_close(ours, naive, atol=1e-6, rtol=0)


def test_without_grad_equals_with_grad():
    hidden, labels = _inputs()
    head = _head().requires_grad_(False)
    with_grad = supervised_cross_entropy(hidden.requires_grad_(), head, labels, chunk_tokens=3)
    with torch.no_grad():
        without = supervised_cross_entropy(hidden, head, labels, chunk_tokens=3)
    assert with_grad.requires_grad and not without.requires_grad
    torch.testing.assert_close(with_grad.detach(), without, atol=1e-6, rtol=1e-6)


def test_nothing_supervised_is_zero_with_zero_gradients():
    hidden, labels = _inputs(supervised=0)
    labels[:, 0] = 5  # nothing predicts the first position
    hidden[0, 0] = float("inf")
    loss, grad, head_grads = _value_and_grads(supervised_cross_entropy, hidden, _head(), labels)
    assert loss == 0
    assert torch.equal(grad, torch.zeros_like(grad))
    assert torch.equal(head_grads[0], torch.zeros(V, H))


def test_micro_batches_with_global_count_give_the_gradient_of_one_batch():
    hidden, labels = _inputs()
    labels[1] = -100
    head = _head().requires_grad_(False)
    total = int((labels[:, 1:] != -100).sum())
    _, whole, _ = _value_and_grads(supervised_cross_entropy, hidden, head, labels)
    rows = [
        _value_and_grads(supervised_cross_entropy, hidden[i : i + 1], head, labels[i : i + 1], num_items=total)[1]
        for i in range(B)
    ]
    torch.testing.assert_close(torch.cat(rows), whole, atol=1e-7, rtol=1e-5)


def test_calls_the_module_rather_than_its_weight():
    hidden, labels = _inputs()
    linear = _head()
    capped = nn.Sequential(linear, nn.Tanh(), nn.Linear(V, V))  # tanh saves its output for the backward pass
    loss, grad, _ = _value_and_grads(supervised_cross_entropy, hidden, capped, labels, chunk_tokens=4)
    naive_loss, naive_grad, _ = _value_and_grads(_naive, hidden, capped, labels)
    torch.testing.assert_close(loss, naive_loss, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(grad, naive_grad, atol=1e-6, rtol=0)


@pytest.mark.parametrize("autocast", [False, True])
def test_bfloat16_head_has_a_float32_loss(autocast):
    hidden, labels = _inputs()
    head = _head().to(torch.float32 if autocast else torch.bfloat16)
    hidden = hidden.to(torch.float32 if autocast else torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss, grad, head_grads = _value_and_grads(supervised_cross_entropy, hidden, head, labels, chunk_tokens=4)
        naive_loss, naive_grad, naive_head_grads = _value_and_grads(_naive, hidden, head, labels)
    assert loss.dtype == torch.float32 and grad.dtype == hidden.dtype
    torch.testing.assert_close(loss, naive_loss, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(grad, naive_grad, atol=2e-4, rtol=1e-2)
    torch.testing.assert_close(head_grads[0], naive_head_grads[0], atol=1e-3, rtol=2e-2)


def test_never_makes_more_logits_than_a_chunk():
    hidden, labels = _inputs(supervised=1)
    head = _head()
    sizes = []
    head.register_forward_hook(lambda module, inputs, output: sizes.append(len(output)))
    _value_and_grads(supervised_cross_entropy, hidden, head, labels, chunk_tokens=8)
    assert max(sizes) == 8 and sum(sizes) == B * (T - 1)


@pytest.mark.parametrize("vocabulary", [97, 5000])
def test_the_default_bounds_logits_whatever_the_vocabulary(vocabulary, monkeypatch):
    monkeypatch.setattr(loss_module, "CHUNK_LOGITS", 600)
    hidden, labels = _inputs(supervised=1)
    head = nn.Linear(H, vocabulary)
    sizes = []
    head.register_forward_hook(lambda module, inputs, output: sizes.append(output.shape))
    _value_and_grads(supervised_cross_entropy, hidden, head, labels)
    assert all(rows * columns <= 600 or rows == 1 for rows, columns in sizes)
    assert sum(rows for rows, _ in sizes) == B * (T - 1)


def test_a_head_that_zero3_trains_gets_the_same_gradients():
    hidden, labels = _inputs(supervised=1)
    head = _head()
    expected = _value_and_grads(_naive, hidden, head, labels)
    for number, parameter in enumerate(head.parameters()):
        parameter.ds_id = number  # by which DeepSpeed's parameters are known
    sizes = []
    head.register_forward_hook(lambda module, inputs, output: sizes.append(len(output)))
    found = _value_and_grads(supervised_cross_entropy, hidden, head, labels, chunk_tokens=8)
    torch.testing.assert_close(found, expected)
    assert max(sizes) == 8 and sum(sizes) == 2 * B * (T - 1)  # computed again in the backward pass


def test_bad_arguments():
    hidden, labels = _inputs()
    with pytest.raises(ValueError, match=r"labels have shape \[3, 10\], expected \[3, 11\]"):
        supervised_cross_entropy(hidden, _head(), labels[:, 1:])
    with pytest.raises(ValueError, match="chunk_tokens is 0"):
        supervised_cross_entropy(hidden, _head(), labels, chunk_tokens=0)
