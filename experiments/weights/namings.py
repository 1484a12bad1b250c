"""How published networks name what the Inception network has: tables, no code.

A layer's path in `experiments.inception.network`, as "row_3a/conv1x1", comes from the
tables of `Naming.layers`, and each array of it from `Naming.arrays`.
"""

from collections.abc import Mapping
from typing import NamedTuple

from experiments.inception.table import TABLE


class Naming(NamedTuple):
    """One publisher's names."""

    published: str  # what it is, for messages
    variant: str  # of `experiments.inception.config`, which computes the same
    layers: Mapping[str, str]  # their name of a layer, by our path
    arrays: Mapping[str, str]  # their ending, by our collection and name in a layer
    classifiers: tuple[str, ...]  # the last layer's names; a file has one of them
    classifier_arrays: Mapping[str, str]
    optional: Mapping[str, float]  # values of arrays that a file may lack
    ignored: tuple[str, ...]  # endings of names that inference does not need
    is_torch: bool  # kernels have torch's order of axes
    swaps_channels: bool = False  # images are BGR
    pixel_scale: float = 1.0  # what our pixels, from -1 to 1, are multiplied by
    has_background: bool = False  # as class 0, before the others


# A bias before the norm, which the norm's mean takes up.
BIAS_BEFORE_NORM = "params/conv/bias"

CADENE_LAYERS = {
    **{"conv1": "conv1_7x7_s2", "conv2_reduce": "conv2_3x3_reduce"},
    "conv2": "conv2_3x3",
    **{
        f"row_{row.name}/{ours}": f"inception_{row.name}_{theirs}"
        for row in TABLE
        for ours, theirs in {
            **({"conv1x1": "1x1"} if row.conv1x1 else {}),
            **{"reduce3x3": "3x3_reduce", "conv3x3": "3x3"},
            "reduce_double3x3": "double_3x3_reduce",
            **{"double3x3_1": "double_3x3_1", "double3x3_2": "double_3x3_2"},
            **({"pool_projection": "pool_proj"} if row.pool_projection else {}),
        }.items()
    },
}

SLIM_ROWS = {
    **{"3a": "Mixed_3b", "3b": "Mixed_3c", "3c": "Mixed_4a", "4a": "Mixed_4b"},
    **{"4b": "Mixed_4c", "4c": "Mixed_4d", "4d": "Mixed_4e", "4e": "Mixed_5a"},
    **{"5a": "Mixed_5b", "5b": "Mixed_5c"},
}
SLIM_BRANCHES = {
    "conv1x1": "Branch_0/Conv2d_0a_1x1",
    "reduce3x3": "Branch_1/Conv2d_0a_1x1",
    "conv3x3": "Branch_1/Conv2d_0b_3x3",
    "reduce_double3x3": "Branch_2/Conv2d_0a_1x1",
    "double3x3_1": "Branch_2/Conv2d_0b_3x3",
    "double3x3_2": "Branch_2/Conv2d_0c_3x3",
    "pool_projection": "Branch_3/Conv2d_0b_1x1",
}
SLIM_BRANCHES_OF_STRIDE_2 = {
    "reduce3x3": "Branch_0/Conv2d_0a_1x1",
    "conv3x3": "Branch_0/Conv2d_1a_3x3",
    "reduce_double3x3": "Branch_1/Conv2d_0a_1x1",
    "double3x3_1": "Branch_1/Conv2d_0b_3x3",
    "double3x3_2": "Branch_1/Conv2d_1a_3x3",
}
SLIM_LAYERS = {
    "conv1": "InceptionV2/Conv2d_1a_7x7",
    "conv2_reduce": "InceptionV2/Conv2d_2b_1x1",
    "conv2": "InceptionV2/Conv2d_2c_3x3",
    **{
        f"row_{row.name}/{ours}": f"InceptionV2/{SLIM_ROWS[row.name]}/{theirs}"
        for row in TABLE
        for ours, theirs in (
            SLIM_BRANCHES if row.stride == 1 else SLIM_BRANCHES_OF_STRIDE_2
        ).items()
    },
}

NAMINGS = (
    Naming(
        published="bninception of Cadene's pretrained-models (torch)",
        variant="bninception",
        layers=CADENE_LAYERS,
        arrays={
            "params/conv/kernel": ".weight",
            BIAS_BEFORE_NORM: ".bias",
            "params/norm/scale": "_bn.weight",
            "params/norm/bias": "_bn.bias",
            "batch_stats/norm/mean": "_bn.running_mean",
            "batch_stats/norm/var": "_bn.running_var",
        },
        classifiers=("last_linear", "fc"),
        classifier_arrays={"kernel": ".weight", "bias": ".bias"},
        optional={},
        ignored=(".num_batches_tracked",),
        is_torch=True,
        swaps_channels=True,
        pixel_scale=127.5,  # of pixels from 0 to 255, less a mean
    ),
    Naming(
        published="Inception V2 of TF-Slim (TensorFlow)",
        variant="inception_v2",
        layers=SLIM_LAYERS,
        arrays={
            "params/conv/kernel": "/weights",
            "params/conv/depthwise_kernel": "/depthwise_weights",
            "params/conv/pointwise_kernel": "/pointwise_weights",
            "params/norm/scale": "/BatchNorm/gamma",
            "params/norm/bias": "/BatchNorm/beta",
            "batch_stats/norm/mean": "/BatchNorm/moving_mean",
            "batch_stats/norm/var": "/BatchNorm/moving_variance",
        },
        classifiers=("InceptionV2/Logits/Conv2d_1c_1x1",),
        classifier_arrays={"kernel": "/weights", "bias": "/biases"},
        optional={"params/norm/scale": 1.0},
        ignored=(
            *("global_step", "/Momentum", "/RMSProp", "/RMSProp_1"),
            "/ExponentialMovingAverage",
        ),
        is_torch=False,
        has_background=True,
    ),
)
