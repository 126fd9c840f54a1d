"""The training program of an experiment on given devices: the loop runs it, the planner compiles it."""

import dataclasses
import functools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from polygpt import sharding, spec
from polygpt.errors import SpecError, UserError
from polygpt.evaluation import conditions
from polygpt.init.reference import INITIAL, BoundReference, require_same
from polygpt.init.start import Start, start
from polygpt.models.functional import Model, bind
from polygpt.objectives.forward import AVERAGE
from polygpt.objectives.loss import Loss
from polygpt.optim.groups import trained_since
from polygpt.parameters import paths
from polygpt.runtime import processes
from polygpt.sharding import MeshLayout
from polygpt.training import automatic, parallel
from polygpt.training.experiment import Experiment
from polygpt.training.parallel import Parallel
from polygpt.training.phase import expanded, name_of, require_same_parameters
from polygpt.training.seeds import initial_states, make_vmapped_step, reason_against
from polygpt.training.state import create
from polygpt.training.step import Recipe, make_step


@dataclasses.dataclass(frozen=True, eq=False)
class Program:
    """See `assemble`.

    Attributes:
        experiment: the experiment it implements; that of one phase, if there are several.
        model: the bound model.
        shapes: parameter shapes.
        recipe: inputs of the step.
        transformation: the optimizer.
        parallel: how the step is parallelised.
        reason: why that mode was chosen, for "auto".
        notes: requests of the mesh that the model cannot meet.
        seeds: several seeds trained together, see `seeds.py`; empty for the experiment's own.
        references: the models that are not trained, by name.
        rules: the rule of each parameter, see `Optim.rules`.
        start_step: number of steps before the phase.
    """

    experiment: Experiment
    model: Model
    shapes: Any
    recipe: Recipe
    transformation: optax.GradientTransformation
    parallel: Parallel
    reason: str | None
    notes: tuple[str, ...] = ()
    seeds: tuple[int, ...] = ()
    references: Mapping[str, BoundReference] = dataclasses.field(default_factory=dict)
    rules: Any = None
    start_step: int = 0

    def initial(self, given: Mapping[str, jax.Array] | None = None) -> Any:
        """The state before the first step; compile it. `given` has the parameters that are not random, by name.

        The parameters of references are placeholders: see `with_references`.
        """
        begin = functools.partial(_create, self.experiment, self.model, self.transformation, self.references)
        begin = functools.partial(begin, given=given)
        return initial_states(begin, self.seeds) if self.seeds else begin(self.experiment.seed)

    @functools.cached_property
    def start(self) -> Start:
        """The parameters that the experiment's `init` fills. Raises UserError if its source cannot be used."""
        return start(self.experiment.init, paths(self.model.traits), _tokenizer(self.experiment))

    def first_state(self) -> Any:
        """The state before the first step on its devices, with the parameters of `start`."""
        given = [given] if (given := self._given()) else []
        return self.with_references(self.parallel.create(self.bare, *given))

    @functools.cached_property
    def bare(self) -> Callable:
        """`initial` without references. Always the same function, which JAX then traces but once."""

        def initial(given=None):
            return dataclasses.replace(self.initial(given), references={})

        return initial

    @property
    def origins(self) -> dict[str, str]:
        """Where the parameters of each reference come from."""
        return {name: self._own_origin if one.start is None else one.origin for name, one in self.references.items()}

    @property
    def _own_origin(self) -> str:
        """Where the initial parameters of the run come from; a source may have others when the run resumes."""
        source = self.start.source
        return INITIAL if source is None else f"{INITIAL} ({source.origin})"

    def resumed(self, state: Any, origins: Mapping[str, str]) -> Any:
        """A restored state with its references. Raises UserError if they are others than at the checkpoint."""
        require_same(origins, self.origins)
        return self.with_references(state)

    def with_references(self, state: Any) -> Any:
        """The state with the parameters of all references, which no checkpoint holds."""
        if not self.references:
            return dataclasses.replace(state, references={})
        target = self.parallel.abstract(self.initial)
        found = {name: one.read(target.references[name]) for name, one in self.references.items() if one.start}
        if own := [name for name in self.references if name not in found]:
            places = self.parallel.shardings(self.initial).params
            initial = jax.jit(lambda given: self.initial(given).params, out_shardings=places)
            found |= {name: initial(self._given()) for name in own}
        return dataclasses.replace(state, references=found)

    def _given(self) -> dict[str, jax.Array]:
        """The parameters that are not random, by name, without the axis of several seeds."""
        if self.start.source is None:
            return {}
        places, own = paths(self.parallel.shardings(self.bare).params), paths(self.shapes)
        wanted = {name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=places[name]) for name, x in own.items()}
        return self.start.read(wanted)

    def summary(self) -> str:
        """Model size, devices and the reason for them, and how parameters are trained."""
        traits = jax.tree.leaves(self.model.traits)
        count = sum(math.prod(leaf.shape) for leaf in traits if leaf.trained)
        runs, layout = self.parallel, self.parallel.layout
        place = f"{len(runs.devices)} x {runs.devices[0].device_kind}, {runs.mode}"
        place += f" ({layout.summary()})" if layout else ""
        place += f", {len(self.seeds)} seeds in one program" if self.seeds else ""
        model = self.experiment.model
        of_all = f" of {sum(math.prod(leaf.shape) for leaf in traits):,}" if model.low_rank or model.prefix else ""
        lines = [
            *([self.reason] if self.reason else []),
            f"{self.experiment.name}: {count:,}{of_all} parameters on {place}",
            *([model.mup.summary()] if model.mup else []),
            self.experiment.optim.table(self.model.traits, self.model.growth),
        ]
        unused = automatic.unused(self.experiment.train.parallel, runs.devices[0], model.dtype)
        return "\n".join([*lines, *self.notes, *unused])

    @functools.cached_property
    def evaluated(self) -> Model:
        """The model for evaluation, on the training mesh."""
        return self.model.on(self.parallel.layout)

    @functools.cached_property
    def merge(self) -> Callable:
        """`Model.merge`, compiled: evaluation adds low-rank updates to their matrices once."""
        return self.model.merge if self.model.merged is self.model else jax.jit(self.model.merge)

    @functools.cached_property
    def step(self) -> Callable:
        """The compiled step, `(state, batch) -> (state, metrics)`; the state is donated."""

        def make(**wiring):
            if self.seeds:
                return make_vmapped_step(self.recipe, self.seeds, self.experiment.train.max_nonfinite)
            return make_step(self.recipe, **wiring)

        return self.parallel.compile(make, self.initial)

    def ready(self, state: Any, batch: Any) -> Callable:
        """The step, compiled for these arguments in every process before any process continues.

        On CPUs the first collective (Gloo) times out after 30 seconds, and one process may compile that much longer
        than another. A pmap compiled ahead of time takes and returns arrays that span all processes, as `Parallel`
        makes them.
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
    seeds: Sequence[int] = (),
    phase: int = 0,
    like: Program | None = None,
) -> Program:
    """Builds the program. Allocates nothing; devices may be virtual, as from `topology.devices`.

    Args:
        experiment: the experiment to train.
        vocabulary: V, the tokenizer's vocabulary size.
        devices: default: all devices.
        memory: bytes per device, for `train.parallel="auto"`; default: measured in all processes.
        seeds: trains these together on one device, in place of the experiment's seed.
        phase: which part of the run: 0 is before the first of `train.phases`.
        like: the program of an earlier phase, whose devices and references this one shares.

    Raises:
        UserError: the mesh does not divide the batch, the positions or the blocks; a mesh axis meant to split
            parameters splits none; a held-out task changes the shapes of parameters; several seeds cannot be trained
            together; or a phase changes parameters.
    """
    whole, phases = experiment, expanded(experiment)
    experiment, starts = phases[phase], (0, *(one.start for one in whole.train.phases))
    optim, train, layout = experiment.optim, experiment.train, experiment.data.layout
    model = bind(experiment.model, vocabulary)
    if like is not None:
        where = name_of(phase - 1, whole.train.phases[phase - 1])
        require_same_parameters(where, paths(like.model.traits), paths(model.traits))
    shapes = model.abstract()
    earlier = [one.optim.rules(model.traits) for one in phases[:phase]]
    since = trained_since([*earlier, optim.rules(model.traits)], starts, model.traits) if earlier else None
    rules = optim.rules(model.traits, model.growth, since)
    transformation = optim.build(model.traits, train.steps, model.growth, since)
    references = _references(phases, model) if like is None else like.references
    mode, mesh, reason = train.parallel, train.mesh, None
    spare = devices is None and jax.process_count() == 1  # on local devices, leave some idle rather than fail
    devices = list(devices or jax.devices())
    if seeds:
        if why := reason_against(train) or (references and "references are one model for all seeds"):
            raise UserError(f"{len(seeds)} seeds cannot be trained together: {why}")
        mode, devices = "single", devices[:1]
    if like is not None:
        mode = like.parallel.mode
    elif mode == "auto" and len(devices) == 1:
        mode = "single"
    elif mode == "auto":
        placement = automatic.choose(
            state=max(_bytes_of_state(one, model, references) for one in phases),
            gradient=automatic.bytes_of(shapes),
            memory=memory or automatic.memory_of_all(),
            devices=len(devices),
            batch_size=math.gcd(*(one.data.batch_size for one in phases)),
            accumulate=math.lcm(*(one.optim.accumulate for one in phases)),
            lengths=(
                *(one.data.layout.seq_len for one in phases),
                *(task.seq_len for task in experiment.evaluation.tasks.values() if task.seq_len),
            ),
            heads=getattr(experiment.model.decoder.attention, "heads", 1),
            spare=spare,
        )
        mode, mesh = placement.mode, placement.mesh
        reason = f"train.parallel auto: {placement.mode}: {placement.reason}"
        devices = devices[: placement.devices]
    axes = model.axes() | {name: one.model.axes() for name, one in references.items()}
    runs = like.parallel if like else parallel.build(mode, axes, mesh, devices)
    runs.check(experiment.data.batch_size, layout.seq_len, optim.accumulate)
    for name, task in experiment.evaluation.tasks.items():
        conditions.model_of(name, task, model.merged)  # fail before training if evaluation is impossible
        runs.check_seq_len(task.seq_len or layout.seq_len, f"evaluation.tasks.{name}.seq_len")
    notes = ()
    if runs.layout:
        _require_splits(runs.layout, shapes, model.axes())
        notes = _undivided_heads(runs.layout, experiment)
    loss = Loss(
        model,
        experiment.objectives,
        optim.trainable(model.traits),
        optim.accumulate,
        experiment.model.logits_block,
        {name: one.model for name, one in references.items()},
    )
    rate = optim.learning_rate(train.steps)
    recipe = Recipe(loss, transformation, rate, experiment.seed, optim.ema, train.spikes)
    given = experiment, model, shapes, recipe, transformation, runs, reason, notes, tuple(seeds), references
    return Program(*given, rules, starts[phase])


def _require_splits(layout: MeshLayout, shapes: Any, axes: Any) -> None:
    """Raises UserError if a mesh axis should split parameters by the layout's rules, but divides none of them.

    Computation on such an axis would be replicated on each of its devices.
    """
    wanted = {axis for name in jax.tree.leaves(axes) for axis in layout.names(name)}
    places = jax.tree.leaves(sharding.tree_shardings(layout, shapes, axes))
    split = set(jax.tree.leaves([tuple(place.spec) for place in places]))
    if idle := sorted(wanted - split):
        raise UserError(
            f"train.mesh.{idle[0]} is {layout.mesh.shape[idle[0]]}, which divides no axis of any parameter: choose a "
            "divisor of the model's heads and widths"
        )


def _undivided_heads(layout: MeshLayout, experiment: Experiment) -> tuple[str, ...]:
    """One line per stack whose heads the mesh does not divide; its other widths may still be split."""
    stacks = {"model.decoder": experiment.model.decoder}
    for name, adapter in experiment.model.adapters.items():
        if getattr(adapter, "tower", None) is not None:
            stacks[f"model.adapters.{name}.tower"] = adapter.tower
    parts, lines = layout.size("heads"), []
    for name, stack in stacks.items():
        heads = getattr(stack.attention, "heads", None)
        if heads and heads % parts:
            axes = ", ".join(f"train.mesh.{axis}" for axis in layout.names("heads"))
            lines.append(f"{name}: {axes} {parts} does not divide its {heads} heads: every device computes all heads")
    return tuple(lines)


def _create(
    experiment: Experiment,
    model: Model,
    transformation: optax.GradientTransformation,
    references: Mapping[str, BoundReference],
    seed: int | jax.Array,
    given: Mapping[str, jax.Array] | None = None,
) -> Any:
    optim, spikes = experiment.optim, experiment.train.spikes
    state = create(model, transformation, seed, optim.ema is not None, spikes, given)
    others = {name: one.model.init(jax.random.key(0)) for name, one in references.items()}
    rate = None if experiment.train.plateau is None else jnp.ones(())
    return dataclasses.replace(state, references=others, rate=rate)


def _bytes_of_state(experiment: Experiment, model: Model, references: Mapping[str, BoundReference]) -> int:
    transformation = experiment.optim.build(model.traits, experiment.train.steps, model.growth)
    return automatic.bytes_of(
        jax.eval_shape(lambda: _create(experiment, model, transformation, references, experiment.seed))
    )


def _references(phases: Sequence[Experiment], model: Model) -> dict[str, BoundReference]:
    """The references of a run. Raises UserError if one cannot be used, or is read in no phase."""
    experiment = phases[0]
    read = {other for one in phases for objective, _ in one.objectives.values() for other in objective.others}
    if unread := sorted(experiment.references.keys() - read):
        raise UserError(f"references.{unread[0]} is read by no objective: remove it, or name it in an objective")
    if taken := sorted(experiment.references.keys() & {AVERAGE, *model.traits}):
        raise UserError(f"references.{taken[0]}: the name is taken, for a part of the model or its average: rename it")
    tokenizer = _tokenizer(experiment)
    layouts = [one.data.layout for one in phases]
    found = {name: one.bind(name, model, tokenizer, layouts) for name, one in experiment.references.items()}
    for name, (objective, _) in (pair for one in phases for pair in one.objectives.items()):
        for other in found.keys() & set(objective.others):
            try:
                objective.check_other(found[other].model.spec, model.spec)
            except SpecError as error:
                raise UserError(f"references.{other}, which objectives.{name} reads: {error}") from None
    return found


def _tokenizer(experiment: Experiment) -> Any:
    """The tokenizer as JSON data."""
    return json.loads(json.dumps(spec.to_json(experiment.tokenizer)))
