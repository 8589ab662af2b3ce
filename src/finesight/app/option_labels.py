"""Labels and hints of the options of commands in the words of the page."""

from __future__ import annotations

from collections.abc import Mapping

OPTION_LABELS: Mapping[str, str] = {
    "train_fraction": "Share for training",
    "rows": "Only these rows",
    "replace_prompts": "Replace all questions by",
    "eval_last": "Last rows for validation",
    "on_invalid_row": "Invalid rows",
    "on_invalid_box": "Invalid boxes",
    "copy_images": "Copy the images",
    "encoding": "Text encoding",
    "mapping": "Mapping file",
    "no_header": "Table without a header",
    "format": "File format",
    "box_task": "Task of boxes",
    "box_format": "Order of box coordinates",
    "box_units": "Unit of box coordinates",
    "pages": "Pages of documents",
    "limit": "Maximum number of samples",
    "suggestions": "Suggest answers",
    "teacher": "Suggestions from",
    "teacher_model": "Model of the server",
    "teacher_answers": "Answers per image",
    "teacher_boxes": "Box coordinates of the server",
    "teacher_budget": "Maximum number of requests",
    "max_new_tokens": "Maximum length of an answer",
    "batch_size": "Answers at the same time",
    "device": "Compute device",
    "precision": "Numerical precision",
    "weight_format": "Weight format",
    "thinking": "Thinking mode",
    "reasoning_effort": "Reasoning effort",
    "model": "Check for this model",
    "max_length": "Maximum length of a sample",
    "gpus": "Number of GPUs",
    "search:gpus": "GPUs of the search",
    "gpu": "Name of the GPU",
    "force": "Start even without enough memory",
    "trials": "Maximum number of trials",
    "data": "File with other samples",
    "metric": "Metric",
    "out": "File for the answers",
    "suite": "File with own questions",
    "images_per_question": "Images per question",
    "image_format": "Another image format",
    "max_num_seqs": "Requests at the same time",
    "base": "Base model",
}
"""Label of each option by parameter, or by form and parameter."""

OPTION_HINTS: Mapping[str, str] = {
    "train_fraction": "Between 0 and 1, such as 0.9; the other samples are for validation. Samples"
    " with the same image stay together.",
    "rows": "From A up to B, without B, as A:B, counted from 0. Negative numbers count from the"
    " end. Empty: all rows.",
    "replace_prompts": "The question of each sample becomes this text; images keep their place."
    " Empty: the questions stay.",
    "eval_last": "The last rows are for validation instead of a share. Training samples with the"
    " same images are left out.",
    "on_invalid_row": "Rows with a missing image or an impossible box: fail and write nothing, or"
    " skip and list them.",
    "on_invalid_box": "Boxes without area, for example: fail, drop them, or clip them to the"
    " image.",
    "copy_images": "Copy the images into the data set. Otherwise, it refers to the files in place.",
    "mapping": "A file that states the role of every key of the records.",
    "format": "Empty: detected from the content.",
    "box_format": "xyxy: left, top, right, bottom; xywh: left, top, width, height; cxcywh: center,"
    " width, height; yxyx: top, left, bottom, right. Empty: of the format.",
    "box_units": "pixel: of the original image; 1: fractions; 100: percent; 1000: thousandths;"
    " resized: pixels of the image as Qwen2.5-VL resizes it. Empty: of the format.",
    "pages": "Pages of PDF and TIFF files, such as 1, 1-3,5 or 2-. Each is an image of the same"
    " sample. Empty: all.",
    "teacher": "Another run or model, or a server with an OpenAI-compatible API, which receives the"
    " images and questions. Empty: the model above.",
    "reasoning_effort": "xhigh, medium or low, with models that have it. Turns the thinking mode"
    " on.",
    "model": "A folder, or a name on a hub. Special tokens in texts are reported for it.",
    "max_length": "Longer samples are reported, in tokens of that model. Empty: no limit.",
    "gpus": "Estimate for several GPUs. The page trains on one.",
    "metric": "Name of another metric. Empty: that of the run.",
    "data": "Samples with answers. Empty: the validation samples of the run.",
    "out": "Each answer with its scores, for a comparison later.",
    "search:gpus": "One trial on each: all, or numbers such as 0,2. Without a GPU, trials run one"
    " after the other.",
}
"""Hint of options whose help is for a terminal, by parameter, or by form and parameter."""
