"""Tracker that writes TensorBoard event files."""

from __future__ import annotations

from textwrap import indent
from typing import TYPE_CHECKING

from finesight.track.tracker import Tracker, flatten_settings, make_folder_name
from finesight.tracker_components import TrackerComponent

if TYPE_CHECKING:
    from finesight.track.tracker_records import (
        AlertRecord,
        FinishRecord,
        ImagesRecord,
        MetricsRecord,
        StartRecord,
    )


class TensorBoardTracker(Tracker):
    """Tracker that writes TensorBoard event files in the run folder; alerts are texts."""

    def start_run(self, record: StartRecord) -> str:
        from torch.utils.tensorboard import SummaryWriter

        # Steps after the last checkpoint are repeated: TensorBoard discards their old values.
        purge_step = record.step + 1 if record.step else None
        folder = record.folder
        if record.tracker.run_name is not None:
            # TensorBoard names runs after their folders.
            folder /= make_folder_name(record.name)
        self._writer = SummaryWriter(str(folder), purge_step=purge_step, flush_secs=10)
        if record.description:
            self._writer.add_text("description", record.description, record.step)
        rows = "".join(
            f"| {name} | {value} |\n" for name, value in flatten_settings(record.settings)
        )
        self._writer.add_text("settings", f"| setting | value |\n|---|---|\n{rows}", record.step)
        return f"TensorBoard: tensorboard --logdir {record.folder}"

    def log_metrics(self, record: MetricsRecord) -> None:
        for step_metrics in record.steps:
            for name, value in step_metrics.values.items():
                self._writer.add_scalar(name, value, step_metrics.step)

    def log_images(self, record: ImagesRecord) -> None:
        import numpy as np

        for name, example in record.iter_named():
            pixels_HWC = np.asarray(example.image)
            self._writer.add_image(name, pixels_HWC, record.step, dataformats="HWC")
            # A code block, since TensorBoard renders texts as Markdown.
            self._writer.add_text(name, indent(example.caption, "    "), record.step)

    def send_alert(self, record: AlertRecord) -> None:
        text = f"**{record.title}** ({record.level})\n\n{record.text}"
        self._writer.add_text("alerts", text, record.step)

    def finish_run(self, record: FinishRecord) -> None:
        self._writer.close()


COMPONENT = TrackerComponent(
    kind="trackers",
    name="tensorboard",
    title="TensorBoard",
    implementation="finesight.track.trackers.tensorboard:TensorBoardTracker",
    extra="track",
    writes_run_folder=True,
    guesses="tensorboard",
    position=2,
)
