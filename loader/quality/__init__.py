"""What did FP8 do to the pictures? Prompts, pipelines run on them, and what is measured there.

`running` is what every part shares; the rest is one question a module.
"""
