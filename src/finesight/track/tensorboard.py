"""Tracker that writes TensorBoard event files with the tensorboard package, without torch."""

from __future__ import annotations

import time
from typing import Any

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
from tensorboard.compat.proto.tensor_pb2 import TensorProto
from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto
from tensorboard.plugins.text.plugin_data_pb2 import TextPluginData
from tensorboard.summary.writer.event_file_writer import EventFileWriter

from finesight.track.tracker import Tracker, flatten_settings
from finesight.track.tracker_records import (
    AlertRecord,
    FinishRecord,
    ImagesRecord,
    MetricsRecord,
    RunStarted,
    StartRecord,
)

FLUSH_INTERVAL_S = 10
"""Seconds between two flushes of an event file."""


class TensorBoardTracker(Tracker):
    """Tracker that writes TensorBoard event files in the run folder; alerts are texts."""

    def start_run(self, record: StartRecord) -> RunStarted:
        self._event_writer: Any = EventFileWriter(str(record.folder), flush_secs=FLUSH_INTERVAL_S)
        if record.step:
            # Steps after the last checkpoint are repeated: TensorBoard discards their old values.
            session_log = SessionLog(status=SessionLog.START)
            self._write_event(record.step + 1, session_log=session_log)
        rows = "".join(
            f"| {name} | {value} |\n" for name, value in flatten_settings(record.settings)
        )
        self._write_text(record.step, "settings", f"| setting | value |\n|---|---|\n{rows}")
        return RunStarted(id=None, message=f"TensorBoard: tensorboard --logdir {record.folder}")

    def log_metrics(self, record: MetricsRecord) -> None:
        for step_metrics in record.steps:
            values = [Summary.Value(tag=n, simple_value=v) for n, v in step_metrics.values.items()]
            self._write_event(step_metrics.step, summary=Summary(value=values))

    def log_images(self, record: ImagesRecord) -> None:
        for name, tracked_image in record.iter_named():
            width, height = tracked_image.decode().size
            image = Summary.Image(
                encoded_image_string=tracked_image.jpeg, width=width, height=height, colorspace=3
            )
            value = Summary.Value(tag=name, image=image)
            self._write_event(record.step, summary=Summary(value=[value]))
            self._write_text(record.step, name, _to_code_block(tracked_image.caption))
        self._event_writer.flush()

    def send_alert(self, record: AlertRecord) -> None:
        self._write_text(
            record.step, "alerts", f"**{record.title}** ({record.level})\n\n{record.text}"
        )
        self._event_writer.flush()

    def finish_run(self, record: FinishRecord) -> None:
        self._event_writer.close()

    def _write_text(self, step: int, name: str, text: str) -> None:
        content = TextPluginData(version=0).SerializeToString()
        plugin = SummaryMetadata.PluginData(plugin_name="text", content=content)
        tensor = TensorProto(
            dtype="DT_STRING",
            string_val=[text.encode()],
            tensor_shape=TensorShapeProto(dim=[TensorShapeProto.Dim(size=1)]),
        )
        value = Summary.Value(
            tag=f"{name}/text_summary",
            metadata=SummaryMetadata(plugin_data=plugin),
            tensor=tensor,
        )
        self._write_event(step, summary=Summary(value=[value]))

    def _write_event(self, step: int, **fields: object) -> None:
        self._event_writer.add_event(Event(wall_time=time.time(), step=step, **fields))


def _to_code_block(caption: str) -> str:
    """Format a caption as a Markdown code block, since TensorBoard renders texts as Markdown."""
    return "".join(f"    {line}\n" for line in caption.splitlines())
