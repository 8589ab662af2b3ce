"""TensorBoard's event files, by its own writer: what torch wraps, without torch."""

from __future__ import annotations

import time
from typing import Any

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
from tensorboard.compat.proto.tensor_pb2 import TensorProto
from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto
from tensorboard.plugins.text.plugin_data_pb2 import TextPluginData
from tensorboard.summary.writer.event_file_writer import EventFileWriter

from finesight.track.records import Alert, Begin, Begun, End, Figures, Pictures
from finesight.track.writer import Writer, flat

FLUSHED = 10
"""Seconds until figures can be seen."""


class TensorBoard(Writer):
    """Files in the tracker's folder; alerts are texts."""

    def begin(self, begin: Begin) -> Begun:
        self._files: Any = EventFileWriter(str(begin.folder), flush_secs=FLUSHED)
        if begin.step:
            # Steps after the last checkpoint are done again: their first figures are passed over.
            again = SessionLog(status=SessionLog.START)
            self._write(begin.step + 1, session_log=again)
        rows = "".join(f"| {name} | {value} |\n" for name, value in flat(begin.settings))
        self._text(begin.step, "settings", f"| setting | value |\n|---|---|\n{rows}")
        return Begun(id=None, told=f"TensorBoard: tensorboard --logdir {begin.folder}")

    def figures(self, figures: Figures) -> None:
        for row in figures.rows:
            values = [Summary.Value(tag=n, simple_value=v) for n, v in row.values.items()]
            self._write(row.step, summary=Summary(value=values))

    def pictures(self, pictures: Pictures) -> None:
        for name, picture in pictures.named():
            width, height = picture.image().size
            image = Summary.Image(
                encoded_image_string=picture.jpeg, width=width, height=height, colorspace=3
            )
            value = Summary.Value(tag=name, image=image)
            self._write(pictures.step, summary=Summary(value=[value]))
            self._text(pictures.step, name, _as_markdown(picture.caption))
        self._files.flush()

    def alert(self, alert: Alert) -> None:
        self._text(alert.step, "alerts", f"**{alert.title}** ({alert.level})\n\n{alert.text}")
        self._files.flush()

    def end(self, end: End) -> None:
        self._files.close()

    def _text(self, step: int, name: str, text: str) -> None:
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
        self._write(step, summary=Summary(value=[value]))

    def _write(self, step: int, **what: object) -> None:
        self._files.add_event(Event(wall_time=time.time(), step=step, **what))


def _as_markdown(caption: str) -> str:
    """A code block: what a model says is not to be laid out."""
    return "".join(f"    {line}\n" for line in caption.splitlines())
