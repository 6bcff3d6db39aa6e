"""The models that can be asked for: data, parsed and checked. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal, get_args

import yaml

OptionType = Literal["integer", "number", "string", "boolean"]
OptionValue = int | float | str | bool


class CatalogueError(Exception):
    """The file is not a catalogue."""


@dataclass(frozen=True, slots=True)
class Option:
    """A parameter of a model. Bounds are of the number, or of the string's length."""

    name: str
    type: OptionType
    min: float
    max: float
    choices: tuple[str, ...] = ()
    """The strings that it takes, where there are only these."""
    is_priced: bool = False
    """Whether the price depends on it: then the price book names its values."""

    def accepts(self, value: OptionValue | None) -> bool:
        """Whether the value has the type and lies within the bounds."""
        if self.type == "boolean":
            return isinstance(value, bool)
        if self.type == "string":
            if not isinstance(value, str):
                return False
            return value in self.choices if self.choices else self.min <= len(value) <= self.max
        if isinstance(value, bool) or not isinstance(value, int | float):
            return False
        whole = self.type == "number" or float(value).is_integer()
        return whole and self.min <= value <= self.max

    def describe(self) -> str:
        """For people: `seed (integer, 0 to 10)`."""
        if self.type == "boolean":
            return f"{self.name} (boolean)"
        if self.choices:
            return f"{self.name} (one of {', '.join(self.choices)})"
        bounds = f"{self.min:.15g} to {self.max:.15g}"
        unit = " characters" if self.type == "string" else ""
        return f"{self.name} ({self.type}, {bounds}{unit})"


@dataclass(frozen=True, slots=True)
class Model:
    """What one model makes. The first size and the first length are its defaults."""

    name: str
    display_name: str
    sizes: tuple[tuple[int, int], ...]
    seconds: tuple[int, ...]
    max_variants: int
    variants_by_size: Mapping[tuple[int, int], int]
    """Sizes that make another number of variants than max_variants."""
    text_to_video: bool
    max_input_images: int
    """0: it makes none from images."""
    input_images_at_any_frame: bool
    max_input_video_seconds: float
    """0: it makes none from a video."""
    frames_per_second: int
    """By which inputs' frames are counted; 0: not known."""
    options: Mapping[str, Option]
    retires_at: datetime | None

    def variants_at(self, size: tuple[int, int]) -> int:
        """Most variants of one request in this size."""
        return self.variants_by_size.get(size, self.max_variants)


@dataclass(frozen=True, slots=True)
class Catalogue:
    """Models by name, the default first."""

    models: Mapping[str, Model]

    @property
    def default(self) -> Model:
        """What an empty model name stands for."""
        return next(iter(self.models.values()))

    @property
    def names(self) -> str:
        """For people."""
        return ", ".join(self.models)


def parse(text: str, offered: str = "") -> Catalogue:
    """Reads the YAML; of its models those that are offered, all where that is empty. Raises CatalogueError that names
    the model.
    """
    document = yaml.safe_load(text)
    if not isinstance(document, dict) or not document.get("models"):
        raise CatalogueError("the catalogue has no models")
    models: dict[str, Model] = {}
    for entry in document["models"]:
        model = _model(entry)
        if model.name in models:
            raise CatalogueError(f"{model.name} is there twice")
        models[model.name] = model
    names = [name.strip() for name in offered.split(",") if name.strip()]
    if unknown := [name for name in names if name not in models]:
        raise CatalogueError(f"the catalogue has no {', '.join(unknown)}")
    return Catalogue({name: models[name] for name in models if not names or name in names})


def _model(entry: dict[str, Any]) -> Model:
    name = str(entry.get("name", ""))
    try:
        by_size = dict(entry.get("variants_by_size", {}))
        retires_at = entry.get("retires_at")
        model = Model(
            name=name,
            display_name=str(entry.get("display_name", name)),
            sizes=tuple(_size(size) for size in entry["sizes"]),
            seconds=tuple(int(seconds) for seconds in entry["seconds"]),
            max_variants=int(entry.get("max_variants", 1)),
            variants_by_size={_size(size): int(most) for size, most in by_size.items()},
            text_to_video=bool(entry["text_to_video"]),
            max_input_images=int(entry["max_input_images"]),
            input_images_at_any_frame=bool(entry.get("input_images_at_any_frame", False)),
            max_input_video_seconds=float(entry.get("max_input_video_seconds", 0)),
            frames_per_second=int(entry.get("frames_per_second", 0)),
            options={key: _option(key, item) for key, item in entry.get("options", {}).items()},
            retires_at=_moment(retires_at) if retires_at else None,
        )
    except (KeyError, TypeError, ValueError) as error:
        raise CatalogueError(f"model {name or '?'}: {error!r}") from error
    if not (model.name and model.sizes and model.seconds and model.max_variants > 0):
        raise CatalogueError(f"model {name or '?'} needs a name, sizes, seconds and max_variants")
    if model.input_images_at_any_frame and not model.frames_per_second:
        raise CatalogueError(
            f"model {model.name}: frames are named, so frames_per_second is needed"
        )
    if strange := set(model.variants_by_size) - set(model.sizes):
        raise CatalogueError(f"model {model.name}: variants_by_size has sizes it lacks: {strange}")
    return model


def _size(text: str) -> tuple[int, int]:
    width, height = str(text).split("x")
    return int(width), int(height)


def _option(name: str, item: dict[str, Any]) -> Option:
    if item["type"] not in get_args(OptionType):
        raise ValueError(f"option {name} has no type {item['type']!r}")
    choices = tuple(str(choice) for choice in item.get("choices", ()))
    option = Option(
        name=name,
        type=item["type"],
        min=float(item.get("min", 0)),
        max=float(item.get("max", 0)),
        choices=choices,
        is_priced=bool(item.get("priced", False)),
    )
    if choices and option.type != "string":
        raise ValueError(f"option {name} has choices and is no string")
    bounded = {"min", "max"} <= item.keys() and option.min <= option.max
    if option.type != "boolean" and not choices and not bounded:
        raise ValueError(f"option {name} has no bounds: min and max are needed")
    if option.is_priced and option.type == "string" and not choices:
        raise ValueError(f"option {name} is priced, and a free text: choices are needed")
    return option


def _moment(value: object) -> datetime:
    moment = value if isinstance(value, datetime) else datetime.fromisoformat(str(value))
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)
