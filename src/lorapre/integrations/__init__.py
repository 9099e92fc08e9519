"""LoRA-Pre inside other libraries' loops and factories, one module each, imported on demand.

What is not here needs nothing: accelerate takes the optimizers as they are (docs/integrations.md).
"""
