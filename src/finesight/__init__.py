"""finesight: teach a Qwen vision-language model your own task, from pictures to a tuned model."""

__version__ = "0.1.0"
