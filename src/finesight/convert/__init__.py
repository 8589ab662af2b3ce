"""Convert training configurations of ms-swift and LLaMA-Factory to recipes.

`ms_swift_rules`, `llama_factory_rules` and `hf_trainer_rules` (settings of transformers that both
programs accept) contain one rule per setting: it maps to recipe settings, is ignored with a reason,
or is unsupported and reported. Defaults are those of ms-swift 4.6.0, LLaMA-Factory 0.9.5 and
transformers 5.
"""
