"""``hora-bench demo``: the whole life of an adapter on both backends, in minutes."""
