"""The memory of a training step: arithmetic on the shapes of weights, which the tests count."""

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from lorapre.batch import transient_bytes
from lorapre.groups import matrix_shape
from lorapre_recipes.plan.settings import ONE_GPU, Mesh, Settings
from lorapre_recipes.plan.weights import FLOAT32, Weight

BF16 = 2  # bytes


class Memory(NamedTuple):
    """Bytes on a GPU."""

    weights: int
    gradients: int
    matrices: int  # optimizer state of the matrices: low rank or, for muon, its momentum
    dense: int  # optimizer state of all else
    transient: int  # what the step allocates for its own use, at most
    adamw: int  # what torch.optim.AdamW would hold as state

    @property
    def state(self) -> int:
        """All optimizer state."""
        return self.matrices + self.dense

    @property
    def peak(self) -> int:
        """The most that a step holds, without activations and buffers of collectives."""
        return self.weights + self.gradients + self.state + self.transient


def memory(weights: Iterable[Weight], settings: Settings, mesh: Mesh = ONE_GPU) -> Memory:
    """The memory of a GPU of `mesh` in a training step."""
    weights, item = list(weights), settings.item
    trained = [weight for weight in weights if not weight.frozen]
    gradients = sum(weight.held(mesh) for weight in trained) * item
    transient = step_bytes(settings, trained, mesh)
    if settings.release:  # one gradient at a time, until its weight is updated
        each = [(x.held(mesh) * item, step_bytes(settings, [x], mesh)) for x in trained]
        gradients, transient = max(each, key=sum)
    return Memory(
        weights=sum(weight.held(mesh) for weight in weights) * item,
        gradients=gradients,
        matrices=sum(weight.state_bytes(mesh) for weight in trained if weight.matrix),
        dense=sum(weight.state_bytes(mesh) for weight in trained if not weight.matrix),
        transient=transient,
        adamw=sum(weight.adamw_bytes(mesh, item) for weight in trained),
    )


def step_bytes(settings: Settings, weights: Sequence[Weight], mesh: Mesh) -> int:
    """Bytes that optimizer.step allocates beside weights, gradients and state, at most."""
    if settings.optimizer == "adamw":  # foreach, as on a GPU: the denominators of all weights
        return sum(weight.held(mesh) for weight in weights) * settings.item
    if settings.optimizer == "muon":
        dense = sum(weight.held(mesh) for weight in weights if not weight.matrix) * settings.item
        matrices = [weight for weight in weights if weight.matrix]
        return max(dense, *(newton_schulz_bytes(weight, settings.item) for weight in matrices))
    alike = Counter(weight.shape for weight in weights)
    taken = []
    for weight in weights:
        E, p, q = matrix_shape(weight.part(mesh), weight.flatten)
        bound = transient_bytes(E * alike[weight.shape], p, q, weight.rank or 0)
        if weight.matrix and settings.optimizer == "lorapre-muon":
            bound += newton_schulz_bytes(weight, FLOAT32)
        taken.append(bound)
    return max(taken)


def newton_schulz_bytes(weight: Weight, item: int) -> int:
    """Bytes that Muon needs for whole matrices.

    It holds the momentum and either two iterates in bfloat16 with their Gram matrices, or the last
    iterate and the update.
    """
    E, p, q = matrix_shape(weight.shape, weight.flatten)
    return E * (p * q * (item + 2 * BF16) + BF16 * max(2 * min(p, q) ** 2, p * q))
