"""Published weights into a model of transformers: every one of them, or an error that says what is wrong."""

import json
import os
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    StrictDataclassError,
)
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from transformers import PreTrainedModel

WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")
SAVE_AGAIN = "save the file again with torch.save(model.state_dict(), ...)"


def is_local(path: str | Path) -> bool:
    """Whether `path` can be no hub id, which has one slash at most and does not begin as a path does."""
    return str(path).startswith((".", "/", "~")) or str(path).count("/") > 1


def check_place(path: str | Path) -> None:
    """Raises FileNotFoundError for a local path where nothing is; a hub would answer that it is malformed."""
    if is_local(path) and not Path(path).exists():
        raise FileNotFoundError(f"there is no folder {path}")


@contextmanager
def config_errors(path: str | Path) -> Iterator[None]:
    """What transformers raises while it reads the `config.json` of a folder or hub id, as one line that names it.

    Raises:
        FileNotFoundError: neither a folder nor reachable on the hub.
        ValueError: a value in the file that its class does not allow.
    """
    check_place(path)
    try:
        yield
    except OSError as error:
        if os.path.exists(path):
            raise
        raise FileNotFoundError(
            f"{path} is neither a folder here nor a model that the hub, or its cache on this machine, could give: "
            f"{_first_line(error)}"
        ) from error
    # Values of the wrong type reach the code of transformers where a class does not check them.
    except (StrictDataclassError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path}/config.json: {' '.join(str(error).split())}. Copy the file published with these weights"
        ) from error


def load_strictly(model_class: type[PreTrainedModel], path: str | Path, **kwargs) -> PreTrainedModel:
    """`model_class.from_pretrained(path, **kwargs)`, where anything missing, unexpected or misshapen is an error.

    transformers itself draws missing weights at random and warns. It maps weights whose dtype is the wanted one from
    their file and converts others one by one, so that there is never a second copy in memory.

    Args:
        path: folder or hub id with safetensors or `.bin` files, sharded or not. `.bin` files are read without running
            any code in them.

    Raises:
        OSError: there is nothing to load under `path`.
        ValueError: names or shapes differ from the model's (one error lists all of them), or a file is absent, cut
            off or holds something else than weights (the error names it).
    """
    try:
        model, report = model_class.from_pretrained(
            path, output_loading_info=True, ignore_mismatched_sizes=True, **kwargs
        )
    # What a damaged file raises depends on its format and on where the damage lies.
    except Exception as error:
        if problem := damaged_file(path):
            raise ValueError(problem) from error
        raise
    differences = [
        f"{title}: {', '.join(by_layer(names))}"
        for title, names in (
            ("missing", report["missing_keys"]),
            ("unexpected", report["unexpected_keys"]),
            ("of another shape", [_shapes(found) for found in report["mismatched_keys"]]),
            ("errors", report["error_msgs"]),
        )
        if names
    ]
    if differences:
        raise ValueError(
            f"{path}: its weights are not those that its config.json ({model_class.config_class.__name__}) describes; "
            + "; ".join(differences)
        )
    return model


def by_layer(names: Iterable[str]) -> list[str]:
    """Sorted names; those that differ in the number of the layer alone become one, `h.{0-3,7}.ln_1.weight`."""
    layers = defaultdict(list)
    for name in names:
        number = re.search(r"\.(\d+)\.", name)
        key = name if number is None else f"{name[: number.start(1)]}{{}}{name[number.end(1) :]}"
        layers[key].append(int(number[1]) if number else -1)
    merged = []
    for key, numbers in sorted(layers.items()):
        text = _ranges(sorted(numbers))
        merged.append(key if numbers[0] < 0 else key.replace("{}", text if len(numbers) == 1 else f"{{{text}}}"))
    return merged


def _ranges(numbers: list[int]) -> str:
    """[0, 1, 2, 5] -> "0-2,5"."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def _shapes(mismatch: tuple) -> str:
    name, found, expected = mismatch
    return f"{name} {list(found)} instead of {list(expected)}"


def damaged_file(path: str | Path) -> str | None:
    """What is wrong with the weight files of a folder or hub id, a sentence that names the file; None: nothing."""
    folder = _local_folder(path)
    if folder is None:
        return None
    files = {folder / name for name in WEIGHT_FILES if (folder / name).is_file()}
    for name in WEIGHT_FILES:
        index = folder / f"{name}.index.json"
        if not index.is_file():
            continue
        try:
            shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (ValueError, KeyError, AttributeError) as error:
            return f"{index} is no index of weight files ({error!r}); copy it again"
        if absent := sorted(shard for shard in shards if not (folder / shard).is_file()):
            return f"{folder} lacks {', '.join(absent)}, which {index.name} names; copy the whole checkpoint"
        files |= {folder / shard for shard in shards}
    for file in sorted(files):
        try:
            if file.suffix == ".safetensors":
                check_file(file)
            else:
                read_tensors(file, device="meta")
        except ValueError as error:
            return str(error)
    return None


@contextmanager
def loading_errors(kind: str, path: str, pretrained: str | None) -> Iterator[None]:
    """What open_clip and timm raise while they load a folder or the file `pretrained`, as one line that names it.

    Raises:
        ValueError: a file can't be read, or its weights do not fit.
    """
    try:
        yield
    # What a file without weights raises depends on its bytes.
    except Exception as error:
        folder = Path(path.removeprefix("local-dir:"))
        for file in folder.glob("*model.*") if pretrained is None else [Path(pretrained)]:
            if file.is_file() and file.suffix in (".safetensors", ".bin", ".pt", ".pth"):
                check_file(file)
        if isinstance(error, (OSError, ValueError)):
            raise
        raise ValueError(f"{kind} {path}, pretrained={pretrained!r}: {' '.join(str(error).split())}") from error


def check_file(file: str | Path) -> None:
    """Raises ValueError, which names it, for a file that is cut off, damaged or no checkpoint, by its header alone.

    Other than for `read_tensors`, tensors may lie deeper in it, under `state_dict` or the like.
    """
    file = Path(file)
    if file.suffix != ".safetensors":
        _unpickle(file, "meta")
        return
    try:
        with safe_open(file, framework="pt"):  # compares the size of the file with its header
            pass
    except (SafetensorError, OSError) as error:
        raise ValueError(_unreadable(file, error)) from error


def read_tensors(file: str | Path, device: torch.device | str = "cpu") -> dict[str, torch.Tensor]:
    """Tensors of a `.safetensors` file, or of a `.bin` file without running any code that it may hold.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is cut off or damaged, or holds something else than tensors by name; names it.
    """
    file = Path(file)
    if not file.is_file():
        raise FileNotFoundError(f"there is no file {file}")
    if file.suffix == ".safetensors":
        try:
            return load_file(file, device=str(device))
        except (SafetensorError, OSError) as error:
            raise ValueError(_unreadable(file, error)) from error
    tensors = _unpickle(file, device)
    for name, value in tensors.items():
        if not isinstance(value, torch.Tensor):
            raise ValueError(f"{file} holds a {type(value).__name__} as {name!r}, expected a tensor; {SAVE_AGAIN}")
    return tensors


def _unpickle(file: Path, device: torch.device | str) -> dict[str, object]:
    try:
        content = torch.load(file, map_location=device, weights_only=True)
    except UnpicklingError as error:
        raise ValueError(
            f"{file} holds code or objects beside tensors, or is damaged; nothing of it was run. Use weights in "
            f"safetensors format, or {SAVE_AGAIN}"
        ) from error
    # Bytes that are no pickle raise whatever their first instruction leads to: KeyError, EOFError, RuntimeError, ...
    except Exception as error:
        raise ValueError(_unreadable(file, error)) from error
    if not isinstance(content, dict) or not content or not all(isinstance(name, str) for name in content):
        raise ValueError(f"{file} holds a {type(content).__name__} without tensors by name; {SAVE_AGAIN}")
    return content


def _unreadable(file: Path, error: Exception) -> str:
    reason = f"{type(error).__name__}: {_first_line(error)}"
    return f"{file} can't be read: it is cut off or damaged, or holds no weights; copy it again ({reason})"


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _local_folder(path: str | Path) -> Path | None:
    """The folder itself, or where the files of a hub id lie; None if they lie nowhere."""
    if Path(path).is_dir():
        return Path(path)
    try:
        return Path(snapshot_download(str(path), local_files_only=True))
    except (HFValidationError, LocalEntryNotFoundError, HfHubHTTPError):
        return None
