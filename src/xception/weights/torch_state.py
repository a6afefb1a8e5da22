"""Where the network's tensors are in what a PyTorch file holds: a state dict, wrapped or not, or a whole module.

Everything here works on the inert values of `inert_pickle`, which may contain themselves and each other any number of
times: no container is searched twice, and the steps of a walk are counted.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from xception.errors import WeightsError
from xception.weights.inert_values import Global, PersistentId, Record, Table
from xception.weights.torch_tensors import is_tensor

# Under which names training scripts keep the weights; an average of them is what one evaluates.
AVERAGES = ("state_dict_ema", "model_ema", "ema_state_dict", "ema_model", "ema")
WRAPPERS = ("state_dict", "model_state_dict", "model", "net", "network", "module", "weights", "params", "model_weights")
CLASS_LISTS = ("class_names", "classes", "class_to_idx")

MAX_STEPS = 200_000
MAX_DEPTH = 64
MAX_NAME = 400
_MAX_ATTRIBUTE = 8  # numbers in a tuple that is kept

Attribute = bool | int | float | str | tuple[int, ...] | None


@dataclass(frozen=True, kw_only=True)
class State:
    """A network's tensors as records, by name.

    `wrapper` is the path of names under which they were found, `average` whether that is an average. Of a whole
    module `modules` holds, by its path, the class and the plain attributes of every module.
    """

    tensors: dict[str, object]
    wrapper: tuple[str, ...] = ()
    average: bool = False
    modules: dict[str, dict[str, Attribute]] = field(default_factory=dict)
    class_names: tuple[str, ...] | None = None


def find_state(value: object) -> State:
    """The state dict inside of what was pickled. Raises `WeightsError` where there is none."""
    search = _Search()
    found = search.find(value, ())
    if found is None:
        raise WeightsError(f"no weights found: expected a state dict or a module, got {_describe(value)}")
    names = _class_names(search.items(value) or [])
    return State(
        tensors=found.tensors,
        wrapper=found.wrapper,
        average=any(name in AVERAGES for name in found.wrapper),
        modules=found.modules,
        class_names=names,
    )


class _Search:
    def __init__(self) -> None:
        self._steps = MAX_STEPS
        self._searched: set[int] = set()

    def find(self, value: object, path: tuple[str, ...]) -> State | None:
        if id(value) in self._searched:
            return None
        self._searched.add(id(value))
        if self._attributes(value) is not None:
            tensors, modules = self._walk(value)
            return State(tensors=tensors, wrapper=path, modules=modules) if tensors else None
        items = self.items(value)
        if items is None or len(path) > MAX_DEPTH:
            return None
        named = {key: item for key, item in items if isinstance(key, str)}
        for name in (*AVERAGES, *WRAPPERS):
            if name in named and (found := self.find(named[name], (*path, name))) is not None:
                return found
        own: dict[str, object] = {}
        for key, item in items:
            if isinstance(key, str) and is_tensor(item):
                _add(own, key, item)
        return State(tensors=own, wrapper=path) if own else None

    def items(self, value: object) -> list[tuple[object, object]] | None:
        """What a dict, or an object that is filled like one, holds; None for anything else."""
        if not isinstance(value, Table):
            return None
        pairs = value.pairs
        if isinstance(value, Record):
            if is_tensor(value) or self._attributes(value) is not None:
                return None
            if str(value.function) == "collections.OrderedDict" and isinstance(value.args, tuple):
                pairs = [*_pairs_of(value.args), *pairs]
        self._step(len(pairs) + 1)
        return [(key if isinstance(key, str | int) else None, item) for key, item in pairs]

    def _walk(self, root: object) -> tuple[dict[str, object], dict[str, dict[str, Attribute]]]:
        """What `state_dict()` of a pickled module would give, and what is known of its modules."""
        tensors: dict[str, object] = {}
        modules: dict[str, dict[str, Attribute]] = {}
        waiting: list[tuple[str, object, int]] = [("", root, 0)]
        while waiting:
            prefix, module, depth = waiting.pop()
            attributes = self._attributes(module)
            if attributes is None:
                raise WeightsError(f"its module {prefix[:-1]!r:.90} is none")
            if depth > MAX_DEPTH or len(prefix) > MAX_NAME:
                raise WeightsError("its modules are nested too deeply")
            self._step(1 + len(attributes))
            modules[prefix.removesuffix(".")] = _plain(module, attributes)
            hidden = _texts(attributes.get("_non_persistent_buffers_set"))
            for kind in ("_parameters", "_buffers"):
                for name, tensor in self._named(attributes[kind], prefix):
                    if tensor is not None and not (kind == "_buffers" and name in hidden):
                        _add(tensors, prefix + name, tensor)
            for name, inner in reversed(self._named(attributes["_modules"], prefix)):
                if inner is not None:
                    waiting.append((f"{prefix}{name}.", inner, depth + 1))
        return tensors, modules

    def _attributes(self, value: object) -> dict[str, object] | None:
        """The attributes of a pickled module; None for what is no module."""
        if not isinstance(value, Record):
            return None
        state = value.state
        if isinstance(state, tuple) and len(state) == 2:
            state = state[0]  # the other one holds slots
        if not isinstance(state, Table):
            return None
        self._step(len(state.pairs))
        attributes = {key: item for key, item in state.pairs if isinstance(key, str)}
        return attributes if attributes.keys() >= {"_parameters", "_buffers", "_modules"} else None

    def _named(self, value: object, prefix: str) -> list[tuple[str, object]]:
        items = self.items(value)
        named = [(key, item) for key, item in items or [] if isinstance(key, str) and "." not in key]
        if items is None or len(named) != len(items):
            raise WeightsError(f"its module {prefix[:-1]!r:.90} is damaged: its parts have no names")
        return named

    def _step(self, count: int) -> None:
        self._steps -= count
        if self._steps < 0:
            raise WeightsError("what it holds is nested too widely, or contains itself")


def _add(tensors: dict[str, object], name: str, tensor: object) -> None:
    if name in tensors:
        raise WeightsError(f"two tensors have the name {name!r:.90}")
    if len(name) > MAX_NAME:
        raise WeightsError(f"a tensor has a name of {len(name):,} characters")
    tensors[name] = tensor


def _pairs_of(args: tuple[object, ...]) -> list[tuple[object, object]]:
    """What Python 2 gave to an OrderedDict when it was made: a list of lists of two."""
    if len(args) != 1 or not isinstance(args[0], list):
        return []
    return [(item[0], item[1]) for item in args[0] if isinstance(item, list | tuple) and len(item) == 2]


def _plain(module: object, attributes: dict[str, object]) -> dict[str, Attribute]:
    """The class of a module, under "class", and those of its attributes that are numbers, texts or short tuples."""
    plain: dict[str, Attribute] = {"class": _class_of(module)}
    for name, value in attributes.items():
        if value is None or isinstance(value, bool | int | float | str):
            plain[name] = value
        if isinstance(value, tuple) and len(value) <= _MAX_ATTRIBUTE and all(type(item) is int for item in value):
            plain[name] = value
    return plain


def _class_of(value: object) -> str:
    """The full name of the class of a pickled object, as the file has it."""
    if not isinstance(value, Record):
        return type(value).__name__
    made_by: Any = value.function
    if str(made_by) == "copy_reg._reconstructor" or str(made_by) == "copyreg._reconstructor":
        made_by = value.args[0] if isinstance(value.args, tuple) and value.args else None
    if isinstance(made_by, PersistentId) and isinstance(made_by.value, tuple) and len(made_by.value) > 1:
        made_by = made_by.value[1]  # ("module", class, file, source)
    return str(made_by) if isinstance(made_by, Global) else "unknown"


def _texts(value: object) -> set[str]:
    if isinstance(value, Record) and isinstance(value.args, tuple) and len(value.args) == 1:
        value = value.args[0]  # set([...])
    return {item for item in value if isinstance(item, str)} if isinstance(value, list | tuple) else set()


def _class_names(items: Iterable[tuple[object, object]]) -> tuple[str, ...] | None:
    """The names of the classes, where a training script kept them beside the weights."""
    for key, value in items:
        if key not in CLASS_LISTS:
            continue
        if isinstance(value, Table):
            places = {place: name for name, place in value.pairs if isinstance(name, str) and type(place) is int}
            if len(places) == len(value.pairs) and sorted(places) == list(range(len(places))):
                return tuple(places[place] for place in range(len(places))) or None
        elif isinstance(value, list | tuple) and value and all(isinstance(name, str) for name in value):
            return tuple(str(name) for name in value)
    return None


def _describe(value: object) -> str:
    if isinstance(value, Record):
        return f"an object of {_class_of(value)!r:.90}"
    if isinstance(value, Table):
        keys = [repr(key)[:40] for key, _ in value.pairs[:6] if isinstance(key, str)]
        return f"a dict with {', '.join(keys)}" + (" and more" if len(value.pairs) > 6 else "") if keys else "a dict"
    return f"a {type(value).__name__}"
