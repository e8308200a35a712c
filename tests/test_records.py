import json

import pytest

from coldforge.errors import UsageError
from coldforge.records import SCHEMA_VERSION, Record, load_record


def stage(name="baseline", label="baseline", **more):
    return {
        "name": name,
        "label": label,
        "params": 100,
        "macs": 1000,
        "size_bytes": 400,
        "packed_bytes": 100,
        "weight_bits": 8,
        "activation_bits": 8,
        "pruning_ratio": {"requested": 0.5, "achieved": 0.47},
        "n": 10,
        "clean_accuracy": 0.9,
        "clean_ci95": [0.6, 0.98],
        "robust_accuracy": {"pgd-20": 0.5, "worst_case": 0.5},
        "robust_n": {"pgd-20": 10, "worst_case": 10},
        "robust_ci95": {"pgd-20": [0.2, 0.8], "worst_case": [0.2, 0.8]},
        "per_class": {"Bag": {"n": 10, "clean": 0.9, "worst_case": 0.5}},
        **more,
    }


def content(**more):
    return {
        "coldforge_version": "0.1.0",
        "recipe": {"name": "t"},
        "provenance": {},
        "threat_model": {"norm": "linf", "eps": 0.1, "eps_255": 25.5, "box": True},
        "stages": [stage(), stage("tuned", "naturally tuned"), stage("tuned", "adversarially tuned")],
        **more,
    }


def test_json_round_trip(tmp_path):
    record = Record.model_validate(content())
    (tmp_path / "record.json").write_text(record.to_json())
    assert load_record(tmp_path) == load_record(tmp_path / "record.json") == record
    assert record.to_json().endswith("}\n")


def test_stage_is_found_by_name_and_word():
    record = Record.model_validate(content())
    assert record.stage("tuned", "adversarial").label == "adversarially tuned"
    assert record.stage("tuned").label == "naturally tuned"
    assert record.stage("artifact") is None


def test_records_are_frozen_and_refuse_unknown_keys():
    record = Record.model_validate(content())
    with pytest.raises(ValueError, match="frozen"):
        record.coldforge_version = "2"
    with pytest.raises(ValueError, match="Extra inputs"):
        Record.model_validate(content(extra=1))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not a coldforge record"),
        (json.dumps(content(stages=[])), "is not a coldforge record: .*at least 1 item"),
        (json.dumps(content(schema_version=99)), f"expected schema_version {SCHEMA_VERSION}, got 99"),
        (
            json.dumps(content(schema_version=99, new_key=1)),
            f"expected schema_version {SCHEMA_VERSION}, got 99; read it",
        ),
        (json.dumps(content(new_key=1)), "is not a coldforge record: new_key: Extra inputs"),
        ("[]", "is not a coldforge record"),
    ],
)
def test_bad_records(tmp_path, text, message):
    (tmp_path / "record.json").write_text(text)
    with pytest.raises(UsageError, match=message):
        load_record(tmp_path)


def test_missing_record_says_who_writes_one(tmp_path):
    with pytest.raises(UsageError, match=r"found nothing; `coldforge run` writes one"):
        load_record(tmp_path)
