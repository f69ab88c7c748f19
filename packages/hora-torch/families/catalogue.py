"""All families of the table; each is built only when it is asked for."""

from collections.abc import Callable

import other_families
import timm_families
import transformers_families
from family import Family

FAMILIES: dict[str, Callable[[], Family]] = {
    **transformers_families.families(),
    **timm_families.families(),
    **other_families.families(),
}
