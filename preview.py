"""Shows records as the model will see them, says how long they are, and finds those that training would refuse.

    python preview.py --config configs/scenes.yaml                        all of data.train: preview.html, preview.json
    python preview.py --config configs/scenes.yaml --preview 30 --output look.html max_length=512
    python preview.py --config configs/scenes.yaml --records 10000        measures so many, drawn by seed
    python preview.py --config configs/scenes.yaml --decode               decodes all pictures and clips, too

Arguments are those of `train.py`, and

    --preview N    records on the page, drawn by train.seed (12); beside them the longest, one that is cut, one refused
    --output FILE  the page (preview.html); the figures go into a .json beside it
    --records N    measures only so many records
    --decode       finds damaged pictures and clips; without it only their headers are read

No weights are loaded: of the decoder its config.json and its tokenizer are read, of the encoder its config.json. The
exit status is 1 if training would refuse a record. All records are measured on all cores.
"""

import argparse
import json
import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from config import Config, ConfigError, load_config, read_config
from dataset.advice import advice
from dataset.dataset import RecordDataset
from dataset.files import write_text
from dataset.mixture import Mixture
from dataset.record import Records, read_records
from dataset.statistics import Sizes, measure, padding, summary
from dataset.text_table import text_table
from page.cards import card, choose
from page.render import histogram, render, upper_end
from page.text import number, share

COUNT = 12  # records on the page
SOURCES = 50  # that are told apart; the smallest of more are one
LISTED, STORED = 20, 1000  # faulty records that are printed; that the JSON file holds of each kind
NO_TOKENS = (
    "Lengths are in characters and no tokens are shown, since no model was named. Name one to see them: `model: "
    "configs/x.yaml` in the configuration of process_image.py, or python preview.py --config configs/x.yaml."
)


@dataclass
class Data:
    """Records, with how they are trained on or, where that is None, without."""

    records: Records
    image_root: str | Path
    dataset: RecordDataset | None = None
    config: Config | None = None
    mixture: Mixture | None = None

    @property
    def measured(self) -> RecordDataset | Records:
        return self.records if self.dataset is None else self.dataset


def main() -> None:
    if "--help" in sys.argv[1:] or "-h" in sys.argv[1:]:
        print(__doc__ + "\npython train.py --help lists all other keys.")
        return
    try:
        options, rest = parse_options(sys.argv[1:])
        config = load_config(rest)
        data = open_data(config)
        report = write(data, options.output, options.preview, config.train.seed, options.records, options.decode)
    except (ConfigError, OSError, ValueError) as error:
        sys.exit(f"preview.py: {error}")
    print(text_of(report))
    print(f"Written: {options.output}, {options.output.with_suffix('.json')}")
    sys.exit(1 if report["total"]["refused"] else 0)


def parse_options(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """The preview's own options and the arguments that are left for `load_config`."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--preview", type=int, default=COUNT)
    parser.add_argument("--output", type=Path, default=Path("preview.html"))
    parser.add_argument("--records", type=int)
    parser.add_argument("--decode", action="store_true")
    try:
        options, rest = parser.parse_known_args(argv)
    except argparse.ArgumentError as error:
        raise ConfigError(f"{error}; as in --preview 12 --output preview.html --records 10000 --decode") from None
    for name in ("preview", "records"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            raise ConfigError(f"--{name} is a number of records, at least 1, got {getattr(options, name)}")
    check_output(options.output)
    return options, rest


def check_output(path: Path) -> None:
    """Before much is computed for it. Raises ConfigError."""
    if path.suffix not in (".html", ".htm"):
        raise ConfigError(f"--output is the name of an HTML file (x.html), got {path}")
    if not path.parent.is_dir() or path.is_dir():
        raise ConfigError(f"--output: there is no folder {path.parent}" if not path.is_dir() else f"{path} is a folder")


def open_data(config: Config) -> Data:
    """The training records of a configuration, as `train.py` would encode them.

    Raises:
        ConfigError, OSError, ValueError: records, or files of the decoder or the encoder, that are not there or
            unusable; names them.
    """
    from build import build_empty_model, load_dataset, load_mixture  # much to import, which records alone don't need
    from model.tokenizer import load_tokenizer

    # A cache of features changes neither tokens nor records, and may not be there yet.
    config = replace(config, data=replace(config.data, feature_cache=None))
    model = build_empty_model(config.model)
    kind = model.language_model.config.model_type
    try:
        model.tokenizer = load_tokenizer(config.model.decoder, kind, config.model.template)
    except (OSError, ValueError) as error:
        raise ConfigError(f"model.decoder={config.model.decoder}: {error}") from error
    dataset = load_dataset(config, config.data.train, model)
    mixture = load_mixture(config, dataset.records)
    return Data(dataset.records, config.data.image_root, dataset, config, mixture)


def write_page(
    records_file: str | Path,
    image_root: str | Path,
    output_html: str | Path,
    count: int = COUNT,
    model: str | None = None,
    seed: int = 0,
) -> Path:
    """Writes the page of a record file, and its figures beside it; returns the page.

    Args:
        model: training configuration (configs/x.yaml) whose tokenizer, encoder and batches are taken, but not the
            weights of its sources; None: no tokens are shown and lengths are in characters.

    Raises:
        ConfigError, OSError, ValueError: as `open_data`.
    """
    output = Path(output_html)
    check_output(output)
    if model is None:
        data = Data(read_records(records_file), image_root)
    else:
        config = read_config(model)
        own = replace(config.data, train=[str(records_file)], validation=[], image_root=str(image_root),
                      weights={}, temperature=None, epoch="total")  # fmt: skip
        data = open_data(replace(config, data=own))
    print(text_of(write(data, output, count, seed)))
    return output


def write(
    data: Data, output: Path, count: int, seed: int, sampled: int | None = None, decode: bool = False
) -> dict:
    """Measures the records, writes the page and a JSON file of what it returns.

    Args:
        sampled: only so many records are measured, drawn by `seed`.

    Raises:
        ValueError: no records.
    """
    total = len(data.records)
    if not total:
        raise ValueError("there is no record to show")
    indices = None
    if sampled is not None and sampled < total:
        indices = sorted(random.Random(seed).sample(range(total), sampled))
    sizes = few_sources(measure(data.measured, indices, decode=decode))
    report = figures(data, sizes, indices is not None, seed, decode)
    cards = {index: card(data.measured, index, labels, data.image_root)
             for index, labels in choose(sizes, count, seed).items()}  # fmt: skip
    write_text(page(data, sizes, report, cards), output)
    write_text(json.dumps(report, ensure_ascii=False, indent=1) + "\n", output.with_suffix(".json"))
    return report


def few_sources(sizes: Sizes) -> Sizes:
    """`sizes` with at most `SOURCES` sources, the smallest of more as one: each record may have a name of its own."""
    if len(sizes.sources) <= SOURCES:
        return sizes
    largest = np.argsort(-np.bincount(sizes.codes, minlength=len(sizes.sources)), kind="stable")[: SOURCES - 1]
    names = [sizes.sources[code] for code in largest]
    others = f"{len(sizes.sources) - len(names):,} others"
    new = np.full(len(sizes.sources), len(names))
    new[largest] = np.arange(len(names))
    faults = [fault._replace(source=fault.source if fault.source in names else others) for fault in sizes.faults]
    return replace(sizes, sources=[*names, others], codes=new[sizes.codes], faults=faults)


def figures(data: Data, sizes: Sizes, sampled: bool, seed: int, decode: bool) -> dict:
    """What the JSON file holds: statistics by source and of all, padding, advice, faulty records."""
    found = [name for code, name in enumerate(sizes.sources)
             if (sizes.codes == code).any() or any(fault.source == name for fault in sizes.faults)]  # fmt: skip
    report = {
        "unit": sizes.unit,
        "records": len(data.records),
        "measured": len(sizes.indices) + len(sizes.faults),
        "sampled_by_seed": seed if sampled else None,
        "decoded": decode,
        "max_length": None if data.dataset is None else data.dataset.max_length,
        "sources": {name: summary(sizes, name) for name in found},
        "total": summary(sizes),
        "padding": _padding(data, sizes, sampled),
    }
    report["advice"] = [] if data.dataset is None else advice(sizes, report, data.dataset.max_length)
    for key, refused in (("refused", True), ("skipped", False)):
        faults = [fault for fault in sizes.faults if fault.refused == refused]
        report[key] = [{"id": fault.id, "source": fault.source, "record": fault.index, "reason": fault.reason,
                        "problem": fault.problem} for fault in faults[:STORED]]  # fmt: skip
    return report


def _padding(data: Data, sizes: Sizes, sampled: bool) -> dict | None:
    if data.dataset is None or not len(sizes.indices):
        return None
    train, kept, mixture = data.config.train, sizes.column("kept"), None
    has_media = (sizes.column("images") + sizes.column("videos")) > 0
    if not sampled:  # what a batch holds of a record without sample is one token, as with those that are left out
        mixture, lengths = data.mixture, np.ones(len(data.records), np.int64)
        lengths[sizes.indices] = kept
        kept, has_media = lengths, data.dataset.has_media
    return padding(
        kept,
        train.per_device_train_batch_size,
        train.gradient_accumulation_steps,
        train.train_sampling_strategy,
        train.seed,
        mixture,
        has_media if data.config.data.batches == "by_modality" else None,
        train.packing,
    )


# The page and the terminal


def page(data: Data, sizes: Sizes, report: dict, cards: dict[int, dict]) -> str:
    lengths = {name: sizes.column("length")[sizes.codes == sizes.sources.index(name)] for name in report["sources"]}
    end, shown = upper_end(list(lengths.values())), {name: [] for name in lengths}
    own = {**dict(zip(sizes.indices.tolist(), (sizes.sources[code] for code in sizes.codes), strict=True)),
           **{fault.index: fault.source for fault in sizes.faults}}  # fmt: skip
    for index, one in cards.items():
        shown[own[index]].append(one)
    groups = {}
    for name, summary_ in report["sources"].items():
        plot = histogram(lengths[name], end, report["max_length"], sizes.unit)
        faults = {key: summary_[key] for key in ("refused", "skipped")}
        groups[name] = {"histogram": plot, "cards": shown[name], **faults}
    return render(
        title="Preview of the training records",
        facts=facts(data),
        measured=measured_text(report),
        notes=[NO_TOKENS] if data.dataset is None else [],
        advice=report["advice"],
        unit=sizes.unit,
        with_tokens=data.dataset is not None,
        sources=report["sources"],
        total=report["total"],
        padding=report["padding"],
        padding_note=padding_text(data, report),
        groups=groups,
    )


def facts(data: Data) -> list[str]:
    """What the samples depend on."""
    if data.dataset is None:
        return [f"images in {data.image_root}"]
    c, dataset = data.config, data.dataset
    spec = ", ".join(f"{key}={value}" for key, value in dataset.media.spec.items() if value is not None)
    return [
        ", ".join(c.data.train),
        f"decoder {c.model.decoder}",
        f"template {dataset.tokenizer.template}",
        f"encoder {c.model.encoder.path}: {dataset.media.num_features} features of an image",
        spec,
        f"max_length {dataset.max_length:,}",
    ]


def measured_text(report: dict) -> str:
    """How much was looked at, and how closely."""
    if report["measured"] < report["records"]:
        text = (f"{report['measured']:,} of {report['records']:,} records were measured, drawn by seed "
                f"{report['sampled_by_seed']}: figures are estimates, and others may be faulty.")  # fmt: skip
    else:
        text = f"All {report['records']:,} records were measured."
    if report["unit"] == "character":
        return text
    if report["decoded"]:
        return f"{text} All pictures and clips were decoded."
    return f"{text} Of pictures and clips the headers were read; --decode finds those that are damaged behind them."


def padding_text(data: Data, report: dict) -> str:
    if report["padding"] is None:
        return ""
    c = data.config.train
    text = (
        f"Batches of {c.per_device_train_batch_size} x {c.gradient_accumulation_steps} samples of one process in the "
        "first epoch, each padded to its longest, or packed."
    )
    drawn = " Samples are drawn as the weights of the sources say." if data.mixture is not None else ""
    if report["sampled_by_seed"] is not None:
        drawn = " Every record that was measured counts once."
    return text + drawn


def text_of(report: dict) -> str:
    """The report for a terminal."""
    unit, tokens = report["unit"], report["unit"] == "token"
    header = ["source", "records", "images", "clips", "mean", "median", "p95", "p99", "longest", f"{unit}s",
              *(["supervised", "features", "cut", "lost"] if tokens else ["in answers"]), "refused",
              *(["left out"] if tokens else [])]  # fmt: skip
    rows = [header]
    for name, s in [*report["sources"].items(), ("all", report["total"])]:
        counts = [sum(entry["count"] for entry in s[key].values()) for key in ("refused", "skipped")]
        length = [number(s["length"].get(key)) for key in ("mean", "median", "p95", "p99", "max")]
        shares = ("supervised_share", "features_share", "cut_share", "supervised_lost_share")[: 4 if tokens else 1]
        rows.append([printable(name, 40), *(number(s[key]) for key in ("records", "images", "videos")), *length,
                     number(s["units"]), *(share(s[key]) for key in shares),
                     *map(number, counts[: 2 if tokens else 1])])  # fmt: skip
    parts = [measured_text(report), text_table(rows, right=range(1, len(header)))]
    if cost := report["padding"]:
        lines = [("batches", "padding", "positions")]
        for name, one in cost["strategies"].items():
            used = f"{name} *" if name == cost["current"] else name
            lines.append((used, share(one["padding_share"]), number(one["positions"])))
        parts.append(text_table(lines, right=(1, 2)) + "\n* this configuration")
    if report["advice"]:
        parts.append("\n".join(f"- {printable(line, 1000)}" for line in report["advice"]))
    for key, title in (("refused", "Refused"), ("skipped", "Left out")):
        faults, count = report[key], sum(entry["count"] for entry in report["total"][key].values())
        if faults:
            lines = [f"{title} ({count:,}):", *(f"  {printable(fault['problem'])}" for fault in faults[:LISTED])]
            rest = f"  ... and {count - LISTED:,} more; the JSON file lists {len(faults):,}"
            parts.append("\n".join([*lines, rest] if count > LISTED else lines))
    if not tokens:
        parts.append(NO_TOKENS)
    return "\n\n".join(parts)


def printable(text: str, most: int = 400) -> str:
    """A text from data on one line, without what a terminal would obey; its beginning if it is long."""
    line = "".join(letter if letter.isprintable() else " " for letter in text[: most + 1])
    return line if len(line) <= most else f"{line[: most - 1]}…"


if __name__ == "__main__":
    main()
