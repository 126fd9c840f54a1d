"""The conditions of a held-out task, which may differ from those of training: longer rows, a changed model."""

from polygpt.data.layout import LayoutSpec
from polygpt.errors import SpecError
from polygpt.evaluation.spec import EvalTask
from polygpt.models.functional import Model
from polygpt.models.multimodal import ModelSpec
from polygpt.overrides import replaced


def layout_of(task: EvalTask, layout: LayoutSpec) -> LayoutSpec:
    """How a task's examples become rows, given how those of training do."""
    return layout if task.seq_len is None else layout.replace(seq_len=task.seq_len)


def model_of(name: str, task: EvalTask, model: Model) -> Model:
    """The model that a task is evaluated with, given the trained one; the same object at every call.

    Raises:
        SpecError: naming the task, if it changes a field that is not there, or a parameter.
    """
    if not task.model:
        return model
    try:
        return model.changed(task.model)
    except SpecError as error:
        raise _of(name, error) from None


def check(name: str, task: EvalTask, spec: ModelSpec, layout: LayoutSpec) -> None:
    """Raises SpecError, naming the task, unless its changes make a model that knows as many positions as its rows have.

    That they leave the parameters as they are is found out where a model is bound: this binds none, and is cheap.
    """
    try:
        limit = replaced(spec, task.model).decoder.position.limit()
    except SpecError as error:
        raise _of(name, error) from None
    length = layout_of(task, layout).seq_len
    if limit is not None and length > limit:
        raise SpecError(
            f"evaluation task {name!r} has rows of {length} positions, and its decoder.position knows {limit}: lower "
            "its seq_len, or let the model know as many"
        )


def _of(name: str, error: SpecError) -> SpecError:
    return SpecError(f"evaluation task {name!r}, model: {str(error).removeprefix('--')}")
