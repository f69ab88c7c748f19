"""A `HoraModel` answers, is set and changes as its merged base does, or refuses: whatever is asked of either."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hora_jax import Target, init, make_plan
from hora_jax.modules import holds_nodes
from hora_jax.nnx import HoraModel, HoraParam
from hora_spec import HoraError


class Base(nnx.Module):
    """Every way in which a class offers something: methods of all kinds, properties, settings, state."""

    def __init__(self):
        self.proj = nnx.Linear(8, 8, use_bias=False, rngs=nnx.Rngs(0))
        self.drop, self.count = nnx.Dropout(0.5, rngs=nnx.Rngs(2)), nnx.Variable(jnp.array(0))
        self.old, self.table = nnx.Cache(jnp.zeros(2)), jnp.ones(2)
        self.dropout, self.plain, self._gain, self.mode, self.steps = 0.25, jnp.tanh, 1.0, "a", 0
        self.bound = None

    def __call__(self, x, *, shift=0.0):
        return self.proj(x) * self._gain + shift + self.steps

    gain = property(lambda self: self._gain, lambda self, value: setattr(self, "_gain", value))
    norm = property(lambda self: jnp.linalg.norm(self.proj.kernel[...]))
    number = property(lambda self: float(self.proj.kernel[...].sum()))
    part = property(lambda self: self.proj)
    encoder = property(lambda self: self.proj.__call__)
    later = property(lambda self: functools.partial(lambda f, x: f(x), self.proj))
    defaults = {"width": 8}  # noqa: RUF012
    cached = functools.cached_property(lambda self: self.proj.kernel[...].sum())
    shifted = functools.partialmethod(__call__, shift=1.0)

    @nnx.jit
    def compiled(self, x):
        return self(x)

    @nnx.remat
    def again(self, x):
        return self(x)

    @functools.partial(jax.jit, static_argnums=0)
    def by_jax(self, x):
        return self(x)

    @functools.singledispatchmethod
    def dispatched(self, x):
        return self(x)

    @classmethod
    def name(cls):
        return cls.__name__

    @staticmethod
    def double(x):
        return 2 * x

    def _private(self, x):
        return self(x)

    def itself(self):
        return self

    def closure(self):
        return lambda x: self.proj(x)

    def each(self, x):
        yield self.proj(x)

    def configure(self, mode):
        self.mode, self.added = mode, "new"
        return self

    def forget(self):
        del self.mode, self.old

    def tick(self):
        self.steps += 1
        self.count[...] += 2
        self.table = self.table * 3
        return self.steps

    def make_cache(self, size):
        self.cache = nnx.Cache(jnp.zeros(size))

    def replace(self):
        self.proj = nnx.Linear(8, 8, use_bias=False, rngs=nnx.Rngs(1))

    def eval(self, **attributes):
        self.mode = "evaluated"
        super().eval(**attributes)


X = jax.random.normal(jax.random.key(0), (3, 8))
METHODS = ("compiled", "again", "by_jax", "dispatched", "shifted", "_private", "__call__", "double", "plain")


def _set(**settings):
    def ask(model):
        for name, value in settings.items():
            setattr(model, name, value)
        return model(X)

    return ask


def _then_call(name, *args):
    return lambda model: [getattr(model, name)(*args), getattr(model, name)(*args), model(X)][1:]


ANSWERED = {
    **{name: lambda model, name=name: getattr(model, name)(X) for name in METHODS},
    "keywords alone": lambda model: model(x=X, shift=2.0),
    "under nnx.jit": lambda model: nnx.jit(lambda model, x: model.tick() + model.compiled(x))(model, X),
    "settings": lambda model: (model.gain, model.mode, model.dropout, model._gain, model.name()),
    "an array": lambda model: model.norm,
    "a setting": _set(mode="b", steps=3),
    "a property": _set(gain=2.0),
    "a new setting": _set(unheard_of=1),
    "an array to set": _set(table=jnp.zeros(2)),
    "a name of ours": _set(dropout=0.5),
    "set_attributes": lambda model: [model.set_attributes(steps=2, deterministic=True), model(X)][1:],
    "eval": lambda model: [model.eval(), model.mode][1:],
    "train": lambda model: [model.train(), model.mode][1:],
    "counting": _then_call("tick"),
    "configuring": lambda model: model.configure("b").mode,
    "forgetting": lambda model: [model.forget(), hasattr(model, "mode")][1:],
    "making a cache": _then_call("make_cache", 3),
    "a view": lambda model: nnx.view(model, deterministic=True)(X),
}
REFUSED = {
    "number": lambda model: model.number,
    "part": lambda model: model.part,
    "proj": lambda model: model.proj,
    "count": lambda model: model.count,
    "table": lambda model: model.table,
    "encoder": lambda model: model.encoder,
    "later": lambda model: model.later,
    "bound": lambda model: model.bound,
    "closure": lambda model: model.closure(),
    "each": lambda model: model.each(X),
    "replace": lambda model: model.replace(),
    "setting a part": lambda model: setattr(model, "proj", None),
    "setting another part": lambda model: setattr(model, "other", nnx.Linear(2, 2, rngs=nnx.Rngs(0))),
    "a part by apply": lambda model: model.apply(lambda base: {"a": [base.proj]}),
}


@pytest.fixture
def model(method, perturbed):
    base = Base()
    planned = make_plan(base, method, [Target("proj.kernel", "q", "d (h k)", heads=2, layer="layer")])
    return HoraModel(base, planned, perturbed(init(planned)))


def _state(module):
    """Settings and other state, without weights."""
    found = {f"{path}": v[...] for path, v in nnx.to_flat_state(nnx.state(module, nnx.Not(nnx.Param)))}
    return found | {name: v for name, v in vars(module).items() if isinstance(v, str | int | float)}


@pytest.mark.parametrize("ask", ANSWERED.values(), ids=ANSWERED)
def test_a_model_answers_and_changes_as_its_merged_base(model, ask):
    merged = model.merged()
    expected, got = ask(merged), ask(model)
    jax.tree.map(
        lambda a, b: a == b if isinstance(a, str) else np.testing.assert_allclose(a, b, atol=1e-5), got, expected
    )
    before, after = _state(merged), _state(model.base)
    assert before.keys() == after.keys()
    assert all(np.all(before[name] == after[name]) for name in before), (before, after)


@pytest.mark.parametrize("ask", REFUSED.values(), ids=REFUSED)
def test_what_knows_no_adapter_is_refused_and_nothing_changes(model, ask):
    model.base.bound = model.base.proj.__call__
    before, x = _state(model.base), model(X)
    with pytest.raises((AttributeError, HoraError), match=r"merged\(\)|model\.base"):
        ask(model)
    assert _state(model.base).keys() == before.keys()
    np.testing.assert_array_equal(model(X), x)


def test_a_call_that_returns_its_modules_returns_those_it_was_given(model):
    other = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
    got = model.apply(lambda base, other: (base, [other], base.itself()), other)
    assert got[0] is model
    assert got[1][0] is other
    assert got[2] is model


def test_a_view_in_evaluation_drops_nothing_and_leaves_the_model_as_it_is(model):
    dropping = HoraModel(model.base, model.plan, model.adapter(), dropout=0.5)
    np.testing.assert_array_equal(nnx.view(dropping, deterministic=True)(X), model(X))
    with pytest.raises(HoraError, match="dropout_key"):
        dropping(X)
    dropping.deterministic = True
    np.testing.assert_array_equal(dropping(X), model(X))


def test_deterministic_is_set_in_a_base_that_has_it(method):
    base = Base()
    base.deterministic = True
    planned = make_plan(base, method, [Target("proj.kernel", "q", "d (h k)", heads=2, layer="layer")])
    model = HoraModel(base, planned, init(planned))
    assert base.deterministic
    model.deterministic = False
    assert not base.deterministic


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"base": {}}, "the base is an NNX module, got dict"),
        ({"dense": "maybe"}, "dense must be one of"),
        ({"dropout": 2.0}, "dropout must be a number in"),
    ],
)
def test_what_makes_no_model_is_refused_when_it_is_made(model, wrong, message):
    with pytest.raises(HoraError, match=message):
        HoraModel(**{"base": model.base, "plan": model.plan, "phi": model.adapter()} | wrong)


def test_a_planned_weight_that_a_call_returns_is_the_merged_one(model):
    got = model.apply(lambda base: {"w": base.proj.kernel[...]})["w"]
    np.testing.assert_allclose(got, model.merged().proj.kernel[...], atol=1e-6)


def test_a_module_that_a_call_makes_may_be_returned(model):
    made = model.apply(lambda base: nnx.Linear(8, 2, rngs=nnx.Rngs(0)))
    np.testing.assert_array_equal(made(X), nnx.Linear(8, 2, rngs=nnx.Rngs(0))(X))


def test_names_of_python_are_no_settings_of_the_base(model):
    model.base.__marker__ = 3
    assert not hasattr(model, "__marker__")
    with pytest.raises(AttributeError, match="'HoraModel' object has no attribute 'width'"):
        _ = HoraModel.__new__(HoraModel).width


def test_a_cached_property_is_that_of_the_weights_that_are_asked(model):
    """Of the base, of what is merged, and of each state of the adapter."""
    own = model.base.cached
    for _ in range(2):
        adapted, merged = model.apply(lambda base: base.cached), model.merged()
        np.testing.assert_allclose(adapted, merged.proj.kernel[...].sum(), rtol=1e-5)
        np.testing.assert_array_equal(merged.cached, merged.proj.kernel[...].sum())
        assert abs(adapted - own) > 1e-3
        assert model.base.cached is own
        for variable in jax.tree.leaves(nnx.state(model, HoraParam), is_leaf=lambda v: isinstance(v, nnx.Variable)):
            variable[...] = variable[...] * 2


def test_a_setting_that_is_stored_past_the_class_s_own_ways_is_kept(model):
    model.apply(lambda base: object.__setattr__(base, "noted", 3))
    assert model.base.noted == 3


def test_a_setting_of_the_class_is_that_of_the_base_and_no_copy(model):
    assert model.defaults is Base.defaults


def test_a_closure_over_a_name_without_a_value_holds_nothing():
    def closure():
        return later

    if False:
        later = None
    assert not holds_nodes(closure)
