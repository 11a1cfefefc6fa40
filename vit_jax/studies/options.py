"""What the command lines of studies share: fields of a configuration, lists of values, and splits to hold out, as text."""

import argparse
import ast
import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vit_jax.config import Config

_OPENING, _CLOSING = "([{", ")]}"
# "train[90%:]" or "train[:45000]": a split, and one bound in per cent or as a number of images.
_HELD_OUT = re.compile(r"([\w-]+)\[(?:(?P<first>-?\d+%?):|:(?P<last>-?\d+%?))\]")


def numbers(kind: type, zero: bool = False) -> Any:
    """A parser, for `argparse`, of numbers with commas between them, above 0 or, with `zero`, not below; of type `kind`."""

    def parse(text: str) -> tuple[Any, ...]:
        try:
            values = tuple(kind(word) for word in text.split(","))
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r}: expected numbers with commas between them") from None
        if not all(value > 0 or (zero and value == 0) for value in values):
            raise argparse.ArgumentTypeError(f"{text!r}: expected numbers above 0{' or 0' * zero}")
        return values

    return parse


def split_outside(text: str, separators: str) -> list[str]:
    """Splits a text at characters that are outside of brackets and quotes: "(0.3,1.0),(0.5,1.0)" has two parts at commas.

    Raises:
      ValueError: if a bracket or a quote is not closed.
    """
    parts, depth, quote = [""], 0, ""
    for character in text:
        if character in separators and not depth and not quote:
            parts.append("")
            continue
        parts[-1] += character
        if quote:
            quote = "" if character == quote else quote
        elif character in "'\"":
            quote = character
        else:
            depth += (character in _OPENING) - (character in _CLOSING)
    if depth or quote:
        raise ValueError("a bracket or a quote is not closed")
    return parts


def set_field(config: "Config", text: str, option: str = "--config", refused: Mapping[str, str] = MappingProxyType({})) -> str:
    """Sets the field that "section.field=value" names; returns its name.

    Strings need no quotes, and may have them; true and false may begin with a small letter. training.steps takes the place of
    the configuration's training.epochs.

    Args:
      config: is changed.
      text: of the command line.
      option: named by errors.
      refused: name of a field → why the study does not let it be set.

    Raises:
      ConfigError: if there is no such field, it is refused, or the value cannot be read. Its type is left to
        `config_rules.check`.
    """
    from vit_jax.config import fields
    from vit_jax.errors import ConfigError

    name, _, value = text.partition("=")
    known = fields(config)
    if name in refused:
        raise ConfigError(f"{option} {text}: {refused[name]}")
    if name not in known or not value:
        near = "" if name in known else _nearest(name, list(known))
        raise ConfigError(
            f"{option} {text}: expected FIELD=VALUE with a field of a configuration, such as training.batch_size=64{near}"
        )
    node: Any = config
    *sections, field = name.split(".")
    for section in sections:
        node = getattr(node, section)
    kind = known[name][1]
    try:
        setattr(node, field, _value(value, kind))
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        raise ConfigError(f"{option} {text}: {name} must be of type {getattr(kind, '__name__', kind)}, got {value!r}") from None
    if name == "training.steps":
        config.training.epochs = 0.0  # as `vit_jax train` does, or the steps would be those of the epochs
    return name


def _nearest(name: str, known: list[str]) -> str:
    import difflib

    near = difflib.get_close_matches(name, known, n=1, cutoff=0.7)
    return f"; the nearest is {near[0]}" if near else ""


def _value(text: str, kind: Any) -> Any:
    if kind is str and text[0] not in "'\"":
        return text
    value = ast.literal_eval({"true": "True", "false": "False"}.get(text, text))
    return float(value) if kind is float and type(value) is int else value


def _bound(text: str, trained: str, option: str) -> tuple[str, bool]:
    """The bound of a held-out part of the training split `trained`, and whether the part begins there.

    Raises:
      ConfigError: if the part has another form, or is not of that split.
    """
    from vit_jax.errors import ConfigError

    found = _HELD_OUT.fullmatch(text)
    bound = (found["first"] or found["last"]) if found else "0"
    number = int(bound.rstrip("%"))
    if found is None or not number or (bound.endswith("%") and abs(number) >= 100):
        raise ConfigError(
            f"{option} {text!r}: expected a part of the training images at their end or beginning, such as 'train[90%:]' or "
            "'train[:5000]'"
        )
    if "[" in trained:
        raise ConfigError(f"{option} {text!r} needs a whole split as data.train_split, which is {trained!r}")
    if found[1] != trained:
        raise ConfigError(f"{option} {text!r}: the training split is {trained!r}, and only a part of that can be held out")
    return bound, bool(found["first"])


def hold_out(config: "Config", text: str, option: str = "--held_out") -> None:
    """Measures a run on training images that it is not trained on, so that no test image is read.

    Sets data.test_split to the split, data.train_split to all other training images, and data.validation_split to "".

    Args:
      config: is changed.
      text: "train[90%:]" or "train[:10%]", with any bound in per cent or as a number of images, of the training split.
      option: named by errors.

    Raises:
      ConfigError: if the split has another form, or is not of the training split.
    """
    from vit_jax.data.splits import names
    from vit_jax.data.tasks import task

    row, config.data.validation_split = task(config.data.task), ""
    trained = names(row, config.data).train
    bound, begins = _bound(text, trained, option)
    config.data.train_split = f"{trained}[:{bound}]" if begins else f"{trained}[{bound}:]"
    config.data.test_split = text


def held_out_range(text: str, trained: str, count: int, option: str = "--held_out") -> tuple[int, int]:
    """The first position of held-out images among `count` training images, and the one behind the last.

    Args:
      text: as of `hold_out`; "" for the last tenth.
      trained: the training split.
      count: of its images.
      option: named by errors.

    Raises:
      ConfigError: as `hold_out`, and if all images or none are held out.
    """
    from vit_jax.errors import ConfigError

    bound, begins = _bound(text, trained, option) if text else ("90%", True)
    number = int(bound.rstrip("%"))
    at = round(number * count / 100) if bound.endswith("%") else number  # as TFDS rounds
    at = at + count if number < 0 else at
    if not 0 < at < count:
        raise ConfigError(f"{option} {text!r}: some of the {count:,} training images must be held out, and some must not")
    return (at, count) if begins else (0, at)
