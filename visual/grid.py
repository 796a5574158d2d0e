"""Features that lie in a grid: fewer of them by pooling or by pixel shuffle, and how many there will be."""

from torch import Tensor
from torch.nn.functional import avg_pool2d

Grid = tuple[int, int]  # (rows, columns) of features that follow each other row by row


def pooled_grid(grid: Grid, k: int) -> Grid:
    """(rows, columns) after pooling of k x k blocks: `(ceil(rows / k), ceil(columns / k))`.

    Raises:
        ValueError: k is less than 1.
    """
    _require_positive("pooling", k)
    return -(-grid[0] // k), -(-grid[1] // k)


def pool(features: Tensor, grid: Grid | None, k: int) -> Tensor:
    """Means over k x k blocks of features `[N, n, D]`, row by row: `[N, n', D]`.

    Blocks at the far edges may be smaller. With k = 1 the features as they are, which then need no grid.

    Raises:
        ValueError: there is no grid, it does not hold n features, or k is less than 1.
    """
    _require_positive("pooling", k)
    if k == 1:
        return features
    rows, columns = _require_grid(features.shape[1], grid, "pooling", k)
    maps = features.transpose(1, 2).unflatten(2, (rows, columns))  # [N, D, rows, columns]
    # Parts of a block that lie outside of the map do not count: ceil_mode without padding divides by what is inside.
    pooled = avg_pool2d(maps, k, ceil_mode=True) if len(maps) else maps[:, :, ::k, ::k]
    return pooled.flatten(2).transpose(1, 2)


def pixel_shuffle(features: Tensor, grid: Grid | None, r: int) -> Tensor:
    """r x r neighbours side by side as one vector: features `[N, n, D]` -> `[N, n / r^2, D * r^2]`, row by row.

    Within a vector the neighbours follow each other row by row. With r = 1 the features as they are.

    Raises:
        ValueError: there is no grid, it does not hold n features, or r does not divide both of its sides.
    """
    _require_positive("pixel_shuffle", r)
    if r == 1:
        return features
    rows, columns = _require_grid(features.shape[1], grid, "pixel_shuffle", r)
    _require_divides(rows, columns, r)
    blocks = features.unflatten(1, (rows // r, r, columns // r, r))  # [N, rows/r, r, columns/r, r, D]
    return blocks.transpose(2, 3).flatten(3).flatten(1, 2)


def feature_count(n: int, grid: Grid | None, pooling: int = 1, shuffle: int = 1) -> int:
    """How many of n features are left after pooling and then pixel shuffle.

    Raises:
        ValueError: one of them can't be done, as `pool` and `pixel_shuffle` say.
    """
    _require_positive("pooling", pooling)
    _require_positive("pixel_shuffle", shuffle)
    if pooling > 1:
        grid = pooled_grid(_require_grid(n, grid, "pooling", pooling), pooling)
        n = grid[0] * grid[1]
    if shuffle > 1:
        _require_divides(*_require_grid(n, grid, "pixel_shuffle", shuffle), shuffle)
        n //= shuffle**2
    return n


def _require_positive(name: str, value: int) -> None:
    if not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} is a whole number from 1 on, not {value!r}")


def _require_grid(n: int, grid: Grid | None, name: str, value: int) -> Grid:
    if grid is None:
        raise ValueError(
            f"{name}={value} needs features that fill a grid, but the encoder's {n} do not (a class token is kept, or "
            "the first patch is dropped)"
        )
    if grid[0] * grid[1] != n:
        raise ValueError(f"{n} features do not fill a grid of {grid[0]} x {grid[1]}")
    return grid


def _require_divides(rows: int, columns: int, r: int) -> None:
    if rows % r or columns % r:
        fitting = [str(d) for d in range(1, min(rows, columns) + 1) if rows % d == columns % d == 0]
        raise ValueError(
            f"pixel_shuffle={r} does not divide both sides of a grid of {rows} x {columns} features; "
            f"{', '.join(fitting)} {'does' if len(fitting) == 1 else 'do'}"
        )
