"""What checks the types of annotated functions while tests run."""

import functools
import inspect
import threading
import types

import beartype
import jaxtyping

_whole = jaxtyping.jaxtyped
_made: dict = {}  # what checks the calls of a function inside of another, by its code
_called = threading.local()


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
            checked = beartype.beartype(function)
        return checked(*args, **kwargs)

    return call


def jaxtyped(*, typechecker):
    """jaxtyping's, which writes code as well, once for each function in the source.

    One inside of another is there anew at each call of that one, with annotations that are the same: what checks the
    first checks all of them, told at each call which it is.
    """
    decorate = _whole(typechecker=typechecker)

    def decorated(function):
        if not isinstance(function, types.FunctionType) or "<locals>" not in function.__qualname__:
            return decorate(function)
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
