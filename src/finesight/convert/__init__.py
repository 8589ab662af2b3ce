"""Training configurations of ms-swift and LLaMA-Factory become recipes.

What each of their settings becomes is a table (`ms_swift_keys` and `llama_factory_keys`, with
`trainer_keys` for what both take from transformers): a setting of the recipe, nothing with a
reason, or a difference that is told. Defaults are those of ms-swift 4.6.0, LLaMA-Factory 0.9.5 and
transformers 5.
"""
