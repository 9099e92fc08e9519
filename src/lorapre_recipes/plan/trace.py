"""What the forward and the backward pass allocate, followed on tensors without data.

torch's FakeTensorMode runs the model's own code, so there is no formula for an architecture. The
trace is taken on a fake CPU, whatever the real device. Attention without dropout takes torch's
fused kernel there and saves its output and one number per query and head, as flash attention does
on a GPU. With dropout it keeps the scores. What kernels allocate within themselves is not seen.
"""

import logging
import warnings
import weakref
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

from lorapre_recipes.config import user_errors
from lorapre_recipes.plan.settings import Settings
from lorapre_recipes.train.loss import ChunkedLoss

# A storage and the bytes that come or go; or a storage, 0, and the weight whose gradient is there
Event = tuple[int, int, str]


class Trace(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """The events while it is active, in order."""

    def __init__(self, vocabulary: int | None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.vocabulary, self.batch, self.attention = vocabulary, "", "not fused"
        self.events: list[Event] = []
        self.logits: set[int] = set()  # storages with one number for every token of the vocabulary
        self.known: dict[int, int] = {}  # numbers of living storages, by address

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if "flash_attention" in str(func):
            self.attention = "fused"
        for x in tree_leaves(out):
            if isinstance(x, Tensor):
                self.follow(x)
        return out

    def follow(self, x: Tensor) -> None:
        """Write down that the storage of a tensor is there, and later on that it is gone."""
        storage, events, number = x.untyped_storage(), self.events, len(self.events)
        address, size = storage._cdata, storage.nbytes()
        if address in self.known or not size:
            return
        self.known[address] = number
        events.append((number, size, ""))
        if x.ndim > 1 and x.shape[-1] == self.vocabulary:
            self.logits.add(number)
        weakref.finalize(storage, events.append, (number, -size, ""))
        weakref.finalize(storage, self.known.pop, address)

    def moments(self, steps: dict[str, int] | None = None) -> Iterator[dict[str, int]]:
        """The bytes of every kind after each event; at last, those at the end of the backward pass.

        `steps` is for gradient release: the bytes that the step of a weight allocates, by name. A
        weight is stepped as soon as its gradient is complete, which is then freed.
        """
        kinds = dict.fromkeys(self.logits, "logits")
        kinds |= {storage: "gradients" for storage, _, weight in self.events if weight}
        alive = dict.fromkeys(("activations", "logits", "gradients", "transient"), 0)
        sizes: dict[int, int] = {}
        for storage, change, weight in self.events:
            kind = kinds.get(storage, "activations")
            if change:
                alive[kind] += change
                sizes[storage] = change
            elif steps is not None:
                yield alive | {"transient": steps[weight]}
                alive[kind] -= sizes[storage]
            yield dict(alive)


def trace(model: PreTrainedModel, settings: Settings) -> Trace:
    """Follow a forward and a backward pass of a model on the meta device, which is used up.

    Raises UserError where the model needs to see data, or other arguments than tokens or pixels.
    """
    logging.getLogger("torch._subclasses.fake_tensor").disabled = True  # it prints what it raises
    found = Trace(getattr(model.config.get_text_config(), "vocab_size", None))
    # Packed sequences are found by looking at data; there are none.
    packing = mock.patch("transformers.masking_utils.find_packed_sequence_indices", lambda _: None)
    wrong = "MODEL: its forward pass cannot be followed without data"
    with user_errors(wrong, Exception), FakeTensorMode(), warnings.catch_warnings(), packing:
        warnings.simplefilter("ignore")
        if settings.gradient_checkpointing:
            model.gradient_checkpointing_enable()  # type: ignore[no-untyped-call]
        if model._supports_sdpa:
            model.set_attn_implementation("sdpa")
        make_fake(model)
        inputs = batch(model, settings)
        for x in (*model.buffers(), *inputs.values()):
            found.follow(x)
        for name, p in model.named_parameters():
            found.known[p.untyped_storage()._cdata] = -1

            def complete(p: Any, name: str = name) -> None:
                found.events.append((found.known[p.grad.untyped_storage()._cdata], 0, name))

            if p.requires_grad:
                p.register_post_accumulate_grad_hook(complete)  # type: ignore[no-untyped-call]
        in_chunks = ChunkedLoss(model, wanted=settings.chunked_loss)
        with found:
            with torch.autocast("cpu", torch.bfloat16, enabled=settings.precision == "bf16"):
                total = in_chunks(lambda: loss(model.train()(**inputs)))
            total.backward()
        found.batch = " x ".join(map(str, next(iter(inputs.values())).shape))
        found.events = list(found.events)  # what is freed from now on does not count
    return found


def make_fake(model: nn.Module) -> None:
    """Replace parameters and buffers by tensors without data; what was tied stays tied."""

    def fake(x: Tensor) -> Tensor:
        y = torch.empty(x.shape, dtype=x.dtype, device="cpu")
        return nn.Parameter(y, x.requires_grad) if isinstance(x, nn.Parameter) else y

    made: dict[Tensor, Tensor] = {}
    for module in model.modules():
        for table in (module._parameters, module._buffers):
            for name, x in table.items():
                if x is not None:
                    table[name] = made.setdefault(x, fake(x))  # type: ignore[assignment]


def batch(model: PreTrainedModel, settings: Settings) -> dict[str, Tensor]:
    """Tokens, with labels for a language model, or pixels: (batch, length), (batch, C, H, W)."""
    if model.main_input_name == "pixel_values":
        size = getattr(model.config, "image_size", 224)
        height, width = (size, size) if isinstance(size, int) else size
        image = (settings.batch_size, model.config.num_channels, height, width)
        return {"pixel_values": torch.empty(image, dtype=model.dtype, device="cpu")}
    tokens = torch.zeros(settings.batch_size, settings.length(model.config), dtype=torch.int64)
    labels = "LM" in type(model).__name__ or model.config.is_encoder_decoder
    return {"input_ids": tokens} | ({"labels": tokens} if labels else {})


def loss(output: Any) -> Any:
    """The model's own loss, or the sum of its first output."""
    return output["loss"] if "loss" in output else output[0].sum()
