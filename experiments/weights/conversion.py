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
    found: dict[str, np.ndarray] = {}
    used: set[str] = set()

    def take(name: str) -> np.ndarray:
        used.add(name)
        return _in_our_axes(naming, arrays[name])

    for place, leaf in named_leaves(fresh).items():
        collection, *layer, part, name = place.split("/")
        if CLASSIFIER in layer or part == CLASSIFIER:
            continue
        key, published = f"{collection}/{part}/{name}", naming.layers["/".join(layer)]
        source = published + naming.arrays[key]
        if source in arrays:
            found[place] = _fitting(naming, source, take(source), leaf.shape)
        elif key in naming.optional:
            found[place] = np.full(leaf.shape, naming.optional[key], np.float32)
        else:
            raise _missing(naming, source)
        bias = published + naming.arrays.get(BIAS_BEFORE_NORM, "")
        if key == "batch_stats/norm/mean" and bias in arrays:
            found[place] -= _fitting(naming, bias, take(bias), leaf.shape)
    first = next(place for place in found if place.startswith("params/conv1/conv/"))
    kernel = found[first][:, :, ::-1] if naming.swaps_channels else found[first]
    found[first] = kernel * np.float32(naming.pixel_scale)

    layers = [
        {ours: f"{layer}{theirs}" for ours, theirs in naming.classifier_arrays.items()}
        for layer in naming.classifiers
    ]
    classifier_names = next((of for of in layers if of["kernel"] in arrays), layers[0])
    for name, source in classifier_names.items():
        if source not in arrays:
            raise _missing(naming, source)
        array = take(source).astype(np.float32)
        # A convolution of 1x1, where it is one.
        found[f"params/{CLASSIFIER}/{name}"] = array.reshape(array.shape[-2:])
    unused = sorted(
        name for name in arrays.keys() - used if not name.endswith(naming.ignored)
    )
    if unused:
        raise WeightsError(
            f"{listing(unused)} of the file have no place in the network of "
            f"--config={naming.variant}: it is not {naming.published}, or more than it."
        )
    found_classes = len(found[f"params/{CLASSIFIER}/bias"])
    if naming.has_background and found_classes == num_classes + 1:
        for name in classifier_names:
            place = f"params/{CLASSIFIER}/{name}"
            found[place] = found[place][..., 1:]
        found_classes = num_classes
    arrays_of_ours = {
        name: np.ascontiguousarray(array) for name, array in found.items()
    }
    return Converted(
        naming,
        {collection: subtree(arrays_of_ours, (collection,)) for collection in fresh},
        found_classes,
    )


def _in_our_axes(naming: Naming, array: np.ndarray) -> np.ndarray:
    """Height, width, inputs, outputs; or inputs, outputs."""
    if not naming.is_torch or array.ndim < 2:
        return array
    return array.transpose([*range(2, array.ndim), 1, 0])


def _fitting(
    naming: Naming, source: str, array: np.ndarray, shape: tuple[int, ...]
) -> np.ndarray:
    """The array in float32 and in our shape, which may only divide axes otherwise."""
    # Statistics may be (1, channels), and a depthwise kernel is (7, 7, 3, 8) for our
    # (7, 7, 1, 24).
    may_differ = len(shape) == 1 or shape[2] == 1
    if array.shape != shape and not (may_differ and array.size == np.prod(shape)):
        raise WeightsError(
            f"{source} has shape {array.shape} (height, width, inputs, outputs), and "
            f"the network of --config={naming.variant} {shape} there: the file is of "
            "another network, or width or pool_projection are not the file's."
        )
    return array.reshape(shape).astype(np.float32)


def _missing(naming: Naming, name: str) -> WeightsError:
    return WeightsError(
        f"the file lacks {name}, which {naming.published} has: it is of another "
        f"network, or the configuration is not that of --config={naming.variant}."
    )
