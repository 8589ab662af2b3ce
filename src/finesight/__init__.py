"""finesight: fine-tune Qwen vision-language models on images.

The Python API is `finesight.api`. Importing the package itself imports no dependencies.
"""

__version__ = "0.1.0"
