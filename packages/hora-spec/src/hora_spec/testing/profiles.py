"""How long Hypothesis searches: ``fast`` in every run, ``nightly`` where ``--hypothesis-profile=nightly`` asks for it.

Shapes come from small tables and values from seeds, so a few draws reach far; a new shape costs JAX a compile.
"""

from hypothesis import HealthCheck, settings

_BOTH = settings(deadline=None, print_blob=True, suppress_health_check=[HealthCheck.too_slow])

settings.register_profile("fast", _BOTH, derandomize=True, max_examples=25)
settings.register_profile("nightly", _BOTH, derandomize=False, max_examples=500)


def use_fast() -> None:
    """Search as in every run, unless one of the two profiles is in use already.

    For a ``conftest.py``. pytest reads those below its first arguments after it has heard ``--hypothesis-profile``.
    """
    if settings.get_current_profile_name() not in ("fast", "nightly"):
        settings.load_profile("fast")
