import pytest
import torch

from qwen import MultimodalQWenLMHeadModel, MultimodalQWenModel, inject

PLACEHOLDER = 310
GREEDY = {"do_sample": False, "max_new_tokens": 24}


def rows_with_features(counts: list[int], length: int = 20, width: int = 64) -> tuple[torch.Tensor, torch.Tensor]:
    """Random ids `[B, length]`, with so many placeholders from column 2 on, and random features `[M, width]`."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 300, (len(counts), length), generator=generator)
    for row, count in enumerate(counts):
        ids[row, 2 : 2 + count] = PLACEHOLDER
    return ids, torch.randn(sum(counts), width, generator=generator)


def test_features_stand_where_placeholders_stood():
    ids, features = rows_with_features([3, 0, 5])
    embeds = torch.randn(3, 20, 64)
    before = embeds.clone()
    result = inject(embeds, ids, features, PLACEHOLDER)
    assert torch.equal(embeds, before)
    assert torch.equal(result[0, 2:5], features[:3])
    assert torch.equal(result[2, 2:7], features[3:])
    kept = ids != PLACEHOLDER
    assert torch.equal(result[kept], embeds[kept])


def test_gradients_flow_to_features_and_embeddings():
    ids, features = rows_with_features([3, 2])
    embeds, weights = torch.randn(2, 20, 64, requires_grad=True), torch.randn(2, 20, 64)
    (inject(embeds, ids, features.requires_grad_(), PLACEHOLDER) * weights).sum().backward()
    is_placeholder = ids == PLACEHOLDER
    assert torch.equal(features.grad, weights[is_placeholder])
    assert torch.equal(embeds.grad, weights * ~is_placeholder[..., None])


def test_features_take_the_dtype_of_the_embeddings():
    ids, features = rows_with_features([2])
    result = inject(torch.zeros(1, 20, 64, dtype=torch.bfloat16), ids, features, PLACEHOLDER)
    assert result.dtype == torch.bfloat16
    assert torch.equal(result[0, 2:4], features.bfloat16())


@pytest.mark.parametrize(
    ("counts", "taken", "given", "message"),
    [
        ([3, 2], slice(4), None, r"5 placeholders \(row 0: 3, row 1: 2\) for 4 feature vectors"),
        ([3, 2], slice(4), [3, 1], "row 1 has 2 placeholders for 1 feature vectors"),
        ([3, 2], slice(5), [2, 3], "row 0 has 3 placeholders for 2 feature vectors; row 1 has 2 .* for 3"),
        ([3], slice(2), None, "row 0 has 3 placeholders for 2 feature vectors"),
        ([0, 0], slice(0), [0], "counts has 1 entries for a batch of 2 rows"),
    ],
)
def test_a_wrong_count_names_the_row(counts, taken, given, message):
    ids, features = rows_with_features(counts)
    with pytest.raises(ValueError, match=message):
        inject(torch.zeros(len(counts), 20, 64), ids, features[taken], PLACEHOLDER, counts=given)


def test_features_of_another_shape_are_refused():
    ids, features = rows_with_features([2])
    with pytest.raises(ValueError, match=r"must be \[M, 64\].*got \[2, 32\]"):
        inject(torch.zeros(1, 20, 64), ids, features[:, :32], PLACEHOLDER)
    with pytest.raises(ValueError, match=r"got \[1, 2, 64\]"):
        inject(torch.zeros(1, 20, 64), ids, features[None], PLACEHOLDER)


def test_model_refuses_what_does_not_match(llm):
    ids, features = rows_with_features([3, 2])
    with pytest.raises(ValueError, match="for 0 feature vectors"):
        llm(ids)
    with pytest.raises(ValueError, match="row 1 has 2 placeholders for 3"):
        llm(ids, features, feature_counts=[2, 3])
    with pytest.raises(ValueError, match="for 5 feature vectors"):
        llm(ids[:, 10:], features)
    with pytest.raises(ValueError, match="features need input_ids"):
        llm(inputs_embeds=torch.zeros(2, 20, 64), features=features)
    llm.config.placeholder_id = None
    with pytest.raises(ValueError, match="placeholder_id is not set"):
        llm(ids, features)


def test_without_features_it_is_the_stock_model(llm):
    ids, _ = rows_with_features([0, 0])
    expected = super(MultimodalQWenModel, llm.transformer).forward(input_ids=ids).last_hidden_state
    assert torch.equal(llm.transformer(ids).last_hidden_state, expected)
    assert torch.equal(llm.transformer(inputs_embeds=llm.transformer.wte(ids)).last_hidden_state, expected)


def test_a_row_in_a_batch_equals_the_row_alone(llm):
    ids, features = rows_with_features([3, 0, 5])
    logits = llm(ids, features).logits
    for row, rows in enumerate([slice(0, 3), slice(0, 0), slice(3, 8)]):
        alone = llm(ids[row : row + 1], features[rows]).logits[0]
        torch.testing.assert_close(logits[row], alone, atol=2e-5, rtol=0)


@pytest.mark.parametrize(
    "arguments", [{}, {"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}, {"use_cache": False}], ids=str
)
@pytest.mark.parametrize("feature_counts", [None, [3, 0, 5]])
def test_generate_for_several_rows_and_images(llm, arguments, feature_counts):
    ids, features = rows_with_features([3, 0, 5])
    batch = llm.generate(ids, features=features, feature_counts=feature_counts, **GREEDY, **arguments)
    alone = [
        llm.generate(ids[row : row + 1], features=features[rows], **GREEDY, **arguments)
        for row, rows in enumerate([slice(0, 3), slice(0, 0), slice(3, 8)])
    ]
    assert torch.equal(batch, torch.cat(alone))


@pytest.mark.parametrize("use_cache", [True, False])
def test_features_are_used_in_prompts_only(llm, use_cache):
    # A placeholder that the model writes itself is an ordinary token.
    ids, features = rows_with_features([3])
    with torch.no_grad():
        llm.lm_head.weight[PLACEHOLDER] = llm.lm_head.weight.sum(0) * 4
    sequences = llm.generate(ids, features=features, use_cache=use_cache, **GREEDY)
    assert (sequences[:, 20:] == PLACEHOLDER).any()
    text_only = llm.generate(ids[:, 5:], use_cache=use_cache, **GREEDY)
    assert (text_only[:, 15:] == PLACEHOLDER).any()


def test_samples_of_one_prompt(llm):
    ids, features = rows_with_features([3, 1])
    torch.manual_seed(0)
    samples = llm.generate(ids, features=features, do_sample=True, num_return_sequences=3, max_new_tokens=5)
    torch.manual_seed(0)
    repeated = torch.cat([features[:3]] * 3 + [features[3:]] * 3)
    expected = llm.generate(ids.repeat_interleave(3, 0), features=repeated, do_sample=True, max_new_tokens=5)
    assert torch.equal(samples, expected)


@pytest.mark.parametrize("num_beams", [1, 2])
def test_generate_from_embeddings(llm, num_beams):
    ids, features = rows_with_features([3, 2])
    embeds = inject(llm.transformer.wte(ids), ids, features, PLACEHOLDER)
    new = llm.generate(inputs_embeds=embeds, num_beams=num_beams, **GREEDY)
    expected = llm.generate(ids, features=features, num_beams=num_beams, **GREEDY)
    assert torch.equal(new, expected[:, 20:])


def test_generate_with_too_few_features_names_the_rows(llm):
    ids, features = rows_with_features([3, 2])
    for num_beams in (1, 2):
        with pytest.raises(ValueError, match=r"row 0: 3, row 1: 2"):
            llm.generate(ids, features=features[:4], num_beams=num_beams, **GREEDY)


def test_multimodal_and_stock_models_have_the_same_parameters(small_config):
    model = MultimodalQWenLMHeadModel(small_config())
    assert isinstance(model.transformer, MultimodalQWenModel)
    assert not list(model.buffers())
