"""Heat maps drawn over images, the same in reports and in the service. numpy and PIL only."""

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

WARM = (255, 70, 30)  # RGB
# Colours of the legend, from heat 0 to 1, on a mid-grey image.
SCALE = ("rgb(45, 45, 45)", "rgb(179, 105, 89)")


def overlay(image: UInt8[np.ndarray, "h w 3"], heat: Float[np.ndarray, "g g"]) -> UInt8[np.ndarray, "h w 3"]:
    """Return the image, dark where the heat is 0 and reddish where it is 1.

    Args:
      image: RGB.
      heat: values from 0 to 1 on a coarser grid; resized to the image.
    """
    height, width = image.shape[:2]
    smooth = Image.fromarray(heat.astype(np.float32)).resize((width, height), Image.Resampling.BICUBIC)
    weight = np.clip(np.asarray(smooth), 0, 1)[..., None]
    dark, warm = 0.35 * image, 0.6 * image + 0.4 * np.asarray(WARM)
    return (dark + weight * (warm - dark)).astype(np.uint8)
