"""chat/sampling.py: arguments that do something, and none that silently do nothing."""

import argparse

import pytest

from chat.sampling import SETTINGS, add_sampling_arguments, changed, described, generation_of
from model import GREEDY

START = {**GREEDY, "max_new_tokens": 512}


def given(*arguments: str) -> dict:
    parser = argparse.ArgumentParser()
    add_sampling_arguments(parser)
    return generation_of(parser.parse_args(arguments))


def test_arguments_become_settings():
    assert given() == {}
    assert given("--num_beams", "3", "--repetition_penalty", "1.2", "--max_new_tokens", "9") == {
        "num_beams": 3, "repetition_penalty": 1.2, "max_new_tokens": 9,
    }  # fmt: skip
    drawn = given("--do_sample", "--temperature", "0.7", "--top_p", "0.9", "--top_k", "0", "--seed", "3")
    assert drawn == {"do_sample": True, "temperature": 0.7, "top_p": 0.9, "top_k": 0, "seed": 3}


@pytest.mark.parametrize("name", [name for name, setting in SETTINGS.items() if setting.draws])
def test_what_would_do_nothing_is_an_error(name):
    for off in ((), ("--no-do_sample",)):
        with pytest.raises(ValueError, match=f"--{name} acts only where tokens are drawn: add --do_sample"):
            given(f"--{name}", "1", *off)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("max_new_tokens", ("0", "-3")),
        ("num_beams", ("0",)),
        ("repetition_penalty", ("0", "-1", "nan", "inf")),
        ("temperature", ("0", "-1", "nan", "inf")),
        ("top_p", ("0", "1.1", "nan")),
        ("top_k", ("-1",)),
        ("seed", ("-1", "4294967296")),
    ],
)
def test_ranges(name, values):
    for value in values:
        with pytest.raises(ValueError, match=f"^--{name} is a .*number.*, not "):
            given("--do_sample", f"--{name}", value)
        with pytest.raises(ValueError, match=f"^{name} is a .*number.*, or default, not {value}"):
            changed(START, name, value)
    with pytest.raises(ValueError, match=f"^{name} is .*, not three"):
        changed(START, name, "three")
    with pytest.raises(ValueError, match=f"^{name} is .*, not $"):
        changed(START, name, "")


def test_temperature_zero_says_how_to_take_the_likeliest():
    with pytest.raises(ValueError, match="where do_sample is off"):
        changed(START, "temperature", "0")
    with pytest.raises(ValueError, match="where do_sample is off"):
        given("--do_sample", "--temperature", "0")


def test_changes_go_together():
    drawn = changed(START, "temperature", "0.7")
    assert drawn == {**START, "temperature": 0.7, "do_sample": True} and START["temperature"] == 1.0
    drawn = changed(changed(drawn, "seed", "4"), "num_beams", "2")
    assert drawn["seed"] == 4 and drawn["do_sample"] and drawn["num_beams"] == 2
    assert changed(drawn, "seed", "default")["seed"] is None
    assert changed(drawn, "do_sample", "off") == {**START, "num_beams": 2, "seed": None}
    assert changed(drawn, "do_sample", "default") == changed(drawn, "do_sample", "off")
    with pytest.raises(ValueError, match="do_sample is on or off, or default, not yes"):
        changed(START, "do_sample", "yes")
    with pytest.raises(ValueError, match=r"no setting 'temprature' \(did you mean 'temperature'\?\)"):
        changed(START, "temprature", "1")


def test_description_names_all_and_what_does_nothing():
    greedy = {line.split()[0]: line.split()[1] for line in described(START).splitlines()}
    assert greedy.keys() == SETTINGS.keys()
    assert greedy["temperature"] == greedy["seed"] == "-" and greedy["do_sample"] == "off"
    drawn = {line.split()[0]: line.split()[1] for line in described(changed(START, "top_k", "7")).splitlines()}
    assert drawn["top_k"] == "7" and drawn["seed"] == "none" and drawn["do_sample"] == "on"
