"""Evaluation conditions that differ from training: longer sequences, a changed model."""

from polygpt.data.layout import LayoutSpec
from polygpt.errors import SpecError
from polygpt.evaluation.spec import EvalTask
from polygpt.models.functional import Model
from polygpt.models.multimodal import ModelSpec
from polygpt.overrides import replaced


def layout_of(task: EvalTask, layout: LayoutSpec) -> LayoutSpec:
    """The layout of a task, given that of training. The answers of a pair are scored one by one."""
    return layout.replace(pairs=False, seq_len=task.seq_len or layout.seq_len)


def model_of(name: str, task: EvalTask, model: Model) -> Model:
    """The model for evaluating a task, given the trained one; cached.

    Raises:
        SpecError: names the task if it changes an unknown field or the shapes of parameters.
    """
    if not task.model:
        return model
    try:
        return model.changed(task.model)
    except SpecError as error:
        raise _of(name, error) from None


def check(name: str, task: EvalTask, spec: ModelSpec, layout: LayoutSpec) -> None:
    """Raises SpecError, naming the task, unless its changes give a model that supports its sequence length and has its
    heads.

    Cheap: it does not bind the model, so changed parameters are detected only later.
    """
    try:
        # Evaluation merges low-rank updates.
        limit = replaced(spec.replace(low_rank=None), task.model).limit()
    except SpecError as error:
        raise _of(name, error) from None
    for metric in task.heads:
        try:
            metric.check_with(spec, layout)
        except SpecError as error:
            raise SpecError(f"evaluation task {name!r}: {type(metric).__name__} {error}") from None
    length = layout_of(task, layout).seq_len
    if limit is not None and length > limit:
        raise SpecError(
            f"evaluation task {name!r} has seq_len {length}, but its decoder.position supports {limit}: lower "
            "seq_len, or increase the number of positions"
        )


def _of(name: str, error: SpecError) -> SpecError:
    return SpecError(f"evaluation task {name!r}, model: {str(error).removeprefix('--')}")
