"""Random changes of brightness, contrast, saturation and hue, on the device.

The paper says that the batch-normalised networks train with weaker photometric
distortions than Inception does, and neither which nor how strong. "strong" takes the
values of the code that Google later published for its Inception networks (TF-Slim).
"weak" halves its brightness and saturation and leaves out contrast and hue, as the fast
mode of that code does.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike


class Limits(NamedTuple):
    """The largest change of each kind, upwards and downwards; see `adjust`."""

    brightness: float
    contrast: float
    saturation: float
    hue: float


STRENGTHS = {
    "none": Limits(0, 0, 0, 0),
    "weak": Limits(brightness=16 / 255, contrast=0, saturation=0.25, hue=0),
    "strong": Limits(brightness=32 / 255, contrast=0.5, saturation=0.5, hue=0.2),
}

# Luma and two axes of chroma, from RGB.
_YIQ = np.array(
    [[0.299, 0.587, 0.114], [0.596, -0.274, -0.322], [0.211, -0.523, 0.312]]
)
_LUMA = _YIQ[0].astype(np.float32)
_QUARTER_TURN = np.array([[0, 0, 0], [0, 0, -1], [0, 1, 0]])

# Maps of RGB: to the grey of the same luma, to what is left, and that turned by 90
# degrees of hue.
_GREY = np.tile(_LUMA, (3, 1))
_CHROMA = np.eye(3, dtype=np.float32) - _GREY
_TURNED_CHROMA = (np.linalg.inv(_YIQ) @ _QUARTER_TURN @ _YIQ).astype(np.float32)


def distort(key: jax.Array, images: jax.Array, strength: str) -> jax.Array:
    """Adjusts each image by random amounts, uniform within the limits of a strength.

    Args:
      key: one key an image, typed keys (batch,), of JAX's default generator: what
        becomes of an image then does not depend on the others, nor on how a batch is
        split over devices.
      images: floating point (batch, height, width, 3), RGB in [0, 1].
      strength: one of STRENGTHS.

    Returns:
      Images of the same shape and dtype, in [0, 1]. With "none", `images` itself.

    Raises:
      ValueError: if the strength is unknown.
    """
    if strength not in STRENGTHS:
        raise ValueError(
            f"strength of photometric distortions is {strength!r}: expected one of "
            f"{', '.join(STRENGTHS)}; choose one of these"
        )
    limits = STRENGTHS[strength]
    if not any(limits):
        return images

    def distort_image(key: jax.Array, image: jax.Array) -> jax.Array:
        draws = jax.random.uniform(key, (4,), jnp.float32, -1, 1)
        return adjust(image, *(draws * np.array(limits, np.float32)))

    return jax.vmap(distort_image)(key, images)


def adjust(
    image: jax.Array,
    brightness: ArrayLike,
    contrast: ArrayLike,
    saturation: ArrayLike,
    hue: ArrayLike,
) -> jax.Array:
    """Changes the colours of one image; zeros leave it as it is.

    The four changes commute: together they are one affine map of a pixel's colour. So
    their order need not be chosen, as it must be where hue is turned in HSV, and the
    result is clipped once.

    Args:
      image: floating point (height, width, 3), RGB in [0, 1].
      brightness: what is added to each channel.
      contrast: 1 + contrast multiplies a pixel's distance to the mean luma.
      saturation: 1 + saturation multiplies a pixel's distance to its own luma.
      hue: by how many turns the chroma is rotated in YIQ.

    Returns:
      The image, clipped to [0, 1], in its dtype.
    """
    angle = 2 * math.pi * jnp.asarray(hue, jnp.float32)
    chroma = jnp.cos(angle) * _CHROMA + jnp.sin(angle) * _TURNED_CHROMA
    matrix = (1 + contrast) * (_GREY + (1 + saturation) * chroma)
    mean_luma = jnp.sum(_LUMA * jnp.mean(image, (0, 1), jnp.float32))
    offset = brightness - contrast * mean_luma
    # Three products instead of a matrix product, which accelerators would round.
    adjusted = sum(image[..., i, None] * matrix[:, i] for i in range(3)) + offset
    return jnp.clip(adjusted, 0, 1).astype(image.dtype)
