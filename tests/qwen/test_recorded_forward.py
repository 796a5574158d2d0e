"""Forward passes against numbers recorded from the original code."""

import pytest
import torch

from qwen import QWenLMHeadModel
from qwen.modeling_qwen import logn_scale, ntk_alpha, rotary_table

LOGITS = {"atol": 2e-4, "rtol": 0}
GRADIENTS = {"atol": 1e-5, "rtol": 1e-3}


def test_plain_forward(llm, recorded):
    case = recorded("a_plain")
    output = llm(case["input_ids"], labels=case["labels"], output_hidden_states=True)
    torch.testing.assert_close(output.logits, case["logits"], **LOGITS)
    torch.testing.assert_close(output.loss, case["loss"][0], atol=1e-5, rtol=0)
    assert len(output.hidden_states) == 4
    for index, states in enumerate(output.hidden_states):
        torch.testing.assert_close(states, case[f"hidden_states.{index}"], **LOGITS)
    cached = output.past_key_values.layers[0]  # recorded as [B, T, heads, head_dim], keys after rotation
    torch.testing.assert_close(cached.keys.transpose(1, 2), case["past.0.key"], **LOGITS)
    torch.testing.assert_close(cached.values.transpose(1, 2), case["past.0.value"], **LOGITS)
    torch.testing.assert_close(llm.train()(case["input_ids"]).logits, case["logits_train"], **LOGITS)


@pytest.mark.parametrize("case", ["short.right", "short.left", "long.right"])
def test_padding(llm, recorded, case):
    data = {name.removeprefix(f"{case}."): tensor for name, tensor in recorded("b_padding").items()}
    logits = llm(data["input_ids"], attention_mask=data["attention_mask"]).logits
    assert logits.isfinite().all()
    mask = data["attention_mask"].bool()
    torch.testing.assert_close(logits[mask], data["logits"][mask], **LOGITS)


def test_left_padded_row_equals_the_row_alone_beyond_seq_length(llm, recorded):
    # The original took the log-n factor of the padded index; right padding, where both agree, says what is right.
    left, right = ({k.split(".", 2)[2]: v for k, v in recorded("b_padding").items() if k.startswith(f"long.{side}.")}
                   for side in ("left", "right"))  # fmt: skip
    logits = llm(left["input_ids"], attention_mask=left["attention_mask"]).logits
    mask, right_mask = left["attention_mask"].bool(), right["attention_mask"].bool()
    torch.testing.assert_close(logits[mask], right["logits"][right_mask], **LOGITS)
    for row in range(len(mask)):
        alone = llm(left["input_ids"][row, mask[row]][None]).logits[0]
        torch.testing.assert_close(logits[row, mask[row]], alone, **LOGITS)


@pytest.mark.parametrize(
    ("case", "changes"),
    [
        ("L50.eval", {}),
        ("L50.eval_nontk", {"use_dynamic_ntk": False}),
        ("L50.eval_nologn", {"use_logn_attn": False}),
        ("L100.eval", {}),
    ],
)
def test_beyond_seq_length(golden, recorded, case, changes):
    data = recorded("c_long")
    model = QWenLMHeadModel.from_pretrained(golden / "llm", **changes).eval()
    logits = model(data[case[: case.index(".")] + ".input_ids"]).logits
    torch.testing.assert_close(logits, data[f"{case}.logits"], **LOGITS)


def test_training_does_not_extrapolate(llm, recorded):
    data = recorded("c_long")
    torch.testing.assert_close(llm.train()(data["L50.input_ids"]).logits, data["L50.train.logits"], **LOGITS)


def test_lengths_around_the_boundaries(llm, recorded):
    data = recorded("c_long")
    for index, length in enumerate(data["boundary.lengths"].tolist()):
        logits = llm(data["boundary.input_ids"][:, :length]).logits[0, -1]
        torch.testing.assert_close(logits, data["boundary.last_logits"][index], **LOGITS)
    torch.testing.assert_close(ntk_alpha(data["boundary.lengths"], 32), data["boundary.ntk_alpha"], atol=0, rtol=0)


def test_tables(recorded):
    data = recorded("c_tables")
    alphas = ntk_alpha(torch.arange(1, 513), 32)
    torch.testing.assert_close(alphas, data["ntk_alpha_len1_to_512_seq32"], atol=0, rtol=0)
    real = ntk_alpha(data["ntk_real_lengths"], 8192)
    torch.testing.assert_close(real, data["ntk_real_alpha_seq8192"], atol=0, rtol=0)
    torch.testing.assert_close(logn_scale(torch.arange(512), 32), data["logn_first_512_seq32"], atol=1e-6, rtol=0)
    for alpha in (1, 3, 7):
        cos, sin = rotary_table(torch.arange(40)[None], 16, 10000, torch.tensor([[float(alpha)]]))
        torch.testing.assert_close(cos, data[f"rope.alpha{alpha}.cos"], atol=1e-5, rtol=0)
        torch.testing.assert_close(sin, data[f"rope.alpha{alpha}.sin"], atol=1e-5, rtol=0)


@pytest.mark.parametrize("case", ["e1", "e2"])
def test_injected_features(llm, recorded, expand, case):
    data = {name.removeprefix(f"{case}."): tensor for name, tensor in recorded("e_inject").items()}
    images = data["images"].requires_grad_()
    arguments = {
        "input_ids": expand(data["input_ids"], images.shape[1]),
        "features": images.flatten(0, 1),
        "labels": data["labels"],
    }
    output = llm(**arguments, output_hidden_states=True)
    torch.testing.assert_close(output.logits, data["eval.logits"], **LOGITS)
    torch.testing.assert_close(output.loss, data["eval.loss"][0], atol=1e-5, rtol=0)
    if case == "e1":
        for index, states in enumerate(output.hidden_states):
            torch.testing.assert_close(states, data[f"eval.hidden_states.{index}"], **LOGITS)

    loss = llm.train()(**arguments).loss
    torch.testing.assert_close(loss, data["train.loss"][0], atol=1e-5, rtol=0)
    loss.backward()
    torch.testing.assert_close(images.grad, data["train.grad.images"], **GRADIENTS)
    parameters = dict(llm.named_parameters())
    names = [name.removeprefix("train.grad.") for name in data if name.startswith("train.grad.transformer")]
    assert names
    for name in names:
        torch.testing.assert_close(parameters[name].grad, data[f"train.grad.{name}"], **GRADIENTS)


def test_injected_features_in_a_padded_batch(llm, recorded, expand):
    data = recorded("e_inject")
    images, mask = data["e1.images"], data["e1.mask.attention_mask"]
    logits = llm(expand(data["e1.input_ids"], 9), images.flatten(0, 1), attention_mask=mask).logits
    torch.testing.assert_close(logits[mask.bool()], data["e1.mask.logits"][mask.bool()], **LOGITS)
