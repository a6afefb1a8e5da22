"""Published checkpoints: where each file is, how to know it is the right one, and how images are prepared for it.

This is data and nothing else; `download` brings a file, the readers open it. No digest is our own finding: each stands
as its publisher gives it.

- Torchvision and timm put the first 8 or 9 hexadecimal digits of the SHA-256 into the file's name ("sha256-prefix").
- Keras checks an MD5, which its source holds ("md5").
- Of torchvision's Inception v3 several public records, independent of each other, give the same full SHA-256, and the
  digits in the file's name are its beginning ("sha256").

A prefix tells damage and a wrong file from the right one, but not a forgery made on purpose; for all of them the
safeguard is that a weights file is only ever read as data. Left out, although others list them: R. Cadene's
xception-b5690688.pth and bn_inception-52deb4733.pth (published over plain HTTP only) and timm's inception_v3.tf_in1k
and .tf_adv_in1k (on GitHub with 1001 classes; the repaired files have no published digest). Such files are read all
the same when their path is given.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Literal

from xception.data.preprocess import Preprocess
from xception.errors import ConfigError
from xception.models.fields import unknown_name

DigestKind = Literal["sha256", "sha256-prefix", "md5"]
Reader = Literal["hdf5", "torch"]

IMAGENET = "imagenet"
"""Stands for the network's own entry of `DEFAULTS`, as in ``weights="imagenet"``."""


@dataclass(frozen=True, kw_only=True)
class Digest:
    """What a publisher says about a file's bytes; `value` is lower-case hexadecimal."""

    kind: DigestKind
    value: str

    @property
    def algorithm(self) -> str:
        """hashlib's name of it."""
        return "md5" if self.kind == "md5" else "sha256"

    def matches(self, found: str) -> bool:
        """Whether `found`, a full hexadecimal digest by `algorithm`, is this one."""
        return found.startswith(self.value) if self.kind == "sha256-prefix" else found == self.value

    def __str__(self) -> str:
        return f"{self.algorithm} {self.value}" + ("..." if self.kind == "sha256-prefix" else "")


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """One published file.

    `model` is the registry's name of the network; `reader` and `family` say how it is stored and whose names its
    tensors have (the readers find both out by themselves; for .pth files they call the family the same).
    `size` in bytes is what was reported of the file, None where nobody did: it guides the progress bar and bounds the
    download, the `digest` decides. Without a digest, only the structure can be checked (every tensor used once).
    `num_classes` is 0 without a classifier. `published` are shares of the ImageNet validation images, measured by
    `measured_by` with single crops.
    """

    name: str
    model: str
    url: str
    digest: Digest | None
    size: int | None
    reader: Reader
    family: str
    preprocess: Preprocess
    num_classes: int = 1000
    published: Mapping[str, float] = field(default_factory=dict)
    measured_by: str = ""
    license: str
    source: str
    aliases: tuple[str, ...] = ()

    @property
    def file_name(self) -> str:
        """Its name in the cache: the publisher's, which is different for each entry."""
        return self.url.rpartition("/")[2]


def is_published(name: str) -> bool:
    """Whether `name` is one of the catalog's names or aliases ("imagenet", which needs a network, is not)."""
    return name in _BY_NAME


def list_checkpoints(pattern: str = "*") -> list[str]:
    """The names, without aliases, that match a shell-style pattern, in alphabetical order."""
    return sorted(checkpoint.name for checkpoint in CATALOG if fnmatchcase(checkpoint.name, pattern))


def find_checkpoint(name: str, *, model: str | None = None) -> Checkpoint:
    """The checkpoint of this name or alias; ``"imagenet"`` is the usual one of the network `model`.

    Raises `ConfigError` on an unknown name, with those near it, and where the checkpoint belongs to another network
    than `model` (None asks for no network in particular).
    """
    if name == IMAGENET:
        if model is None:
            raise ConfigError(f"weights {IMAGENET!r} need a network to belong to: one of {', '.join(DEFAULTS)}")
        if model not in DEFAULTS:
            raise ConfigError(f"no published ImageNet weights for {model!r}: there are some for {', '.join(DEFAULTS)}")
        return _BY_NAME[DEFAULTS[model]]
    if name not in _BY_NAME:
        raise unknown_name("published weights", name, _BY_NAME)
    checkpoint = _BY_NAME[name]
    if model is not None and checkpoint.model != model:
        raise ConfigError(f"{name} are weights of {checkpoint.model!r}, not of {model!r}")
    return checkpoint


def _prefix(digits: str) -> Digest:
    return Digest(kind="sha256-prefix", value=digits)


_KERAS = "https://storage.googleapis.com/tensorflow/keras-applications"
_TIMM = "https://github.com/rwightman/pytorch-image-models/releases/download"
_TORCHVISION = "https://download.pytorch.org/models"

_KERAS_CODE = "keras.applications, which holds the MD5"
_TIMM_CODE = "timm (pytorch-image-models)"

# Keras resizes straight to the input's size and leaves the interpolation to the user: bilinear is our choice.
_SQUASH_299 = Preprocess(size=(299, 299), resize="squash")


def _timm(scaled: int, *, mean: tuple[float, ...] = (0.5,) * 3, std: tuple[float, ...] = (0.5,) * 3) -> Preprocess:
    """timm's bicubic resize of the shorter side to `scaled` pixels, then the centre 299."""
    return Preprocess(size=(299, 299), crop_fraction=299 / scaled, interpolation="bicubic", mean=mean, std=std)


def _keras(
    name: str, model: str, file: str, md5: str, size: int, published: Mapping[str, float] | None = None
) -> Checkpoint:
    return Checkpoint(
        name=name,
        model=model,
        url=f"{_KERAS}/{model}/{file}",
        digest=Digest(kind="md5", value=md5),
        size=size,
        reader="hdf5",
        family=f"keras {model}",
        preprocess=_SQUASH_299,
        num_classes=1000 if published else 0,
        published=published or {},
        measured_by="Keras" if published else "",
        license="MIT",
        source=_KERAS_CODE,
    )


def _aligned(
    name: str, path: str, digits: str, preprocess: Preprocess, *, size: int | None, top1: float, top5: float
) -> Checkpoint:
    model = name.partition(".")[0]
    trained = "ported from TensorFlow's DeepLab" if ".tf_" in name else "trained with timm, recipe RA3"
    return Checkpoint(
        name=name,
        model=model,
        url=f"{_TIMM}/{path}-{digits}.pth",
        digest=_prefix(digits),
        size=size,
        reader="torch",
        family=f"timm {model}",
        preprocess=preprocess,
        published={"top1": top1, "top5": top5},
        measured_by="timm",
        license="Apache-2.0",
        source=f"{_TIMM_CODE}, {trained}",
    )


def _torchvision(model: str, digits: str, *, top1: float, top5: float) -> Checkpoint:
    """The first weights that torchvision published of a network, trained by itself; sizes it tells in MiB only."""
    return Checkpoint(
        name=f"{model}.tv_in1k",
        model=model,
        url=f"{_TORCHVISION}/{model}-{digits}.pth",
        digest=_prefix(digits),
        size=None,
        reader="torch",
        family=f"torchvision {model}",
        preprocess=Preprocess(
            size=(224, 224), crop_fraction=224 / 256, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)
        ),
        published={"top1": top1, "top5": top5},
        measured_by="torchvision",
        license="BSD-3-Clause",
        source="torchvision",
    )


CATALOG: tuple[Checkpoint, ...] = (
    _keras(
        "xception.keras_in1k",
        "xception",
        "xception_weights_tf_dim_ordering_tf_kernels.h5",
        "0a58e3b7378bc2990ea3b43d5981f1f6",
        91_884_032,
        {"top1": 0.790, "top5": 0.945},
    ),
    _keras(
        "xception.keras_in1k_notop",
        "xception",
        "xception_weights_tf_dim_ordering_tf_kernels_notop.h5",
        "b0042744bf5b25fce3cb969f33bebb97",
        83_683_744,
    ),
    Checkpoint(
        # One file under two names: Cadene's port of Keras's weights, which timm took over.
        name="xception.cadene_in1k",
        aliases=("legacy_xception.tf_in1k",),
        model="xception",
        url=f"{_TIMM}/v0.1-cadene/xception-43020ad28.pth",
        digest=_prefix("43020ad28"),
        size=91_675_053,
        reader="torch",
        family="timm legacy_xception",
        preprocess=_timm(333),
        published={"top1": 0.79058, "top5": 0.94396},
        measured_by="timm",
        license="Apache-2.0",
        source=f"{_TIMM_CODE} and Cadene's pretrained-models.pytorch, ported from Keras by T. Standley",
    ),
    _aligned(
        "xception41.tf_in1k",
        "v0.1-weights/tf_xception_41",
        "e6439c97",
        _timm(331),
        size=108_422_028,
        top1=0.78550,
        top5=0.94282,
    ),
    _aligned(
        "xception65.tf_in1k",
        "v0.1-weights/tf_xception_65",
        "c9ae96e8",
        _timm(331),
        size=160_536_780,
        top1=0.79558,
        top5=0.94656,
    ),
    _aligned(
        "xception71.tf_in1k",
        "v0.1-weights/tf_xception_71",
        "8eec7df1",
        _timm(331),
        size=170_295_556,
        top1=0.79920,
        top5=0.94908,
    ),
    _aligned(
        "xception65.ra3_in1k",
        "v0.1-tpu-weights/xception65_ra3",
        "1447db8d",
        _timm(318),
        size=None,
        top1=0.83186,
        top5=0.96596,
    ),
    _aligned(
        "xception41p.ra3_in1k",
        "v0.1-tpu-weights/xception41p_ra3",
        "33195bc8",
        _timm(318),
        size=None,
        top1=0.81978,
        top5=0.95784,
    ),
    _aligned(
        "xception65p.ra3_in1k",
        "v0.1-tpu-weights/xception65p_ra3",
        "3c6114e4",
        _timm(318),
        size=None,
        top1=0.83160,
        top5=0.96506,
    ),
    _keras(
        "inception_v3.keras_in1k",
        "inception_v3",
        "inception_v3_weights_tf_dim_ordering_tf_kernels.h5",
        "9a0d58056eeedaa3f26cb7ebd46da564",
        96_112_376,
        {"top1": 0.779, "top5": 0.937},
    ),
    _keras(
        "inception_v3.keras_in1k_notop",
        "inception_v3",
        "inception_v3_weights_tf_dim_ordering_tf_kernels_notop.h5",
        "bcbd6486424b2319ff4ef7d526e38f63",
        87_910_968,
    ),
    Checkpoint(
        name="inception_v3.tv_in1k",
        model="inception_v3_torchvision",
        url=f"{_TORCHVISION}/inception_v3_google-0cc3c7bd.pth",
        digest=Digest(kind="sha256", value="0cc3c7bd75056d25e46cba549dc184522069b81e9787eff6df84f397bd52a5ef"),
        size=108_949_747,
        reader="torch",
        family="torchvision inception_v3",
        # Torchvision normalises as for its other networks, and the network undoes it (transform_input): this is both.
        preprocess=Preprocess(size=(299, 299), crop_fraction=299 / 342),
        published={"top1": 0.77294, "top5": 0.93450},
        measured_by="torchvision",
        license="BSD-3-Clause",
        source="torchvision, ported from TensorFlow",
    ),
    Checkpoint(
        name="inception_v3.gluon_in1k",
        model="inception_v3_torchvision",
        url=f"{_TIMM}/v0.1-weights/gluon_inception_v3-9f746940.pth",
        digest=_prefix("9f746940"),
        size=95_567_055,
        reader="torch",
        family="timm inception_v3",
        preprocess=_timm(341, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)),
        published={"top1": 0.78806, "top5": 0.94372},
        measured_by="timm",
        license="Apache-2.0",
        source=f"{_TIMM_CODE}, ported from Gluon",
    ),
    Checkpoint(
        name="googlenet.tv_in1k",
        model="googlenet",
        url=f"{_TORCHVISION}/googlenet-1378be20.pth",
        digest=_prefix("1378be20"),
        size=None,  # torchvision says 49.731 MiB
        reader="torch",
        family="torchvision googlenet",
        preprocess=Preprocess(size=(224, 224), crop_fraction=224 / 256),  # as Inception v3: transform_input undone
        published={"top1": 0.69778, "top5": 0.89530},
        measured_by="torchvision",
        license="BSD-3-Clause",
        source="torchvision, ported from TensorFlow",
    ),
    _torchvision("vgg16", "397923af", top1=0.71592, top5=0.90382),
    _torchvision("resnet152", "394f9c45", top1=0.78312, top5=0.94046),
)

DEFAULTS: Mapping[str, str] = {
    "xception": "xception.keras_in1k",
    "xception41": "xception41.tf_in1k",
    "xception65": "xception65.ra3_in1k",
    "xception71": "xception71.tf_in1k",
    "xception41p": "xception41p.ra3_in1k",
    "xception65p": "xception65p.ra3_in1k",
    "inception_v3": "inception_v3.keras_in1k",
    "inception_v3_torchvision": "inception_v3.tv_in1k",
    "googlenet": "googlenet.tv_in1k",
    "vgg16": "vgg16.tv_in1k",
    "resnet152": "resnet152.tv_in1k",
}
"""What ``weights="imagenet"`` means for each network: the file in the network's own numerics, from whom it comes first
hand (for Xception the author's, Keras's), and for Xception-65 the better of two, as in timm."""

_BY_NAME: Mapping[str, Checkpoint] = {
    name: checkpoint for checkpoint in CATALOG for name in (checkpoint.name, *checkpoint.aliases)
}
