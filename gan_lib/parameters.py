"""What a run is told: one validated, frozen dataclass.

Every field is a plain int, float, bool or string, so that the same names and
values travel unchanged through a notebook's parameters cell, a papermill
profile, JSON and the Dask cluster.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from gan_lib.base.addresses import refuse_credentials
from gan_lib.base.checks import check_type, refuse_unknown_names, require_choice, require_range
from gan_lib.base.errors import ParameterError

IMAGE_SIZES = (16, 32, 64, 128, 256)
CROPS = ("center", "squash", "box")
DEVICES = ("auto", "cpu", "cuda")
PRECISIONS = ("auto", "float32", "bfloat16")
COMPILE = ("off", "auto", "on")
LOSS_NAMES = ("bce", "hinge", "relativistic")
NORMS = ("batch", "spectral", "none")
CHANGES = ("translation", "cutout", "color")


@dataclass(frozen=True)
class TrainingParameters:
    """All that decides what a training run does.

    The learning rates, `beta1`, `nz`, `ngf`, `ndf` and `batch_size` default to
    the values of DCGAN (Radford et al. 2016, section 4, arXiv:1511.06434).

    Raises:
        ParameterError: if a value has the wrong type or cannot be trained with.
    """

    # The images
    source: str = "dog-silhouettes"  # a name in data_manifest.json, or a folder or URL of images
    image_size: int = 64  # pixels per side: 16, 32, 64, 128 or 256
    channels: int = 3  # 1 for grey, 3 for RGB
    crop: str = "center"  # "center" cuts the middle out; "squash" keeps all; "box" cuts to boxes
    max_images: int = 0  # train on this many images, spread over the classes; 0 means all
    pixel_mean: float = 0.5  # the networks see each pixel, as 0 to 1, minus this ...
    pixel_std: float = 0.5  # ... over this: -1 to 1, as tanh ends the generator

    # The two networks
    nz: int = 100  # length of the latent vector z
    ngf: int = 64  # generator width: feature maps before its last layer
    ndf: int = 64  # discriminator width: feature maps after its first layer
    d_norm: str = "batch"  # of the discriminator's layers: "batch", "spectral" or "none"
    d_bias: bool = False  # with "batch": an offset in its first layer, by which it sees contrast
    conditional: bool = False  # tell both networks the class of each image
    blocks: int = 0  # residual blocks after each layer of both networks but the last

    # The training
    epochs: int = 25  # passes over all images
    batch_size: int = 128  # images per optimiser step over all ranks together
    lr_g: float = 2e-4  # Adam's learning rate for the generator
    lr_d: float = 2e-4  # Adam's learning rate for the discriminator
    lr_hold: int = 0  # images until both rates begin to fall ...
    lr_half_life: int = 0  # ... by half, each time so many more are seen; 0: they never do
    beta1: float = 0.5  # Adam's first moment decay; DCGAN found 0.9 to oscillate
    beta2: float = 0.999  # Adam's second moment decay
    real_label: float = 0.5  # what the discriminator is told of real images
    fake_label: float = 0.0  # what the discriminator is told of generated images
    loss: str = "bce"  # "bce" asks for labels; "hinge" for a margin; "relativistic" compares pairs
    r1: float = 0.0  # weight of the penalty on the discriminator's slope; 0 means none
    r1_every: int = 16  # steps between two penalties, each then so many times as heavy
    ema_images: int = 0  # half-life, in images, of the generator's moving average; 0 means none

    # Augmentation: `flip` of the real images, the others of all that the discriminator sees
    flip: bool = True  # mirror each image left to right with probability 1/2
    augment: str = ""  # DiffAugment: "translation,cutout,color" or parts of it
    augment_after: int = 0  # images until `augment` begins: at first it only slows learning
    augment_late: str = ""  # more of the same, against a discriminator that knows its images ...
    augment_late_after: int = 0  # ... by heart: from so many images on
    color_jitter: float = 0.0  # brightness, contrast, saturation: each times 1 - this to 1 + this
    noise: float = 0.0  # standard deviation of Gaussian pixel noise, where white minus black is 2

    # What is kept
    record_every: int = 5  # iterations between two records of the losses
    sample_every: int = 1  # epochs between two pictures of the same latent vectors
    checkpoint_every: int = 5  # epochs between two checkpoints; the last epoch always has one
    keep_checkpoints: int = 3  # older checkpoints are deleted; 0 keeps all
    keep_every: int = 0  # ... but not those of epochs that this divides; 0 divides none
    n_samples: int = 64  # images in each picture

    # The measure: how far generated images are from real ones
    quality_every: int = 0  # epochs between two measurements, and one at the end; 0 measures never
    quality_images: int = 2000  # generated for each; at most half as many as there are real ones
    patience: int = 0  # end after so many measurements without a gain beyond noise; 0 never does

    # The machine
    seed: int = 0  # decides weights, latent vectors, order and augmentation
    device: str = "auto"  # "auto" takes CUDA where there is one; or "cpu", "cuda"
    # Not "auto": a run that was told nothing goes on, to the bit, as it began.
    precision: str = "float32"  # "auto" takes bfloat16 where the hardware has it
    compile: str = "off"  # "on", or "auto": on a GPU, in a run that is long enough
    sync_norm: bool = False  # BatchNorm over the images of all ranks, and not of each; on GPUs
    exchange: str = "float32"  # how gradients travel; "bfloat16" is half as much, for slow networks

    def __post_init__(self) -> None:
        for field in fields(self):
            value = check_type(field.name, type(field.default), getattr(self, field.name))
            object.__setattr__(self, field.name, value)
        self._check_values()

    def _check_values(self) -> None:
        if not self.source.strip():
            raise ParameterError("source is empty: name a data source or a folder of images")
        refuse_credentials("source", self.source)
        require_choice("image_size", self.image_size, IMAGE_SIZES)
        require_choice("channels", self.channels, (1, 3))
        require_choice("crop", self.crop, CROPS)
        require_choice("device", self.device, DEVICES)
        require_choice("precision", self.precision, PRECISIONS)
        require_choice("compile", self.compile, COMPILE)
        require_choice("exchange", self.exchange, PRECISIONS[1:])
        require_choice("loss", self.loss, LOSS_NAMES)
        require_choice("d_norm", self.d_norm, NORMS)
        for name in ("augment", "augment_late"):
            for change in _words(getattr(self, name)):
                require_choice(name, change, CHANGES)
        for change in set(_words(self.augment)) & set(_words(self.augment_late)):
            raise ParameterError(
                f"{change} is in augment and in augment_late: it is on already when that begins. "
                "Name it in one of them"
            )
        at_least_one = ("nz", "ngf", "ndf", "epochs", "batch_size", "record_every", "r1_every")
        for name in (*at_least_one, "sample_every", "checkpoint_every", "n_samples"):
            require_range(name, getattr(self, name), 1, None)
        zero_is_none = ("max_images", "blocks", "lr_hold", "lr_half_life", "r1", "ema_images")
        zero_is_never = ("keep_checkpoints", "keep_every", "quality_every", "patience")
        for name in (*zero_is_none, *zero_is_never, "augment_after", "augment_late_after"):
            require_range(name, getattr(self, name), 0, None)
        require_range("quality_images", self.quality_images, 8, None)
        if self.patience and not self.quality_every:
            raise ParameterError(
                f"patience is {self.patience}, and quality_every 0: nothing is measured that could "
                "end the run. Set quality_every, such as 5"
            )
        if self.lr_hold and not self.lr_half_life:
            raise ParameterError(
                f"lr_hold is {self.lr_hold}, and lr_half_life 0: the rates would never fall. Set "
                "lr_half_life, such as 1000000"
            )
        if self.augment_late_after and not self.augment_late:
            raise ParameterError(
                f"augment_late_after is {self.augment_late_after}, and augment_late is empty: "
                "nothing would begin then. Set augment_late, such as cutout,color"
            )
        if self.r1 > 0 and self.d_norm == "batch":
            raise ParameterError(
                f"r1 is {self.r1}, and d_norm is 'batch': with BatchNorm an image's score depends "
                "on the others beside it, and the penalty means nothing. Use d_norm 'none'"
            )
        if self.compile == "on" and (self.r1 > 0 or self.sync_norm):
            cause = f"r1 {self.r1}" if self.r1 > 0 else "sync_norm True"
            raise ParameterError(
                f"compile is 'on', and {cause}: torch cannot compile that. Set compile to 'off', "
                "or to 'auto', which compiles only what can be"
            )
        require_range("seed", self.seed, 0, 2**31 - 1)
        for name in ("lr_g", "lr_d"):
            if getattr(self, name) <= 0:
                raise ParameterError(
                    f"{name} is {getattr(self, name)}: a learning rate is above 0 (DCGAN: 0.0002)"
                )
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ParameterError(
                    f"{name} is {getattr(self, name)}: Adam needs at least 0 and less than 1"
                )
        for name in ("real_label", "fake_label"):
            require_range(name, getattr(self, name), 0.0, 1.0)
        if self.real_label <= self.fake_label:
            raise ParameterError(
                f"real_label {self.real_label} is not above fake_label {self.fake_label}: "
                "the discriminator could not learn which is which"
            )
        require_range("pixel_mean", self.pixel_mean, 0.0, 1.0)
        least = max(self.pixel_mean, 1 - self.pixel_mean)
        if self.pixel_std < least:
            raise ParameterError(
                f"pixel_std is {self.pixel_std}, with pixel_mean {self.pixel_mean}: black or white "
                "would lie beyond the -1 to 1 that the generator's tanh reaches. Set pixel_std to "
                f"at least {least:g}"
            )
        require_range("color_jitter", self.color_jitter, 0.0, 1.0)
        require_range("noise", self.noise, 0.0, 1.0)

    @property
    def normalisation(self) -> tuple[float, float]:
        """Mean and standard deviation, as `normalise` takes them."""
        return self.pixel_mean, self.pixel_std

    def changes(self, seen: int) -> tuple[str, ...]:
        """What `augment` and `augment_late` name, as far as it has begun after `seen` images."""
        first = _words(self.augment) if seen >= self.augment_after else ()
        return first + (_words(self.augment_late) if seen >= self.augment_late_after else ())

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> TrainingParameters:
        """Build parameters from a dictionary; names that are absent keep their defaults.

        Raises:
            ParameterError: on an unknown name (the nearest known one is named),
                a wrong type or an impossible value.
        """
        if not isinstance(values, Mapping):
            raise ParameterError(
                f"parameters are {type(values).__name__}, expected a mapping of names to values"
            )
        refuse_unknown_names(values, cls.names())
        return cls(**values)

    @classmethod
    def names(cls) -> tuple[str, ...]:
        """The names of all parameters, in the order in which they are documented."""
        return tuple(field.name for field in fields(cls))

    def to_dict(self) -> dict[str, Any]:
        """A plain dictionary: `from_mapping` makes the same parameters of it."""
        return asdict(self)

    def to_json(self) -> str:
        """JSON with one parameter a line: `from_json` makes the same parameters of it."""
        return json.dumps(self.to_dict(), indent=2)

    @classmethod
    def from_json(cls, text: str) -> TrainingParameters:
        """Read what `to_json` wrote.

        Raises:
            ParameterError: if the text is not JSON, or as in `from_mapping`.
        """
        try:
            values = json.loads(text)
        except json.JSONDecodeError as error:
            raise ParameterError(f"the parameters are not JSON: {error}") from None
        return cls.from_mapping(values)

    def replace(self, **changes: Any) -> TrainingParameters:
        """A copy with some values changed, checked like any other."""
        refuse_unknown_names(changes, self.names())
        return replace(self, **changes)


def _words(text: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in text.split(",") if word.strip())
