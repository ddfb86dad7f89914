"""Setting: a config field with its default, accepted values and resume policy.

`config.py` declares its fields with `setting(default, ACCEPTED, POLICY)`. The functions here build such dataclasses
from nested values and command-line overrides, check the ranges and list the keys. No particular key is known here.
"""

import dataclasses
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from clip_har_jax.errors import UserError, nearest

# The effect of a changed value when a run is continued.
FREE = "free"  # allowed
WARNED = "warned"  # allowed; logged and recorded in run.json
REFUSED = "refused"  # an error: with the new value it would be another run


@dataclass(frozen=True)
class Range:
    """Bounds of a number. NaN is never inside."""

    above: float | None = None
    at_least: float | None = None
    at_most: float | None = None

    def check(self, key: str, value: Any) -> None:
        """Raise UserError if `value` is out of bounds."""
        fits = (
            (self.above is None or value > self.above)
            and (self.at_least is None or value >= self.at_least)
            and (self.at_most is None or value <= self.at_most)
            and value == value
        )
        if not fits:
            raise UserError(f"config key {key!r} must be {self}, not {value!r}")

    def __str__(self) -> str:
        if self.at_least is not None and self.at_most is not None:
            return f"from {self.at_least:g} to {self.at_most:g}"
        bounds = (
            None if self.above is None else f"above {self.above:g}",
            None if self.at_least is None else f"{self.at_least:g} or more",
            None if self.at_most is None else f"at most {self.at_most:g}",
        )
        return " and ".join(bound for bound in bounds if bound)


@dataclass(frozen=True)
class Choices:
    """The accepted names."""

    names: tuple[str, ...]

    def check(self, key: str, value: Any) -> None:
        """Raise UserError if `value` isn't one of the names."""
        if value not in self.names:
            raise UserError(f"config key {key!r} is {value!r}; {nearest(str(value), list(self.names))}")

    def __str__(self) -> str:
        return ", ".join(self.names)


@dataclass(frozen=True)
class Anything:
    """Any value of the field's type; other code checks it, such as the parser of a SPEC."""

    def check(self, key: str, value: Any) -> None:
        """Accept `value`."""

    def __str__(self) -> str:
        return ""


POSITIVE = Range(above=0.0)
NOT_NEGATIVE = Range(at_least=0.0)
SHARE = Range(at_least=0.0, at_most=1.0)
ANYTHING = Anything()


def one_of(*names: str) -> Choices:
    return Choices(names)


@dataclass(frozen=True)
class Setting:
    """The metadata of a config field."""

    accepted: Range | Choices | Anything
    at_resume: str


def setting(default: Any, accepted: Range | Choices | Anything, at_resume: str) -> Any:
    """Return a dataclass field with its metadata.

    Args:
      default: the value if none is set.
      accepted: the accepted values; for a tuple, of each item. None is accepted if the type allows it.
      at_resume: FREE, WARNED or REFUSED.
    """
    metadata = {"setting": Setting(accepted, at_resume)}
    if isinstance(default, dict):
        return dataclasses.field(default_factory=lambda: dict(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def leaves(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted key, value) of every setting of a config dataclass."""
    for item in dataclasses.fields(config):
        value = getattr(config, item.name)
        if dataclasses.is_dataclass(value):
            yield from leaves(value, f"{prefix}{item.name}.")
        else:
            yield prefix + item.name, value


def settings_of(cls: type, prefix: str = "") -> Iterator[tuple[str, Any, Setting | None]]:
    """Yield (dotted key, type, setting) of every field of a config dataclass; the setting is None if it has none."""
    hints = typing.get_type_hints(cls)
    for item in dataclasses.fields(cls):
        if dataclasses.is_dataclass(hints[item.name]):
            yield from settings_of(hints[item.name], f"{prefix}{item.name}.")
        else:
            yield prefix + item.name, hints[item.name], item.metadata.get("setting")


def check_values(config: Any) -> None:
    """Check every value of a config against the range of its field.

    Raises:
      UserError: a value is out of range or not one of the choices.
    """
    values = dict(leaves(config))
    for key, _, found in settings_of(type(config)):
        value = values[key]
        for item in value if isinstance(value, tuple) else (value,):
            if item is not None and found is not None:
                found.accepted.check(key, item)


def build(cls: type, values: Mapping[str, Any], prefix: str = "") -> Any:
    """Return an instance of the dataclass `cls` with these nested values; other fields keep their defaults.

    Raises:
      UserError: an unknown key or a value of the wrong type.
    """
    hints = typing.get_type_hints(cls)
    arguments = {}
    for name, value in values.items():
        if name not in hints:
            raise UserError(f"config key {prefix + str(name)!r} is unknown; {nearest(str(name), list(hints))}")
        if dataclasses.is_dataclass(hints[name]):
            if not isinstance(value, Mapping):
                raise UserError(f"config key {prefix + name!r} holds keys of its own, not {value!r}")
            arguments[name] = build(typing.cast(type, hints[name]), value, f"{prefix}{name}.")
        else:
            arguments[name] = _typed(value, hints[name], prefix + name)
    return cls(**arguments)


def _typed(value: Any, hint: Any, key: str) -> Any:
    """Return `value` as the type `hint`: an int can become a float, a list a tuple; nothing else is converted."""
    wrong = UserError(f"config key {key!r} takes {getattr(hint, '__name__', hint)}, not {value!r}")
    if isinstance(hint, types.UnionType):
        inner = next(arm for arm in typing.get_args(hint) if arm is not type(None))
        return None if value is None else _typed(value, inner, key)
    origin = typing.get_origin(hint)
    if origin is tuple:
        if not isinstance(value, (tuple, list)):
            raise wrong
        return tuple(_typed(item, typing.get_args(hint)[0], key) for item in value)
    if origin is dict:
        if not isinstance(value, Mapping):
            raise wrong
        return {str(name): _typed(item, typing.get_args(hint)[1], f"{key}.{name}") for name, item in value.items()}
    if hint is float and type(value) is int:
        return float(value)
    if type(value) is not hint:  # isinstance would accept a bool as an int
        raise wrong
    return value


def merge_values(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    """Return both nested mappings merged; values of `second` have precedence."""
    merged = dict(first)
    for key, value in second.items():
        merged[key] = merge_values(merged.get(key, {}), value) if isinstance(value, Mapping) else value
    return merged


def apply_overrides(config: Any, overrides: Sequence[str]) -> dict[str, Any]:
    """Return the nested values of a config, changed by `--config.KEY=VALUE` overrides.

    Raises:
      UserError: an unknown key, or a value that can't be read as the field's type.
    """
    from absl import flags
    from ml_collections import ConfigDict, config_flags

    flat = dict(leaves(config))
    for override in overrides:
        _check_key(override_key(override), flat)
    tree: dict[str, Any] = {}
    for key, value in flat.items():
        *parents, name = key.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = _placeholder(type(config), key) if value is None else value
    argv = ["", *overrides]
    flag_values = flags.FlagValues()
    holder = config_flags.DEFINE_config_dict("config", ConfigDict(tree), flag_values=flag_values, sys_argv=argv)
    try:
        flag_values(argv)
    except (flags.Error, ValueError, TypeError) as error:
        said = " ".join(str(error).split())
        named = said.startswith("flag --")  # absl says which
        raise UserError(said.removeprefix("flag ") if named else f"{' '.join(overrides)}: {said}") from error
    return holder.value.to_dict()


def override_key(override: str) -> str:
    """Return the dotted key that `--config.KEY=VALUE` sets."""
    return override.lstrip("-").split("=", 1)[0].removeprefix("config.")


def _placeholder(cls: type, key: str) -> Any:
    """Return an empty field of an ml_collections config that accepts the type of `key`."""
    from ml_collections import config_dict

    hint: Any = cls
    for name in key.split("."):
        hint = typing.get_type_hints(hint)[name]
    return config_dict.placeholder(typing.get_args(hint)[0])


def _check_key(key: str, flat: Mapping[str, Any]) -> None:
    if key not in flat:
        last = {name.rsplit(".", 1)[-1]: name for name in flat}
        hint = nearest(key, list(flat))
        if "did you mean" not in hint:  # the section may be missing: learning_rate instead of optim.learning_rate
            name = key.rsplit(".", 1)[-1]
            hint = f"did you mean {last[name]!r}?" if name in last else hint
        raise UserError(f"--config.{key}: unknown key; {hint}")
