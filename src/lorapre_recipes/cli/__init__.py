"""The command line, `lorapre`.

Built on cyclopts, which reads options, their types and the help from signatures and docstrings. One
rule is added here: a user's mistake is one line on stderr that names the argument, exit code 2, no
traceback.

torch and transformers take seconds to import; help and most mistakes should not: commands import
them inside.
"""

from __future__ import annotations

import os
import sys
from importlib.metadata import version
from typing import Any

try:
    from cyclopts import App, CycloptsError, Parameter
except ModuleNotFoundError as error:  # `pip install lorapre` brings this script, and torch alone
    more = "the recipes need more: pip install 'lorapre[recipes]'"
    raise SystemExit(f"lorapre: {error}; {more}") from error

from lorapre_recipes.cli.study import compare, evaluate
from lorapre_recipes.cli.tools import arithmetic, plan
from lorapre_recipes.cli.train import finetune, pretrain
from lorapre_recipes.config import UserError

app = App(
    name="lorapre",
    help="LoRA-Pre: train with low-rank momenta.",
    version=lambda: version("lorapre"),
    default_parameter=Parameter(negative=()),  # no --no-x and --empty-x beside each option
)
for command in (pretrain, finetune, evaluate, compare, plan, arithmetic):
    app.command(command)


def main() -> int:
    """Run sys.argv and return the exit code: 0, 1 for a run that failed, 2 for a user's mistake."""
    # torch's threads sleep while they wait for each other. Threads that spin slow one another down
    # several times over when other programs want the same cores.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if not sys.stderr.isatty():  # a log file needs no animation
        os.environ.setdefault("TQDM_MININTERVAL", "10")
    try:
        options: Any = {"exit_on_error": False, "print_error": False}
        result = app(sys.argv[1:], **options, result_action="return_value")
    except KeyboardInterrupt:
        print("\nlorapre: interrupted before it began", file=sys.stderr)
        return 130
    except (UserError, CycloptsError) as error:
        if os.environ.get("LOCAL_RANK", "0") == "0":  # once, not from each process of torchrun
            print(f"lorapre: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return result if isinstance(result, int) else 0
