"""What a network's weights and biases start from, layer by layer."""

import dataclasses
import math

from flax.linen import initializers

from experiments.inception.layers import DEPTH_MULTIPLIER

CLASSIFIER = "classifier"

# The standard deviations of GoogLeNet's network as it was first published for Caffe, by
# the names of layers here. Those of its 5x5 branch stand in the paper's double 3x3 as
# TF-Slim has them: the reduction's as in the 3x3 branch.
GOOGLENET = {
    "conv1": 0.1,
    "conv2_reduce": 0.1,
    "conv2": 0.03,
    "conv1x1": 0.03,
    "reduce3x3": 0.09,
    "conv3x3": 0.03,
    "reduce_double3x3": 0.09,
    "double3x3_1": 0.03,
    "double3x3_2": 0.03,
    "pool_projection": 0.1,
    # Of the auxiliary head.
    "reduce": 0.08,
    "dense": 0.02,
    CLASSIFIER: 1 / 1024,
}
GOOGLENET_BIAS = 0.2  # of convolutions
IMAGE_LAYER = "conv1"  # its inputs are colours, which a network's width leaves alone


@dataclasses.dataclass(frozen=True)
class Initialisation:
    """How all layers of a network start; equal ones make equal networks.

    Attributes:
      kind: googlenet: Gaussian weights of one deviation a kind of layer, and biases of
        0.2. gaussian: of one deviation in all layers. he: of that of He et al. 2015.
        Biases of the last two are 0.
      std: standard deviation of gaussian.
      scale: what weights are multiplied by, but for those of classifiers.
      width: of the network: GoogLeNet's deviations are those of width 1, and a layer
        with fewer inputs needs larger ones.
    """

    kind: str = "he"
    std: float = 0.05
    scale: float = 1.0
    width: float = 1.0

    def weights(
        self, layer: str, *, separable: bool = False
    ) -> initializers.Initializer:
        """The initialiser of a layer's weights.

        Args:
          layer: its name, a key of `GOOGLENET`.
          separable: it has two kernels, which this initialises one after another.
        """
        scale = 1.0 if layer == CLASSIFIER else self.scale
        if self.kind == "he":
            return initializers.variance_scaling(2 * scale**2, "fan_in", "normal")
        if self.kind == "gaussian":
            return initializers.normal(self.std * scale)
        std = GOOGLENET[layer] * scale
        if layer != IMAGE_LAYER:
            std /= math.sqrt(self.width)
        if separable:
            # So that the convolution they amount to, a sum over `DEPTH_MULTIPLIER`
            # products, has this deviation.
            std = math.sqrt(std / math.sqrt(DEPTH_MULTIPLIER))
        return initializers.normal(std)

    @property
    def biases(self) -> initializers.Initializer:
        """The initialiser of biases of convolutions; those of classifiers are 0."""
        value = GOOGLENET_BIAS if self.kind == "googlenet" else 0.0
        return initializers.constant(value)
