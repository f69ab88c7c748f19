"""Check that an installation is the built package, and brought nothing that it does not need.

    python alone.py PACKAGE [ABSENT ...]

Says how long the import takes.
"""

import sys
import time
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec

package, *absent = sys.argv[1:]
if found := [name for name in absent if find_spec(name)]:
    sys.exit(f"an installation of {package} must not bring {found}")
started = time.perf_counter()
module = import_module(package)
print(f"import {package}: {time.perf_counter() - started:.2f} s")
if "site-packages" not in str(module.__file__):
    sys.exit(f"{package} must come from its wheel, got {module.__file__}")
if module.__version__ != (built := version(package.replace("_", "-"))):
    sys.exit(f"{package} must call itself what its wheel does, {built}, got {module.__version__}")
