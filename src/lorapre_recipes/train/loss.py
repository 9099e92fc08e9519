"""The loss of a causal language model in chunks of positions: logits of a batch never exist.

Each chunk is computed again in the backward pass. torch 2.13's `linear_cross_entropy` has chunks
too, but sums the loss of bfloat16 weights in bfloat16: it is percents off.
"""

import contextlib
import inspect
import sys
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.loss.loss_utils import ForCausalLMLoss

from lorapre_recipes.data.examples import IGNORED

# Positions in a chunk. Each chunk also adds a gradient of the whole head, which takes about as long
# as this many positions.
LEAST = 128
T = TypeVar("T")


class LogitsChanged(Exception):
    """The model does something to its logits before the loss, so that they cannot be left out."""


class ChunkedLoss:
    """Calls functions in which a model computes its loss, without logits of the whole batch.

    The head hands on the hidden states, which the model then returns as its logits, and the loss
    function applies the head. A model that does something to them in between takes its own loss.
    """

    def __init__(self, model: nn.Module, *, wanted: bool = True) -> None:
        # The model of transformers within DDP, peft and so on.
        self.model: Any = next(m for m in model.modules() if isinstance(m, PreTrainedModel))
        self.head: Any = self.model.get_output_embeddings()  # type: ignore[no-untyped-call]
        self.hidden: Tensor | None = None
        self.applies = False
        if wanted and isinstance(self.head, nn.Linear):
            named = inspect.unwrap(type(self.model).forward).__code__.co_names
            own = self.model.loss_function if "loss_function" in named else None
            self.applies = own is ForCausalLMLoss

    def __call__(self, function: Callable[[], T]) -> T:
        """What `function` returns. It is called again where the model has changed its logits."""
        if self.applies:
            try:
                with self.patched():
                    return function()
            except LogitsChanged:
                self.applies = False
                what = "the model changes its logits before the loss, which is not taken in chunks"
                print(f"lorapre: {what}", file=sys.stderr)
        return function()

    @contextlib.contextmanager
    def patched(self) -> Iterator[None]:
        """A context in which the model's head and loss are replaced."""
        self.head.forward, self.model.loss_function = self.skip, self.loss
        try:
            yield
        finally:
            del self.head.forward, self.model._loss_function
            self.hidden = None

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def skip(self, hidden: Tensor) -> Tensor:
        """In place of the head's forward."""
        self.hidden = hidden
        return hidden

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def loss(self, logits: Tensor, labels: Tensor, *_: Any, **options: Any) -> Tensor:
        """In place of `ForCausalLMLoss`, with its arguments."""
        if logits is not self.hidden:
            raise LogitsChanged
        shifted = options.get("shift_labels")
        if shifted is None:
            shifted = F.pad(labels, (0, 1), value=IGNORED)[..., 1:]
        count = options.get("num_items_in_batch")
        count = (shifted != IGNORED).sum() if count is None else count
        total = summed_loss(logits.flatten(0, -2), self.head, shifted.flatten())
        return total / torch.as_tensor(count, device=total.device)


def summed_loss(x: Tensor, head: nn.Linear, labels: Tensor) -> Tensor:
    """Cross entropy of head(x), x (positions, width), summed over the labels (positions,)."""

    def of_some(x: Tensor, labels: Tensor) -> Tensor:
        logits = F.linear(x, head.weight, head.bias).float()
        return F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum")

    size = max(LEAST, x.numel() // head.out_features)  # logits take as much memory as x
    parts = zip(torch.split(x, size), torch.split(labels, size), strict=True)
    how: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
    return torch.stack([checkpoint(of_some, *part, **how) for part in parts]).sum()
