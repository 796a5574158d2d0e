"""High resolution: an image cut into tiles of the encoder's size (AnyRes, as in LLaVA-NeXT).

The grid of tiles is chosen as described in https://llava-vl.github.io/blog/2024-01-30-llava-next/.
"""

from PIL import Image

from visual.grid import Grid


def best_grid(size: tuple[int, int], tile: tuple[int, int], max_tiles: int) -> Grid:
    """(rows, columns) of tiles for an image of `size` (width, height): at most `max_tiles` of them.

    The image is to be scaled, keeping its aspect ratio, until it just fits into the grid. The best grid shows most
    pixels of the image (scaling up shows no more than there are), and of these wastes the fewest pixels on padding.

    Args:
        tile: (height, width) of a tile in pixels.

    Raises:
        ValueError: `max_tiles` is less than 1.
    """
    if max_tiles < 1:
        raise ValueError(f"a grid has at least 1 tile, not {max_tiles}")
    grids = [(rows, columns) for rows in range(1, max_tiles + 1) for columns in range(1, max_tiles // rows + 1)]

    def quality(grid: Grid) -> tuple[int, int]:
        width, height = fit(size, grid, tile)
        shown = min(width * height, size[0] * size[1])
        return shown, shown - grid[0] * tile[0] * grid[1] * tile[1]

    return max(grids, key=quality)


def fit(size: tuple[int, int], grid: Grid, tile: tuple[int, int]) -> tuple[int, int]:
    """(width, height) of an image scaled, keeping its aspect ratio, until it just fits into a grid of tiles."""
    width, height = size
    full_width, full_height = grid[1] * tile[1], grid[0] * tile[0]
    # In whole numbers, so that the same image gets the same grid everywhere.
    if full_width * height <= full_height * width:
        return full_width, min(full_height, max(1, -(-height * full_width // width)))
    return min(full_width, max(1, -(-width * full_height // height))), full_height


def cut(image: Image.Image, grid: Grid, tile: tuple[int, int]) -> list[Image.Image]:
    """The tiles of an RGB image, row by row: scaled to fit the grid, in the middle of it, on black.

    Args:
        grid: (rows, columns).
        tile: (height, width) in pixels.
    """
    rows, columns = grid
    height, width = tile
    size = fit(image.size, grid, tile)
    canvas = Image.new("RGB", (columns * width, rows * height))
    place = (canvas.width - size[0]) // 2, (canvas.height - size[1]) // 2
    canvas.paste(image.resize(size, Image.Resampling.BICUBIC), place)
    return [
        canvas.crop((column * width, row * height, (column + 1) * width, (row + 1) * height))
        for row in range(rows)
        for column in range(columns)
    ]
