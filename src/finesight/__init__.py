"""finesight: teach a Qwen vision-language model your own task, from pictures to a tuned model."""
