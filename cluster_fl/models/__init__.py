"""The models, by the name that a configuration gives."""

from __future__ import annotations

import difflib
import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

from cluster_fl.errors import UserError
from cluster_fl.models.layered import Layered
from cluster_fl.models.seeded import seeded

__all__ = ["MODELS", "Layered", "Recipe", "build", "names"]


@dataclass(frozen=True)
class Recipe:
    """A function ``package.module:function`` that makes a model, and the arguments that a name fixes.

    The function's module is imported when it is needed: torchvision's takes a second.
    """

    function: str
    fixed: Mapping[str, Any] = field(default_factory=dict)


_HERE = "cluster_fl.models."
_TORCHVISION = _HERE + "torchvision_resnet:resnet"

MODELS: dict[str, Recipe] = {
    **{f"resnet{n}": Recipe(_HERE + "resnet:resnet", {"layers": n}) for n in (20, 32, 44, 56, 110)},
    "resnet18": Recipe(_TORCHVISION, {"source": "resnet18", "blocks": (2, 2, 2, 2), "wide": False}),
    "resnet34": Recipe(_TORCHVISION, {"source": "resnet34", "blocks": (3, 4, 6, 3), "wide": False}),
    "wide_resnet101_2": Recipe(
        _TORCHVISION, {"source": "wide_resnet101_2", "blocks": (3, 4, 23, 3), "wide": True}
    ),
    "preact_1112": Recipe(_HERE + "preact:preact", {"blocks": (1, 1, 1, 2)}),
    "preact_2222": Recipe(_HERE + "preact:preact", {"blocks": (2, 2, 2, 2)}),
    "heterofl_cnn": Recipe(_HERE + "cnn:heterofl_cnn"),
    "fedavg_cnn": Recipe(_HERE + "cnn:fedavg_cnn"),
    "har_cnn": Recipe(_HERE + "cnn:har_cnn"),
    "mlp": Recipe(_HERE + "cnn:mlp"),
}

# Of the form 6n+2, but everyone means the ImageNet models with bottlenecks by these names.
_NOT_CIFAR = (50, 152)


def names() -> tuple[str, ...]:
    """The named models, for help texts; resnet<6n+2> and package.module:function are valid besides."""
    return tuple(MODELS)


def build(
    name: str,
    input_shape: tuple[int, int, int],
    classes: int,
    options: Mapping[str, Any] = {},
    *,
    generator_seed: int | None = None,
) -> Layered:
    """A model with its head and without exits.

    Args:
        name: one of :func:`names`, ``resnet<6n+2>``, or ``package.module:function`` for a function of one's
            own, called with ``input_shape``, ``classes`` and the options.
        input_shape: (C, H, W) of a sample.
        options: further arguments of the model's function.
        generator_seed: the first weights follow from it alone; None: torch's generator as it stands.

    Raises:
        UserError: there is no such model or option, or the user's function returns something else.
    """
    recipe = _recipe(name)
    function = _load(recipe.function)
    _check_options(name, function, recipe.fixed, options)
    with seeded(generator_seed):
        model = function(input_shape=input_shape, classes=classes, **recipe.fixed, **options)
    if not isinstance(model, Layered):
        kind = type(model).__name__
        raise UserError("model.name", name, f"must return a cluster_fl.models.Layered, not a {kind}.")
    return model


def _recipe(name: str) -> Recipe:
    if name in MODELS:
        return MODELS[name]
    if ":" in name:
        return Recipe(name)
    family = re.fullmatch(r"resnet([1-9]\d*)", name)
    if family and (layers := int(family[1])) % 6 == 2 and layers > 2 and layers not in _NOT_CIFAR:
        return Recipe(_HERE + "resnet:resnet", {"layers": layers})
    near = difflib.get_close_matches(name, MODELS, 1, 0.5)
    hint = f" Did you mean {near[0]}?" if near else ""
    known = ", ".join((*MODELS, "resnet<6n+2> (CIFAR)"))
    raise UserError("model.name", name, f"must be one of {known}, or package.module:function.{hint}")


def _load(path: str) -> Callable[..., Any]:
    module_name, _, function_name = path.partition(":")
    try:
        function: Any = getattr(import_module(module_name), function_name)
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise UserError("model.name", path, f"cannot be imported: {error}.") from None
    if not callable(function):
        raise UserError("model.name", path, "must name a function.")
    return function  # type: ignore[no-any-return]


def _check_options(
    name: str, function: Callable[..., Any], fixed: Mapping[str, Any], options: Mapping[str, Any]
) -> None:
    parameters = inspect.signature(function).parameters
    given = {"input_shape", "classes", *fixed}
    valid = [n for n, p in parameters.items() if n not in given and p.kind is not p.VAR_KEYWORD]
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    for key, value in options.items():
        if key in given or (key not in valid and not takes_any):
            known = f"Valid: {', '.join(valid)}." if valid else "It has none."
            raise UserError(f"model.options.{key}", value, f"is not an option of {name}. {known}")
    for key in valid:
        if parameters[key].default is inspect.Parameter.empty and key not in options:
            raise UserError(f"model.options.{key}", None, f"{name} needs a value.")
