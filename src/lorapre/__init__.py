"""LoRA-Pre: Adam and Muon whose momenta live as low-rank factors, m = B A (arXiv 2602.24283)."""

from lorapre.groups import param_groups
from lorapre.migration import from_adamw, to_adamw
from lorapre.optimizers import LoRAPreAdamW, LoRAPreMuon
from lorapre.release import gradient_release
from lorapre.report import coverage

__all__ = [
    "LoRAPreAdamW", "LoRAPreMuon", "coverage", "from_adamw", "gradient_release", "param_groups",
    "to_adamw",
]  # fmt: skip
__version__ = "0.1.0"
