"""The model `finesight` of lmms-eval: runs, adapters and models that finesight loads.

python -m lmms_eval --model finesight --model_args model=runs/mine --tasks docvqa_val
"""

import tempfile
from collections import defaultdict
from pathlib import Path

from lmms_eval.api.instance import GenerationResult, TokenCounts
from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelManifest

from finesight.api import UserError, load_model
from finesight.samples.sample import LocatedSample, Message, Sample

MANIFEST = ModelManifest("finesight", chat_class_path="finesight_lmms_eval.FinesightModel")
DEFAULT_MAX_NEW_TOKENS = 1024
CHUNK_SIZE = 256


class FinesightModel(lmms):
    """Greedy answers in one process.

    Args:
        model: Run, model or adapter folder, hub name, or finesight-tiny.
        device: Device of lmms-eval, such as `cuda:0`; None for a GPU if there is one.
        question_form: Ask a run in the form of its training, such as the text before the image.
            Otherwise, the parts of a question have the order of the task.
        loading: Options of `finesight.api.load_model`, such as `weight_format=nf4`.
    """

    is_simple = False

    def __init__(
        self,
        model,
        batch_size=1,
        device=None,
        max_batch_size=None,
        question_form=True,
        **loading,
    ):
        super().__init__()
        self.question_form = question_form
        self.batch_size = int(batch_size)
        loading["device"] = (device or "auto").partition(":")[0]
        self.finesight_model = load_model(str(model), **loading)

    def generate_until(self, requests):
        """Answer questions. As with `async_openai`, stop strings of the task are ignored."""
        by_length = defaultdict(list)
        for index, request in enumerate(requests):
            by_length[read_max_new_tokens(request.args[2])].append(index)
        results = {}
        for max_new_tokens, indices in by_length.items():
            # The images of a chunk are files until it is answered.
            for chunk in split(indices, CHUNK_SIZE):
                with tempfile.TemporaryDirectory() as folder:
                    samples = [self.build_sample(requests[n], n, Path(folder)) for n in chunk]
                    answers = self.finesight_model.generate_batch(
                        samples, max_new_tokens=max_new_tokens, batch_size=self.batch_size
                    )
                results |= dict(zip(chunk, map(to_result, answers), strict=True))
        return [results[index] for index in range(len(requests))]

    def build_sample(self, request, index, folder):
        """Convert the messages of a request, and save its images."""
        _, doc_to_messages, _, doc_id, task, split_name = request.args
        messages = []
        for turn in doc_to_messages(self.task_dict[task][split_name][doc_id]):
            parts = []
            for number, part in enumerate(turn["content"]):
                kind = part["type"]
                if kind == "text":
                    parts.append(part)
                elif kind in ("image", "video") and isinstance(part["url"], str | Path):
                    parts.append({"type": kind, kind: str(Path(part["url"]).resolve())})
                elif kind == "image":
                    file = folder / f"{index}-{len(messages)}-{number}.png"
                    part["url"].save(file)
                    parts.append({"type": "image", "image": str(file)})
                else:
                    raise UserError(
                        f"a part of the type {kind}",
                        where=f"{task}, document {doc_id}",
                        expected="text, images, and files of videos",
                        remedy="choose another task",
                    )
            messages.append(Message.model_validate({"role": turn["role"], "content": parts}))
        if self.question_form:
            messages = self.finesight_model.arrange(messages)
        return LocatedSample(Sample(id=f"{task}-{doc_id}", messages=tuple(messages)), folder)

    def loglikelihood(self, requests):
        raise NotImplementedError("finesight answers tasks of the type generate_until only")

    def generate_until_multi_round(self, requests):
        raise NotImplementedError("finesight answers tasks of the type generate_until only")


def read_max_new_tokens(options):
    """Return the token limit of a request; sampling is an error."""
    if options.get("do_sample") or (options.get("temperature") or 0) > 0:
        raise UserError(
            f"temperature {options.get('temperature')}, do_sample {options.get('do_sample')}",
            where="generation_kwargs",
            expected="greedy decoding",
            remedy="use --gen_kwargs temperature=0,do_sample=False, or async_openai with"
            " `finesight serve`",
        )
    return options.get("max_new_tokens", DEFAULT_MAX_NEW_TOKENS)


def split(items, size):
    """Yield lists of up to `size` items."""
    return (items[start : start + size] for start in range(0, len(items), size))


def to_result(prediction):
    """Convert a prediction to a result of lmms-eval."""
    counts = TokenCounts(output_tokens=prediction.num_tokens)
    return GenerationResult(prediction.text, counts)
