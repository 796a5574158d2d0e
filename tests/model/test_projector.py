import pytest
import torch
from torch import nn

from model.projector import PROJECTORS, build_projector


@pytest.mark.parametrize("kind", PROJECTORS)
@pytest.mark.parametrize("position_embedding", [False, True])
def test_shapes_and_spec_rebuild_it(kind, position_embedding):
    projector = build_projector(kind, 6, 10, num_features=5, position_embedding=position_embedding)
    features = torch.randn(3, 5, 6)
    assert projector(features).shape == (3, 5, 10)
    again = build_projector(**projector.spec)
    again.load_state_dict(projector.state_dict())
    assert torch.equal(again(features), projector(features))


def test_mlp_is_linear_gelu_linear():
    projector = build_projector("mlp", 6, 10)
    first, second = projector.layers[0], projector.layers[2]
    features = torch.randn(2, 5, 6)
    expected = second(nn.functional.gelu(first(features)))
    torch.testing.assert_close(projector(features), expected)


def test_first_initialization():
    torch.manual_seed(0)
    projector = build_projector("mlp", 200, 300)
    for layer in (projector.layers[0], projector.layers[2]):
        assert abs(layer.weight.std().item() - 0.01) < 2e-4
        assert torch.equal(layer.bias, torch.zeros(300))
    torch.manual_seed(0)
    linear = build_projector("linear", 200, 300, init_std=None).layers[0]
    torch.manual_seed(0)
    assert torch.equal(linear.weight, nn.Linear(200, 300).weight)


def test_position_embedding_is_added_per_feature():
    projector = build_projector("linear", 6, 10, num_features=5, position_embedding=True)
    features = torch.randn(2, 5, 6)
    plain = projector(features)
    with torch.no_grad():
        projector.position_embedding[3] = 1.0
    moved = projector(features)
    assert torch.equal(moved[:, [0, 1, 2, 4]], plain[:, [0, 1, 2, 4]])
    torch.testing.assert_close(moved[:, 3], projector.layers(features[:, 3] + 1))


def test_parameters_stay_float32_for_bfloat16_features():
    projector = build_projector("mlp", 6, 10, num_features=5, position_embedding=True)
    output = projector(torch.randn(2, 5, 6, dtype=torch.bfloat16))
    assert output.dtype == torch.float32
    assert {p.dtype for p in projector.parameters()} == {torch.float32}
    with torch.autocast("cpu", torch.bfloat16):
        assert projector(torch.randn(2, 5, 6)).dtype == torch.bfloat16


def test_errors():
    with pytest.raises(ValueError, match="unknown projector 'qformer'; choose one of mlp, linear"):
        build_projector("qformer", 6, 10)
    with pytest.raises(ValueError, match="num_features"):
        build_projector("mlp", 6, 10, position_embedding=True)
    with pytest.raises(ValueError, match=r"\[N, 4, 6\], got \[2, 4, 7\]"):
        build_projector("mlp", 6, 10)(torch.randn(2, 4, 7))
    with pytest.raises(ValueError, match=r"\[N, 5, 6\], got \[2, 4, 6\]"):
        build_projector("mlp", 6, 10, num_features=5, position_embedding=True)(torch.randn(2, 4, 6))
