"""torchvision's pre-trained weights in a layered model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from http.client import HTTPException

import torch
from torch import Tensor
from torchvision.models import get_model_weights

from cluster_fl.errors import UserError
from cluster_fl.models.layered import Layered

KEY = "model.options.pretrained"
# The oldest weights of every model, named instead of DEFAULT, which another version of torchvision may move.
RELEASE = "IMAGENET1K_V1"
# The layers whose shape follows from the samples and the classes.
OWN = ("stem.conv.weight", "head.linear.weight", "head.linear.bias")

_LAYERS = {"conv1": "stem.conv", "bn1": "stem.bn", "fc": "head.linear"}


def load_pretrained(model: Layered, source: str, blocks: Sequence[int]) -> None:
    """Starts ``model`` from torchvision's weights of ``source``, in place, running statistics included.

    Raises:
        UserError: the weights cannot be had, or the model has other widths than ``source``.
    """
    assign(model, from_torchvision(_download(source), blocks), source)


def from_torchvision(weights: Mapping[str, Tensor], blocks: Sequence[int]) -> dict[str, Tensor]:
    """A torchvision residual network's state under the names of a :class:`Layered` one.

    Args:
        weights: by torchvision's names (``layer2.0.downsample.1.weight``).
        blocks: blocks of each stage.
    """
    return {_renamed(name, blocks): tensor for name, tensor in weights.items()}


def assign(model: Layered, weights: Mapping[str, Tensor], source: str) -> None:
    """Copies ``weights`` into the model's tensors, by name; those of ``OWN`` only where the shapes agree.

    Raises:
        UserError: another tensor has another shape.
    """
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor.shape == weights[name].shape:
                tensor.copy_(weights[name])
            elif name not in OWN:
                raise UserError(KEY, True, f"needs the widths of torchvision's {source}: leave out widths.")


def _renamed(name: str, blocks: Sequence[int]) -> str:
    first, _, rest = name.partition(".")
    if not first.startswith("layer"):
        return f"{_LAYERS[first]}.{rest}"
    stage = int(first.removeprefix("layer")) - 1
    block, _, rest = rest.partition(".")
    rest = rest.replace("downsample.0.", "shortcut.conv.").replace("downsample.1.", "shortcut.bn.")
    return f"units.{sum(blocks[:stage]) + int(block)}.{rest}"


def _download(source: str) -> dict[str, Tensor]:
    try:
        weights = get_model_weights(source)[RELEASE]
        found: dict[str, Tensor] = weights.get_state_dict(progress=False, check_hash=True, weights_only=True)
    except (OSError, RuntimeError, HTTPException) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0].rstrip(".")
        right = f"torchvision's weights of {source} cannot be had: {reason}."
        raise UserError(KEY, True, right) from None
    return found
