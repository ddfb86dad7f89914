"""The embedded motion set: drawn clips of actions that a single frame can't tell apart.

Actions come in pairs. Seven pairs are each other's reverse (sitting down, standing up): both follow one path of poses,
one forwards and one backwards, so each frame of one could be a frame of the other. The actions of the eighth pair
differ in how often a movement is made. A classifier that ignores the order of frames is right for at most half of the
clips of a pair (a test proves it).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw

from clip_har_jax.data.synthetic import (
    SUPERSAMPLING,
    Canvas,
    Colour,
    Look,
    Point,
    Pose,
    _background,
    _clutter,
    _colour,
    _jitter,
    draw_chair,
    draw_person,
)

VERSION = 1  # increase it when the same seed draws another clip
PAIRS = (
    ("sitting_down", "standing_up"),
    ("opening_a_door", "closing_a_door"),
    ("picking_up_a_box", "putting_down_a_box"),
    ("pushing_a_box", "pulling_a_box"),
    ("raising_both_arms", "lowering_both_arms"),
    ("walking_forwards", "walking_backwards"),
    ("lying_down", "getting_up"),
    ("waving_once", "waving_twice"),
)
LABELS = tuple(sorted(label for pair in PAIRS for label in pair))
PARTNER = {a: b for pair in PAIRS for a, b in (pair, pair[::-1])}
REVERSES = frozenset(label for pair in PAIRS[:-1] for label in pair)  # labels whose partner is the reversed action
SPLITS = {"train": 16000, "val": 480, "test": 480}  # number of clips; the splits share no seeds
DEFAULT_SIZE_PX = 64
DURATION_S = 2.0

GROUND = -0.47  # height of a standing person's feet, from the origin


@dataclass(frozen=True)
class Moment:
    """The state of an action at one point of its course.

    Attributes:
      hip: position of the person.
      pose: posture of the person.
      thing: the object of the action as (name, position, extent); None: there is none.
    """

    hip: Point
    pose: Pose
    thing: tuple[str, Point, float] | None = None


def _mix(a: float, b: float, share: float) -> float:
    return a + (b - a) * share


def _mix_points(a: Point, b: Point, share: float) -> Point:
    return _mix(a[0], b[0], share), _mix(a[1], b[1], share)


def _mix_poses(a: Pose, b: Pose, share: float) -> Pose:
    hands = tuple(_mix_points(x, y, share) for x, y in zip(a.hands, b.hands, strict=True))
    feet = tuple(_mix_points(x, y, share) for x, y in zip(a.feet, b.feet, strict=True))
    angles = {name: _mix(getattr(a, name), getattr(b, name), share) for name in ("lean", "nod", "turn")}
    return replace(a, hands=hands, feet=feet, **angles)  # type: ignore[arg-type]


STANDING = Pose()
SEATED = Pose(hands=((0.20, -0.25), (0.16, -0.27)), feet=((0.24, -0.24), (0.20, -0.25)))
ARMS_UP = Pose(hands=((0.13, 0.31), (-0.11, 0.32)))
LYING = Pose(turn=-90.0, feet=((0.03, -0.47), (-0.01, -0.47)), hands=((0.04, -0.30), (0.0, -0.31)))
CROUCHING = Pose(hands=((0.24, -0.20), (0.20, -0.22)), feet=((0.12, -0.22), (0.02, -0.23)), lean=55.0, nod=-10.0)
CARRYING = Pose(hands=((0.24, -0.16), (0.22, -0.18)))
LEANING = Pose(hands=((0.30, -0.08), (0.29, -0.12)), lean=14.0)


def _sit(p: float) -> Moment:
    hip = _mix_points((0.20, 0.0), (0.0, -0.23), p)
    bent = replace(_mix_poses(STANDING, SEATED, p), lean=30.0 * math.sin(math.pi * p))
    return Moment(hip, bent, ("chair", (0.0, -0.23), 1.0))


def _door(p: float) -> Moment:
    edge = 0.62 - 0.34 * math.cos(math.radians(78 * p))
    hip = (_mix(-0.12, -0.04, p), 0.0)
    hand = (min(edge, 0.33) - hip[0], -0.26)
    return Moment(hip, replace(STANDING, hands=(hand, STANDING.hands[1]), lean=4.0), ("door", (0.62, 0.0), edge))


def _pick_up(p: float) -> Moment:
    low = 1 - abs(2 * p - 1)  # how low the person bends
    pose = _mix_poses(STANDING if p < 0.5 else CARRYING, CROUCHING, low)
    hip = _mix_points((0.0, 0.0), (-0.06, -0.24), low)
    held = _mix_points((0.30, GROUND + 0.10), (0.26, 0.08), max(0.0, 2 * p - 1))
    return Moment(hip, pose, ("box", held, 0.10))


def _steps(p: float, pose: Pose) -> Pose:
    """Return a pose with the feet of a walk of one and a half steps."""
    swing = math.sin(3 * math.pi * p)
    lift = 0.06 * abs(math.cos(3 * math.pi * p))
    return replace(pose, feet=((0.16 * swing, GROUND + lift), (-0.16 * swing, GROUND)))


def _push(p: float) -> Moment:
    x = _mix(-0.30, 0.08, p)
    return Moment((x, 0.0), _steps(p, LEANING), ("crate", (x + 0.46, GROUND + 0.18), 0.16))


def _raise_arms(p: float) -> Moment:
    side = 0.22 * math.sin(math.pi * p)
    pose = _mix_poses(STANDING, ARMS_UP, p)
    hands = ((pose.hands[0][0] + side, pose.hands[0][1]), (pose.hands[1][0] - side, pose.hands[1][1]))
    return Moment((0.0, 0.0), replace(pose, hands=hands))


def _walk(p: float) -> Moment:
    pose = _steps(p, STANDING)
    swing = math.sin(3 * math.pi * p)
    return Moment(
        (_mix(-0.26, 0.26, p), 0.0), replace(pose, hands=((0.05 - 0.14 * swing, -0.29), (0.14 * swing, -0.3)))
    )


def _lie_down(p: float) -> Moment:
    pose = _mix_poses(STANDING, LYING, p)
    knees = 0.16 * math.sin(math.pi * p)
    feet = ((pose.feet[0][0] + knees, pose.feet[0][1] + knees), (pose.feet[1][0] + knees, pose.feet[1][1] + knees))
    return Moment(_mix_points((0.10, 0.0), (0.0, GROUND + 0.10), p), replace(pose, feet=feet))


def _wave(swing: float) -> Moment:
    return Moment((0.0, 0.0), replace(STANDING, hands=((0.16 + 0.13 * swing, 0.24), STANDING.hands[1])))


PATHS: dict[str, Callable[[float], Moment]] = dict(
    zip((pair[0] for pair in PAIRS), (_sit, _door, _pick_up, _push, _raise_arms, _walk, _lie_down, _wave), strict=True)
)


def _draw_thing(canvas: Canvas, thing: tuple[str, Point, float], colour: Colour) -> None:
    name, (x, y), extent = thing
    if name == "chair":
        draw_chair(canvas.at((x, y)), colour)
    elif name == "door":  # side view, with its hinge at x
        tall = 0.05 * (x - extent)
        canvas.polygon([(x, GROUND), (x, 0.42), (extent, 0.42 + tall), (extent, GROUND - tall)], colour)
    else:
        left, right, low, high = x - extent, x + extent, y - extent, y + extent
        canvas.polygon([(left, low), (right, low), (right, high), (left, high)], colour)


@dataclass(frozen=True)
class Course:
    """The timing of an action in a clip: a rest, the action, a rest."""

    begin_s: float
    end_s: float
    backwards: bool = False
    waves: int = 0  # 0: a path from one pose to another

    def at(self, time_s: float) -> float:
        """Return the argument of the path at a time."""
        share = min(1.0, max(0.0, (time_s - self.begin_s) / (self.end_s - self.begin_s)))
        if self.waves:
            return math.sin(2 * math.pi * self.waves * share)
        eased = share * share * (3 - 2 * share)  # slow, fast, slow; symmetric in time
        return 1 - eased if self.backwards else eased


def label_of(split: str, index: int) -> int:
    """Return the class of a clip; classes alternate, so every split is balanced."""
    assert 0 <= index < SPLITS[split]
    return index % len(LABELS)


@dataclass(frozen=True)
class DrawnClip:
    """A clip whose frames are drawn on demand; a pure function of its fields."""

    split: str
    index: int
    size_px: int = DEFAULT_SIZE_PX

    duration_s = DURATION_S

    @cached_property
    def scene(self) -> "Scene":
        """The constant parts of its frames."""
        return Scene(
            LABELS[label_of(self.split, self.index)], (list(SPLITS).index(self.split), self.index), self.size_px
        )

    def frame_at(self, time_s: float) -> UInt8[np.ndarray, "size size 3"]:
        """Draw the frame at a time from 0 to `duration_s`."""
        return self.scene.draw(time_s)


class Scene:
    """A person, a stage and an action; what stays the same in all frames of a clip.

    Args:
      label: the action.
      seed: of the looks, the place and the times.
      size_px: of the frames.
    """

    def __init__(self, label: str, seed: tuple[int, int], size_px: int):
        rng = np.random.default_rng((*seed, VERSION, 7))
        self.size = size_px * SUPERSAMPLING
        self.dark = dark = bool(rng.random() < 0.5)
        self.background = _background(self.size, rng, dark)
        scale = self.size * rng.uniform(0.70, 0.80)
        self.place = (
            (self.size * rng.uniform(0.46, 0.54), self.size * rng.uniform(0.49, 0.54)),
            scale,
            bool(rng.random() < 0.5),
            rng.normal(0, 2),
        )
        _clutter(Canvas(ImageDraw.Draw(self.background), *self.place), rng, dark)
        tones = (0.0, 0.28) if dark else (0.72, 1.0)
        self.thing = _colour(rng, tones)
        self.look = Look(
            _colour(rng, (0.15, 0.35) if dark else (0.65, 0.85), 0.5),
            _colour(rng, (0.0, 0.2) if dark else (0.8, 1.0), 0.4),
            _colour(rng, tones),
            _colour(rng, tones),
            rng.uniform(0.065, 0.085),
        )
        self.pose_change = _jitter(Pose(), rng)
        self.sway = (rng.uniform(0.0, 0.012), rng.uniform(0.3, 1.0), rng.uniform(0, 2 * math.pi))
        pair = next(pair for pair in PAIRS if label in pair)
        self.path = PATHS[pair[0]]
        rest = rng.uniform(0.05, 0.45, 2)
        waves = 1 + (label == pair[1]) if pair == PAIRS[-1] else 0
        self.course = Course(rest[0], DURATION_S - rest[1], label == pair[1], waves)

    def draw(self, time_s: float) -> UInt8[np.ndarray, "size size 3"]:
        """Return the frame of a time."""
        return np.asarray(self.draw_on(self.background, time_s).reduce(SUPERSAMPLING))

    def move(self, aside: float, scale: float) -> None:
        """Put the person `aside`, by the width of the stage, and make it smaller by `scale`."""
        (x, y), scale_px, mirror, roll = self.place
        self.place = (x + aside * self.size, y), scale_px * scale, mirror, roll

    def draw_on(self, stage: Image.Image, time_s: float) -> Image.Image:
        """Return the stage with the person at a time, in the size before it is made smaller."""
        image = stage.copy()
        canvas = Canvas(ImageDraw.Draw(image), *self.place)
        moment = self.path(self.course.at(time_s))
        amount, rate_hz, phase = self.sway
        drift = amount * math.sin(2 * math.pi * rate_hz * time_s + phase)
        if moment.thing is not None:
            _draw_thing(canvas, moment.thing, self.thing)
        draw_person(canvas.at((moment.hip[0] + drift, moment.hip[1])), self._vary(moment.pose), self.look)
        return image

    def _vary(self, pose: Pose) -> Pose:
        """Return a pose with this person's individual posture."""
        usual, own = Pose(), self.pose_change

        def shift(points: tuple[Point, Point], limbs: str) -> tuple[Point, Point]:
            (first, second), (a, b), (c, d) = points, getattr(own, limbs), getattr(usual, limbs)
            return (first[0] + a[0] - c[0], first[1] + a[1] - c[1]), (second[0] + b[0] - d[0], second[1] + b[1] - d[1])

        hands, feet = shift(pose.hands, "hands"), shift(pose.feet, "feet")
        return replace(pose, hands=hands, feet=feet, lean=pose.lean + own.lean, nod=pose.nod + own.nod)
