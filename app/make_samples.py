"""Draw the app's sample pictures and video from the embedded action set: python app/make_samples.py

It isn't part of the app: it imports the project, which the app doesn't need.
"""

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from PIL import Image

from clip_har_jax.data.synthetic import LABELS, draw

SAMPLES = Path(__file__).parent / "samples"
SIZE_PX = 384
CHOSEN = ("cycling", "dancing", "drinking", "hugging", "running", "sleeping", "using_laptop", "calling")
VIDEO = ("running", "sleeping", "cycling")
FPS, SECONDS_EACH = 10, 4
SWAY_PX = 8


def main() -> None:
    SAMPLES.mkdir(exist_ok=True)
    for label in CHOSEN:
        Image.fromarray(draw("test", LABELS.index(label), SIZE_PX)).save(SAMPLES / f"{label}.jpg", quality=88)
    runner = Image.fromarray(draw("test", LABELS.index("running"), SIZE_PX)).crop((60, 20, 340, 300))
    runner.resize((64, 64)).save(SAMPLES / "icon.png")
    with av.open(str(SAMPLES / "actions.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=FPS)
        stream.width = stream.height = SIZE_PX
        stream.pix_fmt = "yuv420p"
        stream.time_base = Fraction(1, FPS)
        for label in VIDEO:
            still = draw("test", LABELS.index(label) + len(LABELS), SIZE_PX + 2 * SWAY_PX)
            for i in range(FPS * SECONDS_EACH):
                x = SWAY_PX + round(SWAY_PX * np.sin(i / 3))  # like a hand-held camera
                moved = np.ascontiguousarray(still[SWAY_PX : SWAY_PX + SIZE_PX, x : x + SIZE_PX])
                container.mux(stream.encode(av.VideoFrame.from_ndarray(moved)))
        container.mux(stream.encode())


if __name__ == "__main__":
    main()
