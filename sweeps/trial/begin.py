"""A training from its parts to where its first step, or its next one, can be taken.

The same for a trial, for a calibration of its plan, and for a benchmark of it: what is measured is what runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sweeps.spec import TrialSpec
from sweeps.trial.adapter import Adapter
from sweeps.trial.budget import Choice, Room, choose
from sweeps.trial.checkpoint import Checkpoint
from sweeps.trial.data import TokenRow
from sweeps.trial.finetune import Trained, Training, probe
from sweeps.trial.loss import Loss, loss_of
from sweeps.trial.memory import widths_of
from sweeps.trial.optimizers import make_optimizer
from sweeps.trial.outline import Outline
from sweeps.trial.rng import TrialRng


@dataclass(frozen=True)
class Begun:
    """What `finetune` takes; the token budget of its first step, and whether activations are recomputed and
    the blocks compiled."""

    training: Training
    loss: Loss
    first_budget: int
    recomputes: bool
    compiles: bool
    notes: tuple[str, ...]


def choose_here(outline: Outline, adapter: Adapter, spec: TrialSpec, longest: int) -> Choice:
    """What `auto` makes of the memory that is free beside the adapter; `outline` is of the bare base."""
    base = adapter.base
    width = widths_of(base.dtype, adapter.dtype, on_cpu=base.device.type == "cpu")
    return choose(outline, spec, width, longest, Room.on(base.device))


def begin(
    adapter: Adapter, rows: Sequence[TokenRow], spec: TrialSpec, trained: Trained, at: Choice | Checkpoint
) -> Begun:
    """A training of `adapter` as it was chosen, or where its checkpoint has it.

    A token budget that was left to us is tried on CUDA with the longest `rows`: see `finetune.probe`.
    """
    assert spec.train is not None
    device = adapter.base.device
    rng = TrialRng(spec.train.seed, device)
    training = Training(adapter.named_parameters(), spec, rng, make_optimizer, trained)
    loss = loss_of(adapter.model)
    notes = [loss.note]
    if isinstance(at, Choice):
        trained.token_budget = budget = at.token_budget
        recomputes = at.recomputes
        compiles = spec.train.compile
        notes += at.notes
    else:
        training.restore(at.tensors, at.values["training"])
        # These too are the checkpoint's, whatever memory is free by now: another budget, other last digits.
        budget, recomputes = at.values["first_budget"], at.values["gradient_checkpointing"]
        compiles = at.values.get("compiled", False)  # of a trial that is older than the field
        notes.append(f"resumed at step {at.step} of {training.steps}, from the checkpoint of {at.written}")
    if recomputes:
        adapter.enable_gradient_checkpointing()
    if compiles and recomputes:
        compiles = False
        notes.append(
            "training not compiled, though train.compile says so: activations are recomputed to save memory, "
            "and a compiled block does not draw the same dropout again"
        )
    if compiles:
        from sweeps.trial.compiled import compiled  # the compiler takes a second to import

        plain = loss
        loss, said = compiled(plain, adapter.model, training.parameters)
        compiles = loss is not plain
        notes.append(said)
    if spec.train.token_budget == "auto" and device.type == "cuda" and not trained.step:
        notes.append(probe(adapter.model, loss, training, rows, spec.train))
        budget = trained.token_budget
    return Begun(training, loss, budget, recomputes, compiles, tuple(notes))
