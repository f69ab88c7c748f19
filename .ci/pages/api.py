"""For griffe, which gives all parameters of one entry the default of the first: an entry for each."""

import sys
from pathlib import Path

import griffe

sys.path.insert(0, str(Path(__file__).parents[1]))

from pages.entries import ungrouped


class EachParameter(griffe.Extension):
    """Ungroups every docstring before it is read."""

    def on_instance(self, *, obj: griffe.Object, **_: object) -> None:
        """Called for every object of a package."""
        if obj.docstring:
            obj.docstring.value = ungrouped(obj.docstring.value)
