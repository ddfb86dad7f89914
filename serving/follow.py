"""From the frames of one stream to events, with a model."""

import dataclasses
from typing import Annotated

import numpy as np
from fastapi import Depends, Query
from pydantic.json_schema import SkipJsonSchema

from clip_har_jax.errors import UserError
from clip_har_jax.inference.stream import Event, EventDetector, EventRules
from serving.batcher import Lane
from serving.classes import Prompts, TextClasses
from serving.models import ServedModel
from serving.problems import Problem
from serving.requests import ModelQuery, Threshold, async_dependency
from serving.service import Service


@dataclasses.dataclass(frozen=True)
class EventOptions:
    """The rules of events; the defaults are the detector's."""

    smoothing: Annotated[str, Query(pattern="^(exponential|attention|none)$")] = EventRules.smoothing
    memory_s: Annotated[float, Query(gt=0, le=60, allow_inf_nan=False)] = EventRules.memory_s
    start_score: Annotated[float, Query(ge=0, le=1, allow_inf_nan=False)] = EventRules.start_score
    end_score: Annotated[float, Query(ge=0, le=1, allow_inf_nan=False)] = EventRules.end_score
    min_duration_s: Annotated[float, Query(ge=0, le=600, allow_inf_nan=False)] = EventRules.min_duration_s
    threshold: Annotated[Threshold | SkipJsonSchema[None], Query()] = None
    top: Annotated[int, Query(ge=1, le=100)] = 5
    classes: Annotated[list[str], Query(description="as /v1/predict takes them")] = ()  # type: ignore[assignment]

    def rules(self, model: ServedModel, free: bool) -> EventRules:
        """Return the detector's rules for a model.

        Raises:
          Problem: they contradict each other.
        """
        below = self.threshold if self.threshold is not None or free else model.abstain_below
        try:
            return EventRules(
                self.smoothing, self.memory_s, self.start_score, self.end_score, self.min_duration_s, below
            )
        except UserError as error:
            raise Problem("invalid_request", str(error)) from error


EventQuery = Annotated[EventOptions, Depends(async_dependency(EventOptions))]


class Follower:
    """Turn the frames of one stream into events; a switch of the model ends the current events."""

    def __init__(self, service: Service, choice: ModelQuery, options: EventOptions, prompts: dict[str, Prompts] | None):
        self._service, self._choice, self._options, self._prompts = service, choice, options, prompts
        self.model: ServedModel | None = None
        self._classes: TextClasses | None = None
        self.detector = EventDetector(())

    async def choose(self, deadline: float) -> tuple[Event, ...]:
        """Use the model that is active now; return the events that ended with the previous one."""
        model = self._service.models.get(self._choice.model, self._choice.version)
        if model is self.model:
            return ()
        classes = model.classes
        if self._prompts is not None:
            if not model.accepts_classes:
                raise model.refusal()
            classes = await model.open_vocabulary(self._prompts, self._service.batcher, deadline)
        rules = self._options.rules(model, self._prompts is not None)
        ended = self.detector.finish()
        self.model, self._classes = model, classes
        self.detector = EventDetector(classes.labels if classes else model.labels, rules)
        return ended

    @property
    def lane(self) -> Lane:
        """Return the lane that takes most of a frame's time."""
        assert self.model is not None, "choose comes first"
        return self.model.embed if self._classes is not None else self.model.classify

    async def measure(self, pixels: np.ndarray, deadline: float) -> tuple[np.ndarray, np.ndarray | None]:
        """Return a frame's logits, and its embedding if needed."""
        model, batcher, classes = self.model, self._service.batcher, self._classes
        assert model is not None, "choose comes first"
        attends = self.detector.rules.smoothing == "attention"
        embedding = await batcher.run(model.embed, pixels, deadline) if classes or attends else None
        if classes is not None and embedding is not None:
            return classes.logits(embedding), embedding
        return await batcher.run(model.classify, pixels, deadline), embedding
