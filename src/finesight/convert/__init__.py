"""Convert training configurations and scripts of other programs to recipes.

`trainer_settings.yaml` has a rule for each setting: it is converted, ignored for a reason, or
unsupported and reported. Its defaults are those of ms-swift 4.6.0, LLaMA-Factory 0.9.5, TRL 1.16
and transformers 5.
"""
