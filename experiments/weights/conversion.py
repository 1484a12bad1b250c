"""Published arrays as the variables of the Inception network, by the tables."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from experiments.checkpoints.load import subtree
from experiments.checkpoints.stored import listing, named_leaves
from experiments.weights.errors import WeightsError
from experiments.weights.namings import BIAS_BEFORE_NORM, NAMINGS, Naming

CLASSIFIER = "classifier"
Arrays = Mapping[str, np.ndarray]


class Converted(NamedTuple):
    """Variables of the network that a variant describes."""

    naming: Naming
    variables: dict[str, Any]  # Flax's collections
    num_classes: int


def recognise(arrays: Arrays, namings: Sequence[Naming] = NAMINGS) -> Naming:
    """Whose names these are.

    Raises:
      WeightsError: nobody's that is known.
    """

    def share(naming: Naming) -> float:
        layers = naming.layers.values()
        return float(np.mean([any(n.startswith(of) for n in arrays) for of in layers]))

    best = max(namings, key=share)
    if not share(best):
        raise WeightsError(
            f"{len(arrays)} arrays such as {listing(sorted(arrays), 4)} are of another "
            "network; known are "
            f"{' and '.join(naming.published for naming in namings)}. (torchvision's "
            "googlenet and inception_v3, and timm's, are other networks than this.)"
        )
    return best


def convert(arrays: Arrays, fresh: Mapping[str, Any], num_classes: int) -> Converted:
    """Gives each array its place, and each place its array.

    Args:
      arrays: of a file, by its names.
      fresh: variables of our network, with any number of classes; shapes are enough.
      num_classes: of the data: of as many and a background class, that is left out.

    Raises:
      WeightsError: an array is missing, has another shape, or has no place.
    """
    naming = recognise(arrays)
    sources = _classifier(naming, arrays)  # the file's names of what is taken, by ours
    found = {place: _taken(naming, arrays, name) for place, name in sources.items()}
    found = {
        # A convolution of 1x1, where it is one.
        place: array.reshape(array.shape[-2:]).astype(np.float32)
        for place, array in found.items()
    }
    for place, leaf in named_leaves(fresh).items():
        if place in found:
            continue
        layer, key = _layer_and_key(place)
        if layer not in naming.layers or key not in naming.arrays:
            raise _missing(naming, f"what {place} is here")
        published = naming.layers[layer]
        source = published + naming.arrays[key]
        if source in arrays:
            sources[place] = source
            found[place] = _fitting(naming, arrays, source, leaf.shape)
        elif key in naming.optional:
            found[place] = np.full(leaf.shape, naming.optional[key], np.float32)
        else:
            raise _missing(naming, source)
        bias = published + naming.arrays.get(BIAS_BEFORE_NORM, "")
        if key == "batch_stats/norm/mean" and bias in arrays:
            sources[f"{place}, its bias"] = bias
            found[place] -= _fitting(naming, arrays, bias, leaf.shape)
    unused = sorted(
        name
        for name in arrays.keys() - set(sources.values())
        if not name.endswith(naming.ignored)
    )
    if unused:
        raise WeightsError(
            f"{listing(unused)} of the file have no place in the network of "
            f"--config={naming.variant}: it is not {naming.published}, or more than it."
        )
    first = next(place for place in found if place.startswith("params/conv1/conv/"))
    kernel = found[first][:, :, ::-1] if naming.swaps_channels else found[first]
    found[first] = np.ascontiguousarray(kernel) * np.float32(naming.pixel_scale)
    found_classes = len(found[f"params/{CLASSIFIER}/bias"])
    if naming.has_background and found_classes == num_classes + 1:
        for place in _classifier(naming, arrays):
            found[place] = np.ascontiguousarray(found[place][..., 1:])
        found_classes = num_classes
    variables = {collection: subtree(found, (collection,)) for collection in fresh}
    return Converted(naming, variables, found_classes)


def _layer_and_key(place: str) -> tuple[str, str]:
    """Of "params/row_3a/conv1x1/conv/kernel": its layer, and the rest."""
    collection, *layer, part, name = place.split("/")
    return "/".join(layer), f"{collection}/{part}/{name}"


def _classifier(naming: Naming, arrays: Arrays) -> dict[str, str]:
    """The file's names of the last layer's arrays, by ours."""
    kernel = naming.classifier_arrays["kernel"]
    known = [layer for layer in naming.classifiers if layer + kernel in arrays]
    layer = next(iter(known), naming.classifiers[0])
    return {
        f"params/{CLASSIFIER}/{ours}": layer + theirs
        for ours, theirs in naming.classifier_arrays.items()
    }


def _taken(naming: Naming, arrays: Arrays, name: str) -> np.ndarray:
    """An array in our order of axes: height, width, inputs, outputs."""
    if name not in arrays:
        raise _missing(naming, name)
    array = arrays[name]
    if not naming.is_torch or array.ndim < 2:
        return array
    return array.transpose([*range(2, array.ndim), 1, 0])


def _fitting(
    naming: Naming, arrays: Arrays, source: str, shape: tuple[int, ...]
) -> np.ndarray:
    """An array in float32 and in our shape, which may only divide axes otherwise."""
    array = _taken(naming, arrays, source)
    # Statistics may be (1, channels), and a depthwise kernel is (7, 7, 3, 8) for our
    # (7, 7, 1, 24).
    may_differ = len(shape) == 1 or shape[2] == 1
    if array.shape != shape and not (may_differ and array.size == np.prod(shape)):
        raise WeightsError(
            f"{source} has shape {array.shape} (height, width, inputs, outputs), and "
            f"the network of --config={naming.variant} {shape} there: the file is of "
            "another network, or width or pool_projection are not the file's."
        )
    return np.ascontiguousarray(array.reshape(shape), np.float32)


def _missing(naming: Naming, name: str) -> WeightsError:
    return WeightsError(
        f"the file lacks {name}, which {naming.published} has: it is of another "
        f"network, or the configuration is not that of --config={naming.variant}."
    )
