"""The experiments of LoRA-Pre, from the command line: `lorapre pretrain --help`.

The library itself is the package `lorapre`, which needs nothing but torch and never imports this.
"""
