"""The metadata document survives a round trip and rejects what it does not know."""

import json
from dataclasses import replace

import pytest
from tiny_module import METADATA

from whet.runtime.metadata import ArtifactError, Output, Weight, from_json, to_json

FULL = replace(
    METADATA,
    labels=("é", "b"),
    multi_label=False,
    weights=(Weight("w", "int8", (3, 4), 64), Weight("scalar", "float32", (), 128)),
    report=({"layer": "0", "kernel": "dense"},),
    notes=("a note",),
)


def changed(**changes) -> str:
    document = json.loads(to_json([FULL]))
    document.update(changes)
    return json.dumps(document)


def test_round_trip():
    assert from_json(to_json([FULL])) == (FULL,)
    assert from_json(to_json([FULL]).encode()) == (FULL,)


def test_variants():
    """What they share stands once; an only one is written as if there could not be others."""
    fast = replace(FULL, isa="fast", cpu_flags=("fast",), entry="main_fast")
    document = json.loads(to_json([fast, FULL]))
    assert [list(variant) for variant in document["variants"]] == [["isa", "cpu_flags", "entry"]] * 2
    assert document["name"] == "tiny" and "isa" not in document
    assert from_json(json.dumps(document)) == (fast, FULL)
    assert "variants" not in json.loads(to_json([FULL]))


def test_unknown_fields_are_ignored():
    assert from_json(changed(added_later=1)) == (FULL,)


def test_other_format_version():
    with pytest.raises(ArtifactError, match=r"format 5 .*whet 0.*reads format 4: compile the model again"):
        from_json(changed(format=5))


@pytest.mark.parametrize("text", ["", "{", "[]", "null", b"\xff\xfe"])
def test_not_a_document(text):
    with pytest.raises(ArtifactError, match="corrupt"):
        from_json(text)


def test_missing_field():
    document = json.loads(to_json([FULL]))
    del document["task"], document["isa"]
    with pytest.raises(ArtifactError, match="lacks isa, task"):
        from_json(json.dumps(document))


@pytest.mark.parametrize(
    "change",
    [
        {"weights": [{"name": "w"}]},
        {"output": {"per": "word", "channels": 1}},
        {"output": None},
        {"convention": "other"},
        {"max_length": 0},
        {"vocab_size": "many"},
        {"labels": None},
        {"max_tokens": 3},
        {"variants": []},
        {"variants": {}},
        {"variants": [1]},
        {"variants": [{}, {"vocab_size": "many"}]},
    ],
)
def test_malformed_field(change):
    with pytest.raises(ArtifactError, match="malformed"):
        from_json(changed(**change))


def test_output_is_checked():
    with pytest.raises(ValueError, match=r"output\.per is 'word'"):
        Output("word", 3)
