"""How an answer is picked among all possible ones: arguments of the command line, `/set`, and what goes together."""

import argparse
from collections.abc import Callable
from typing import Any, NamedTuple

from dataset.rows import nearest
from model import GREEDY

MAX_NEW_TOKENS = 512


class Setting(NamedTuple):
    """An argument of `chat.session.Session`.

    Attributes:
        kind: of its values.
        allows: whether a value is in its range.
        range: the values in words.
        default: in words, and
        help: what it does.
        draws: it acts only where tokens are drawn (`do_sample`).
    """

    kind: type
    allows: Callable[[Any], bool]
    range: str
    default: str
    help: str
    draws: bool = False


# Seeds are those that NumPy takes, as transformers seeds all generators.
SETTINGS = {
    "max_new_tokens": Setting(
        int, lambda n: n >= 1, "a whole number from 1 on", str(MAX_NEW_TOKENS), "the longest answer, in tokens"
    ),
    "num_beams": Setting(
        int, lambda n: n >= 1, "a whole number from 1 on", "1",
        "so many answers grow at once and the likeliest is given, when it is complete"),
    "repetition_penalty": Setting(
        float, lambda x: 0.01 <= x <= 100, "a number from 0.01 to 100", "1",
        "above 1 tokens that already stand in the conversation become less likely"),
    "do_sample": Setting(bool, lambda on: True, "on or off", "off", "draw tokens instead of taking the likeliest"),
    "temperature": Setting(
        float, lambda x: 0.01 <= x <= 100, "a number from 0.01 to 100", "1",
        "below 1 likely tokens are drawn more often, above 1 less often", True),
    "top_p": Setting(
        float, lambda x: 0 < x <= 1, "a number above 0, at most 1", "1: from all",
        "draw from the likeliest tokens that have this probability together", True),
    "top_k": Setting(
        int, lambda n: n >= 0, "a whole number from 0 on", "50; 0: from all",
        "draw from so many of the likeliest tokens", True),
    "seed": Setting(
        int, lambda n: 0 <= n < 2**32, "a whole number from 0 to 4294967295", "none",
        "the same answer is drawn to the same question again", True),
}  # fmt: skip


def add_sampling_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments that `generation_of` reads: one per entry of `SETTINGS`."""
    group = parser.add_argument_group("how answers are picked")
    for name, setting in SETTINGS.items():
        note = f"; with --do_sample (default: {setting.default})" if setting.draws else f" (default: {setting.default})"
        if setting.kind is bool:
            group.add_argument(f"--{name}", action=argparse.BooleanOptionalAction, help=setting.help)
        else:
            group.add_argument(f"--{name}", type=setting.kind, metavar="N", help=setting.help + note)


def generation_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """Arguments of `Session` that a command line gives, its defaults left out.

    Raises:
        ValueError: a value out of range, or one that would do nothing without --do_sample.
    """
    given = {name: getattr(arguments, name) for name in SETTINGS if getattr(arguments, name) is not None}
    for name, value in given.items():
        if not SETTINGS[name].allows(value):
            raise ValueError(f"--{name} is {SETTINGS[name].range}, not {value}{_hint(name, value)}")
        if SETTINGS[name].draws and not given.get("do_sample"):
            raise ValueError(f"--{name} acts only where tokens are drawn: add --do_sample, or leave --{name} out")
    return given


def changed(generation: dict[str, Any], name: str, text: str) -> dict[str, Any]:
    """`generation` of a session with another value, as `/set` gives it; "default" is that of `SETTINGS`.

    What acts only where tokens are drawn has them drawn. Where they no longer are, it goes back to its default.

    Raises:
        ValueError: unknown name, or a value of another type or out of range.
    """
    if name not in SETTINGS:
        raise ValueError(f"there is no setting {name!r}{nearest(name, SETTINGS)}")
    defaults = {**GREEDY, "max_new_tokens": MAX_NEW_TOKENS, "seed": None}
    if text == "default":
        new = {**generation, name: defaults[name]}
    else:
        new = {**generation, name: _value(name, text)}
        if SETTINGS[name].draws:
            new["do_sample"] = True
    if not new["do_sample"]:
        new |= {other: defaults[other] for other, setting in SETTINGS.items() if setting.draws}
    return new


def _value(name: str, text: str) -> Any:
    setting = SETTINGS[name]
    try:
        value = {"on": True, "off": False}[text] if setting.kind is bool else setting.kind(text)
    except (KeyError, ValueError):
        value = None
    if value is None or not setting.allows(value):
        raise ValueError(f"{name} is {setting.range}, or default, not {text}{_hint(name, value)}")
    return value


def _hint(name: str, value: Any) -> str:
    if name == "temperature" and value == 0:  # what other programs call the likeliest token
        return "; the likeliest tokens are taken where do_sample is off"
    return ""


def described(generation: dict[str, Any]) -> str:
    """The settings of a session, a line each; `-` where tokens would have to be drawn."""
    lines = []
    for name, setting in SETTINGS.items():
        value = generation.get(name)
        if setting.kind is bool:
            value = "on" if value else "off"
        elif setting.draws and not generation["do_sample"]:
            value = "-"
        lines.append(f"{name:<18} {'none' if value is None else value:<8} {setting.help}")
    return "\n".join(lines)
