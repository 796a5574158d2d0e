"""Pooling and pixel shuffle against loops."""

import pytest
import torch

from visual.grid import feature_count, pixel_shuffle, pool, pooled_grid


def features(grid, n=2, width=3):
    return torch.randn(n, grid[0] * grid[1], width, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("grid", [(4, 4), (5, 7), (1, 3), (27, 27)])
@pytest.mark.parametrize("k", [1, 2, 3, 30])
def test_pool(grid, k):
    x = features(grid)
    maps = x.view(2, *grid, 3)
    blocks = [
        maps[:, row : row + k, column : column + k].mean((1, 2))
        for row in range(0, grid[0], k)
        for column in range(0, grid[1], k)
    ]
    torch.testing.assert_close(pool(x, grid, k), torch.stack(blocks, 1))
    rows, columns = pooled_grid(grid, k)
    assert rows * columns == len(blocks) == feature_count(x.shape[1], grid, pooling=k)
    assert pool(x[:0], grid, k).shape == (0, len(blocks), 3)
    assert pool(x.bfloat16(), grid, k).dtype == torch.bfloat16


@pytest.mark.parametrize("grid, r", [((4, 4), 1), ((4, 4), 2), ((4, 6), 2), ((4, 4), 4), ((9, 3), 3)])
def test_pixel_shuffle(grid, r):
    x = features(grid)
    maps = x.view(2, *grid, 3)
    expected = torch.stack(
        [
            torch.cat([maps[:, row + i, column + j] for i in range(r) for j in range(r)], -1)
            for row in range(0, grid[0], r)
            for column in range(0, grid[1], r)
        ],
        1,
    )
    assert torch.equal(pixel_shuffle(x, grid, r), expected)
    assert expected.shape[1] == feature_count(x.shape[1], grid, shuffle=r)
    assert pixel_shuffle(x[:0], grid, r).shape == (0, *expected.shape[1:])


def test_pooling_comes_before_pixel_shuffle():
    assert feature_count(27 * 27, (27, 27), pooling=2, shuffle=7) == 4
    with pytest.raises(ValueError, match="14 x 14 features; 1, 2, 7, 14 do"):
        feature_count(27 * 27, (27, 27), pooling=2, shuffle=3)


def test_errors():
    x = features((4, 6))
    with pytest.raises(ValueError, match="pixel_shuffle=4 does not divide both sides of a grid of 4 x 6 .* 1, 2 do"):
        pixel_shuffle(x, (4, 6), 4)
    with pytest.raises(ValueError, match="5 x 7 features; 1 does"):
        pixel_shuffle(features((5, 7)), (5, 7), 2)
    for call in (lambda: pool(x, None, 2), lambda: pixel_shuffle(x, None, 2), lambda: feature_count(17, None, 2)):
        with pytest.raises(ValueError, match="=2 needs features that fill a grid"):
            call()
    with pytest.raises(ValueError, match="24 features do not fill a grid of 5 x 5"):
        pool(x, (5, 5), 2)
    for value in (0, -1, 1.5):
        with pytest.raises(ValueError, match=f"from 1 on, not {value}"):
            pool(x, (4, 6), value)
    assert feature_count(17, None) == 17
    assert pool(x, None, 1) is x and pixel_shuffle(x, None, 1) is x
