"""The photographs that scikit-image and scikit-learn ship: real images for tests and for the small run, without a download."""

from __future__ import annotations

import numpy as np

COLOUR = ("astronaut", "chelsea", "coffee", "hubble_deep_field", "immunohistochemistry", "retina", "rocket")
GREY = ("brick", "camera", "cell", "coins", "grass", "gravel", "moon", "page", "text")
"""Names of functions in skimage.data whose files its wheel holds."""


def load_photographs() -> dict[str, np.ndarray]:
    """Return name -> uint8 [height, width, 3], RGB; needs scikit-image and scikit-learn (extra "vision")."""
    from skimage import data
    from sklearn.datasets import load_sample_image

    images = {name: np.asarray(getattr(data, name)()) for name in (*COLOUR, *GREY)}
    left, right, _ = data.stereo_motorcycle()
    images |= {"motorcycle_left": left, "motorcycle_right": right}
    images |= {name: load_sample_image(f"{name}.jpg") for name in ("china", "flower")}
    return {
        name: np.ascontiguousarray(image[..., :3] if image.ndim == 3 else np.stack([image] * 3, axis=-1)) for name, image in images.items()
    }
