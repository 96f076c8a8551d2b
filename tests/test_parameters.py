from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from gan_lib.base.errors import ParameterError
from gan_lib.parameters import TrainingParameters


def test_defaults_are_those_of_dcgan_and_of_the_article() -> None:
    p = TrainingParameters()
    assert (p.lr_g, p.lr_d, p.beta1, p.nz) == (2e-4, 2e-4, 0.5, 100)
    assert (p.image_size, p.channels, p.ngf, p.ndf) == (64, 3, 64, 64)
    assert (p.real_label, p.fake_label, p.record_every) == (0.5, 0.0, 5)


def test_parameters_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        TrainingParameters().lr_g = 1.0  # type: ignore[misc]


def test_json_round_trip() -> None:
    p = TrainingParameters(lr_g=1e-3, source="somewhere/else", flip=False, epochs=7)
    assert TrainingParameters.from_json(p.to_json()) == p
    assert TrainingParameters.from_mapping(p.to_dict()) == p


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"lrg": 0.1}, ["lrg", "lr_g"]),
        ({"batchsize": 8}, ["batchsize", "batch_size"]),
        ({"batch_size": -1}, ["batch_size", "-1", "1 or more"]),
        ({"epochs": "many"}, ["epochs", "many", "int"]),
        ({"epochs": 2.5}, ["epochs", "2.5", "int"]),
        ({"epochs": True}, ["epochs", "True", "int"]),
        ({"lr_g": "2e-4"}, ["lr_g", "2e-4", "0.0002"]),
        ({"lr_d": 0.0}, ["lr_d", "0"]),
        ({"lr_d": float("nan")}, ["lr_d", "nan", "finite"]),
        ({"beta1": 1.0}, ["beta1", "1.0"]),
        ({"image_size": 60}, ["image_size", "60", "64"]),
        ({"channels": 4}, ["channels", "4"]),
        ({"real_label": 1.5}, ["real_label", "1.5"]),
        ({"real_label": 0.0}, ["real_label", "fake_label"]),
        ({"flip": 1}, ["flip", "1", "bool"]),
        ({"source": ""}, ["source"]),
        ({"patience": 3}, ["patience", "3", "quality_every"]),
        ({"quality_images": 4, "quality_every": 1}, ["quality_images", "4", "8 or more"]),
        ({"device": "tpu"}, ["device", "tpu", "cuda"]),
    ],
)
def test_wrong_parameters_are_named(values: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ParameterError) as caught:
        TrainingParameters.from_mapping(values)
    for word in words:
        assert word in str(caught.value)


def test_an_int_is_good_for_a_float() -> None:
    assert TrainingParameters.from_mapping({"real_label": 1}).real_label == 1.0


def test_what_is_not_a_mapping_is_refused() -> None:
    with pytest.raises(ParameterError, match="mapping"):
        TrainingParameters.from_mapping([("epochs", 1)])  # type: ignore[arg-type]
    with pytest.raises(ParameterError, match="JSON"):
        TrainingParameters.from_json("{epochs: 1")
