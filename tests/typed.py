"""What checks the types of annotated functions while tests run."""

import functools

import beartype


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
