"""Hostile `.keras` archives and model descriptions, made from a genuine one.

Each comes as (what was done, file, part of the expected message). Among them is what has been published against
Keras: CVE-2024-3660 and CVE-2025-9905 (code in a Lambda), CVE-2025-1550 and CVE-2025-9906 (any function by its
module's name), CVE-2025-8747 and CVE-2025-12060 (`get_file`), CVE-2025-12058 (files named as vocabularies),
CVE-2025-49655 (pickles in a wrapper), CVE-2026-1669 and CVE-2026-0897 (HDF5, in `hostile_hdf5`).
"""

from __future__ import annotations

import copy
import io
import json
import marshal
import random
import struct
import zipfile
from collections.abc import Callable, Iterator
from typing import Any

Case = tuple[str, bytes, str]
Change = Callable[[dict[str, Any]], object]


def unzipped(data: bytes) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def zipped(members: list[tuple[str | zipfile.ZipInfo, bytes]], method: int = zipfile.ZIP_STORED) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", method) as archive:
        for name, contents in members:
            archive.writestr(name, contents)
    return stream.getvalue()


def described(data: bytes, change: Change | None = None, *, text: bytes | None = None) -> bytes:
    """The archive with its description changed, or replaced by `text`."""
    members = unzipped(data)
    config = json.loads(members["config.json"])
    if change is not None:
        change(config)
    members["config.json"] = json.dumps(config).encode() if text is None else text
    return zipped(list(members.items()))


def layers_of(config: dict[str, Any]) -> list[dict[str, Any]]:
    return config["config"]["layers"]


def layer_of(config: dict[str, Any], name: str) -> dict[str, Any]:
    return next(layer for layer in layers_of(config) if layer["name"] == name)


def hdf5_like_the_other(members: dict[str, bytes]) -> bytes:
    """An archive's weights with groups of the names that `hostile_hdf5` changes."""
    import h5py

    stream = io.BytesIO(members["model.weights.h5"])
    with h5py.File(stream, "r+") as file:
        file.create_group("model_weights/predictions/predictions")["bias"] = [0.0] * 5
    changed = stream.getvalue()
    return changed.ljust(struct.unpack_from("<Q", changed, 40)[0], b"\0")


def call(*names: str) -> list[dict[str, Any]]:
    """One call, with the results of these layers."""
    tensors = [
        {"class_name": "__keras_tensor__", "config": {"shape": [None], "dtype": "float32", "keras_history": [n, 0, 0]}}
        for n in names
    ]
    return [{"args": tensors if len(names) == 1 else [tensors], "kwargs": {}}]


def put_before(config: dict[str, Any], name: str, layer: dict[str, Any]) -> None:
    """Put `layer` between the layer `name` and what that takes."""
    target = layer_of(config, name)
    layer = {"module": "keras.layers", "registered_name": None, **layer}
    layer.setdefault("config", {})
    layer["config"].setdefault("name", "evil")
    layer["name"] = layer["config"]["name"]
    layer["inbound_nodes"] = target["inbound_nodes"]
    target["inbound_nodes"] = call(layer["name"])
    layers_of(config).insert(layers_of(config).index(target), layer)


# ------------------------------------------------------------------------------------------------------ archives


def hostile_archives(data: bytes) -> Iterator[Case]:
    members = unzipped(data)
    pairs: list[tuple[str | zipfile.ZipInfo, bytes]] = list(members.items())
    weights, config = members["model.weights.h5"], members["config.json"]

    def with_member(name: str, contents: bytes = b"x") -> bytes:
        return zipped([*pairs, (name, contents)])

    def without(name: str) -> bytes:
        return zipped([pair for pair in pairs if pair[0] != name])

    for name in ("../evil", "/etc/evil", "a/../../evil", "..\\evil", "C:evil"):
        yield f"a member {name}", with_member(name), "leads outside"
    link = zipfile.ZipInfo("link")
    link.external_attr = 0xA1FF << 16
    yield "a symbolic link", zipped([*pairs, (link, b"/etc/passwd")]), "a symbolic link"
    yield "no description", without("config.json"), "without config.json"
    yield "no weights", without("model.weights.h5"), "without model.weights.h5"
    yield "weights of another kind", zipped([("config.json", config), ("model.weights.npz", b"")]), "without model.w"
    yield "an empty archive", zipped([]), "without config.json"
    yield "300 members", zipped([*pairs, *((f"assets/{i}", b"") for i in range(300))]), "303 members"
    yield "weights that are no HDF5", zipped([*pairs[:-1], ("model.weights.h5", b"x" * 500)]), "no HDF5 file"
    yield "empty weights", zipped([*pairs[:-1], ("model.weights.h5", b"")]), "no HDF5 file"
    bomb = zipped([pairs[0], ("model.weights.h5", bytes(40 << 20)), ("config.json", config)], zipfile.ZIP_DEFLATED)
    yield "weights of 40 MB of zeros, deflated", bomb, "would unpack from"
    large = b'{"a": "' + b" " * (9 << 20) + b'"}'
    yield "a description of 9 MB", described(data, text=large), "at most 8,388,608 are read"
    deflated = zipped([("config.json", large), *pairs[2:]], zipfile.ZIP_DEFLATED)
    yield "a description of 9 MB, deflated", deflated, "are read"
    for name, method in (("bzip2", zipfile.ZIP_BZIP2), ("lzma", zipfile.ZIP_LZMA)):
        yield name, zipped(pairs, method), f"packed by method {method}"
    yield "something before", b"PK" + data, "not where it should be"
    yield "something behind", data + b"x", "cut short, or has something behind"
    commented = io.BytesIO(data)
    with zipfile.ZipFile(commented, "a") as archive:
        archive.comment = b"PK\x05\x06" + bytes(18)
    yield "an end inside its comment", commented.getvalue(), ""
    yield "two of one name", _doubled(data), "two members of the name"
    yield from _patched_directories(data, weights)
    chosen = random.Random(3)
    for point in sorted(chosen.randrange(len(data)) for _ in range(20)):
        yield f"cut to {point} bytes", data[:point], ""


def flips(data: bytes, count: int) -> Iterator[tuple[str, bytes]]:
    """Archives with one flipped bit each; some bits mean nothing, such as those of a member's date."""
    chosen = random.Random(4)
    for _ in range(count):
        flipped = bytearray(data)
        place, bit = chosen.randrange(len(data)), chosen.randrange(8)
        flipped[place] ^= 1 << bit
        yield f"bit {bit} of byte {place}", bytes(flipped)
    for place in range(len(data) - 300, len(data)):  # the directory
        flipped = bytearray(data)
        flipped[place] ^= 1 << chosen.randrange(8)
        yield f"byte {place}", bytes(flipped)


def _doubled(data: bytes) -> bytes:
    """The archive with its weights renamed to those that are there already."""
    members = unzipped(data)
    other = zipped([*members.items(), ("model.weights.h6", members["model.weights.h5"])])
    return other.replace(b"model.weights.h6", b"model.weights.h5")


def _patched_directories(data: bytes, weights: bytes) -> Iterator[Case]:
    end = len(data) - 22
    begin = struct.unpack_from("<I", data, end + 16)[0]
    entries = []
    place = begin
    while data[place : place + 4] == b"PK\1\2":
        entries.append(place)
        place += 46 + sum(struct.unpack_from("<3H", data, place + 28))
    (target,) = (e for e in entries if data[e + 46 :].startswith(b"model.weights.h5"))

    def patched(offset: int, form: str, *values: int) -> bytes:
        changed = bytearray(data)
        struct.pack_into("<" + form, changed, offset, *values)
        return bytes(changed)

    yield "encrypted", patched(target + 8, "H", 1), "an encrypted member"
    yield "a lying size", patched(target + 20, "II", len(weights) + 8, len(weights) + 8), "beyond its end"
    yield "sizes that differ", patched(target + 24, "I", 1 << 31), "would unpack from"
    yield "a size of 4 GB", patched(target + 20, "II", 2**32 - 2, 2**32 - 2), "beyond its end"
    yield "another checksum", patched(target + 16, "I", 7), "its checksum does not match"
    yield "another header", patched(target + 42, "I", 1), "another header"
    yield "a header outside", patched(target + 42, "I", 2**32 - 1), "it refers to"
    yield "members that overlap", patched(target + 42, "I", 0), "another header"
    yield "stored, said to be deflated", patched(target + 10, "H", 8), "another header"
    yield "more members than there are", patched(end + 8, "HH", 9, 9), "ends early"
    yield "fewer members than there are", patched(end + 8, "HH", 2, 2), "something else besides"
    yield "another disk", patched(end + 4, "H", 1), "no Keras file"
    yield "a directory of 4 GB", patched(end + 12, "I", 2**32 - 1), "no Keras file"
    yield "a directory elsewhere", patched(end + 16, "I", 0), "not where it should be"
    locator = b"PK\6\7" + struct.pack("<IQI", 0, 0, 1)
    yield "64-bit records", data[:end] + locator + data[end:], "not where it should be"


# -------------------------------------------------------------------------------------------------- descriptions


def hostile_descriptions(data: bytes) -> Iterator[Case]:
    """What is wrong here is in front of the classifier, "predictions", or in the description as a whole."""
    for what, layer, expected in _evil_layers():

        def insert(config: dict[str, Any], layer: dict[str, Any] = layer) -> None:
            put_before(config, "predictions", copy.deepcopy(layer))

        yield what, described(data, insert), expected
    for what, change, expected in _evil_changes():
        yield what, described(data, change), expected
    for what, text, expected in (
        ("not JSON", b"{'a': 1}", "is not JSON"),
        ("a list", b"[1, 2]", "must be a JSON object"),
        ("not UTF-8", b'{"a": "\xff"}', "is not JSON"),
        ("a repeated name", b'{"class_name": "Functional", "class_name": "Sequential"}', "repeats a name"),
        ("not a number", b'{"a": NaN}', "which is not JSON"),
        ("a number of a million digits", b'{"a": ' + b"9" * 1_000_000 + b"}", "is not JSON"),
        ("deep nesting", b'{"a":' + b"[" * 90_000 + b"]" * 90_000 + b"}", "nested too deeply"),
        ("brackets without end", b"[" * 300_000, "is too large"),
        ("an empty object", b"{}", "the model is of class None"),
        ("an empty description", b"", "is not JSON"),
    ):
        yield what, described(data, text=text), expected


def _evil_layers() -> Iterator[tuple[str, dict[str, Any], str]]:
    code = marshal.dumps(compile("open('executed', 'w')", "evil", "exec")).hex()
    function = {"class_name": "__lambda__", "config": {"code": code, "defaults": None, "closure": None}}
    no = "cannot be represented"
    yield "a Lambda with code", {"class_name": "Lambda", "config": {"function": function}}, "a Lambda is code"
    old = {"function": [code, None, None], "function_type": "lambda"}
    yield "an old Lambda with code", {"class_name": "Lambda", "config": old}, "a Lambda is code"
    for module in ("os", "builtins.evil.", "evil.layers", "keras_evil", "tensorflow", "kerasx.layers"):
        yield f"a class of {module}", {"class_name": "Dense", "module": module}, "not one of Keras's own"
    registered = {"class_name": "Dense", "registered_name": "Evil>Dense"}
    yield "a registered class", registered, "not one of Keras's own"
    yield "a class by a path", {"class_name": "keras.utils.get_file"}, no
    yield "a module that is a list", {"class_name": "Dense", "module": ["keras"]}, "not one of Keras's own"
    gadget = {
        "module": "keras.utils",
        "class_name": "function",
        "config": "get_file",
        "registered_name": "function",
    }
    yield "a function for an activation", {"class_name": "Activation", "config": {"activation": gadget}}, no
    dense = {"class_name": "Dense", "config": {"units": 18, "activation": gadget}}
    yield "a function for a Dense's activation", dense, "code is not run"
    unsafe = {**gadget, "module": "keras.config", "config": "enable_unsafe_deserialization"}
    yield "the switch of safety", {"class_name": "Dense", "config": {"units": 18, "activation": unsafe}}, no
    wrapper = {"class_name": "TorchModuleWrapper", "config": {"module": {"class_name": "__bytes__", "value": code}}}
    yield "a pickle in a wrapper", {**wrapper, "module": "keras.layers"}, no
    yield "a saved model", {"class_name": "TFSMLayer", "config": {"filepath": "/etc"}}, no
    vocabulary = {"vocabulary": "/etc/passwd", "max_tokens": None}
    yield "a vocabulary in a file", {"class_name": "StringLookup", "config": vocabulary}, no
    for kind in ("Conv2D", "LSTM", "LayerNormalization", "Reshape", "PReLU", "MultiHeadAttention"):
        yield f"a {kind}", {"class_name": kind, "config": {"filters": 18, "kernel_size": 1}}, no
    slow = {"class_name": "Dense", "config": {"units": 10**9, "activation": "relu"}}
    yield "a Dense of a billion", slow, no
    yield "a Dense of true", {"class_name": "Dense", "config": {"units": True}}, no
    yield "a Dense of text", {"class_name": "Dense", "config": {"units": "18"}}, no
    yield "a Dense without weights", {"class_name": "Dense", "config": {"units": 18}}, "expected floats, shape (18, 18)"
    yield "an unknown activation", {"class_name": "Activation", "config": {"activation": "mish"}}, no
    yield "an odd slope", {"class_name": "LeakyReLU", "config": {"negative_slope": 0.3}}, no
    yield "a name of a kilobyte", {"class_name": "Evil" * 999, "config": {"name": "\n\x1b[2J" * 999}}, no
    nested: dict[str, Any] = {"class_name": "Flatten", "config": {"name": "inner"}, "inbound_nodes": []}
    for depth in range(12):
        nested = {"class_name": "Sequential", "config": {"name": f"s{depth}", "layers": [nested]}}
    yield "models in models in models", {**nested, "module": "keras"}, "nested deeper than"


def _evil_changes() -> Iterator[tuple[str, Change, str]]:
    def layer(name: str, **config: Any) -> Change:
        return lambda c: layer_of(c, name)["config"].update(config)

    yield "a subclass of somebody's own", lambda c: c.update(registered_name="Evil>Functional"), "is of class"
    yield "a class of somebody's own", lambda c: c.update(class_name="Evil"), "is of class Evil"
    yield "a module of somebody's own", lambda c: c.update(module="os"), "is of class"
    yield "no layers", lambda c: c["config"].pop("layers"), "lacks layers"
    yield "layers that are none", lambda c: c["config"].update(layers=[1, "x", None]), "that is no layer"
    yield "a million dense names", lambda c: layers_of(c).extend(copy.deepcopy(layers_of(c)[-1:]) * 2), "of one name"
    yield "a layer without a class", lambda c: layers_of(c)[3].pop("class_name"), "lacks class_name"
    yield "a class that is a list", lambda c: layers_of(c)[3].update(class_name=["Conv2D"]), "lacks class_name"
    yield "a layer without a name", _nameless, "without a name"
    yield "calls that are none", lambda c: layers_of(c)[3].update(inbound_nodes=[[["x"]]]), "without arguments"
    yield "calls that are text", lambda c: layers_of(c)[3].update(inbound_nodes=["x"]), "without arguments"
    yield "a call of nobody", lambda c: layers_of(c)[3].update(inbound_nodes=call("nobody")), "'nobody'"
    yield "no call", lambda c: layers_of(c)[3].update(inbound_nodes=[]), "takes no input"
    yield "a cycle", lambda c: layers_of(c)[3].update(inbound_nodes=call("predictions")), "in a cycle"
    yield "itself", lambda c: layers_of(c)[3].update(inbound_nodes=call(layers_of(c)[3]["name"])), "in a cycle"
    yield (
        "a million arguments",
        lambda c: layers_of(c)[3].update(inbound_nodes=call(*["input_layer"] * 3000)),
        "too many",
    )
    history = [{"args": [{"class_name": "__keras_tensor__", "config": {"keras_history": ["input_layer", -1, 10**9]}}]}]
    yield "a call from the future", lambda c: layers_of(c)[3].update(inbound_nodes=history), "in a way that is none"
    yield "no output", lambda c: c["config"].update(output_layers=[]), "0 outputs"
    yield "two outputs", _second_output, "2 outputs"
    yield "an output that is not there", lambda c: c["config"].update(output_layers=[["x", 0, 0]]), "does not have"
    yield "6,000 layers", _many_layers, "more than 5,000 layers"
    yield "models that unfold without end", _unfolding, "more than 5,000 layers"
    yield "the trunk called in training", _training, "training=True"
    yield "another epsilon", layer("block1_conv1_bn", epsilon=1e-5), "has epsilon 1e-05, expected 0.001"
    yield "another axis", layer("block2_sepconv1_bn", axis=1), "along axis 1"
    yield "no centre", layer("block2_sepconv1_bn", center=False), "has center False"
    yield "another stride", layer("block2_sepconv1", strides=[2, 2]), "has strides (2, 2)"
    yield "a stride of nothing", layer("block2_sepconv1", strides=[0, 0]), "two sizes"
    yield "another padding", layer("block2_sepconv1", padding="valid"), "has padding valid"
    yield "a dilation", layer("block2_sepconv1", dilation_rate=[2, 2]), "dilation_rate"
    yield "groups", layer("block1_conv2", groups=2), "its groups is 2"
    yield "channels first", layer("block1_conv1", data_format="channels_first"), "its data_format is channels_first"
    yield "a kernel of 5", layer("block5_sepconv1", kernel_size=[5, 5]), "has kernel_size (5, 5)"
    yield "a bias", layer("block5_sepconv1", use_bias=True), "has use_bias True"
    yield "another width", layer("block5_sepconv1", filters=13), "has filters 13"
    yield "a width of a billion", layer("block5_sepconv1", filters=10**9), "a number of them"
    yield "wide throughout", _wide, "has shape"
    yield (
        "another activation inside",
        layer("block5_sepconv1_act", activation="elu"),
        "stands where an Xception has nothing of its kind",
    )
    yield "a pool of 2", layer("block2_pool", pool_size=[2, 2]), "has pool_size (2, 2)"
    yield "a shortcut from elsewhere", _crossed, "where BatchNormalization was expected"
    yield "a layer used twice", _shared, ""
    yield "weights of another layer", layer("predictions", units=4), "shape (18, 4)"
    yield "a result from the inside", _inside, "no"
    yield "an input of text", _input("image"), "expected images"
    yield "an input of a billion", _input([None, 10**9, 10**9, 3]), "expected images"
    yield "an input of fractions", _input([None, 1.5, 1.5, 3]), "expected images"
    yield "an input too small", _input([None, 8, 8, 3]), "input_size"
    for what, step, expected in (
        ("a Lambda in front", {"class_name": "Lambda", "config": {"function": "evil"}}, "a Lambda is code"),
        (
            "a convolution in front",
            {"class_name": "Conv2D", "config": {"filters": 3, "kernel_size": 1}},
            "there is no tensor",
        ),
        ("a negative scale", {"class_name": "Rescaling", "config": {"scale": -1.0}}, "in a way that is none"),
        ("a scale of nothing", {"class_name": "Rescaling", "config": {"scale": 0}}, "in a way that is none"),
        ("a scale of text", {"class_name": "Rescaling", "config": {"scale": "1"}}, "where numbers are expected"),
        ("a scale without end", {"class_name": "Rescaling", "config": {"scale": 10**400}}, "numbers are expected"),
        ("20 scales", {"class_name": "Rescaling", "config": {"scale": [1.0] * 20}}, "numbers are expected"),
        ("two scales", {"class_name": "Rescaling", "config": {"scale": [1.0, 2.0]}}, "in a way that is none"),
        (
            "a resize to a billion",
            {"class_name": "Resizing", "config": {"height": 10**6, "width": 9}},
            "each 1 to 8192",
        ),
        ("an unmeasured normalisation", {"class_name": "Normalization", "config": {}}, "it has 0 variables"),
    ):
        yield what, lambda c, s=step: put_before(c, "block1_conv1", copy.deepcopy(s)), expected


def _nameless(config: dict[str, Any]) -> None:
    layers_of(config)[3].pop("name")
    layers_of(config)[3]["config"].pop("name")


def _second_output(config: dict[str, Any]) -> None:
    config["config"]["output_layers"] = [["predictions", 0, 0], ["avg_pool", 0, 0]]


def _many_layers(config: dict[str, Any]) -> None:
    for i in range(6_000):
        put_before(config, "predictions", {"class_name": "ReLU", "config": {"name": f"r{i}"}})


def _unfolding(config: dict[str, Any]) -> None:
    """Each model calls the one inside it 60 times: 60 to the sixth calls."""
    inner: dict[str, Any] = {"class_name": "ReLU", "config": {"name": "relu"}}
    for depth in range(6):
        inner["inbound_nodes"] = [*call("in"), *call("in") * 59]
        inner["name"] = inner["config"]["name"]
        inner = {
            "class_name": "Functional",
            "config": {
                "name": f"model{depth}",
                "layers": [{"class_name": "InputLayer", "config": {"name": "in"}, "inbound_nodes": []}, inner],
                "input_layers": ["in", 0, 0],
                "output_layers": [inner["name"], 0, 0],
            },
        }
    put_before(config, "predictions", inner)


def _training(config: dict[str, Any]) -> None:
    layer_of(config, "block5_sepconv1_bn")["inbound_nodes"][0]["kwargs"] = {"training": True}


def _wide(config: dict[str, Any]) -> None:
    for layer in layers_of(config):
        if layer["config"].get("filters") == 12:
            layer["config"]["filters"] = 16_000


def _crossed(config: dict[str, Any]) -> None:
    adds = [layer for layer in layers_of(config) if layer["class_name"] == "Add"]
    first, second = (adds[i]["inbound_nodes"][0]["args"][0] for i in (-2, -1))
    second[1] = first[1]


def _shared(config: dict[str, Any]) -> None:
    """Two calls of the same weights: the second middle module calls the first one's convolution."""
    gone, kept = layer_of(config, "block6_sepconv1"), layer_of(config, "block5_sepconv1")
    kept["inbound_nodes"] += gone["inbound_nodes"]
    layers_of(config).remove(gone)
    layer_of(config, "block6_sepconv1_bn")["inbound_nodes"][0]["args"][0]["config"]["keras_history"] = [
        kept["name"],
        1,
        0,
    ]


def _inside(config: dict[str, Any]) -> None:
    put_before(config, "predictions", {"class_name": "Add", "config": {"name": "evil"}})
    layer_of(config, "evil")["inbound_nodes"] = call("top", "avg_pool")
    top = {"class_name": "GlobalAveragePooling2D", "module": "keras.layers", "config": {"name": "top"}, "name": "top"}
    layers_of(config).insert(1, {**top, "registered_name": None, "inbound_nodes": call("block1_conv1")})


def _input(shape: Any) -> Change:
    return lambda config: layers_of(config)[0]["config"].update(batch_shape=shape)
