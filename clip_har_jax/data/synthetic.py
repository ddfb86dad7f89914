"""The embedded action set: the 15 actions of the Human Action Recognition set, drawn as scenes from a seed.

Articulated figures act before a background, among clutter from any scene: bikes, chairs, tables, beds, cups, phones,
bystanders. Colours, size, view, proportions and occlusion vary equally in every class; only the pose and the objects
that people hold, sit or lie on show the class. A linear classifier can't tell it from raw colours and coarse thumbnails
(a test proves it), but silhouettes tell much. The set shows that the whole pipeline works, not that a method is good.
"""

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw

from clip_har_jax.data.drawing import (
    SUPERSAMPLING,
    Body,
    Canvas,
    Colour,
    Look,
    Point,
    Pose,
    _add,
    _rotate,
    draw_bed,
    draw_bike,
    draw_chair,
    draw_cup,
    draw_laptop,
    draw_person,
    draw_phone,
    draw_plate,
    draw_table,
)

VERSION = 1  # increase it when the same seed draws another picture
LABELS = (
    "calling",
    "clapping",
    "cycling",
    "dancing",
    "drinking",
    "eating",
    "fighting",
    "hugging",
    "laughing",
    "listening_to_music",
    "running",
    "sitting",
    "sleeping",
    "texting",
    "using_laptop",
)
SPLITS = {"train": 30000, "val": 600, "test": 600}  # number of examples; the splits share no seeds
DEFAULT_SIZE_PX = 64

OBJECTS: tuple[Callable[[Canvas, Colour], None], ...] = (
    draw_bike,
    draw_chair,
    draw_table,
    draw_bed,
    draw_laptop,
    draw_phone,
    draw_cup,
    draw_plate,
)


def _seated(**changes: object) -> Pose:
    pose = Pose(hands=((0.20, -0.25), (0.16, -0.27)), feet=((0.26, -0.24), (0.20, -0.25)))
    return replace(pose, **changes)  # type: ignore[arg-type]


POSES = {
    "calling": Pose(hands=((0.10, 0.12), (0.27, -0.16))),
    "clapping": Pose(hands=((0.26, 0.05), (0.25, -0.01))),
    "cycling": Pose(hands=((0.12, -0.22), (0.11, -0.22)), feet=((0.10, -0.34), (-0.02, -0.44)), lean=40.0),
    "dancing": Pose(hands=((0.16, 0.28), (-0.30, 0.14)), feet=((0.34, -0.28), (-0.05, -0.47))),
    "drinking": Pose(hands=((0.15, 0.11), (-0.07, -0.32)), nod=-25.0),
    "eating": _seated(hands=((0.14, 0.06), (0.20, -0.20)), nod=10.0),
    "fighting": Pose(hands=((0.33, 0.03), (0.13, 0.04)), feet=((0.18, -0.43), (-0.20, -0.42)), lean=8.0),
    "hugging": Pose(hands=((0.22, -0.03), (0.22, -0.12)), lean=6.0, nod=12.0),
    "laughing": Pose(hands=((0.09, -0.20), (0.06, -0.22)), lean=-16.0, nod=-18.0, mouth=1.0),
    "listening_to_music": Pose(hands=((0.12, 0.13), (-0.13, 0.13)), elbows=(1.0, -1.0)),
    "running": Pose(hands=((0.23, -0.04), (-0.20, -0.16)), feet=((0.28, -0.30), (-0.36, -0.24)), lean=18.0),
    "sitting": _seated(),
    "sleeping": Pose(turn=-90.0, feet=((0.03, -0.47), (-0.01, -0.47)), hands=((0.04, -0.30), (0.0, -0.31))),
    "texting": Pose(hands=((0.17, -0.08), (0.16, -0.10)), nod=35.0),
    "using_laptop": _seated(hands=((0.26, -0.17), (0.23, -0.17)), lean=8.0, nod=12.0),
}
ACTORS_OFFSET = {"fighting": 0.27, "hugging": 0.10}  # half the distance between two people who act together


def _jitter(pose: Pose, rng: np.random.Generator) -> Pose:
    def near(point: Point, amount: float) -> Point:
        return point[0] + rng.normal(0, amount), point[1] + rng.normal(0, amount)

    return replace(
        pose,
        hands=(near(pose.hands[0], 0.012), near(pose.hands[1], 0.012)),
        feet=(near(pose.feet[0], 0.02), near(pose.feet[1], 0.02)),
        lean=pose.lean + rng.normal(0, 3),
        nod=pose.nod + rng.normal(0, 4),
        turn=pose.turn + rng.normal(0, 2),
    )


def _colour(rng: np.random.Generator, lightness: tuple[float, float], saturation: float = 0.6) -> Colour:
    """Return a random hue with a lightness from 0 to 1."""
    light, chroma, hue = rng.uniform(*lightness), rng.uniform(0, saturation), rng.uniform(0, 2 * math.pi)
    offsets = (math.cos(hue), math.cos(hue - 2.094), math.cos(hue + 2.094))
    red, green, blue = (int(255 * min(1.0, max(0.0, light + 0.35 * chroma * offset))) for offset in offsets)
    return red, green, blue


def _behind(canvas: Canvas, label: str, colour: Colour) -> None:
    """Draw the furniture or vehicle that the person uses."""
    if label == "cycling":
        draw_bike(canvas, colour)
    elif label in ("eating", "sitting", "using_laptop"):
        draw_chair(canvas, colour)
    elif label == "sleeping":
        draw_bed(canvas, colour)


def _in_hand(canvas: Canvas, label: str, body: Body, colour: Colour, furniture: Colour) -> None:
    """Draw the object that the person holds or wears."""
    hand = canvas.at(body.hands[0])
    if label == "calling":
        draw_phone(canvas.at(_add(body.head, _rotate((0.07, 0.0), body.up))), colour)
    elif label == "drinking":
        draw_cup(hand.at((-0.01, 0.03)), colour)
    elif label == "texting":
        draw_phone(hand.at((0.02, 0.04)), colour)
    elif label == "eating":
        draw_table(canvas.at((0.12, 0.06)), furniture)
        draw_plate(canvas.at((0.30, 0.10)), colour)
        hand.line([(0.05, -0.03), (-0.05, 0.03)], colour, 0.025)
    elif label == "using_laptop":
        draw_table(canvas.at((0.14, 0.06)), furniture)
        draw_laptop(canvas.at((0.22, 0.10)), colour)
    elif label == "listening_to_music":
        arc = [
            _add(body.head, _rotate((0.12 * math.cos(a), 0.12 * math.sin(a)), body.up))
            for a in np.linspace(0, math.pi, 8)
        ]
        canvas.line(arc, colour, 0.03)
        canvas.line([arc[0], _add(arc[0], (0.0, -0.05))], colour, 0.05)
        canvas.line([arc[-1], _add(arc[-1], (0.0, -0.05))], colour, 0.05)


def _act(canvas: Canvas, label: str, rng: np.random.Generator, dark: bool) -> None:
    """Draw one or two people at an action; the feet of a standing person are 0.47 below the origin."""
    tones = (0.0, 0.28) if dark else (0.72, 1.0)
    thing, furniture = _colour(rng, tones), _colour(rng, tones)
    offset = ACTORS_OFFSET.get(label, 0.0)
    for side in (-1, 1) if offset else (-1,):
        actor = canvas.at((side * offset, 0.0), mirror=side > 0)
        pose = _jitter(POSES[label], rng)
        look = Look(
            _colour(rng, (0.15, 0.35) if dark else (0.65, 0.85), 0.5),
            _colour(rng, (0.0, 0.2) if dark else (0.8, 1.0), 0.4),
            _colour(rng, tones),
            _colour(rng, tones),
            rng.uniform(0.065, 0.085),
        )
        _behind(actor, label, furniture)
        body = draw_person(actor, pose, look)
        _in_hand(actor, label, body, thing, furniture)


def _background(size: int, rng: np.random.Generator, dark: bool) -> Image.Image:
    """Return a gradient with a horizon and some flat shapes, lighter than dark actors and darker than light ones."""
    tones = (0.5, 0.95) if dark else (0.05, 0.5)
    corners = np.array([_colour(rng, tones, 0.5) for _ in range(4)], np.uint8).reshape(2, 2, 3)
    image = Image.fromarray(corners).resize((size, size), Image.Resampling.BILINEAR)
    draw = ImageDraw.Draw(image)
    if rng.random() < 0.7:
        draw.rectangle((0, int(size * rng.uniform(0.6, 0.85)), size, size), fill=_colour(rng, tones, 0.5))
    for _ in range(rng.integers(0, 4)):
        x, y, width, height = rng.uniform(0, size), rng.uniform(0, size), *rng.uniform(0.05 * size, 0.3 * size, 2)
        shape = draw.rectangle if rng.random() < 0.5 else draw.ellipse
        shape((x, y, x + width, y + height), fill=_colour(rng, tones, 0.5))
    return image


def _clutter(canvas: Canvas, rng: np.random.Generator, dark: bool) -> None:
    """Draw objects and bystanders of any scene, smaller than the actors and away from the middle."""
    tones = (0.25, 0.5) if dark else (0.5, 0.75)
    for _ in range(rng.integers(0, 2)):
        side = rng.choice((-1, 1)) * rng.uniform(0.42, 0.65)
        place = canvas.at((side, rng.uniform(-0.45, 0.45)), rng.uniform(0.35, 0.6), bool(rng.random() < 0.5))
        thing = rng.integers(0, len(OBJECTS) + 2)
        if thing < len(OBJECTS):
            OBJECTS[thing](place, _colour(rng, tones))
        else:
            skin, hair, shirt, trousers = (_colour(rng, tones) for _ in range(4))
            draw_person(place, _jitter(Pose(), rng), Look(skin, hair, shirt, trousers, thickness=0.07))


def label_of(split: str, index: int) -> int:
    """Return the class of an example; classes alternate, so every split is balanced."""
    assert 0 <= index < SPLITS[split]
    return index % len(LABELS)


def draw(split: str, index: int, size_px: int = DEFAULT_SIZE_PX) -> UInt8[np.ndarray, "size size 3"]:
    """Draw one example; a pure function of its arguments."""
    label = LABELS[label_of(split, index)]
    rng = np.random.default_rng((list(SPLITS).index(split), index, VERSION))
    size = size_px * SUPERSAMPLING
    dark = bool(rng.random() < 0.5)
    image = _background(size, rng, dark)
    scale = size * rng.uniform(0.78, 0.86)
    origin = (size * rng.uniform(0.47, 0.53), size * rng.uniform(0.49, 0.54))
    canvas = Canvas(ImageDraw.Draw(image), origin, scale, bool(rng.random() < 0.5), rng.normal(0, 2))
    _clutter(canvas, rng, dark)
    _act(canvas, label, rng, dark)
    if rng.random() < 0.2:  # an object in the foreground
        x, y = rng.uniform(0, size, 2)
        half = rng.uniform(0.03, 0.09) * size
        canvas.draw.ellipse((x - half, y - half, x + half, y + half), fill=_colour(rng, (0.0, 1.0)))
    return np.asarray(image.reduce(SUPERSAMPLING))
