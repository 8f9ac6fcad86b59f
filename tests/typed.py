"""What checks the types of annotated functions while tests run."""

import functools
import inspect
import threading
import types
import typing

import beartype
import jaxtyping

_whole = jaxtyping.jaxtyped
_made: dict = {}  # what checks the calls of a function inside of another, by its code
_called = threading.local()
_checked = beartype.beartype(conf=beartype.BeartypeConf(violation_type=jaxtyping.TypeCheckError))


def install(package):
    """All of this package that is imported from now on is checked."""
    jaxtyping.jaxtyped = jaxtyped
    jaxtyping.install_import_hook(package, "typed.check")


def check(function):
    """`beartype`, which writes code for each function, only for those that are called: a worker calls few of them."""
    checked = None

    @functools.wraps(function)
    def call(*args, **kwargs):
        nonlocal checked
        if checked is None:
            checked = _checked(function)
        return checked(*args, **kwargs)

    return call


def jaxtyped(*, typechecker):
    """jaxtyping's, which writes code as well, once for each function in the source.

    One inside of another is there anew at each call of that one, with annotations that are the same: what checks the
    first checks all of them, told at each call which it is.
    """
    decorate = _whole(typechecker=typechecker)

    def decorated(function):
        if not isinstance(function, types.FunctionType):
            return decorate(function)
        if not function.__annotations__:
            return function
        if "<locals>" not in function.__qualname__:
            return _by_its_hints(function, decorate, typechecker)
        key = function.__module__, function.__code__
        if key not in _made:
            _made[key] = decorate(_any_like(function))
        checked = _made[key]

        @functools.wraps(function)
        def call(*args, **kwargs):
            waiting = _called.__dict__.setdefault("waiting", [])
            before = len(waiting)
            waiting.append(function)
            try:
                return checked(*args, **kwargs)
            finally:
                del waiting[before:]  # where its arguments are wrong, it was not called

        return call

    return decorated


def _by_its_hints(function, decorate, typechecker):
    """Shapes are remembered at the calls of functions of arrays alone. Hints in quotes are read at the first call."""
    if not any(isinstance(hint, str) for hint in function.__annotations__.values()):
        return decorate(function) if any(map(_of_shapes, function.__annotations__.values())) else typechecker(function)
    checked = None

    @functools.wraps(function)
    def call(*args, **kwargs):
        nonlocal checked
        if checked is None:
            try:
                hints = typing.get_type_hints(function).values()
            except (AttributeError, NameError, TypeError):  # of what is imported for types alone
                hints = None
            named = map(function.__globals__.get, function.__annotations__.values())
            if any(isinstance(hint, types.FunctionType) for hint in named):
                return function(*args, **kwargs)  # a test has put something else in the place of a type
            shaped = hints is None or any(map(_of_shapes, hints))
            checked = decorate(function) if shaped else _checked(function)
        return checked(*args, **kwargs)

    return call


def _of_shapes(hint):
    """Whether there is a type of arrays in it, or may be."""
    if isinstance(hint, str) or type(hint).__module__.startswith("jaxtyping"):
        return True
    return any(map(_of_shapes, hint if isinstance(hint, list) else typing.get_args(hint)))


def _any_like(function):
    """Of the same signature, in the same module: calls what was called last. It keeps nothing of `function` alive."""
    called = _called

    def like(*args, **kwargs):
        return called.waiting.pop()(*args, **kwargs)

    made = types.FunctionType(like.__code__, function.__globals__, closure=like.__closure__)
    functools.update_wrapper(made, function)
    del made.__wrapped__
    made.__signature__ = inspect.signature(function)
    return made
