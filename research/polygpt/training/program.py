"""The program that an experiment trains by, on given devices: what the loop runs and what a planner compiles."""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import optax

from polygpt import sharding
from polygpt.errors import UserError
from polygpt.evaluation import conditions
from polygpt.models.functional import Model, bind
from polygpt.runtime import processes
from polygpt.sharding import Layout
from polygpt.training import automatic, parallel
from polygpt.training.experiment import Experiment
from polygpt.training.parallel import Parallel
from polygpt.training.state import create
from polygpt.training.step import Recipe, make_step


@dataclasses.dataclass(frozen=True, eq=False)
class Program:
    """See `assemble`.

    Attributes:
        experiment: what it was made from.
        model: the bound model.
        shapes: of its parameters.
        recipe: what the step needs to know.
        transformation: the optimizer.
        parallel: how it runs.
        reason: why so, if that was chosen here ("auto").
        notes: what the mesh asks for and the model cannot give.
    """

    experiment: Experiment
    model: Model
    shapes: Any
    recipe: Recipe
    transformation: optax.GradientTransformation
    parallel: Parallel
    reason: str | None
    notes: tuple[str, ...] = ()

    def initial(self) -> Any:
        """The state before the first step; to be compiled."""
        return _create(self.experiment, self.model, self.transformation)

    def about(self) -> str:
        """The model's size, where it runs and why there, and how its parameters are trained."""
        count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(self.model.traits) if leaf.trained)
        runs, layout = self.parallel, self.parallel.layout
        place = f"{len(runs.devices)} x {runs.devices[0].device_kind}, {runs.mode}"
        place += f" ({layout.about()})" if layout else ""
        model = self.experiment.model
        lines = [
            *([self.reason] if self.reason else []),
            f"{self.experiment.name}: {count:,} parameters on {place}",
            *([model.mup.about()] if model.mup else []),
            self.experiment.optim.table(self.model.traits, self.model.growth),
        ]
        unused = automatic.unused(self.experiment.train.parallel, runs.devices[0], model.dtype)
        return "\n".join([*lines, *self.notes, *unused])

    @functools.cached_property
    def evaluated(self) -> Model:
        """The model as evaluation is to compute it: on the mesh that it is trained on."""
        return self.model.on(self.parallel.layout)

    @functools.cached_property
    def step(self) -> Callable:
        """The compiled step, `(state, batch) -> (state, metrics)`; the state is donated."""
        return self.parallel.compile(lambda **wiring: make_step(self.recipe, **wiring), self.initial)

    def ready(self, state: Any, batch: Any) -> Callable:
        """The step, compiled for these arguments in every process before any of them goes on.

        The first exchange between processes on CPUs waits half a minute for the last of them (Gloo), which may well
        compile longer than the others. A pmap that is compiled so takes and gives arrays that span all processes, as
        `Parallel` makes them.
        """
        if jax.process_count() == 1:
            return self.step
        compiled = self.step.lower(state, batch).compile()
        processes.barrier("compiled")
        return compiled


def assemble(
    experiment: Experiment,
    vocabulary: int,
    devices: Sequence[jax.Device] | None = None,
    memory: int | None = None,
) -> Program:
    """Nothing is allocated, and devices need not be there: those of `topology.devices` will do.

    Args:
        experiment: what to train.
        vocabulary: V, of its tokenizer.
        devices: all there are by default.
        memory: bytes of each, for `train.parallel="auto"`; by default all processes ask theirs.

    Raises:
        UserError: rows, positions or blocks cannot be divided as the mesh asks, an axis of the mesh that is to split
            parameters splits none, or a held-out task changes parameters of the model.
    """
    optim, train, layout = experiment.optim, experiment.train, experiment.data.layout
    model = bind(experiment.model, vocabulary)
    shapes = model.abstract()
    transformation = optim.build(model.traits, train.steps, model.growth)
    mode, mesh, reason = train.parallel, train.mesh, None
    spare = devices is None and jax.process_count() == 1  # this machine's own devices: better some idle than an error
    devices = list(devices or jax.devices())
    if mode == "auto" and len(devices) == 1:
        mode = "single"
    elif mode == "auto":
        placement = automatic.choose(
            state=automatic.bytes_of(jax.eval_shape(lambda: _create(experiment, model, transformation))),
            gradient=automatic.bytes_of(shapes),
            memory=memory or automatic.memory_of_all(),
            devices=len(devices),
            batch_size=experiment.data.batch_size,
            accumulate=optim.accumulate,
            lengths=(layout.seq_len, *(task.seq_len for task in experiment.evaluation.tasks.values() if task.seq_len)),
            heads=getattr(experiment.model.decoder.attention, "heads", 1),
            spare=spare,
        )
        mode, mesh = placement.mode, placement.mesh
        reason = f"train.parallel auto: {placement.mode}: {placement.reason}"
        devices = devices[: placement.devices]
    runs = parallel.build(mode, model.axes(), mesh, devices)
    runs.check(experiment.data.batch_size, layout.seq_len, optim.accumulate)
    for name, task in experiment.evaluation.tasks.items():
        conditions.model_of(name, task, model)  # what cannot be evaluated is refused before it is trained
        runs.check_seq_len(task.seq_len or layout.seq_len, f"evaluation.tasks.{name}.seq_len")
    notes = ()
    if runs.layout:
        _require_splits(runs.layout, shapes, model.axes())
        notes = _undivided_heads(runs.layout, experiment)
    rate, trainable = optim.learning_rate(train.steps), optim.trainable(model.traits)
    seed, accumulate = experiment.seed, optim.accumulate
    recipe = Recipe(
        model, experiment.objectives, transformation, rate, trainable, seed, accumulate, optim.ema, train.spikes
    )
    return Program(experiment, model, shapes, recipe, transformation, runs, reason, notes)


def _require_splits(layout: Layout, shapes: Any, axes: Any) -> None:
    """Raises UserError if a mesh axis is to split parameters by the layout's table, and none of theirs comes out even.

    What such an axis does not split is computed by each of its devices once more.
    """
    wanted = {axis for name in jax.tree.leaves(axes) for axis in layout.names(name)}
    places = jax.tree.leaves(sharding.tree(layout, shapes, axes))
    split = set(jax.tree.leaves([tuple(place.spec) for place in places]))
    if idle := sorted(wanted - split):
        raise UserError(
            f"train.mesh.{idle[0]} is {layout.mesh.shape[idle[0]]}, and it divides no axis of any parameter: choose a "
            "divisor of the model's heads and widths"
        )


def _undivided_heads(layout: Layout, experiment: Experiment) -> tuple[str, ...]:
    """A line for each stack whose heads the mesh does not divide: its other widths may still be split."""
    stacks = {"model.decoder": experiment.model.decoder}
    for name, adapter in experiment.model.adapters.items():
        if getattr(adapter, "tower", None) is not None:
            stacks[f"model.adapters.{name}.tower"] = adapter.tower
    parts, lines = layout.size("heads"), []
    for name, stack in stacks.items():
        heads = getattr(stack.attention, "heads", None)
        if heads and heads % parts:
            axes = ", ".join(f"train.mesh.{axis}" for axis in layout.names("heads"))
            lines.append(f"{name}: {axes} {parts} does not divide its {heads} heads: each device computes all of them")
    return tuple(lines)


def _create(experiment: Experiment, model: Model, transformation) -> Any:
    optim, spikes = experiment.optim, experiment.train.spikes
    return create(model, transformation, experiment.seed, optim.ema is not None, spikes)
