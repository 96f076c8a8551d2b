"""Torch Datasets, S3ImageFolder among them, in the place of prepared images."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import torch
from dask_pytorch_ddp.data import S3ImageFolder
from distributed import Client
from PIL import Image
from test_shards import make_folder
from torch.utils.data import Dataset
from torchvision import transforms
from torchvision.datasets import ImageFolder
from uploading import upload

from gan_lib.base.errors import ParameterError, RunError, SourceError
from gan_lib.data.datasets import dataset_images
from gan_lib.data.image_set import ImageSet
from gan_lib.data.images import prepare_images
from gan_lib.jobs.launching import launch
from gan_lib.parameters import TrainingParameters
from gan_lib.training.rank import train_gan
from gan_lib.training.result import TrainingResult

AS_TENSOR = transforms.Compose([transforms.ToTensor(), transforms.Normalize(0.5, 0.5)])


class Given(Dataset):
    """Items as they are given."""

    def __init__(self, items: Any) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Any:
        item = self.items[index]
        if isinstance(item, Exception):
            raise item
        return item, 0


def forms(images: ImageSet) -> dict[str, Any]:
    pixels = np.asarray(images.pixels)
    return {
        "PIL images": [Image.fromarray(image[..., 0]) for image in pixels],
        "uint8 arrays": list(pixels),
        "uint8 tensors": [torch.from_numpy(image).permute(2, 0, 1) for image in pixels],
        "float tensors": [AS_TENSOR(Image.fromarray(image[..., 0])) for image in pixels],
    }


@pytest.mark.parametrize("form", ["PIL images", "uint8 arrays", "uint8 tensors", "float tensors"])
def test_a_dataset_trains_like_the_same_images(
    form: str, tiny: TrainingParameters, silhouettes: ImageSet
) -> None:
    p = tiny.replace(epochs=1)
    expected = train_gan(p, images=silhouettes, progress=False)
    found = train_gan(p, images=Given(forms(silhouettes)[form]), progress=False)
    assert found.weights_sha256 == expected.weights_sha256


@pytest.mark.parametrize(
    ("items", "error", "said"),
    [
        ([torch.rand(3, 16, 16)] * 4, ParameterError, r"expected -1 to 1.*Normalize\(0.5, 0.5\)"),
        ([torch.rand(3, 16, 16) * 255 - 1] * 4, ParameterError, "expected -1 to 1"),
        ([torch.full((3, 16, 16), 300)] * 4, ParameterError, "int64 from 300.00 .*or uint8"),
        ([torch.rand(3, 8, 8) - 0.5] * 4, ParameterError, r"\(3, 8, 8\).*3 x 16 x 16"),
        (
            [Image.new("I", (16, 16), 4095)] * 4,
            SourceError,
            "image 0 .*4095, neither.*prepare_images",
        ),
        ([OSError("no such key")] * 4, SourceError, "image 0 .*no such key.*prepare_images"),
        ([], SourceError, "empty"),
    ],
)
def test_what_cannot_be_trained_on_is_said_before(
    items: list[Any], error: type[Exception], said: str
) -> None:
    with pytest.raises(error, match=said):
        dataset_images(Given(items), 16, 3)


def test_what_is_no_dataset() -> None:
    with pytest.raises(ParameterError, match="int, expected an ImageSet or a torch Dataset"):
        train_gan({"image_size": 16}, images=7, progress=False)  # type: ignore[arg-type]
    with pytest.raises(ParameterError, match="has no boxes"):
        dataset_images(Given([torch.zeros(3, 16, 16)]), 16, 3, "box")


def test_classes_and_labels_of_an_image_folder(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "dogs", ["a", "b"], 5)
    found = dataset_images(ImageFolder(str(folder)), 16, 3)
    prepared = prepare_images(str(folder), 16, cache=str(tmp_path / "cache"))
    assert found.images_per_class() == prepared.images_per_class() == {"a": 5, "b": 5}
    np.testing.assert_array_equal(np.asarray(found.pixels), np.asarray(prepared.pixels))


@pytest.fixture
def on_s3(tmp_path: Path, s3: str) -> tuple[str, Path]:
    """A prefix of the bucket "bucket", and the folder that it is a copy of."""
    folder = make_folder(tmp_path / "dogs", ["a", "b"], 16)
    prefix = f"{tmp_path.name}/dogs"
    upload(folder, f"{s3}/{prefix}")
    return f"{prefix}/", folder


P = TrainingParameters(
    image_size=16, nz=16, ngf=8, ndf=8, epochs=1, batch_size=16, flip=False, max_images=16
)


def test_training_from_s3_image_folder(on_s3: tuple[str, Path], tmp_path: Path) -> None:
    prefix, folder = on_s3
    found = train_gan(P, images=S3ImageFolder("bucket", prefix), progress=False)
    prepared = prepare_images(str(folder), 16, cache=str(tmp_path / "cache"))
    assert found.iterations == 2
    assert found.weights_sha256 == train_gan(P, images=prepared, progress=False).weights_sha256


def test_a_dataset_that_draws_at_random_is_resumed(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "dogs", ["a", "b"], 8)
    noisy = transforms.Compose([transforms.RandomCrop(16), AS_TENSOR])
    run = str(tmp_path / "run")
    train_gan(P, images=ImageFolder(str(folder), noisy), run=run)
    more = P.replace(epochs=2)
    assert train_gan(more, images=ImageFolder(str(folder), noisy), run=run, resume=True).epochs == 1
    make_folder(folder, ["c"], 1)
    with pytest.raises(RunError, match=r"on 16 images, and the 17 "):
        train_gan(more, images=ImageFolder(str(folder), noisy), run=run, resume=True)


def test_a_stray_file_under_the_prefix_is_named(on_s3: tuple[str, Path], s3: str) -> None:
    prefix, _ = on_s3
    fsspec.filesystem("s3").pipe_file(f"{s3}/{prefix}.DS_Store", b"Bud1")
    with pytest.raises(SourceError, match=r"\.DS_Store.*UnidentifiedImageError.*prepare_images"):
        train_gan(P, images=S3ImageFolder("bucket", prefix), progress=False)


def train_from_s3(
    parameters: TrainingParameters, run: str, resume: bool, prefix: str
) -> TrainingResult:
    images = S3ImageFolder("bucket", prefix, transform=AS_TENSOR_16)
    return train_gan(parameters, run=run, resume=resume, images=images)


AS_TENSOR_16 = transforms.Compose([transforms.Resize((16, 16)), AS_TENSOR])


def test_two_ranks_train_from_s3_image_folder(
    on_s3: tuple[str, Path], s3: str, own_client: Client, tmp_path: Path
) -> None:
    prefix, _ = on_s3
    function = partial(train_from_s3, prefix=prefix)
    job = launch(own_client, P, run=str(tmp_path / "run"), function=function)
    results = job.result(timeout=120)
    assert len({result.weights_sha256 for result in results}) == 1
    assert job.run.info()["images"] == 32
