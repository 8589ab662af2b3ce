"""ML backend of Label Studio: predictions for the tasks of a project, below `/label-studio`.

Each control of the labeling configuration is one question about the image: RectangleLabels asks for
boxes, KeyPointLabels for points, Choices for a class, and TextArea for a text. The questions are
those of an import from Label Studio, so that a model that was trained on such a dataset sees its
training question. A TextArea of regions asks for boxes with their text.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from statistics import fmean
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from finesight.errors import UserError
from finesight.ingest.formats.image_annotations import (
    CAPTION_PROMPT,
    DETECTION_PROMPT,
    POINTS_PROMPT,
    format_prompt,
)
from finesight.ingest.formats.label_studio import (
    SPOTTING_PROMPT,
    LabelControl,
    build_answer_result,
    build_region_results,
)
from finesight.ingest.row_reader import Record
from finesight.samples.boxes import clip_box
from finesight.samples.default_prompts import build_class_prompt
from finesight.samples.frames import Box
from finesight.serve.api_schema import ApiError, from_user_error
from finesight.serve.chat_completions import (
    ChatCompletionsHandler,
    ChoiceBuilder,
    limit_time,
    stop_at_disconnect,
)
from finesight.serve.media_sources import LabelStudioImages
from finesight.serve.request_middleware import (
    LABEL_STUDIO_PATH,
    ByteReservation,
    get_reservation,
    read_body,
)

TOKEN_VARIABLE = "LABEL_STUDIO_API_KEY"
TRAINING_ACTION = "START_TRAINING"
MAX_CONCURRENT_TASKS = 16


@dataclass(frozen=True, slots=True)
class LabelStudioOptions:
    """Settings of the ML backend.

    Attributes:
        images: Source of the images of tasks.
        prompt: Template of the question of every control, None for the default of each.
    """

    images: LabelStudioImages
    prompt: str | None = None

    def __post_init__(self) -> None:
        """Raise UserError if the prompt template is invalid."""
        try:
            format_prompt(self.prompt, DETECTION_PROMPT, {"labels": "x"})
        except UserError as error:
            error.where = "--label-studio-prompt"
            raise

    def build_routes(self, completions: ChatCompletionsHandler) -> list[Route]:
        """Build the routes that Label Studio requires of an ML backend."""
        handler = LabelStudioHandler(completions, self)
        return [
            Route(f"{LABEL_STUDIO_PATH}/health", handler.get_health),
            Route(f"{LABEL_STUDIO_PATH}/setup", handler.set_up, methods=["POST"]),
            Route(f"{LABEL_STUDIO_PATH}/versions", handler.list_versions),
            Route(f"{LABEL_STUDIO_PATH}/predict", handler.predict, methods=["POST"]),
            Route(f"{LABEL_STUDIO_PATH}/webhook", handler.receive_event, methods=["POST"]),
        ]


@dataclass(frozen=True)
class LabelStudioHandler:
    """Handles the requests of Label Studio with the resources of chat completions.

    `num_answers` has the number of answers of each running request.
    """

    completions: ChatCompletionsHandler
    options: LabelStudioOptions
    num_answers: list[int] = field(default_factory=list)
    semaphore: asyncio.Semaphore = field(
        default_factory=lambda: asyncio.Semaphore(MAX_CONCURRENT_TASKS)
    )

    @property
    def model_name(self) -> str:
        """Model that predicts, which is also the model version in Label Studio."""
        return self.completions.service.model_names[0]

    async def get_health(self, request: Request) -> Response:
        """Return the state of the model."""
        if self.completions.service.is_alive:
            status = "UP"
            status_code = 200
        else:
            status = "DOWN"
            status_code = 503
        return JSONResponse({"status": status, "model_class": self.model_name}, status_code)

    async def set_up(self, request: Request) -> Response:
        """Return the model version."""
        # The body contains a token of the Label Studio user, so it is not parsed.
        return JSONResponse({"model_version": self.model_name})

    async def list_versions(self, request: Request) -> Response:
        """Return the model version as a list."""
        return JSONResponse({"versions": [self.model_name]})

    async def receive_event(self, request: Request) -> Response:
        """Accept an event of a webhook, and reject the start of a training."""
        if (await self._parse_body(request))["action"] == TRAINING_ACTION:
            message = "the server does not train; export the labels and train with them"
            raise ApiError(400, message, "action")
        return JSONResponse({})

    async def _parse_body(self, request: Request) -> dict[str, Any]:
        handler = self.completions
        preprocessor = handler.create_preprocessor()
        body = await read_body(request)
        try:
            async with stop_at_disconnect(request.receive):
                return await handler.parse_in_thread(preprocessor.parse_label_studio_body, body)
        except BaseException:
            preprocessor.cancel()
            raise

    async def predict(self, request: Request) -> Response:
        """Predict all tasks of a request. A task with an error has no result.

        Raises:
            ApiError: The labeling configuration has no supported control, or a limit is exceeded.
            ClientDisconnectedError: Label Studio disconnected.
        """
        start_time = asyncio.get_running_loop().time()
        parsed = await self._parse_body(request)
        controls = [LabelControl(**control) for control in parsed["controls"]]
        if not controls:
            raise ApiError(
                400,
                "no control for images in the labeling configuration; expected RectangleLabels,"
                " KeyPointLabels, Choices or TextArea",
                "label_config",
            )

        async def predict(references: Sequence[str | None]) -> Record:
            async with self.semaphore:
                try:
                    return await self._predict_task(controls, references, request, start_time)
                except ApiError as error:
                    if error.status == 504:
                        raise
                    return {"error": error.message}

        with self._admit_answers(len(controls) * len(parsed["tasks"])):
            async with (
                limit_time(start_time, self.completions.limits.timeout),
                stop_at_disconnect(request.receive) as group,
            ):
                # An error of any task cancels the others.
                tasks = [group.create_task(predict(one)) for one in parsed["tasks"]]
                results = await asyncio.gather(*tasks)
        return JSONResponse({"results": results})

    @contextlib.contextmanager
    def _admit_answers(self, number: int) -> Iterator[None]:
        """Count the answers of a request within a `with` block, or raise ApiError."""
        limit = self.completions.limits.max_label_studio_answers
        if sum(self.num_answers) + number > limit:
            message = f"{sum(self.num_answers)} answers are in progress; expected at most {limit}"
            raise ApiError(429, message, code="rate_limit_exceeded", retry_after_s=10)
        self.num_answers.append(number)
        try:
            yield
        finally:
            self.num_answers.remove(number)

    async def _predict_task(
        self,
        controls: Sequence[LabelControl],
        references: Sequence[str | None],
        request: Request,
        start_time: float,
    ) -> Record:
        """Ask the question of each control, and return the prediction of a task."""
        results: list[Record] = []
        scores = []
        budget = get_reservation(request.scope).budget
        fetch = partial(self.options.images.fetch, web=self.completions.fetcher)
        for control, reference in zip(controls, references, strict=True):
            if reference is None:
                message = f"a task without the data {control.data_key[:80]!r}"
                raise ApiError(400, message, "tasks")
            body = bytearray(json.dumps(self._build_request(control, reference.strip())).encode())
            reservation = ByteReservation(budget)
            reservation.reserve(len(body))
            try:
                with self.completions.admit_completion(start_time, fetch) as completion:
                    await completion.start(body, request.state.owner, reservation)
                    (choice,) = await completion.generate_choices()
            finally:
                reservation.release()
            results += build_results(control, choice, completion.image_sizes[0])
            logprobs = [entry["logprob"] for entry in choice.logprobs]
            score = 0.0
            if logprobs:
                score = math.exp(fmean(logprobs))
            scores.append(score)
        return {"result": results, "score": fmean(scores), "model_version": self.model_name}

    def _build_request(self, control: LabelControl, url: str) -> Record:
        """Build the chat completion request of a control."""
        default = {
            "boxes": SPOTTING_PROMPT if control.text_name else DETECTION_PROMPT,
            "points": POINTS_PROMPT,
            "choices": build_class_prompt(len(control.labels)),
            "text": CAPTION_PROMPT,
        }[control.kind]
        # Sorted, as the import does.
        labels = {"labels": ", ".join(sorted(control.labels))}
        prompt_format = self.completions.service.get_prompt_format(self.model_name)
        try:
            question = format_prompt(self.options.prompt, default, labels)
            text = "".join(part.text for part in question)
            content = prompt_format.build_request_content(text, [url])
        except UserError as error:
            raise from_user_error(error, "label_config") from error
        messages = [{"role": "user", "content": content}]
        return {"model": self.model_name, "messages": messages, "logprobs": True}


def build_results(
    control: LabelControl, choice: ChoiceBuilder, image_size: tuple[int, int]
) -> list[Record]:
    """Convert an answer to results of a control. Labels that the control lacks are left out."""
    assert choice.prediction is not None, f"choice {choice.index} is not complete"
    names = {_normalize(label): label for label in control.labels}
    if control.kind in ("boxes", "points"):
        is_point = control.kind == "points"
        results = []
        for number, box in enumerate(choice.prediction.boxes, start=1):
            label = names.get(_normalize(box.label or ""))
            if control.labels and (control.text_name or len(control.labels) == 1):
                label = label or control.labels[0]
            xyxy: Box = box.xyxy
            if is_point:
                x1, y1, x2, y2 = box.xyxy
                x = (x1 + x2) / 2
                y = (y1 + y2) / 2
                xyxy = (x, y, x, y)
            corners = clip_box(xyxy, image_size, is_point=is_point)
            if label is not None and corners is not None:
                results += build_region_results(
                    f"{control.name}-{number}",
                    corners,
                    image_size,
                    label,
                    (box.label or "") if control.text_name else None,
                    (control.name, control.text_name or "", control.image_name),
                )
        return results
    answer = choice.prediction.answer.strip()
    answers = [answer]
    if control.kind == "choices":
        parts = [answer]
        if control.is_multiple:
            parts += answer.split(",")
        found = [names[name] for name in map(_normalize, parts) if name in names]
        answers = list(dict.fromkeys(found))
    if not answers:
        return []
    target = (control.name, control.image_name)
    return [build_answer_result(answers, is_choice=control.kind == "choices", controls=target)]


def _normalize(label: str) -> str:
    return " ".join(label.casefold().split())
