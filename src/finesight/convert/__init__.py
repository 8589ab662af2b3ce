"""Convert training configurations of ms-swift and LLaMA-Factory to recipes.

`trainer_settings.yaml` has a rule for each setting: it is converted, ignored for a reason, or
unsupported and reported. Its defaults are those of ms-swift 4.6.0, LLaMA-Factory 0.9.5 and
transformers 5.
"""
