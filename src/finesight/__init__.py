"""finesight: fine-tune Qwen vision-language models on images.

Importing the package imports no dependencies. The Python API is `finesight.api`.
"""

__version__ = "0.1.0"
