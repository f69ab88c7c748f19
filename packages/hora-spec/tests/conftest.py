"""The tests of this package need nothing of the repository."""

from hora_spec.testing.profiles import use_fast

use_fast()
