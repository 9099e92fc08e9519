"""`python -m lorapre_recipes`, the same program as `lorapre`."""

import sys

from lorapre_recipes.cli import main

sys.exit(main())
