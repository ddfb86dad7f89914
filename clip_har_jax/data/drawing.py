"""People and objects drawn on a canvas as outlines: the parts of the scenes in the embedded sets."""

import math
from dataclasses import dataclass

from PIL import ImageDraw

SUPERSAMPLING = 2

# Lengths in units of a person's height.
TORSO, NECK, HEAD = 0.30, 0.13, 0.085
ARM, LEG = 0.17, 0.24  # length of each of the two parts

Point = tuple[float, float]  # x to the right, y up
Colour = tuple[int, int, int]


@dataclass(frozen=True)
class Pose:
    """A person's posture: hands relative to the neck, feet to the hip, facing right. Angles in degrees."""

    hands: tuple[Point, Point] = ((0.05, -0.32), (-0.06, -0.32))
    feet: tuple[Point, Point] = ((0.06, -0.47), (-0.06, -0.47))
    lean: float = 0.0  # of the torso, forwards
    nod: float = 0.0  # of the head, forwards, beyond the lean
    turn: float = 0.0  # of the whole body; at 90 it lies on its back
    mouth: float = 0.0  # opening, 0 to 1
    elbows: tuple[float, float] = (-1.0, -1.0)  # -1: bent backwards, 1: forwards


@dataclass(frozen=True)
class Look:
    """A person's colours and proportions."""

    skin: Colour
    hair: Colour
    shirt: Colour
    trousers: Colour
    thickness: float


class Canvas:
    """Draw in scene units: 1 is a person's height, the origin a point of the picture, y up."""

    def __init__(self, draw: ImageDraw.ImageDraw, origin: Point, scale_px: float, mirror: bool, roll: float):
        self.draw, self.origin, self.scale_px, self.mirror = draw, origin, scale_px, mirror
        self._cos, self._sin = math.cos(math.radians(roll)), math.sin(math.radians(roll))

    def at(self, origin: Point, scale: float = 1.0, mirror: bool = False) -> "Canvas":
        """Return a canvas whose origin is a point of this one."""
        other = Canvas(self.draw, self.to_px(origin), self.scale_px * scale, self.mirror != mirror, 0.0)
        other._cos, other._sin = self._cos, self._sin
        return other

    def to_px(self, point: Point) -> Point:
        x, y = point[0] * self._cos - point[1] * self._sin, point[0] * self._sin + point[1] * self._cos
        x = -x if self.mirror else x
        return self.origin[0] + x * self.scale_px, self.origin[1] - y * self.scale_px

    def line(self, points: list[Point], colour: Colour, width: float) -> None:
        pixels, width_px = [self.to_px(point) for point in points], max(1, round(width * self.scale_px))
        self.draw.line(pixels, fill=colour, width=width_px)
        for x, y in pixels:  # round ends and joints
            radius = width_px / 2
            self.draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour)

    def disc(self, centre: Point, radius: float, colour: Colour | None, outline: Colour | None = None) -> None:
        (x, y), size = self.to_px(centre), radius * self.scale_px
        width = max(1, round(0.025 * self.scale_px))
        self.draw.ellipse((x - size, y - size, x + size, y + size), fill=colour, outline=outline, width=width)

    def polygon(self, points: list[Point], colour: Colour) -> None:
        self.draw.polygon([self.to_px(point) for point in points], fill=colour)


def _add(a: Point, b: Point) -> Point:
    return a[0] + b[0], a[1] + b[1]


def _rotate(point: Point, degrees: float) -> Point:
    """Rotate clockwise: forwards for a person who faces right."""
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    return point[0] * cos + point[1] * sin, point[1] * cos - point[0] * sin


def _joint(start: Point, end: Point, part: float, bend: float) -> tuple[Point, Point]:
    """Return the elbow or knee of a limb of two equal parts, and the limb's end, limited by full stretch."""
    dx, dy = end[0] - start[0], end[1] - start[1]
    distance = math.hypot(dx, dy) or 1e-6
    reach = min(distance, 1.98 * part)
    end = (start[0] + dx / distance * reach, start[1] + dy / distance * reach)
    height = math.sqrt(part**2 - (reach / 2) ** 2) * bend
    middle = ((start[0] + end[0]) / 2, (start[1] + end[1]) / 2)
    return (middle[0] - dy / distance * height, middle[1] + dx / distance * height), end


@dataclass(frozen=True)
class Body:
    """Positions of a drawn person at which objects can be placed."""

    neck: Point
    head: Point
    hands: tuple[Point, Point]
    up: float  # angle of the head, degrees forwards


def draw_person(canvas: Canvas, pose: Pose, look: Look) -> Body:
    """Draw a person whose hip is at the canvas's origin."""
    neck = _rotate((0.0, TORSO), pose.lean + pose.turn)
    up = pose.lean + pose.turn + pose.nod
    head = _add(neck, _rotate((0.0, NECK), up))
    hands = []
    width = look.thickness

    def leg(i: int) -> None:
        knee, foot = _joint((0.0, 0.0), _rotate(pose.feet[i], pose.turn), LEG, 1.0)
        canvas.line([(0.0, 0.0), knee, foot], look.trousers, width)
        canvas.line([foot, _add(foot, _rotate((0.05, 0.0), pose.turn))], look.hair, width * 0.8)

    def arm(i: int) -> None:
        elbow, hand = _joint(neck, _add(neck, _rotate(pose.hands[i], pose.turn)), ARM, pose.elbows[i])
        canvas.line([neck, elbow], look.shirt, width * 0.85)
        canvas.line([elbow, hand], look.skin, width * 0.7)
        hands.append(hand)

    leg(1)
    arm(1)
    leg(0)
    canvas.line([(0.0, 0.0), neck], look.shirt, width * 1.7)
    canvas.line([neck, head], look.skin, width * 0.7)
    canvas.disc(_add(head, _rotate((-0.02, 0.02), up)), HEAD * 1.05, look.hair)
    canvas.disc(head, HEAD * 0.92, look.skin)
    if pose.mouth:
        canvas.disc(_add(head, _rotate((0.045, -0.035), up)), 0.042 * pose.mouth, (60, 10, 20))
    arm(0)
    return Body(neck, head, (hands[1], hands[0]), up)


def draw_bike(canvas: Canvas, colour: Colour) -> None:
    """Draw a bike whose saddle is at the origin."""
    back, front, crank = (-0.25, -0.40), (0.33, -0.40), (0.02, -0.40)
    for wheel in (back, front):
        canvas.disc(wheel, 0.18, None, colour)
    canvas.line([back, crank, (0.24, -0.10), (-0.04, -0.12), back], colour, 0.025)
    canvas.line([front, (0.22, 0.0), (0.30, 0.04)], colour, 0.025)
    canvas.line([crank, (-0.05, -0.03)], colour, 0.025)


def draw_chair(canvas: Canvas, colour: Colour) -> None:
    """Draw a chair whose seat is at the origin, for a person who faces right."""
    canvas.line([(-0.14, 0.26), (-0.12, -0.06), (0.12, -0.06)], colour, 0.035)
    canvas.line([(-0.12, -0.06), (-0.13, -0.30)], colour, 0.03)
    canvas.line([(0.12, -0.06), (0.13, -0.30)], colour, 0.03)


def draw_table(canvas: Canvas, colour: Colour) -> None:
    """Draw a table whose top begins at the origin and extends to the right."""
    canvas.line([(0.0, 0.0), (0.40, 0.0)], colour, 0.035)
    canvas.line([(0.05, 0.0), (0.05, -0.36)], colour, 0.03)
    canvas.line([(0.35, 0.0), (0.35, -0.36)], colour, 0.03)


def draw_bed(canvas: Canvas, colour: Colour) -> None:
    """Draw a bed with the origin at its middle."""
    canvas.polygon([(-0.56, -0.06), (0.56, -0.06), (0.56, -0.15), (-0.56, -0.15)], colour)
    canvas.line([(-0.55, 0.10), (-0.55, -0.22)], colour, 0.03)
    canvas.line([(0.55, -0.06), (0.55, -0.22)], colour, 0.03)


def draw_laptop(canvas: Canvas, colour: Colour) -> None:
    """Draw a laptop whose near edge is at the origin, its screen to the right."""
    canvas.line([(0.0, 0.0), (0.16, 0.0)], colour, 0.03)
    canvas.line([(0.16, 0.0), (0.22, 0.17)], colour, 0.03)


def draw_phone(canvas: Canvas, colour: Colour) -> None:
    canvas.polygon([(-0.025, -0.06), (0.03, -0.06), (0.03, 0.07), (-0.025, 0.07)], colour)


def draw_cup(canvas: Canvas, colour: Colour) -> None:
    canvas.polygon([(-0.04, -0.06), (0.04, -0.06), (0.055, 0.07), (-0.055, 0.07)], colour)


def draw_plate(canvas: Canvas, colour: Colour) -> None:
    canvas.polygon([(-0.09, 0.02), (0.09, 0.02), (0.05, -0.02), (-0.05, -0.02)], colour)
