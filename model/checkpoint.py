"""Checkpoints of what is trained: projector, adapter or whole decoder, and where the frozen weights lie.

A checkpoint folder holds

    adapter_model.safetensors, adapter_config.json    LoRA in peft's format; absent for a decoder without LoRA
    projector.safetensors                             parameters of the projector
    trained_decoder/, encoder.safetensors             whole decoder (in the format of transformers) and encoder, where
                                                      they were trained
    added_rows.safetensors                            embeddings of tokens that the decoder's files have no row for
    kanjian.json                                      format version, arguments that rebuild the model, paths of the
                                                      frozen weights and a sample of their values
    tokenizer files                                   where the model has a tokenizer

Frozen weights are named, not copied. A path at most two folders above the checkpoint (`outputs/name/decoder` or
`outputs/decoder`, seen from `outputs/name` and `outputs/name/checkpoint-100`) is recorded relative to the checkpoint
folder and begins with a dot, so `outputs` can be moved as a whole; any other local path is recorded absolute; what is
no local path is a name and recorded as it is.
"""

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import yaml
from peft import LoraConfig, PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor

from model.decoder import added_rows, load_decoder, quantization_of, set_rows
from model.fingerprint import sample_differences, weight_sample
from model.legacy import is_legacy, legacy_spec, read_legacy
from model.llava import is_llava, read_projector
from model.lora import lora_config, write_lora_config
from model.optim import trained_part
from model.sharded import whole_state
from visual.weights import by_layer, read_tensors

if TYPE_CHECKING:
    from model.model import MultiModalModel

FORMAT = 3
SPEC_FILE = "kanjian.json"
ADAPTER_FILE = "adapter_model.safetensors"
ADAPTER_CONFIG_FILE = "adapter_config.json"
PROJECTOR_FILE = "projector.safetensors"
DECODER_FOLDER = "trained_decoder"
ENCODER_FILE = "encoder.safetensors"
ROWS_FILE = "added_rows.safetensors"
NO_ADAPTER = (
    "adapter: the checkpoint's LoRA layers have no place in the model; merge them (export.py --format merged), and "
    "start from that folder"
)
STAGING = ".saving-"  # a folder of this prefix is being written
PATH_KEYS = ("path", "pretrained")  # entries of the encoder's and decoder's spec that may be places on disk


def save_trained(model: "MultiModalModel", folder: str | Path) -> None:
    """Writes a checkpoint into `folder`, made if need be; other files in it stay.

    Files are written aside and renamed, `kanjian.json` last: a folder that has it is complete.

    Raises:
        ValueError: frozen weights have no place on disk to refer to (a merged decoder, one never saved, a folder that
            is gone), or something is trainable that a checkpoint does not hold.
    """
    write_trained(model, folder, describe(model), trained_weights(model))


def describe(model: "MultiModalModel") -> dict:
    """What `kanjian.json` will say of the model, paths as the model knows them.

    Sampled values of frozen weights are part of it, so that it is to be taken while the weights lie whole in this
    process: of a model that is trained divided among processes, before training.

    Raises:
        ValueError: something is trainable that a checkpoint does not hold.
    """
    trained = {trained_part(name) for name, parameter in model.named_parameters() if parameter.requires_grad}
    if unsaved := trained - {"lora", "projector"} - model.holds:
        raise ValueError(f"the {' and '.join(sorted(unsaved))} is trainable, but not by model.tune(), so not saved")
    if "decoder" in model.holds and isinstance(model.decoder, PeftModel):
        raise ValueError("a decoder that was trained as a whole holds an adapter; merge it first: model.merge()")
    spec = _describe(model)
    parts = {"encoder": model.encoder, "decoder": model.language_model}
    spec["weights"] = {name: weight_sample(part) for name, part in parts.items() if name not in model.holds}
    return spec


def trained_weights(model: "MultiModalModel") -> dict[str, dict[str, Tensor]]:
    """What a checkpoint of the model holds, on the CPU: `{"projector": {name: tensor}, ...}`, and "adapter" (names of
    peft), "decoder", "encoder" and "rows" where the model has them.

    Where several processes train the model, all of them come here; only process 0 gets weights.
    """
    weights = {"projector": whole_state(model.projector)}
    if isinstance(model.decoder, PeftModel):
        lora = whole_state(model.decoder, lambda name: ".lora_" in name)
        weights["adapter"] = _adapter_state(model.decoder, lora)
    if "decoder" in model.holds:
        weights["decoder"] = whole_state(model.language_model)
    elif model.added_rows:
        rows = added_rows(model.language_model, model.added_rows)
        weights["rows"] = {name: tensor.cpu() for name, tensor in rows.items()}
    if "encoder" in model.holds:
        weights["encoder"] = whole_state(model.encoder.backbone)
    return weights


def write_trained(
    model: "MultiModalModel", folder: str | Path, spec: dict, weights: dict[str, dict[str, Tensor]]
) -> None:
    """Writes what `describe` and `trained_weights` gave, as `save_trained` does; in one process alone.

    Raises:
        ValueError: frozen weights have no place on disk to refer to.
    """
    folder = Path(folder)
    spec = {**spec, "decoder": dict(spec["decoder"]), "encoder": dict(spec["encoder"])}
    if "decoder" in model.holds:
        spec["decoder"]["path"] = str(folder / DECODER_FOLDER)
    if not spec["decoder"]["path"]:
        raise ValueError(
            "the decoder's weights lie in no folder that the checkpoint could name: save them with "
            "model.language_model.save_pretrained(folder) and load the decoder from there"
        )
    for part, key in _paths(spec):
        held = part == "decoder" and part in model.holds
        spec[part][key] = f"./{DECODER_FOLDER}" if held else _portable(spec[part][key], folder)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=STAGING) as temporary:
        staged = Path(temporary)
        if spec["adapter"]:
            save_file(weights["adapter"], staged / ADAPTER_FILE)
            write_lora_config(model.decoder, staged)
        save_file(weights["projector"], staged / PROJECTOR_FILE)
        if model.tokenizer is not None:
            model.tokenizer.save_pretrained(staged)
        if "decoder" in weights:
            save_decoder(model, staged / DECODER_FOLDER, weights["decoder"])
        if "rows" in weights:
            save_file(weights["rows"], staged / ROWS_FILE)
        if "encoder" in weights:
            save_file(weights["encoder"], staged / ENCODER_FILE)
        (staged / SPEC_FILE).write_text(json.dumps(spec, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        for stale in (SPEC_FILE, ADAPTER_FILE, ADAPTER_CONFIG_FILE, ENCODER_FILE, ROWS_FILE):
            (folder / stale).unlink(missing_ok=True)
        if (staged / DECODER_FOLDER).exists():
            shutil.rmtree(folder / DECODER_FOLDER, ignore_errors=True)  # a folder can't replace one that holds files
        for file in sorted(staged.iterdir(), key=lambda file: file.name == SPEC_FILE):
            os.replace(file, folder / file.name)


def save_decoder(model: "MultiModalModel", folder: Path, weights: dict[str, Tensor] | None = None) -> None:
    """The decoder and its tokenizer as transformers writes them, without the patch's own setting.

    Args:
        weights: of the decoder, where the model itself has only a part of them.
    """
    decoder = model.language_model
    placeholder_id = decoder.config.placeholder_id
    del decoder.config.placeholder_id
    try:
        decoder.save_pretrained(folder, state_dict=weights)
    finally:
        decoder.config.placeholder_id = placeholder_id
    if model.tokenizer is not None:
        model.tokenizer.save_pretrained(folder)


def read_spec(folder: str | Path) -> dict:
    """`kanjian.json` of a checkpoint as it stands, paths relative to the folder included.

    Raises:
        FileNotFoundError: no complete checkpoint in `folder`.
        ValueError: no JSON, or a format version that this code does not know.
    """
    file = Path(folder) / SPEC_FILE
    if not file.is_file():
        raise FileNotFoundError(f"{folder} is no complete checkpoint: it has no {SPEC_FILE}")
    try:
        spec = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:  # wrong encodings included
        raise ValueError(f"{file} is no JSON file ({error}); copy the checkpoint again") from error
    if not isinstance(spec, dict) or spec.get("format") not in (1, 2, FORMAT):
        found = spec.get("format") if isinstance(spec, dict) else spec
        raise ValueError(
            f"{file}: format {found!r}, this code reads format {FORMAT}; take the version of Kanjian that wrote it"
        )
    try:
        if spec["format"] == 1:
            spec["system"] = _system_of_format_1(file.parent)
            spec["decoder"]["quantization"] = "none"
            spec["weights"] = {}
        if spec["format"] < 3:  # which knew Qwen-1 alone, and an image as one view
            spec |= {"holds": [], "template": "chatml", "media": {}}
            spec["projector"]["pixel_shuffle"] = 1
            spec["decoder"]["rows"] = 0
        absent = {"placeholder_id", "system", "adapter", "tokenizer", "weights", "holds", "template", "media"}
        absent -= spec.keys()
        absent |= {"path", "dtype", "quantization", "rows"} - spec["decoder"].keys()
        absent |= {"kind", "path"} - spec["encoder"].keys()
        absent |= {"kind", "in_width", "pixel_shuffle"} - spec["projector"].keys()
    except (KeyError, AttributeError, TypeError) as error:
        raise ValueError(f"{file} is no description of a checkpoint ({error!r}); copy the checkpoint again") from error
    if absent:
        raise ValueError(f"{file} lacks {', '.join(sorted(absent))}; copy the checkpoint again")
    return spec


def _system_of_format_1(folder: Path) -> str | None:
    """The text of the system turn, which that format left to the configuration beside it."""
    file = folder / "config.yaml"
    if not file.is_file():
        return None
    try:
        return yaml.safe_load(file.read_text(encoding="utf-8"))["data"].get("system")
    except (yaml.YAMLError, UnicodeError, KeyError, AttributeError, TypeError) as error:
        raise ValueError(f"{file} is no configuration of a run ({error!r}); copy the checkpoint again") from error


def resolve_paths(spec: dict, folder: str | Path, **replaced: str | Path | None) -> dict:
    """The spec of a checkpoint in `folder` with its paths made usable, or replaced (`decoder=...`, `encoder=...`).

    Raises:
        FileNotFoundError: a recorded path does not exist.
    """
    spec = {**spec, "decoder": dict(spec["decoder"]), "encoder": dict(spec["encoder"])}
    for part, path in replaced.items():
        if path is not None:
            spec[part]["path"] = str(path)
    for part, key in _paths(spec):
        recorded = spec[part][key]
        is_replaced = key == "path" and replaced.get(part) is not None
        if is_replaced or not recorded.startswith((".", "/")):
            continue
        path = Path(os.path.normpath(Path(folder) / recorded))
        if not path.exists():
            raise FileNotFoundError(
                f"{Path(folder) / SPEC_FILE} names {recorded} as {part} {key}, but {path} does not exist; "
                f"pass {part}=<where it lies now>"
            )
        spec[part][key] = str(path)
    return spec


def load_trained(
    model: "MultiModalModel", folder: str | Path, spec: dict | None = None, keep_adapter: bool = False
) -> None:
    """Loads adapter and projector of a checkpoint, or of an adapter folder of the first system, into a model.

    Of the folder of a LLaVA it loads the projector alone.

    Args:
        spec: of the checkpoint, where it isn't the one that the folder itself tells.
        keep_adapter: a checkpoint without adapter leaves that of the model as it is.

    Raises:
        FileNotFoundError: no complete checkpoint in `folder`.
        ValueError: the checkpoint was made for another model; lists every difference: settings, and missing,
            unexpected and misshapen weights.
    """
    folder, ours = Path(folder), _describe(model)
    if is_llava(folder):
        adapter = _adapter_state(model.decoder) if isinstance(model.decoder, PeftModel) else {}
        load_states(model, adapter, read_projector(model, folder), source=str(folder))
        return
    if is_legacy(folder):
        places = [ours[part]["path"] for part in ("decoder", "encoder")]
        spec = spec or legacy_spec(folder, *places, placeholder_id=model.placeholder_id)
        adapter, projector = read_legacy(folder)
    else:
        spec = spec or read_spec(folder)
        adapter = read_tensors(folder / ADAPTER_FILE) if spec["adapter"] else {}
        projector = read_tensors(folder / PROJECTOR_FILE)
    if keep_adapter and not spec["adapter"] and ours["adapter"]:
        spec, adapter = {**spec, "adapter": True}, _adapter_state(model.decoder)
    problems = _setting_differences(ours, spec) + _weight_sample_differences(model, ours, spec)
    if spec["adapter"] and "decoder" in model.holds:
        problems.append("adapter: the checkpoint has LoRA layers, but the model trains the whole decoder")
    if (folder / ADAPTER_CONFIG_FILE).is_file() and isinstance(model.decoder, PeftModel):
        problems += _lora_differences(lora_config(model.decoder), LoraConfig.from_pretrained(str(folder)))
    held = {}
    if "decoder" in spec["holds"] and Path(ours["decoder"]["path"]).resolve() != (folder / DECODER_FOLDER).resolve():
        held["decoder"] = (model.language_model, _decoder_state(model, folder))
    if "encoder" in spec["holds"]:
        held["encoder"] = (model.encoder.backbone, read_tensors(folder / ENCODER_FILE))
    for name, (module, state) in held.items():
        problems += _weight_differences(name, module.state_dict(), state)
    load_states(model, adapter, projector, source=str(folder), problems=problems)
    for module, state in held.values():
        module.load_state_dict(state)
    # A decoder that learns through LoRA lies in a folder already, which the next checkpoint will name.
    model.holds |= set(spec["holds"]) - ({"decoder"} if _is_named(model) else set())
    if spec["decoder"]["rows"] and (folder / ROWS_FILE).is_file():
        set_rows(model.language_model, read_tensors(folder / ROWS_FILE))


def _is_named(model: "MultiModalModel") -> bool:
    """Whether the decoder's own weights can only be those of a folder, which a checkpoint names."""
    return isinstance(model.decoder, PeftModel) or quantization_of(model.language_model) != "none"


def _decoder_state(model: "MultiModalModel", folder: Path) -> dict[str, Tensor]:
    """Weights of the decoder that a checkpoint holds, by the names of the model's.

    Raises:
        ValueError: the model's decoder has LoRA layers or is quantized, so that it has to be loaded from there.
    """
    place = folder / DECODER_FOLDER
    if _is_named(model):
        raise ValueError(f"{folder} holds a whole decoder: start from it with model.decoder={place}")
    return load_decoder(place, "auto").state_dict()


def load_states(
    model: "MultiModalModel",
    adapter: dict[str, Tensor],
    projector: dict[str, Tensor],
    source: str,
    problems: list[str] | None = None,
) -> None:
    """Loads adapter (peft's names) and projector weights if, and only if, names and shapes are those of the model.

    Raises:
        ValueError: names `source` and lists `problems` and every missing, unexpected and misshapen weight.
    """
    has_adapter = isinstance(model.decoder, PeftModel)
    ours = _adapter_state(model.decoder) if has_adapter else {}
    adapter_differences = _weight_differences("adapter", ours, adapter)
    problems = [
        *(problems or []),
        *(adapter_differences if has_adapter or not adapter else [NO_ADAPTER]),
        *_weight_differences("projector", model.projector.state_dict(), projector),
    ]
    if problems:
        raise ValueError(f"{source} does not fit the model:\n  " + "\n  ".join(problems))
    model.projector.load_state_dict(projector)
    if has_adapter:
        set_peft_model_state_dict(model.decoder, adapter)


def _describe(model: "MultiModalModel") -> dict:
    """What `kanjian.json` records beside the sample of weights, with paths as the model knows them."""
    decoder = model.language_model
    return {
        "format": FORMAT,
        "placeholder_id": model.placeholder_id,
        "system": model.system,
        "template": model.tokenizer.template if model.tokenizer else None,
        "media": model.media.spec,
        "holds": sorted(model.holds),
        "encoder": dict(model.encoder.spec),
        "projector": dict(model.projector.spec),
        "decoder": {
            "path": decoder.config._name_or_path,
            "dtype": str(decoder.dtype).removeprefix("torch."),
            "quantization": quantization_of(decoder),
            "rows": decoder.get_input_embeddings().weight.shape[0],
        },
        "adapter": isinstance(model.decoder, PeftModel),
        "tokenizer": model.tokenizer is not None,
    }


def _paths(spec: dict) -> list[tuple[str, str]]:
    return [(part, key) for part in ("encoder", "decoder") for key in PATH_KEYS if spec[part].get(key)]


def _portable(path: str, folder: Path) -> str:
    """The form in which a checkpoint in `folder` records `path`; see the head of this file."""
    if not os.path.exists(path):
        if path.startswith((".", "/")):
            raise ValueError(f"a checkpoint has to name {path}, where frozen weights came from, but it does not exist")
        return path
    relative = Path(os.path.relpath(Path(path).resolve(), folder.resolve()))
    if relative.parts[:3] == ("..", "..", ".."):
        return str(Path(path).resolve())
    return relative.as_posix() if relative.parts[:1] == ("..",) else f"./{relative.as_posix()}"


def _adapter_state(decoder: PeftModel, state: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
    return get_peft_model_state_dict(decoder, state_dict=state, save_embedding_layers=False)


def _setting_differences(model: dict, checkpoint: dict) -> list[str]:
    """Settings that change what the weights mean; where the frozen weights lie and their dtype may differ."""
    free = {*PATH_KEYS, "dtype"}
    pairs = [("", "placeholder_id"), ("", "adapter")]
    pairs += [(part, key) for part in ("encoder", "projector") for key in model[part] | checkpoint[part]]
    problems = []
    for part, key in pairs:
        ours, theirs = ((spec[part] if part else spec).get(key) for spec in (model, checkpoint))
        if key not in free and ours != theirs:
            problems.append(f"{part} {key}: {theirs!r} in the checkpoint, {ours!r} in the model".strip())
    return problems


def _weight_sample_differences(model: "MultiModalModel", places: dict, checkpoint: dict) -> list[str]:
    """Frozen parts of the model that have other weights than in the training; format 1 recorded none."""
    problems = []
    for part, module in (("encoder", model.encoder), ("decoder", model.language_model)):
        if names := sample_differences(module, checkpoint["weights"].get(part, {})):
            problems.append(
                f"{part}: the weights from {places[part]['path']} are not those of the training, they differ in "
                f"{', '.join(by_layer(names))}"
            )
    return problems


def _lora_differences(ours: LoraConfig, theirs: LoraConfig) -> list[str]:
    keys = ("r", "lora_alpha", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern")
    keys += ("target_modules", "target_parameters")
    return [
        f"LoRA {key}: {getattr(theirs, key)!r} in the checkpoint, {getattr(ours, key)!r} in the model"
        for key in keys
        if _plain(getattr(ours, key)) != _plain(getattr(theirs, key))
    ]


def _plain(value):
    """A setting without the differences between peft's lists and sets, or its ways to say nothing."""
    return set(value) if isinstance(value, list | set | tuple) and value else value or None


def _weight_differences(part: str, expected: dict[str, Tensor], found: dict[str, Tensor]) -> list[str]:
    problems = [f"{part}: missing {name}" for name in sorted(expected.keys() - found.keys())]
    problems += [f"{part}: unexpected {name}" for name in sorted(found.keys() - expected.keys())]
    problems += [
        f"{part}: {name} has shape {list(found[name].shape)}, expected {list(expected[name].shape)}"
        for name in sorted(expected.keys() & found.keys())
        if expected[name].shape != found[name].shape
    ]
    return problems
