"""A data format, a metric and a tracker for finesight: readings of meters."""

from finesight.errors import UserError
from finesight.evaluate.eval_case import MetricResult, mean_metrics
from finesight.ingest.formats.dataset_format import DatasetFormat, RowImages, build_example
from finesight.metric_components import MetricComponent, Score
from finesight.samples.sample import Message, TextPart
from finesight.track.tracker import Tracker
from finesight.tracker_components import TrackerComponent


def parse_row(row, context):
    if "kwh" not in row.record:
        raise UserError("no reading", expected="the key kwh", remedy="add it, or remove the row")
    image = RowImages(context).add_image(row.record.get("photo"))
    question = context.add_prompt([image, TextPart(text="Read the meter.")])
    answer = (TextPart(text=str(row.record["kwh"])),)
    turns = [Message(role="user", content=question), Message(role="assistant", content=answer)]
    return build_example(row.id, turns, {})


def score(cases):
    scores = []
    for case in cases:
        is_correct = case.answer.lstrip("0") in case.references
        scores.append({"correct": float(is_correct)})
    return MetricResult(scores, mean_metrics(scores))


class CsvTracker(Tracker):
    def start_run(self, record):
        record.folder.mkdir(parents=True, exist_ok=True)
        self.file = (record.folder / "metrics.csv").open("a")
        return f"metrics in {self.file.name}"

    def log_metrics(self, record):
        for step in record.steps:
            self.file.writelines(f"{step.step},{n},{v}\n" for n, v in step.values.items())

    def log_images(self, record): ...

    def send_alert(self, record): ...

    def finish_run(self, record):
        self.file.close()


FORMAT = DatasetFormat("meter-log", '{"photo": "path", "kwh": "..."}', parse_row)
METRIC = MetricComponent(
    kind="metrics",
    name="meter-reading",
    title="Readings of meters",
    implementation="finesight_plugin_example:score",
    primary_score="correct",
    scores={"correct": Score(title="correct readings")},
)
TRACKER = TrackerComponent(
    kind="trackers",
    name="csv",
    title="CSV files",
    implementation="finesight_plugin_example:CsvTracker",
    writes_run_folder=True,
)
