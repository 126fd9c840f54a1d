"""The table from the names of axes to the mesh: what it says, and what it refuses."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh, PartitionSpec

from batches import ADAPTERS, tiny
from polygpt.errors import SpecError, UserError
from polygpt.lab.catalogue import variants
from polygpt.models.functional import bind
from polygpt.parameters import paths
from polygpt.sharding import ARRAY_AXES, AXES, RULES, MeshLayout, MeshSpec, constrain, is_split, make_layout, use_layout


def layout(**sizes) -> MeshLayout:
    return MeshLayout(AbstractMesh(tuple(sizes.get(axis, 1) for axis in AXES), AXES), MeshSpec(**{"data": 1} | sizes))


def test_what_is_left_of_the_devices_goes_to_one_axis():
    assert MeshSpec(tensor=4).sizes(16) == dict.fromkeys(AXES, 1) | {"data": 4, "tensor": 4}
    assert MeshSpec(data=2, fsdp=-1).sizes(8)["fsdp"] == 4


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: MeshSpec(data=2, fsdp=3).sizes(8), r"asks for 6 devices \(data 2, fsdp 3\), but there are 8"),
        (lambda: MeshSpec(data=2, fsdp=2).sizes(8), r"but there are 8: set one axis to -1"),
        (lambda: MeshSpec(data=-1, tensor=16).sizes(8), r"asks for 16 devices \(tensor 16\), but there are 8"),
        (lambda: MeshSpec(tensor=8).sizes(1), r"there is 1: .*launch local -n 1 --devices 8 -- train"),
        (lambda: MeshSpec(tensor=3).sizes(4), r"train.mesh.tensor 3 does not divide the 4 devices: choose 1, 2 or 4$"),
        (
            lambda: MeshSpec(fsdp=2, tensor=3).sizes(8),
            r"tensor 3 does not divide the 8 devices with fsdp 2: choose 1, 2 or 4",
        ),
    ],
)
def test_a_mesh_that_does_not_come_out_even_is_refused(make, message):
    with pytest.raises(UserError, match=message):
        make()


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"data": 0}, "MeshSpec.data is 0: it must be at least 1, or -1"),
        ({"data": -1, "fsdp": -1}, "MeshSpec.data and MeshSpec.fsdp are both -1"),
        ({"rules": RULES | {"width": ("tensor",)}}, "splits 'vocabulary' and 'width' both over 'tensor'"),
        ({"rules": RULES | {"hidden": ("fsdp",)}}, "splits 'width' and 'hidden' both over 'fsdp'"),
        ({"rules": RULES | {"experts": ("sequence",)}}, "splits 'positions' and 'experts' both over 'sequence'"),
        ({"rules": RULES | {"positions": ("data",)}}, "splits 'batch' and 'positions' both over 'data'"),
        ({"rules": RULES | {"hidden": ("tenser",)}}, r"rules\['hidden'\] names 'tenser': did you mean tensor"),
        ({"rules": RULES | {"hiden": ()}}, "no axis 'hiden': did you mean hidden"),
        ({"rules": {}}, "MeshSpec.rules lacks 'batch'"),
        ({"rules": RULES | {"width": ("fsdp", "fsdp")}}, "names an axis twice"),
    ],
)
def test_a_table_that_cannot_be_is_refused(fields, message):
    with pytest.raises(SpecError, match=message):
        MeshSpec(**fields)


@pytest.mark.parametrize("scan", [True, False])
@pytest.mark.parametrize("variant", variants(), ids=lambda variant: variant.__name__)
def test_every_parameter_of_every_variant_can_be_placed(variant, scan):
    model = bind(tiny(adapters=ADAPTERS, attention=variant(), width=32, scan=scan), 31)
    everywhere = layout(data=2, fsdp=2, tensor=2, stage=2)
    shapes = paths(model.abstract())
    for path, names in _flat(model.axes()).items():
        everywhere.sharding(names, shapes[path].shape)
        if path.startswith("decoder/blocks"):
            assert names[:1] == ("layers",) if scan else "layers" not in names, path
            assert "layers" not in names[1:], path


def test_every_parameter_of_a_model_names_axes_that_may_meet():
    """So that what is checked for collisions is what there is."""
    model = bind(tiny(adapters=ADAPTERS, tied=False), 31)
    named = {path: names for path, names in _flat(model.axes()).items()}
    shapes = paths(model.abstract())
    assert set(named) == set(shapes) and all(len(named[path]) == len(shapes[path].shape) for path in shapes)
    for names in named.values():
        real = {name for name in names if name is not None}
        assert any(real <= set(together) for together in ARRAY_AXES) or len(real) <= 1
    assert named["decoder/blocks/mlp/up/kernel"] == ("layers", "width", "hidden")
    assert named["adapters/image/tower/blocks/attention/output/kernel"] == (None, "heads", "width")


def _flat(tree, prefix=""):
    if isinstance(tree, tuple):
        return {prefix.rstrip("/"): tree}
    return {path: names for key, value in tree.items() for path, names in _flat(value, f"{prefix}{key}/").items()}


def test_an_axis_is_split_as_far_as_the_devices_divide_it():
    split = layout(data=2, fsdp=4, tensor=2)
    assert split.partition_spec(("batch", "positions", "vocabulary"), (16, 8, 30)) == PartitionSpec(
        ("data", "fsdp"), None, "tensor"
    )
    assert split.partition_spec(("batch", None), (2, 8)) == PartitionSpec("data", None)
    assert split.partition_spec(("vocabulary", "width"), (31, 16)) == PartitionSpec(None, "fsdp")
    assert split.size("batch") == 8 and split.names("hidden") == ("tensor",) and split.size("positions") == 1


def test_a_rule_of_the_experiment_moves_an_axis():
    rules = RULES | {"batch": ("data",), "width": (), "hidden": ("tensor", "fsdp")}
    moved = MeshLayout(AbstractMesh((1, 1, 2, 1, 1, 2), AXES), MeshSpec(data=1, fsdp=2, tensor=2, rules=rules))
    assert moved.partition_spec(("width", "hidden"), (16, 32)) == PartitionSpec(None, ("tensor", "fsdp"))


def test_without_a_layout_nothing_happens_and_inside_one_it_can_be_put_aside():
    x = jnp.zeros((4, 4))
    assert constrain(x, "batch", None) is x and not is_split("batch")
    with use_layout(layout(data=4)):
        assert is_split("batch")
        with use_layout(None):
            assert constrain(x, "batch", None) is x and not is_split("batch")


def test_one_device_is_a_mesh_too():
    alone = make_layout(MeshSpec(), jax.devices()[:1])
    assert alone.summary() == "data 1" and alone.size("batch") == 1
