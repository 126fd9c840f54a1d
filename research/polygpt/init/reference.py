"""Models that objectives read and that are not trained: teachers of a distillation, references of a preference loss."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from polygpt.errors import OtherTokenizer, UserError
from polygpt.init.base import Weights
from polygpt.init.start import Start, start
from polygpt.models.functional import Model, bind
from polygpt.models.multimodal import ModelSpec
from polygpt.parameters import paths
from polygpt.spec import Spec

INITIAL = "the initial parameters"
"""The origin of a reference that begins as the run does."""


@dataclasses.dataclass(frozen=True)
class Reference(Spec):
    """A model that is not trained, averaged or saved. A resumed run reads it again, also the source of its own initial
    parameters, which must then still be there."""

    init: Weights | None = None
    """Its parameters; null for the initial parameters of the run."""
    model: ModelSpec | None = None
    """Its architecture; null for that of the run that `init` names, or the experiment's."""

    def validate(self):
        self.require(self.model is None or self.init is not None, "model", "null without init")

    def bind(self, name: str, own: Model, tokenizer: Any, layouts: Sequence[Any] = ()) -> "BoundReference":
        """The model, with what fills its parameters.

        Args:
            name: its name among the references.
            own: the trained model.
            tokenizer: JSON of the experiment's tokenizer.
            layouts: the `LayoutSpec`s of the rows that it reads.

        Raises:
            UserError: its source cannot be used, or does not fill all of its parameters, or it cannot read the rows.
        """
        if self.init is None:
            return BoundReference(own, None)
        try:
            model = bind(self.model or self.init.model() or own.spec, own.vocabulary).merged
            for layout in layouts:
                model.spec.check_reading(layout)
            found = start(self.init, paths(model.traits), tokenizer)
        except OtherTokenizer as error:
            alone = "or write its scores once with polygpt data score and read them with SpanDistillation"
            raise UserError(f"references.{name}: {error.other}: set tokenizer to that one, {alone}") from None
        except UserError as error:
            raise UserError(f"references.{name}: {error}") from None
        if missing := paths(model.traits).keys() - found.taken.keys():
            raise UserError(
                f"references.{name}: nothing in {found.source.origin} fills {min(missing)}: a reference has no random "
                "parameters"
            )
        return BoundReference(model, found)


@dataclasses.dataclass(frozen=True)
class BoundReference:
    """See `Reference.bind`.

    Attributes:
        model: the model.
        start: what fills its parameters; None for the initial parameters of the run.
    """

    model: Model
    start: Start | None

    @property
    def origin(self) -> str:
        """Where its parameters come from, for messages."""
        return INITIAL if self.start is None else self.start.source.origin

    def read(self, target: Any) -> Any:
        """Its parameters; `target` has their dtypes and shardings."""
        found = self.start.read(paths(target))
        return jax.tree.unflatten(jax.tree.structure(target), [found[name] for name in paths(target)])


def require_same(before: Mapping[str, str], now: Mapping[str, str]) -> None:
    """Raises UserError if a reference of a resumed run has changed, given their origins by name."""
    for name, origin in before.items():
        if now.get(name) != origin:
            field = "init.checkpoint" if origin.startswith(INITIAL) else f"references.{name}.init.checkpoint"
            raise UserError(
                f"references.{name} was {origin} and is now {now.get(name, 'missing')}: name that checkpoint "
                f"({field}), or use another workdir"
            )
