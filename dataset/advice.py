"""What the figures of `dataset.statistics` suggest to do, in words."""

import numpy as np

from dataset.statistics import Sizes

HELD = 0.995  # share of the samples that a good `max_length` holds whole
STEP = 64  # lengths that are suggested are multiples of this
NOTABLE = 0.02  # shares of positions that differ by less are called equal
FEW_OF_RECORDS, FEW_OF_TOKENS = 0.1, 0.2  # a source with so many records, but so small a part of that in tokens learned


def advice(sizes: Sizes, figures: dict, max_length: int) -> list[str]:
    """One sentence or two for each thing worth knowing, with its numbers; what stops a run comes first.

    Args:
        figures: `{"total": summary, "sources": {name: summary}, "padding": padding or None}` of these sizes.
    """
    lines = [*_faults(figures), *_nothing_learned(figures)]
    if figures["padding"]:
        lines += [*_length(sizes, figures, max_length), *_long_answers(sizes, figures)]
        lines += _padding(figures["padding"])
        lines += [*_drowned(figures), *_media(figures)]
    return lines + _control(figures)


def _faults(figures: dict) -> list[str]:
    lines, total = [], figures["total"]
    if refused := _count(total["refused"]):
        reasons = ", ".join(f"{entry['count']:,} {reason}" for reason, entry in total["refused"].items())
        text = f"Training would stop: {_are(refused, 'record is', 'records are')} refused ({reasons})."
        if _count(total["refused"], "missing file") == total["records"]:
            text += " None of their files is there: is data.image_root right?"
        elif _count(total["refused"], "missing file", "unreadable file"):
            text += " data.on_bad_image=skip leaves out those whose files can't be read."
        lines.append(text)
    if skipped := _count(total["skipped"]):
        lines.append(f"{_are(skipped, 'record is', 'records are')} left out for files that can't be read "
                     "or hold nothing to learn (data.on_bad_image, data.on_bad_record).")  # fmt: skip
    return lines


def _nothing_learned(figures: dict) -> list[str]:
    return [
        f"Nothing is learned from source {name!r:.60}: none of its records ({source['records']:,}) can be used "
        f"({', '.join([*source['refused'], *source['skipped']])})."
        for name, source in figures["sources"].items()
        if not source["samples"]
    ]


def _length(sizes: Sizes, figures: dict, max_length: int) -> list[str]:
    lengths, total = sizes.column("length"), figures["total"]
    longest = int(lengths.max())
    held = _round_up(int(np.quantile(lengths, HELD, method="higher")), longest)
    share = float((lengths <= held).mean())
    if total["cut"]:
        text = (
            f"max_length={max_length:,} cuts {_percent(total['cut_share'])} of the samples ({total['cut']:,}) and "
            f"{_percent(total['supervised_lost_share'])} of the supervised tokens."
        )
        if held >= longest:
            text += f" All would fit into {longest:,}."
        elif held > max_length:
            text += f" {held:,} would hold {_percent(share)} of the samples whole; the longest has {longest:,}."
        else:
            text += (
                f" {held:,} would hold {_percent(share)} of the samples whole and {max_length:,} holds "
                f"{_percent(1 - total['cut_share'])}; the longest has {longest:,}."
            )
        sources = {name: source for name, source in figures["sources"].items() if source["cut"]}
        worst = max(sources, key=lambda name: sources[name]["cut_share"])
        if len(figures["sources"]) > 1 and sources[worst]["cut_share"] > 2 * total["cut_share"]:
            text += f" Most concerned is {worst!r:.60}: {_percent(sources[worst]['cut_share'])} of its samples."
        return [text]
    text = f"Nothing is cut: the longest sample has {longest:,} of max_length={max_length:,} tokens."
    if held < longest:
        text += f" {held:,} would hold {_percent(share)}; more than that is for the last {_percent(1 - share)}."
    if _round_up(longest, max_length) < max_length:
        text += (
            f" max_length={_round_up(longest, max_length):,} would change no sample, and train.py --plan, which "
            "assumes the longest, would then estimate the memory that this data needs."
        )
    return [text]


def _round_up(length: int, most: int) -> int:
    return min(-(-length // STEP) * STEP, max(most, length))


def _long_answers(sizes: Sizes, figures: dict) -> list[str]:
    supervised, kept = sizes.column("supervised"), sizes.column("supervised_kept")
    halved = int((kept * 2 < supervised).sum())
    lines = []
    if halved:
        lines.append(
            f"max_length cuts off more than half of the supervised tokens of {_are(halved, 'sample', 'samples')}. "
            "What is left teaches beginnings without an end; drop such records or divide them."
        )
    typical, longest = float(np.quantile(supervised, 0.99)), int(supervised.max())
    if longest > 8 * typical and len(supervised) >= 100:
        far = int((supervised > 8 * typical).sum())
        lines.append(f"Very long answers: {_are(far, 'sample has', 'samples have')} up to {longest:,} supervised "
                     f"tokens, where 99 % have at most {typical:,.0f}. Are they what you want?")  # fmt: skip
    return lines


def _padding(padding: dict) -> list[str]:
    if padding["current"] == "packing":
        return ["Batches are packed: none of what they hold is padding, in whatever order."]
    saved = {name: 1 - padding["tokens"] / cost["positions"] for name, cost in padding["strategies"].items()}
    text = _strategy(padding)
    if saved[padding["current"]] >= NOTABLE:
        text += f" packing=true would have none, in random order either: {_percent(saved[padding['current']])} fewer."
    return [text]


def _strategy(padding: dict) -> str:
    shares = {name: cost["padding_share"] for name, cost in padding["strategies"].items()}
    positions = {name: cost["positions"] for name, cost in padding["strategies"].items()}
    current, best = padding["current"], _best(padding)
    text = f"Of what the batches hold, {_percent(shares[current])} is padding (train_sampling_strategy={current})"
    if current != "random" and shares["random"] - shares[current] < NOTABLE:
        return f"{text}, with random order {_percent(shares['random'])}: sorting by length gains nothing here."
    if shares[current] - shares[best] < NOTABLE:
        other = "" if current == "random" else f"; random order would have {_percent(shares['random'])}"
        return f"{text}{other}. That is well chosen."
    saved = 1 - positions[best] / positions[current]
    return f"{text}. {best} would have {_percent(shares[best])}, and {_percent(saved)} fewer positions to compute."


def _best(padding: dict) -> str:
    """The strategy with the least padding. The order of the files is none: it says nothing of what training needs."""
    return min(("group_by_length", "random"), key=lambda name: padding["strategies"][name]["positions"])


def _drowned(figures: dict) -> list[str]:
    """The loss is a mean over tokens: sources with short answers weigh less in it than their records suggest."""
    total, lines = figures["total"], []
    for name, source in figures["sources"].items():
        records, tokens = source["samples"] / total["samples"], source["supervised"] / total["supervised"]
        if records >= FEW_OF_RECORDS and tokens < FEW_OF_TOKENS * records:
            lines.append(
                f"Source {name!r:.60} has {_percent(records)} of the samples but {_percent(tokens)} of the supervised "
                "tokens, and the loss is a mean over tokens: its short answers hardly count. Give it more weight, or "
                "longer answers, if it matters."
            )
    return lines


def _media(figures: dict) -> list[str]:
    share = figures["total"]["features_share"]
    if share is None or share < 0.8:
        return []
    return [f"{_percent(share)} of all tokens are features of pictures and clips. projector.pixel_shuffle=2 makes a "
            "quarter of them, media.frame_pooling fewer of a clip."]  # fmt: skip


def _control(figures: dict) -> list[str]:
    count = figures["total"]["control_texts"]
    if not count:
        return []
    return [f"{_are(count, 'record holds', 'records hold')} text that looks like a control token. It is learned as the "
            "plain characters that it is made of; clean it if it is left over from a template."]  # fmt: skip


def _count(reasons: dict[str, dict], *names: str) -> int:
    return sum(entry["count"] for reason, entry in reasons.items() if reason in (names or reasons))


def _are(count: int, one: str, several: str) -> str:
    return f"{count:,} {one if count == 1 else several}"


def _percent(share: float) -> str:
    """`12.3 %`; shares that are not whole never look like 0 or 100."""
    text = f"{100 * share:.1f}"
    if text == "0.0" and share > 0:
        return "< 0.1 %"
    return "> 99.9 %" if text == "100.0" and share < 1 else f"{text} %"
