"""The expressions of claims: what each form means, and what is said of those that mean nothing."""

import numpy as np
import pytest

from polygpt.ablation.expressions import Comparison, Junction, Reader, written
from polygpt.errors import SpecError

AXES = {"width": (64, 128, 256), "rate": (1e-3, 3e-3), "schedule": ("cosine", "linear")}
RNG = np.random.default_rng(0)
A, B = RNG.normal(3, 1, (4, 3, 2, 2)), RNG.normal(3, 1, (4, 3, 2, 2))
FLAT = {"a": RNG.normal(3, 1, 4), "b": RNG.normal(3, 1, 4), "c": RNG.normal(3, 1, 4)}


def value(expression, values=None, axes=AXES, **options):
    """What each seed has for a term, [S]."""
    reader = Reader(values or {"a": A, "b": B}, axes, noise=0.25, **options)
    statement = reader.read(f"{expression} < noise")
    assert isinstance(statement, Comparison)
    return statement.left.values.reshape(-1)


POINT = "at({}, width=64, rate=0.001, schedule='cosine')"


def seen(tree):
    """A statement as nested tuples of texts."""
    if isinstance(tree, Comparison):
        return tree.text
    return ("all" if tree.every else "any", *map(seen, tree.parts))


def statement(text, values=FLAT, axes=None, **options):
    return seen(Reader(values, axes or {}, noise=0.25, **options).read(text))


def fault(text, values=None, axes=AXES):
    with pytest.raises(SpecError) as caught:
        Reader(values or {"a": A, "b": B}, axes, noise=0.25).read(text)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- terms ------------------------------------------------------------------------------------------------------------


def corner(x):
    return x[:, 0, 0, 0]


@pytest.mark.parametrize(
    "expression, expected",
    [
        ("at(a, width=128, rate=0.003, schedule='linear')", A[:, 1, 1, 1]),
        ("at(at(at(a, rate=3e-3), width=256), schedule='cosine')", A[:, 2, 1, 0]),
        ("at(mean(mean(a, over=width), over=rate), schedule='cosine')", A[:, :, :, 0].mean(axis=(1, 2))),
        ("at(min(a, over=width), rate=0.001, schedule='cosine')", A[:, :, 0, 0].min(axis=1)),
        ("at(max(a, over=rate), width=64, schedule='cosine')", A[:, 0, :, 0].max(axis=1)),
        ("at(rise(a, over=width), rate=0.001, schedule='cosine')", A[:, 2, 0, 0] - A[:, 0, 0, 0]),
        ("at(spread(a, over=width), rate=0.001, schedule='cosine')", np.ptp(A[:, :, 0, 0], axis=1)),
        ("at(argmin(a, over=width), rate=0.001, schedule='cosine')", A[:, :, 0, 0].argmin(axis=1)),
        ("spread(argmin(at(a, schedule='linear'), over=rate), over=width)", np.ptp(A[..., 1].argmin(axis=2), axis=1)),
        (f"{POINT.format('a')} + 2 * {POINT.format('b')} / 3 - noise", corner(A) + 2 * corner(B) / 3 - 0.25),
        (f"-{POINT.format('a - b')}", corner(B - A)),
        (f"mean({POINT.format('a')}, 1, {POINT.format('b')})", (corner(A) + corner(B) + 1) / 3),
        ("at(max(abs(a - b), over=width), rate=0.001, schedule='cosine')", np.abs(A - B)[:, :, 0, 0].max(axis=1)),
        ("at(mean(min(a, b), over=width), rate=0.001, schedule='cosine')", np.minimum(A, B)[:, :, 0, 0].mean(axis=1)),
    ],
)
def test_terms(expression, expected):
    np.testing.assert_allclose(value(expression), expected, rtol=1e-12)


def test_best_is_the_lower_or_the_higher():
    text = "at(best(a, over=width), rate=0.001, schedule='cosine')"
    np.testing.assert_array_equal(value(text, better="lower"), A[:, :, 0, 0].min(axis=1))
    np.testing.assert_array_equal(value(text, better="higher"), A[:, :, 0, 0].max(axis=1))
    assert statement("best(a, b) < c", better="lower") == ("any", "a < c", "b < c")
    assert statement("best(a, b) < c", better="higher") == ("all", "a < c", "b < c")


def test_argmin_of_equals_is_the_mean_of_their_places():
    x = np.array([[2.0, 1.0, 1.0], [1.0, 2.0, 1.0], [1.0, 1.0, 1.0], [3.0, 2.0, 1.0]])
    np.testing.assert_array_equal(value("argmin(a, over=width)", {"a": x}, {"width": (1, 2, 3)}), [1.5, 1, 1, 2])


@pytest.mark.parametrize("function", ["min", "max", "mean", "best", "rise", "spread", "argmin"])
def test_what_is_missing_at_one_value_is_missing_over_all(function):
    x = A[:, :, 0, 0].copy()
    x[1, 1], x[2, 0] = np.nan, np.inf
    missing = np.isnan(value(f"{function}(a, over=width)", {"a": x}, {"width": (1, 2, 3)}))
    np.testing.assert_array_equal(missing, [False, True, True, False])


def test_a_division_by_zero_is_a_missing_value():
    values = {"a": np.array([1.0, 0.0, 2.0, 0.0]), "b": np.array([0.0, 0.0, 1.0, 1.0])}
    np.testing.assert_array_equal(value("a / b", values, {}), [np.nan, np.nan, 2.0, 0.0])


def test_names_are_written_with_underscores():
    names = ["post-norm", "rope + swiglu", "4 heads", "GLU (bilinear)", "None", "µP", "base"]
    assert list(map(written, names)) == ["post_norm", "rope_swiglu", "_4_heads", "GLU_bilinear", "None_", "μP", "base"]
    values = dict.fromkeys(names, FLAT["a"])
    assert statement("post_norm < rope_swiglu < _4_heads", values) == (
        "all",
        "post_norm < rope_swiglu",
        "rope_swiglu < _4_heads",
    )
    assert statement("None_ > µP", values) == "μP < None_"


# --- statements -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, expected",
    [
        ("a < b", "a < b"),
        ("a > b", "b < a"),
        ("a < b < c", ("all", "a < b", "b < c")),
        ("a < b > c", ("all", "a < b", "c < b")),
        ("a < b and c - a > 2 * noise", ("all", "a < b", "2 * noise < c - a")),
        ("abs(a - b) < noise", ("all", "a - b < noise", "-(a - b) < noise")),
        ("abs(a - b) > noise", ("any", "noise < a - b", "noise < -(a - b)")),
        ("a < min(b, c)", ("all", "a < b", "a < c")),
        ("a < max(b, c)", ("any", "a < b", "a < c")),
        ("min(a, b) < c", ("any", "a < c", "b < c")),
        ("max(a, b) < min(b, c)", ("all", ("all", "a < b", "a < c"), ("all", "b < b", "b < c"))),
        ("min(b, c) - a > noise", ("all", "noise < b - a", "noise < c - a")),
        ("a - min(b, c) < noise", ("all", "a - b < noise", "a - c < noise")),
        ("-2 * min(b, c) < a", ("all", "-2 * b < a", "-2 * c < a")),
        ("max(a, b) / 2 < c", ("all", "a / 2 < c", "b / 2 < c")),
    ],
)
def test_statements(text, expected):
    assert statement(text) == expected


def test_statements_over_a_factor():
    values, axes = {"a": A[:, :, 0, 0]}, {"width": (64, 128, 256)}
    rise = "rise(a, over=width)"
    assert statement("flat(a, over=width)", values, axes) == ("all", f"{rise} < noise", f"-{rise} < noise")
    assert statement("constant(a, over=width)", values, axes) == "spread(a, over=width) < 1.5"
    assert statement("at(min(a, 9), width=64) < 5", values, axes) == ("any", "at(a, width=64) < 5", "9 < 5")


@pytest.mark.parametrize(
    "text",
    [
        "abs(a - b) < noise",
        "abs(a - b) > noise",
        "a < max(b, min(c, a + 1))",
        "3 - 2 * abs(min(a, b) - c) > noise - 1",
        "max(a, 2 - b) / 3 - min(b, c) < abs(a)",
        "mean(min(a, b), max(b, c)) < c",
        "not_less > a",
    ],
)
def test_a_choice_is_true_of_numbers_where_python_says_so(text):
    """Without chance, a statement about means is an inequality of numbers, which Python can decide."""
    rng = np.random.default_rng(3)
    outcomes = []
    for _ in range(200):
        a, b, c, less = rng.normal(0, 1, 4)
        arrays = {name: np.array([number]) for name, number in zip("abc", (a, b, c), strict=True)}
        tree = Reader({**arrays, "not-less": np.array([less])}, {}, noise=0.25).read(text)
        names = {"a": a, "b": b, "c": c, "not_less": less, "noise": 0.25, "mean": lambda *x: sum(x) / len(x)}
        outcomes.append(eval(text, names))
        assert truth(tree) == outcomes[-1]
    assert 20 < sum(outcomes) < 180


def truth(tree):
    if isinstance(tree, Junction):
        return (all if tree.every else any)(map(truth, tree.parts))
    return tree.left.values.item() < tree.right.values.item()


# --- faults -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, said",
    [
        ("swigul < relu", "claim 'swigul < relu': no variant is named 'swigul': did you mean swiglu?"),
        ("swiglu < noisy * 2", "no variant is named 'noisy': did you mean noise?"),
        ("flatt(swiglu, over=width)", "is not a statement"),
        ("men(swiglu, over=width) < 3", "unknown function 'men': did you mean mean or min?"),
        ("at(swiglu, widht=64) < 3", "unknown factor 'widht': did you mean width?"),
        ("mean(swiglu, over=depth) < 3", "unknown factor 'depth': did you mean width?"),
        ("at(swiglu, width=65) < 3", "width is never 65: it is one of 64, 128"),
        ("at(swiglu, width='64') < 3", "width is never '64': it is one of 64, 128"),
        ("at(swiglu, width=relu) < 3", "width=relu: it must be a number or a quoted string"),
        ("mean(swiglu, over='width') < 3", "over='width': it must be the name of a factor"),
        ("swiglu - relu", "swiglu - relu is not a statement: write a < b"),
        ("swiglu", "is not a statement"),
        ("swiglu < 3 or relu < 3", "is not a statement"),
        ("not swiglu < 3", "is not a statement"),
        ("swiglu <= relu", "write < or >: no test distinguishes them from <= and >="),
        ("swiglu == relu", "for equality write abs(a - b) < noise"),
        ("swiglu < relu", "swiglu has a value for each width: write at(swiglu, width=128), or min, max, mean, rise,"),
        ("at(swiglu, width=64) < relu", "relu has a value for each width"),
        ("mean(mean(swiglu, over=width), over=width) < 3", "mean(swiglu, over=width) no longer depends on width"),
        ("rise(at(swiglu, width=64), over=width) < 3", "at(swiglu, width=64) no longer depends on width"),
        ("rise(swiglu, over=seedling) < 3", "rise over seedling, which has only one value"),
        ("noise < 3", "it names no variant: choose from swiglu, relu"),
        ("1 < 3", "it names no variant"),
        ("swiglu ** 2 < 3", "swiglu ** 2 is not a term: use variants, numbers, + - * / and at, abs, min"),
        ("swiglu.mean() < 3", "swiglu.mean() is not a term"),
        ("'swiglu' < 3", "'swiglu' is not a term"),
        ("True < 3", "True is not a term"),
        ("flat(swiglu, over=width) < 3", "flat(swiglu, over=width) is a statement, not a term"),
        ("min() < 3", "min(): write min(a, over=factor) or min(a, b)"),
        ("min(swiglu) < 3", "min(swiglu): write min(a, over=factor) or min(a, b)"),
        ("min(swiglu, relu, over=width) < 3", "write min(a, over=factor) or min(a, b)"),
        ("rise(swiglu, relu) < 3", "rise(swiglu, relu): write rise(a, over=factor)"),
        ("at(swiglu) < 3", "at(swiglu): write at(a, factor=value)"),
        ("at(swiglu, **relu) < 3", "write at(a, factor=value)"),
        ("abs(swiglu, relu) < 3", "write abs(a)"),
        ("min(swiglu, relu) * relu < 3", "a min, max or abs of terms can only be multiplied or divided by numbers"),
        ("2 / abs(swiglu) < 3", "a min, max or abs of terms can only be multiplied or divided by numbers"),
        ("swiglu / 0 < 3", "swiglu is divided by 0"),
        ("swiglu < ", "claim 'swiglu <': invalid syntax"),
        ("swiglu < 1\n and relu <", "claim 'swiglu < 1 and relu <': invalid syntax"),
    ],
)
def test_faults(text, said):
    x = np.ones((4, 2, 1))
    assert said in fault(text, {"swiglu": x, "relu": x}, {"width": (64, 128), "seedling": (1,)})


def test_a_factor_of_one_value_need_not_be_taken_over():
    assert statement("a < 3", {"a": A[:, :1, 0, 0]}, {"width": (64,)}) == "a < 3"


def test_names_that_cannot_be_told_apart():
    with pytest.raises(SpecError, match="variants 'a b' and 'a-b' are both written a_b in claims: rename one"):
        Reader({"a b": FLAT["a"], "a-b": FLAT["a"]}, {})
    with pytest.raises(SpecError, match="a variant is named noise"):
        Reader({"noise": FLAT["a"]}, {})
