"""The embedded untrimmed motion set: drawn videos of several actions with their times.

A video is a sequence of shots. In each, a person rests, acts and rests; some shots have no action, some repeat the
previous one, and in some two people act, so that two actions overlap. People are drawn as in the set's clips.
"""

from dataclasses import dataclass, replace
from functools import cached_property
from itertools import count

import numpy as np
from jaxtyping import UInt8

from clip_har_jax.data.motion import DEFAULT_SIZE_PX, LABELS, VERSION, Scene
from clip_har_jax.data.synthetic import SUPERSAMPLING
from clip_har_jax.video.segments import Segment

SPLITS = {"train": 480, "val": 48, "test": 96}  # number of videos
ACTION_S = (1.1, 1.9)  # length of an action; as in the clips
REST_S = (0.3, 1.8)  # before and after it, in its shot
IDLE_S = (1.0, 3.0)  # length of a shot without an action
NUM_SHOTS = (4, 8)
IDLE_SHARE, REPEAT_SHARE, PAIR_SHARE = 0.2, 0.25, 0.2
SEEDS = 100  # of the people, other than those of the clips
NEVER_S = 1e9
SMALL, ASIDE = 0.62, 0.24  # scale and position of two people, relative to height and width of the stage


@dataclass(frozen=True)
class Shot:
    """A part of a video without a cut.

    Attributes:
      start_s, end_s: in the video.
      actions: (label, start_s, end_s) of each person; None: the person rests.
    """

    start_s: float
    end_s: float
    actions: tuple[tuple[str, float, float] | None, ...]


@dataclass(frozen=True)
class DrawnVideo:
    """An untrimmed video whose frames are drawn on demand; a pure function of its fields."""

    split: str
    index: int
    size_px: int = DEFAULT_SIZE_PX

    @cached_property
    def shots(self) -> tuple[Shot, ...]:
        """The shots in order."""
        rng = np.random.default_rng((list(SPLITS).index(self.split), self.index, VERSION, 11))
        shots: list[Shot] = []
        start_s, label = 0.0, ""
        for _ in range(rng.integers(NUM_SHOTS[0], NUM_SHOTS[1] + 1)):
            if rng.random() < IDLE_SHARE:
                shots.append(Shot(start_s, start_s + rng.uniform(*IDLE_S), (None,)))
            else:
                label = label if label and rng.random() < REPEAT_SHARE else str(rng.choice(LABELS))
                shots.append(_act(start_s, label, rng))
            start_s = shots[-1].end_s
        return tuple(shots)

    @property
    def duration_s(self) -> float:
        """Length of the video."""
        return self.shots[-1].end_s

    @property
    def segments(self) -> tuple[Segment, ...]:
        """The actions with their times, in the order of their starts."""
        found = [action for shot in self.shots for action in shot.actions if action is not None]
        return tuple(sorted(Segment(start_s, end_s, label) for label, start_s, end_s in found))

    def frame_at(self, time_s: float) -> UInt8[np.ndarray, "size size 3"]:
        """Draw the frame at a time from 0 to `duration_s`."""
        number = next((i for i, shot in enumerate(self.shots) if time_s < shot.end_s), len(self.shots) - 1)
        people = self._people(number)
        stage = people[0].background
        for person in people:
            stage = person.draw_on(stage, time_s - self.shots[number].start_s)
        return np.asarray(stage.reduce(SUPERSAMPLING))

    def _people(self, number: int) -> list[Scene]:
        """Return the scenes of a shot, one per person; the first one's stage is used."""
        if number in self._drawn:
            return self._drawn[number]
        shot, people = self.shots[number], list[Scene]()
        seeds = count(64 * (64 * self.index + number))
        for i, action in enumerate(shot.actions):
            while True:  # until the person contrasts with the first one's stage
                seed = next(seeds)
                label = LABELS[(self.index + number) % len(LABELS)] if action is None else action[0]
                person = Scene(label, (SEEDS + list(SPLITS).index(self.split), seed), self.size_px)
                if not people or person.dark == people[0].dark:
                    break
            begin_s, end_s = (NEVER_S, NEVER_S + 1) if action is None else (t - shot.start_s for t in action[1:])
            person.course = replace(person.course, begin_s=begin_s, end_s=end_s)
            if len(shot.actions) > 1:
                person.move((2 * i - 1) * ASIDE, SMALL)
            people.append(person)
        self._drawn.clear()  # frames are requested in the order of time, so one shot is enough
        self._drawn[number] = people
        return people

    @cached_property
    def _drawn(self) -> dict[int, list[Scene]]:
        return {}


def _act(start_s: float, label: str, rng: np.random.Generator) -> Shot:
    """Return a shot with an action, sometimes with a second person's action."""
    begin_s = start_s + rng.uniform(*REST_S)
    end_s = begin_s + rng.uniform(*ACTION_S)
    actions: list[tuple[str, float, float] | None] = [(label, float(begin_s), float(end_s))]
    if rng.random() < PAIR_SHARE:
        other = str(rng.choice([one for one in LABELS if one != label]))
        begin = begin_s + rng.uniform(0.2, 0.8)
        actions.append((other, float(begin), float(begin + rng.uniform(*ACTION_S))))
    last_s = max(action[2] for action in actions if action is not None)
    return Shot(start_s, float(last_s + rng.uniform(*REST_S)), tuple(actions))
