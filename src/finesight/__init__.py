"""finesight: teach a Qwen vision-language model your own task, from pictures to a tuned model.

Importing it imports nothing. What people do from Python is in `finesight.api`.
"""

__version__ = "0.1.0"
